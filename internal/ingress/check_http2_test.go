package ingress

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// scribe is a workload that notes each request's head, byte for byte, answers
// and closes.
type scribe struct {
	at string

	mu    sync.Mutex
	heads []string
}

func newScribe(t testing.TB) *scribe {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &scribe{at: l.Addr().String()}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				br := bufio.NewReader(c)
				var head strings.Builder
				for !strings.HasSuffix(head.String(), "\r\n\r\n") {
					line, err := br.ReadString('\n')
					if head.WriteString(line); err != nil {
						return
					}
				}
				s.mu.Lock()
				s.heads = append(s.heads, head.String())
				s.mu.Unlock()
				io.WriteString(c, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return s
}

// take returns the heads since the last time.
func (s *scribe) take() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	heads := s.heads
	s.heads = nil
	return heads
}

// rawHTTP2 sends one request whose fields are as given, and returns the status
// of the answer, or "reset".
func (w *world) rawHTTP2(fields ...string) string {
	w.t.Helper()
	c, err := tls.Dial("tcp", w.tls, &tls.Config{ServerName: "a.example", RootCAs: w.roots, NextProtos: []string{"h2"}})
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		w.t.Fatal(err)
	}
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for i := 0; i < len(fields); i += 2 {
		if err := enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}); err != nil {
			w.t.Fatal(err)
		}
	}
	f := http2.NewFramer(c, c)
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_, err = io.WriteString(c, http2.ClientPreface)
	err = errors.Join(err, f.WriteSettings(), f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true}))
	if err != nil {
		w.t.Fatal(err)
	}
	for {
		frame, err := f.ReadFrame()
		if err == io.EOF || errors.Is(err, syscall.ECONNRESET) {
			return "reset"
		}
		if err != nil {
			w.t.Fatal(err)
		}
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			return frame.PseudoValue("status")
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			return "reset"
		}
	}
}

// What is no request in HTTP/1 must not become one on the way from HTTP/2.
func TestHTTP2IsNotLooserThanHTTP1(t *testing.T) {
	s := newScribe(t)
	w := start(t, nil, web1("a", s.at))
	for _, tt := range []struct {
		name   string
		fields []string
		want   string // first line at the workload, or "" if it must not see anything
	}{
		{"plain", []string{":method", "GET", ":scheme", "https", ":authority", "a.example", ":path", "/x?y"}, "GET /x?y HTTP/1.1"},
		{"port", []string{":method", "GET", ":scheme", "https", ":authority", "a.example:443", ":path", "/"}, "GET / HTTP/1.1"},
		{"asterisk", []string{":method", "OPTIONS", ":scheme", "https", ":authority", "a.example", ":path", "*"}, "OPTIONS * HTTP/1.1"},
		{"space in the path", []string{":method", "GET", ":scheme", "https", ":authority", "a.example", ":path", "/x HTTP/1.1"}, ""},
		{"space in the query", []string{":method", "GET", ":scheme", "https", ":authority", "a.example", ":path", "/?x HTTP/1.0"}, ""},
		{"tab in the query", []string{":method", "GET", ":scheme", "https", ":authority", "a.example", ":path", "/?x\ty"}, ""},
		{"asterisk for GET", []string{":method", "GET", ":scheme", "https", ":authority", "a.example", ":path", "*"}, ""},
		{"space in the method", []string{":method", "GET /y", ":scheme", "https", ":authority", "a.example", ":path", "/"}, ""},
		{"connect in small letters", []string{":method", "connect", ":scheme", "https", ":authority", "a.example", ":path", "/"}, ""},
		{"TRACE", []string{":method", "TRACE", ":scheme", "https", ":authority", "a.example", ":path", "/"}, ""},
		{"authority with a quote", []string{":method", "GET", ":scheme", "https", ":authority", `a.example:"`, ":path", "/"}, ""},
		{"authority with a port that is none", []string{":method", "GET", ":scheme", "https", ":authority", "a.example:x", ":path", "/"}, ""},
		{"authority with a user", []string{":method", "GET", ":scheme", "https", ":authority", "u@a.example", ":path", "/"}, ""},
		{"another Host", []string{":method", "GET", ":scheme", "https", ":authority", "a.example", ":path", "/", "host", "b.example"}, ""},
		{"Transfer-Encoding", []string{":method", "POST", ":scheme", "https", ":authority", "a.example", ":path", "/", "transfer-encoding", "chunked"}, ""},
		{"Connection", []string{":method", "GET", ":scheme", "https", ":authority", "a.example", ":path", "/", "connection", "x-forwarded-for"}, ""},
		{"line end in a value", []string{":method", "GET", ":scheme", "https", ":authority", "a.example", ":path", "/", "x", "a\r\nb: c"}, ""},
		{"two lengths", []string{":method", "POST", ":scheme", "https", ":authority", "a.example", ":path", "/", "content-length", "0", "content-length", "2"}, ""},
		{"length without data", []string{":method", "POST", ":scheme", "https", ":authority", "a.example", ":path", "/", "content-length", "2"}, ""},
		{"length with a sign", []string{":method", "POST", ":scheme", "https", ":authority", "a.example", ":path", "/", "content-length", "+0"}, ""},
		{"line end in the path", []string{":method", "GET", ":scheme", "https", ":authority", "a.example", ":path", "/\r\nb: c"}, ""},
		{"colon in a name", []string{":method", "GET", ":scheme", "https", ":authority", "a.example", ":path", "/", "x:y", "z"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			status := w.rawHTTP2(tt.fields...)
			heads := s.take()
			if tt.want == "" {
				if len(heads) > 0 || status != "reset" && !strings.HasPrefix(status, "4") {
					t.Errorf("answered %s; the workload saw %q", status, heads)
				}
				return
			}
			if len(heads) != 1 || !strings.HasPrefix(heads[0], tt.want+"\r\n") || status != "204" {
				t.Errorf("answered %s; the workload saw %q, want %q", status, heads, tt.want)
			}
		})
	}
}
