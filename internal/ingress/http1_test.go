package ingress

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// heard is what a connection over HTTP/1 makes of its input.
type heard struct {
	requests []*http.Request // their bodies are read
	bodies   []string        // and the methods and hosts
	refused  string          // the page by which the last head was refused
	broken   bool            // the last body or what follows it is malformed
	cut      bool            // the input ends inside a head or body
	seen     int             // heads that were taken
}

// hear serves what comes in, without answering.
func hear(in io.Reader) (got heard) {
	s := &Server{}
	s.setup()
	h := newHTTP1(s.web, onceConn{Reader: in})
	for {
		refusal, err := h.next()
		got.seen = h.seen
		if err != nil {
			got.cut = h.at < h.to
			return got
		}
		if refusal != nil {
			got.refused, got.seen = refusal.code, got.seen-1
			return got
		}
		h.ask()
		body, err := io.ReadAll(h.req.Body)
		if h.watch.Stop(); h.head.upgrade && err == nil {
			h.look() // until something comes, or the end
		}
		h.asked()
		if got.broken = h.Refusal() != nil; got.broken {
			return got
		}
		if got.cut = err != nil; got.cut {
			return got
		}
		r, u := h.req, h.url
		r.URL, r.Header, r.Trailer = &u, h.req.Header.Clone(), h.req.Trailer.Clone()
		r.Body = io.NopCloser(bytes.NewReader(body))
		got.requests = append(got.requests, &r)
		got.bodies = append(got.bodies, r.Method+" "+r.Host+" "+string(body))
		if h.head.upgrade {
			return got
		}
		if h.head.close {
			return got
		}
	}
}

