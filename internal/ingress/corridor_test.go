package ingress

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// dialer is an Upstream that dials the target's address.
type dialer struct {
	net    netx.Net
	opens  atomic.Int64
	mu     sync.Mutex
	down   map[string]bool // can't be opened
	refuse map[string]bool // refused late, as a node does
	from   []Origin
}

func (d *dialer) set(m *map[string]bool, address string, on bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if *m == nil {
		*m = map[string]bool{}
	}
	(*m)[address] = on
}

func (d *dialer) Open(ctx context.Context, r *Route, t webgw.Target, from Origin) (Stream, error) {
	d.opens.Add(1)
	d.mu.Lock()
	d.from = append(d.from, from)
	down, refuse := d.down[t.Address], d.refuse[t.Address]
	d.mu.Unlock()
	if down {
		return nil, &webgw.Error{Kind: webgw.Unavailable, Public: "no session"}
	}
	c, err := d.net.Dial(ctx, "tcp", t.Address, nil)
	if err != nil {
		return nil, &webgw.Error{Kind: webgw.Unavailable, Public: "dial", Err: err}
	}
	return &dialed{c.(netx.CloseWriter), refuse, new(netx.Moved)}, nil
}

type dialed struct {
	netx.CloseWriter
	refuse bool
	moved  *netx.Moved
}

var errLate = &webgw.Error{Kind: webgw.Unavailable, Public: "nothing listens there"}

func (s *dialed) Read(p []byte) (int, error) {
	if s.refuse {
		return 0, errLate
	}
	return s.CloseWriter.Read(p)
}

func (s *dialed) Accepted() error {
	if s.refuse {
		return errLate
	}
	return nil
}

func (s *dialed) Join(visitor net.Conn, head []byte, done func(in, out int64, err error)) {
	if s.refuse {
		s.Close()
		done(int64(len(head)), 0, errLate)
		return
	}
	err := s.moved.Join(visitor, s.CloseWriter, head)
	s.Close()
	in, out := s.Progress()
	done(in, out, err)
}

func (s *dialed) Cut() { netx.Reset(s.CloseWriter) }

func (s *dialed) Progress() (in, out int64) { return s.moved.AB.Load(), s.moved.BA.Load() }

// world is a server and what it leads to.
type world struct {
	*Server
	t     testing.TB
	up    *dialer
	http  string // address of the HTTP port
	tls   string
	roots *x509.CertPool
	done  chan struct{}

	mu  sync.Mutex
	log []Access
}

type oneCert struct{ c *tls.Certificate }

func (o oneCert) GetCertificate(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if h.ServerName == "uncertified.example" {
		return nil, errors.New("none")
	}
	return o.c, nil
}

// certificate mints one for *.example.
func certificate(t testing.TB) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"*.example"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// start runs a server on loopback. change may set more fields.
func start(t testing.TB, change func(*Server), table ...Declared) *world {
	t.Helper()
	cert := certificate(t)
	up := &dialer{net: netx.Host{}}
	w := &world{t: t, up: up, roots: x509.NewCertPool(), done: make(chan struct{})}
	w.roots.AddCert(cert.Leaf)
	w.Server = &Server{HTTPAddr: "127.0.0.1:0", TLSAddr: "127.0.0.1:0", BindHost: "127.0.0.1", Name: "gent", Upstream: up, Certificates: oneCert{cert},
		Log: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
		AccessLog: func(a Access) {
			w.mu.Lock()
			w.log = append(w.log, a)
			w.mu.Unlock()
		}}
	if change != nil {
		change(w.Server)
	}
	if d, ok := w.Upstream.(*dialer); ok {
		d.net = cmpNet(w.Net)
		w.up = d
	}
	w.use(table...)
	ctx, cancel := context.WithCancel(context.Background())
	if err := w.Listen(ctx); err != nil {
		t.Fatal(err)
	}
	addrs := w.Addrs()
	w.http, w.tls = addrs[0].String(), addrs[1].String()
	go func() {
		defer close(w.done)
		if err := w.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-w.done
	})
	return w
}

func cmpNet(n netx.Net) netx.Net {
	if n == nil {
		return netx.Host{}
	}
	return n
}

func (w *world) use(table ...Declared) {
	w.t.Helper()
	t, problems := Build(table)
	if len(problems) > 0 {
		w.t.Fatal(problems)
	}
	w.SetTable(t)
}

// accesses returns what was recorded so far.
func (w *world) accesses() []Access {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]Access(nil), w.log...)
}

func key(name string) webgw.Key {
	return webgw.Key{Kind: webgw.KindExposure, Owner: webgw.ID{1}, Name: name}
}

func expose(name string, p webgw.ExposureProtocol, hosts []string, targets ...string) Declared {
	e := &webgw.Exposure{Protocol: p, Hosts: hosts}
	for _, a := range targets {
		e.Targets = append(e.Targets, webgw.Target{Node: webgw.ID{9}, Address: a})
	}
	return Declared{key(name), e}
}

func web1(name string, targets ...string) Declared {
	return expose(name, webgw.HTTP, []string{name + ".example"}, targets...)
}

