package certs

import (
	"bytes"
	"container/list"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"time"

	"webgw.dev/webgw"
)

// Names of the development CA's files in the state directory.
const (
	caCertFile = "dev-ca.pem"
	caKeyFile  = "dev-ca.key"
)

const (
	caLife   = 10 * 365 * 24 * time.Hour
	leafLife = 7 * 24 * time.Hour
	backdate = time.Hour // for clients whose clock is behind
	maxLeafs = 10_000    // kept; the least recently used goes
)

// authority is a certificate authority for development: whoever wants to trust
// it must be told to.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// openAuthority reads the CA from dir, or creates it there.
func openAuthority(dir, host string) (*authority, error) {
	certFile, keyFile := filepath.Join(dir, caCertFile), filepath.Join(dir, caKeyFile)
	fail := func(file, what string, err error) (*authority, error) {
		return nil, &webgw.Error{Op: "open development CA", Kind: webgw.Invalid, Field: file, Public: what,
			Hint: "restore the file, or remove both files of the CA to begin a new one", Err: err}
	}
	certPEM, certErr := os.ReadFile(certFile)
	keyPEM, keyErr := os.ReadFile(keyFile)
	noCert, noKey := errors.Is(certErr, fs.ErrNotExist), errors.Is(keyErr, fs.ErrNotExist)
	switch {
	case noCert && noKey, noCert && keyErr == nil:
		// The key is written first: without a certificate nobody has used it.
		return createAuthority(dir, host)
	case certErr != nil:
		return fail(certFile, fileTrouble(certErr), certErr)
	case keyErr != nil:
		return fail(keyFile, fileTrouble(keyErr), keyErr)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return fail(keyFile, "certificate and key of the development CA are damaged or don't match", err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !pair.Leaf.IsCA {
		return fail(certFile, "is not a development CA of webgw", nil)
	}
	if time.Now().After(pair.Leaf.NotAfter) {
		return fail(certFile, "the development CA has expired", nil)
	}
	return &authority{pair.Leaf, key, certPEM}, nil
}

func createAuthority(dir, host string) (*authority, error) {
	if host == "" {
		host = "localhost"
	}
	fail := func(err error) (*authority, error) {
		return nil, &webgw.Error{Op: "create development CA", Kind: webgw.Internal, Field: dir, Public: "the development CA can't be created here", Err: err}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fail(err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          newSerial(),
		Subject:               pkix.Name{CommonName: "webgw development CA " + host},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(caLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return fail(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fail(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fail(err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	err = errors.Join(os.MkdirAll(dir, 0o700),
		writeFile(filepath.Join(dir, caKeyFile), keyPEM, 0o600),
		writeFile(filepath.Join(dir, caCertFile), certPEM, 0o644))
	if err != nil {
		return fail(err)
	}
	return &authority{cert, key, certPEM}, nil
}

// writeFile puts the whole file in place, or nothing.
func writeFile(name string, data []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-*") // 0600
	if err != nil {
		return err
	}
	_, err = f.ReadFrom(bytes.NewReader(data))
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// newSerial returns a random serial number (CA/Browser Forum: 64 bits or more).
func newSerial() *big.Int {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[0] &= 0x7f    // positive, at most 20 octets (RFC 5280 section 4.1.2.2)
	return new(big.Int).SetBytes(b[:])
}

// mint makes a certificate for one name.
func (a *authority) mint(name string) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          newSerial(),
		DNSNames:              []string{name},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(leafLife),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	if len(name) <= 64 { // the most that a common name may hold
		template.Subject.CommonName = name
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}

// cache keeps minted certificates, the most recently used ones.
type cache struct {
	mu    sync.Mutex
	by    map[string]*list.Element // of *minted
	order list.List                // most recent first
}

// minted is one name's certificate. Its lock is held while it is minted, so
// that this happens once however many ask.
type minted struct {
	name string
	mu   sync.Mutex
	cert *tls.Certificate
}

// get returns the name's certificate, newly minted if half of its life is over.
func (c *cache) get(name string, a *authority) (*tls.Certificate, error) {
	m := c.entry(name)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cert != nil && time.Until(m.cert.Leaf.NotAfter) > leafLife/2 {
		return m.cert, nil
	}
	cert, err := a.mint(name)
	if err != nil {
		return nil, &webgw.Error{Op: "mint certificate", Kind: webgw.Internal, Public: "no certificate could be made for this name", Err: err}
	}
	m.cert = cert
	return cert, nil
}

func (c *cache) entry(name string) *minted {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.by[name]; e != nil {
		c.order.MoveToFront(e)
		return e.Value.(*minted)
	}
	if c.by == nil {
		c.by = map[string]*list.Element{}
	}
	m := &minted{name: name}
	c.by[name] = c.order.PushFront(m)
	if c.order.Len() > maxLeafs {
		delete(c.by, c.order.Remove(c.order.Back()).(*minted).name)
	}
	return m
}
