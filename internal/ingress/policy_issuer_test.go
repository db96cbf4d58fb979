package ingress

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

// idp is an issuer of tokens at https://id.example.
type idp struct {
	t       *testing.T
	mu      sync.Mutex
	keys    []any                // public, of the set
	about   func(map[string]any) // changes what it says of itself
	serve   http.HandlerFunc     // in place of the set; nil: the set
	fetches atomic.Int64         // of the set

	signer signingKey
	codes  map[string]grant // each for one use
}

func startIDP(t *testing.T, m *memnet.World, w *world) *idp {
	i := &idp{t: t}
	cert := certificate(t)
	w.IssuerRoots.AddCert(cert.Leaf)
	l, err := m.Host("id.example").Listen(t.Context(), "tcp", ":443")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: i, ErrorLog: nil}
	var serving sync.WaitGroup
	serving.Go(func() { s.Serve(tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{*cert}})) })
	t.Cleanup(func() { s.Close(); serving.Wait() })
	return i
}

func (i *idp) set(f func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	f()
}

func (i *idp) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	keys, about, serve := i.keys, i.about, i.serve
	i.mu.Unlock()
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		a := map[string]any{"issuer": "https://id.example", "jwks_uri": "https://id.example/keys", "authorization_endpoint": "https://id.example/authorize", "token_endpoint": "https://id.example/token", "id_token_signing_alg_values_supported": []string{"none", "HS256"}}
		if about != nil {
			about(a)
		}
		json.NewEncoder(rw).Encode(a)
	case "/keys":
		i.fetches.Add(1)
		if serve != nil {
			serve(rw, r)
			return
		}
		json.NewEncoder(rw).Encode(map[string]any{"keys": keys})
	case "/token":
		i.token(rw, r)
	default:
		http.NotFound(rw, r)
	}
}

// signingKey is a key with its name.
type signingKey struct {
	id      string
	private ed25519.PrivateKey
}

func newSigningKey(id string) signingKey {
	_, private, _ := ed25519.GenerateKey(rand.Reader) // never fails
	return signingKey{id, private}
}

func (k signingKey) public() any {
	return jose.JSONWebKey{Key: k.private.Public(), KeyID: k.id, Use: "sig", Algorithm: "EdDSA"}
}

// token is a new one each time: verdicts on it are not remembered yet.
func (k signingKey) token(t *testing.T, change ...any) string {
	claims := map[string]any{"iss": "https://id.example", "aud": "me", "sub": "ann", "exp": time.Now().Add(time.Hour).Unix(), "jti": rand.Text()}
	for i := 0; i < len(change); i += 2 {
		claims[change[i].(string)] = change[i+1]
	}
	return signToken(t, jose.EdDSA, k.private, k.id, claims)
}

func signToken(t *testing.T, alg jose.SignatureAlgorithm, key any, kid string, claims map[string]any) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, (&jose.SignerOptions{}).WithHeader("kid", kid))
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// issuerBubble runs an issuer, and an exposure that asks for its tokens.
func issuerBubble(t *testing.T, f func(t *testing.T, w *world, i *idp, ask func(token string) (int, string))) {
	quicBubble(t, Limits{}, func(s *Server) {
		s.IssuerRoots = x509.NewCertPool()
		s.DialIssuer = func(ctx context.Context, network, address string) (net.Conn, error) {
			return s.Net.Dial(ctx, network, address, nil)
		}
	}, func(t *testing.T, w *world, m *memnet.World) {
		i := startIDP(t, m, w)
		memSite(t, w.Net.(*memnet.Host), func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, r.Header.Get("X-Forwarded-User")) })
		w.use(under(web1("a", "gateway:8080"), webgw.Policy{JWT: &webgw.JWT{Issuer: "https://id.example", Audiences: []string{"me"}}}))
		c := w.client(true)
		f(t, w, i, func(token string) (int, string) {
			t.Helper()
			status, body, h := fetch(t, c, "GET", "https://a.example/", "", "Authorization", "Bearer "+token)
			if status != 200 {
				body = h.Get(ErrorHeader)
			}
			return status, body
		})
	})
}