// site runs an HTTP workload that also speaks h2c.
func site(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// client speaks to the gateway whatever the name; h2 or HTTP/1.1.
func (w *world) client(h2 bool) *http.Client {
	var protocols http.Protocols
	protocols.SetHTTP1(!h2)
	protocols.SetHTTP2(h2)
	tr := &http.Transport{Protocols: &protocols, TLSClientConfig: &tls.Config{RootCAs: w.roots},
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			to := w.http
			if strings.HasSuffix(addr, ":443") {
				to = w.tls
			}
			return cmpNet(w.Net).Dial(ctx, "tcp", to, nil)
		}}
	w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func (w *world) dial(addr string) netx.CloseWriter {
	w.t.Helper()
	c, err := cmpNet(w.Net).Dial(context.Background(), "tcp", addr, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c.(netx.CloseWriter)
}

// get returns the status and body of an answer.
func get(t testing.TB, c *http.Client, url string) (int, string, http.Header) {
	t.Helper()
	res, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b), res.Header
}

// raw sends bytes and returns all that comes back.
func (w *world) raw(addr, request string) string {
	w.t.Helper()
	c := w.dial(addr)
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(c, request); err != nil {
		w.t.Fatal(err)
	}
	b, _ := io.ReadAll(c) // a reset is an end as well
	return string(b)
}

// echo runs a TCP workload that sends a greeting, then back what it gets until
// the end, then "bye".
func echo(t testing.TB, greeting string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				io.WriteString(c, greeting)
				io.Copy(c, c)
				io.WriteString(c, "bye")
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

func freePort(t testing.TB) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func TestHTTPReachesTheWorkload(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		for _, name := range []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded", "X-Real-Ip", "X_forwarded_for", "X-Forwarded-Prefix", "Proxy", "Webgw-Refused", "Upgrade", "Http2-Settings", "Secret"} {
			for _, v := range r.Header[name] {
				w.Header().Add("Saw-"+name, v)
			}
		}
		w.Header().Set("Webgw-Error", "forged")
		w.Header().Set("Saw-Host", r.Host)
		w.Header().Set("Saw-Id", r.Header.Get("X-Request-Id"))
		io.WriteString(w, r.Proto+" "+r.URL.RequestURI())
	})
	w := start(t, nil, web1("blog", at))
	for _, tt := range []struct {
		name, url string
		h2        bool
		proto     string
	}{
		{"http", "http://blog.example", false, "http"},
		{"https", "https://blog.example", false, "https"},
		{"h2", "https://blog.example", true, "https"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := http.NewRequest("GET", tt.url+"//a%2Fb/../c;d?x=1;y=%zz&z", nil)
			if err != nil {
				t.Fatal(err)
			}
			for name, v := range map[string]string{"X-Forwarded-For": "1.2.3.4", "X_Forwarded_For": "1.2.3.4", "X-Forwarded-Host": "evil", "X-Forwarded-Prefix": "/evil",
				"Forwarded": "for=evil", "X-Real-IP": "evil", "X-Request-Id": "mine", "Proxy": "evil"} {
				r.Header[name] = []string{v}
			}
			if !tt.h2 {
				r.Header["Connection"] = []string{"Secret, X-Forwarded-For, Upgrade, HTTP2-Settings"}
				r.Header["Secret"], r.Header["Upgrade"], r.Header["HTTP2-Settings"] = []string{"s"}, []string{"h2c"}, []string{"x"}
			}
			res, err := w.client(tt.h2).Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			if err != nil || string(body) != "HTTP/1.1 //a%2Fb/../c;d?x=1;y=%zz&z" {
				t.Errorf("%q, %v", body, err)
			}
			id := res.Header.Get("Saw-Id")
			if len(id) != 32 || id == "mine" {
				t.Errorf("request id %q", id)
			}
			want := http.Header{"Saw-X-Forwarded-For": {"127.0.0.1"}, "Saw-X-Forwarded-Host": {"blog.example"}, "Saw-X-Forwarded-Proto": {tt.proto},
				"Saw-Forwarded": {"for=127.0.0.1;host=blog.example;proto=" + tt.proto}, "Saw-Host": {"blog.example"}, "Saw-Id": {id}}
			for name, v := range res.Header {
				if strings.HasPrefix(name, "Saw-") && strings.Join(v, "|") != strings.Join(want[name], "|") {
					t.Errorf("%s: %q, want %q", name, v, want[name])
				}
				delete(want, name)
			}
			if len(want) > 0 || res.Header.Get(ErrorHeader) != "" {
				t.Errorf("missing %v; %v", want, res.Header)
			}
		})
	}
	w.client(false).CloseIdleConnections()
	for _, a := range w.accesses() {
		if a.Exposure != key("blog") || a.Status != 200 || a.Target.Address != at || a.Host != "blog.example" || a.BytesOut == 0 || a.Path != "//a/b/../c;d" {
			t.Errorf("%+v", a)
		}
	}
}

