package cli

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/netx"
)

// ownerKey loads the owner's key, or makes one and tells so.
func (a *app) ownerKey(path string) (ident.Key, error) {
	path, err := a.ownerKeyPath(path)
	if err != nil {
		return ident.Key{}, err
	}
	key, created, err := ident.LoadOrCreate(path)
	if err != nil {
		if _, ok := errors.AsType[*webgw.Error](err); !ok {
			err = &webgw.Error{Op: "make key", Kind: webgw.Forbidden, Public: "the key file " + path + " can't be made", Hint: reasonOf(err), Err: err}
		}
		return ident.Key{}, err
	}
	if created {
		a.notef("made your identity %s in %s; back this file up: whoever loses it can't change what it has declared\n", key.ID(), path)
	}
	return key, nil
}

func (a *app) ownerKeyPath(path string) (string, error) {
	if path != "" {
		return path, nil
	}
	dir, err := a.configDir()
	return dir + "/owner.key", err
}

// client returns a client of the registry named, which is pinned by its
// identity or trusted on first use.
func (a *app) client(registry string, key ident.Key, nw netx.Net) (*client.Client, error) {
	known, err := a.knownRegistries()
	if err != nil {
		return nil, err
	}
	if registry == "" {
		if registry, err = known.only(); err != nil {
			return nil, err
		}
	}
	id, addr, err := client.ParseRegistry(registry)
	if e, ok := errors.AsType[*webgw.Error](err); ok && e.Field == "" {
		c := *e
		c.Field = "registry"
		return nil, &c
	}
	if err != nil {
		return nil, err
	}
	c := &client.Client{Endpoints: []string{addr}, Server: id, Key: key, Net: nw}
	if id.IsZero() {
		c.TrustServer = known.trust
	}
	return c, nil
}

// pinned returns a registry as ID@host:port: one without ID is looked up among
// the known ones, or asked, once.
func (a *app) pinned(ctx context.Context, registry string, key ident.Key, nw netx.Net) (string, error) {
	id, addr, err := client.ParseRegistry(registry)
	if err != nil || !id.IsZero() {
		return registry, err
	}
	known, err := a.knownRegistries()
	if err != nil {
		return "", err
	}
	if id, err = known.find(addr); err == nil && id.IsZero() {
		c := &client.Client{Endpoints: []string{addr}, Key: key, TrustServer: known.trust, Net: nw}
		defer c.Close()
		if _, err = c.Info(ctx); err == nil {
			id, err = known.find(addr)
		}
	}
	if err != nil {
		return "", err
	}
	return id.String() + "@" + addr, nil
}

// knownRegistries are the identities met before, in a file of lines
// "host:port identity".
type knownRegistries struct {
	path string
	note func(format string, args ...any)

	mu sync.Mutex // dials may come at once
}

func (a *app) knownRegistries() (*knownRegistries, error) {
	dir, err := a.configDir()
	return &knownRegistries{path: dir + "/known_registries", note: a.notef}, err
}

type knownRegistry struct {
	addr string
	id   webgw.ID
}

func (k *knownRegistries) read() ([]knownRegistry, error) {
	data, err := os.ReadFile(k.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, &webgw.Error{Op: "read known registries", Kind: webgw.Forbidden, Public: k.path + " can't be read", Hint: reasonOf(err), Err: err}
	}
	var all []knownRegistry
	lines := bufio.NewScanner(bytes.NewReader(data))
	for n := 1; lines.Scan(); n++ {
		words := strings.Fields(lines.Text())
		if len(words) == 0 || strings.HasPrefix(words[0], "#") {
			continue
		}
		var id webgw.ID
		err := fmt.Errorf("want two words")
		if len(words) == 2 {
			id, err = webgw.ParseID(words[1])
		}
		if err != nil {
			return nil, &webgw.Error{Op: "read known registries", Kind: webgw.Invalid, Public: fmt.Sprintf("%s:%d: is not \"host:port identity\"", k.path, n), Hint: "remove the line", Err: err}
		}
		all = append(all, knownRegistry{words[0], id})
	}
	return all, lines.Err()
}

// find returns the identity known for an address, or zero.
func (k *knownRegistries) find(addr string) (webgw.ID, error) {
	all, err := k.read()
	for _, r := range all {
		if r.addr == addr {
			return r.id, err
		}
	}
	return webgw.ID{}, err
}

// only returns the one registry that is known.
func (k *knownRegistries) only() (string, error) {
	all, err := k.read()
	switch {
	case err != nil:
		return "", err
	case len(all) == 1:
		return all[0].id.String() + "@" + all[0].addr, nil
	case len(all) == 0:
		return "", invalid("registry", "give --registry ID@host:port once, or set WEBGW_REGISTRY; a gateway prints it at its start", "missing: no registry is known yet")
	}
	var names []string
	for _, r := range all {
		names = append(names, r.addr)
	}
	return "", invalid("registry", "give --registry, or set WEBGW_REGISTRY", "missing: several registries are known: %s", strings.Join(names, ", "))
}

// trust believes an identity that is met at an address for the first time, and
// notes it; it refuses another one later.
func (k *knownRegistries) trust(addr string, id webgw.ID) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	known, err := k.find(addr)
	switch {
	case err != nil:
		return err
	case known == id:
		return nil
	case !known.IsZero():
		return &webgw.Error{Op: "trust registry", Kind: webgw.Unauthenticated,
			Public: fmt.Sprintf("the registry at %s is not the one met before: it is %s, known is %s", addr, id, known),
			Hint:   fmt.Sprintf("somebody may be in between; if its operator confirms the new identity, remove the line of %s from %s", addr, k.path)}
	}
	if err := k.add(addr, id); err != nil {
		return &webgw.Error{Op: "trust registry", Kind: webgw.Forbidden, Public: k.path + " can't be written", Hint: "give the registry as ID@host:port", Err: err}
	}
	k.note("met the registry at %s for the first time: it is %s, noted in %s\n", addr, id, k.path)
	return nil
}

func (k *knownRegistries) add(addr string, id webgw.ID) error {
	if err := os.MkdirAll(filepath.Dir(k.path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(k.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%s %s\n", addr, id) // one write: lines of two processes don't mix
	return errors.Join(err, f.Close())
}
