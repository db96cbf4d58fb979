// Package ident is the trust root: private keys and their files, signed
// envelopes around records, and mutual TLS in which the key is the identity.
//
// It must not know what a record means, who may declare what, or where
// envelopes are kept.
package ident

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"webgw.dev/webgw"
)

// Key is an identity together with its private half. The zero Key is none.
// Formatting or logging a Key shows its identity only.
type Key struct {
	// A closure is the one thing that package fmt never looks into: it calls no
	// methods on unexported fields, and would print the bytes of a Key in such a
	// field of somebody's struct; through a pointer too, for some verbs.
	signer func() ed25519.PrivateKey
}

func newKey(private ed25519.PrivateKey) Key {
	return Key{func() ed25519.PrivateKey { return private }}
}

func (k Key) sign(message []byte) []byte { return ed25519.Sign(k.signer(), message) }

// Generate makes a new identity from the system's randomness.
func Generate() (Key, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return Key{}, err
	}
	return newKey(private), nil
}

// FromSeed derives the identity of a 32-byte seed. It is for tests that need
// the same identities in every run.
func FromSeed(seed [32]byte) Key { return newKey(ed25519.NewKeyFromSeed(seed[:])) }

// IsZero reports whether k holds no key.
func (k Key) IsZero() bool { return k.signer == nil }

// ID returns the public identity.
func (k Key) ID() webgw.ID {
	if k.IsZero() {
		return webgw.ID{}
	}
	return webgw.ID(k.signer().Public().(ed25519.PublicKey))
}

// String, GoString and LogValue keep the private half out of logs and dumps.
func (k Key) String() string { return k.ID().String() }

// GoString is String: "%#v" must not print the private half either.
func (k Key) GoString() string { return "ident.Key(" + k.ID().String() + ")" }

// LogValue shows the identity.
func (k Key) LogValue() slog.Value { return slog.StringValue(k.ID().String()) }

// MarshalText refuses: a key is written by Save only.
func (k Key) MarshalText() ([]byte, error) {
	return nil, errors.New("ident: a private key is never marshalled")
}

const pemType = "PRIVATE KEY" // PKCS #8, RFC 5958; openssl pkey reads it

// Load reads the key file at path. It refuses a file that others may read.
func Load(path string) (Key, error) {
	fail := func(kind webgw.ErrorKind, public, hint string, err error) (Key, error) {
		return Key{}, &webgw.Error{Op: "load key", Kind: kind, Public: public, Hint: hint, Err: err}
	}
	// Not blocking: a pipe in its place must not hang the start.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		kind := webgw.Internal
		if errors.Is(err, fs.ErrNotExist) {
			kind = webgw.NotFound
		}
		return fail(kind, fmt.Sprintf("the key file %s can't be read", path), "", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fail(webgw.Internal, fmt.Sprintf("the key file %s can't be read", path), "", err)
	}
	if !info.Mode().IsRegular() {
		return fail(webgw.Invalid, fmt.Sprintf("the key file %s is not a regular file", path), "", nil)
	}
	if runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0 { // there, the directory says who reads
		return fail(webgw.Forbidden, fmt.Sprintf("the key file %s may be read by others (mode %04o)", path, info.Mode().Perm()), "chmod 600 "+path, nil)
	}
	const most = 4096
	data, err := io.ReadAll(io.LimitReader(f, most+1)) // of the file that was checked, not of the path
	if err != nil {
		return fail(webgw.Internal, fmt.Sprintf("the key file %s can't be read", path), "", err)
	}
	if len(data) > most {
		return fail(webgw.Invalid, fmt.Sprintf("the key file %s is too large to be a key", path), "", nil)
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != pemType {
		return fail(webgw.Invalid, fmt.Sprintf("the key file %s holds no PEM block %q", path, pemType), "", nil)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return fail(webgw.Invalid, fmt.Sprintf("the key file %s is damaged", path), "restore it from a backup; without it, what it signed can't be changed", err)
	}
	private, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return fail(webgw.Invalid, fmt.Sprintf("the key file %s holds a %T, not an ed25519 key", path, parsed), "", nil)
	}
	return newKey(private), nil
}

// Save writes the key to a new file of mode 0600 (directories 0700), which
// appears whole or not at all. It never overwrites (fs.ErrExist): a lost key is
// lost for ever.
func (k Key) Save(path string) (err error) {
	if k.IsZero() {
		return errors.New("ident: there is no key to save")
	}
	der, err := x509.MarshalPKCS8PrivateKey(k.signer())
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	if err := errors.Join(pem.Encode(f, &pem.Block{Type: pemType, Bytes: der}), f.Sync(), f.Close()); err != nil {
		return err
	}
	// Unlike a rename, a link fails if somebody else was faster.
	if err := os.Link(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close()) // the name survives a power cut too
}

// LoadOrCreate loads the key at path, or makes a new one there when the file
// does not exist. Two processes that race end up with the same key.
func LoadOrCreate(path string) (k Key, created bool, err error) {
	k, err = Load(path)
	if webgw.KindOf(err) != webgw.NotFound {
		return k, false, err
	}
	if k, err = Generate(); err != nil {
		return Key{}, false, err
	}
	if err = k.Save(path); errors.Is(err, fs.ErrExist) {
		k, err = Load(path)
		return k, false, err
	}
	return k, err == nil, err
}
