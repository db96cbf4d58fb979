package ingress

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// Limits of HTTP/3.
const (
	// Handshakes with visitors whose address may be made up. Beyond that they
	// must show first that they get what is sent there (Retry, RFC 9000 section
	// 8.1.2), and no address is counted against before it has been shown.
	maxUnproven = 256

	quicPacketSize = 1452 // largest datagram that the server takes, bytes
	quicQueue      = 1024 // datagrams that wait for it

	// What a visitor may send ahead of the workload, bytes; a connection's
	// windows grow as long as all of them together have not grown by more than
	// windowGrowth.
	streamWindow, maxStreamWindow = 256 << 10, 4 << 20
	connWindow, maxConnWindow     = 512 << 10, 16 << 20
	windowGrowth                  = 256 << 20

	// After GOAWAY a connection without requests is closed when so long has
	// passed: answers are on their way, and a request may be.
	goAwayTime = time.Second
)

// h3Server ends QUIC, and serves HTTP/3 with the handler that HTTP/1 and HTTP/2
// have.
type h3Server struct {
	s         *Server
	ids       *ownIDs
	conn      *quicConn
	transport *quic.Transport
	listener  *quic.Listener
	http      *http3.Server
	tls       *tls.Config
	serving   sync.WaitGroup // everything of the port
	unproven  atomic.Int64   // handshakes
	grown     atomic.Int64   // bytes of windows

	mu     sync.Mutex
	visits map[*h3Visit]struct{} // connections whose handshake is complete
}

// h3Visit is one QUIC connection that ends here.
type h3Visit struct {
	visit
	conn     *quic.Conn
	route    *Route // by server name
	asks     *guard // for a client certificate
	unproven atomic.Bool
	grown    atomic.Int64 // bytes of windows
	requests atomic.Int64 // under way
	last     atomic.Int64 // when one ended, Unix nanoseconds
}

type h3VisitKey struct{}

func newH3Server(s *Server, p *quicPort) (*h3Server, error) {
	ids, err := newOwnIDs()
	if err != nil {
		return nil, err
	}
	h := &h3Server{s: s, ids: ids, visits: map[*h3Visit]struct{}{}}
	h.conn = &quicConn{p: &p.flowPort, in: make(chan *datagram, quicQueue), closed: make(chan struct{})}
	h.conn.SetReadDeadline(time.Time{})
	h.tls = h.tlsOf(s.web.tls)
	h.transport = &quic.Transport{
		Conn:                  h.conn,
		ConnectionIDGenerator: ids,
		VerifySourceAddress:   func(net.Addr) bool { return h.unproven.Load() >= maxUnproven },
		ConnContext:           h.begin,
	}
	h.listener, err = h.transport.Listen(&tls.Config{GetConfigForClient: h.configFor, MinVersion: tls.VersionTLS13}, &quic.Config{
		HandshakeIdleTimeout:           s.limits.Hello / 2,
		MaxIdleTimeout:                 s.limits.Idle,
		MaxIncomingStreams:             maxStreams,
		MaxIncomingUniStreams:          8, // control, QPACK's two, and what clients grease with
		InitialStreamReceiveWindow:     streamWindow,
		MaxStreamReceiveWindow:         maxStreamWindow,
		InitialConnectionReceiveWindow: connWindow,
		MaxConnectionReceiveWindow:     maxConnWindow,
		AllowConnectionWindowIncrease:  h.grow,
	})
	if err != nil {
		return nil, err
	}
	h.http = &http3.Server{
		Handler:        http.HandlerFunc(h.serveHTTP),
		MaxHeaderBytes: maxHead,
		IdleTimeout:    s.limits.Idle,
		ConnContext:    h.connContext,
		Logger:         slog.New(slog.DiscardHandler), // it tells of visitors' doing
	}
	return h, nil
}

// tlsOf is a configuration of the TLS port as QUIC wants it. Tickets resume
// connections, but carry no early data: it could be replayed.
func (h *h3Server) tlsOf(c *tls.Config) *tls.Config {
	c = c.Clone()
	c.MinVersion = tls.VersionTLS13
	c.NextProtos = []string{http3.NextProtoH3}
	return c
}

// start begins to serve.
func (h *h3Server) start() {
	h.s.listeners.Go(func() {
		if err := h.http.ServeListener(h3Listener{h}); !errors.Is(err, http.ErrServerClosed) {
			h.s.log.Error("HTTP/3 server ended", "err", err)
		}
		for { // those who came in the meantime
			c, err := h.listener.Accept(h.s.ctx)
			if err != nil {
				return
			}
			c.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
		}
	})
}

