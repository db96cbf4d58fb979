package ident

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

// handshake runs one and a byte each way over memnet, and returns what each
// side ended with.
func handshake(t *testing.T, client, server *tls.Config) (c, s *tls.Conn, clientErr, serverErr error) {
	t.Helper()
	w := memnet.New(1)
	h := w.Host("gw")
	l, err := h.Listen(t.Context(), "tcp", "127.0.0.1:443")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := h.Dial(t.Context(), "tcp", "127.0.0.1:443", nil)
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c, s = tls.Client(near, client), tls.Server(far, server)
	exchange := func(c *tls.Conn) error {
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Minute))
		if err := c.Handshake(); err != nil {
			return err
		}
		// In TLS 1.3 a client learns only now that it was refused.
		_, err1 := c.Write([]byte("x"))
		_, err2 := io.ReadFull(c, make([]byte, 1))
		return errors.Join(err1, err2)
	}
	done := make(chan error)
	go func() { done <- exchange(s) }()
	clientErr = exchange(c)
	return c, s, clientErr, <-done
}

func configs(t *testing.T, mutual bool) (client, server *tls.Config) {
	t.Helper()
	client, err1 := testKey(1).ClientTLS(testKey(2).ID(), webgw.ALPNTunnel)
	server, err2 := testKey(2).ServerTLS(mutual, webgw.ALPNTunnel)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return client, server
}

// foreign makes a self-signed certificate for a key that is no identity.
func foreign(t *testing.T, key crypto.Signer) []tls.Certificate {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
}

func TestMutualTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := configs(t, true)
		c, s, err1, err2 := handshake(t, client, server)
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		for _, tt := range []struct {
			conn *tls.Conn
			want webgw.ID
		}{{c, testKey(2).ID()}, {s, testKey(1).ID()}} {
			cs := tt.conn.ConnectionState()
			if got, err := PeerID(cs); err != nil || got != tt.want {
				t.Errorf("got %v, %v", got, err)
			}
			if cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != webgw.ALPNTunnel || cs.DidResume {
				t.Errorf("%x %q %v", cs.Version, cs.NegotiatedProtocol, cs.DidResume)
			}
		}
	})
}

func TestTLSRefusals(t *testing.T) {
	rsaKey, err1 := rsa.GenerateKey(rand.Reader, 2048)
	ecKey, err2 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	thief := func(t *testing.T, c *tls.Config) {
		// The right certificate, which is public, with another's key.
		cert, err := testKey(2).Certificate()
		if err != nil {
			t.Fatal(err)
		}
		cert.PrivateKey = testKey(3).signer()
		c.Certificates = []tls.Certificate{cert}
	}
	for _, tt := range []struct {
		name   string
		edit   func(t *testing.T, client, server *tls.Config)
		client string // what the client says
		server string // what the server says
	}{
		{name: "wrong server", edit: func(t *testing.T, c, s *tls.Config) {
			other, err := testKey(3).ServerTLS(true, webgw.ALPNTunnel)
			if err != nil {
				t.Fatal(err)
			}
			s.Certificates = other.Certificates
		}, client: "the server is " + testKey(3).ID().String(), server: "bad certificate"},
		{name: "server without the key", edit: func(t *testing.T, c, s *tls.Config) { thief(t, s) }, client: "invalid signature"},
		{name: "server with RSA", edit: func(t *testing.T, c, s *tls.Config) { s.Certificates = foreign(t, rsaKey) }, client: "not ed25519"},
		{name: "server with ECDSA", edit: func(t *testing.T, c, s *tls.Config) { s.Certificates = foreign(t, ecKey) }, client: "not ed25519"},
		{name: "client without certificate", edit: func(t *testing.T, c, s *tls.Config) { c.Certificates = nil }, client: "certificate required", server: "didn't provide a certificate"},
		{name: "client without the key", edit: func(t *testing.T, c, s *tls.Config) { thief(t, c) }, server: "invalid signature"},
		{name: "client with RSA", edit: func(t *testing.T, c, s *tls.Config) { c.Certificates = foreign(t, rsaKey) }, server: "not ed25519"},
		{name: "client with ECDSA", edit: func(t *testing.T, c, s *tls.Config) { c.Certificates = foreign(t, ecKey) }, server: "not ed25519"},
		{name: "client of TLS 1.2", edit: func(t *testing.T, c, s *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }, client: "protocol version", server: "unsupported versions"},
		{name: "server of TLS 1.2", edit: func(t *testing.T, c, s *tls.Config) { s.MinVersion, s.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }, client: "protocol version", server: "unsupported versions"},
		{name: "no common ALPN", edit: func(t *testing.T, c, s *tls.Config) { c.NextProtos = []string{"h2"} }, client: "no application protocol", server: "unsupported application protocols"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := configs(t, true)
				tt.edit(t, client, server)
				_, _, clientErr, serverErr := handshake(t, client, server)
				if clientErr == nil || !strings.Contains(clientErr.Error(), tt.client) {
					t.Errorf("client: %v, want %q", clientErr, tt.client)
				}
				if serverErr == nil || !strings.Contains(serverErr.Error(), tt.server) {
					t.Errorf("server: %v, want %q", serverErr, tt.server)
				}
			})
		})
	}
}

func TestServerOnlyTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, server := configs(t, false)
		nobody, err := Key{}.ClientTLS(testKey(2).ID(), webgw.ALPNTunnel)
		if err != nil {
			t.Fatal(err)
		}
		_, s, err1, err2 := handshake(t, nobody, server)
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		if id, err := PeerID(s.ConnectionState()); err == nil {
			t.Errorf("nobody is %v", id)
		}
		any, err := Key{}.ClientTLS(webgw.ID{}, webgw.ALPNTunnel)
		if err != nil {
			t.Fatal(err)
		}
		c, _, err1, err2 := handshake(t, any, server)
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		if id, err := PeerID(c.ConnectionState()); err != nil || id != testKey(2).ID() {
			t.Errorf("got %v, %v", id, err)
		}
	})
}

func TestPeerIDRefusesWeakKeys(t *testing.T) {
	for _, id := range []webgw.ID{{}, {0: 1}, {0: 1, 31: 0x80}} {
		cs := tls.ConnectionState{PeerCertificates: []*x509.Certificate{{PublicKey: asPublic(id)}}}
		if got, err := PeerID(cs); err == nil {
			t.Errorf("%x is accepted as %v", id, got)
		}
	}
}

func asPublic(id webgw.ID) ed25519.PublicKey { return id[:] }
