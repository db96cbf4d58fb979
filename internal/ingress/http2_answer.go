package ingress

import (
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// answer2 is an answer over HTTP/2. Head, small body and end go together. It
// implements http.ResponseWriter; answered is read under the connection's lock.
type answer2 struct {
	s        *stream2
	header   http.Header
	status   int
	answered bool // status is final
	sent     bool // the head
	bodyless bool
	length   int64 // that was promised; < 0: none
	written  int64
	held     []byte // the body's beginning, until the head is sent
}

// Header implements http.ResponseWriter.
func (a *answer2) Header() http.Header { return a.header }

// WriteHeader implements http.ResponseWriter.
func (a *answer2) WriteHeader(status int) {
	if a.answered {
		return
	}
	h := a.s.h
	h.mu.Lock()
	defer h.mu.Unlock()
	if status < 200 {
		if a.s.err == nil {
			a.s.interimLocked(status)
		}
		return
	}
	a.answered, a.status = true, status
	a.bodyless = a.s.req.Method == http.MethodHead || status == http.StatusNoContent || status == http.StatusNotModified
	if l := a.header["Content-Length"]; len(l) > 0 {
		if n, err := strconv.ParseUint(l[0], 10, 63); err == nil && status != http.StatusNoContent {
			a.length = int64(n)
		}
		delete(a.header, "Content-Length")
	}
}

// interimLocked sends an interim answer.
func (s *stream2) interimLocked(status int) {
	s.blockLocked(status, func(name string) bool { return status == http.StatusContinue || name == "Content-Length" }, false)
}

// blockLocked sends the head of an answer but for some fields; end: there is no
// more of it.
func (s *stream2) blockLocked(status int, without func(name string) bool, end bool) {
	h := s.h
	h.block.Reset()
	h.field(":status", strconv.Itoa(status))
	for name, values := range s.header {
		if without(name) || !isToken(name) {
			continue
		}
		for _, v := range values {
			h.field(lower(name), v)
		}
	}
	if status >= 200 {
		if s.length >= 0 {
			h.field("content-length", strconv.FormatInt(s.length, 10))
		}
		if len(s.header["Date"]) == 0 {
			h.field("date", httpDate())
		}
	}
	h.sendBlockLocked(s, end)
}

// field adds a field to the block. Of values that differ from answer to answer
// no table is kept, nor of secrets.
func (h *conn2) field(name, value string) {
	value = strings.Trim(value, " \t\r\n")
	for i := range len(value) {
		if !isFieldByte(value[i]) {
			value = strings.Map(func(r rune) rune {
				if r < ' ' && r != '\t' || r == 0x7f {
					return ' '
				}
				return r
			}, value)
			break
		}
	}
	once := false
	switch name {
	case "x-request-id", "content-length", "set-cookie", "etag", "location", "last-modified":
		once = true
	}
	h.fields.WriteField(hpack.HeaderField{Name: name, Value: value, Sensitive: once}) // to memory
}

// sendBlockLocked sends the block.
func (h *conn2) sendBlockLocked(s *stream2, end bool) {
	b, kind := h.block.Bytes(), http2.FrameHeaders
	for first := true; first || len(b) > 0; first = false {
		n := min(len(b), maxFrame)
		var flags http2.Flags
		if n == len(b) {
			flags |= http2.FlagHeadersEndHeaders
		}
		if first && end {
			flags |= http2.FlagHeadersEndStream
		}
		h.frameLocked(kind, flags, s.id, n)
		h.out = append(h.out, b[:n]...)
		b, kind = b[n:], http2.FrameContinuation
	}
	h.more.Signal()
	if end {
		s.sentEndLocked()
	}
}

// lower is a field's name as HTTP/2 has it.
func lower(name string) string {
	if l, ok := lowers[name]; ok {
		return l
	}
	return strings.ToLower(name)
}

var lowers = func() map[string]string {
	m := map[string]string{}
	for _, name := range []string{"Content-Type", "Content-Length", "Date", "Server", "X-Request-Id", "Cache-Control", "Etag", "Last-Modified", "Vary", "Location",
		"Set-Cookie", "Expires", "Content-Encoding", "Accept-Ranges", "Alt-Svc", "Strict-Transport-Security", "X-Content-Type-Options",
		"Content-Security-Policy", "Trailer", "Grpc-Status", "Grpc-Message", "Access-Control-Allow-Origin", "Age", "Via", "Link", "Content-Range"} {
		m[name] = strings.ToLower(name)
	}
	return m
}()

// notInHead reports whether the field is not for the head of an answer over HTTP/2.
func (a *answer2) notInHead(name string) bool {
	switch name {
	case "Connection", "Proxy-Connection", "Keep-Alive", "Transfer-Encoding", "Upgrade", "Content-Length":
		return true
	}
	return strings.HasPrefix(name, http.TrailerPrefix) || a.isTrailer(name)
}

func (a *answer2) isTrailer(name string) bool {
	for _, list := range a.header["Trailer"] {
		if hasToken(list, name) {
			return true
		}
	}
	return false
}

// headLocked sends the head, and what is held.
func (a *answer2) headLocked(end bool) {
	a.sent = true
	a.s.blockLocked(a.status, a.notInHead, end)
}

// Write implements http.ResponseWriter.
func (a *answer2) Write(p []byte) (int, error) {
	if !a.answered {
		a.WriteHeader(http.StatusOK)
	}
	switch {
	case len(p) == 0:
		return 0, nil
	case a.bodyless && a.s.req.Method != http.MethodHead:
		return 0, http.ErrBodyNotAllowed
	case a.bodyless:
		return len(p), nil
	case a.length >= 0 && a.written+int64(len(p)) > a.length:
		return 0, http.ErrContentLength
	}
	a.written += int64(len(p))
	if a.written <= holdBody && !a.sent {
		a.held = append(a.held, p...)
		return len(p), nil
	}
	h := a.s.h
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := a.flushLocked(); err != nil {
		return 0, err
	}
	if err := a.s.sendLocked(p, false); err != nil {
		return 0, err
	}
	return len(p), nil
}

// FlushError sends what is held.
func (a *answer2) FlushError() error {
	if !a.answered {
		a.WriteHeader(http.StatusOK)
	}
	h := a.s.h
	h.mu.Lock()
	defer h.mu.Unlock()
	return a.flushLocked()
}

func (a *answer2) flushLocked() error {
	if a.s.err != nil {
		return a.s.err
	}
	if !a.sent {
		a.headLocked(false)
	}
	held := a.held
	if a.held = nil; len(held) > 0 {
		return a.s.sendLocked(held, false)
	}
	return nil
}

// finish sends the rest of the answer; if it is not whole, the visitor is told.
func (s *stream2) finish(whole bool) {
	if whole && !s.answered {
		s.WriteHeader(http.StatusOK)
	}
	h := s.h
	h.mu.Lock()
	defer h.mu.Unlock()
	if whole && s.err == nil {
		whole = s.finishLocked() == nil
	}
	switch {
	case s.err != nil:
	case !whole:
		h.resetLocked(s.id, http2.ErrCodeInternal)
	case !s.whole:
		h.resetLocked(s.id, http2.ErrCodeNo) // the rest of the request is of no use, RFC 9113 section 8.1
	}
	h.tookLocked(int64(len(s.data) - s.at))
	s.data, s.at = nil, 0
	if s.err == nil {
		s.err = errReset // for those who still read
	}
	s.ending.end()
}

func (s *stream2) finishLocked() error {
	trailers := s.trailers()
	if !s.sent {
		if s.length < 0 && !s.bodyless && trailers == nil {
			s.length = int64(len(s.held))
		}
		end := trailers == nil && (s.bodyless || len(s.held) == 0)
		if !s.bodyless && s.written < s.length {
			end = false // a body that is cut
		}
		s.headLocked(end)
	}
	held := s.held
	if s.held = nil; !s.bodyless && s.written < s.length {
		s.sendLocked(held, false) // all there is; it is cut anyway
		return http.ErrContentLength
	}
	if s.sentEnd {
		return nil
	}
	if len(held) > 0 || trailers == nil {
		if err := s.sendLocked(held, trailers == nil); err != nil {
			return err
		}
	}
	if trailers == nil {
		return nil
	}
	h := s.h
	h.block.Reset()
	for name, values := range trailers {
		for _, v := range values {
			h.field(lower(name), v)
		}
	}
	h.sendBlockLocked(s, true)
	return nil
}

// trailers returns the fields that come after the body; nil: none.
func (a *answer2) trailers() (t http.Header) {
	if a.bodyless {
		return nil
	}
	for name, values := range a.header {
		plain, prefixed := strings.CutPrefix(name, http.TrailerPrefix)
		if len(values) > 0 && (prefixed || a.isTrailer(name)) && isToken(plain) && !isFramingField(plain) && !isHopByHop(plain) {
			if t == nil {
				t = http.Header{}
			}
			t[plain] = values
		}
	}
	return t
}

// sendLocked sends a part of the body, as the windows allow; end: it is the last.
func (s *stream2) sendLocked(p []byte, end bool) error {
	h := s.h
	var stall *time.Timer
	defer func() {
		if stall != nil {
			stall.Stop()
		}
	}()
	for first := true; first || len(p) > 0; {
		if s.err != nil {
			return s.err
		}
		if s.until[toWrite].passed {
			return os.ErrDeadlineExceeded
		}
		n := int(min(int64(len(p)), h.window, s.window, maxFrame))
		if n <= 0 && len(p) > 0 || len(h.out) >= maxPending {
			if stall == nil {
				stall = time.AfterFunc(h.limits.Stall, func() {
					h.mu.Lock()
					defer h.mu.Unlock()
					if s.err == nil {
						s.err = errStall
						h.resetLocked(s.id, http2.ErrCodeCancel)
					}
				})
			}
			h.waiting = append(h.waiting, s)
			s.cond.Wait()
			continue
		}
		if stall != nil {
			stall.Reset(h.limits.Stall)
		}
		first = false
		var flags http2.Flags
		if end && n == len(p) {
			flags = http2.FlagDataEndStream
		}
		h.frameLocked(http2.FrameData, flags, s.id, n)
		h.out = append(h.out, p[:n]...)
		h.window -= int64(n)
		s.window -= int64(n)
		p = p[n:]
		h.more.Signal()
	}
	if end {
		s.sentEndLocked()
	}
	return nil
}

// sentEndLocked notes that the answer is complete.
func (s *stream2) sentEndLocked() {
	s.sentEnd = true
	if s.whole {
		s.goneLocked()
	}
}
