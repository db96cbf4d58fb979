package ingress

import (
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"webgw.dev/webgw"
)

// compressedTypes are the content types that are compressed if the policy names
// none. Streams of events are not among them: each would hold a compressor for
// as long as it is open.
var compressedTypes = map[string]bool{
	"text/html": true, "text/css": true, "text/plain": true, "text/javascript": true, "text/xml": true, "text/csv": true, "text/markdown": true,
	"text/calendar": true, "application/javascript": true, "application/json": true, "application/xml": true, "application/wasm": true,
	"application/ld+json": true, "application/manifest+json": true, "application/problem+json": true, "application/geo+json": true,
	"application/atom+xml": true, "application/rss+xml": true, "application/xhtml+xml": true, "image/svg+xml": true, "font/ttf": true, "font/otf": true,
}

const (
	minCompressed = 1 << 10 // bytes below which it is not worth it, unless the policy says otherwise

	// Compressors at once in a gateway, some 1 MB each. Answers beyond that go
	// as they are.
	maxCompressing = 256

	zstdWindow = 256 << 10 // bytes that a visitor must hold; RFC 9659 allows 8 MiB
)

// compressor is an encoder that is used again and again.
type compressor interface {
	io.WriteCloser
	Flush() error
	Reset(io.Writer)
}

// encoders are by content coding, the best first.
var encoders = []*encoder{
	{name: "zstd", pool: sync.Pool{New: func() any {
		z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(zstdWindow), zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithLowerEncoderMem(true))
		if err != nil {
			panic(err) // the options are constant
		}
		return compressor(z)
	}}},
	{name: "gzip", pool: sync.Pool{New: func() any { return compressor(gzip.NewWriter(nil)) }}},
}

type encoder struct {
	name string // content coding (RFC 9110 section 8.4.1, RFC 8878)
	pool sync.Pool
}

// compression is the body of one answer on its way through a compressor.
type compression struct {
	x       *exchange
	by      *encoder
	to      compressor
	hold    bool // flushing costs more than it gives: the length was known, all is coming
	discard bool // HEAD: there is no body
}

// compress decides whether the body of the answer, whose head is about to go,
// is compressed, and changes the head accordingly.
func (x *exchange) compress() {
	u := x.ruled
	if u == nil || u.guard == nil || u.guard.policy.Compress == nil {
		return
	}
	h := x.Header()
	size := int64(-1)
	if v := h.Get("Content-Length"); v != "" {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return
		}
		size = n
	}
	if x.empty || !compressible(u.guard.policy.Compress, x.status, h, size) {
		return
	}
	addVary(h, "Accept-Encoding")
	by := accepted(x.in.Header["Accept-Encoding"])
	if by == nil {
		return
	}
	s := x.web.s
	head := x.in.Method == http.MethodHead
	if !head {
		if s.compressing.Add(1) > maxCompressing {
			s.compressing.Add(-1)
			return
		}
	}
	c := &compression{x: x, by: by, hold: size >= 0, discard: head}
	if !head {
		c.to = by.pool.Get().(compressor)
		c.to.Reset(c)
	}
	h.Set("Content-Encoding", by.name)
	delete(h, "Content-Length")
	delete(h, "Accept-Ranges") // ranges are of what the workload sends
	if tag := h.Get("Etag"); strings.HasPrefix(tag, `"`) {
		h.Set("Etag", "W/"+tag) // the bytes differ (RFC 9110 section 8.8.1)
	}
	x.packed = c
}

// compressible reports whether an answer is worth compressing and may be.
func compressible(p *webgw.Compress, status int, h http.Header, size int64) bool {
	switch {
	case status < 200, status == http.StatusNoContent, status == http.StatusResetContent, status == http.StatusPartialContent, status == http.StatusNotModified:
		return false
	case h.Get("Content-Encoding") != "", h.Get("Content-Range") != "", h.Get(ErrorHeader) != "":
		return false
	case h.Get("Content-Digest") != "", h.Get("Digest") != "", h.Get("Content-Md5") != "", h.Get("Repr-Digest") != "":
		return false // of the bytes as they are
	}
	for _, v := range h["Cache-Control"] {
		if hasToken(v, "no-transform") { // RFC 9111 section 5.2.2.6
			return false
		}
	}
	least := int64(minCompressed)
	if p.MinSize > 0 {
		least = p.MinSize
	}
	if size >= 0 && size < least {
		return false
	}
	kind, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err != nil {
		return false
	}
	if len(p.Types) == 0 {
		return compressedTypes[kind]
	}
	for _, t := range p.Types {
		if all, ok := strings.CutSuffix(t, "/*"); t == kind || ok && strings.HasPrefix(kind, all+"/") {
			return true
		}
	}
	return false
}

// accepted returns the encoder that the visitor likes best, or nil (RFC 9110
// section 12.5.3).
func accepted(values []string) *encoder {
	var best *encoder
	most := 0.0
	for _, e := range encoders {
		if q := quality(values, e.name); q > most {
			best, most = e, q
		}
	}
	return best
}

// quality is how much a coding is liked: 0, not at all, to 1.
func quality(values []string, coding string) float64 {
	q, named := 0.0, false
	for _, list := range values {
		for item := range strings.SplitSeq(list, ",") {
			name, weight, _ := strings.Cut(item, ";")
			name = strings.ToLower(strings.TrimSpace(name))
			if name != coding && !(coding == "gzip" && name == "x-gzip") && (name != "*" || named) {
				continue
			}
			w := 1.0
			if weight = strings.ToLower(strings.TrimSpace(weight)); weight != "" {
				text, ok := strings.CutPrefix(weight, "q=")
				var err error
				if w, err = strconv.ParseFloat(text, 64); !ok || err != nil || !(w >= 0 && w <= 1) {
					w = 0
				}
			}
			q, named = w, name != "*"
		}
	}
	return q
}

// addVary adds a field's name to Vary.
func addVary(h http.Header, name string) {
	for _, v := range h["Vary"] {
		if hasToken(v, name) || hasToken(v, "*") {
			return
		}
	}
	h.Add("Vary", name)
}

// Write takes what the compressor has made.
func (c *compression) Write(p []byte) (int, error) { return c.x.write(p) }

// take compresses a part of the body.
func (c *compression) take(p []byte) (int, error) {
	if c.discard {
		return len(p), nil
	}
	return c.to.Write(p)
}

// flush sends what the compressor holds back, unless all is on its way anyway.
func (c *compression) flush() error {
	if c.discard || c.hold {
		return nil
	}
	return c.to.Flush()
}

// end gives the compressor back, after the end of a body that is whole.
func (c *compression) end(whole bool) (err error) {
	if c.to == nil {
		return nil
	}
	if whole {
		err = c.to.Close()
	}
	c.to.Reset(nil)
	c.by.pool.Put(c.to)
	c.to, c.discard = nil, true
	c.x.web.s.compressing.Add(-1)
	return err
}
