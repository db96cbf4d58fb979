package world

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw/internal/netx"
)

// Workload is something that listens on a node's loopback, or wherever it was
// told to.
type Workload struct {
	At string // host:port

	l     net.Listener
	conns sync.WaitGroup
	mu    sync.Mutex
	open  map[net.Conn]bool
	count int
}

// Accepted returns how many connections it has accepted.
func (l *Workload) Accepted() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count
}

// Close ends it and its connections.
func (l *Workload) Close() {
	l.l.Close()
	l.mu.Lock()
	for c := range l.open {
		c.Close()
	}
	l.mu.Unlock()
	l.conns.Wait()
}

// Workload listens on the daemon's host and serves each connection.
func (d *Daemon) Workload(at string, serve func(net.Conn)) *Workload {
	d.w.T.Helper()
	l, err := d.Host.Listen(d.w.T.Context(), "tcp", at)
	if err != nil {
		d.w.T.Fatal(err)
	}
	wl := &Workload{At: at, l: l, open: map[net.Conn]bool{}}
	wl.conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wl.mu.Lock()
			wl.open[c] = true
			wl.count++
			wl.mu.Unlock()
			wl.conns.Go(func() {
				serve(c)
				c.Close()
				wl.mu.Lock()
				delete(wl.open, c)
				wl.mu.Unlock()
			})
		}
	})
	d.w.T.Cleanup(wl.Close)
	return wl
}

// HTTP serves pages that say "hello from NAME" on the loopback.
func (d *Daemon) HTTP(port int) *Workload {
	d.w.T.Helper()
	return d.Workload(loopback(port), serveHTTP(fmt.Sprintf("hello from %s", d.Name)))
}

// Echo sends back what it gets, and ends when the visitor does.
func (d *Daemon) Echo(port int) *Workload {
	d.w.T.Helper()
	return d.Workload(loopback(port), func(c net.Conn) { netx.Copy(c, c, nil, new(atomic.Int64)) })
}

// TLS serves the pages of HTTP with a certificate of its own for host. The
// world's visitors trust it.
func (d *Daemon) TLS(port int, host string) *Workload {
	d.w.T.Helper()
	cert := d.w.selfSigned(host)
	serve := serveHTTP(fmt.Sprintf("hello from %s in TLS", d.Name))
	return d.Workload(loopback(port), func(c net.Conn) {
		t := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}})
		if t.Handshake() == nil {
			serve(t)
		}
		t.Close()
	})
}

func loopback(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }

// serveHTTP answers every request on a connection with the same page and what
// it saw of the request.
func serveHTTP(page string) func(net.Conn) {
	return func(c net.Conn) {
		one := &oneConn{conn: c, closed: make(chan struct{})}
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				return
			}
			w.Header().Set("X-Saw-Host", r.Host)
			w.Header().Set("X-Saw-For", r.Header.Get("X-Forwarded-For"))
			fmt.Fprintf(w, "%s %s%s", page, r.URL.Path, body)
		}), ConnState: func(_ net.Conn, st http.ConnState) {
			if st == http.StateClosed || st == http.StateHijacked {
				one.Close()
			}
		}}
		s.Serve(one) // returns when the connection has ended
	}
}

// oneConn is a listener of a single connection.
type oneConn struct {
	conn   net.Conn
	once   sync.Once
	given  bool
	closed chan struct{}
}

func (o *oneConn) Accept() (net.Conn, error) {
	if !o.given {
		o.given = true
		return o.conn, nil
	}
	<-o.closed
	return nil, net.ErrClosed
}

func (o *oneConn) Close() error   { o.once.Do(func() { close(o.closed) }); return nil }
func (o *oneConn) Addr() net.Addr { return o.conn.LocalAddr() }

// selfSigned mints a certificate for a host that the world's visitors trust.
func (w *World) selfSigned(host string) tls.Certificate {
	w.T.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.T.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * 24 * time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		w.T.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		w.T.Fatal(err)
	}
	w.trusted = append(w.trusted, cert)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
