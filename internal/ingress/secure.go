package ingress

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// secure is how a target is spoken to over TLS, and how that went.
type secure struct {
	want    *webgw.UpstreamTLS
	name    string
	config  func() (*tls.Config, error)
	trouble atomic.Pointer[string] // why the last handshake failed; nil: it did not
}

// newSecure returns nil for an exposure whose targets take clear text.
func newSecure(e *webgw.Exposure, t webgw.Target) *secure {
	if e.UpstreamTLS == nil {
		return nil
	}
	s := &secure{want: e.UpstreamTLS, name: e.UpstreamTLS.Name(t)}
	s.config = sync.OnceValues(s.build) // only where it is needed: authorities take time to read
	return s
}

// same reports whether both prove the same.
func (s *secure) same(o *secure) bool {
	if s == nil || o == nil {
		return s == o
	}
	return s.name == o.name && reflect.DeepEqual(s.want, o.want)
}

var errPin = errors.New("ingress: the workload has another key")

func (s *secure) build() (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: s.name}
	if s.want.CA != "" {
		authorities, err := webgw.ParseAuthorities("ca", s.want.CA)
		if err != nil {
			return nil, err // it was checked with its record
		}
		c.RootCAs = x509.NewCertPool()
		for _, a := range authorities {
			c.RootCAs.AddCert(a)
		}
	}
	if len(s.want.Pins) == 0 {
		return c, nil
	}
	var pins [][sha256.Size]byte
	for _, p := range s.want.Pins {
		pin, err := webgw.ParsePin(p)
		if err != nil {
			return nil, err
		}
		pins = append(pins, pin)
	}
	// Without authorities the key alone proves who it is: the handshake shows
	// that the workload has it, whatever its certificate says.
	c.InsecureSkipVerify = s.want.ByPinAlone()
	c.VerifyConnection = func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 || !slices.Contains(pins, sha256.Sum256(state.PeerCertificates[0].RawSubjectPublicKeyInfo)) {
			return errPin
		}
		return nil
	}
	return c, nil
}

// secured speaks TLS on a stream to the target, for one version of HTTP.
func (s *Server) secured(ctx context.Context, t *target, stream netx.CloseWriter, alpn string) (netx.CloseWriter, error) {
	config, err := t.secure.config()
	var c *tls.Conn
	if err == nil {
		config = config.Clone()
		config.NextProtos = []string{alpn}
		c = tls.Client(stream, config)
		short, cancel := context.WithTimeout(ctx, s.limits.Open)
		err = c.HandshakeContext(short)
		cancel()
	}
	if err == nil && alpn == "h2" && c.ConnectionState().NegotiatedProtocol != alpn {
		err = errNoH2
	}
	if err == nil {
		t.secure.trouble.Store(nil)
		return &securedStream{Conn: c, under: stream}, nil
	}
	stream.Close()
	if ctx.Err() != nil {
		return nil, ctx.Err() // the visitor is gone
	}
	t.failed(time.Now())
	kind := webgw.KindOf(err)
	open := &openError{target: t, err: err}
	if isRefusal(err) { // of the stream itself: there was no handshake
		open.refused = !isTimeout(err)
	} else {
		why := t.secure.explain(c, err)
		kind, open.unproven = webgw.Unavailable, true
		open.err = &webgw.Error{Op: "verify workload", Kind: webgw.Unavailable, Public: why, Err: err}
		t.secure.trouble.Store(&why)
	}
	s.metrics.openErrors.WithLabelValues(string(kind)).Inc()
	return nil, open
}

var errNoH2 = errors.New("ingress: the workload did not agree to HTTP/2")

// explain says what was wrong with a handshake, for the owner.
func (s *secure) explain(c *tls.Conn, err error) string {
	var (
		name    x509.HostnameError
		unknown x509.UnknownAuthorityError
		invalid x509.CertificateInvalidError
		record  tls.RecordHeaderError
		remote  *net.OpError
	)
	by := "the gateway's system trusts"
	if s.want.CA != "" {
		by = "upstreamTLS.ca names"
	}
	switch {
	case errors.Is(err, errPin):
		has := "it has shown none"
		if peers := peersOf(c); len(peers) > 0 {
			sum := sha256.Sum256(peers[0].RawSubjectPublicKeyInfo)
			has = "its key is " + base64.StdEncoding.EncodeToString(sum[:])
		}
		return "the workload's key is not one of upstreamTLS.pins; " + has
	case errors.As(err, &name):
		return fmt.Sprintf("the workload's certificate is not for %s, but for %s; upstreamTLS.serverName may name another", s.name, namesOf(name.Certificate))
	case errors.As(err, &unknown):
		return "the workload's certificate is not by an authority that " + by
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fmt.Sprintf("the workload's certificate counts from %s to %s only", invalid.Cert.NotBefore.UTC().Format(time.RFC3339), invalid.Cert.NotAfter.UTC().Format(time.RFC3339))
	case errors.As(err, &invalid):
		return "the workload's certificate can't be used for this: " + invalid.Error()
	case errors.Is(err, errNoH2):
		return "the workload speaks TLS, but not this version of HTTP"
	case errors.As(err, &record):
		return "the workload does not speak TLS"
	case errors.As(err, &remote) && remote.Op == "remote error" && strings.Contains(remote.Err.Error(), "no application protocol"):
		return "the workload speaks TLS, but not this version of HTTP"
	case errors.As(err, &remote) && remote.Op == "remote error": // an alert
		return "the workload refuses the TLS handshake: " + remote.Err.Error()
	case isTimeout(err) || isNetTimeout(err):
		return "the workload did not finish the TLS handshake in time"
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return "the workload ended the connection in the TLS handshake"
	}
	return "the TLS handshake with the workload failed"
}

func peersOf(c *tls.Conn) []*x509.Certificate {
	if c == nil {
		return nil
	}
	return c.ConnectionState().PeerCertificates
}

// namesOf tells what a certificate is for, in a few words.
func namesOf(c *x509.Certificate) string {
	names := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		if a, ok := netip.AddrFromSlice(ip); ok {
			names = append(names, a.Unmap().String())
		}
	}
	switch {
	case len(names) == 0:
		return "no name"
	case len(names) > 3:
		return fmt.Sprintf("%q and %d more", names[:3], len(names)-3)
	}
	return fmt.Sprintf("%q", names)
}

// securedStream is a stream with TLS on it.
type securedStream struct {
	*tls.Conn
	under netx.CloseWriter
	ended atomic.Bool // a read has said so
}

// Read implements net.Conn.
func (s *securedStream) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if err != nil {
		s.ended.Store(true)
	}
	return n, err
}

// Quiet reports whether the workload has neither ended the connection nor said
// anything that was not read.
func (s *securedStream) Quiet() bool {
	return !s.ended.Load() && (&workloadConn{CloseWriter: s.under}).alive()
}
