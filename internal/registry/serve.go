package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
)

// Bounds of a connection.
const (
	handshakeTimeout = 10 * time.Second
	headerTimeout    = 10 * time.Second
	requestTimeout   = 30 * time.Second // reading a request with its body
	idleTimeout      = 90 * time.Second
	maxHeader        = 16 << 10
	stopTimeout      = 10 * time.Second // for requests under way when Serve's ctx ends
)

// TLSConfig is how the registry presents itself: TLS 1.3 with its identity,
// asking for the client's. A client may come without one, but is told only
// whether the registry is well.
func (s *Server) TLSConfig() (*tls.Config, error) {
	c, err := s.Key.ServerTLS(false, webgw.ALPNRegistry, "http/1.1")
	if err != nil {
		return nil, err
	}
	c.ClientAuth = tls.RequestClientCert
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 {
			return nil
		}
		_, err := peer(cs)
		return err
	}
	return c, nil
}

func peer(cs tls.ConnectionState) (webgw.ID, error) {
	id, err := ident.PeerID(cs)
	if err == nil && id.IsWeak() {
		err = errors.New("registry: the peer's key is one for which anybody can sign")
	}
	return id, err
}

// Serve answers the connections of l, which come as they were accepted: TLS is
// done here. It is for the registry's own listener as well as for connections
// that a gateway has found to be the registry's. When ctx ends, watches are
// ended, other requests finish, and l is closed.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.init()
	config, err := s.TLSConfig()
	if err != nil {
		return err
	}
	srv := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       requestTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log().Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context {
			return context.WithValue(context.WithoutCancel(ctx), stopKey{}, ctx.Done())
		},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
	}
	stopped := make(chan struct{})
	release := context.AfterFunc(ctx, func() {
		defer close(stopped)
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if err := srv.Shutdown(limit); err != nil {
			s.log().Warn("registry: requests cut off at the stop", "err", err)
			srv.Close()
		}
	})
	err = srv.Serve(&tlsListener{l, config})
	if release() { // not stopped: the listener failed
		srv.Close()
		return err
	}
	<-stopped
	return ctx.Err()
}

type (
	stopKey struct{} // <-chan struct{}: ends the watches
	connKey struct{} // *conn
)

type tlsListener struct {
	net.Listener
	config *tls.Config
}

func (l *tlsListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &conn{Conn: tls.Server(c, l.config)}, nil
}

// conn hides from net/http that it is a TLS connection: net/http drops those
// whose ALPN it does not know, and ours is its own.
type conn struct {
	*tls.Conn
	once sync.Once
	err  error
}

// Read does the handshake first, in the connection's own goroutine and within
// its own time.
func (c *conn) Read(p []byte) (int, error) {
	c.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
		defer cancel()
		c.err = c.HandshakeContext(ctx)
	})
	if c.err != nil {
		return 0, c.err
	}
	return c.Conn.Read(p)
}

// identity returns who asks. The handshake is over when a request has been
// read.
func identity(r *http.Request) (webgw.ID, bool) {
	var state tls.ConnectionState
	if c, ok := r.Context().Value(connKey{}).(*conn); ok {
		state = c.ConnectionState()
	} else if r.TLS != nil {
		state = *r.TLS
	}
	id, err := peer(state)
	return id, err == nil
}
