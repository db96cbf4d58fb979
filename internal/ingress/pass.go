package ingress

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

const (
	continueWait  = 2 * time.Second // for a workload's 100 (Continue); then the body is sent anyway
	maxInterim    = 10              // interim answers to one request
	maxAnswerHead = 256 << 10       // bytes of an answer's head
	lateBody      = 50 * time.Millisecond
)

var (
	errUnasked   = errors.New("ingress: the workload switched to a protocol that was not asked for")
	errInterim   = errors.New("ingress: too many interim answers")
	errAnswerBig = errors.New("ingress: the head of the workload's answer is too large")
	errNoAnswer  = errors.New("ingress: the workload closed the connection instead of answering")
)

// pass sends the request to a target of its route over HTTP/1.1 and passes the
// answer on. Everything but a request's body happens in the caller's goroutine.
func (x *exchange) pass() {
	c, res, err := x.ask()
	if err != nil {
		x.failed(err)
		return
	}
	if res.StatusCode == http.StatusSwitchingProtocols {
		err = x.switchProtocols(c, res)
	} else if err = x.limitAnswer(res); err != nil {
		x.drop(c)
		x.failed(err)
		return
	} else {
		err = x.reply(c, res)
	}
	if err != nil {
		x.err = err
		panic(http.ErrAbortHandler) // the visitor must not take what came for all
	}
}

// ask sends the request to the targets of its route, one after the other as
// long as none can have had any of it, and returns the head of the answer.
func (x *exchange) ask() (*workloadConn, *http.Response, error) {
	var last error
	turn := x.route.turn()
	for t := turn.pick(time.Now()); t != nil; t = turn.pick(time.Now()) {
		x.target = t
		c, res, err := x.askTarget(t)
		if err == nil {
			t.worked()
			return c, res, nil
		}
		if x.ctx.Err() != nil || !neverHad(err) {
			return nil, nil, err
		}
		if _, ok := errors.AsType[*openError](err); !ok {
			t.failed(time.Now()) // refused late; open has counted the others
		}
		last = err
		if x.read.Load() > 0 {
			break // some of the body is gone
		}
	}
	return nil, nil, last
}

// askTarget asks one target, on a kept connection if there is one. What was
// kept may have ended just now: then a request that may be repeated is.
func (x *exchange) askTarget(t *target) (*workloadConn, *http.Response, error) {
	for {
		c := t.take(x.body || !isSafe(x.in.Method))
		if c == nil {
			stream, err := x.web.openHTTP(x, t, x.body, "http/1.1")
			if err != nil {
				return nil, nil, err
			}
			c = t.connection(stream)
		}
		res, err := x.askOn(c)
		if err == nil {
			return c, res, nil
		}
		x.drop(c)
		again := c.used && c.silent && !x.body && isSafe(x.in.Method) && x.ctx.Err() == nil
		if !again {
			return nil, nil, err
		}
	}
}

// isSafe reports whether a request may be repeated (RFC 9110 section 9.2.1).
func isSafe(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions:
		return true
	}
	return false
}

// openHTTP opens a stream for HTTP; if that is over TLS, of the version alpn.
func (w *web) openHTTP(x *exchange, t *target, prompt bool, alpn string) (netx.CloseWriter, error) {
	stream, err := w.s.open(x.ctx, x.route, t, Origin{Visitor: x.conn.c.v.visitor, Local: x.conn.c.v.local, Host: x.host, Protocol: webgw.HTTP, Prompt: prompt})
	if err != nil {
		return nil, err // not stream: a nil in an interface is not nil
	}
	if t.secure != nil {
		return w.s.secured(x.ctx, t, stream, alpn)
	}
	return stream, nil
}

// askOn sends the request on c and waits for the head of the final answer.
func (x *exchange) askOn(c *workloadConn) (*http.Response, error) {
	c.begin(x.ctx, x.body)
	var expect chan struct{}
	if x.body && hasToken(x.in.Header.Get("Expect"), "100-continue") {
		expect = make(chan struct{}, 1)
		c.over = make(chan struct{})
	}
	head := heads.Get().(*[]byte)
	*head = x.appendHead((*head)[:0])
	_, err := c.Write(*head)
	heads.Put(head)
	if err != nil {
		// A connection that was kept may say why, or that it had ended.
		if _, e := c.r.Peek(1); e == nil || isRefusal(e) {
			err = e
		} else {
			c.silent = true
		}
		if err != nil {
			return nil, err
		}
	} else if x.body {
		sent, over := make(chan error, 1), c.over
		x.sent = sent
		go func() { sent <- x.sendBody(c, expect, over) }()
	} else {
		c.awaitAnswer(x.web.s.limits.Answer)
	}
	res, err := x.awaitAnswer(c, expect)
	c.answered()
	return res, err
}

