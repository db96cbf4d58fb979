package ingress

import (
	"errors"
	"io"
	"net/http"
	"net/textproto"
	"os"
	"sync"
	"sync/atomic"
)

var (
	errFraming  = errors.New("ingress: malformed message body")
	errBodyOver = errors.New("ingress: the request is over")
)

// body1 is the body of a request over HTTP/1. As a request's head, its framing
// is read more strictly than others do.
type body1 struct {
	c *http1

	mu    sync.Mutex
	err   error       // sticky; io.EOF: all is read
	asks  atomic.Bool // the visitor waits for 100 (Continue)
	state framing
	left  int64 // of the body or chunk
	chunk int   // bytes of the line or trailer so far
	field []byte
	to    http.Header // trailer fields
}

type framing int

const (
	inData framing = iota // as long as the head says
	inChunkSize
	inChunkExt
	inChunkSizeLF
	inChunkData
	inChunkCR
	inChunkLF
	inTrailer
	inTrailerLF
	inEnd
)

// Close implements io.Closer; whoever serves the connection ends the body.
func (b *body1) Close() error { return nil }

// Read implements io.Reader.
func (b *body1) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil || len(p) == 0 {
		return 0, b.err
	}
	if b.asks.CompareAndSwap(true, false) {
		if b.err = b.c.goOn(); b.err != nil {
			return 0, b.err
		}
	}
	n, err := b.read(p)
	if err != nil {
		b.err = err
		if err != io.EOF {
			b.c.badBody(err)
		}
	}
	b.c.bodyRead.Store(err == io.EOF)
	return n, err
}

// read reads until there is something, or the end.
func (b *body1) read(p []byte) (int, error) {
	for {
		n, err := b.take(p)
		if n > 0 || err != nil {
			return n, err
		}
		if b.state == inData && len(p) >= len(b.c.buf) { // straight to where it is wanted
			n, err := b.c.fill(p[:min(int64(len(p)), b.left)], b.c.limits.Stall)
			if b.left -= int64(n); n > 0 && b.left == 0 {
				b.state, err = inEnd, io.EOF
			}
			return n, err
		}
		if err := b.c.more(b.c.limits.Stall); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
	}
}

// take takes what has been read already.
func (b *body1) take(p []byte) (n int, err error) {
	c := b.c
	for c.at < c.to && n < len(p) || b.state == inEnd {
		switch b.state {
		case inEnd:
			return n, io.EOF
		case inData, inChunkData:
			m := copy(p[n:], c.buf[c.at:min(int64(c.to), int64(c.at)+b.left)])
			c.at += m
			n += m
			if b.left -= int64(m); b.left == 0 {
				b.state++ // chunk's end …
				if b.state == inChunkSize {
					b.state = inEnd // … or the body's
				}
			}
		default:
			if !b.judge(c.buf[c.at]) {
				return n, errFraming
			}
			c.at++
		}
	}
	return n, nil
}

// judge takes one byte of the framing of a chunked body (RFC 9112 section 7.1).
func (b *body1) judge(c byte) bool {
	switch b.state {
	case inChunkSize:
		d, isDigit := hexDigit(c)
		switch {
		case isDigit && b.chunk < maxDigits:
			b.left = b.left<<4 | int64(d)
			b.chunk++
		case b.chunk == 0 || isDigit:
			return false
		case c == ';':
			b.state = inChunkExt
		case c == '\r':
			b.state = inChunkSizeLF
		default:
			return false
		}
	case inChunkExt:
		if b.chunk++; b.chunk > maxChunkLine {
			return false
		}
		if c == '\r' {
			b.state = inChunkSizeLF
		} else if !isFieldByte(c) {
			return false
		}
	case inChunkSizeLF:
		if c != '\n' {
			return false
		}
		b.chunk = 0
		b.state = inChunkData
		if b.left == 0 {
			b.state = inTrailer
		}
	case inChunkCR:
		b.state = inChunkLF
		return c == '\r'
	case inChunkLF:
		b.state = inChunkSize
		return c == '\n'
	case inTrailer:
		if b.chunk++; b.chunk > maxTrailer {
			return false
		}
		if c == '\r' {
			b.state = inTrailerLF
		} else {
			b.field = append(b.field, c)
		}
	case inTrailerLF:
		if c != '\n' {
			return false
		}
		if len(b.field) == 0 {
			b.state = inEnd
			return true
		}
		name, value, ok := splitField(string(b.field))
		if !ok || isFramingField(name) {
			return false
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		if !isHopByHop(name) {
			b.to[name] = append(b.to[name], value)
		}
		b.field = b.field[:0]
		b.state = inTrailer
	}
	return true
}

// end makes later reads fail, and reports whether all has been read; a rest that
// is short is read now.
func (b *body1) end() (whole bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var rest []byte
	for skipped := 0; b.err == nil && !b.asks.Load() && skipped < maxSkipped; {
		if rest == nil {
			rest = make([]byte, firstRead)
		}
		n, err := b.read(rest)
		skipped += n
		b.err = err
	}
	whole = b.err == io.EOF
	b.err = errBodyOver
	return whole
}

// maxSkipped is the most of a body that is read for the sake of what follows it.
const maxSkipped = 256 << 10

// refusal returns the page due for a body that could not be read, or nil.
func refusalOf(err error) *page {
	switch {
	case errors.Is(err, errFraming):
		return &badRequest
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &requestTimeout
	}
	return nil
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
