package ingress

import (
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// answer1 is an answer over HTTP/1. The head and a small body go in one write.
// It implements http.ResponseWriter.
type answer1 struct {
	c        *http1
	header   http.Header
	status   int
	answered bool // status is final
	hijacked bool
	closing  bool // nothing follows on the connection

	out  *[]byte // to be sent; begins with the head as long as that is not committed
	held *[]byte // the body's beginning, until the head is committed
	sent bool    // the head is committed: how long the body is has been said
	bodyless,
	chunked bool
	length  int64 // that was promised; < 0: none
	written int64
	writeBy time.Time
	err     error // of a write

	mu sync.Mutex // between the answer and 100 (Continue)
}

const (
	holdBody  = 8 << 10  // bytes of a body that wait for its end
	holdParts = 16 << 10 // bytes of parts that wait for more
	ownPart   = 32 << 10 // bytes from which on a part is not copied
)

// reset begins an answer.
func (a *answer1) reset() {
	clear(a.header)
	a.status, a.answered, a.sent, a.bodyless, a.chunked, a.length, a.written = 0, false, false, false, false, -1, 0
	a.closing = a.closing || a.c.head.close
	a.out, a.held = heads.Get().(*[]byte), nil
	*a.out = (*a.out)[:0]
}

// stopAnswer gives back what was borrowed.
func (a *answer1) stopAnswer() {
	for _, b := range []**[]byte{&a.out, &a.held} {
		if *b != nil && cap(**b) <= 4*ownPart {
			heads.Put(*b)
		}
		*b = nil
	}
}

// Header implements http.ResponseWriter.
func (a *answer1) Header() http.Header { return a.header }

// goOn asks the visitor for the body, unless an answer has come before.
func (a *answer1) goOn() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.answered {
		return nil
	}
	if err := a.allow(); err != nil {
		return err
	}
	_, err := a.c.c.Write([]byte("HTTP/1.1 100 Continue\r\n\r\n"))
	return err
}

