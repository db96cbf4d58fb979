package ingress

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// filterOf runs input through a filter, in reads of the given reader's size.
func filterOf(in io.Reader) *filter {
	s := &Server{}
	s.setup()
	return newFilter(onceConn{Reader: in}, &visit{server: s})
}

// requests reads what came out of the filter as net/http's server would.
func requests(out []byte) (bodies []string, refused string, err error) {
	br := bufio.NewReader(bytes.NewReader(out))
	for {
		r, err := http.ReadRequest(br)
		if err == io.EOF {
			return bodies, "", nil
		}
		if err != nil {
			return bodies, "", err
		}
		if code := r.Header.Get(refusedField); code != "" {
			if _, err := br.ReadByte(); err != io.EOF {
				return bodies, code, errors.New("something follows a refused request")
			}
			return bodies, code, nil
		}
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return bodies, "", err
		}
		bodies = append(bodies, r.Method+" "+r.Host+" "+string(b))
	}
}

func TestFilter(t *testing.T) {
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
		{"forged refusal", get + "webgw-refused: bad_request\r\n\r\n", "bad_request"},
		{"forged refusal, underscore", get + "webgw_refused: bad_request\r\n\r\n", "ambiguous_request"},
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
				f := filterOf(in)
				out, ferr := io.ReadAll(f)
				bodies, refused, err := requests(out)
				got := refused
				if len(bodies) > 0 {
					got = strings.Join(bodies, "|") + "|" + refused
				}
				if f.Refusal() != nil {
					got = "malformed"
				} else if err != nil || ferr != nil && refused == "" {
					t.Errorf("%s: %v, %v", how, err, ferr)
				}
				if got != tt.want {
					t.Errorf("%s: %q, want %q", how, got, tt.want)
				}
			}
		})
	}
}

// An upgrade switches the filter off, and only one that was asked for does.
func TestFilterUpgrade(t *testing.T) {
	const ask = "GET / HTTP/1.1\r\nHost: a.example\r\nConnection: keep-alive, Upgrade\r\nUpgrade: x\r\n\r\n"
	near, far := net.Pipe()
	s := &Server{}
	s.setup()
	f := newFilter(far, &visit{server: s})
	if f.Upgrade() {
		t.Error("upgraded without being asked")
	}
	go io.WriteString(near, ask)
	b := make([]byte, 1000)
	if n, err := io.ReadFull(f, b[:len(ask)]); n != len(ask) || err != nil || !f.Asked() {
		t.Fatal(n, err, f.Asked())
	}
	// What net/http does while the handler runs, and stops when it hijacks.
	reading := make(chan error)
	go func() {
		_, err := f.Read(b[:1])
		reading <- err
	}()
	if !f.Upgrade() {
		t.Error("not upgraded")
	}
	f.SetReadDeadline(time.Unix(1, 0))
	var timeout net.Error
	if err := <-reading; !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Error(err)
	}
	f.SetReadDeadline(time.Time{})
	go io.WriteString(near, "\n\x00raw")
	if n, err := io.ReadFull(f, b[:5]); err != nil || string(b[:n]) != "\n\x00raw" {
		t.Errorf("%q, %v", b[:n], err)
	}
	near.Close()
	far.Close()

	f = filterOf(iotest.OneByteReader(strings.NewReader(ask + "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")))
	out := make([]byte, len(ask))
	if _, err := io.ReadFull(f, out); err != nil {
		t.Fatal(err)
	}
	f.Resume()
	rest, err := io.ReadAll(f)
	if bodies, refused, err2 := requests(rest); err != nil || err2 != nil || refused != "" || len(bodies) != 1 {
		t.Errorf("%q %q %v %v", bodies, refused, err, err2)
	}
}

// Whatever passes, net/http must read as the same number of requests, and all
// of it.
func FuzzFilterAsNetHTTP(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\nA: b\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: b\r\n\r\n",
		"GET / HTTP/1.1\nHost: a\n\n",
	} {
		f.Add([]byte(s), 1)
		f.Add([]byte(s), 4096)
	}
	f.Fuzz(func(t *testing.T, in []byte, size int) {
		if size < 1 || size > 1<<16 {
			return
		}
		flt := filterOf(bytes.NewReader(in))
		var out []byte
		buf := make([]byte, size)
		for {
			n, err := flt.Read(buf)
			out = append(out, buf[:n]...)
			if err != nil {
				break
			}
			if n == 0 {
				t.Fatal("nothing read and no error")
			}
		}
		if flt.Refusal() != nil {
			return // the connection ends inside a body
		}
		bodies, refused, err := requests(out)
		seen := len(bodies)
		if err != nil && flt.state != inHead && flt.state != inWait && flt.state != inEnd && errors.Is(err, io.ErrUnexpectedEOF) {
			seen++ // the input ends inside a body
		} else if err != nil {
			// net/http may refuse more than the filter; then nothing after it
			// reaches a handler. It must not find more.
			if seen > flt.seen {
				t.Fatal(fmt.Errorf("%d requests, the filter saw %d: %w", seen, flt.seen, err))
			}
			return
		}
		if seen != flt.seen {
			t.Fatalf("net/http reads %d requests, the filter saw %d (refused %q)", seen, flt.seen, refused)
		}
	})
}