// begin is told of each connection before its handshake. Its address counts only
// when it has been shown not to be made up.
func (h *h3Server) begin(ctx context.Context, info *quic.ClientInfo) (context.Context, error) {
	visitor, local := unpackPeer(info.RemoteAddr)
	v := &h3Visit{visit: visit{server: h.s, raw: noConn{}, visitor: netip.AddrPortFrom(visitor.Addr().WithZone(""), visitor.Port()),
		local: netip.AddrPortFrom(local, h.conn.p.port), since: time.Now()}}
	h.s.metrics.accepted.WithLabelValues(carriesQUIC).Inc()
	if !info.AddrVerified {
		if h.unproven.Add(1) > 2*maxUnproven {
			h.unproven.Add(-1)
			h.s.metrics.refused(reasonTotal)
			return nil, errTooMany
		}
		v.unproven.Store(true)
		context.AfterFunc(ctx, func() { h.proven(v) })
	}
	return context.WithValue(ctx, h3VisitKey{}, v), nil
}

var errTooMany = errors.New("ingress: too many connections")

// proven notes that the visitor's address is real, or the connection over.
func (h *h3Server) proven(v *h3Visit) {
	if v.unproven.CompareAndSwap(true, false) {
		h.unproven.Add(-1)
	}
}

// configFor finds where a connection leads, as its handshake begins.
func (h *h3Server) configFor(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	v := hello.Context().Value(h3VisitKey{}).(*h3Visit)
	r := h.s.table.Load().TLS(hello.ServerName)
	switch {
	case r == nil || r.Exposure.Protocol != webgw.HTTP:
		h.s.metrics.refused(reasonName)
		return unrecognized, nil
	case h.s.Certificates == nil:
		h.s.metrics.refused(reasonCert)
		return unrecognized, nil
	}
	v.route = r
	config, asks := h.s.web.tlsFor(r)
	v.asks = asks
	if asks == nil {
		return h.tls, nil
	}
	return h.tlsOf(config), nil
}

// unrecognized ends a handshake with the alert unrecognized_name.
var unrecognized = &tls.Config{
	MinVersion:     tls.VersionTLS13,
	NextProtos:     []string{http3.NextProtoH3},
	GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, nil },
}

// grow allows a connection's window to grow.
func (h *h3Server) grow(c *quic.Conn, by uint64) bool {
	if h.grown.Add(int64(by)) > windowGrowth {
		h.grown.Add(-int64(by))
		return false
	}
	c.Context().Value(h3VisitKey{}).(*h3Visit).grown.Add(int64(by))
	return true
}

// h3Listener gives the HTTP/3 server those connections that are let in.
type h3Listener struct{ h *h3Server }

func (l h3Listener) Addr() net.Addr { return l.h.listener.Addr() }
func (l h3Listener) Close() error   { return l.h.listener.Close() }

// Accept returns the next connection whose handshake is complete.
func (l h3Listener) Accept(ctx context.Context) (*quic.Conn, error) {
	for {
		c, err := l.h.listener.Accept(ctx)
		if err != nil {
			return nil, err
		}
		if reason := l.h.enter(c); reason != "" {
			l.h.s.metrics.refused(reason)
			// Waits for the connection's end, which is no business of the others.
			l.h.serving.Go(func() { c.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeExcessiveLoad), "") })
			continue
		}
		return c, nil
	}
}

// enter counts a connection in, or says why it must not be.
func (h *h3Server) enter(c *quic.Conn) (reason string) {
	v := c.Context().Value(h3VisitKey{}).(*h3Visit)
	h.proven(v)
	v.conn = c
	if v.route == nil {
		return reasonName
	}
	if h.s.hurries(&v.visit, v.route) {
		return reasonRate
	}
	if reason := v.hold(v.route); reason != "" {
		return reason
	}
	if reason := h.s.doors.enter(&v.visit, &h.s.limits); reason != "" {
		v.unhold()
		return reason
	}
	v.last.Store(time.Now().UnixNano())
	h.mu.Lock()
	h.visits[v] = struct{}{}
	h.mu.Unlock()
	h.s.visits.Add(1)
	context.AfterFunc(c.Context(), func() {
		h.mu.Lock()
		delete(h.visits, v)
		h.mu.Unlock()
		h.grown.Add(-v.grown.Load())
		v.leave()
	})
	return ""
}

// connContext tells requests of their connection.
func (h *h3Server) connContext(ctx context.Context, c *quic.Conn) context.Context {
	v := c.Context().Value(h3VisitKey{}).(*h3Visit)
	state := c.ConnectionState().TLS
	vc := &visitConn{Conn: noConn{}, v: &v.visit, route: v.route, name: webgw.NormalizeHost(state.ServerName), proof: provedBy(v.asks, &state)}
	return context.WithValue(ctx, connKey{}, connInfo{c: vc, tls: true})
}

