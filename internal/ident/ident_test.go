package ident

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"webgw.dev/webgw"
)

func TestKeysNeverShowTheirPrivateHalf(t *testing.T) {
	seed := [32]byte([]byte("a seed that is seen in the text!"))
	k := FromSeed(seed)
	type holder struct{ key Key }
	type config struct{ Key Key }
	var log bytes.Buffer
	lines := map[string]string{}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o", "%p", "%t"} {
		for _, v := range []any{k, &k, holder{k}, &holder{k}, config{k}, &config{k}, []Key{k}, map[string]Key{"k": k}, []any{holder{k}}} {
			lines[fmt.Sprintf("%s of %T", verb, v)] = fmt.Sprintf(verb, v)
		}
	}
	for name, h := range map[string]slog.Handler{"slog text": slog.NewTextHandler(&log, nil), "slog JSON": slog.NewJSONHandler(&log, nil)} {
		log.Reset()
		slog.New(h).LogAttrs(context.Background(), slog.LevelInfo, "m", slog.Any("key", k), slog.Any("pointer", &k), slog.Any("holder", holder{k}), slog.Any("config", config{k}), slog.Any("list", []Key{k}))
		if !strings.Contains(log.String(), k.ID().String()) {
			t.Errorf("%s does not show the identity: %s", name, &log)
		}
		lines[name] = log.String()
	}
	for _, v := range []any{k, &k, config{k}, []Key{k}, map[string]any{"k": k}} {
		b, err := json.Marshal(v)
		if err == nil {
			t.Errorf("%T is marshalled as %s", v, b)
		}
		lines[fmt.Sprintf("error of json.Marshal of %T", v)] = fmt.Sprint(err)
	}
	if b, err := json.Marshal(holder{k}); err != nil || string(b) != "{}" {
		t.Errorf("holder: %s, %v", b, err)
	}

	secrets := []string{string(seed[:]), hex.EncodeToString(seed[:8]), base64.StdEncoding.EncodeToString(seed[:9])}
	for _, format := range []string{"%v", "%#v", "%x", "%X", "%d", "%o"} { // as lists of numbers
		secrets = append(secrets, strings.Trim(fmt.Sprintf(format, seed[:6]), "[]{}"))
	}
	for name, line := range lines {
		for _, s := range secrets {
			if strings.Contains(strings.ToLower(line), strings.ToLower(s)) {
				t.Errorf("%s shows %q: %s", name, s, line)
			}
		}
	}
	if fmt.Sprint(k) != k.ID().String() || fmt.Sprintf("%s", k) != k.ID().String() {
		t.Errorf("a key prints as %v", k)
	}
}

func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "dir", "key.pem")
	k, created, err := LoadOrCreate(path)
	if err != nil || !created || k.IsZero() {
		t.Fatal(k, created, err)
	}
	again, created, err := LoadOrCreate(path)
	if err != nil || created || again.ID() != k.ID() {
		t.Errorf("%v, %v, %v", again, created, err)
	}
	for name, want := range map[string]fs.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	if err := testKey(1).Save(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Save over a key: %v", err)
	}
	if again, err := Load(path); err != nil || again.ID() != k.ID() {
		t.Errorf("after that: %v, %v", again, err)
	}
	if err := (Key{}).Save(filepath.Join(t.TempDir(), "zero")); err == nil {
		t.Error("the zero key is saved")
	}
	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(left) != 1 {
		t.Errorf("beside the key: %v, %v", left, err)
	}
}

func TestLoadRefuses(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good")
	if err := testKey(1).Save(good); err != nil {
		t.Fatal(err)
	}
	pemText, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	ecText := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	for _, tt := range []struct {
		name string
		make func(path string) error
		kind webgw.ErrorKind
		says string
	}{
		{"missing", func(string) error { return nil }, webgw.NotFound, "can't be read"},
		{"group", func(p string) error { return errors.Join(os.WriteFile(p, pemText, 0o600), os.Chmod(p, 0o640)) }, webgw.Forbidden, "mode 0640"},
		{"others", func(p string) error { return errors.Join(os.WriteFile(p, pemText, 0o600), os.Chmod(p, 0o604)) }, webgw.Forbidden, "mode 0604"},
		{"writable", func(p string) error { return errors.Join(os.WriteFile(p, pemText, 0o600), os.Chmod(p, 0o622)) }, webgw.Forbidden, "mode 0622"},
		{"link to others", func(p string) error {
			return errors.Join(os.WriteFile(p+"x", pemText, 0o600), os.Chmod(p+"x", 0o644), os.Symlink(p+"x", p))
		}, webgw.Forbidden, "mode 0644"},
		{"directory", func(p string) error { return os.Mkdir(p, 0o700) }, webgw.Invalid, "not a regular file"},
		{"empty", func(p string) error { return os.WriteFile(p, nil, 0o600) }, webgw.Invalid, "no PEM block"},
		{"half", func(p string) error { return os.WriteFile(p, pemText[:60], 0o600) }, webgw.Invalid, "no PEM block"},
		{"other block", func(p string) error {
			return os.WriteFile(p, bytes.ReplaceAll(pemText, []byte("PRIVATE"), []byte("PUBLIC")), 0o600)
		}, webgw.Invalid, "no PEM block"},
		{"damaged", func(p string) error {
			return os.WriteFile(p, bytes.Replace(pemText, []byte("\nMC4"), []byte("\nMD4"), 1), 0o600)
		}, webgw.Invalid, "damaged"},
		{"ECDSA", func(p string) error { return os.WriteFile(p, ecText, 0o600) }, webgw.Invalid, "not an ed25519 key"},
		{"large", func(p string) error { return os.WriteFile(p, make([]byte, 4097), 0o600) }, webgw.Invalid, "too large"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(dir, strings.ReplaceAll(tt.name, " ", "-"))
			if err := tt.make(path); err != nil {
				t.Fatal(err)
			}
			_, err := Load(path)
			if webgw.KindOf(err) != tt.kind || !strings.Contains(fmt.Sprint(err), tt.says) {
				t.Errorf("got %v, want %s: %s", err, tt.kind, tt.says)
			}
			if tt.kind == webgw.NotFound {
				return
			}
			if _, created, err := LoadOrCreate(path); err == nil || created {
				t.Errorf("LoadOrCreate makes a new key in its place: %v", err)
			}
		})
	}
}

func TestLoadOrCreateRace(t *testing.T) {
	for range 20 {
		path := filepath.Join(t.TempDir(), "key")
		var wg sync.WaitGroup
		var mu sync.Mutex
		ids := map[webgw.ID]int{}
		made := 0
		for range 8 {
			wg.Go(func() {
				k, created, err := LoadOrCreate(path)
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				ids[k.ID()]++
				if created {
					made++
				}
			})
		}
		wg.Wait()
		if len(ids) != 1 || made != 1 {
			t.Fatalf("%d keys, %d times created", len(ids), made)
		}
	}
}

func TestGenerate(t *testing.T) {
	a, err1 := Generate()
	b, err2 := Generate()
	if err1 != nil || err2 != nil || a.ID() == b.ID() || a.IsZero() {
		t.Error(a, b, err1, err2)
	}
	if !(Key{}).IsZero() || !(Key{}).ID().IsZero() {
		t.Error("the zero key is one")
	}
	// RFC 8032 section 7.1, test 1.
	seed, _ := hex.DecodeString("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
	id := FromSeed([32]byte(seed)).ID()
	if got := hex.EncodeToString(id[:]); got != "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a" {
		t.Errorf("got %s", got)
	}
}
