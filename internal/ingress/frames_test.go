package ingress

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// piecemeal is a connection that hands out its bytes a few at a time.
type piecemeal struct {
	net.Conn
	r io.Reader
	n int
}

func (c *piecemeal) Read(p []byte) (int, error) { return c.r.Read(p[:min(len(p), c.n)]) }

// throughFrames returns what is left of in, read n bytes at a time.
func throughFrames(in []byte, n int) ([]byte, error) {
	s := &Server{}
	s.setup()
	return io.ReadAll(newFrames(&piecemeal{r: bytes.NewReader(in), n: n}, &visit{server: s}))
}

// written is what a client sends.
func written(t testing.TB, write func(f *http2.Framer, block func(fields ...string) []byte)) []byte {
	t.Helper()
	var b bytes.Buffer
	b.WriteString(http2.ClientPreface)
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	write(http2.NewFramer(&b, nil), func(fields ...string) []byte {
		block.Reset()
		for i := 0; i < len(fields); i += 2 {
			if err := enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}); err != nil {
				t.Fatal(err)
			}
		}
		return bytes.Clone(block.Bytes())
	})
	return b.Bytes()
}

func TestFrames(t *testing.T) {
	window := func(n uint32) http2.Setting { return http2.Setting{ID: http2.SettingInitialWindowSize, Val: n} }
	plain := written(t, func(f *http2.Framer, block func(...string) []byte) {
		f.WriteSettings(window(100), http2.Setting{ID: http2.SettingEnablePush})
		f.WriteSettingsAck()
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block(":method", "POST", ":path", "/", "te", "trailers", "cookie", "a=b"), EndHeaders: true, PadLength: 7, Priority: http2.PriorityParam{StreamDep: 3}})
		f.WriteData(1, false, bytes.Repeat([]byte("x"), 3000))
		b := block(":method", "GET", ":path", "/other", "cookie", "a=b")
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: b[:3]})
		f.WriteContinuation(3, true, b[3:])
		f.WritePing(false, [8]byte{1})
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block("x-sum", "1"), EndHeaders: true, EndStream: true})
	})
	twice := written(t, func(f *http2.Framer, _ func(...string) []byte) {
		f.WriteSettings(window(100), http2.Setting{ID: http2.SettingEnablePush}, window(1))
		f.WritePing(false, [8]byte{1})
	})
	once := written(t, func(f *http2.Framer, _ func(...string) []byte) {
		f.WriteSettings(http2.Setting{ID: http2.SettingEnablePush}, window(1))
		f.WritePing(false, [8]byte{1})
	})
	large := written(t, func(f *http2.Framer, _ func(...string) []byte) {
		f.WriteRawFrame(1, flagEnd, 1, make([]byte, maxFrame+1))
	})
	for n := 1; n < 5000; n += 1 + n/20 {
		for name, tt := range map[string]struct{ in, want []byte }{"plain": {plain, plain}, "a setting twice": {twice, once}, "too large": {large, large}} {
			got, err := throughFrames(tt.in, n)
			if err != nil || !bytes.Equal(got, tt.want) {
				t.Fatalf("%s, %d bytes at a time: %v, %d bytes, want %d", name, n, err, len(got), len(tt.want))
			}
		}
		for _, bad := range [][]string{{"connection", "close"}, {"te", "gzip"}, {"keep-alive", "1"}, {"upgrade", "h2c"}, {"transfer-encoding", "chunked"}, {"proxy-connection", "x"}} {
			in := written(t, func(f *http2.Framer, block func(...string) []byte) {
				b := block(append([]string{":method", "GET", ":path", "/"}, bad...)...)
				f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:2], EndStream: true})
				f.WriteContinuation(1, true, b[2:])
			})
			if got, err := throughFrames(in, n); err != errConnectionField || len(got) >= len(in) {
				t.Fatalf("%s, %d bytes at a time: %v, %d of %d bytes", bad, n, err, len(got), len(in))
			}
		}
	}
}

// What was agreed on as HTTP/2 is never taken for HTTP/1, which would escape the
// filter.
func TestHTTP2PrefaceIsRequired(t *testing.T) {
	s := newScribe(t)
	w := start(t, nil, web1("a", s.at))
	for _, say := range []string{"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", "PRI * HTTP/1.1\r\nHost: a.example\r\n\r\n"} {
		c, err := tls.Dial("tcp", w.tls, &tls.Config{ServerName: "a.example", RootCAs: w.roots, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.WriteString(c, say); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); isTimeout(err) || bytes.Contains(b, []byte(" 204 ")) {
			t.Errorf("%q: %q, %v", say, b, err)
		}
		c.Close()
	}
	if heads := s.take(); len(heads) > 0 {
		t.Errorf("the workload saw %q", heads)
	}
}

// However the bytes come, the same goes on, and never more than came.
func FuzzHTTP2Frames(f *testing.F) {
	f.Add(written(f, func(f *http2.Framer, block func(...string) []byte) {
		f.WriteSettings(http2.Setting{ID: 4, Val: 1}, http2.Setting{ID: 4, Val: 2})
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block(":method", "GET", "te", "x"), EndHeaders: true, PadLength: 3})
		f.WriteData(1, true, []byte("x"))
	}), 3)
	f.Add([]byte(http2.ClientPreface), 1)
	f.Fuzz(func(t *testing.T, in []byte, n int) {
		whole, err1 := throughFrames(in, len(in)+1)
		parts, err2 := throughFrames(in, 1+max(n, -n)%100)
		if err1 != err2 || err1 == nil && !bytes.Equal(whole, parts) || len(whole) > len(in) {
			t.Errorf("%d bytes, %v; in parts %d, %v; of %d", len(whole), err1, len(parts), err2, len(in))
		}
	})
}
