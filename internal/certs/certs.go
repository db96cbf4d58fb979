// Package certs gives the certificates for names whose TLS ends at a gateway:
// those in files, and for the others those of a private development authority.
//
// It must not know who asks, which names are exposed (Allowed tells), nor
// anything of networks.
package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"webgw.dev/webgw"
)

// Store holds certificates. Set the fields, then Load.
type Store struct {
	Dir     string                 // where the development authority is kept; made when missing
	Files   []string               // "cert.pem:key.pem" each: a chain, leaf first, and its key
	DevCA   bool                   // mint certificates for allowed names that no file covers
	Allowed func(name string) bool // whether one may be minted; nil: never
	Log     *slog.Logger           // nil: discards

	files atomic.Pointer[index]
	dev   *authority // nil: no DevCA
}

// Pauses and periods of certificates in files.
const (
	lookEvery = time.Minute         // whether files have changed
	warnFor   = 14 * 24 * time.Hour // before one expires
)

// index finds certificates by name.
type index struct {
	exact    map[string][]*tls.Certificate
	wildcard map[string][]*tls.Certificate // by what follows "*."
}

// Load reads the files, and reads or makes the authority. It must succeed
// before anything else is called.
func (s *Store) Load() error {
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	if err := s.Reload(); err != nil {
		return err
	}
	if !s.DevCA {
		return nil
	}
	a, err := loadAuthority(s.Dir)
	if err != nil {
		return err
	}
	s.dev = a
	return nil
}

// Reload reads the files again. If one of them is no good the certificates
// stay as they were, all of them.
func (s *Store) Reload() error {
	x := &index{map[string][]*tls.Certificate{}, map[string][]*tls.Certificate{}}
	for i, pair := range s.Files {
		c, err := readPair(pair)
		if e, ok := errors.AsType[*webgw.Error](err); ok {
			e.Op, e.Field = "read certificates", fmt.Sprintf("certs[%d]", i)
			return e
		}
		x.add(c)
		if left := time.Until(c.Leaf.NotAfter); left < warnFor {
			s.Log.Warn("certificate expires soon or has expired", "file", pair, "names", c.Leaf.DNSNames, "expires", c.Leaf.NotAfter)
		}
	}
	s.files.Store(x)
	return nil
}

// Run reads the files again whenever they have changed, until ctx ends.
func (s *Store) Run(ctx context.Context) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	seen := s.look()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := s.look()
		if slices.Equal(now, seen) {
			continue
		}
		seen = now
		if err := s.Reload(); err != nil {
			s.Log.Error("certificates stay as they were", "err", err)
			continue
		}
		s.Log.Info("certificates read again", "files", len(s.Files))
	}
}

// look tells how the files look from outside.
func (s *Store) look() (marks []string) {
	for _, pair := range s.Files {
		cert, key, _ := strings.Cut(pair, ":")
		for _, name := range []string{cert, key} {
			i, err := os.Stat(name)
			if err != nil {
				marks = append(marks, err.Error())
				continue
			}
			marks = append(marks, fmt.Sprint(i.ModTime().UnixNano(), " ", i.Size()))
		}
	}
	return marks
}

// CAPEM returns the certificate of the development authority, for people who
// choose to trust it; nil without one.
func (s *Store) CAPEM() []byte {
	if s.dev == nil {
		return nil
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemCert, Bytes: s.dev.cert.Raw})
}

// GetCertificate returns the certificate for the hello's server name: from a
// file, else minted if that is allowed, else a NotFound error.
func (s *Store) GetCertificate(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
	name := webgw.NormalizeHost(h.ServerName)
	if c := s.files.Load().find(name, h); c != nil {
		return c, nil
	}
	// A wildcard exposure stands for whatever a visitor may think of: only
	// what is a host name gets a certificate.
	if s.dev != nil && s.Allowed != nil && webgw.CheckHost("", name, false) == nil && s.Allowed(name) {
		return s.dev.certificate(name)
	}
	return nil, &webgw.Error{Op: "find certificate", Kind: webgw.NotFound, Public: fmt.Sprintf("there is no certificate for %q", name)}
}