// WriteHeader implements http.ResponseWriter.
func (a *answer1) WriteHeader(status int) {
	if a.answered || a.hijacked {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if status < 200 {
		if status != http.StatusContinue && a.c.req.ProtoMinor > 0 {
			a.begin(status)
			*a.out = append(*a.out, crlf...)
			a.send() // the final answer's write says the same
		}
		return
	}
	a.answered = true
	a.status = status
	a.bodyless = a.c.req.Method == http.MethodHead || status == http.StatusNoContent || status == http.StatusNotModified
	a.begin(status)
}

// begin appends the head of an answer, but for what tells the body's length and
// what follows it.
func (a *answer1) begin(status int) {
	b := append(*a.out, "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(b, ' ')
	b = append(b, http.StatusText(status)...)
	b = append(b, crlf...)
	for name, values := range a.header {
		switch name {
		case "Content-Length":
			if len(values) > 0 && status >= 200 && status != http.StatusNoContent {
				if n, err := strconv.ParseUint(values[0], 10, 63); err == nil {
					a.length = int64(n)
				}
			}
			continue
		case "Connection":
			a.closing = a.closing || isClose(values)
			continue
		case "Transfer-Encoding", "Upgrade", "Keep-Alive":
			continue
		}
		if strings.HasPrefix(name, http.TrailerPrefix) || !isToken(name) || a.isTrailer(name) {
			continue
		}
		for _, v := range values {
			b = appendSafeField(b, name, v)
		}
	}
	if status >= 200 && len(a.header["Date"]) == 0 {
		b = append(b, "Date: "...)
		b = append(b, httpDate()...)
		b = append(b, crlf...)
	}
	*a.out = b
}

// isTrailer reports whether the field was announced to come after the body.
func (a *answer1) isTrailer(name string) bool {
	for _, list := range a.header["Trailer"] {
		if hasToken(list, name) {
			return true
		}
	}
	return false
}

// appendSafeField appends a field such that it ends where it ends.
func appendSafeField(b []byte, name, value string) []byte {
	b = append(b, name...)
	b = append(b, ": "...)
	at := len(b)
	b = append(b, strings.Trim(value, " \t\r\n")...)
	for i := at; i < len(b); i++ {
		if !isFieldByte(b[i]) {
			b[i] = ' '
		}
	}
	return append(b, crlf...)
}

// commit ends the head; whole if nothing is to come but what is held.
func (a *answer1) commit(whole bool) {
	a.sent = true
	b := *a.out
	held := 0
	if a.held != nil {
		held = len(*a.held)
	}
	old := a.c.req.ProtoMinor == 0
	switch {
	case a.bodyless && a.length < 0:
	case a.length < 0 && whole:
		a.length = int64(held)
		fallthrough
	case a.length >= 0:
		b = append(b, "Content-Length: "...)
		b = strconv.AppendInt(b, a.length, 10)
		b = append(b, crlf...)
	case old:
		a.closing = true
	default:
		a.chunked = true
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	}
	a.closing = a.closing || a.c.ends()
	if a.closing {
		b = append(b, "Connection: close\r\n"...)
	} else if old {
		b = append(b, "Connection: keep-alive\r\n"...)
	}
	*a.out = append(b, crlf...)
	if held > 0 {
		a.part(*a.held)
	}
}

// part appends a part of the body to what is to be sent.
func (a *answer1) part(p []byte) {
	b := *a.out
	if a.chunked {
		b = strconv.AppendInt(b, int64(len(p)), 16)
		b = append(b, crlf...)
	}
	b = append(b, p...)
	if a.chunked {
		b = append(b, crlf...)
	}
	*a.out = b
}

// Write implements http.ResponseWriter.
func (a *answer1) Write(p []byte) (int, error) {
	if a.hijacked {
		return 0, http.ErrHijacked
	}
	if !a.answered {
		a.WriteHeader(http.StatusOK)
	}
	switch {
	case a.err != nil:
		return 0, a.err
	case len(p) == 0:
		return 0, nil
	case a.bodyless && a.c.req.Method != http.MethodHead:
		return 0, http.ErrBodyNotAllowed
	case a.bodyless:
		return len(p), nil
	case a.length >= 0 && a.written+int64(len(p)) > a.length:
		return 0, http.ErrContentLength
	}
	a.written += int64(len(p))
	if !a.sent {
		if a.written <= holdBody {
			if a.held == nil {
				a.held = heads.Get().(*[]byte)
				*a.held = (*a.held)[:0]
			}
			*a.held = append(*a.held, p...)
			return len(p), nil
		}
		a.commit(false)
	}
	if len(p) < ownPart {
		a.part(p)
		if len(*a.out) < holdParts {
			return len(p), nil
		}
		return len(p), a.send()
	}
	if a.chunked {
		*a.out = append(strconv.AppendInt(*a.out, int64(len(p)), 16), crlf...)
	}
	if err := a.send(); err != nil {
		return 0, err
	}
	if err := a.put(p); err != nil {
		return 0, err
	}
	if a.chunked {
		*a.out = append(*a.out, crlf...)
	}
	return len(p), nil
}

// FlushError sends what is held.
func (a *answer1) FlushError() error {
	if a.hijacked {
		return http.ErrHijacked
	}
	if !a.answered {
		a.WriteHeader(http.StatusOK)
	}
	if !a.sent {
		a.commit(false)
	}
	return a.send()
}

// finish sends the rest of the answer.
func (a *answer1) finish() error {
	defer a.stopAnswer()
	if !a.answered {
		a.WriteHeader(http.StatusOK)
	}
	if !a.sent {
		// Trailer fields need a body in chunks.
		a.commit(!a.trailed())
	}
	if a.chunked {
		b := append(*a.out, "0\r\n"...)
		for name, values := range a.header {
			if plain, ok := strings.CutPrefix(name, http.TrailerPrefix); ok {
				name = plain
			} else if !a.isTrailer(name) {
				continue
			}
			for _, v := range values {
				if isToken(name) && !isFramingField(name) {
					b = appendSafeField(b, name, v)
				}
			}
		}
		*a.out = append(b, crlf...)
	}
	if !a.bodyless && a.length >= 0 && a.written < a.length {
		a.send()
		return http.ErrContentLength
	}
	return a.send()
}

// trailed reports whether fields come after the body.
func (a *answer1) trailed() bool {
	if len(a.header["Trailer"]) > 0 {
		return true
	}
	for name := range a.header {
		if strings.HasPrefix(name, http.TrailerPrefix) {
			return true
		}
	}
	return false
}

// send writes what is to be sent.
func (a *answer1) send() error {
	if len(*a.out) == 0 {
		return a.err
	}
	err := a.put(*a.out)
	*a.out = (*a.out)[:0]
	return err
}

// put writes p; a visitor that takes in nothing for too long is cut off.
func (a *answer1) put(p []byte) error {
	if a.err == nil {
		a.err = a.allow()
	}
	if a.err == nil {
		_, a.err = a.c.c.Write(p)
	}
	return a.err
}

func (a *answer1) allow() error {
	t, stale := renew(a.writeBy, a.c.limits.Stall)
	if !stale {
		return nil
	}
	a.writeBy = t
	return a.c.c.SetWriteDeadline(t)
}

// SetWriteDeadline is for http.ResponseController.
func (a *answer1) SetWriteDeadline(t time.Time) error {
	a.writeBy = t
	return a.c.c.SetWriteDeadline(t)
}

// dated is the time as Date tells it.
type dated struct {
	second int64
	text   string
}

var lastDate atomic.Pointer[dated]

// httpDate returns the time as fields hold it (RFC 9110 section 5.6.7).
func httpDate() string {
	now := time.Now()
	d := lastDate.Load()
	if d == nil || d.second != now.Unix() {
		d = &dated{now.Unix(), now.UTC().Format(http.TimeFormat)}
		lastDate.Store(d)
	}
	return d.text
}