func TestHTTP1(t *testing.T) {
	const get = "GET / HTTP/1.1\r\nHost: a.example\r\n"
	const post = "POST / HTTP/1.1\r\nHost: a.example\r\n"
	const chunked = post + "Transfer-Encoding: chunked\r\n\r\n"
	for _, tt := range []struct {
		name, in string
		want     string // bodies, then the refusal
	}{
		{"plain", get + "\r\n", "GET a.example |"},
		{"pipelined", get + "\r\n" + post + "Content-Length: 2\r\n\r\nhi" + get + "\r\n", "GET a.example |POST a.example hi|GET a.example |"},
		{"chunked", chunked + "5\r\nhello\r\n1;x=\"y\"\r\n!\r\n0\r\nTrailer: x\r\n\r\n" + get + "\r\n", "POST a.example hello!|GET a.example |"},
		{"chunked in capitals", post + "transfer-ENCODING: \tCHUNKED \r\n\r\nA\r\n0123456789\r\n0\r\n\r\n", "POST a.example 0123456789|"},
		{"a body is no request", post + "Content-Length: 18\r\n\r\nGET / HTTP/1.1\n\n\n\n", "POST a.example GET / HTTP/1.1\n\n\n\n|"},
		{"HTTP/1.0", "GET / HTTP/1.0\r\n\r\n", "GET  |"},
		{"absolute form", "GET http://A.example/x HTTP/1.1\r\nHost: a.example\r\n\r\n", "GET A.example |"},
		{"asterisk", "OPTIONS * HTTP/1.1\r\nHost: a.example\r\n\r\n", "OPTIONS a.example |"},
		{"odd but legal", get + "X: \xe4 \"\\ \tv\r\nEmpty:\r\n\r\n", "GET a.example |"},

		{"bare LF", "GET / HTTP/1.1\nHost: a.example\n\n", "ambiguous_request"},
		{"bare LF in a field", get + "X: y\nContent-Length: 5\r\n\r\n", "ambiguous_request"},
		{"LF LF ends the head for some", get + "X: y\r\n\nGET /2 HTTP/1.1\r\n\r\n", "ambiguous_request"},
		{"bare CR", get + "X: y\rContent-Length: 5\r\n\r\n", "bad_request"},
		{"bare CR in the request line", "GET /\r HTTP/1.1\r\nHost: a.example\r\n\r\n", "bad_request"},
		{"obs-fold", get + "X: y\r\n z\r\n\r\n", "ambiguous_request"},
		{"folded Transfer-Encoding", post + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", "ambiguous_request"},
		{"first field folded", "GET / HTTP/1.1\r\n Host: a.example\r\n\r\n", "ambiguous_request"},
		{"space before the colon", post + "Content-Length : 5\r\n\r\nhello", "bad_request"},
		{"no colon", get + "X\r\n\r\n", "bad_request"},
		{"no name", get + ": x\r\n\r\n", "bad_request"},
		{"NUL", get + "X: a\x00b\r\n\r\n", "bad_request"},
		{"control in a name", get + "X\x01: y\r\n\r\n", "bad_request"},
		{"DEL in a value", get + "X: \x7f\r\n\r\n", "bad_request"},
		{"empty line first", "\r\n" + get + "\r\n", "bad_request"},

		{"CL and TE", post + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "ambiguous_request"},
		{"TE and CL", post + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", "ambiguous_request"},
		{"two CL", post + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", "ambiguous_request"},
		{"two equal CL", post + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", "ambiguous_request"},
		{"list of CL", post + "Content-Length: 5, 5\r\n\r\nhello", "ambiguous_request"},
		{"CL with a sign", post + "Content-Length: +5\r\n\r\nhello", "ambiguous_request"},
		{"negative CL", post + "Content-Length: -5\r\n\r\nhello", "ambiguous_request"},
		{"hex CL", post + "Content-Length: 0x5\r\n\r\nhello", "ambiguous_request"},
		{"empty CL", post + "Content-Length: \r\n\r\n", "ambiguous_request"},
		{"huge CL", post + "Content-Length: 99999999999999999999\r\n\r\n", "ambiguous_request"},
		{"Content_Length", post + "Content_Length: 5\r\n\r\nhello", "ambiguous_request"},
		{"Transfer_Encoding", post + "Transfer_Encoding: chunked\r\n\r\n", "ambiguous_request"},
		{"two TE", post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "ambiguous_request"},
		{"TE identity", post + "Transfer-Encoding: identity\r\n\r\n", "ambiguous_request"},
		{"TE gzip, chunked", post + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "ambiguous_request"},
		{"TE xchunked", post + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "ambiguous_request"},
		{"TE with vertical tab", post + "Transfer-Encoding: \vchunked\r\n\r\n0\r\n\r\n", "bad_request"},
		{"TE in HTTP/1.0", "POST / HTTP/1.0\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "ambiguous_request"},

		{"no Host", "GET / HTTP/1.1\r\n\r\n", "bad_host"},
		{"two Hosts", get + "Host: a.example\r\n\r\n", "bad_host"},
		{"Host with a path", "GET / HTTP/1.1\r\nHost: a.example/x\r\n\r\n", "bad_host"},
		{"Host with a user", "GET / HTTP/1.1\r\nHost: b@a.example\r\n\r\n", "bad_host"},
		{"Host list", "GET / HTTP/1.1\r\nHost: a.example, b.example\r\n\r\n", "bad_host"},
		{"absolute form of another", "GET http://b.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", "bad_host"},
		{"absolute form with a user", "GET http://a.example@b.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", "bad_host"},
		{"absolute form without a host", "GET http:/// HTTP/1.1\r\nHost: a.example\r\n\r\n", "bad_host"},
		{"another scheme", "GET gopher://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", "bad_request"},
		{"relative target", "GET x HTTP/1.1\r\nHost: a.example\r\n\r\n", "bad_request"},
		{"asterisk for GET", "GET * HTTP/1.1\r\nHost: a.example\r\n\r\n", "bad_request"},

		{"CONNECT to another host in HTTP/1.0", "CONNECT b.example:443 HTTP/1.0\r\nHost: a.example:443\r\n\r\n", "bad_host"},
		{"CONNECT without a port in HTTP/1.0", "CONNECT a.example HTTP/1.0\r\n\r\n", "bad_request"},
		{"CONNECT without a port", "CONNECT a.example HTTP/1.1\r\nHost: a.example\r\n\r\n", "bad_request"},
		{"CONNECT to a path", "CONNECT / HTTP/1.1\r\nHost: a.example\r\n\r\n", "bad_request"},
		{"CONNECT to a URL", "CONNECT http://a.example:80 HTTP/1.1\r\nHost: a.example:80\r\n\r\n", "bad_request"},
		{"CONNECT to another host", "CONNECT b.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n", "bad_host"},
		{"CONNECT to another port", "CONNECT a.example:22 HTTP/1.1\r\nHost: a.example:443\r\n\r\n", "bad_host"},
		{"CONNECT with a body", "CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\nContent-Length: 1\r\n\r\nx", "ambiguous_request"},
		{"CONNECT with chunks", "CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "ambiguous_request"},
		{"connect", "connect / HTTP/1.1\r\nHost: a.example\r\n\r\n", "method_not_allowed"},
		{"TRACE", "TRACE / HTTP/1.1\r\nHost: a.example\r\n\r\n", "method_not_allowed"},
		{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "http_version"},
		{"HTTP/1.2", "GET / HTTP/1.2\r\nHost: a.example\r\n\r\n", "http_version"},
		{"HTTP/0.9", "GET /\r\nHost: a.example\r\n\r\n", "bad_request"},
		{"two spaces", "GET  / HTTP/1.1\r\nHost: a.example\r\n\r\n", "bad_request"},
		{"space in the target", "GET /a b HTTP/1.1\r\nHost: a.example\r\n\r\n", "bad_request"},
		{"tab in the request line", "GET\t/ HTTP/1.1\r\nHost: a.example\r\n\r\n", "bad_request"},
		{"too many fields", get + strings.Repeat("X: y\r\n", maxFields) + "\r\n", "head_too_large"},
		{"long head", get + "X: " + strings.Repeat("y", maxHead) + "\r\n\r\n", "head_too_large"},
		{"second one is bad", get + "\r\nGET / HTTP/1.1\n\n", "GET a.example |ambiguous_request"},

		{"chunk size empty", chunked + "\r\n0\r\n\r\n", "malformed"},
		{"chunk size with a sign", chunked + "+5\r\nhello\r\n0\r\n\r\n", "malformed"},
		{"chunk size 0x5", chunked + "0x5\r\nhello\r\n0\r\n\r\n", "malformed"},
		{"chunk size then a space", chunked + "5 \r\nhello\r\n0\r\n\r\n", "malformed"},
		{"chunk size overflows", chunked + "10000000000000005\r\nhello\r\n0\r\n\r\n", "malformed"},
		{"chunk size then LF", chunked + "5\nhello\r\n0\r\n\r\n", "malformed"},
		{"LF in an extension", chunked + "5;a\nb\r\nhello\r\n0\r\n\r\n", "malformed"},
		{"long extension", chunked + "5;" + strings.Repeat("a", maxChunkLine) + "\r\nhello\r\n0\r\n\r\n", "malformed"},
		{"chunk too long", chunked + "5\r\nhello!\r\n0\r\n\r\n", "malformed"},
		{"chunk ends in LF", chunked + "5\r\nhello\n0\r\n\r\n", "malformed"},
		{"trailer Content-Length", chunked + "0\r\nContent-Length: 5\r\n\r\n", "malformed"},
		{"trailer folded", chunked + "0\r\nX: y\r\n z\r\n\r\n", "malformed"},
		{"trailer with LF", chunked + "0\r\nX: y\nZ: z\r\n\r\n", "malformed"},
		{"long trailer", chunked + "0\r\nX: " + strings.Repeat("y", maxTrailer) + "\r\n\r\n", "malformed"},

		{"bytes after an upgrade request", get + "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\nGET /admin HTTP/1.1\r\n\r\n", "malformed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for how, in := range map[string]io.Reader{"at once": strings.NewReader(tt.in), "byte by byte": iotest.OneByteReader(strings.NewReader(tt.in)), "halves": iotest.HalfReader(strings.NewReader(tt.in))} {
				h := hear(in)
				got := h.refused
				if len(h.bodies) > 0 {
					got = strings.Join(h.bodies, "|") + "|" + h.refused
				}
				if h.broken {
					got = "malformed"
				} else if h.cut {
					t.Errorf("%s: cut", how)
				}
				if got != tt.want {
					t.Errorf("%s: %q, want %q", how, got, tt.want)
				}
			}
		})
	}
}

// Nobody knows what bytes are that come before the answer to a request for an
// upgrade.
func TestEarlyBytes(t *testing.T) {
	const ask = "GET / HTTP/1.1\r\nHost: a.example\r\nConnection: keep-alive, Upgrade\r\nUpgrade: x\r\n\r\n"
	near, far := net.Pipe()
	s := &Server{}
	s.setup()
	h := newHTTP1(s.web, far)
	go io.WriteString(near, ask)
	if refusal, err := h.next(); refusal != nil || err != nil || !h.head.upgrade {
		t.Fatal(refusal, err)
	}
	h.ask()
	h.look2()
	go io.WriteString(near, "\n\x00raw")
	<-h.Done()
	if h.Refusal() == nil {
		t.Error("not refused")
	}
	if _, _, err := h.Hijack(); err == nil {
		t.Error("upgraded")
	}
	near.Close()
	far.Close()

	near, far = net.Pipe()
	h = newHTTP1(s.web, far)
	go io.WriteString(near, ask)
	if refusal, err := h.next(); refusal != nil || err != nil {
		t.Fatal(refusal, err)
	}
	h.ask()
	h.look2() // and nothing comes
	c, rw, err := h.Hijack()
	if err != nil {
		t.Fatal(err)
	}
	go io.WriteString(near, "\n\x00raw")
	b := make([]byte, 5)
	if _, err := io.ReadFull(rw, b); err != nil || string(b) != "\n\x00raw" {
		t.Errorf("%q, %v", b, err)
	}
	near.Close()
	c.Close()

	// Who asked for no upgrade gets none.
	h = newHTTP1(s.web, onceConn{Reader: strings.NewReader("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")})
	if refusal, err := h.next(); refusal != nil || err != nil {
		t.Fatal(refusal, err)
	}
	h.ask()
	if _, _, err := h.Hijack(); err == nil {
		t.Error("upgraded without being asked")
	}
	h.asked()
}

// look2 begins to watch at once.
func (h *http1) look2() {
	h.watch.Stop()
	go h.look()
}

// Whatever is taken, net/http must read as the same requests, and no more of
// them.
func FuzzHTTP1AsNetHTTP(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /?x#y HTTP/1.1\r\nHost: a\r\nA: 1\r\nB: 2\r\na: 3\r\n\r\n",
		"POST /x%20y HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: A\r\n\r\n3;x\r\nabc\r\n0\r\nA: b\r\n\r\n",
		"GET http://A/ HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: b\r\n\r\n",
		"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n",
		"GET / HTTP/1.1\nHost: a\n\n",
	} {
		f.Add([]byte(s), 1)
		f.Add([]byte(s), 4096)
	}
	f.Fuzz(func(t *testing.T, in []byte, size int) {
		if size < 1 || size > 1<<16 {
			return
		}
		got := hear(&piecemeal{r: bytes.NewReader(in), n: size})
		br := bufio.NewReader(bytes.NewReader(in))
		for i, ours := range got.requests {
			theirs, err := http.ReadRequest(br)
			if err != nil {
				return // net/http refuses more in some places
			}
			body, err := io.ReadAll(theirs.Body)
			if err != nil {
				return
			}
			mine, err := io.ReadAll(ours.Body)
			if err != nil {
				t.Fatal(err)
			}
			if theirs.Header.Get("Pragma") == "no-cache" && len(ours.Header["Cache-Control"]) == 0 {
				delete(theirs.Header, "Cache-Control") // which net/http makes up
			}
			if ours.Method != theirs.Method || ours.Host != theirs.Host || ours.RequestURI != theirs.RequestURI || *ours.URL != *theirs.URL ||
				ours.ContentLength != theirs.ContentLength || ours.Proto != theirs.Proto || !bytes.Equal(mine, body) {
				t.Fatalf("request %d: %+v with %q, net/http %+v with %q", i, ours, mine, theirs, body)
			}
			if !reflect.DeepEqual(withoutFraming(ours.Header), withoutFraming(theirs.Header)) {
				t.Fatalf("request %d: %q, net/http %q", i, ours.Header, theirs.Header)
			}
			for name, values := range theirs.Trailer {
				if !slices.Equal(ours.Trailer[name], values) {
					t.Fatalf("request %d: trailer %q, net/http %q", i, ours.Trailer, theirs.Trailer)
				}
			}
		}
	})
}

// withoutFraming leaves out what says how long the body is.
func withoutFraming(h http.Header) http.Header {
	h = h.Clone()
	h.Del("Trailer")
	h.Del("Connection") // net/http takes "close" out
	return h
}