func (x *index) add(c *tls.Certificate) {
	for _, name := range c.Leaf.DNSNames {
		m := x.exact
		name, wild := strings.CutPrefix(webgw.NormalizeHost(name), "*.")
		if wild {
			m = x.wildcard
		}
		m[name] = append(m[name], c)
	}
}

// find returns the best certificate for a name: exact before wildcard, which
// stands for one label (RFC 6125 section 6.4.3). Of several, one that is valid
// now and that the client can use; of those the first.
func (x *index) find(name string, h *tls.ClientHelloInfo) *tls.Certificate {
	all := x.exact[name]
	if all == nil {
		if label, rest, ok := strings.Cut(name, "."); ok && label != "" {
			all = x.wildcard[rest]
		}
	}
	if len(all) == 0 {
		return nil
	}
	if len(all) == 1 {
		return all[0]
	}
	best, points := all[0], -1
	now := time.Now()
	for _, c := range all {
		p := 0
		if now.After(c.Leaf.NotBefore) && now.Before(c.Leaf.NotAfter) {
			p += 2
		}
		if h.SupportsCertificate(c) == nil {
			p++
		}
		if p > points {
			best, points = c, p
		}
	}
	return best
}

// readPair reads a certificate chain and its key.
func readPair(pair string) (*tls.Certificate, error) {
	cert, key, ok := strings.Cut(pair, ":")
	if !ok || cert == "" || key == "" {
		return nil, &webgw.Error{Kind: webgw.Invalid, Public: fmt.Sprintf("%q is not cert.pem:key.pem", pair)}
	}
	chain, err := readFile(cert)
	if err != nil {
		return nil, err
	}
	private, err := readFile(key)
	if err != nil {
		return nil, err
	}
	fail := func(public string, err error) (*tls.Certificate, error) {
		return nil, &webgw.Error{Kind: webgw.Invalid, Public: public, Err: err}
	}
	leaf, err := firstCertificate(chain)
	if err != nil {
		return fail(fmt.Sprintf("%s holds no certificate that can be read", cert), err)
	}
	// From here on what is wrong is the key, or a later certificate.
	c, err := tls.X509KeyPair(chain, private)
	switch {
	case err != nil && strings.Contains(err.Error(), "private key does not match") || err != nil && strings.Contains(err.Error(), "private key type does not match"):
		return fail(fmt.Sprintf("the key in %s does not belong to the certificate in %s", key, cert), err)
	case err != nil:
		return fail(fmt.Sprintf("%s holds no key that can be read", key), err)
	case len(leaf.DNSNames) == 0:
		return fail(fmt.Sprintf("the certificate in %s names no host (subjectAltName)", cert), nil)
	}
	c.Leaf = leaf
	return &c, nil
}

func firstCertificate(chain []byte) (*x509.Certificate, error) {
	for {
		var b *pem.Block
		if b, chain = pem.Decode(chain); b == nil {
			return nil, errors.New("no PEM block of type CERTIFICATE")
		}
		if b.Type == pemCert {
			return x509.ParseCertificate(b.Bytes)
		}
	}
}

func readFile(name string) ([]byte, error) {
	b, err := os.ReadFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, &webgw.Error{Kind: webgw.NotFound, Public: fmt.Sprintf("the file %s does not exist", name), Err: err}
	case errors.Is(err, fs.ErrPermission):
		return nil, &webgw.Error{Kind: webgw.Forbidden, Public: fmt.Sprintf("the file %s may not be read", name), Hint: "the user that the gateway runs as needs to read it", Err: err}
	case err != nil:
		return nil, &webgw.Error{Kind: webgw.Invalid, Public: fmt.Sprintf("the file %s can't be read", name), Err: err}
	}
	return b, nil
}
