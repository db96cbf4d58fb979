package ingress

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"golang.org/x/crypto/argon2"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

// under declares an exposure with a policy.
func under(d Declared, p webgw.Policy) Declared {
	d.Exposure.Policy = &p
	return d
}

// plain is a client that follows no redirect.
func (w *world) plain(h2 bool) *http.Client {
	c := w.client(h2)
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return c
}

func fetch(t testing.TB, c *http.Client, method, url, body string, fields ...string) (int, string, http.Header) {
	t.Helper()
	var b io.Reader
	if body != "" {
		b = strings.NewReader(body)
	}
	r, err := http.NewRequestWithContext(t.Context(), method, url, b)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(fields); i += 2 {
		r.Header.Add(fields[i], fields[i+1])
	}
	res, err := c.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(got), res.Header
}

// told answers with what the workload is told of the visitor.
func told(t testing.TB) string {
	return site(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		h := r.Header
		fmt.Fprintf(w, "user=%s auth=%t cert=%t subject=%s print=%d body=%d", h.Get("X-Forwarded-User"), h.Get("Authorization") != "", h.Get("Client-Cert") != "",
			h.Get("X-Forwarded-Client-Subject"), len(h.Get("X-Forwarded-Client-Fingerprint")), n)
	})
}

// knock connects, says nothing, and returns what it is told. A reset may come
// as early as in connect.
func knock(addr string) string {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return ""
	}
	defer c.Close()
	c.(*net.TCPConn).CloseWrite() // an error is seen by the read as well
	b, _ := io.ReadAll(c)
	return string(b)
}

func refusals1(t *testing.T, w *world, reason string) float64 {
	return value(t, w.metrics.refusals.WithLabelValues(reason))
}

func TestAddressesAreLetIn(t *testing.T) {
	at := told(t)
	p := netip.MustParsePrefix
	mine, other := []netip.Prefix{p("127.0.0.0/8")}, []netip.Prefix{p("10.0.0.0/8"), p("2001:db8::/32")}
	tcp := func(policy webgw.Policy) Declared {
		d := under(expose("tcp", webgw.TCP, nil, echo(t, "hello")), policy)
		d.Exposure.Port = freePort(t)
		return d
	}
	for _, tt := range []struct {
		name   string
		policy webgw.Policy
		in     bool
	}{
		{"all", webgw.Policy{}, true},
		{"allowed", webgw.Policy{Allow: mine}, true},
		{"not allowed", webgw.Policy{Allow: other}, false},
		{"denied", webgw.Policy{Deny: mine}, false},
		{"others denied", webgw.Policy{Deny: other}, true},
		{"allowed and denied", webgw.Policy{Allow: mine, Deny: []netip.Prefix{p("127.0.0.1/32")}}, false},
	} {
		w := start(t, nil, under(web1("a", at), tt.policy), tcp(tt.policy))
		for _, h2 := range []bool{false, true} {
			status, _, h := get(t, w.client(h2), "https://a.example")
			if tt.in && status != 200 || !tt.in && (status != 403 || h.Get(ErrorHeader) != "address_denied") {
				t.Errorf("%s: %d", tt.name, status)
			}
		}
		if got := knock(w.Addrs()[2].String()); tt.in && got != "hellobye" || !tt.in && got != "" {
			t.Errorf("%s: %q", tt.name, got)
		}
		if n := refusals1(t, w, reasonDenied); (n == 3) == tt.in {
			t.Errorf("%s: %v refusals", tt.name, n)
		}
	}
}

func TestRanges(t *testing.T) {
	r := newRanges([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("::1/128")})
	for a, want := range map[string]bool{"10.1.2.3": true, "11.0.0.1": false, "192.0.2.1": true, "192.0.2.2": false, "2001:db8:1::": true, "::1": true, "::2": false} {
		if r.contains(netip.MustParseAddr(a)) != want {
			t.Error(a)
		}
	}
	if (*ranges)(nil).contains(netip.MustParseAddr("::1")) {
		t.Error("nothing holds something")
	}
}

