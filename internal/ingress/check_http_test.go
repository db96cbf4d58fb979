package ingress

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

// The request id is one for workload, visitor and log.
func TestRequestID(t *testing.T) {
	var seen string
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		seen = r.Header.Get("X-Request-Id")
		w.Header().Set("X-Request-Id", "the workload's own")
	})
	w := start(t, nil, web1("a", at))
	_, _, h := get(t, w.client(true), "https://a.example/")
	if ids := h.Values("X-Request-Id"); len(ids) != 1 || ids[0] != seen || len(seen) != 32 {
		t.Errorf("the visitor got %q, the workload %q", ids, seen)
	}
	w.Shutdown(t.Context()) // waits for whoever is inside
	if log := w.accesses(); len(log) != 1 || log[0].ID != seen {
		t.Errorf("%+v", log)
	}
}

// How the workload is spoken to, by what the exposure says and the visitor speaks.
func TestUpstreamVersion(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Proto) })
	const grpc = "application/grpc+proto"
	for _, tt := range []struct {
		upstream webgw.Upstream
		h2       bool
		kind     string
		want     string
	}{
		{"", false, "text/plain", "HTTP/1.1"},
		{"", true, "text/plain", "HTTP/1.1"},
		{"", true, grpc, "HTTP/2.0"},
		{"", false, grpc, "HTTP/1.1"},
		{"", true, "application/grpc-web", "HTTP/1.1"}, // which browsers speak over any version
		{webgw.UpstreamAuto, true, grpc, "HTTP/2.0"},
		{webgw.UpstreamHTTP1, true, grpc, "HTTP/1.1"},
		{webgw.UpstreamHTTP1, false, "text/plain", "HTTP/1.1"},
		{webgw.UpstreamH2C, false, "text/plain", "HTTP/2.0"},
		{webgw.UpstreamH2C, true, "text/plain", "HTTP/2.0"},
	} {
		d := web1("a", at)
		d.Exposure.Upstream = tt.upstream
		w := start(t, nil, d)
		res, err := w.client(tt.h2).Post("https://a.example/", tt.kind, strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(res.Body)
		res.Body.Close()
		if string(b) != tt.want || err != nil {
			t.Errorf("%q, h2 %v, %s: %q, %v; want %s", tt.upstream, tt.h2, tt.kind, b, err, tt.want)
		}
	}
}

// An IPv6 address stands quoted and in brackets in Forwarded, and bare in
// X-Forwarded-For (RFC 7239 sections 4 and 6).
func TestForwardedIPv6(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := memnet.New(1)
		gw, home, visitor := n.Host("gw.example"), n.Host("home.example"), n.Host("visitor.example")
		stop := workloadIn(t, home, func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, r.Header.Get("Forwarded")+" "+r.Header.Get("X-Forwarded-For")+" "+r.Header.Get("X-Forwarded-Port")+" "+r.Header.Get("X-Forwarded-Host"))
		})
		defer stop()
		w := start(t, func(s *Server) { s.Net, s.HTTPAddr, s.TLSAddr = gw, ":80", ":443"; s.Upstream = &dialer{net: gw} }, web1("a", "home.example:8080"))
		var six string
		for _, a := range visitor.Addrs() {
			if a.Is6() {
				six = a.String()
			}
		}
		var to string
		for _, a := range gw.Addrs() {
			if a.Is6() {
				to = "[" + a.String() + "]:80"
			}
		}
		c, err := visitor.Dial(t.Context(), "tcp", to, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: a.example:8000\r\nConnection: close\r\n\r\n")
		b, err := io.ReadAll(c)
		if want := `for="[` + six + `]";host="a.example:8000";proto=http ` + six + " 80 a.example:8000"; err != nil || !strings.HasSuffix(string(b), want) {
			t.Errorf("%q, %v; want %q", b, err, want)
		}
		c.Close()
		w.Shutdown(t.Context())
	})
}

// The pages show what they are given, not what it could do.
func TestErrorPageEscapes(t *testing.T) {
	p := page{status: 404, code: "x", text: `a <b> & "c"`}
	for accept, want := range map[string]string{
		"text/html":        "a &lt;b&gt; &amp; &#34;c&#34;",
		"application/json": `"message":"a \u003cb\u003e \u0026 \"c\""`,
		"":                 `a <b> & "c"`,
	} {
		kind, body := p.render(accept, "<script>", "id")
		if !strings.Contains(body, want) || strings.HasPrefix(kind, "text/html") && (strings.Contains(body, "<script") || strings.Contains(body, "http")) {
			t.Errorf("%s: %s", accept, body)
		}
	}
}
