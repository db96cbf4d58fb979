// Package certs has the certificates for names whose TLS ends at the gateway:
// from files that its farmer keeps, or from a development CA of its own.
//
// It must not know how names are routed (it is told which are), nor who asks.
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
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw"
)

// Store finds a certificate for a name: in files first, else minted by the
// development CA. Set the fields, then Load.
type Store struct {
	Files   []Pair            // certificates kept by the farmer
	Dir     string            // where the development CA lives; "": there is none
	Host    string            // told in the name of the development CA; "": "localhost"
	Allowed func(string) bool // names (lower case, no trailing dot) that may be minted; nil: none
	Log     *slog.Logger      // nil: discards

	files atomic.Pointer[fileSet]
	ca    *authority // set by Load

	mu     sync.Mutex // one reload at a time
	minted cache
}

// Pair names the PEM files of a certificate chain, leaf first, and its key.
type Pair struct{ Cert, Key string }

// watchEvery is how often the files are looked at for changes.
const watchEvery = 10 * time.Second

// expiryWarning is when the log begins to tell that a file's certificate ends.
const expiryWarning = 7 * 24 * time.Hour

func (s *Store) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}

// Load reads the files and the development CA, which it creates the first
// time. A file that is missing or makes no sense is an error that names it.
// Load must have returned before the first GetCertificate.
func (s *Store) Load() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	set, err := s.readFiles()
	if err != nil {
		return err
	}
	if s.Dir != "" && s.ca == nil {
		if s.ca, err = openAuthority(s.Dir, s.Host); err != nil {
			return err
		}
	}
	s.files.Store(set)
	return nil
}

// Reload reads the files again. If any of them is wrong, all stay as they were.
func (s *Store) Reload() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	set, err := s.readFiles()
	if err != nil {
		return err
	}
	s.files.Store(set)
	return nil
}

// Watch reloads the files when they change, until ctx ends.
func (s *Store) Watch(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	last := s.stamp()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := s.stamp()
		if now == last {
			continue
		}
		if err := s.Reload(); err != nil {
			// Certificate and key are not replaced at one instant: look again.
			s.log().Warn("certificate files stay as they were", "err", err)
			continue
		}
		last = now
		s.log().Info("certificate files reloaded")
	}
}

// stamp changes when a file does.
func (s *Store) stamp() string {
	var b strings.Builder
	for _, p := range s.Files {
		for _, name := range []string{p.Cert, p.Key} {
			if info, err := os.Stat(name); err == nil {
				fmt.Fprintf(&b, "%d %d,", info.ModTime().UnixNano(), info.Size())
			} else {
				b.WriteString("none,")
			}
		}
	}
	return b.String()
}

// fileSet is what the files hold, by name.
type fileSet struct {
	exact    map[string][]*tls.Certificate
	wildcard map[string][]*tls.Certificate // by what follows "*."
}

func (s *Store) readFiles() (*fileSet, error) {
	set := &fileSet{map[string][]*tls.Certificate{}, map[string][]*tls.Certificate{}}
	for _, p := range s.Files {
		c, err := readPair(p)
		if err != nil {
			return nil, err
		}
		if left := time.Until(c.Leaf.NotAfter); left < expiryWarning {
			s.log().Warn("certificate ends soon or has ended", "file", p.Cert, "ends", c.Leaf.NotAfter)
		}
		for _, name := range c.Leaf.DNSNames {
			m := set.exact
			name, wild := strings.CutPrefix(webgw.NormalizeHost(name), "*.")
			if wild {
				m = set.wildcard
			}
			m[name] = append(m[name], c)
		}
	}
	return set, nil
}

func readPair(p Pair) (*tls.Certificate, error) {
	fail := func(file, what string, err error) error {
		return &webgw.Error{Op: "read certificate", Kind: webgw.Invalid, Field: file, Public: what, Err: err}
	}
	cert, err := os.ReadFile(p.Cert)
	if err != nil {
		return nil, fail(p.Cert, fileTrouble(err), err)
	}
	key, err := os.ReadFile(p.Key)
	if err != nil {
		return nil, fail(p.Key, fileTrouble(err), err)
	}
	if err := checkChain(cert); err != nil {
		return nil, fail(p.Cert, "holds no certificate that can be used, as PEM", err)
	}
	c, err := tls.X509KeyPair(cert, key)
	switch {
	case err != nil && strings.Contains(err.Error(), "does not match"):
		return nil, fail(p.Key, "the key is not that of the certificate in "+p.Cert, err)
	case err != nil:
		return nil, fail(p.Key, "holds no private key that can be used, as PEM without password", err)
	case len(c.Leaf.DNSNames) == 0:
		return nil, fail(p.Cert, "the certificate holds no DNS name", nil)
	}
	return &c, nil
}

// checkChain reports what is wrong with a chain of certificates in PEM.
func checkChain(data []byte) error {
	n := 0
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(b.Bytes); err != nil {
			return err
		}
		n++
	}
	if n == 0 {
		return errors.New("no PEM block of type CERTIFICATE")
	}
	return nil
}

func fileTrouble(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "there is no such file"
	case errors.Is(err, fs.ErrPermission):
		return "the file may not be read"
	}
	return "the file can't be read"
}

// find returns the best certificate for a normalized name, or nil: an exact
// name before a wildcard, which covers one label; of several, one that is valid
// now and that the client can use; of those the first.
func (f *fileSet) find(name string, hello *tls.ClientHelloInfo) *tls.Certificate {
	list := f.exact[name]
	if len(list) == 0 {
		if label, rest, ok := strings.Cut(name, "."); ok && label != "" {
			list = f.wildcard[rest]
		}
	}
	var best *tls.Certificate
	points := -1
	now := time.Now()
	for _, c := range list {
		p := 0
		if now.After(c.Leaf.NotBefore) && now.Before(c.Leaf.NotAfter) {
			p += 2
		}
		if len(list) > 1 && hello.SupportsCertificate(c) == nil {
			p++
		}
		if p > points {
			best, points = c, p
		}
	}
	return best
}

// GetCertificate is for tls.Config. A name that neither a file nor Allowed
// knows is an error, and costs nothing.
func (s *Store) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	name := webgw.NormalizeHost(hello.ServerName)
	if f := s.files.Load(); f != nil {
		if c := f.find(name, hello); c != nil {
			return c, nil
		}
	}
	if s.ca != nil && s.Allowed != nil && webgw.CheckHost("", name, false) == nil && s.Allowed(name) {
		return s.minted.get(name, s.ca)
	}
	return nil, &webgw.Error{Op: "find certificate", Kind: webgw.NotFound, Public: "there is no certificate for this name"}
}

// CAPEM returns the certificate of the development CA, for clients to trust;
// nil if there is none.
func (s *Store) CAPEM() []byte {
	if s.ca == nil {
		return nil
	}
	return s.ca.pem
}