func TestIssuersAreAskedForTheirKeys(t *testing.T) {
	issuerBubble(t, func(t *testing.T, w *world, i *idp, ask func(string) (int, string)) {
		ed, ec := newSigningKey("ed"), must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		i.set(func() {
			i.keys = []any{ed.public(), jose.JSONWebKey{Key: ec.Public(), KeyID: "ec"}, map[string]any{"kty": "oct", "kid": "secret", "k": "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0"},
				map[string]any{"kty": "new"}, jose.JSONWebKey{Key: newSigningKey("x").private.Public(), KeyID: "enc", Use: "enc"}}
		})
		claims := map[string]any{"iss": "https://id.example", "aud": "me", "sub": "ann", "exp": time.Now().Add(time.Hour).Unix()}
		for _, tt := range []struct {
			name, token string
			ok          bool
		}{
			{"expired", ed.token(t, "exp", time.Now().Add(-time.Hour).Unix()), false},
			{"of another issuer", ed.token(t, "iss", "https://evil.example"), false},
		} {
			if status, _ := ask(tt.token); status != 401 || i.fetches.Load() != 0 {
				t.Error(tt.name, status, i.fetches.Load())
			}
		}
		for _, tt := range []struct {
			name, token string
			ok          bool
		}{
			{"EdDSA", ed.token(t), true},
			{"ES256", signToken(t, jose.ES256, ec, "ec", claims), true},
			{"for others", ed.token(t, "aud", "other"), false},
			{"for nobody", ed.token(t, "aud", nil), false},
			{"HMAC by the public key", signToken(t, jose.HS256, []byte(ed.private.Public().(ed25519.PublicKey)), "ed", claims), false},
			{"HMAC by a published secret", signToken(t, jose.HS256, []byte("secretsecretsecretsecretsecret12"), "secret", claims), false},
			{"foreign", signToken(t, jose.EdDSA, newSigningKey("").private, "ed", claims), false},
		} {
			if status, body := ask(tt.token); tt.ok != (status == 200) || tt.ok && body != "ann" || !tt.ok && status != 401 {
				t.Error(tt.name, status, body)
			}
		}
		if n := i.fetches.Load(); n != 1 {
			t.Error(n, "fetches")
		}
		if p := w.Problems(); len(p) != 0 {
			t.Error(p)
		}
	})
}

func TestIssuersChangeTheirKeys(t *testing.T) {
	issuerBubble(t, func(t *testing.T, w *world, i *idp, ask func(string) (int, string)) {
		a, b, c := newSigningKey("a"), newSigningKey("b"), newSigningKey("c")
		want := func(what string, status int, fetches int64, token string) {
			t.Helper()
			got, _ := ask(token)
			synctest.Wait()
			if n := i.fetches.Load(); got != status || n != fetches {
				t.Errorf("%s: %d after %d fetches, want %d after %d", what, got, n, status, fetches)
			}
		}
		i.set(func() { i.keys = []any{a.public()} })
		want("first", 200, 1, a.token(t))
		i.set(func() { i.keys = []any{a.public(), b.public()} })
		want("new key, soon", 401, 1, b.token(t))
		time.Sleep(issuerPause)
		want("new key", 200, 2, b.token(t))
		want("old key", 200, 2, a.token(t))
		for n := range 300 { // strangers can't make the gateway ask; they are stopped as guessers, too
			ask(newSigningKey(fmt.Sprint(n)).token(t))
			time.Sleep(time.Second)
		}
		if n := i.fetches.Load(); n > 7 {
			t.Error(n, "fetches in five minutes")
		}
		time.Sleep(2 * time.Minute)
		before := i.fetches.Load()
		i.set(func() { i.keys = []any{b.public(), c.public()} })
		want("withdrawn, not known yet", 200, before, a.token(t))
		time.Sleep(issuerFresh)
		want("in the background", 200, before+1, a.token(t))
		want("withdrawn", 401, before+1, a.token(t))
		want("newest", 200, before+1, c.token(t))
	})
}