// One limit holds on every version of HTTP together, and says when to come back.
func TestRequestRates(t *testing.T) {
	at := told(t)
	w := start(t, nil, under(web1("a", at), webgw.Policy{RequestRate: &webgw.RateLimit{Address: &webgw.Rate{Rate: "3/h"}}}),
		under(web1("all", at), webgw.Policy{RequestRate: &webgw.RateLimit{Total: &webgw.Rate{Rate: "1/m", Burst: 2}}}), web1("free", at))
	clients := []*http.Client{w.client(false), w.client(true)}
	for i := range 5 {
		status, _, h := get(t, clients[i%2], "https://a.example")
		if i < 3 && status != 200 || i >= 3 && (status != 429 || h.Get("Retry-After") != "1200" && h.Get("Retry-After") != "1199" || h.Get(ErrorHeader) != "too_many_requests") {
			t.Error(i, status, h)
		}
	}
	for i := range 3 {
		status, _, h := get(t, clients[i%2], "https://all.example")
		if (status == 200) != (i < 2) || i == 2 && h.Get("Retry-After") != "60" {
			t.Error(i, status, h)
		}
	}
	if status, _, _ := get(t, clients[0], "https://free.example"); status != 200 {
		t.Error("limited without a policy")
	}
	if n := refusals1(t, w, reasonRate); n != 3 {
		t.Error(n)
	}
	// A change elsewhere lets nobody off; a change of the policy does.
	again := func(rate string) int {
		d := under(web1("a", at), webgw.Policy{RequestRate: &webgw.RateLimit{Address: &webgw.Rate{Rate: rate}}})
		w.use(d, web1("new", at))
		status, _, _ := get(t, clients[0], "https://a.example")
		return status
	}
	if s := again("3/h"); s != 429 {
		t.Error(s)
	}
	if s := again("4/h"); s != 200 {
		t.Error(s)
	}
}

func TestConnectionRates(t *testing.T) {
	limit := webgw.Policy{ConnectionRate: &webgw.RateLimit{Address: &webgw.Rate{Rate: "1/s", Burst: 2}}}
	tcp := under(expose("tcp", webgw.TCP, nil, "10.9.9.9:1"), limit)
	tcp.Exposure.Port = 2222
	bubble(t, Limits{}, func(t *testing.T, w *world, visitor *memnet.Host) {
		w.up.set(&w.up.down, "10.9.9.9:1", true)
		counted := func(reason string) float64 { return refusals1(t, w, reason) }
		for i := range 4 {
			io.ReadAll(connect(t, visitor, "2222")) // reset either way
			synctest.Wait()
			if n := counted(reasonRate); n != float64(max(0, i-1)) {
				t.Errorf("%d: %v refused", i, n)
			}
		}
		time.Sleep(time.Second)
		io.ReadAll(connect(t, visitor, "2222"))
		synctest.Wait()
		if n := counted(reasonRate); n != 2 {
			t.Error("not let in again:", n)
		}
		// HTTP: before the handshake, and by a page.
		for i := range 3 {
			c := tls.Client(connect(t, visitor, "443"), &tls.Config{ServerName: "a.example", RootCAs: w.roots})
			if err := c.Handshake(); (err == nil) != (i < 2) {
				t.Error(i, err)
			}
			c.Close()
		}
		time.Sleep(time.Minute)
		for i := range 3 {
			c := connect(t, visitor, "80")
			io.WriteString(c, "GET / HTTP/1.1\r\nHost: a.example\r\n\r\nGET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n")
			b, _ := io.ReadAll(c)
			if n := strings.Count(string(b), "HTTP/1.1 503"); (n == 2) != (i < 2) || i == 2 && !strings.HasPrefix(string(b), "HTTP/1.1 429") {
				t.Errorf("%d: %s", i, b)
			}
		}
	}, tcp, under(web1("a", "10.9.9.9:1"), limit))
}

