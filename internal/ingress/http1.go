package ingress

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw/internal/netx"
)

// http1 is a visitor's connection (decrypted) that speaks HTTP/1. One goroutine
// reads a head, has it answered, and reads the next; it needs another one only
// to notice that a visitor leaves who waits for long.
type http1 struct {
	web    *web
	c      net.Conn
	info   connInfo
	limits *Limits
	ending // of the visitor

	// Reading; a body is read by whoever passes it on, and nothing else then.
	buf    []byte // buf[at:to] has come and is not used yet
	at, to int
	line   int // of a head not yet complete: where its last line begins
	fresh  bool
	began  time.Time // of the connection
	seen   int       // heads; for tests

	// The current request.
	head     head
	req      http.Request
	url      url.URL
	body     *body1 // nil: none
	bodyRead atomic.Bool
	refusal  atomic.Pointer[page] // due for a body that turned out bad, or early bytes
	watch    *time.Timer
	answer1

	mu       sync.Mutex
	deadline time.Time     // of reads
	woken    bool          // reads end
	idle     bool          // waiting for the first byte of a head
	draining bool          // no further request is taken
	asking   bool          // the handler is at work
	watching chan struct{} // closed when nobody watches any more; nil: nobody does
}

const (
	firstRead = 4 << 10

	// A visitor who waits that long is watched from then on, as they may leave.
	watchAfter = 250 * time.Millisecond

	// How long a connection on which nothing was asked may still ask when the
	// gateway stops.
	firstRequest = 5 * time.Second
)

var (
	errEarly   = errors.New("ingress: bytes after a request for an upgrade that was not answered yet")
	errDrained = errors.New("ingress: the gateway is stopping")
)

func newHTTP1(w *web, c net.Conn) *http1 {
	h := &http1{web: w, c: c, limits: &w.s.limits, buf: make([]byte, firstRead), fresh: true, began: time.Now()}
	h.req.URL, h.req.Header = &h.url, http.Header{}
	h.answer1 = answer1{c: h, header: http.Header{}}
	return h
}

// serve1 serves a connection to its end.
func (w *web) serve1(c net.Conn) {
	h := newHTTP1(w, c)
	h.info = connOf(c)
	h.info.http1 = h
	defer c.Close()
	if !w.add(h) {
		return
	}
	defer w.remove(h)
	for h.serve() {
	}
	h.end()
}

// serve serves one request; false if none follows.
func (h *http1) serve() (more bool) {
	refusal, err := h.next()
	if err != nil {
		return false
	}
	x := &exchange{ResponseWriter: h, web: h.web, conn: h.info, in: &h.req, ctx: &h.ending, refusal: refusal}
	h.ask()
	whole := h.handle(x)
	h.asked()
	if h.hijacked || !whole || h.finish() != nil {
		return false
	}
	unread := h.body != nil && !h.body.end()
	if unread || h.refusal.Load() != nil || refusal != nil || h.closing && (!h.head.close || h.at < h.to) { // the visitor may not know that nothing follows
		h.linger()
		return false
	}
	return !h.closing
}

// next reads the head of a request. One that must be refused is replaced by a
// request that is as good as empty.
func (h *http1) next() (refusal *page, err error) {
	h.body, h.line = nil, 0
	h.refusal.Store(nil)
	began := time.Now()
	for {
		end := 0
		if h.at < h.to {
			end, h.line, refusal = headEnds(h.buf[h.at:h.to], h.line)
		}
		if refusal == nil && end > 0 {
			refusal = h.take(string(h.buf[h.at : h.at+end]))
			h.at += end
		}
		if refusal == nil && end > 0 {
			return nil, nil
		}
		if refusal == nil && h.at == h.to {
			if err := h.rest(); err != nil {
				return nil, err
			}
			began = time.Now()
			continue
		}
		if refusal == nil {
			err := h.until(began.Add(h.limits.Hello))
			if err == nil {
				err = h.read()
			}
			if err == nil {
				continue
			}
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				return nil, err
			}
			refusal = &requestTimeout
		}
		h.web.s.metrics.refused("http_" + refusal.code)
		h.take("GET / HTTP/1.1\r\nHost: refused\r\nConnection: close\r\n\r\n")
		return refusal, nil
	}
}

