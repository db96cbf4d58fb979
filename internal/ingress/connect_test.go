package ingress

import (
	"bufio"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"webgw.dev/webgw"
)

// connectTo asks for a tunnel over plain HTTP or TLS.
func (w *world) connectTo(secure bool, host string, fields ...string) (*http.Response, *bufio.Reader, net.Conn) {
	w.t.Helper()
	var c net.Conn
	if secure {
		c = tls.Client(w.dial(w.tls), &tls.Config{RootCAs: w.roots, ServerName: "a.example", NextProtos: []string{"http/1.1"}})
	} else {
		c = w.dial(w.http)
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", host, host, strings.Join(fields, ""))
	r := bufio.NewReader(c)
	res, err := http.ReadResponse(r, &http.Request{Method: "CONNECT"})
	if err != nil {
		w.t.Fatal(err)
	}
	return res, r, c
}

func TestConnectLeadsToTheExposuresOwnTargets(t *testing.T) {
	ssh, page := echo(t, "SSH-2.0\n"), named(t, "page")
	d := ruled(web1("a", ssh), webgw.Rule{Match: webgw.Match{Prefix: "/"}, Targets: to(page)})
	d.Exposure.Connect = true
	w := start(t, nil, d, web1("closed", page), expose("vault", webgw.TLS, []string{"vault.example"}, page))
	for _, secure := range []bool{false, true} {
		for _, host := range []string{"a.example:443", "A.example:22"} {
			res, r, c := w.connectTo(secure, host)
			if res.StatusCode != 200 || res.Header.Get("X-Request-Id") == "" || len(res.TransferEncoding) > 0 || res.Header.Get("Content-Length") != "" {
				t.Errorf("%s: %v", host, res)
			}
			// It looks like HTTP, and is nobody's business any more.
			const said = "GET http://169.254.169.254/ HTTP/1.1\r\nHost: x\r\n\r\n"
			io.WriteString(c, said)
			c.(interface{ CloseWrite() error }).CloseWrite()
			if got, err := io.ReadAll(r); string(got) != "SSH-2.0\n"+said+"bye" || err != nil {
				t.Errorf("%s: %q, %v", host, got, err)
			}
		}
	}
	// Beside it, requests go as ever.
	if status, body, _ := get(t, w.client(true), "https://a.example/x"); status != 200 || !strings.HasPrefix(body, "page GET /x") {
		t.Errorf("%d %s", status, body)
	}
	// Nowhere else.
	for _, host := range []string{"closed.example:443", "unknown.example:443", "vault.example:443", "169.254.169.254:80", "localhost:22", "[::1]:22"} {
		if res, _, _ := w.connectTo(false, host); res.StatusCode != 405 {
			t.Errorf("CONNECT %s: %s", host, res.Status)
		}
	}
	if res, _, _ := w.connectTo(true, "closed.example:443"); res.StatusCode != 421 && res.StatusCode != 405 {
		t.Errorf("by another name's connection: %s", res.Status)
	}
	// A target that can't be reached: the connection still speaks HTTP.
	w.up.set(&w.up.down, ssh, true)
	res, _, c := w.connectTo(false, "a.example:443")
	body, _ := io.ReadAll(res.Body)
	if res.StatusCode != 503 {
		t.Errorf("unreachable: %s %s", res.Status, body)
	}
	c.Close()

	// Bytes before the answer are not taken for anything.
	w.up.set(&w.up.down, ssh, false)
	if got := w.raw(w.http, "CONNECT closed.example:443 HTTP/1.1\r\nHost: closed.example:443\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: closed.example\r\n\r\n"); strings.Contains(got, "smuggled") {
		t.Errorf("smuggled: %s", got)
	}

	// As old clients ask.
	for _, host := range []string{"", "Host: a.example:22\r\n"} {
		c := w.dial(w.http)
		c.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintf(c, "CONNECT a.example:22 HTTP/1.0\r\n%s\r\n", host)
		r := bufio.NewReader(c)
		if res, err := http.ReadResponse(r, &http.Request{Method: "CONNECT"}); err != nil || res.StatusCode != 200 {
			t.Fatalf("HTTP/1.0: %v, %v", res, err)
		}
		io.WriteString(c, "x")
		c.CloseWrite()
		if got, err := io.ReadAll(r); string(got) != "SSH-2.0\nxbye" || err != nil {
			t.Errorf("HTTP/1.0: %q, %v", got, err)
		}
	}

	w.Shutdown(t.Context()) // by then all is told
	n := 0
	for _, a := range w.accesses() {
		if a.Method == "CONNECT" && a.Status == 200 && a.BytesOut > 0 && a.Target.Address == ssh {
			n++
		}
	}
	if n != 6 {
		t.Errorf("%d tunnels in the access log", n)
	}
}

func TestConnectUnderAPolicy(t *testing.T) {
	ssh := echo(t, "SSH-2.0\n")
	d := web1("a", ssh)
	d.Exposure.Connect = true
	d.Exposure.Policy = &webgw.Policy{BasicAuth: &webgw.BasicAuth{Users: []webgw.User{{Name: "ann", Hash: bcryptSecret}}}}
	w := start(t, nil, d)
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("ann:secret")) + "\r\n"
	for _, tt := range []struct {
		name   string
		secure bool
		fields []string
		status int
	}{
		{"in clear text", false, []string{"Proxy-Authorization: " + basic}, 308},
		{"nobody", true, nil, 401},
		{"wrong", true, []string{"Proxy-Authorization: Basic YTpi\r\n"}, 401},
		{"as to a proxy", true, []string{"Proxy-Authorization: " + basic}, 200},
		{"as to a server", true, []string{"Authorization: " + basic}, 200},
	} {
		if res, _, _ := w.connectTo(tt.secure, "a.example:22", tt.fields...); res.StatusCode != tt.status {
			t.Errorf("%s: %s, want %d", tt.name, res.Status, tt.status)
		}
	}
	changed := *d.Exposure
	changed.Policy = &webgw.Policy{Deny: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}
	w.use(Declared{d.Key, &changed})
	if res, _, _ := w.connectTo(true, "a.example:22"); res.StatusCode != 403 {
		t.Errorf("denied by address: %s", res.Status)
	}
}
