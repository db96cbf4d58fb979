package certs

import (
	"container/list"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"webgw.dev/webgw"
)

// The authority's files and names.
const (
	caCertFile = "dev-ca.pem"
	caKeyFile  = "dev-ca.key"
	caName     = "webgw development CA"

	pemCert = "CERTIFICATE"
	pemKey  = "PRIVATE KEY"
)

// Lifetimes. Everything begins a little before now, for clocks that are behind.
const (
	caLife   = 10 * 365 * 24 * time.Hour
	leafLife = 7 * 24 * time.Hour
	backdate = time.Hour
)

const maxMinted = 4096 // certificates kept; about 4 KB each

// authority mints certificates on demand. It is for development: nobody trusts
// it who has not been told to.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer

	mu     sync.Mutex
	byName map[string]*list.Element
	recent list.List // of *minted, last used first
}

// minted is a certificate, or one that is being made: get waits for it.
type minted struct {
	name  string
	renew time.Time
	get   func() (*tls.Certificate, error)
}

// certificate returns the certificate for name, made once by whoever comes
// first and again after half of its life.
func (a *authority) certificate(name string) (*tls.Certificate, error) {
	now := time.Now()
	a.mu.Lock()
	e := a.byName[name]
	if e != nil && now.After(e.Value.(*minted).renew) {
		a.dropLocked(e)
		e = nil
	}
	if e == nil {
		m := &minted{name: name, renew: now.Add(leafLife / 2), get: sync.OnceValues(func() (*tls.Certificate, error) { return a.mint(name, now) })}
		e = a.recent.PushFront(m)
		a.byName[name] = e
		if a.recent.Len() > maxMinted {
			a.dropLocked(a.recent.Back())
		}
	} else {
		a.recent.MoveToFront(e)
	}
	m := e.Value.(*minted)
	a.mu.Unlock()

	c, err := m.get()
	if err != nil {
		a.mu.Lock()
		if a.byName[name] == e {
			a.dropLocked(e)
		}
		a.mu.Unlock()
		return nil, &webgw.Error{Op: "mint certificate", Kind: webgw.Internal, Public: fmt.Sprintf("the certificate for %s could not be made", name), Err: err}
	}
	return c, nil
}

func (a *authority) dropLocked(e *list.Element) { delete(a.byName, a.recent.Remove(e).(*minted).name) }

func (a *authority) mint(name string, now time.Time) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	end := now.Add(leafLife)
	if end.After(a.cert.NotAfter) {
		end = a.cert.NotAfter
	}
	leaf, err := sign(&x509.Certificate{
		Subject:     pkix.Name{Organization: []string{"webgw development"}}, // the name itself may be too long for a CN
		DNSNames:    []string{name},
		NotBefore:   now.Add(-backdate),
		NotAfter:    end,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw, a.cert.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

// sign makes a certificate from a template; parent nil: of itself.
func sign(template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	template.BasicConstraintsValid = true
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// loadAuthority reads the authority in dir, or makes one there.
func loadAuthority(dir string) (*authority, error) {
	fail := func(public, hint string, err error) (*authority, error) {
		return nil, &webgw.Error{Op: "load the development authority", Kind: webgw.Invalid, Public: public, Hint: hint, Err: err}
	}
	const anew = "restore it, or delete both files to have a new authority made, which must then be trusted anew"
	certFile, keyFile := filepath.Join(dir, caCertFile), filepath.Join(dir, caKeyFile)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fail(fmt.Sprintf("the directory %s can't be made", dir), "", err)
	}
	_, noKey := os.Stat(keyFile)
	_, noCert := os.Stat(certFile)
	if errors.Is(noKey, fs.ErrNotExist) {
		if noCert == nil {
			return fail(fmt.Sprintf("%s is there, but its key %s is not", certFile, keyFile), anew, noKey)
		}
		if err := makeKey(keyFile); err != nil {
			return fail(fmt.Sprintf("%s can't be written", keyFile), "", err)
		}
	}
	b, err := readFile(keyFile)
	if err != nil {
		return nil, err
	}
	key, err := parseKey(b)
	if err != nil {
		return fail(fmt.Sprintf("%s holds no key that can be read", keyFile), anew, err)
	}
	// The key comes first: one without a certificate is what a crash leaves.
	if errors.Is(noCert, fs.ErrNotExist) {
		if err := makeCert(certFile, key); err != nil {
			return fail(fmt.Sprintf("%s can't be written", certFile), "", err)
		}
	}
	if b, err = readFile(certFile); err != nil {
		return nil, err
	}
	cert, err := firstCertificate(b)
	if err != nil {
		return fail(fmt.Sprintf("%s holds no certificate that can be read", certFile), anew, err)
	}
	if public, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || !public.Equal(key.Public()) {
		return fail(fmt.Sprintf("the key in %s does not belong to the certificate in %s", keyFile, certFile), anew, nil)
	}
	if !cert.IsCA {
		return fail(fmt.Sprintf("the certificate in %s is not one of an authority", certFile), anew, nil)
	}
	if time.Now().After(cert.NotAfter) {
		return fail(fmt.Sprintf("the certificate in %s has expired", certFile), "delete it to have a new one made, which must then be trusted anew", nil)
	}
	return &authority{cert: cert, key: key, byName: map[string]*list.Element{}}, nil
}

func makeKey(name string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return create(name, 0o600, pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der}))
}

func makeCert(name string, key crypto.Signer) error {
	now := time.Now()
	cert, err := sign(&x509.Certificate{
		Subject:        pkix.Name{CommonName: caName},
		NotBefore:      now.Add(-backdate),
		NotAfter:       now.Add(caLife),
		KeyUsage:       x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:           true,
		MaxPathLenZero: true,
	}, nil, key.Public(), key)
	if err != nil {
		return err
	}
	return create(name, 0o644, pem.EncodeToMemory(&pem.Block{Type: pemCert, Bytes: cert.Raw}))
}

func parseKey(b []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(b)
	if block == nil || block.Type != pemKey {
		return nil, errors.New("no PEM block of type " + pemKey)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	k, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("a key of type %T", key)
	}
	return k, nil
}

// create writes a file that appears whole or not at all. If another process
// has made it meanwhile, that one stands.
func create(name string, mode fs.FileMode, b []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	if err = os.Link(f.Name(), name); errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}
