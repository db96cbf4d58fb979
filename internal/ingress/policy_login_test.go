package ingress

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

// grant is what a code stands for.
type grant struct {
	challenge, redirect string
	claims              map[string]any
}

const clientSecret = "s3cret/+"

// authorize is the issuer's page: it grants a code to a visitor with claims, and
// returns where it would send them.
func (i *idp) authorize(location string, claims map[string]any) *url.URL {
	i.t.Helper()
	u, err := url.Parse(location)
	if err != nil {
		i.t.Fatal(err)
	}
	q := u.Query()
	if u.Scheme+"://"+u.Host+u.Path != "https://id.example/authorize" || q.Get("client_id") != "wiki" || q.Get("response_type") != "code" ||
		q.Get("code_challenge_method") != "S256" || q.Get("nonce") == "" || !strings.HasPrefix(q.Get("scope"), "openid email") {
		i.t.Errorf("sent to %s", location)
	}
	all := map[string]any{"iss": "https://id.example", "aud": "wiki", "sub": "ann", "nonce": q.Get("nonce"), "exp": time.Now().Add(time.Minute).Unix(), "email": "Ann@Example.org", "email_verified": true}
	for k, v := range claims {
		all[k] = v
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	code := fmt.Sprint("code", len(i.codes))
	i.codes[code] = grant{q.Get("code_challenge"), q.Get("redirect_uri"), all}
	back, err := url.Parse(q.Get("redirect_uri"))
	if err != nil {
		i.t.Fatal(err)
	}
	back.RawQuery = url.Values{"code": {code}, "state": {q.Get("state")}, "iss": {"https://id.example"}}.Encode()
	return back
}

func (i *idp) token(rw http.ResponseWriter, r *http.Request) {
	id, secret, _ := r.BasicAuth()
	id, _ = url.QueryUnescape(id) // RFC 6749 section 2.3.1
	secret, _ = url.QueryUnescape(secret)
	code := r.PostFormValue("code")
	i.mu.Lock()
	g, ok := i.codes[code]
	i.codes[code] = grant{}
	signer := i.signer
	i.mu.Unlock()
	sum := sha256.Sum256([]byte(r.PostFormValue("code_verifier")))
	if !ok || g.claims == nil || id != "wiki" || secret != clientSecret || r.PostFormValue("redirect_uri") != g.redirect || base64.RawURLEncoding.EncodeToString(sum[:]) != g.challenge {
		rw.Header().Set("Content-Type", "application/json")
		rw.WriteHeader(400)
		io.WriteString(rw, `{"error":"invalid_grant"}`)
		return
	}
	rw.Header().Set("Content-Type", "application/json")
	json.NewEncoder(rw).Encode(map[string]any{"access_token": "x", "token_type": "Bearer", "id_token": signer.token(i.t, pairs(g.claims)...)})
}

func pairs(m map[string]any) (out []any) {
	for k, v := range m {
		out = append(out, k, v)
	}
	return out
}

// browser is a visitor with cookies, who looks at pages.
type browser struct {
	t       *testing.T
	c       *http.Client
	cookies map[string]string
}

func newBrowser(t *testing.T, w *world) *browser {
	return &browser{t, w.plain(true), map[string]string{}}
}

func (b *browser) get(address string, fields ...string) (int, string, http.Header) {
	b.t.Helper()
	var cookies []string
	for k, v := range b.cookies {
		cookies = append(cookies, k+"="+v)
	}
	status, body, h := fetch(b.t, b.c, "GET", address, "", append([]string{"Accept", "text/html", "Cookie", strings.Join(cookies, "; ")}, fields...)...)
	for _, line := range h["Set-Cookie"] {
		c, err := http.ParseSetCookie(line)
		if err != nil || !c.Secure || !c.HttpOnly || c.Path != "/" || c.Domain != "" || c.SameSite != http.SameSiteLaxMode || !strings.HasPrefix(c.Name, "__Host-") {
			b.t.Error(line, err)
			continue
		}
		if c.MaxAge < 0 {
			delete(b.cookies, c.Name)
		} else {
			b.cookies[c.Name] = c.Value
		}
	}
	return status, body, h
}

// begin asks for a page, and returns where the visitor is sent to log in.
func (b *browser) begin(address string) string {
	b.t.Helper()
	status, _, h := b.get(address)
	if status != 302 || h.Get(ErrorHeader) != "login" || h.Get("Cache-Control") != "no-store" {
		b.t.Fatal(address, status, h)
	}
	return h.Get("Location")
}

var sealedForTest = webgw.NewSealed([]webgw.Box{{Data: []byte("x")}})

func openForTest(owner webgw.ID, s webgw.Sealed) ([]byte, error) {
	if s != sealedForTest || owner != (webgw.ID{1}) {
		return nil, errors.New("not for us")
	}
	return append(bytes.Repeat([]byte{7}, sessionBytes), clientSecret...), nil
}

func loginBubble(t *testing.T, f func(t *testing.T, w *world, i *idp)) {
	with := func(s *Server) {
		s.IssuerRoots, s.OpenSecret = x509.NewCertPool(), openForTest
		s.DialIssuer = func(ctx context.Context, network, address string) (net.Conn, error) {
			return s.Net.Dial(ctx, network, address, nil)
		}
	}
	quicBubble(t, Limits{}, with, func(t *testing.T, w *world, m *memnet.World) {
		i := startIDP(t, m, w)
		i.signer, i.codes = newSigningKey("k"), map[string]grant{}
		i.keys = []any{i.signer.public()}
		memSite(t, w.Net.(*memnet.Host), func(rw http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(rw, "%s user=%s email=%s groups=%s cookies=%s", r.URL.RequestURI(), r.Header.Get("X-Forwarded-User"), r.Header["X-Forwarded-Email"], r.Header["X-Forwarded-Groups"], r.Header.Get("Cookie"))
		})
		w.use(loginAt("a", nil), loginAt("b", nil))
		f(t, w, i)
	})
}

// loginAt exposes a site for those who log in.
func loginAt(name string, change func(p *webgw.Policy)) Declared {
	p := webgw.Policy{OIDC: &webgw.OIDC{Issuer: "https://id.example", ClientID: "wiki", Secret: sealedForTest, Domains: []string{"example.org"}, Groups: []string{"staff", "Ingé"}, Session: "2h"}}
	if change != nil {
		change(&p)
	}
	return under(web1(name, "gateway:8080"), p)
}

func TestVisitorsLogIn(t *testing.T) {
	loginBubble(t, func(t *testing.T, w *world, i *idp) {
		b := newBrowser(t, w)
		b.cookies["theme"] = "dark"
		back := i.authorize(b.begin("https://a.example/page?x=1&y=%2F"), map[string]any{"groups": []string{"staff", "other", "Ingé"}})
		if back.Host != "a.example" || back.Path != callbackPath {
			t.Error(back)
		}
		status, _, h := b.get(back.String())
		if status != 303 || h.Get("Location") != "https://a.example/page?x=1&y=%2F" || h.Get("Referrer-Policy") != "no-referrer" {
			t.Fatal(status, h)
		}
		want := "/page?x=1&y=%2F user=ann email=[ann@example.org] groups=[staff,Ing%C3%A9] cookies=theme=dark"
		for range 2 {
			if status, body, _ := b.get(h.Get("Location"), "X-Forwarded-Email", "root@example.org", "X_Forwarded_Groups", "root"); status != 200 || body != want {
				t.Error(status, body)
			}
		}
		if status, _, _ := b.get(back.String()); status != 400 {
			t.Error("the same callback again:", status)
		}
		// The session is for this exposure and host only.
		if status, _, h := b.get("https://b.example/"); status != 302 || h.Get(ErrorHeader) != "login" {
			t.Error("at another exposure:", status)
		}
		delete(b.cookies, browserCookie)
		// Another gateway needs nothing but the secret.
		other := start(t, func(s *Server) {
			s.Net, s.HTTPAddr, s.TLSAddr, s.BindHost, s.OpenSecret = w.Net, ":81", ":444", "", openForTest
		}, loginAt("a", nil))
		at := newBrowser(t, w)
		at.c, at.cookies = other.plain(true), b.cookies
		other.roots.AddCert(must(x509.ParseCertificate(must(other.Certificates.GetCertificate(&tls.ClientHelloInfo{})).Certificate[0])))
		if status, body, _ := at.get("https://a.example/"); status != 200 || !strings.Contains(body, "user=ann") {
			t.Error("at another gateway:", status, body)
		}
		// The policy may say no at any time.
		w.use(loginAt("a", func(p *webgw.Policy) { p.OIDC.Domains, p.OIDC.Groups = []string{"example.com"}, nil }))
		kept := b.cookies[sessionCookie]
		if status, _, h := b.get("https://a.example/"); status != 403 || h.Get(ErrorHeader) != "login_refused" || b.cookies[sessionCookie] != "" {
			t.Error("not let in any more:", status, b.cookies)
		}
		w.use(loginAt("a", nil))
		b.cookies[sessionCookie] = kept
		time.Sleep(2*time.Hour - time.Minute)
		if status, _, _ := b.get("https://a.example/"); status != 200 {
			t.Error("before the session's end:", status)
		}
		if status, _, h := b.get("https://a.example"+logoutPath, "Sec-Fetch-Site", "cross-site"); status != 403 || len(h["Set-Cookie"]) > 0 {
			t.Error("logged out by another site:", status)
		}
		if status, _, _ := b.get("https://a.example" + logoutPath); status != 200 || b.cookies[sessionCookie] != "" {
			t.Error("logged out:", status, b.cookies)
		}
		b.begin("https://a.example/")
		b.cookies[sessionCookie] = kept
		time.Sleep(2 * time.Minute)
		b.begin("https://a.example/")
		// Forged and broken sessions are none.
		for _, s := range []string{"", "x", kept[:len(kept)-2] + "AA", strings.Repeat("A", 5000)} {
			b.cookies[sessionCookie] = s
			b.begin("https://a.example/")
		}
	})
}

func TestLoginsThatFail(t *testing.T) {
	loginBubble(t, func(t *testing.T, w *world, i *idp) {
		other := newSigningKey("k")
		for name, tt := range map[string]struct {
			claims map[string]any
			change func(b *browser, back *url.URL)
			code   string
		}{
			"all is well":        {nil, nil, "logged_in"},
			"by group alone":     {map[string]any{"email_verified": false, "groups": "staff"}, nil, "logged_in"},
			"verified by word":   {map[string]any{"email_verified": "true"}, nil, "logged_in"},
			"unverified address": {map[string]any{"email_verified": false}, nil, "login_refused"},
			"another domain":     {map[string]any{"email": "ann@evil-example.org"}, nil, "login_refused"},
			"a domain below":     {map[string]any{"email": "ann@a.example.org"}, nil, "login_refused"},
			"two domains":        {map[string]any{"email": "ann@evil.com@example.org"}, nil, "login_refused"},
			"no address":         {map[string]any{"email": nil}, nil, "login_refused"},
			"nobody":             {map[string]any{"sub": ""}, nil, "login_failed"},
			"another nonce":      {map[string]any{"nonce": "x"}, nil, "login_failed"},
			"another audience":   {map[string]any{"aud": "other"}, nil, "login_failed"},
			"two audiences":      {map[string]any{"aud": []string{"wiki", "other"}}, nil, "login_failed"},
			"two, authorized":    {map[string]any{"aud": []string{"wiki", "other"}, "azp": "wiki"}, nil, "logged_in"},
			"for another client": {map[string]any{"azp": "other"}, nil, "login_failed"},
			"another issuer":     {map[string]any{"iss": "https://evil.example"}, nil, "login_failed"},
			"expired":            {map[string]any{"exp": time.Now().Add(-time.Hour).Unix()}, nil, "login_failed"},
			"never expires":      {map[string]any{"exp": nil}, nil, "login_failed"},
			"another browser": {nil, func(b *browser, _ *url.URL) {
				b.cookies[browserCookie] = base64.RawURLEncoding.EncodeToString(make([]byte, 32))
			}, "login_failed"},
			"no cookie":             {nil, func(b *browser, _ *url.URL) { clear(b.cookies) }, "login_failed"},
			"too late":              {nil, func(*browser, *url.URL) { time.Sleep(loginTime) }, "login_failed"},
			"another exposure":      {nil, func(_ *browser, u *url.URL) { u.Host = "b.example" }, "login_failed"},
			"a code made up":        {nil, func(_ *browser, u *url.URL) { set(u, "code", "guess") }, "login_failed"},
			"no code":               {nil, func(_ *browser, u *url.URL) { set(u, "code", "") }, "login_refused"},
			"a state made up":       {nil, func(_ *browser, u *url.URL) { set(u, "state", "guess") }, "login_failed"},
			"refused by the issuer": {nil, func(_ *browser, u *url.URL) { set(u, "error", "access_denied") }, "login_refused"},
			"mixed-up issuers":      {nil, func(_ *browser, u *url.URL) { set(u, "iss", "https://evil.example") }, "login_failed"},
			"foreign key":           {map[string]any{"email": "foreign@example.org"}, func(*browser, *url.URL) { i.set(func() { i.signer, other = other, i.signer }) }, "login_failed"},
		} {
			time.Sleep(10 * time.Second) // guesses are few
			b := newBrowser(t, w)
			back := i.authorize(b.begin("https://a.example/"), tt.claims)
			if tt.change != nil {
				tt.change(b, back)
			}
			_, _, h := b.get(back.String())
			if got := h.Get(ErrorHeader); got != tt.code || (b.cookies[sessionCookie] != "") != (tt.code == "logged_in") {
				t.Errorf("%s: %s, %v", name, got, b.cookies)
			}
			if name == "foreign key" {
				i.set(func() { i.signer, other = other, i.signer })
			}
		}
		// Where a login leads back to is always here.
		for _, path := range []string{"//evil.example/x", "/\\evil.example", "/" + strings.Repeat("x", 2000)} {
			b := newBrowser(t, w)
			_, _, h := b.get(i.authorize(b.begin("https://a.example"+path), nil).String())
			if u, err := url.Parse(h.Get("Location")); err != nil || u.Host != "a.example" || u.Scheme != "https" {
				t.Error(path, h)
			}
		}
		// Several logins at once, as of a browser with many tabs, don't disturb each other.
		b := newBrowser(t, w)
		one, two := b.begin("https://a.example/1"), b.begin("https://a.example/2")
		for location, path := range map[string]string{one: "/1", two: "/2"} {
			if status, _, h := b.get(i.authorize(location, nil).String()); status != 303 || h.Get("Location") != "https://a.example"+path {
				t.Error(path, status, h)
			}
		}
	})
}

func set(u *url.URL, name, value string) {
	q := u.Query()
	q.Set(name, value)
	u.RawQuery = q.Encode()
}

func TestWhoIsNotSentToLogIn(t *testing.T) {
	loginBubble(t, func(t *testing.T, w *world, i *idp) {
		token := newSigningKey("j")
		keys := must(json.Marshal(map[string]any{"keys": []any{token.public()}}))
		w.use(loginAt("a", nil), loginAt("b", func(p *webgw.Policy) { p.JWT = &webgw.JWT{Issuer: "https://id.example", Keys: string(keys)} }),
			loginAt("c", func(p *webgw.Policy) { p.OIDC.Secret = webgw.NewSealed([]webgw.Box{{Data: []byte("y")}}) }))
		c := w.plain(true)
		for _, tt := range []struct {
			method, host string
			fields       []string
			want         int
			code         string
		}{
			{"GET", "a", []string{"Accept", "text/html"}, 302, "login"},
			{"GET", "a", []string{"Accept", "*/*", "Sec-Fetch-Mode", "navigate"}, 302, "login"},
			{"GET", "a", []string{"Accept", "text/html", "Sec-Fetch-Mode", "cors"}, 401, "unauthorized"},
			{"GET", "a", []string{"Accept", "application/json"}, 401, "unauthorized"},
			{"POST", "a", []string{"Accept", "text/html"}, 401, "unauthorized"},
			{"GET", "a", []string{"Accept", "text/html", "Authorization", "Bearer x"}, 401, "unauthorized"},
			{"GET", "b", []string{"Accept", "text/html", "Authorization", "Bearer " + token.token(t)}, 200, ""},
			{"GET", "b", []string{"Accept", "text/html", "Authorization", "Bearer x"}, 401, "unauthorized"},
			{"GET", "b", []string{"Accept", "text/html"}, 302, "login"},
			{"GET", "c", []string{"Accept", "text/html"}, 503, "login_unavailable"},
		} {
			if status, _, h := fetch(t, c, tt.method, "https://"+tt.host+".example/", "", tt.fields...); status != tt.want || h.Get(ErrorHeader) != tt.code || (h.Get("Location") != "") != (tt.want == 302) {
				t.Error(tt, status, h)
			}
		}
		if status, _, h := fetch(t, c, "GET", "http://a.example/", "", "Accept", "text/html"); status != 308 {
			t.Error("over plain HTTP:", status, h)
		}
		if p := w.Problems(); len(p) != 1 || p[0].Code != SecretUnreadable || p[0].Exposure != key("c") {
			t.Error(p)
		}
		// While the issuer is away, who is in stays in.
		b := newBrowser(t, w)
		b.get(i.authorize(b.begin("https://a.example/"), nil).String())
		i.set(func() { i.about = func(a map[string]any) { a["issuer"] = "x" } })
		time.Sleep(time.Hour)
		if status, _, _ := b.get("https://a.example/"); status != 200 {
			t.Error(status)
		}
		time.Sleep(issuerStale)
		if status, _, h := newBrowser(t, w).get("https://a.example/"); status != 503 || h.Get(ErrorHeader) != "issuer_unavailable" {
			t.Error(status, h)
		}
	})
}