// rest waits for the first bytes of a request.
func (h *http1) rest() error {
	if h.line, h.at, h.to = 0, 0, 0; len(h.buf) > firstRead {
		h.buf = make([]byte, firstRead)
	}
	wait := h.limits.Idle
	if h.fresh {
		wait = time.Until(h.began.Add(h.limits.Hello))
	}
	h.mu.Lock()
	if h.draining && h.fresh {
		wait = min(wait, firstRequest)
	}
	if h.draining && !h.fresh {
		h.mu.Unlock()
		return errDrained
	}
	h.idle = true
	err := h.allowLocked(wait)
	h.mu.Unlock()
	if err == nil {
		err = h.read()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.idle = false
	if err == nil && h.woken { // it came at the last moment
		h.woken, h.deadline = false, time.Unix(1, 0)
	}
	return err
}

// take makes a request of a head.
func (h *http1) take(text string) (refusal *page) {
	clear(h.req.Header)
	h.req.ContentLength, h.req.Trailer, h.req.Body = 0, nil, http.NoBody
	h.head = head{req: &h.req, values: h.head.values[:0]}
	if refusal = h.head.parse(text); refusal != nil {
		return refusal
	}
	h.seen++
	h.fresh = false
	h.req.Close = h.head.close
	h.bodyRead.Store(true)
	if n := h.req.ContentLength; n != 0 {
		h.body = &body1{c: h, left: n}
		h.body.asks.Store(h.head.expects)
		if n < 0 {
			if h.req.Trailer == nil {
				h.req.Trailer = http.Header{}
			}
			h.body.state, h.body.left, h.body.to = inChunkSize, 0, h.req.Trailer
		}
		h.req.Body = h.body
		h.bodyRead.Store(false)
	}
	return nil
}

// read reads more behind what is there.
func (h *http1) read() error {
	if h.at == h.to {
		h.at, h.to = 0, 0
	}
	if h.to == len(h.buf) {
		if h.at > 0 {
			h.to = copy(h.buf, h.buf[h.at:h.to])
			h.at = 0
		} else {
			h.buf = append(h.buf, make([]byte, len(h.buf))...)
		}
	}
	n, err := h.c.Read(h.buf[h.to:])
	if h.to += n; n > 0 {
		return nil // an error comes again
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// more reads what comes within the time.
func (h *http1) more(wait time.Duration) error {
	if err := h.allow(wait); err != nil {
		return err
	}
	return h.read()
}

// fill is more, into p.
func (h *http1) fill(p []byte, wait time.Duration) (int, error) {
	if err := h.allow(wait); err != nil {
		return 0, err
	}
	n, err := h.c.Read(p)
	if n > 0 {
		return n, nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return 0, err
}

// allow limits the time of the next read, roughly: deadlines cost, and are
// moved seldom.
func (h *http1) allow(wait time.Duration) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.allowLocked(wait)
}

func (h *http1) allowLocked(wait time.Duration) error {
	if h.woken {
		return os.ErrDeadlineExceeded
	}
	if t, stale := renew(h.deadline, wait); stale {
		h.deadline = t
		return h.c.SetReadDeadline(t)
	}
	return nil
}

// renew returns a deadline that is between wait and a little more away, and
// whether it differs from the one that was.
func renew(was time.Time, wait time.Duration) (deadline time.Time, stale bool) {
	slack := min(time.Second, wait/8)
	now := time.Now()
	if left := was.Sub(now); left >= wait && left <= wait+slack {
		return was, false
	}
	return now.Add(wait + slack), true
}

// until limits the time of the next read.
func (h *http1) until(t time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.woken && h.draining {
		h.woken = false // what has begun is served
	}
	h.deadline = t
	return h.c.SetReadDeadline(t)
}

// SetReadDeadline is for http.ResponseController, by which reading the body is
// interrupted; nothing follows it then.
func (h *http1) SetReadDeadline(t time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.woken = true
	h.closing = true
	return h.c.SetReadDeadline(t)
}

// badBody notes what the visitor is to be told.
func (h *http1) badBody(err error) {
	h.mu.Lock()
	woken := h.woken
	h.mu.Unlock()
	if p := refusalOf(err); p != nil && !woken {
		h.web.s.metrics.refused("http_" + p.code)
		h.refusal.Store(p)
	}
}

// Refusal returns the page due for a body that turned out bad, or nil.
func (h *http1) Refusal() *page { return h.refusal.Load() }

// handle has the request answered; false if the connection is of no use any more.
func (h *http1) handle(x *exchange) (whole bool) {
	defer func() {
		if p := recover(); p != nil && p != http.ErrAbortHandler {
			h.web.s.log.Error("request panicked", "err", p, "stack", string(debug.Stack()))
		}
	}()
	h.web.serve(x)
	return true
}

// ask begins to wait for the answer.
func (h *http1) ask() {
	h.answer1.reset()
	if h.head.upgrade && h.body == nil && h.at < h.to {
		h.early()
	}
	h.mu.Lock()
	h.asking = true
	h.mu.Unlock()
	if h.watch == nil {
		h.watch = time.AfterFunc(watchAfter, h.look)
	} else {
		h.watch.Reset(watchAfter)
	}
}

// early notes that bytes have come of which nobody can say what they are.
func (h *http1) early() {
	h.web.s.metrics.refused("http_" + badRequest.code)
	h.refusal.Store(&badRequest)
}

// look waits for what the visitor does while it waits for the answer.
func (h *http1) look() {
	h.mu.Lock()
	if !h.asking || h.woken || h.watching != nil {
		h.mu.Unlock()
		return
	}
	if !h.bodyRead.Load() {
		h.watch.Reset(watchAfter)
		h.mu.Unlock()
		return
	}
	if h.at < h.to {
		h.mu.Unlock()
		return // the next request; that must do as a sign of life
	}
	done := make(chan struct{})
	h.watching = done
	h.deadline = time.Time{}
	err := h.c.SetReadDeadline(time.Time{})
	h.mu.Unlock()
	if err == nil {
		err = h.read()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	defer close(done)
	if err == nil && h.head.upgrade {
		h.early()
		err = errEarly
	}
	if err != nil && !h.woken {
		h.end()
	}
}

// asked ends the wait, and the watch.
func (h *http1) asked() {
	h.watch.Stop()
	h.mu.Lock()
	h.asking = false
	done, woken := h.watching, h.woken
	if done != nil {
		h.woken, h.watching = true, nil
		h.c.SetReadDeadline(time.Unix(1, 0)) // an error means that it is closed, which wakes as well
	}
	h.mu.Unlock()
	if done == nil {
		return
	}
	<-done
	h.mu.Lock()
	h.woken, h.deadline = woken, time.Unix(1, 0)
	h.mu.Unlock()
}

// drain has the connection end after the request under way.
func (h *http1) drain() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.draining {
		return
	}
	h.draining = true
	switch {
	case h.idle && h.fresh:
		h.c.SetReadDeadline(time.Now().Add(firstRequest)) // an error means that it is closed
	case h.idle:
		h.woken = true
		h.c.SetReadDeadline(time.Unix(1, 0))
	}
}

// linger ends the direction to the visitor, and reads on for a moment: closing
// with bytes unread would send a reset, which may overtake the answer.
func (h *http1) linger() {
	enough := time.Now().Add(partingTime)
	if err := errors.Join(h.until(enough), netx.CloseWrite(h.c)); err != nil {
		return
	}
	for n := 0; n < partingBytes; {
		m, err := h.c.Read(h.buf)
		if err != nil {
			return
		}
		n += m
	}
	select { // who has so much to say looks at the answer when nobody listens
	case <-time.After(time.Until(enough)):
	case <-h.Done():
	}
}

// Hijack implements http.Hijacker.
func (h *http1) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if !h.head.upgrade || h.answered {
		return nil, nil, errors.New("ingress: the visitor asked for no upgrade")
	}
	h.asked()
	if h.refusal.Load() != nil || !h.bodyRead.Load() || h.at < h.to {
		return nil, nil, errEarly
	}
	if err := h.c.SetDeadline(time.Time{}); err != nil {
		return nil, nil, err
	}
	h.hijacked = true
	h.stopAnswer()
	return h.c, bufio.NewReadWriter(bufio.NewReader(h.c), bufio.NewWriter(h.c)), nil
}

// ends reports whether the connection must end after the answer that begins.
func (h *http1) ends() bool {
	h.mu.Lock()
	draining := h.draining
	h.mu.Unlock()
	if draining || h.body != nil && h.body.asks.Load() {
		return true
	}
	if !h.head.upgrade {
		return false
	}
	// What came before the answer to a request for an upgrade can't be taken for
	// a request afterwards.
	h.asked()
	early := h.info.c != nil && (len(h.info.c.head) > 0 || !netx.Alive(h.info.c.Conn))
	return early || !h.bodyRead.Load() || h.at < h.to
}

// isClose reports whether a Connection field says that no message follows.
func isClose(values []string) bool {
	for _, v := range values {
		if strings.EqualFold(v, "close") || hasToken(v, "close") {
			return true
		}
	}
	return false
}
