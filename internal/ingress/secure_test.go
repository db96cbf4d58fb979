package ingress

import (
	"bufio"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
)

// tlsSite runs a workload behind TLS with a certificate for *.example that
// tells how it was spoken to; dials counts connections.
func tlsSite(t testing.TB, cert *tls.Certificate, h2 bool) (at string, dials *atomic.Int64) {
	t.Helper()
	dials = new(atomic.Int64)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "echo" {
			c, rw, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
			io.Copy(c, rw)
			return
		}
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "HTTP/%d %s %s %s", r.ProtoMajor, r.TLS.ServerName, r.Host, body)
	}))
	s.EnableHTTP2 = h2
	s.TLS = &tls.Config{Certificates: []tls.Certificate{*cert}}
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			dials.Add(1)
		}
	}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String(), dials
}

func pinOf(c *tls.Certificate) string {
	sum := sha256.Sum256(c.Leaf.RawSubjectPublicKeyInfo)
	return base64.StdEncoding.EncodeToString(sum[:])
}

func pemOf(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

func TestHTTPOverTLSToWorkloads(t *testing.T) {
	cert, other := certificate(t), certificate(t)
	both, dials := tlsSite(t, cert, true)
	only1, _ := tlsSite(t, cert, false)
	clear := site(t, func(http.ResponseWriter, *http.Request) {})
	authority, pin, another := pemOf(cert.Leaf), pinOf(cert), pinOf(other)
	for _, tt := range []struct {
		name     string
		at       string
		upstream webgw.Upstream
		tls      webgw.UpstreamTLS
		want     string // of the answer
		says     string // of the problem, when there is none
	}{
		{"by an authority", both, "", webgw.UpstreamTLS{CA: authority, ServerName: "back.example"}, "HTTP/1 back.example a.example", ""},
		{"by a pinned key", both, "", webgw.UpstreamTLS{Pins: []string{another, pin}}, "HTTP/1 ", ""},
		{"by both", only1, webgw.UpstreamHTTP1, webgw.UpstreamTLS{CA: authority, ServerName: "back.example", Pins: []string{pin}}, "HTTP/1 back.example", ""},
		{"over HTTP/2", both, webgw.UpstreamH2, webgw.UpstreamTLS{CA: authority, ServerName: "back.example"}, "HTTP/2 back.example a.example", ""},
		{"HTTP/2 by a pinned key", both, webgw.UpstreamH2, webgw.UpstreamTLS{Pins: []string{pin}}, "HTTP/2 ", ""},
		{"by the system", both, "", webgw.UpstreamTLS{ServerName: "back.example"}, "", "not by an authority that the gateway's system trusts"},
		{"by another authority", both, "", webgw.UpstreamTLS{CA: pemOf(other.Leaf), ServerName: "back.example"}, "", "not by an authority that upstreamTLS.ca names"},
		{"for another name", both, "", webgw.UpstreamTLS{CA: authority, ServerName: "back.test"}, "", `not for back.test, but for ["*.example"]`},
		{"for its address", both, "", webgw.UpstreamTLS{CA: authority}, "", `not for 127.0.0.1, but for ["*.example"]`},
		{"another key", both, "", webgw.UpstreamTLS{Pins: []string{another}}, "", "not one of upstreamTLS.pins; its key is " + pin},
		{"another key of the right authority", both, webgw.UpstreamH2, webgw.UpstreamTLS{CA: authority, ServerName: "back.example", Pins: []string{another}}, "", "not one of upstreamTLS.pins"},
		{"in clear text", clear, "", webgw.UpstreamTLS{Pins: []string{pin}}, "", "does not speak TLS"},
		{"no HTTP/2", only1, webgw.UpstreamH2, webgw.UpstreamTLS{Pins: []string{pin}}, "", "not this version of HTTP"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := web1("a", tt.at)
			d.Exposure.Upstream, d.Exposure.UpstreamTLS = tt.upstream, &tt.tls
			w := start(t, nil, d)
			for _, h2 := range []bool{false, true} {
				status, body, h := get(t, w.client(h2), "https://a.example/")
				problems := w.Problems()
				if tt.says == "" {
					if status != 200 || !strings.HasPrefix(body, tt.want) || len(problems) != 0 {
						t.Errorf("%d %q, problems %v", status, body, problems)
					}
					continue
				}
				if status != 502 || h.Get(ErrorHeader) != "target_unverified" {
					t.Errorf("%d %q", status, body)
				}
				if len(problems) != 1 || problems[0].Code != Unverified || !strings.Contains(problems[0].Text, tt.says) || !strings.Contains(problems[0].Text, tt.at) {
					t.Errorf("problems: %v", problems)
				}
			}
		})
	}

	// Connections are kept, bodies pass, upgrades too.
	d := web1("a", both)
	d.Exposure.UpstreamTLS = &webgw.UpstreamTLS{Pins: []string{pin}}
	w := start(t, nil, d)
	dials.Store(0)
	c := w.client(false)
	for range 5 {
		res, err := c.Post("https://a.example/", "text/plain", strings.NewReader("body"))
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(res.Body); err != nil || !strings.HasSuffix(string(b), " body") {
			t.Errorf("%q, %v", b, err)
		}
		res.Body.Close()
	}
	if n := dials.Load(); n != 1 {
		t.Errorf("%d connections for five requests", n)
	}
	v := tls.Client(w.dial(w.tls), &tls.Config{RootCAs: w.roots, ServerName: "a.example", NextProtos: []string{"http/1.1"}})
	io.WriteString(v, "GET / HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	r := bufio.NewReader(v)
	if res, err := http.ReadResponse(r, nil); err != nil || res.StatusCode != 101 {
		t.Fatal(res, err)
	}
	io.WriteString(v, "around")
	b := make([]byte, 6)
	if _, err := io.ReadFull(r, b); err != nil || string(b) != "around" {
		t.Errorf("%q, %v", b, err)
	}
	v.Close()

	// What was proved to an earlier version counts no more.
	changed := *d.Exposure
	changed.UpstreamTLS = &webgw.UpstreamTLS{Pins: []string{another}}
	w.use(Declared{d.Key, &changed})
	if status, _, _ := get(t, c, "https://a.example/"); status != 502 {
		t.Errorf("after a change of keys: %d", status)
	}
	w.use(d)
	if status, _, _ := get(t, c, "https://a.example/"); status != 200 || len(w.Problems()) != 0 {
		t.Errorf("and back: %d, %v", status, w.Problems())
	}

	// Another target may serve where one can't prove itself.
	d = web1("a", clear, both)
	d.Exposure.UpstreamTLS = &webgw.UpstreamTLS{Pins: []string{pin}}
	w.use(d)
	for range 4 {
		if status, body, _ := get(t, c, "https://a.example/"); status != 200 {
			t.Errorf("%d %s", status, body)
		}
	}
}

// A workload that says nothing at all in the handshake does not hold visitors
// for longer than an open may take.
func TestASilentTLSWorkload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		go io.Copy(io.Discard, far)
		tg := &target{Target: webgw.Target{Direct: "192.0.2.1:443"}}
		tg.secure = newSecure(&webgw.Exposure{UpstreamTLS: &webgw.UpstreamTLS{}}, tg.Target)
		s := &Server{}
		s.setup()
		began := time.Now()
		_, err := s.secured(t.Context(), tg, &dialed{CloseWriter: pipeEnd{near}}, "http/1.1")
		if took := time.Since(began); took != s.limits.Open {
			t.Errorf("it took %v", took)
		}
		if why := tg.secure.trouble.Load(); err == nil || why == nil || !strings.Contains(*why, "in time") {
			t.Errorf("%v", err)
		}
	})
}

type pipeEnd struct{ net.Conn }

func (p pipeEnd) CloseWrite() error { return p.Close() }
