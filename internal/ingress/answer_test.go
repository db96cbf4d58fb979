package ingress

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"reflect"
	"strings"
	"testing"
)

// plainly reads an answer as plainAnswer does; nil: it does not.
func plainly(in []byte, method string) (*http.Response, *bufio.Reader) {
	br := bufio.NewReader(bytes.NewReader(in))
	br.Peek(1) // what there is, or nothing
	c := &workloadConn{r: br}
	return c.plainAnswer(method), br
}

// The usual answers take the short way, and only they.
func TestPlainAnswer(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\n"
	for in, want := range map[string]bool{
		head + "Content-Length: 2\r\n\r\nok":                                    true,
		head + "content-length: 0\r\nA: b\r\nA: c\r\nConnection: close\r\n\r\n": true,
		"HTTP/1.1 404\r\nContent-Length: 0\r\n\r\n":                             true,
		"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n":                          false,
		"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n":                         false,
		"HTTP/1.1 +20 OK\r\nContent-Length: 0\r\n\r\n":                          false,
		"HTTP/1.1 101 Switching\r\nContent-Length: 0\r\n\r\n":                   false,
		"HTTP/1.1 204 No\r\nContent-Length: 0\r\n\r\n":                          false,
		head + "\r\n":                  false,
		head + "Content-Length: 2\r\n": false,
		head + "Content-Length: 2\r\nContent-Length: 2\r\n\r\nok":          false,
		head + "Content-Length: +2\r\n\r\nok":                              false,
		head + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok": false,
		head + "Content-Length: 2\r\nTrailer: a\r\n\r\nok":                 false,
		head + "Content-Length: 2\r\nA: b\nC: d\r\n\r\nok":                 false,
		head + "Content-Length: 2\r\nA: b\r\n c\r\n\r\nok":                 false,
	} {
		if res, _ := plainly([]byte(in), "GET"); (res != nil) != want {
			t.Errorf("%q: %v", in, res)
		}
	}
}

// What takes the short way, net/http reads in the same way.
func FuzzPlainAnswer(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\na: b\r\nA: \xe4\r\n\r\nokHTTP"), false)
	f.Add([]byte("HTTP/1.1 500\r\nContent-Length: 20\r\nVary: x\r\n\r\nok"), true)
	f.Fuzz(func(t *testing.T, in []byte, head bool) {
		method := "GET"
		if head {
			method = "HEAD"
		}
		got, br := plainly(in, method)
		if got == nil {
			return
		}
		theirs := bufio.NewReader(bytes.NewReader(in))
		want, err := http.ReadResponse(theirs, &http.Request{Method: method})
		if err != nil {
			t.Fatal(err)
		}
		if len(want.Header["Cache-Control"]) > 0 && len(got.Header["Cache-Control"]) == 0 && got.Header.Get("Pragma") == "no-cache" {
			delete(want.Header, "Cache-Control") // which net/http makes up
		}
		fields := got.Header.Clone()
		if strings.Contains(strings.ToLower(strings.Join(fields["Connection"], ",")), "close") {
			delete(fields, "Connection") // net/http may take it out
			delete(want.Header, "Connection")
		}
		if got.StatusCode != want.StatusCode || got.ContentLength != want.ContentLength || got.Close != want.Close || !reflect.DeepEqual(fields, want.Header) {
			t.Fatalf("%+v, net/http %+v", got, want)
		}
		b1, err1 := io.ReadAll(got.Body)
		b2, err2 := io.ReadAll(want.Body)
		if !bytes.Equal(b1, b2) || (err1 == nil) != (err2 == nil) {
			t.Fatalf("%q %v, net/http %q %v", b1, err1, b2, err2)
		}
		if err1 != nil {
			return
		}
		rest1, err1 := io.ReadAll(br)
		rest2, err2 := io.ReadAll(theirs)
		if !bytes.Equal(rest1, rest2) || err1 != err2 {
			t.Fatalf("%q follows, net/http %q", rest1, rest2)
		}
	})
}

// What an interim answer says of a length says nothing of the final one.
func TestInterimAnswersHaveNoLength(t *testing.T) {
	at := rude(t, "HTTP/1.1 103 Early Hints\r\nContent-Length: 3\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
	w := start(t, nil, web1("a", at))
	for _, h2 := range []bool{false, true} {
		if status, body, _ := get(t, w.client(h2), "https://a.example/"); status != 200 || body != "hello" {
			t.Errorf("h2 %v: %d %q", h2, status, body)
		}
	}
}
