package ingress

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"webgw.dev/webgw"
)

func TestNamesThatNobodyHasExposed(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "parked %s %s", r.Host, r.Header.Get("X-Forwarded-Host"))
	})
	table := []Declared{web1("parking", at), web1("a", at), expose("vault", webgw.TLS, []string{"vault.example"}, at)}
	ask := func(w *world, url string, h2 bool) (int, string, http.Header) {
		c := w.client(h2)
		c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		get(t, c, url)
		return get(t, c, url) // again, on the same connection if that is kept
	}
	alerted := func(w *world, name string) bool {
		err := tls.Client(w.dial(w.tls), &tls.Config{RootCAs: w.roots, ServerName: name}).Handshake()
		return err != nil && strings.Contains(err.Error(), "unrecognized name")
	}

	w := start(t, func(s *Server) { s.DefaultHost = "parking.example" }, table...)
	for _, url := range []string{"http://unknown.example/", "https://unknown.example/", "http://elsewhere.test/"} {
		host := strings.Trim(url[strings.Index(url, "//"):], "/")
		for _, h2 := range []bool{false, true} {
			if h2 && strings.HasPrefix(url, "http:") {
				continue
			}
			if status, body, _ := ask(w, url, h2); status != 200 || body != "parked "+host+" "+host {
				t.Errorf("%s: %d %q", url, status, body)
			}
		}
	}
	if !alerted(w, "uncertified.example") {
		t.Error("without a certificate: no alert")
	}
	if status, _, h := ask(w, "http://vault.example/", false); status != 404 || h.Get(ErrorHeader) != "tls_only" {
		t.Errorf("a name that is exposed by tls: %d %v", status, h)
	}
	w.use(table[1]) // the default itself is gone
	if status, _, h := ask(w, "http://unknown.example/", false); status != 404 || h.Get(ErrorHeader) != "unknown_host" {
		t.Errorf("without the default: %d %v", status, h)
	}
	if !alerted(w, "unknown.example") {
		t.Error("without the default: no alert")
	}

	w = start(t, func(s *Server) { s.DefaultRedirect = "https://farm.example/welcome?x" }, table...)
	for _, url := range []string{"http://unknown.example/a?b", "https://unknown.example/a?b"} {
		if status, _, h := ask(w, url, false); status != 302 || h.Get("Location") != "https://farm.example/welcome?x" {
			t.Errorf("%s: %d %v", url, status, h)
		}
	}
	if status, body, _ := ask(w, "https://a.example/", true); status != 200 || body != "parked a.example a.example" {
		t.Errorf("a name that is exposed: %d %q", status, body)
	}
	if got := w.raw(w.tls, string(helloBytes(t, &tls.Config{InsecureSkipVerify: true}))); !strings.HasPrefix(got, "\x15\x03") {
		t.Errorf("without a name: %q", got)
	}
}