// serveHTTP serves one request.
func (h *h3Server) serveHTTP(rw http.ResponseWriter, r *http.Request) {
	v := r.Context().Value(h3VisitKey{}).(*h3Visit)
	v.requests.Add(1)
	defer func() {
		v.last.Store(time.Now().UnixNano())
		v.requests.Add(-1)
	}()
	w := &h3Writer{ResponseWriter: rw, deadlines: http.NewResponseController(rw), stall: h.s.limits.Stall}
	w.body(r, h.s.limits.Hello)
	h.s.web.ServeHTTP(w, r)
	w.progress() // for what is left to be sent
}

// h3Writer gives up on a visitor who takes nothing of an answer.
type h3Writer struct {
	http.ResponseWriter
	deadlines *http.ResponseController
	stall     time.Duration
}

// Unwrap is for http.ResponseController.
func (w *h3Writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *h3Writer) progress() { w.deadlines.SetWriteDeadline(time.Now().Add(w.stall)) } // fails on a stream that has ended: so will what follows

func (w *h3Writer) WriteHeader(status int) {
	w.progress()
	w.ResponseWriter.WriteHeader(status)
}

func (w *h3Writer) Write(p []byte) (int, error) {
	w.progress()
	return w.ResponseWriter.Write(p)
}

// FlushError sends what is held back.
func (w *h3Writer) FlushError() error {
	w.progress()
	return w.deadlines.Flush()
}

// body makes the request's body what net/http's servers make of it: none if
// there is none. A visitor who waits to be asked for it is asked.
func (w *h3Writer) body(r *http.Request, wait time.Duration) {
	switch {
	case r.ContentLength == 0:
		r.Body = http.NoBody
	case r.ContentLength < 0 && (isSafe(r.Method) || r.Method == http.MethodDelete):
		// That the request ends with its head shows only in the stream's end.
		var first [1]byte
		w.deadlines.SetReadDeadline(time.Now().Add(wait))
		n, err := r.Body.Read(first[:])
		w.deadlines.SetReadDeadline(time.Time{})
		if n == 0 && err == io.EOF {
			r.Body, r.ContentLength = http.NoBody, 0
		} else if n > 0 {
			r.Body = &begunBody{ReadCloser: r.Body, first: first[:n]}
		}
	}
	if r.Body != http.NoBody && hasToken(r.Header.Get("Expect"), "100-continue") {
		w.WriteHeader(http.StatusContinue) // not later, when an answer may be under way at the same time
	}
}

// begunBody is a body of which something has been read.
type begunBody struct {
	io.ReadCloser
	first []byte
}

func (b *begunBody) Read(p []byte) (int, error) {
	if len(b.first) > 0 {
		n := copy(p, b.first)
		b.first = b.first[n:]
		return n, nil
	}
	return b.ReadCloser.Read(p)
}

// drain lets requests finish: visitors are told GOAWAY, and connections without
// requests are closed a moment later. What is open when ctx ends is cut.
func (h *h3Server) drain(ctx context.Context) {
	h.listener.Close() // who comes now is refused; the error says only that it was closed before
	over := make(chan struct{})
	h.serving.Go(func() {
		defer close(over)
		if err := h.http.Shutdown(ctx); err != nil && ctx.Err() == nil {
			h.s.log.Warn("HTTP/3 shutdown", "err", err)
		}
	})
	h.serving.Go(func() {
		tick := time.NewTicker(goAwayTime / 4)
		defer tick.Stop()
		started := time.Now()
		for {
			select {
			case <-over:
				return
			case now := <-tick.C:
				if now.Sub(started) >= goAwayTime {
					h.closeIdle(now)
				}
			}
		}
	})
}

func (h *h3Server) closeIdle(now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for v := range h.visits {
		if v.requests.Load() == 0 && now.UnixNano()-v.last.Load() >= int64(goAwayTime) {
			delete(h.visits, v)
			h.serving.Go(func() { v.conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "") })
		}
	}
}

// end closes what is left.
func (h *h3Server) end() {
	if err := h.transport.Close(); err != nil {
		h.s.log.Warn("closing QUIC", "err", err)
	}
	h.conn.Close()
}

// deliver gives the server a datagram, or drops it if there are too many.
func (h *h3Server) deliver(b []byte, key flowKey) {
	if len(b) > quicPacketSize {
		h.s.metrics.datagramsDropped.Inc()
		return
	}
	d := datagrams.Get().(*datagram)
	d.n, d.from = copy(d.data[:], b), key
	select {
	case h.conn.in <- d:
	default:
		datagrams.Put(d)
		h.s.metrics.datagramsDropped.Inc()
	}
}

type datagram struct {
	n    int
	from flowKey
	data [quicPacketSize]byte
}

var datagrams = sync.Pool{New: func() any { return new(datagram) }}

