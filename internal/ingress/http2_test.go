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