func TestBucketsAreBounded(t *testing.T) {
	var b buckets
	m := &meter{address: 0.001, burst: 2}
	now := time.Now()
	busy := netip.MustParseAddr("192.0.2.1")
	for b.take(m, busy, now) == 0 {
	}
	shard := spread(busy) % uint32(len(b.shards))
	for i := range 200_000 { // some 3,000 of them for this shard
		if a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}); spread(a)%uint32(len(b.shards)) == shard {
			b.take(m, a, now)
		}
	}
	if n := len(b.shards[shard].by); n > maxBuckets || n < maxBuckets/2 {
		t.Errorf("%d buckets", n)
	}
	if b.take(m, busy, now) == 0 {
		t.Error("who is over the limit was forgotten first")
	}
	// One customer of IPv6 is one.
	for i := range 3 {
		if wait := b.take(m, netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", i)), now); (wait > 0) != (i == 2) {
			t.Error(i, wait)
		}
	}
}

func TestConcurrency(t *testing.T) {
	began, finish := make(chan bool), make(chan bool)
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		began <- true
		<-finish
	})
	tcp := under(expose("tcp", webgw.TCP, nil, echo(t, "hello")), webgw.Policy{Concurrent: 1})
	tcp.Exposure.Port = freePort(t)
	w := start(t, nil, under(web1("a", at), webgw.Policy{Concurrent: 1}), tcp)
	var wg sync.WaitGroup
	wg.Go(func() { get(t, w.client(false), "https://a.example") })
	<-began
	if status, _, h := get(t, w.client(true), "https://a.example"); status != 503 || h.Get(ErrorHeader) != "concurrency_limit" || h.Get("Retry-After") == "" {
		t.Error(status, h)
	}
	w.use(under(web1("a", at), webgw.Policy{Concurrent: 1}), tcp) // keeps count
	if status, _, _ := get(t, w.client(true), "https://a.example"); status != 503 {
		t.Error(status)
	}
	close(finish)
	wg.Wait()
	go func() {
		for range began {
		}
	}()
	for status := 0; status != 200; { // counted out when its handler has returned
		status, _, _ = get(t, w.client(false), "https://a.example")
	}
	close(began)
	one := w.dial(w.Addrs()[2].String())
	io.ReadFull(one, make([]byte, 5))
	if got := knock(w.Addrs()[2].String()); got != "" {
		t.Errorf("%q", got)
	}
	if n := refusals1(t, w, reasonBusy); n != 3 {
		t.Error(n)
	}
}

func TestBodiesAreLimited(t *testing.T) {
	for _, upstream := range []webgw.Upstream{webgw.UpstreamHTTP1, webgw.UpstreamH2C} {
		d := under(web1("a", told(t)), webgw.Policy{MaxBody: 100_000})
		d.Exposure.Upstream = upstream
		w := start(t, nil, d)
		for _, h2 := range []bool{false, true} {
			c := w.client(h2)
			for _, tt := range []struct {
				size  int
				known bool
				want  int
			}{{100_000, true, 200}, {100_000, false, 200}, {100_001, true, 413}, {100_001, false, 413}, {5_000_000, false, 413}} {
				var body io.Reader = strings.NewReader(strings.Repeat("x", tt.size))
				if !tt.known {
					body = io.MultiReader(body)
				}
				res, err := c.Post("https://a.example", "text/plain", body)
				if err != nil {
					if tt.want == 413 && !tt.known {
						continue // the connection is closed while the visitor still writes
					}
					t.Fatal(err)
				}
				b, _ := io.ReadAll(res.Body)
				res.Body.Close()
				if res.StatusCode != tt.want || tt.want == 200 && !strings.Contains(string(b), fmt.Sprint("body=", tt.size)) || tt.want == 413 && res.Header.Get(ErrorHeader) != "body_too_large" {
					t.Errorf("%s h2=%t %d: %d %s", upstream, h2, tt.size, res.StatusCode, b)
				}
			}
		}
		// What was sent in one go is answered before the connection ends.
		got := w.raw(w.http, "POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n186a1\r\n"+strings.Repeat("x", 100_001)+"\r\n0\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 413") {
			t.Errorf("%.200s", got)
		}
	}
}

