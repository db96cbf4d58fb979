package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
)

func hello(name string) *tls.ClientHelloInfo {
	return &tls.ClientHelloInfo{
		ServerName: name, SupportedVersions: []uint16{tls.VersionTLS13}, CipherSuites: []uint16{tls.TLS_AES_128_GCM_SHA256},
		SignatureSchemes: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}, SupportedCurves: []tls.CurveID{tls.CurveP256},
	}
}

// writePair writes a self-signed certificate for names and returns where.
func writePair(t *testing.T, dir, base string, names ...string) Pair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: newSerial(), DNSNames: names, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(90 * 24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	p := Pair{filepath.Join(dir, base+".pem"), filepath.Join(dir, base+".key")}
	for name, b := range map[string]*pem.Block{p.Cert: {Type: "CERTIFICATE", Bytes: der}, p.Key: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func TestFilesAreMatchedByName(t *testing.T) {
	dir := t.TempDir()
	s := &Store{Files: []Pair{writePair(t, dir, "a", "blog.example", "*.shop.example"), writePair(t, dir, "b", "exact.shop.example")}}
	if err := s.Load(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"blog.example": "blog.example", "BLOG.example.": "blog.example",
		"x.shop.example": "blog.example", "exact.shop.example": "exact.shop.example",
		"a.b.shop.example": "", "shop.example": "", ".shop.example": "", "other.example": "", "": "",
	} {
		c, err := s.GetCertificate(hello(name))
		switch {
		case want == "" && webgw.KindOf(err) != webgw.NotFound:
			t.Errorf("%q: %v, %v", name, c, err)
		case want != "" && (err != nil || c.Leaf.DNSNames[0] != want):
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestValidCertificatesGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		old := writePair(t, dir, "old", "blog.example")
		time.Sleep(60 * 24 * time.Hour)
		renewed := writePair(t, dir, "new", "blog.example")
		s := &Store{Files: []Pair{old, renewed}}
		if err := s.Load(); err != nil {
			t.Fatal(err)
		}
		first, err := s.GetCertificate(hello("blog.example"))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(40 * 24 * time.Hour) // the first one has ended
		second, err := s.GetCertificate(hello("blog.example"))
		if err != nil {
			t.Fatal(err)
		}
		if !second.Leaf.NotAfter.After(first.Leaf.NotAfter) {
			t.Errorf("served until %v, then until %v", first.Leaf.NotAfter, second.Leaf.NotAfter)
		}
	})
}

func TestWrongFilesAreNamed(t *testing.T) {
	dir := t.TempDir()
	a, b := writePair(t, dir, "a", "a.example"), writePair(t, dir, "b", "b.example")
	junk, nameless := filepath.Join(dir, "junk"), writePair(t, dir, "nameless")
	if err := os.WriteFile(junk, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		pair       Pair
		file, says string
	}{
		{Pair{filepath.Join(dir, "gone"), a.Key}, filepath.Join(dir, "gone"), "no such file"},
		{Pair{a.Cert, filepath.Join(dir, "gone")}, filepath.Join(dir, "gone"), "no such file"},
		{Pair{a.Cert, b.Key}, b.Key, "not that of the certificate"},
		{Pair{a.Cert, junk}, junk, "no private key"},
		{Pair{junk, a.Key}, junk, "no certificate"},
		{Pair{a.Key, a.Key}, a.Key, "no certificate"},
		{nameless, nameless.Cert, "no DNS name"},
	} {
		err := (&Store{Files: []Pair{b, tt.pair}}).Load()
		e, ok := err.(*webgw.Error)
		if !ok || e.Field != tt.file || !strings.Contains(e.Public, tt.says) {
			t.Errorf("%v: %v, want %q about %s", tt.pair, err, tt.says, tt.file)
		}
	}
}

func TestWatchReloadsAndKeepsTheLastGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		p := writePair(t, dir, "a", "one.example")
		s := &Store{Files: []Pair{p}}
		if err := s.Load(); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := s.Watch(t.Context()); err != nil {
				t.Error(err)
			}
		})
		has := func(name string) bool { _, err := s.GetCertificate(hello(name)); return err == nil }
		set := func(name string, data []byte, at time.Time) {
			if err := os.WriteFile(name, data, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(name, at, at); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		key, err := os.ReadFile(p.Key)
		if err != nil {
			t.Fatal(err)
		}
		set(p.Key, []byte("half a k"), time.Unix(1000, 0))
		time.Sleep(watchEvery + time.Second)
		synctest.Wait()
		if !has("one.example") {
			t.Error("lost by a damaged key")
		}
		set(p.Key, key, time.Unix(2000, 0))
		q := writePair(t, dir, "b", "two.example")
		for from, to := range map[string]string{q.Cert: p.Cert, q.Key: p.Key} {
			if err := os.Rename(from, to); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(watchEvery + time.Second)
		synctest.Wait()
		if has("one.example") || !has("two.example") {
			t.Error("not reloaded")
		}
	})
}