// awaitAnswer reads answers until the final one, and passes the others on.
func (x *exchange) awaitAnswer(c *workloadConn, expect chan<- struct{}) (*http.Response, error) {
	for range maxInterim {
		c.limit(maxAnswerHead)
		if _, err := c.r.Peek(1); err != nil {
			c.silent = true
			if err == io.EOF {
				err = errNoAnswer
			}
			return nil, err
		}
		if res := c.plainAnswer(x.in.Method); res != nil {
			c.limit(-1)
			return res, nil
		}
		res, err := http.ReadResponse(c.r, x.in)
		if err != nil {
			return nil, err
		}
		c.limit(-1)
		switch {
		case res.StatusCode >= 200 || res.StatusCode == http.StatusSwitchingProtocols:
			return res, nil
		case res.StatusCode == http.StatusContinue:
			if expect != nil {
				select {
				case expect <- struct{}{}:
				default:
				}
			}
		default:
			h := x.Header()
			x.copyFields(h, res.Header)
			x.WriteHeader(res.StatusCode)
			clear(h)
		}
	}
	return nil, errInterim
}

// reply passes the answer on, and keeps c if it may be used again.
func (x *exchange) reply(c *workloadConn, res *http.Response) error {
	h := x.Header()
	x.copyFields(h, res.Header)
	h.Set("X-Request-Id", x.id) // by which the visitor can ask for help
	announced := len(res.Trailer)
	if announced > 0 {
		names := make([]string, 0, announced)
		for name := range res.Trailer {
			names = append(names, name)
		}
		h.Set("Trailer", strings.Join(names, ", "))
	}
	if _, ok := h["Content-Type"]; !ok {
		h["Content-Type"] = nil // what the workload does not say is not guessed
	}
	x.WriteHeader(res.StatusCode)
	err := x.copyBody(c, res)
	if err != nil {
		x.drop(c)
		http.NewResponseController(x.ResponseWriter).Flush() // what came before the cut; nobody may be there to take it
		return err
	}
	for name, values := range res.Trailer {
		if len(res.Trailer) != announced {
			name = http.TrailerPrefix + name
		}
		h[name] = values
	}
	if x.bodySent(c) && !res.Close && c.r.Buffered() == 0 {
		x.target.keep(c)
	} else {
		x.drop(c)
	}
	return nil
}