func TestIssuersThatCannotBeAsked(t *testing.T) {
	issuerBubble(t, func(t *testing.T, w *world, i *idp, ask func(string) (int, string)) {
		k := newSigningKey("k")
		i.set(func() { i.keys = []any{k.public()} })
		good := func(rw http.ResponseWriter) { json.NewEncoder(rw).Encode(map[string]any{"keys": []any{k.public()}}) }
		for name, bad := range map[string]func(){
			"away": func() { i.serve = func(rw http.ResponseWriter, r *http.Request) { rw.WriteHeader(500); good(rw) } },
			"elsewhere": func() {
				i.serve = func(rw http.ResponseWriter, r *http.Request) { http.Redirect(rw, r, "/other", 302) }
			},
			"silent": func() {
				i.serve = func(rw http.ResponseWriter, r *http.Request) { time.Sleep(issuerTime + time.Second); good(rw) }
			},
			"endless": func() {
				i.serve = func(rw http.ResponseWriter, r *http.Request) { good(rw); io.CopyN(rw, spaces{}, 1<<30) }
			},
			"no JSON":      func() { i.serve = func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "keys") } },
			"without keys": func() { i.serve = func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, `{"keys":[]}`) } },
			"with private keys": func() {
				i.serve = func(rw http.ResponseWriter, r *http.Request) {
					json.NewEncoder(rw).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: k.private, KeyID: "k"}}})
				}
			},
			"another": func() { i.about = func(a map[string]any) { a["issuer"] = "https://other.example" } },
			"plain":   func() { i.about = func(a map[string]any) { a["jwks_uri"] = "http://id.example/keys" } },
			"a file":  func() { i.about = func(a map[string]any) { a["jwks_uri"] = "file:///etc/passwd" } },
		} {
			time.Sleep(issuerAgain)
			i.set(bad)
			for range 3 {
				if status, code := ask(k.token(t)); status != 503 || code != "issuer_unavailable" {
					t.Error(name, status, code)
				}
			}
			if p := w.Problems(); len(p) != 1 || p[0].Code != IssuerUnavailable || !strings.HasPrefix(p[0].Text, "the keys of https://id.example can't be had: ") {
				t.Error(name, p)
			} else {
				t.Log(name, p[0].Text)
			}
			i.set(func() { i.about, i.serve = nil, nil })
		}
		if value(t, w.metrics.issuerFetches.WithLabelValues("failed")) != 10 {
			t.Error("fetches are not counted")
		}
		time.Sleep(issuerAgain)
		if status, _ := ask(k.token(t)); status != 200 || len(w.Problems()) != 0 {
			t.Error("back again:", status, w.Problems())
		}
		// What is known counts for a day.
		i.set(func() { i.serve = func(rw http.ResponseWriter, r *http.Request) { rw.WriteHeader(500) } })
		for range 23 {
			time.Sleep(time.Hour)
			if status, _ := ask(k.token(t)); status != 200 {
				t.Fatal("within a day:", status)
			}
		}
		time.Sleep(time.Hour)
		if status, _ := ask(k.token(t)); status != 503 {
			t.Error("after a day:", status)
		}
	})
}

// Requests that come at once cause one fetch, and a visitor who leaves ends
// nothing but their own wait.
func TestIssuersAreAskedOnce(t *testing.T) {
	issuerBubble(t, func(t *testing.T, w *world, i *idp, ask func(string) (int, string)) {
		k := newSigningKey("k")
		i.set(func() {
			i.keys = []any{k.public()}
			i.serve = func(rw http.ResponseWriter, r *http.Request) {
				time.Sleep(2 * time.Second)
				json.NewEncoder(rw).Encode(map[string]any{"keys": []any{k.public()}})
			}
		})
		ctx, leave := context.WithTimeout(t.Context(), time.Second)
		defer leave()
		r, err := http.NewRequestWithContext(ctx, "GET", "https://a.example/", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+k.token(t))
		if _, err := w.client(true).Do(r); err == nil {
			t.Error("answered too early")
		}
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				if status, _ := ask(k.token(t)); status != 200 {
					t.Error(status)
				}
			})
		}
		all.Wait()
		if n := i.fetches.Load(); n != 1 {
			t.Error(n, "fetches")
		}
	})
}

type spaces struct{}

func (spaces) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