func TestAnswersAreLimited(t *testing.T) {
	const most = 100_000
	at := site(t, func(rw http.ResponseWriter, r *http.Request) {
		n, err := strconv.Atoi(r.URL.Query().Get("n"))
		if err != nil {
			t.Error(err)
		}
		if r.URL.Path == "/known" {
			rw.Header().Set("Content-Length", strconv.Itoa(n))
		} else {
			rw.WriteHeader(200)
			http.NewResponseController(rw).Flush()
		}
		io.CopyN(rw, noise(int64(n)), int64(n))
	})
	for _, upstream := range []webgw.Upstream{webgw.UpstreamHTTP1, webgw.UpstreamH2C} {
		d := under(web1("a", at), webgw.Policy{MaxResponse: most, Compress: &webgw.Compress{}})
		d.Exposure.Upstream = upstream
		w := start(t, withQUIC, d)
		cut := 0.0
		for version, c := range map[string]*http.Client{"h1": w.client(false), "h2": w.client(true), "h3": w.client3()} {
			for _, method := range []string{"GET", "HEAD"} {
				for _, kind := range []string{"known", "unknown"} {
					for _, n := range []int{0, most, most + 1, 50 * most} {
						r, err := http.NewRequestWithContext(t.Context(), method, fmt.Sprintf("https://a.example/%s?n=%d", kind, n), nil)
						if err != nil {
							t.Fatal(err)
						}
						res, err := c.Do(r)
						if err != nil {
							if version == "h1" || n <= most || method == "HEAD" || kind == "known" {
								t.Fatal(upstream, version, method, kind, n, err)
							}
							cut++ // a stream's reset may overtake the head of the answer
							continue
						}
						b, err := io.ReadAll(res.Body)
						res.Body.Close()
						whole := res.StatusCode == 200 && err == nil && (method == "HEAD" || len(b) == n)
						page := res.StatusCode == 502 && err == nil && res.Header.Get(ErrorHeader) == "answer_too_large"
						broken := res.StatusCode == 200 && err != nil && len(b) <= most
						switch large := n > most && method == "GET"; {
						case !large && !whole, large && kind == "known" && !page, large && kind == "unknown" && !broken:
							t.Errorf("%s %s %s %s %d: %d, %d bytes, %v", upstream, version, method, kind, n, res.StatusCode, len(b), err)
						case large:
							cut++
						}
					}
				}
			}
		}
		if n := refusals1(t, w, reasonAnswer); n != cut {
			t.Error(n, "refusals of", cut)
		}
		// Where only the connection's end tells the answer's, that is a reset.
		for n, wantEnd := range map[int]bool{most: true, most + 1: false} {
			c := w.dial(w.http)
			fmt.Fprintf(c, "GET /unknown?n=%d HTTP/1.0\r\nHost: a.example\r\n\r\n", n)
			if b, err := io.ReadAll(c); (err == nil) != wantEnd {
				t.Errorf("%s HTTP/1.0 %d: %d bytes, %v", upstream, n, len(b), err)
			}
		}
	}
}

func TestHTTPSOnly(t *testing.T) {
	at := told(t)
	w := start(t, func(s *Server) { s.PublicTLSPort = 8443 }, under(web1("a", at), webgw.Policy{HTTPSOnly: true, HSTS: &webgw.HSTS{MaxAge: 60, IncludeSubdomains: true}}), web1("b", at))
	status, _, h := fetch(t, w.plain(false), "POST", "http://a.example/x/%2e?q=1", "body")
	if status != 308 || h.Get("Location") != "https://a.example:8443/x/%2e?q=1" || h.Get("Strict-Transport-Security") != "" {
		t.Error(status, h)
	}
	for _, h2 := range []bool{false, true} {
		if status, _, h := get(t, w.client(h2), "https://a.example"); status != 200 || h.Get("Strict-Transport-Security") != "max-age=60; includeSubDomains" {
			t.Error(status, h)
		}
	}
	if status, _, h := get(t, w.client(false), "http://b.example"); status != 200 || h.Get("Strict-Transport-Security") != "" {
		t.Error(status, h)
	}
}

func argon(password string) string {
	sum := argon2.IDKey([]byte(password), []byte("saltsalt"), 1, 7<<10, 1, 16)
	return "$argon2id$v=19$m=7168,t=1,p=1$c2FsdHNhbHQ$" + base64.RawStdEncoding.EncodeToString(sum)
}

// bcryptSecret is that of "secret".
const bcryptSecret = "$2a$10$mSU9Vt9dSHb678y3SPjJSOYWSkq5ti4aPz6QPDtsVHB0R7Ns870Sq"