// copyBody passes the answer's body on. It is not held back: what has come is
// flushed before waiting for more.
func (x *exchange) copyBody(c *workloadConn, res *http.Response) error {
	if res.ContentLength == 0 || res.Body == http.NoBody {
		return nil
	}
	flush := x.FlushError
	size := 4 << 10
	b := netx.Borrow(size)
	defer func() { b.Return() }()
	for left := res.ContentLength; ; {
		n, err := res.Body.Read(b.Free())
		if n > 0 {
			left -= int64(n)
			if _, err := x.Write(b.Free()[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if left != 0 && c.r.Buffered() == 0 {
			if err := flush(); err != nil {
				return err
			}
		}
		if n == len(b.Free()) && size < maxCopy {
			b.Return()
			size *= 4
			b = netx.Borrow(size)
		}
	}
}

// maxCopy is the most that one read of a body brings.
const maxCopy = 256 << 10

// copyFields takes over the fields of an answer that are meant for the visitor.
func (x *exchange) copyFields(to, from http.Header) {
	listed := from["Connection"]
	for name, values := range from {
		if isHopByHop(name) || strings.HasPrefix(name, "Webgw-") || len(listed) > 0 && isListed(listed, name) {
			continue
		}
		to[name] = values
	}
}

// isHopByHop reports whether a field belongs to one connection only (RFC 9110
// section 7.6.1), by its canonical name.
func isHopByHop(name string) bool {
	switch name {
	case "Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Te", "Trailer", "Transfer-Encoding", "Upgrade":
		return true
	}
	return false
}

// isListed reports whether Connection names the field.
func isListed(connection []string, name string) bool {
	return slices.ContainsFunc(connection, func(list string) bool { return hasToken(list, name) })
}

var heads = sync.Pool{New: func() any { return new([]byte) }}

// appendHead appends the head of the request as the workload gets it. All that
// comes from the visitor was checked before: by the parser, or by the HTTP/2
// server.
func (x *exchange) appendHead(b []byte) []byte {
	r := x.in
	b = append(b, r.Method...)
	b = append(b, ' ')
	b = append(b, r.URL.RequestURI()...)
	b = append(b, " HTTP/1.1\r\n"...)
	b = appendField(b, "Host", r.Host)
	listed := r.Header["Connection"]
	for name, values := range r.Header {
		if isHopByHop(name) || name == "Host" || name == "Content-Length" || isDroppedField(name) || len(listed) > 0 && isListed(listed, name) {
			continue
		}
		for _, v := range values {
			b = appendField(b, name, v)
		}
	}
	if hasToken(r.Header.Get("Te"), "trailers") {
		b = appendField(b, "Te", "trailers")
	}
	if x.upgrade && !hasToken(r.Header.Get("Upgrade"), "h2c") {
		b = appendField(b, "Connection", "Upgrade")
		b = appendField(b, "Upgrade", r.Header.Get("Upgrade"))
	}
	b = x.appendForwarded(b)
	switch {
	case x.chunked():
		b = appendField(b, "Transfer-Encoding", "chunked")
		for name := range r.Trailer {
			if !isDroppedField(name) {
				b = appendField(b, "Trailer", name)
			}
		}
	case x.body || r.Method == http.MethodPost || r.Method == http.MethodPut || r.Method == http.MethodPatch:
		b = append(b, "Content-Length: "...)
		b = strconv.AppendInt(b, max(r.ContentLength, 0), 10)
		b = append(b, "\r\n"...)
	}
	return append(b, "\r\n"...)
}

// appendForwarded tells who asks, and how they came.
func (x *exchange) appendForwarded(b []byte) []byte {
	for _, f := range x.forwarded() {
		b = appendField(b, f[0], f[1])
	}
	for _, f := range x.ruled.extra() {
		b = appendField(b, f[0], f[1])
	}
	return b
}

func appendField(b []byte, name, value string) []byte {
	b = append(b, name...)
	b = append(b, ": "...)
	b = append(b, value...)
	return append(b, "\r\n"...)
}

// chunked reports whether the length of the request's body is not known before.
func (x *exchange) chunked() bool { return x.body && (x.in.ContentLength < 0 || len(x.in.Trailer) > 0) }

// sendBody sends the request's body. A body that can't be had to its end ends
// the connection, so that the workload does not take it for whole.
func (x *exchange) sendBody(c *workloadConn, expect, over <-chan struct{}) error {
	if expect != nil {
		wait := time.NewTimer(continueWait)
		defer wait.Stop()
		select {
		case <-expect:
		case <-wait.C:
		case <-over:
			return net.ErrClosed
		}
	}
	err := x.copyRequest(c)
	if err != nil {
		c.cancel()
		return err
	}
	c.awaitAnswer(x.web.s.limits.Answer)
	return nil
}

func (x *exchange) copyRequest(c *workloadConn) error {
	chunked := x.chunked()
	size := 4 << 10
	b := netx.Borrow(size)
	defer func() { b.Return() }()
	for {
		room := b.Free()
		n, err := x.in.Body.Read(room[:len(room)-len(crlf)])
		if n > 0 {
			x.read.Add(int64(n))
			b.Grow(n)
			if chunked {
				b.Grow(copy(b.Free(), crlf))
				b.Prepend(fmt.Appendf(nil, "%x\r\n", n))
			}
			if _, err := c.Write(b.Bytes()); err != nil {
				return err
			}
			full := n == len(room)-len(crlf)
			if full && size < maxCopy {
				size *= 4
			}
			b.Return()
			b = netx.Borrow(size)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if !chunked {
		return nil
	}
	end := []byte("0\r\n")
	for name, values := range x.in.Trailer {
		for _, v := range values {
			if !isDroppedField(name) {
				end = appendField(end, name, v)
			}
		}
	}
	_, err := c.Write(append(end, crlf...))
	return err
}

// bodySent reports whether the whole body has been sent. After an answer that
// came early, what is on its way may still arrive for a moment.
func (x *exchange) bodySent(c *workloadConn) bool {
	if x.sent == nil {
		return true
	}
	late := time.NewTimer(lateBody)
	defer late.Stop()
	select {
	case err := <-x.sent:
		x.sent = nil
		return err == nil
	case <-late.C:
		return false
	}
}

// drop closes c, and ends the sending of a body if that is still under way.
func (x *exchange) drop(c *workloadConn) {
	c.drop()
	if x.sent == nil {
		return
	}
	// Whoever still reads the visitor's body is woken; nothing can follow it on
	// the visitor's connection then.
	select {
	case <-x.sent:
	default:
		if x.unpace != nil {
			x.unpace()
		}
		http.NewResponseController(x.ResponseWriter).SetReadDeadline(time.Unix(1, 0)) // an error means that the connection is closed, which wakes as well
		<-x.sent
	}
	x.sent = nil
}

// switchProtocols passes on that the workload speaks another protocol from here
// on, and then relays until both directions have ended.
func (x *exchange) switchProtocols(c *workloadConn, res *http.Response) error {
	if !x.upgrade || !strings.EqualFold(res.Header.Get("Upgrade"), x.in.Header.Get("Upgrade")) {
		x.drop(c)
		x.failed(errUnasked)
		return nil
	}
	visitor, rw, err := x.Hijack()
	if err != nil {
		x.drop(c)
		return err
	}
	defer visitor.Close()
	defer x.drop(c)
	h := http.Header{}
	x.copyFields(h, res.Header)
	h.Set("Connection", "Upgrade")
	h.Set("Upgrade", res.Header.Get("Upgrade"))
	h.Set("X-Request-Id", x.id)
	fmt.Fprintf(rw, "HTTP/1.1 101 %s\r\n", http.StatusText(http.StatusSwitchingProtocols))
	err = h.Write(rw)
	rw.WriteString("\r\n")
	if first, e := c.r.Peek(c.r.Buffered()); e == nil {
		rw.Write(first) // a bufio.Writer keeps its first error for Flush
	}
	if err = errors.Join(err, rw.Flush()); err != nil {
		return err
	}
	c.unlimit()
	early, err := rw.Reader.Peek(rw.Reader.Buffered())
	if err != nil {
		return err
	}
	defer x.watchTime()()
	_, _, x.err = netx.Join(x.paceUpgraded(visitor), c.CloseWriter, early)
	return nil
}

// Kept connections.
const (
	idlePerTarget = 256
	upstreamIdle  = 75 * time.Second
	idleSweep     = 5 * time.Second
)

// workloadConn is an HTTP/1.1 connection to a workload, used by one exchange at
// a time.
type workloadConn struct {
	netx.CloseWriter
	r      *bufio.Reader // nil while it is kept
	epoch  int           // of the target's kept connections, when it was opened
	used   bool          // for an exchange before
	silent bool          // nothing has come in this exchange
	since  time.Time     // kept since
	plain  plainAnswer
	left   int64 // bytes that may come before limit is called again; < 0: any

	over chan struct{} // closed at the exchange's end, if somebody waits for that
	stop func() bool   // of the watch on the visitor, unless that is on
	on   *ending

	deadline time.Time // of reads, as it was set; zero: none

	mu        sync.Mutex
	cancelled bool
	waiting   bool // for the head of an answer
}

var readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 4<<10) }}

// Read implements io.Reader for r.
func (c *workloadConn) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, errAnswerBig
	}
	if c.left > 0 {
		p = p[:min(int64(len(p)), c.left)]
	}
	c.unlimit()
	n, err := c.CloseWriter.Read(p)
	if c.left > 0 {
		c.left -= int64(n)
	}
	return n, err
}

