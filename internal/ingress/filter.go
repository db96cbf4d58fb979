package ingress

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw/internal/netx"
)

// Limits of a request over HTTP/1. Those of the head hold for HTTP/2 as well.
const (
	maxHead      = 64 << 10 // bytes of request line and fields
	maxFields    = 100
	maxTrailer   = 8 << 10 // bytes of all trailer fields
	maxChunkLine = 256     // bytes of a chunk's size and extensions
	maxDigits    = 15      // of a length, so that it can't overflow
)

// refusedField marks the request by which the filter has a visitor answered.
// The filter lets no visitor send it.
const refusedField = "Webgw-Refused"

// filter is a visitor's connection (decrypted) that speaks HTTP/1, read by
// net/http's server. What comes out is unambiguous: every reader of RFC 9112
// sees the same requests in it. It is stricter than the RFC where readers are
// known to differ, and much stricter than net/http.
//
// A bad head is replaced by a request that the handler answers with the page
// named in refusedField, so that earlier requests on the connection are still
// answered in order; nothing follows it. A body that turns out bad ends in an
// error, and Refusal tells which page is due.
type filter struct {
	net.Conn
	v      *visit
	limits *Limits

	in    []byte // read, not judged yet
	out   []byte // judged good, not handed out yet
	state filterState
	line  int   // of a head not yet complete: where its last line begins
	left  int64 // of a body or chunk
	chunk int   // bytes of the line or trailer so far
	field []byte
	err   error // sticky
	began time.Time
	next  verdict // what follows the current message
	seen  int     // heads that were passed on; for tests

	verdict atomic.Int32 // of an upgrade that was asked for
	refusal atomic.Pointer[page]

	mu    sync.Mutex
	asked time.Time // read deadline set from above
	own   time.Time // read deadline set by ourselves
}

type filterState int

const (
	inHead filterState = iota
	inBody
	inChunkSize
	inChunkExt
	inChunkSizeLF
	inChunkData
	inChunkCR
	inChunkLF
	inTrailer
	inTrailerLF
	inWait // behind a request that asks for an upgrade
	inRaw
	inEnd
)

type verdict int32

const (
	resumed  verdict = iota // the next message follows
	pending                 // an upgrade was asked for and not answered yet
	upgraded                // another protocol follows
)

var (
	errFraming = errors.New("ingress: malformed message body")
	errEarly   = errors.New("ingress: bytes after a request for an upgrade that was not answered yet")
	errRefused = errors.New("ingress: connection ends after a refused request")
)

func newFilter(c net.Conn, v *visit) *filter {
	return &filter{Conn: c, v: v, limits: &v.server.limits}
}

// Refusal returns the page due for a body that turned out bad, or nil.
func (f *filter) Refusal() *page { return f.refusal.Load() }

// Asked reports whether the current request asks for an upgrade that has not
// been answered.
func (f *filter) Asked() bool { return verdict(f.verdict.Load()) == pending }

// Upgrade tells that the connection changes its protocol: it does so only if
// the visitor asked for it.
func (f *filter) Upgrade() bool {
	return f.verdict.CompareAndSwap(int32(pending), int32(upgraded))
}

// Resume tells that it does not.
func (f *filter) Resume() { f.verdict.CompareAndSwap(int32(pending), int32(resumed)) }

// Read hands out what was judged good.
func (f *filter) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	hungry := false
	for {
		if len(f.out) > 0 {
			n := copy(p, f.out)
			if f.out = f.out[n:]; len(f.out) == 0 {
				f.out = nil
			}
			return n, nil
		}
		if f.err != nil {
			return 0, f.err
		}
		if len(f.in) > 0 && !hungry {
			good, err := f.judge(f.in)
			f.out, f.in = f.in[:good:good], f.in[good:]
			if len(f.in) == 0 {
				f.in = nil
			}
			f.fail(err)
			hungry = good == 0
			continue
		}
		if len(f.in) > 0 {
			if cap(f.in) == len(f.in) {
				f.in = append(make([]byte, 0, max(4<<10, 2*len(f.in))), f.in...)
			}
			n, err := f.fill(f.in[len(f.in):cap(f.in)])
			f.in = f.in[:len(f.in)+n]
			if n == 0 {
				return f.cut(p, err)
			}
			hungry = false
			continue
		}
		// Nothing is held: read into the caller's own memory, and judge there.
		n, err := f.fill(p)
		if n == 0 {
			return f.cut(p, err)
		}
		good, err := f.judge(p[:n])
		f.fail(err)
		if good < n && f.err == nil {
			f.in = append(make([]byte, 0, max(n-good, 1<<10)), p[good:n]...)
		}
		if good > 0 {
			return good, nil
		}
		hungry = true
	}
}