// quicConn is the QUIC port as the server sees it: only with what is for it.
type quicConn struct {
	p      *flowPort
	in     chan *datagram
	once   sync.Once
	closed chan struct{}

	mu       sync.Mutex
	deadline chan struct{} // closed when reads end
	timer    *time.Timer
}

// ReadFrom implements net.PacketConn.
func (c *quicConn) ReadFrom(p []byte) (int, net.Addr, error) {
	c.mu.Lock()
	deadline := c.deadline
	c.mu.Unlock()
	select {
	case d := <-c.in:
		n, from := copy(p, d.data[:d.n]), packPeer(d.from)
		datagrams.Put(d)
		return n, from, nil
	case <-deadline:
		return 0, nil, os.ErrDeadlineExceeded
	case <-c.closed:
		return 0, nil, net.ErrClosed
	}
}

// WriteTo implements net.PacketConn. What there is no room for is lost, as it may
// be further on.
func (c *quicConn) WriteTo(p []byte, to net.Addr) (int, error) {
	visitor, local := unpackPeer(to)
	if err := c.p.packets.Send(p, visitor, local); errors.Is(err, netx.ErrNoRoom) {
		c.p.s.metrics.datagramsDropped.Inc()
	} else if err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close ends reads; the socket is the port's.
func (c *quicConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

// LocalAddr implements net.PacketConn.
func (c *quicConn) LocalAddr() net.Addr { return c.p.conn.LocalAddr() }

// SetReadDeadline implements net.PacketConn. A deadline holds for reads that
// begin after it was set, and for those that wait if it has passed.
func (c *quicConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	select {
	case <-c.deadline:
		c.deadline = nil
	default:
	}
	if c.deadline == nil {
		c.deadline = make(chan struct{})
	}
	if t.IsZero() {
		return nil
	}
	passed := c.deadline
	if wait := time.Until(t); wait > 0 {
		c.timer = time.AfterFunc(wait, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			select {
			case <-passed: // by another deadline, set as this one passed
			default:
				close(passed)
			}
		})
	} else {
		close(passed)
	}
	return nil
}

// SetDeadline implements net.PacketConn; writes never wait.
func (c *quicConn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetWriteDeadline implements net.PacketConn; writes never wait.
func (c *quicConn) SetWriteDeadline(time.Time) error { return nil }

// SetReadBuffer and SetWriteBuffer do nothing: the socket has its buffers.
func (c *quicConn) SetReadBuffer(int) error  { return nil }
func (c *quicConn) SetWriteBuffer(int) error { return nil }

// packPeer is an address that a visitor's datagrams come from, as the server
// keeps it: where they were sent to, which answers must come from, stands with
// the zone.
func packPeer(k flowKey) *net.UDPAddr {
	a := k.visitor.Addr()
	return &net.UDPAddr{IP: a.AsSlice(), Port: int(k.visitor.Port()), Zone: k.local.String() + "|" + a.Zone()}
}

func unpackPeer(a net.Addr) (visitor netip.AddrPort, local netip.Addr) {
	u := a.(*net.UDPAddr)
	at, zone, _ := bytes.Cut([]byte(u.Zone), []byte("|"))
	ip, _ := netip.AddrFromSlice(u.IP)
	local, _ = netip.ParseAddr(string(at)) // none, if it is not known
	return netip.AddrPortFrom(ip.Unmap().WithZone(string(zone)), uint16(u.Port)), local
}

// ownIDs makes the connection ids of the server here, such that they are
// recognized: nobody else can make one, nor see what two have in common.
type ownIDs struct{ block cipher.Block }

const ownIDLen = aes.BlockSize

func newOwnIDs() (*ownIDs, error) {
	var key [16]byte
	rand.Read(key[:]) // never fails
	block, err := aes.NewCipher(key[:])
	return &ownIDs{block}, err
}

// GenerateConnectionID implements quic.ConnectionIDGenerator.
func (o *ownIDs) GenerateConnectionID() (quic.ConnectionID, error) {
	var id [ownIDLen]byte
	rand.Read(id[:ownIDLen/2])
	o.block.Encrypt(id[:], id[:])
	return quic.ConnectionIDFromBytes(id[:]), nil
}

// ConnectionIDLen implements quic.ConnectionIDGenerator.
func (o *ownIDs) ConnectionIDLen() int { return ownIDLen }

// own reports whether the id is one of the server's.
func (o *ownIDs) own(id []byte) bool {
	if len(id) != ownIDLen {
		return false
	}
	var b [ownIDLen]byte
	o.block.Decrypt(b[:], id)
	return [ownIDLen / 2]byte(b[ownIDLen/2:]) == [ownIDLen / 2]byte{}
}

// noConn stands for the connection of a visit by QUIC, which has none of its own.
type noConn struct{ net.Conn }

// Close implements net.Conn; the server closes its connections.
func (noConn) Close() error { return nil }