func (c *workloadConn) limit(n int64) { c.left = n }

// begin prepares an exchange that ends, at the latest, with ctx.
func (c *workloadConn) begin(ctx context.Context, body bool) {
	c.r = readers.Get().(*bufio.Reader)
	c.r.Reset(c)
	c.silent = false
	c.await(!body)
	if c.on, _ = ctx.(*ending); c.on != nil {
		c.on.add(c)
	} else {
		c.stop = context.AfterFunc(ctx, c.cancel)
	}
}

// await begins the wait for an answer; at once, or after a body that takes its
// time.
func (c *workloadConn) await(atOnce bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting = true
	if !atOnce {
		c.unlimitLocked()
	}
}

// cancel makes everybody who waits on c give up.
func (c *workloadConn) cancel() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cancelled = true
	c.SetDeadline(time.Unix(1, 0)) // an error means that it is closed
}

// awaitAnswer limits the time until the head of the answer has come.
func (c *workloadConn) awaitAnswer(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.waiting || c.cancelled {
		return
	}
	if t, stale := renew(c.deadline, d); stale {
		c.deadline = t
		c.SetReadDeadline(t) // an error means that it is closed
	}
}

// answered ends that limit. The deadline stays until somebody reads on: most
// answers are there with their head.
func (c *workloadConn) answered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting = false
}