// cut is what a failed read means where the message stands.
func (f *filter) cut(p []byte, err error) (int, error) {
	f.mu.Lock()
	asked, own := f.asked, f.own
	f.mu.Unlock()
	// net/http interrupts a read by a deadline of long ago: no fault of the visitor.
	interrupted := !asked.IsZero() && asked.Before(f.v.since)
	if !errors.Is(err, os.ErrDeadlineExceeded) || interrupted {
		return 0, err
	}
	switch {
	case f.state == inHead && len(f.in) > 0:
		f.fail(&requestTimeout)
		return f.Read(p)
	case f.state != inHead && !own.IsZero():
		f.refusal.Store(&requestTimeout)
		f.err = err
	}
	return 0, err
}

// fail ends the connection after what is good so far.
func (f *filter) fail(err error) {
	if err == nil {
		return
	}
	f.v.server.metrics.refused("http_" + refusalCode(err))
	f.in = nil
	p, ok := err.(*page)
	if ok && f.state == inHead {
		f.out = append(f.out[:len(f.out):len(f.out)], "GET / HTTP/1.1\r\nHost: refused\r\nConnection: close\r\n"+refusedField+": "+p.code+"\r\n\r\n"...)
		f.state = inEnd
		f.err = errRefused
		return
	}
	if f.err = err; !ok {
		p = &badRequest
	}
	f.refusal.Store(p)
	f.state = inEnd
}

func refusalCode(err error) string {
	if p, ok := err.(*page); ok {
		return p.code
	}
	return badRequest.code
}

// Error makes a page usable as the filter's verdict.
func (p *page) Error() string { return p.text }

// fill reads from the visitor within the time that the state allows.
func (f *filter) fill(p []byte) (int, error) {
	var own time.Time
	switch f.state {
	case inHead:
		if len(f.in) > 0 {
			own = f.began.Add(f.limits.Hello)
		}
	case inWait, inRaw:
	default:
		own = time.Now().Add(f.limits.Stall)
		if len(p) > 1 && f.state == inBody {
			p = p[:min(int64(len(p)), f.left)]
		}
	}
	f.mu.Lock()
	err := f.deadlineLocked(f.asked, own)
	f.mu.Unlock()
	if err != nil {
		return 0, err
	}
	n, err := f.Conn.Read(p)
	if n == 0 && err == nil {
		err = io.ErrNoProgress
	}
	if n > 0 && f.state == inHead && len(f.in) == 0 {
		f.began = time.Now()
	}
	return n, err
}

func (f *filter) deadlineLocked(asked, own time.Time) error {
	if asked == f.asked && own == f.own {
		return nil
	}
	f.asked, f.own = asked, own
	if asked.IsZero() || !own.IsZero() && own.Before(asked) {
		asked = own
	}
	return f.Conn.SetReadDeadline(asked)
}

// SetReadDeadline implements net.Conn; the filter's own deadlines come on top.
func (f *filter) SetReadDeadline(t time.Time) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.deadlineLocked(t, f.own)
}

// SetDeadline implements net.Conn.
func (f *filter) SetDeadline(t time.Time) error {
	return errors.Join(f.SetReadDeadline(t), f.Conn.SetWriteDeadline(t))
}

// Write sends p; a visitor that takes in nothing for too long is cut off.
func (f *filter) Write(p []byte) (int, error) {
	if err := f.Conn.SetWriteDeadline(time.Now().Add(f.limits.Stall)); err != nil {
		return 0, err
	}
	return f.Conn.Write(p)
}