func TestPasswords(t *testing.T) {
	at := told(t)
	w := start(t, nil, under(web1("a", at), webgw.Policy{BasicAuth: &webgw.BasicAuth{Users: []webgw.User{{Name: "ann", Hash: argon("pass:word")}, {Name: "jürgen", Hash: argon("x")}}}}))
	basic := func(user, password string) string {
		r, _ := http.NewRequest("GET", "/", nil)
		r.SetBasicAuth(user, password)
		return r.Header.Get("Authorization")
	}
	c := w.plain(false)
	if status, _, h := fetch(t, c, "GET", "http://a.example", ""); status != 308 || h.Get("Www-Authenticate") != "" {
		t.Error("asked for a password in clear text:", status)
	}
	for _, tt := range []struct {
		auth, want string
	}{
		{"", ""}, {"Basic", ""}, {"Basic !!!", ""}, {"Bearer x", ""}, {basic("ann", "wrong"), ""}, {basic("nobody", "pass:word"), ""}, {basic("ann", ""), ""},
		{basic("ann", "pass:word"), "user=ann auth=false"},
		{basic("jürgen", "x"), "user=j%C3%BCrgen auth=false"},
		{strings.Replace(basic("ann", "pass:word"), "Basic", "bAsIc", 1), "user=ann auth=false"},
	} {
		for _, h2 := range []bool{false, true} {
			fields := []string{"X-Forwarded-User", "root"}
			if tt.auth != "" {
				fields = append(fields, "Authorization", tt.auth)
			}
			status, body, h := fetch(t, w.plain(h2), "GET", "https://a.example", "", fields...)
			if tt.want == "" && (status != 401 || h.Get("Www-Authenticate") != `Basic realm="a.example", charset="UTF-8"`) {
				t.Errorf("%q: %d %v", tt.auth, status, h)
			}
			if tt.want != "" && (status != 200 || !strings.HasPrefix(body, tt.want)) {
				t.Errorf("%q: %d %s", tt.auth, status, body)
			}
		}
	}
	if status, _, _ := fetch(t, c, "GET", "https://a.example", "", "Authorization", basic("ann", "pass:word"), "Authorization", basic("ann", "pass:word")); status != 401 {
		t.Error("two credentials:", status)
	}
	// Who guesses is slowed down; who was right lately is not.
	last := 0
	for i := range 2 * failures.burst {
		last, _, _ = fetch(t, c, "GET", "https://a.example", "", "Authorization", basic("ann", fmt.Sprint("guess", i)))
	}
	if last != 429 {
		t.Error("guessing goes on:", last)
	}
	if status, _, _ := fetch(t, c, "GET", "https://a.example", "", "Authorization", basic("ann", "pass:word")); status != 200 {
		t.Error("locked out:", status)
	}
}

func TestHashesOfBothKinds(t *testing.T) {
	for _, s := range []string{argon("secret"), bcryptSecret} {
		h, err := webgw.ParsePasswordHash(s)
		if err != nil || !matches(h, "secret") || matches(h, "Secret") {
			t.Error(s, err)
		}
	}
	if matches(webgw.PasswordHash{}, "") {
		t.Error("no hash matches")
	}
}

// A password is hashed once, however many ask at the same time.
func TestHashesAreRemembered(t *testing.T) {
	s := &Server{}
	s.setup()
	a, err := newAuthenticator(&webgw.Policy{BasicAuth: &webgw.BasicAuth{Users: []webgw.User{{Name: "ann", Hash: argon("x")}}}})
	if err != nil {
		t.Fatal(err)
	}
	r, _ := http.NewRequestWithContext(t.Context(), "GET", "/", nil)
	r.SetBasicAuth("ann", "x")
	from := netip.MustParseAddr("192.0.2.1")
	if _, _, _, err := a.identify(s, r, from); err != nil {
		t.Fatal(err)
	}
	a.users["ann"] = webgw.PasswordHash{} // would match nothing
	if who, _, _, err := a.identify(s, r, from); who != "ann" || err != nil {
		t.Error("not remembered:", err)
	}
	for i := range 2 * maxBad {
		a.remember(a.bad, maxBad, [32]byte{byte(i), byte(i >> 8)}, verdictOf{})
	}
	if len(a.bad) > maxBad || len(a.good) != 1 {
		t.Error(len(a.bad), len(a.good))
	}
	// With all places to wait taken, the answer is quick.
	for range maxHashing {
		a.queue <- struct{}{}
	}
	r.SetBasicAuth("ann", "y")
	if _, _, _, err := a.identify(s, r, from); err != errHashes {
		t.Error(err)
	}
}