// unlimit lets reads take as long as they need, once the head of the answer has
// come.
func (c *workloadConn) unlimit() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.waiting {
		c.unlimitLocked()
	}
}

func (c *workloadConn) unlimitLocked() {
	if !c.cancelled && !c.deadline.IsZero() {
		c.deadline = time.Time{}
		c.SetReadDeadline(time.Time{}) // an error means that it is closed
	}
}

// end ends the exchange; false if it was cancelled.
func (c *workloadConn) end() bool {
	if c.over != nil {
		close(c.over)
		c.over = nil
	}
	c.r.Reset(nil)
	readers.Put(c.r)
	c.r = nil
	if c.on != nil && !c.on.remove(c) || c.on == nil && !c.stop() {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.cancelled
}

// drop ends the exchange and closes c.
func (c *workloadConn) drop() {
	if c.r != nil {
		c.end()
	}
	c.Close() // an error means that it is closed already
}

// alive reports whether a kept connection may be used: the workload has neither
// ended it nor said anything.
func (c *workloadConn) alive() bool {
	if q, ok := c.CloseWriter.(interface{ Quiet() bool }); ok {
		return q.Quiet()
	}
	return netx.Alive(c.CloseWriter)
}

// connection makes a connection of a stream to t.
func (t *target) connection(s netx.CloseWriter) *workloadConn {
	t.mu.Lock()
	defer t.mu.Unlock()
	return &workloadConn{CloseWriter: s, epoch: t.epoch, left: -1}
}

// freshness is how long a kept connection may be taken for alive without a look.
const freshness = time.Second

// take returns a kept connection, the latest first, or nil. If sure, it has not
// ended as far as this machine knows.
func (t *target) take(sure bool) *workloadConn {
	for {
		t.mu.Lock()
		n := len(t.kept)
		if n == 0 {
			t.mu.Unlock()
			return nil
		}
		c := t.kept[n-1]
		t.kept[n-1] = nil
		t.kept = t.kept[:n-1]
		t.mu.Unlock()
		if !sure && time.Since(c.since) < freshness || c.alive() {
			c.used = true
			return c
		}
		c.Close()
	}
}

// keep takes c back after an exchange.
func (t *target) keep(c *workloadConn) {
	ok := c.end()
	t.mu.Lock()
	if !ok || c.epoch != t.epoch || len(t.kept) >= idlePerTarget {
		t.mu.Unlock()
		c.Close()
		return
	}
	c.since = time.Now()
	t.kept = append(t.kept, c)
	if t.sweep == nil {
		t.sweep = time.AfterFunc(idleSweep, t.sweepKept)
	}
	t.mu.Unlock()
}

// sweepKept closes kept connections that have ended, or were not needed for
// long.
func (t *target) sweepKept() {
	var ended []*workloadConn
	t.mu.Lock()
	now := time.Now()
	t.kept = slices.DeleteFunc(t.kept, func(c *workloadConn) bool {
		if now.Sub(c.since) < upstreamIdle && c.alive() {
			return false
		}
		ended = append(ended, c)
		return true
	})
	t.sweep = nil
	if len(t.kept) > 0 {
		t.sweep = time.AfterFunc(idleSweep, t.sweepKept)
	}
	t.mu.Unlock()
	for _, c := range ended {
		c.Close()
	}
}

// closeKept closes the kept connections; those in use are closed after it.
func (t *target) closeKept() {
	t.mu.Lock()
	kept := t.kept
	t.kept = nil
	t.epoch++
	if t.sweep != nil {
		t.sweep.Stop()
		t.sweep = nil
	}
	t.mu.Unlock()
	for _, c := range kept {
		c.Close()
	}
}