// CloseWrite ends the direction to the visitor.
func (f *filter) CloseWrite() error { return netx.CloseWrite(f.Conn) }

// judge looks at b from the current state on and returns how many bytes of it
// may be handed out: at most to the end of the message. 0 without an error
// means that more must be there before anything can be said.
func (f *filter) judge(b []byte) (good int, err error) {
	switch f.state {
	case inWait:
		switch verdict(f.verdict.Load()) {
		case pending:
			return 0, errEarly
		case upgraded:
			f.state = inRaw
			return len(b), nil
		}
		f.state = inHead
		fallthrough
	case inHead:
		return f.judgeHead(b)
	case inBody:
		n := min(int64(len(b)), f.left)
		if f.left -= n; f.left == 0 {
			f.endMessage()
		}
		return int(n), nil
	case inRaw:
		return len(b), nil
	case inEnd:
		return 0, errRefused
	}
	for good < len(b) {
		if f.state == inChunkData {
			n := min(int64(len(b)-good), f.left)
			good += int(n)
			if f.left -= n; f.left == 0 {
				f.state = inChunkCR
			}
			continue
		}
		if !f.judgeFraming(b[good]) {
			return 0, errFraming
		}
		if good++; f.state == inHead || f.state == inWait {
			return good, nil
		}
	}
	return good, nil
}

func (f *filter) endMessage() {
	f.state, f.line = inHead, 0
	if f.next != resumed {
		f.state = inWait
	}
}

// judgeFraming takes one byte of the framing of a chunked body (RFC 9112
// section 7.1).
func (f *filter) judgeFraming(c byte) bool {
	switch f.state {
	case inChunkSize:
		d, isDigit := hexDigit(c)
		switch {
		case isDigit && f.chunk < maxDigits:
			f.left = f.left<<4 | int64(d)
			f.chunk++
		case f.chunk == 0 || isDigit:
			return false
		case c == ';':
			f.state = inChunkExt
		case c == '\r':
			f.state = inChunkSizeLF
		default:
			return false
		}
	case inChunkExt:
		if f.chunk++; f.chunk > maxChunkLine {
			return false
		}
		if c == '\r' {
			f.state = inChunkSizeLF
		} else if !isFieldByte(c) {
			return false
		}
	case inChunkSizeLF:
		if c != '\n' {
			return false
		}
		f.chunk = 0
		f.state = inChunkData
		if f.left == 0 {
			f.state = inTrailer
		}
	case inChunkCR:
		f.state = inChunkLF
		return c == '\r'
	case inChunkLF:
		f.state = inChunkSize
		return c == '\n'
	case inTrailer:
		if f.chunk++; f.chunk > maxTrailer {
			return false
		}
		if c == '\r' {
			f.state = inTrailerLF
		} else {
			f.field = append(f.field, c)
		}
	case inTrailerLF:
		if c != '\n' {
			return false
		}
		if len(f.field) == 0 {
			f.chunk, f.field = 0, nil
			f.endMessage()
			return true
		}
		name, _, ok := splitField(f.field)
		if !ok || isFramingField(name) {
			return false
		}
		f.field = f.field[:0]
		f.state = inTrailer
	}
	return true
}