func TestErrorPages(t *testing.T) {
	w := start(t, nil, web1("a", echo(t, "")), web1("gone", "127.0.0.1:1"), expose("pass", webgw.TLS, []string{"pass.example"}, "127.0.0.1:1"))
	w.up.set(&w.up.down, "127.0.0.1:1", true)
	for _, tt := range []struct {
		url, code string
		status    int
	}{
		{"http://nobody.example/<script>", "unknown_host", 404},
		{"http://pass.example/", "tls_only", 404},
		{"http://gone.example/", "target_unreachable", 503},
	} {
		status, body, h := get(t, w.client(false), tt.url)
		if status != tt.status || h.Get(ErrorHeader) != tt.code || !strings.Contains(body, h.Get("X-Request-Id")) || strings.Contains(body, "script") {
			t.Errorf("%s: %d %v %s", tt.url, status, h, body)
		}
		if (h.Get("Retry-After") != "") != (status == 503) {
			t.Errorf("%s: Retry-After %q", tt.url, h.Get("Retry-After"))
		}
	}
	for accept, kind := range map[string]string{"text/html,*/*": "text/html; charset=utf-8", "application/json": "application/json", "*/*": "text/plain; charset=utf-8"} {
		r, err := http.NewRequest("GET", "http://nobody.example", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Accept", accept)
		res, err := w.client(false).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.Header.Get("Content-Type") != kind {
			t.Errorf("%s: %s", accept, res.Header.Get("Content-Type"))
		}
	}
	// The name that TLS was made for decides, on HTTP/1 and HTTP/2.
	for _, h2 := range []bool{false, true} {
		for _, host := range []string{"gone.example", "pass.example", "nobody.example"} {
			r, err := http.NewRequest("GET", "https://a.example", nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Host = host
			res, err := w.client(h2).Do(r)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if res.StatusCode != 421 {
				t.Errorf("h2 %v, %s: %d", h2, host, res.StatusCode)
			}
		}
	}
}

func TestStreamsPassBytesAndEnds(t *testing.T) {
	port, silent := freePort(t), echo(t, "")
	tcp := expose("tcp", webgw.TCP, nil, echo(t, "hello"))
	tcp.Exposure.Port = port
	w := start(t, nil, tcp, expose("pass", webgw.TLS, []string{"pass.example"}, silent))

	c := w.dial(w.Addrs()[2].String())
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" { // the server speaks first
		t.Fatalf("%q, %v", b, err)
	}
	ask := bytes.Repeat([]byte("question"), 100_000)
	go func() {
		c.Write(ask)
		c.CloseWrite()
	}()
	if got, err := io.ReadAll(c); err != nil || string(got) != string(ask)+"bye" {
		t.Errorf("%d bytes, %v", len(got), err)
	}

	// Passthrough: what the visitor sends is what arrives, to the byte.
	hello := helloBytes(t, &tls.Config{ServerName: "PASS.example"})
	c = w.dial(w.tls)
	if _, err := c.Write(append(hello, "more"...)); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != string(hello)+"more"+"bye" {
		t.Errorf("%d bytes of %d, %v", len(got), len(hello), err)
	}
	for _, a := range w.accesses() {
		if a.Err != nil || a.BytesIn == 0 || a.BytesOut == 0 || a.Exposure.Name == "pass" && a.Host != "pass.example" {
			t.Errorf("%+v", a)
		}
	}
}

func TestOtherTargetsAreTried(t *testing.T) {
	good := echo(t, "")
	page := site(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	for _, how := range []string{"down", "refuse"} {
		t.Run(how, func(t *testing.T) {
			bad := echo(t, "wrong")
			port := freePort(t)
			tcp := expose("tcp", webgw.TCP, nil, bad, good)
			tcp.Exposure.Port = port
			w := start(t, nil, tcp, expose("pass", webgw.TLS, []string{"pass.example"}, bad, good), web1("web", bad, page), web1("bad", bad))
			m := &w.up.down
			if how == "refuse" {
				m = &w.up.refuse
			}
			w.up.set(m, bad, true)
			hello := helloBytes(t, &tls.Config{ServerName: "pass.example"})
			for range 4 {
				for addr, say := range map[string]string{w.Addrs()[2].String(): "x", w.tls: string(hello)} {
					c := w.dial(addr)
					io.WriteString(c, say)
					c.CloseWrite()
					if got, err := io.ReadAll(c); string(got) != say+"bye" {
						t.Errorf("%q, %v", got, err)
					}
				}
				res, err := w.client(false).Post("http://web.example", "text/plain", strings.NewReader("body"))
				if err != nil {
					t.Fatal(err)
				}
				b, _ := io.ReadAll(res.Body)
				res.Body.Close()
				if res.StatusCode != 200 || string(b) != "body" {
					t.Errorf("POST: %d %q", res.StatusCode, b)
				}
				if status, body, _ := get(t, w.client(false), "http://web.example"); status != 200 {
					t.Errorf("GET: %d %s", status, body)
				}
			}
			want := map[string]int{"down": 503, "refuse": 502}[how]
			if status, _, _ := get(t, w.client(false), "http://bad.example"); status != want {
				t.Errorf("all bad: %d", status)
			}
		})
	}
}
