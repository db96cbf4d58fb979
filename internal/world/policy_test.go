package world

import (
	"bufio"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
)

// applyWith declares an exposure of Alice's after change has added to it.
func (w *World) applyWith(line string, change func(*webgw.Exposure)) error {
	w.T.Helper()
	r := w.Alice.Exposure(line)
	change(r.Exposure)
	s, err := w.Alice.Key.Sign(r)
	if err == nil {
		err = w.Alice.Put(s)
	}
	w.Settle()
	return err
}

// Rules lead to nodes of their own, which have a session for that alone and
// open nothing else.
func TestRulesLeadToOtherNodes(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).HTTP(8080)
		attic := w.Node("attic", BehindNAT)
		attic.HTTP(9090)
		w.Gateway("gent")
		at := webgw.Target{Node: attic.ID(), Address: "127.0.0.1:9090"}
		rules := []webgw.Rule{{Match: webgw.Match{Prefix: "/api"}, Targets: []webgw.Target{at}, Rewrite: &webgw.Rewrite{Path: "/"}}}
		if err := w.applyWith("blog.example -> home1:8080 via gent", func(e *webgw.Exposure) { e.Rules = rules }); err != nil {
			t.Fatal(err)
		}
		w.Get("https://blog.example/a").Want(200, "hello from home1", "/a")
		w.Get("https://blog.example/api/x").Want(200, "hello from attic", "/x")
		w.Get("https://blog.example//api/x").Want(400)

		// Rules alone do as well.
		if err := w.applyWith("blog.example -> home1:8080 via gent", func(e *webgw.Exposure) { e.Rules, e.Targets = rules, nil }); err != nil {
			t.Fatal(err)
		}
		w.Get("https://blog.example/a").Want(404)
		w.Get("https://blog.example/api/y").Want(200, "hello from attic", "/y")

		nobody := webgw.Target{Node: w.Key().ID(), Address: "127.0.0.1:1"}
		err := w.applyWith("shop.example -> home1:8080 via gent", func(e *webgw.Exposure) {
			e.Rules = []webgw.Rule{{Targets: []webgw.Target{nobody}}}
		})
		if webgw.KindOf(err) != webgw.NotFound {
			t.Error("a rule leads to a node that does not exist:", err)
		}
	})
}

func TestPoliciesComeIntoForce(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).HTTP(8080)
		w.Gateway("gent")
		apply := func(p *webgw.Policy) {
			if err := w.applyWith("blog.example -> home1:8080 via gent", func(e *webgw.Exposure) { e.Policy = p }); err != nil {
				t.Fatal(err)
			}
		}
		all := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
		apply(nil)
		w.Get("https://blog.example/").Want(200)
		apply(&webgw.Policy{Deny: all})
		w.Get("https://blog.example/").Want(403)
		apply(&webgw.Policy{Allow: all, HTTPSOnly: true})
		w.Get("https://blog.example/").Want(200)
		w.Get("http://blog.example/").Want(308)
	})
}

// PROXY headers go before the first bytes, also of ciphertext that is handed
// off.
func TestProxyHeadersReachTheWorkload(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		w.Gateway("gent")
		headers := make(chan *proxyproto.Header, 1)
		next := func() *proxyproto.Header {
			t.Helper()
			select {
			case h := <-headers:
				return h
			case <-time.After(10 * time.Second):
				t.Fatal("no PROXY header has come")
				return nil
			}
		}
		told := func(serve func(net.Conn)) func(net.Conn) {
			return func(c net.Conn) {
				r := bufio.NewReader(c)
				h, err := proxyproto.Read(r)
				if err != nil {
					t.Error(err)
					return
				}
				headers <- h
				serve(&begun{c, r})
			}
		}
		cert := w.selfSigned("vault.example")
		home.Workload("127.0.0.1:7", told(func(c net.Conn) { io.Copy(c, c) }))
		home.Workload("127.0.0.1:8443", told(func(c net.Conn) {
			serveHTTP("hello in TLS")(tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}}))
		}))
		for _, version := range []webgw.ProxyProtocol{webgw.ProxyV1, webgw.ProxyV2} {
			change := func(e *webgw.Exposure) { e.ProxyProtocol = version }
			if err := errors.Join(w.applyWith("tcp 20007 -> home1:7 via gent", change), w.applyWith("tls vault.example -> home1:8443 via gent", change)); err != nil {
				t.Fatal(err)
			}
			c, err := w.Dial("gent", 20007)
			if err != nil {
				t.Fatal(err)
			}
			h := next()
			if from := c.LocalAddr().String(); h.SourceAddr.String() != from {
				t.Errorf("%s: %s, from %s", version, h.SourceAddr, from)
			}
			if got, err := Echo(c, "hello"); got != "hello" || err != nil {
				t.Errorf("%s: %q, %v", version, got, err)
			}
			w.Get("https://vault.example/").Want(200, "hello in TLS")
			h = next()
			tlvs, err := h.TLVs()
			if named := slices.ContainsFunc(tlvs, func(v proxyproto.TLV) bool {
				return v.Type == proxyproto.PP2_TYPE_AUTHORITY && string(v.Value) == "vault.example"
			}); err != nil || named != (version == webgw.ProxyV2) {
				t.Errorf("%s: %v, %v", version, tlvs, err)
			}
		}
	})
}

// begun is a connection of which some has been read.
type begun struct {
	net.Conn
	r io.Reader
}

func (b *begun) Read(p []byte) (int, error) { return b.r.Read(p) }

// Only gateways that a secret is sealed to let visitors log in; others say what
// is missing.
func TestSecretsAreSealedToGateways(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).HTTP(8080)
		gent, stranger := w.Gateway("gent"), w.Key()
		for _, tt := range []struct {
			to, owner webgw.ID
			status    int
			code      string
		}{
			{gent.ID(), w.Alice.ID(), 400, "login_failed"},
			{stranger.ID(), w.Alice.ID(), 503, "login_unavailable"},
			{gent.ID(), stranger.ID(), 503, "login_unavailable"}, // copied out of another owner's record
		} {
			secret, err := ident.Seal(make([]byte, 40), tt.owner, tt.to)
			if err != nil {
				t.Fatal(err)
			}
			if err := w.applyWith("blog.example -> home1:8080 via gent", func(e *webgw.Exposure) {
				e.Policy = &webgw.Policy{OIDC: &webgw.OIDC{Issuer: "https://id.example", ClientID: "blog", Secret: secret, Anyone: true}}
			}); err != nil {
				t.Fatal(err)
			}
			if a := w.Get("https://blog.example/.webgw/callback?code=1&state=2").Want(tt.status); a.Header.Get("Webgw-Error") != tt.code {
				t.Error(a.Header)
			}
		}
	})
}