func hexDigit(c byte) (d byte, ok bool) {
	switch {
	case c >= '0' && c <= '9':
		return c - '0', true
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10, true
	case c >= 'A' && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// judgeHead passes a head on once all of it is there.
func (f *filter) judgeHead(b []byte) (int, error) {
	at := f.line
	for {
		i := bytes.IndexByte(b[at:], '\n')
		if i < 0 {
			if len(b) > maxHead {
				return 0, &headTooLarge
			}
			f.line = at
			return 0, nil
		}
		end := at + i
		if end == 0 || b[end-1] != '\r' {
			return 0, &ambiguous // a bare LF ends a line for some
		}
		if end+1 > maxHead {
			return 0, &headTooLarge
		}
		if end == at+1 && at > 0 {
			at = end + 1
			break
		}
		if end == at+1 {
			// An empty line before a request is ignored (RFC 9112 section 2.2)
			// by some; it has no use today.
			return 0, &badRequest
		}
		at = end + 1
	}
	f.line = 0
	h, refusal := parseHead(b[:at])
	if refusal != nil {
		return 0, refusal
	}
	f.seen++
	f.next = resumed
	if h.upgrade {
		f.next = pending
	}
	f.verdict.Store(int32(f.next))
	switch {
	case h.chunked:
		f.state, f.left, f.chunk = inChunkSize, 0, 0
	case h.length > 0:
		f.state, f.left = inBody, h.length
	default:
		f.endMessage()
	}
	return at, nil
}

// head is what a request's head says about what follows it.
type head struct {
	length  int64
	chunked bool
	upgrade bool
}

// parseHead judges a complete head: lines ending in CRLF, the last one empty.
func parseHead(b []byte) (h head, refusal *page) {
	line, rest, _ := bytes.Cut(b, crlf)
	method, target, old, refusal := parseRequestLine(line)
	if refusal != nil {
		return h, refusal
	}
	var hosts, lengths, encodings, fields int
	var host []byte
	var wantsUpgrade, namesUpgrade bool
	for len(rest) > len(crlf) {
		line, rest, _ = bytes.Cut(rest, crlf)
		if fields++; fields > maxFields {
			return h, &headTooLarge
		}
		if line[0] == ' ' || line[0] == '\t' {
			return h, &ambiguous // obs-fold, RFC 9112 section 5.2
		}
		name, value, ok := splitField(line)
		if !ok {
			return h, &badRequest
		}
		if bytes.IndexByte(name, '_') >= 0 && isFramingField(bytes.ReplaceAll(name, []byte("_"), []byte("-"))) {
			return h, &ambiguous // the same variable in CGI, RFC 3875 section 4.1.18
		}
		switch {
		case is(name, "host"):
			hosts++
			host = value
		case is(name, "content-length"):
			lengths++
			if len(value) == 0 || len(value) > maxDigits {
				return h, &ambiguous
			}
			n, err := strconv.ParseUint(string(value), 10, 63)
			if err != nil {
				return h, &ambiguous
			}
			h.length = int64(n)
		case is(name, "transfer-encoding"):
			encodings++
			if !is(value, "chunked") {
				return h, &ambiguous
			}
			h.chunked = true
		case is(name, "upgrade"):
			wantsUpgrade = true
		case is(name, "connection"):
			namesUpgrade = namesUpgrade || hasToken(string(value), "upgrade")
		case is(name, refusedField):
			return h, &badRequest
		}
	}
	switch {
	case lengths > 1 || encodings > 1 || lengths+encodings > 1 || old && encodings > 0:
		return h, &ambiguous // RFC 9112 section 6.3
	case hosts > 1 || hosts == 0 && !old || hosts == 1 && !isAuthority(host):
		return h, &badHost // RFC 9112 section 3.2
	case string(method) == http.MethodConnect:
		// As after a request for an upgrade, nobody knows what the bytes that
		// follow are before it is answered.
		h.upgrade = true
		if hosts == 0 { // HTTP/1.0, which some clients speak to proxies to this day
			host = target
		}
		return h, checkConnect(target, host, lengths+encodings)
	case is(method, "connect") || is(method, "trace"):
		return h, &badMethod
	}
	h.upgrade = wantsUpgrade && namesUpgrade && !old
	return h, checkTarget(method, target, host)
}

var crlf = []byte("\r\n")

// parseRequestLine splits method SP target SP version (RFC 9112 section 3);
// old is HTTP/1.0.
func parseRequestLine(line []byte) (method, target []byte, old bool, refusal *page) {
	method, rest, ok1 := bytes.Cut(line, []byte(" "))
	target, version, ok2 := bytes.Cut(rest, []byte(" "))
	if !ok1 || !ok2 || !isToken(method) || len(method) > 32 || !isTarget(target) {
		return nil, nil, false, &badRequest
	}
	switch string(version) {
	case "HTTP/1.1":
	case "HTTP/1.0":
		old = true
	default:
		if len(version) == 8 && string(version[:5]) == "HTTP/" && len(bytes.Trim(version[5:], ".0123456789")) == 0 {
			return nil, nil, false, &badVersion
		}
		return nil, nil, false, &badRequest
	}
	return method, target, old, nil
}

// isTarget reports whether b may stand between the spaces of a request line.
func isTarget(b []byte) bool {
	for _, c := range b {
		if c <= ' ' || c == 0x7f {
			return false
		}
	}
	return len(b) > 0
}

// isAuthority reports whether b is a host with or without a port, as Host
// holds it (RFC 9110 section 7.2): a name, or an address, IPv6 in brackets.
// Of what RFC 3986 allows in names beyond that, readers make different things.
func isAuthority(b []byte) bool {
	if i := bytes.LastIndexByte(b, ':'); i >= 0 && b[len(b)-1] != ']' {
		if len(bytes.Trim(b[i+1:], "0123456789")) > 0 {
			return false
		}
		b = b[:i]
	}
	if len(b) > 2 && b[0] == '[' && b[len(b)-1] == ']' {
		a, err := netip.ParseAddr(string(b[1 : len(b)-1]))
		return err == nil && a.Is6() && a.Zone() == ""
	}
	for _, c := range b {
		isAlnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !isAlnum && strings.IndexByte("-._~", c) < 0 {
			return false
		}
	}
	return len(b) > 0
}

// checkTarget allows origin form, asterisk form for OPTIONS, and an absolute
// form that says the same as Host (RFC 9112 section 3.2): of two names, others
// might choose the other.
func checkTarget(method, target, host []byte) *page {
	if target[0] == '/' || string(target) == "*" && string(method) == "OPTIONS" {
		return nil
	}
	scheme, rest, ok := bytes.Cut(target, []byte("://"))
	if !ok || !is(scheme, "http") && !is(scheme, "https") {
		return &badRequest
	}
	authority := rest
	if i := bytes.IndexAny(rest, "/?#"); i >= 0 {
		authority = rest[:i]
	}
	if len(authority) == 0 || !bytes.EqualFold(authority, host) {
		return &badHost
	}
	return nil
}

// checkConnect allows the authority form that says the same as Host, with a port
// (RFC 9112 section 3.2.3), and no content, which has no meaning there and is
// read differently (RFC 9110 section 9.3.6).
func checkConnect(target, host []byte, framed int) *page {
	i := bytes.LastIndexByte(target, ':')
	switch {
	case framed > 0:
		return &ambiguous
	case i < 0 || i == len(target)-1 || !isAuthority(target) || target[len(target)-1] == ']':
		return &badRequest
	case !bytes.EqualFold(target, host):
		return &badHost
	}
	return nil
}

// splitField splits a field line and trims the value (RFC 9112 section 5).
func splitField(line []byte) (name, value []byte, ok bool) {
	name, value, ok = bytes.Cut(line, []byte(":"))
	if !ok || !isToken(name) {
		return nil, nil, false
	}
	for _, c := range value {
		if !isFieldByte(c) {
			return nil, nil, false
		}
	}
	return name, bytes.Trim(value, " \t"), true
}

// isFieldByte reports whether c may stand in a field value (RFC 9110 section 5.5).
func isFieldByte(c byte) bool { return c >= ' ' && c != 0x7f || c == '\t' }

// isToken reports whether b is a token (RFC 9110 section 5.6.2).
func isToken(b []byte) bool {
	for _, c := range b {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0:
		default:
			return false
		}
	}
	return len(b) > 0
}

// is compares without regard to case, for ASCII.
func is(b []byte, s string) bool { return len(b) == len(s) && strings.EqualFold(string(b), s) }

// isFramingField reports whether a field decides where a message ends or who it
// is for: as a trailer, or misspelt, it is an attempt.
func isFramingField(name []byte) bool {
	return is(name, "content-length") || is(name, "transfer-encoding") || is(name, "host") || is(name, refusedField)
}

// hasToken reports whether a comma-separated list holds the token.
func hasToken(list, token string) bool {
	for t := range strings.SplitSeq(list, ",") {
		if strings.EqualFold(strings.Trim(t, " \t"), token) {
			return true
		}
	}
	return false
}
