package ingress

import (
	"io"
	"net/http"
	"net/textproto"
	"net/url"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// stream2 is one request over HTTP/2 and its answer.
type stream2 struct {
	h  *conn2
	id uint32
	ending
	req     http.Request
	url     url.URL
	refusal *page // nil: none
	answer2

	// Under the connection's lock.
	cond    sync.Cond
	err     error // the stream is over, and why
	sentEnd bool
	window  int64 // that may be sent

	data    []byte // of the body, from at on not read yet
	at      int
	whole   bool        // no more of the body comes
	came    int64       // bytes of it
	ahead   int64       // that may come
	taken   int64       // of what has come, and not yet been made room for
	trailer http.Header // that has come
	asks    bool        // the visitor waits for 100 (Continue)

	until [2]streamLimit // of reads and writes
}

// streamLimit is a deadline.
type streamLimit struct {
	timer  *time.Timer
	passed bool
}

// headers begins a stream, or ends one with trailer fields.
func (h *conn2) headers(f *http2.MetaHeadersFrame) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	id := f.StreamID
	bad := func(code http2.ErrCode) error { return http2.StreamError{StreamID: id, Code: code} }
	if id%2 == 0 {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	if s := h.streams[id]; s != nil {
		switch {
		case s.err != nil:
			return nil
		case s.whole:
			return bad(http2.ErrCodeStreamClosed)
		case !f.StreamEnded() || len(f.PseudoFields()) > 0 || s.req.ContentLength >= 0 && s.came != s.req.ContentLength:
			return bad(http2.ErrCodeProtocol)
		}
		for _, field := range f.RegularFields() {
			name := textproto.CanonicalMIMEHeaderKey(field.Name)
			if isFramingField(name) || isHopByHop(name) {
				return bad(http2.ErrCodeProtocol)
			}
			if s.trailer == nil {
				s.trailer = http.Header{}
			}
			s.trailer[name] = append(s.trailer[name], field.Value)
		}
		s.wholeLocked()
		return nil
	}
	if id <= h.last {
		for _, r := range h.reset {
			if r == id {
				return nil // it did not know yet
			}
		}
		return http2.ConnectionError(http2.ErrCodeStreamClosed)
	}
	if h.away {
		return nil // it is asked again elsewhere
	}
	h.last = id
	switch {
	case f.HasPriority() && f.Priority.StreamDep == id:
		return bad(http2.ErrCodeProtocol)
	case len(h.streams) >= maxStreams && h.unacked:
		return bad(http2.ErrCodeProtocol)
	case len(h.streams) >= maxStreams:
		return bad(http2.ErrCodeRefusedStream)
	}
	s := &stream2{h: h, id: id, window: h.streamWin, ahead: streamAhead, whole: f.StreamEnded()}
	s.cond.L = &h.mu
	s.answer2 = answer2{s: s, header: http.Header{}, length: -1}
	if !s.ask(f) {
		return bad(http2.ErrCodeProtocol)
	}
	// Streams that were reset are served until their handlers notice: who
	// resets streams faster than that waits for it.
	for h.running >= maxStreams && !h.ended {
		h.room.Wait()
	}
	h.streams[id] = s
	h.startLocked(s)
	if h.draining {
		h.goAwayLocked(http2.ErrCodeNo)
	}
	return nil
}

// ask makes a request of a block of fields; false if it is malformed (RFC 9113
// section 8.1.1). What it asks for is judged by checkHTTP2.
func (s *stream2) ask(f *http2.MetaHeadersFrame) bool {
	r := &s.req
	r.URL, r.Body = &s.url, http.NoBody
	r.Proto, r.ProtoMajor = "HTTP/2.0", 2
	var scheme string
	for _, p := range f.PseudoFields() {
		switch p.Name {
		case ":method":
			r.Method = p.Value
		case ":scheme":
			scheme = p.Value
		case ":authority":
			r.Host = p.Value
		case ":path":
			r.RequestURI = p.Value
		default: // :protocol, which was not offered
			return false
		}
	}
	regular := f.RegularFields()
	r.Header = make(http.Header, len(regular))
	values := make([]string, 0, len(regular))
	for _, field := range regular {
		name := textproto.CanonicalMIMEHeaderKey(field.Name)
		switch name {
		case "Connection", "Proxy-Connection", "Keep-Alive", "Transfer-Encoding", "Upgrade":
			s.h.web.s.metrics.refused("http_" + badRequest.code)
			return false // RFC 9113 section 8.2.2
		case "Te":
			if field.Value != "trailers" {
				s.h.web.s.metrics.refused("http_" + badRequest.code)
				return false
			}
		case "Cookie":
			if c := r.Header[name]; len(c) > 0 {
				c[0] += "; " + field.Value // RFC 9113 section 8.2.3
				continue
			}
		case "Expect":
			if hasToken(field.Value, "100-continue") {
				s.asks = true
				continue
			}
		case "Trailer":
			for name := range strings.SplitSeq(field.Value, ",") {
				name = textproto.CanonicalMIMEHeaderKey(strings.Trim(name, " \t"))
				if !isToken(name) || isFramingField(name) || isHopByHop(name) {
					continue
				}
				if r.Trailer == nil {
					r.Trailer = http.Header{}
				}
				r.Trailer[name] = nil
			}
			continue
		}
		if others, more := r.Header[name]; more {
			r.Header[name] = append(others, field.Value)
			continue
		}
		values = append(values, field.Value)
		r.Header[name] = values[len(values)-1 : len(values) : len(values)]
	}
	if r.Host == "" {
		r.Host = r.Header.Get("Host")
	}
	if !s.whole {
		r.Body = &body2{s}
		r.ContentLength = -1
		if l := r.Header["Content-Length"]; len(l) > 0 {
			n, err := strconv.ParseUint(l[0], 10, 63)
			if err != nil {
				return false
			}
			r.ContentLength = int64(n)
		}
	}
	switch {
	case f.Truncated:
		s.refusal = &headTooLarge
	case r.Method == http.MethodConnect:
		if scheme != "" || r.RequestURI != "" || r.Host == "" {
			return false
		}
		s.url.Host, r.RequestURI = r.Host, r.Host
	case r.Method == "" || scheme != "http" && scheme != "https" || r.RequestURI == "":
		return false
	default:
		s.refusal = parseTarget(r)
	}
	return true
}

// serve has the request answered.
func (s *stream2) serve() {
	x := &exchange{ResponseWriter: s, web: s.h.web, conn: s.h.info, in: &s.req, ctx: &s.ending, refusal: s.refusal}
	s.finish(s.handle(x))
}

func (s *stream2) handle(x *exchange) (whole bool) {
	defer func() {
		if p := recover(); p != nil && p != http.ErrAbortHandler {
			s.h.web.s.log.Error("request panicked", "err", p, "stack", string(debug.Stack()))
		}
	}()
	s.h.web.serve(x)
	return true
}

// overLocked ends the stream, which no frame leaves any more.
func (s *stream2) overLocked(err error) {
	if s.err == nil {
		s.err = err
		s.h.tookLocked(int64(len(s.data) - s.at))
		s.data, s.at = nil, 0
	}
	s.goneLocked()
	s.ending.end()
}

// goneLocked takes the stream off the connection's books.
func (s *stream2) goneLocked() {
	h := s.h
	s.cond.Broadcast()
	if h.streams[s.id] != s {
		return
	}
	delete(h.streams, s.id)
	for i := range s.until {
		if t := s.until[i].timer; t != nil {
			t.Stop()
		}
	}
	if len(h.streams) > 0 {
		return
	}
	if h.idle = time.Now(); h.away {
		h.finishLocked()
	}
}

// takeLocked keeps a part of the body.
func (s *stream2) takeLocked(p []byte) {
	if s.at > 0 && len(s.data)+len(p) > cap(s.data) {
		s.data = s.data[:copy(s.data, s.data[s.at:])]
		s.at = 0
	}
	s.data = append(s.data, p...)
	s.cond.Broadcast()
}

// wholeLocked notes that the request is complete.
func (s *stream2) wholeLocked() {
	s.whole = true
	s.cond.Broadcast()
	if s.sentEnd {
		s.goneLocked()
	}
}

// body2 is the body of a request over HTTP/2.
type body2 struct{ s *stream2 }

// Close implements io.Closer.
func (b *body2) Close() error { return nil }

// Read implements io.Reader.
func (b *body2) Read(p []byte) (int, error) {
	s := b.s
	h := s.h
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.asks {
		s.asks = false
		if !s.answered && s.err == nil {
			s.interimLocked(http.StatusContinue)
		}
	}
	for s.at == len(s.data) {
		switch {
		case s.err != nil:
			return 0, s.err
		case s.whole:
			for name := range s.req.Trailer { // what was not announced goes nowhere
				s.req.Trailer[name] = s.trailer[name]
			}
			return 0, io.EOF
		case s.until[toRead].passed:
			return 0, os.ErrDeadlineExceeded
		}
		s.cond.Wait()
	}
	n := copy(p, s.data[s.at:])
	if s.at += n; s.at == len(s.data) {
		s.at = 0
		if s.data = s.data[:0]; cap(s.data) > 4*maxFrame {
			s.data = nil
		}
	}
	h.tookLocked(int64(n))
	if s.taken += int64(n); !s.whole && s.taken >= streamAhead/4 {
		s.ahead += s.taken
		h.windowLocked(s.id, s.taken)
		s.taken = 0
		h.more.Signal()
	}
	return n, nil
}

// limit sets a deadline.
func (s *stream2) limit(way int, t time.Time) error {
	h := s.h
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	l := &s.until[way]
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
	wait := time.Until(t)
	if l.passed = !t.IsZero() && wait <= 0; l.passed {
		s.cond.Broadcast()
	} else if !t.IsZero() {
		var timer *time.Timer
		timer = time.AfterFunc(wait, func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			if l.timer == timer {
				l.passed = true
				s.cond.Broadcast()
			}
		})
		l.timer = timer
	}
	return nil
}

// SetReadDeadline is for http.ResponseController.
func (s *stream2) SetReadDeadline(t time.Time) error { return s.limit(toRead, t) }

// SetWriteDeadline is for http.ResponseController.
func (s *stream2) SetWriteDeadline(t time.Time) error { return s.limit(toWrite, t) }
