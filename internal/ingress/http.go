package ingress

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// web serves HTTP: HTTP/1 by http1, HTTP/2 by conn2. Requests are passed on
// over HTTP/1.1 by exchange.pass, over HTTP/2 by net/http's reverse proxy; the
// connections to workloads are streams.
type web struct {
	s     *Server
	tls   *tls.Config
	proxy *httputil.ReverseProxy

	mu       sync.Mutex
	open     map[server]struct{}
	draining bool
	requests int // under way
	closed   bool
	idle     chan struct{} // closed when closed and no request is under way
}

func newWeb(s *Server) *web {
	w := &web{s: s, open: map[server]struct{}{}, idle: make(chan struct{})}
	errorLog := slog.NewLogLogger(s.log.Handler(), slog.LevelDebug) // of visitors' doing
	w.tls = &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2", "http/1.1"},
		GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			c, err := s.Certificates.GetCertificate(h)
			if err != nil {
				// Without a certificate and an error, the alert is unrecognized_name.
				s.metrics.refused(reasonCert)
				if s.table.Load().TLS(h.ServerName) != nil { // else any name that a stranger makes up
					s.log.Warn("no certificate", "host", h.ServerName, "err", err)
				}
				return nil, nil
			}
			return c, nil
		},
	}
	w.proxy = &httputil.ReverseProxy{
		Rewrite:        rewrite,
		Transport:      w,
		FlushInterval:  -1,
		BufferPool:     buffers{},
		ErrorLog:       errorLog,
		ModifyResponse: modifyResponse,
		ErrorHandler: func(_ http.ResponseWriter, r *http.Request, err error) {
			r.Context().Value(exchangeKey{}).(*exchange).failed(err)
		},
	}
	return w
}

func (w *web) close() {
	// Connections are closed; their requests have ended with them.
	w.mu.Lock()
	w.closed = true
	none := w.requests == 0
	w.mu.Unlock()
	if !none {
		<-w.idle
	}
}

// server serves one connection.
type server interface {
	drain() // it ends after the requests under way
	end()   // the visitor's requests end
}

// add notes a connection, unless no more are served.
func (w *web) add(h server) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	w.open[h] = struct{}{}
	if w.draining {
		h.drain()
	}
	return true
}

func (w *web) remove(h server) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.open, h)
}

// drain has connections end once they are idle.
func (w *web) drain() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.draining = true
	for h := range w.open {
		h.drain()
	}
}

// cut ends all requests; their connections are reset by the one who calls.
func (w *web) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for h := range w.open {
		h.end()
	}
}

// begin counts a request, unless the server is closed.
func (w *web) begin() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	w.requests++
	return true
}

func (w *web) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.requests--; w.requests == 0 && w.closed {
		close(w.idle)
	}
}

// visitConn is the visitor's connection for those who read it from the start;
// closing it ends the visit.
type visitConn struct {
	net.Conn
	v     *visit
	head  []byte
	route *Route // by server name, if TLS ends here
	name  string // the server name, normalized
	proof *proof // of a client certificate, if one was asked for
	met   *guard // whose limit on connections it was counted against, without TLS

	mu        sync.Mutex
	bandwidth map[*guard]valves

	naming           sync.Once
	from, node, port string // as fields tell of them
}

func (c *visitConn) Read(p []byte) (int, error) {
	if len(c.head) > 0 {
		n := copy(p, c.head)
		if c.head = c.head[n:]; len(c.head) == 0 {
			c.head = nil
		}
		return n, nil
	}
	return c.Conn.Read(p)
}

func (c *visitConn) Close() error {
	defer c.v.leave()
	return c.Conn.Close()
}

func (c *visitConn) CloseWrite() error { return netx.CloseWrite(c.Conn) }

// take serves plain HTTP.
func (w *web) take(v *visit, head []byte) {
	w.serve1(&visitConn{Conn: v.raw, v: v, head: head})
}

// terminate ends TLS and serves the HTTP in it.
func (w *web) terminate(v *visit, r *Route, seen sniffed, deadline time.Time) {
	if reason := v.hold(r); reason != "" {
		w.s.turnAway(v, reason, nil)
		return
	}
	c := &visitConn{Conn: v.raw, v: v, head: seen.head, route: r, name: webgw.NormalizeHost(seen.hello.ServerName)}
	config, asks := w.tlsFor(r)
	t := tls.Server(c, config)
	err := c.SetDeadline(deadline)
	if err == nil {
		err = t.HandshakeContext(w.s.ctx)
	}
	if err == nil {
		err = c.SetDeadline(time.Time{})
	}
	if err != nil {
		w.s.metrics.refused(reasonTLSFail)
		w.s.log.Debug("TLS handshake failed", "visitor", v.visitor, "err", err)
		c.Close()
		return
	}
	c.proof = proved(asks, t)
	if t.ConnectionState().NegotiatedProtocol == "h2" {
		w.serve2(t)
		return
	}
	w.serve1(t)
}

type connKey struct{}

