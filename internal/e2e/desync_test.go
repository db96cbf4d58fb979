//go:build linux

package e2e

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// seenRequest is a request as the workload logged it.
type seenRequest struct {
	method, uri, host, from, status, body string
	cut                                   bool // the workload did not get all of it
}

// witness is a workload whose log tells every request that it saw. It answers
// with the request's target in X-Path.
type witness struct {
	addr string
	log  func() string
	line *regexp.Regexp // the fields of seenRequest, in order
	cut  *regexp.Regexp // lines of requests that were not complete
	body func(string) string
	read int // lines that were read already
}

var hexEscape = regexp.MustCompile(`\\x[0-9A-F]{2}`)

func nginx(t *testing.T) *witness {
	need(t, "nginx")
	dir := t.TempDir()
	port := freePort(t)
	config := fmt.Sprintf(`daemon off; master_process off; pid %[1]s/pid; error_log stderr;
events {}
http {
  log_format seen '$request_method $request_uri host=$host from=$http_x_forwarded_for status=$status body="$request_body"';
  client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  client_body_buffer_size 1m; client_body_in_single_buffer on;
  server { listen 127.0.0.1:%[2]d; access_log %[1]s/seen seen; location / { proxy_pass http://unix:%[1]s/inner; } }
  server { listen unix:%[1]s/inner; access_log off; location / { add_header X-Path $request_uri always; return 200 "seen\n"; } }
}`, dir, port)
	if err := os.WriteFile(dir+"/nginx.conf", []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	start(t, nil, "nginx", "-p", dir, "-e", "stderr", "-c", dir+"/nginx.conf")
	log := func() string {
		b, err := os.ReadFile(filepath.Join(dir, "seen"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		return string(b)
	}
	unescape := func(s string) string {
		if s == "-" {
			return ""
		}
		return hexEscape.ReplaceAllStringFunc(s, func(e string) string {
			b, _ := hex.DecodeString(e[2:]) // the expression takes nothing else
			return string(b)
		})
	}
	return &witness{addr: fmt.Sprintf("127.0.0.1:%d", port), log: log, body: unescape,
		line: regexp.MustCompile(`^(\S+) (\S+) host=(\S*) from=(.*) status=(\d+) body="(.*)"$`), cut: regexp.MustCompile(` status=4\d\d `)}
}

func haproxy(t *testing.T) *witness {
	need(t, "haproxy")
	dir := t.TempDir()
	port := freePort(t)
	config := fmt.Sprintf(`global
  nbthread 1
  log stdout format raw local0
defaults
  mode http
  timeout client 20s
  timeout server 20s
  timeout connect 5s
frontend seen
  bind 127.0.0.1:%[1]d
  log global
  log-format "seen %%[var(txn.method)] %%[var(txn.uri)] host=%%[var(txn.host)] from=%%[var(txn.from)] status=%%ST body=%%[var(txn.body)] ts=%%ts"
  http-request wait-for-body time 5s
  http-request set-var(txn.method) method
  http-request set-var(txn.uri) path
  http-request set-var(txn.host) req.hdr(Host)
  http-request set-var(txn.from) req.hdr(X-Forwarded-For)
  http-request set-var(txn.body) req.body,hex
  default_backend inner
backend inner
  server inner unix@%[2]s/inner
frontend answers
  bind unix@%[2]s/inner
  http-request wait-for-body time 5s
  http-request return status 200 content-type text/plain string "seen" hdr X-Path %%[path]
`, port, dir)
	if err := os.WriteFile(dir+"/haproxy.cfg", []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	p := start(t, nil, "haproxy", "-db", "-f", dir+"/haproxy.cfg")
	log := func() string {
		var b strings.Builder
		for line := range strings.Lines(p.out.String()) {
			if line, ok := strings.CutPrefix(line, "seen "); ok {
				b.WriteString(line)
			}
		}
		return b.String()
	}
	return &witness{addr: fmt.Sprintf("127.0.0.1:%d", port), log: log,
		body: func(s string) string {
			if s == "-" {
				return ""
			}
			b, err := hex.DecodeString(s)
			if err != nil {
				t.Errorf("body %q: %v", s, err)
			}
			return string(b)
		},
		line: regexp.MustCompile(`^(\S+) (\S+) host=(\S*) from=(.*) status=(-?\d+) body=(\S*) ts=\S+$`), cut: regexp.MustCompile(` ts=C`)}
}

// until returns what was seen since the last call, up to the request for uri.
func (w *witness) until(t *testing.T, uri string) (all []seenRequest) {
	t.Helper()
	waitFor(t, uri+" in the workload's log", func() error {
		all = nil
		lines := strings.SplitAfter(w.log(), "\n")
		for i := w.read; i < len(lines) && strings.HasSuffix(lines[i], "\n"); i++ {
			line := strings.TrimSuffix(lines[i], "\n")
			m := w.line.FindStringSubmatch(line)
			if m == nil {
				m = []string{"", "", "unreadable: " + line, "", "", "", ""}
			}
			path, _, _ := strings.Cut(m[2], "%")
			r := seenRequest{m[1], path, m[3], m[4], m[5], w.body(m[6]), w.cut.MatchString(line)}
			if r.uri == uri {
				w.read = i + 1
				return nil
			}
			all = append(all, r)
		}
		return fmt.Errorf("seen: %+v", all)
	})
	return all
}

// What becomes of a request.
const (
	refused = "\x00refused" // the workload sees nothing of it
	cut     = "\x00cut"     // it turns out bad when the workload has its head: the workload never has all of it
	bare    = "\x00bare"    // what follows the head is bad: the workload may have the request, without a body
)

func bad(want string) bool { return want == refused || want == cut || want == bare }

const smuggled = "GET /smuggled HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n"

// desyncs are requests over HTTP/1 that readers are known to understand in
// different ways. HOST stands for the name.
var desyncs = []struct {
	name, in string
	want     string // refused, cut, or the body that the workload gets
}{
	{"a request in a body", "POST /CASE HTTP/1.1\r\nHost: HOST\r\nContent-Length: " + fmt.Sprint(len(smuggled)) + "\r\n\r\n" + smuggled, smuggled},
	{"a request in a chunk", chunkedCase("", fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(smuggled), smuggled)), smuggled},
	{"a request in the body of a GET", "GET /CASE HTTP/1.1\r\nHost: HOST\r\nContent-Length: " + fmt.Sprint(len(smuggled)) + "\r\n\r\n" + smuggled, smuggled},
	{"a length that is hop-by-hop", "POST /CASE HTTP/1.1\r\nHost: HOST\r\nConnection: Content-Length\r\nContent-Length: " + fmt.Sprint(len(smuggled)) + "\r\n\r\n" + smuggled, smuggled},
	{"an encoding that is hop-by-hop", chunkedCase("Connection: Transfer-Encoding, Host, X-Forwarded-For\r\nX-Forwarded-For: 6.6.6.6\r\n", "2\r\nhi\r\n0\r\n\r\n"), "hi"},
	{"tab before chunked", postCase("Transfer-Encoding:\tchunked\r\n", "2\r\nhi\r\n0\r\n\r\n"), "hi"},
	{"chunk extension", chunkedCase("", "2;a=\"b\"\r\nhi\r\n0;c\r\nX: y\r\n\r\n"), "hi"},
	{"zeros before the size", chunkedCase("", "0002\r\nhi\r\n000\r\n\r\n"), "hi"},

	{"CL.TE", postCase("Content-Length: 100\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE.CL", postCase("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", "5c\r\n"+smuggled+"\r\n0\r\n\r\n"), refused},
	{"TE.TE: twice", postCase("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE.TE: xchunked", postCase("Transfer-Encoding: xchunked\r\nContent-Length: 3\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE.TE: chunked, identity", postCase("Transfer-Encoding: chunked, identity\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE.TE: identity, chunked", postCase("Transfer-Encoding: identity, chunked\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE.TE: quoted", postCase("Transfer-Encoding: \"chunked\"\r\nContent-Length: 3\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE.TE: space before the colon", postCase("Transfer-Encoding : chunked\r\nContent-Length: 3\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE.TE: vertical tab", postCase("Transfer-Encoding:\vchunked\r\nContent-Length: 3\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE.TE: NUL", postCase("Transfer-Encoding: chunked\x00\r\nContent-Length: 3\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE.TE: behind a bare LF", postCase("X: y\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE.TE: behind a bare CR", postCase("X: y\rTransfer-Encoding: chunked\r\nContent-Length: 3\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE.TE: folded", postCase("Transfer-Encoding:\r\n chunked\r\nContent-Length: 3\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE.TE: underscore", postCase("Transfer_Encoding: chunked\r\nContent-Length: 3\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE.TE: empty", postCase("Transfer-Encoding:\r\nContent-Length: 3\r\n", "0\r\n\r\n"+smuggled), refused},
	{"TE in HTTP/1.0", "POST /CASE HTTP/1.0\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, refused},

	{"two lengths", postCase("Content-Length: 0\r\nContent-Length: 60\r\n", smuggled), refused},
	{"a list of lengths", postCase("Content-Length: 0, 60\r\n", smuggled), refused},
	{"a length with a sign", postCase("Content-Length: +2\r\n", "hi"), refused},
	{"a length in hex", postCase("Content-Length: 0x2\r\n", "hi"), refused},
	{"a length with a space in it", postCase("Content-Length: 0 2\r\n", "hi"), refused},
	{"a length that overflows", postCase("Content-Length: 18446744073709551618\r\n", "hi"), refused},
	{"a length with an underscore", postCase("Content_Length: 60\r\n", smuggled), refused},
	{"a length behind NUL", postCase("X: \x00\r\nContent-Length: 2\r\n", "hi"), refused},

	{"chunk size 0x2", chunkedCase("", "0x2\r\nhi\r\n0\r\n\r\n"+smuggled), cut},
	{"chunk size that overflows", chunkedCase("", "10000000000000002\r\nhi\r\n0\r\n\r\n"+smuggled), cut},
	{"chunk size that ends in LF", chunkedCase("", "2\nhi\r\n0\r\n\r\n"+smuggled), cut},
	{"LF in a chunk extension", chunkedCase("", "2;\nxx\r\n10\r\nhi\r\n0\r\n\r\n"+smuggled), cut},
	{"chunk that ends in something else", chunkedCase("", "2\r\nhiXX0\r\n\r\n"+smuggled), cut},
	{"chunk that ends in LF", chunkedCase("", "2\r\nhi\n0\r\n\r\n"+smuggled), cut},
	{"negative chunk size", chunkedCase("", "-2\r\nhi\r\n0\r\n\r\n"+smuggled), cut},
	{"a length in the trailer", chunkedCase("", "2\r\nhi\r\n0\r\nContent-Length: 60\r\n\r\n"+smuggled), cut},

	{"obs-fold", getCase("X: y\r\n z\r\n"), refused},
	{"obs-fold of the first field", "GET /CASE HTTP/1.1\r\n Host: HOST\r\nHost: HOST\r\n\r\n", refused},
	{"bare LF everywhere", "GET /CASE HTTP/1.1\nHost: HOST\n\n", refused},
	{"bare LF ends the head", "GET /CASE HTTP/1.1\r\nHost: HOST\r\nX: y\r\n\n" + smuggled, refused},
	{"bare CR in a value", getCase("X: y\r\r\n"), refused},
	{"CR in the request line", "GET /CASE\r HTTP/1.1\r\nHost: HOST\r\n\r\n", refused},
	{"an empty line first", "\r\nGET /CASE HTTP/1.1\r\nHost: HOST\r\n\r\n", refused},

	{"two Hosts", getCase("Host: HOST\r\n"), refused},
	{"another Host", getCase("Host: b.example\r\n"), refused},
	{"Host in a list", "GET /CASE HTTP/1.1\r\nHost: HOST, b.example\r\n\r\n", refused},
	{"Host with a user", "GET /CASE HTTP/1.1\r\nHost: b.example@HOST\r\n\r\n", refused},
	{"Host with a path", "GET /CASE HTTP/1.1\r\nHost: HOST/b\r\n\r\n", refused},
	{"Host with a bad port", "GET /CASE HTTP/1.1\r\nHost: HOST:80b\r\n\r\n", refused},
	{"no Host", "GET /CASE HTTP/1.1\r\n\r\n", refused},
	{"absolute form", "GET http://HOST/CASE HTTP/1.1\r\nHost: HOST\r\n\r\n", ""},
	{"absolute form of another", "GET http://b.example/CASE HTTP/1.1\r\nHost: HOST\r\n\r\n", refused},
	{"absolute form, another Host", "GET http://HOST/CASE HTTP/1.1\r\nHost: b.example\r\n\r\n", refused},
	{"absolute form with a user", "GET http://b.example@HOST/CASE HTTP/1.1\r\nHost: HOST\r\n\r\n", refused},

	{"NUL in a value", getCase("X: a\x00b\r\n"), refused},
	{"NUL in a name", getCase("X\x00: y\r\n"), refused},
	{"NUL in the target", "GET /CASE\x00 HTTP/1.1\r\nHost: HOST\r\n\r\n", refused},
	{"high bytes in a value", getCase("X: \xff\x80\xc0\xae\r\n"), ""},
	{"high bytes in a name", getCase("X\xff: y\r\n"), refused},
	{"high bytes in the target", "GET /CASE\xff\x80 HTTP/1.1\r\nHost: HOST\r\n\r\n", ""},
	{"two versions", "GET /CASE HTTP/1.1 HTTP/1.1\r\nHost: HOST\r\n\r\n", refused},
	{"a tab for a space", "GET\t/CASE\tHTTP/1.1\r\nHost: HOST\r\n\r\n", refused},
	{"no version", "GET /CASE\r\nHost: HOST\r\n\r\n", refused},

	{"a request behind an upgrade that is not answered", getCase("Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n") + smuggled, bare},
	{"an upgrade that does not happen", getCase("Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 777\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"), ""},
	{"an upgrade with a body that does not happen", postCase("Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 2\r\n", "hi"), "hi"},
	{"h2c", getCase("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"), ""},
}

func getCase(fields string) string { return "GET /CASE HTTP/1.1\r\nHost: HOST\r\n" + fields + "\r\n" }
func postCase(fields, body string) string {
	return "POST /CASE HTTP/1.1\r\nHost: HOST\r\n" + fields + "\r\n" + body
}
func chunkedCase(fields, body string) string {
	return postCase(fields+"Transfer-Encoding: chunked\r\n", body)
}

func TestDesync(t *testing.T) {
	for name, workload := range map[string]func(*testing.T) *witness{"nginx": nginx, "haproxy": haproxy} {
		t.Run(name, func(t *testing.T) {
			w := workload(t)
			waitFor(t, name, func() error { return dialable(w.addr) })
			g := startGateway(t)
			g.startNode()
			host := g.exposeHTTP("desync", w.addr)
			desync{t, g, w, host, "/"}.judge("") // what has been there before
			for i, c := range desyncs {
				t.Run(c.name, func(t *testing.T) {
					d := desync{t, g, w, host, fmt.Sprintf("/case-%d", i)}
					d.http1(c.in, c.want)
					d.judge(c.want)
				})
			}
			for i, c := range downgrades {
				t.Run("HTTP/2 "+c.name, func(t *testing.T) {
					d := desync{t, g, w, host, fmt.Sprintf("/case-h2-%d", i)}
					d.http2(c.fields, c.data, c.trailer, c.want)
					d.judge(c.want)
				})
			}
		})
	}
}

type desync struct {
	*testing.T
	g    *grid
	w    *witness
	host string
	path string // of the case's own request
}

// fill puts the case's names into its text.
func (d desync) fill(s string) string {
	return strings.NewReplacer("HOST", d.host, "/CASE", d.path).Replace(s)
}

// http1 sends the request, and sees that it gets one answer and the right one.
func (d desync) http1(in, want string) {
	d.Helper()
	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", d.g.httpPort))
	if err == nil {
		defer c.Close()
		err = c.SetDeadline(time.Now().Add(10 * time.Second))
	}
	if err == nil {
		_, err = io.WriteString(c, d.fill(in))
	}
	if err != nil {
		d.Fatal(err)
	}
	r := bufio.NewReader(c)
	if bad(want) {
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			if want != refused && !isTimeout(err) {
				return
			}
			d.Fatal(err)
		}
		if want == bare && res.Header.Get("X-Path") == d.path {
			return // the workload was faster
		}
		if res.StatusCode < 400 || res.StatusCode > 499 || res.Header.Get("Webgw-Error") == "" {
			d.Errorf("answered %s from %q, want a refusal by the gateway", res.Status, res.Header.Get("X-Path"))
		}
		io.Copy(io.Discard, res.Body) // where it ends is shown by the next read
		if b, err := io.ReadAll(r); len(b) > 0 || isTimeout(err) {
			d.Errorf("after the refusal came %q, %v", b, err)
		}
		return
	}
	d.answered(r, d.path)
	if _, err := io.WriteString(c, "GET /next HTTP/1.1\r\nHost: "+d.host+"\r\nX-Forwarded-For: 6.6.6.6\r\nConnection: close\r\n\r\n"); err != nil {
		d.Fatal(err)
	}
	d.answered(r, "/next")
	if b, err := io.ReadAll(r); len(b) > 0 || err != nil {
		d.Errorf("after the answers came %q, %v", b, err)
	}
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

func (d desync) answered(r *bufio.Reader, path string) {
	d.Helper()
	res, err := http.ReadResponse(r, nil)
	if err == nil {
		_, err = io.Copy(io.Discard, res.Body)
	}
	if err != nil {
		d.Fatal(err)
	}
	if got, _, _ := strings.Cut(res.Header.Get("X-Path"), "%"); res.StatusCode != 200 || got != path {
		d.Fatalf("answered %s %s for %q, want 200 for %q", res.Status, res.Header.Get("Webgw-Error"), got, path)
	}
}

// judge asks once more from elsewhere, by which the workload's log is complete,
// and looks at what the workload saw.
func (d desync) judge(want string) {
	d.Helper()
	end := "/end-of" + d.path
	req, err := http.NewRequestWithContext(d.Context(), "GET", fmt.Sprintf("http://127.0.0.1:%d%s", d.g.httpPort, end), nil)
	if err != nil {
		d.Fatal(err)
	}
	req.Host = d.host
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		d.Fatal(err)
	}
	defer res.Body.Close()
	if got := res.Header.Get("X-Path"); res.StatusCode != 200 || got != end {
		d.Errorf("the next visitor was answered %s for %q, want 200 for %q", res.Status, got, end)
	}
	seen := d.w.until(d.T, end)
	if d.path == "/" {
		return
	}
	// That a request was cut may be logged late.
	seen = slices.DeleteFunc(seen, func(r seenRequest) bool {
		return r.cut && strings.HasPrefix(r.uri, "/case-") && (want == cut || want == bare || r.uri != d.path)
	})
	if want == bare && len(seen) == 0 {
		return
	}
	if want == bare {
		want = ""
	}
	if bad(want) {
		if len(seen) > 0 {
			d.Errorf("the workload saw %+v, want nothing", seen)
		}
		return
	}
	if n := len(seen); n > 0 && seen[n-1].uri == "/next" {
		if seen[n-1].from != "127.0.0.1" {
			d.Errorf("the next request came from %q", seen[n-1].from)
		}
		seen = seen[:n-1]
	}
	if len(seen) != 1 {
		d.Fatalf("the workload saw %+v, want one request", seen)
	}
	if r := seen[0]; r.uri != d.path || r.host != d.host || r.from != "127.0.0.1" || r.status != "200" || r.body != want {
		d.Errorf("the workload saw %+v, want /CASE of %s with body %q", r, d.host, want)
	}
}

// downgrades are requests over HTTP/2 that would be others over HTTP/1.
var downgrades = []struct {
	name    string
	fields  [][2]string // beyond, or instead of, those of a GET or POST
	data    string
	trailer [][2]string
	want    string
}{
	{"a request in the data", nil, smuggled, nil, smuggled},
	{"the right length", [][2]string{{"content-length", fmt.Sprint(len(smuggled))}}, smuggled, nil, smuggled},
	{"length 0", [][2]string{{"content-length", "0"}}, smuggled, nil, bare},
	{"a shorter length", [][2]string{{"content-length", "2"}}, smuggled, nil, cut},
	{"a longer length", [][2]string{{"content-length", "1000"}}, smuggled, nil, cut},
	{"a length and no data", [][2]string{{"content-length", "60"}}, "", nil, refused},
	{"two lengths", [][2]string{{"content-length", "2"}, {"content-length", "60"}}, "hi", nil, refused},
	{"a length that is none", [][2]string{{"content-length", "2\r\nx: y"}}, "hi", nil, refused},
	{"transfer-encoding", [][2]string{{"transfer-encoding", "chunked"}}, "0\r\n\r\n" + smuggled, nil, refused},
	{"transfer_encoding", [][2]string{{"transfer_encoding", "chunked"}}, "0\r\n\r\n" + smuggled, nil, "0\r\n\r\n" + smuggled},
	{"connection", [][2]string{{"connection", "upgrade"}, {"upgrade", "websocket"}}, "", nil, refused},
	{"CRLF in a value", [][2]string{{"x", "y\r\nTransfer-Encoding: chunked"}}, "0\r\n\r\n" + smuggled, nil, refused},
	{"LF in a value", [][2]string{{"x", "y\ntransfer-encoding: chunked"}}, "0\r\n\r\n" + smuggled, nil, refused},
	{"two lines in a value", [][2]string{{"x", "y\r\n\r\n" + smuggled}}, "", nil, refused},
	{"NUL in a value", [][2]string{{"x", "a\x00b"}}, "", nil, refused},
	{"CRLF in a name", [][2]string{{"x: y\r\ntransfer-encoding", "chunked"}}, "0\r\n\r\n" + smuggled, nil, refused},
	{"colon in a name", [][2]string{{"transfer-encoding: chunked\r\nx", "y"}}, "0\r\n\r\n" + smuggled, nil, refused},
	{"capitals in a name", [][2]string{{"X-Y", "z"}}, "", nil, refused},
	{"space in a name", [][2]string{{"transfer-encoding ", "chunked"}}, "", nil, refused},
	{"high bytes in a value", [][2]string{{"x", "\xff\x80"}}, "", nil, ""},
	{"a request in the path", [][2]string{{":path", "/CASE HTTP/1.1\r\nHost: a\r\n\r\n" + smuggled}}, "", nil, refused},
	{"a space in the path", [][2]string{{":path", "/CASE HTTP/1.1"}}, "", nil, refused},
	{"a request in the method", [][2]string{{":method", "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\nGET"}}, "", nil, refused},
	{"a space in the method", [][2]string{{":method", "GET /smuggled"}}, "", nil, refused},
	{"CRLF in the authority", [][2]string{{":authority", "HOST\r\nX: y"}}, "", nil, refused},
	{"a request in the scheme", [][2]string{{":scheme", "http://HOST/smuggled HTTP/1.1\r\nX: y"}}, "", nil, refused},
	{"another host", [][2]string{{"host", "b.example"}}, "", nil, refused},
	{"two hosts", [][2]string{{"host", "HOST"}, {"host", "b.example"}}, "", nil, refused},
	{"a pseudo field after others", [][2]string{{"x", "y"}, {":path", "/smuggled"}}, "", nil, refused},
	{"transfer-encoding in the trailer", nil, "hi", [][2]string{{"transfer-encoding", "chunked"}}, cut},
	{"CRLF in the trailer", nil, "hi", [][2]string{{"x", "y\r\n\r\n" + smuggled}}, cut},
}

// http2 sends one request, and sees that it gets the right answer, or none.
func (d desync) http2(fields [][2]string, data string, trailer [][2]string, want string) {
	d.Helper()
	config := insecure(d.host)
	config.NextProtos = []string{"h2"}
	c, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", d.g.tlsPort), config)
	if err == nil {
		defer c.Close()
		err = c.SetDeadline(time.Now().Add(10 * time.Second))
	}
	if err == nil {
		_, err = io.WriteString(c, http2.ClientPreface)
	}
	if err != nil {
		d.Fatal(err)
	}
	f := http2.NewFramer(c, c)
	f.AllowIllegalWrites = true
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	encode := func(fields [][2]string) []byte {
		block.Reset()
		for _, h := range fields {
			encoder.WriteField(hpack.HeaderField{Name: h[0], Value: d.fill(h[1])}) // a buffer never fails
		}
		return block.Bytes()
	}
	method := "GET"
	if data != "" {
		method = "POST"
	}
	all := [][2]string{{":method", method}, {":scheme", "https"}, {":authority", "HOST"}, {":path", "/CASE"}}
	for _, h := range fields {
		replaced := false
		for i := range all[:4] {
			if all[i][0] == h[0] && len(all) == 4 {
				all[i], replaced = h, true
			}
		}
		if !replaced {
			all = append(all, h)
		}
	}
	err = errors.Join(f.WriteSettings(), f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: encode(all), EndHeaders: true, EndStream: data == "" && trailer == nil}))
	if data != "" {
		err = errors.Join(err, f.WriteData(1, trailer == nil, []byte(data)))
	}
	if trailer != nil {
		err = errors.Join(err, f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: encode(trailer), EndHeaders: true, EndStream: true}))
	}
	if err != nil && !bad(want) { // else the gateway may have closed already
		d.Fatal(err)
	}
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			if isTimeout(err) || !bad(want) {
				d.Errorf("no answer: %v", err)
			}
			return
		}
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			status, path, refusal := frame.PseudoValue("status"), "", ""
			for _, h := range frame.RegularFields() {
				switch h.Name {
				case "x-path":
					path = h.Value
				case "webgw-error":
					refusal = h.Value
				}
			}
			if bad(want) && refusal == "" && want != bare || !bad(want) && (status != "200" || path != d.path) {
				d.Errorf("answered %s for %q, %q", status, path, refusal)
			}
			return
		case *http2.RSTStreamFrame:
			if !bad(want) {
				d.Errorf("reset: %v", frame.ErrCode)
			}
			return
		case *http2.GoAwayFrame:
			if !bad(want) {
				d.Errorf("sent away: %v", frame.ErrCode)
			}
			return
		}
	}
}