func TestTokens(t *testing.T) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, foreign, _ := ed25519.GenerateKey(rand.Reader)
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: public, KeyID: "ed"}, {Key: ec.Public(), KeyID: "ec", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	sign := func(alg jose.SignatureAlgorithm, key any, kid string, claims map[string]any) string {
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
	now := time.Now()
	claims := func(change ...any) map[string]any {
		c := map[string]any{"iss": "https://id.example", "aud": []string{"other", "me"}, "sub": "ann@example", "exp": now.Add(time.Hour).Unix()}
		for i := 0; i < len(change); i += 2 {
			if c[change[i].(string)] = change[i+1]; change[i+1] == nil {
				delete(c, change[i].(string))
			}
		}
		return c
	}
	good := sign(jose.EdDSA, private, "ed", claims())
	parts := strings.Split(good, ".")
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + parts[1] + "."
	w := start(t, nil, under(web1("a", told(t)), webgw.Policy{JWT: &webgw.JWT{Issuer: "https://id.example", Audiences: []string{"me", "us"}, Keys: string(set)}}))
	for _, tt := range []struct {
		name, token string
		ok          bool
	}{
		{"EdDSA", good, true},
		{"again", good, true},
		{"ES256", sign(jose.ES256, ec, "ec", claims()), true},
		{"a little late", sign(jose.EdDSA, private, "ed", claims("exp", now.Add(-leeway/2).Unix())), true},
		{"expired", sign(jose.EdDSA, private, "ed", claims("exp", now.Add(-2*leeway).Unix())), false},
		{"no expiry", sign(jose.EdDSA, private, "ed", claims("exp", nil)), false},
		{"not yet", sign(jose.EdDSA, private, "ed", claims("nbf", now.Add(time.Hour).Unix())), false},
		{"other issuer", sign(jose.EdDSA, private, "ed", claims("iss", "https://evil.example")), false},
		{"other audience", sign(jose.EdDSA, private, "ed", claims("aud", "other")), false},
		{"no audience", sign(jose.EdDSA, private, "ed", claims("aud", nil)), false},
		{"foreign key", sign(jose.EdDSA, foreign, "ed", claims()), false},
		{"kid of another key", sign(jose.EdDSA, private, "ec", claims()), false},
		{"unsigned", none, false},
		{"HMAC by the public key", sign(jose.HS256, append([]byte{}, public...), "ed", claims()), false},
		{"changed", parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"https://id.example","aud":"me","sub":"root","exp":99999999999}`)) + "." + parts[2], false},
		{"garbage", "a.b.c", false},
	} {
		for _, h2 := range []bool{false, true} {
			status, body, h := fetch(t, w.plain(h2), "GET", "https://a.example", "", "Authorization", "Bearer "+tt.token)
			if tt.ok && (status != 200 || !strings.HasPrefix(body, "user=ann@example auth=true")) || !tt.ok && (status != 401 || h.Get("Www-Authenticate") != `Bearer error="invalid_token"`) {
				t.Errorf("%s: %d %s %v", tt.name, status, body, h)
			}
		}
	}
	if status, _, h := fetch(t, w.plain(false), "GET", "https://a.example", ""); status != 401 || h.Get("Www-Authenticate") != "Bearer" {
		t.Error(status, h)
	}
}

// clientCert mints a certificate by an authority, which it mints if it is nil.
func clientCert(t *testing.T, name string, by *tls.Certificate, until time.Time) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: until, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true}
	parent, signer := c, any(key)
	if by == nil {
		c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign, nil
	} else {
		parent, signer = by.Leaf, by.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func inPEM(c *tls.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Leaf.Raw}))
}

func TestClientCertificates(t *testing.T) {
	at := told(t)
	later := time.Now().Add(time.Hour)
	ca, otherCA := clientCert(t, "ca", nil, later), clientCert(t, "other", nil, later)
	policy := webgw.Policy{ClientCA: inPEM(ca)}
	open := web1("open", at)
	guarded := under(web1("a", at), policy)
	guarded.Exposure.Hosts = append(guarded.Exposure.Hosts, "a2.example")
	other := under(web1("b", at), webgw.Policy{ClientCA: inPEM(otherCA)})
	w := start(t, nil, guarded, other, open)
	client := func(h2 bool, c *tls.Certificate) *http.Client {
		client := w.plain(h2)
		conf := client.Transport.(*http.Transport).TLSClientConfig
		conf.ClientSessionCache = tls.NewLRUClientSessionCache(10)
		if c != nil {
			conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c, nil }
		}
		return client
	}
	ann := clientCert(t, "ann", ca, later)
	if status, _, h := fetch(t, w.plain(false), "GET", "http://a.example/x", ""); status != 308 || h.Get("Location") != "https://a.example/x" {
		t.Error("plain HTTP:", status)
	}
	for _, h2 := range []bool{false, true} {
		known := client(h2, ann)
		for range 2 { // on the same connection, and on a new one that might resume
			for _, url := range []string{"https://a.example", "https://a2.example"} {
				status, body, _ := fetch(t, known, "GET", url, "", "Client-Cert", ":forged:", "X-Forwarded-Client-Subject", "CN=root")
				if status != 200 || !strings.Contains(body, "cert=true subject=CN=ann print=64") {
					t.Error(h2, status, body)
				}
			}
			known.CloseIdleConnections()
		}
		if status, _, h := get(t, client(h2, nil), "https://a.example"); status != 403 || h.Get(ErrorHeader) != "certificate_required" {
			t.Error("without:", h2, status)
		}
		for name, c := range map[string]*tls.Certificate{"foreign": clientCert(t, "ann", otherCA, later), "expired": clientCert(t, "ann", ca, time.Now().Add(-time.Minute)), "self-signed": clientCert(t, "ann", nil, later)} {
			if res, err := client(h2, c).Get("https://a.example"); err == nil {
				res.Body.Close()
				t.Error(name, h2, res.StatusCode)
			}
		}
		if _, body, _ := fetch(t, known, "GET", "https://open.example", "", "Client-Cert", ":forged:"); !strings.Contains(body, "cert=false") {
			t.Error("forged:", body)
		}
		if res, err := known.Get("https://b.example"); err == nil {
			res.Body.Close()
			t.Error("by the certificate for another name:", res.StatusCode)
		}
	}
	// A connection made for another name proves nothing, and neither does one
	// that is older than the policy.
	c, err := tls.Dial("tcp", w.tls, &tls.Config{ServerName: "open.example", RootCAs: w.roots})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	old, err := tls.Dial("tcp", w.tls, &tls.Config{ServerName: "open.example", RootCAs: w.roots})
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	status := func(c net.Conn, host string) string {
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
		b := make([]byte, 12)
		io.ReadFull(c, b)
		return string(b)
	}
	if s := status(c, "a.example"); s != "HTTP/1.1 421" {
		t.Error(s)
	}
	w.use(guarded, under(web1("open", at), policy))
	if s := status(old, "open.example"); s != "HTTP/1.1 421" {
		t.Error(s)
	}
}

// What can't be derived from a policy lets nobody in.
func TestBrokenPoliciesLetNobodyIn(t *testing.T) {
	at := told(t)
	w := start(t, nil, under(web1("a", at), webgw.Policy{ClientCA: "broken"}), under(web1("b", at), webgw.Policy{JWT: &webgw.JWT{Keys: "broken"}}),
		under(web1("c", at), webgw.Policy{BasicAuth: &webgw.BasicAuth{Users: []webgw.User{{Name: "x", Hash: "broken"}}}}))
	for host, want := range map[string]int{"a": 403, "b": 401, "c": 401} {
		if status, _, _ := fetch(t, w.client(false), "GET", "https://"+host+".example", "", "Authorization", "Basic eDpicm9rZW4="); status != want {
			t.Error(host, status)
		}
	}
}