// connInfo is what requests know of their connection.
type connInfo struct {
	c     *visitConn
	tls   bool
	http1 *http1 // nil: it speaks another version
}

func connOf(c net.Conn) connInfo {
	var i connInfo
	if t, ok := c.(*tls.Conn); ok {
		i.tls, c = true, t.NetConn()
	}
	i.c = c.(*visitConn)
	return i
}

type exchangeKey struct{}

// exchange is one request and its answer.
type exchange struct {
	http.ResponseWriter
	web     *web
	conn    connInfo
	in      *http.Request
	ctx     context.Context // ends with the visitor, or when the policy allows no more time
	id      string
	host    string // normalized, without port
	route   *Route
	ruled   *ruling
	refusal *page // by which the request is answered; nil: none
	upgrade bool  // asked for, over HTTP/1
	body    bool
	untimed func()       // ends the limit on the request's time; nil: none
	packed  *compression // nil: the answer's body goes as it is
	inward  *throttle    // limits on bandwidth; nil: none
	outward *throttle
	unpace  func()      // ends the wait of who reads the request's body; nil: nobody waits
	stall   *stallBody  // over HTTP/2 and HTTP/3
	begun   atomic.Bool // the answer has

	target   *target    // that answered
	empty    bool       // the answer over HTTP/2 has no body
	sent     chan error // the end of sending the body; nil: there is none, or it has been seen
	status   int
	read     atomic.Int64 // bytes of the request's body
	written  int64        // bytes of the answer's body
	err      error
	hijacked *countedConn
}

// Unwrap is for http.ResponseController.
func (x *exchange) Unwrap() http.ResponseWriter { return x.ResponseWriter }

// WriteHeader notes the status.
func (x *exchange) WriteHeader(status int) {
	if x.status == 0 && status >= 200 {
		x.status = status
		x.begun.Store(true)
		x.finish()
		x.compress()
		x.announce()
	}
	x.ResponseWriter.WriteHeader(status)
}

func (x *exchange) Write(p []byte) (int, error) {
	if x.status == 0 {
		x.WriteHeader(http.StatusOK)
	}
	if x.packed != nil {
		return x.packed.take(p)
	}
	return x.write(p)
}

// write sends a part of the answer's body.
func (x *exchange) write(p []byte) (int, error) {
	write := x.ResponseWriter.Write
	if x.outward != nil {
		write = x.writePaced
	}
	n, err := write(p)
	x.written += int64(n)
	return n, err
}

// FlushError sends what is held back. The head of an answer without a body goes
// with the end of the stream: in two frames, gRPC's Trailers-Only answers are
// malformed.
func (x *exchange) FlushError() error {
	if x.empty {
		return nil
	}
	if x.packed != nil {
		if err := x.packed.flush(); err != nil {
			return err
		}
	}
	return http.NewResponseController(x.ResponseWriter).Flush()
}

// newRequestID returns 128 random bits.
func newRequestID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// ServeHTTP serves a request over HTTP/3.
func (w *web) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	w.serve(&exchange{ResponseWriter: rw, web: w, conn: r.Context().Value(connKey{}).(connInfo), in: r, ctx: r.Context()})
}

// serve routes one request, admits it and passes it on.
func (w *web) serve(x *exchange) {
	if !w.begin() {
		panic(http.ErrAbortHandler) // its connection is closed
	}
	defer w.end()
	r := x.in
	x.id = newRequestID()
	start := time.Now()
	x.host = hostOf(r.Host)
	path := r.URL.Path
	major := min(max(r.ProtoMajor, 1), 3)
	count := &w.s.metrics.http
	count.active.Inc()
	defer func() {
		count.active.Dec()
		p := recover()
		if p != nil && p != http.ErrAbortHandler {
			w.s.metrics.panics.Inc()
		}
		if p != nil && !r.ProtoAtLeast(1, 1) {
			netx.Reset(x.conn.c.v.raw) // an orderly end would make the answer look whole
		}
		if x.packed != nil {
			if err := x.packed.end(p == nil); err != nil && x.err == nil {
				x.err = err
			}
		}
		in, out := x.read.Load(), x.written
		if c := x.hijacked; c != nil {
			if x.status == 0 {
				x.status = http.StatusSwitchingProtocols
			}
			in, out = in+c.in.Load(), out+c.out.Load()
		}
		took := time.Since(start)
		count.answered[major][statusClass(x.status)].Inc()
		count.took[major].Observe(took.Seconds())
		count.in.Add(float64(in))
		count.out.Add(float64(out))
		a := Access{Err: x.err, Access: webgw.Access{Time: start, Visitor: x.conn.c.v.visitor.Addr(), Method: r.Method, Host: x.host,
			Path: path, Proto: r.Proto, Status: x.status, BytesIn: in, BytesOut: out, Took: took, ID: x.id}}
		if x.route != nil {
			a.Exposure = x.route.Key
		}
		if x.target != nil {
			a.Target = x.target.Target
		}
		w.s.record(a)
		if p != nil {
			panic(p) // net/http closes the connection, and logs if it is a bug
		}
	}()
	x.body = r.Body != nil && r.Body != http.NoBody
	x.limitStall()
	if p := x.admit(); p != nil {
		x.answer(p)
		return
	}
	defer x.route.release()
	defer x.limitTime()()
	x.pace()
	if x.isConnect() {
		x.connect()
		return
	}
	if !overH2C(x.route.Exposure.Upstream, r) {
		x.pass()
		return
	}
	ctx := context.WithValue(x.ctx, exchangeKey{}, x)
	// Without it, as over HTTP/3, the proxy would end a body that was cut like one
	// that is whole.
	ctx = context.WithValue(ctx, http.ServerContextKey, new(http.Server))
	w.proxy.ServeHTTP(x, r.WithContext(ctx))
}

