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

// Pair names the files of a certificate chain, leaf first, and its key, in PEM.
type Pair struct{ Cert, Key string }

// Store holds certificates. Set the fields, then Load.
type Store struct {
	Files   []Pair
	Dir     string                 // of the development CA, made when missing; "": there is none
	Host    string                 // named in the subject of a new development CA
	Allowed func(name string) bool // whether a certificate may be minted; nil: never
	Log     *slog.Logger           // nil: discards

	files  atomic.Pointer[index]
	ca     *authority
	minted cache
}

// Pauses and periods of certificates in files.
const (
	watchEvery = time.Minute         // whether files have changed
	warnFor    = 14 * 24 * time.Hour // before one expires
)

// index finds certificates by name.
type index struct {
	exact    map[string][]*tls.Certificate
	wildcard map[string][]*tls.Certificate // by what follows "*."
}

// Load reads the files, and reads or creates the development CA. It must
// succeed before anything else is called.
func (s *Store) Load() error {
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	if err := s.Reload(); err != nil || s.Dir == "" {
		return err
	}
	a, err := openAuthority(s.Dir, s.Host)
	if err != nil {
		return err
	}
	s.ca = a
	return nil
}

// Reload reads the files again. If one of them is no good the certificates
// stay as they were, all of them.
func (s *Store) Reload() error {
	x := &index{map[string][]*tls.Certificate{}, map[string][]*tls.Certificate{}}
	for _, p := range s.Files {
		c, err := p.read()
		if err != nil {
			return err
		}
		x.add(c)
		if left := time.Until(c.Leaf.NotAfter); left < warnFor {
			s.Log.Warn("certificate expires soon or has expired", "file", p.Cert, "names", c.Leaf.DNSNames, "expires", c.Leaf.NotAfter)
		}
	}
	s.files.Store(x)
	return nil
}

// Watch reads the files again whenever they have changed, until ctx ends.
func (s *Store) Watch(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
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
	for _, p := range s.Files {
		for _, name := range []string{p.Cert, p.Key} {
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

// CAPEM returns the certificate of the development CA, for people who choose
// to trust it; nil without one.
func (s *Store) CAPEM() []byte {
	if s.ca == nil {
		return nil
	}
	return s.ca.pem
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
	if s.ca != nil && s.Allowed != nil && webgw.CheckHost("", name, false) == nil && s.Allowed(name) {
		return s.minted.get(name, s.ca)
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

// read reads the chain and its key, and checks that they belong together.
// Field of its errors is the file that is to blame.
func (p Pair) read() (*tls.Certificate, error) {
	fail := func(file, what string, err error) (*tls.Certificate, error) {
		return nil, &webgw.Error{Op: "read certificate", Kind: webgw.Invalid, Field: file, Public: what, Err: err}
	}
	chain, err := os.ReadFile(p.Cert)
	if err != nil {
		return fail(p.Cert, fileTrouble(err), err)
	}
	private, err := os.ReadFile(p.Key)
	if err != nil {
		return fail(p.Key, fileTrouble(err), err)
	}
	leaf, err := firstCertificate(chain)
	if err != nil {
		return fail(p.Cert, "holds no certificate that can be read", err)
	}
	if len(leaf.DNSNames) == 0 {
		return fail(p.Cert, "holds a certificate with no DNS name (subjectAltName)", nil)
	}
	c, err := tls.X509KeyPair(chain, private)
	switch {
	case err == nil:
	case strings.Contains(err.Error(), "does not match"): // crypto/tls has no type for it
		return fail(p.Key, "is not that of the certificate in "+p.Cert, err)
	default:
		return fail(p.Key, "holds no private key that can be read", err)
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
		if b.Type == "CERTIFICATE" {
			return x509.ParseCertificate(b.Bytes)
		}
	}
}

// fileTrouble says why a file could not be read.
func fileTrouble(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "no such file"
	case errors.Is(err, fs.ErrPermission):
		return "may not be read by this user"
	}
	return "can't be read"
}