func TestDevelopmentCA(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	asked := 0
	open := func() *Store {
		s := &Store{Dir: dir, Host: "gent", Allowed: func(name string) bool { asked++; return strings.HasSuffix(name, ".example") }}
		if err := s.Load(); err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	info, err := os.Stat(filepath.Join(dir, caKeyFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v, %v", info.Mode(), err)
	}
	c, err := s.GetCertificate(hello("Blog.example"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(s.CAPEM()) {
		t.Fatal("CAPEM")
	}
	if _, err := c.Leaf.Verify(x509.VerifyOptions{DNSName: "blog.example", Roots: roots}); err != nil {
		t.Error(err)
	}
	if s.ca.cert.Subject.CommonName != "webgw development CA gent" {
		t.Error(s.ca.cert.Subject)
	}
	if again := open(); string(again.CAPEM()) != string(s.CAPEM()) {
		t.Error("a restart made another CA")
	}
	// Names that the table does not know, or that are none, are not minted.
	for _, name := range []string{"evil.test", "", "10.0.0.1", "a b.example", "*.example", "..example", strings.Repeat("a", 64) + ".example"} {
		if _, err := s.GetCertificate(hello(name)); webgw.KindOf(err) != webgw.NotFound {
			t.Errorf("%q: %v", name, err)
		}
	}
	if n := s.minted.order.Len(); n != 1 {
		t.Errorf("%d certificates are kept", n)
	}
	if err := os.Remove(filepath.Join(dir, caKeyFile)); err != nil {
		t.Fatal(err)
	}
	if err := (&Store{Dir: dir}).Load(); err == nil || !strings.Contains(err.Error(), caKeyFile) {
		t.Errorf("without its key: %v", err)
	}
}

func TestMintingOncePerNameAndRenewalAtHalf(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := &Store{Dir: dir, Allowed: func(string) bool { return true }}
		if err := s.Load(); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		got := make([]*tls.Certificate, 50)
		for i := range got {
			wg.Go(func() { got[i], _ = s.GetCertificate(hello("a.example")) })
		}
		wg.Wait()
		for _, c := range got {
			if c == nil || c != got[0] {
				t.Fatal("not one certificate for all")
			}
		}
		time.Sleep(leafLife/2 - time.Minute)
		if c, _ := s.GetCertificate(hello("a.example")); c != got[0] {
			t.Error("renewed too early")
		}
		time.Sleep(2 * time.Minute)
		if c, _ := s.GetCertificate(hello("a.example")); c == got[0] {
			t.Error("not renewed at half its life")
		}
	})
}

func TestCacheIsBounded(t *testing.T) {
	var c cache
	for i := range maxLeafs + 10 {
		c.entry(fmt.Sprint(i))
	}
	if c.order.Len() != maxLeafs || len(c.by) != maxLeafs || c.by["9"] != nil || c.by["10"] == nil {
		t.Errorf("%d, %d entries", c.order.Len(), len(c.by))
	}
}