// answer sends one of the gateway's own pages.
func (x *exchange) answer(p *page) {
	if x.in.ProtoMajor == 1 && p.status != http.StatusNotFound && p.status < 500 && (x.ruled == nil || x.in.ContentLength != 0 || p == &misdirected) {
		x.Header().Set("Connection", "close")
	}
	p.write(x, x.in.Header.Get("Accept"), x.web.s.Name, x.id)
}

// hostOf takes the port off a Host, and normalizes the name.
func hostOf(h string) string {
	if i := strings.LastIndexByte(h, ':'); i >= 0 && !strings.HasSuffix(h, "]") {
		h = h[:i]
	}
	return webgw.NormalizeHost(h)
}

// admit finds the request's route and counts it in, or returns the page that
// refuses it.
func (x *exchange) admit() *page {
	r := x.in
	if x.refusal != nil {
		x.host = ""
		return x.refusal
	}
	if x.conn.http1 != nil {
		if p := x.conn.http1.Refusal(); p != nil {
			return p
		}
		x.upgrade = x.conn.http1.head.upgrade
	} else if p := checkHTTP2(r); p != nil {
		return p
	}
	t := x.web.s.table.Load()
	route := t.HTTP(x.host)
	if x.conn.tls {
		route = t.TLS(x.host)
		if x.host != x.conn.c.name && (route == nil || route.Key != x.conn.c.route.Key) {
			return &misdirected // RFC 9110 section 15.5.20
		}
		if route != nil && route.Exposure.Protocol != webgw.HTTP {
			return &misdirected
		}
	}
	if x.isConnect() && !route.connects() {
		return &badMethod
	}
	if route == nil {
		if t.TLS(x.host) != nil {
			return &tlsOnly
		}
		return x.unknown(t)
	}
	return x.enter(route)
}

// checkHTTP2 is what head.parse does for HTTP/1, as far as what reads
// HTTP/2 and HTTP/3 doesn't.
func checkHTTP2(r *http.Request) *page {
	fields := 0
	for _, v := range r.Header {
		fields += len(v)
	}
	hosts := r.Header["Host"]
	method, target, host := r.Method, r.RequestURI, r.Host
	switch {
	case fields > maxFields:
		return &headTooLarge
	case !isToken(method) || !isTarget(target):
		return &badRequest // it would change the request line, RFC 9113 section 10.3
	case is(method, "connect") || is(method, "trace"):
		return &badMethod
	case !isAuthority(host) || len(hosts) > 1 || len(hosts) == 1 && hosts[0] != r.Host:
		return &badHost // RFC 9113 section 8.3.1
	case !isLength(r.Header["Content-Length"], r.ContentLength):
		return &ambiguous // RFC 9113 section 8.1.1
	}
	return checkTarget(method, target, host)
}

// isLength reports whether Content-Length is given at most once and is the
// number that net/http goes by: 0 where no data follows. It sees to it that the
// data is as long as promised.
func isLength(values []string, goesBy int64) bool {
	if len(values) == 0 {
		return true
	}
	n, err := strconv.ParseUint(values[0], 10, 63) // takes no sign
	return len(values) == 1 && err == nil && int64(n) == goesBy
}

// Hijack gives the connection to the proxy for an upgrade that the visitor
// asked for.
func (x *exchange) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if x.conn.http1 == nil {
		return nil, nil, http.ErrNotSupported
	}
	c, rw, err := http.NewResponseController(x.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	x.hijacked = &countedConn{Conn: c}
	return x.hijacked, rw, nil
}

// countedConn counts the bytes of an upgraded connection. Those that the
// buffers of the HTTP server hold at the start pass uncounted.
type countedConn struct {
	net.Conn
	in, out atomic.Int64
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.in.Add(int64(n))
	return n, err
}

func (c *countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.out.Add(int64(n))
	return n, err
}

// CloseWrite passes a half-close on.
func (c *countedConn) CloseWrite() error { return netx.CloseWrite(c.Conn) }

// buffers lends the proxy memory to copy with.
type buffers struct{}

var bufferPool = sync.Pool{New: func() any { return new([32 << 10]byte) }}

func (buffers) Get() []byte  { return bufferPool.Get().(*[32 << 10]byte)[:] }
func (buffers) Put(b []byte) { bufferPool.Put((*[32 << 10]byte)(b)) }
