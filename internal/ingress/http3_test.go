package ingress

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/netx/memnet"
)

func withQUIC(s *Server) { s.QUIC = true }

// socket is a UDP socket of a visitor, as a transport of QUIC.
func (w *world) socket(from netx.Net) *quic.Transport {
	w.t.Helper()
	c, err := cmpNet(from).ListenPacket(context.Background(), "udp", ":0")
	if err != nil {
		w.t.Fatal(err)
	}
	tr := &quic.Transport{Conn: quiet{c}}
	w.t.Cleanup(func() { tr.Close(); c.Close() })
	return tr
}

// udpAddr is where the gateway takes QUIC.
func (w *world) udpAddr() *net.UDPAddr {
	at := netip.MustParseAddrPort(w.tls)
	if at.Addr().IsUnspecified() {
		at = netip.AddrPortFrom(w.Net.(*memnet.Host).Addrs()[0], at.Port())
	}
	return net.UDPAddrFromAddrPort(at)
}

// transport3 speaks HTTP/3 to the gateway whatever the name.
func (w *world) transport3(tr *quic.Transport) *http3.Transport {
	t3 := &http3.Transport{TLSClientConfig: &tls.Config{RootCAs: w.roots}, DisableCompression: true,
		Dial: func(ctx context.Context, _ string, t *tls.Config, c *quic.Config) (*quic.Conn, error) {
			return tr.Dial(ctx, w.udpAddr(), t, c)
		}}
	w.t.Cleanup(func() { t3.Close() })
	return t3
}

func (w *world) client3() *http.Client {
	return &http.Client{Transport: w.transport3(w.socket(w.Net))}
}

func TestHTTP3ReachesTheWorkload(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		fmt.Fprintf(w, "%s %s %s %q len=%d te=%v for=%v proto=%s port=%v rid=%t", r.Method, r.Host, r.RequestURI, b, r.ContentLength, r.TransferEncoding,
			r.Header["X-Forwarded-For"], r.Header.Get("X-Forwarded-Proto"), r.Header.Get("X-Forwarded-Port") != "", r.Header.Get("X-Request-Id") != "")
	})
	w := start(t, withQUIC, web1("a", at), web1("b", at))
	c := w.client3()
	status, body, h := get(t, c, "https://a.example/x?y=%20")
	if want := `GET a.example /x?y=%20 "" len=0 te=[] for=[127.0.0.1] proto=https port=true rid=true`; status != 200 || body != want {
		t.Errorf("%d %s", status, body)
	}
	if h.Get("Alt-Svc") != "" || h.Get("X-Request-Id") == "" || h.Get("Content-Type") == "" {
		t.Errorf("%v", h)
	}
	res, err := c.Post("https://a.example/", "text/plain", strings.NewReader("hello"))
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(res.Body)
	res.Body.Close()
	if !strings.HasPrefix(string(b), `POST a.example / "hello" len=5 te=[]`) || res.Proto != "HTTP/3.0" {
		t.Errorf("%s %s", res.Proto, b)
	}
	r, _ := http.NewRequest("DELETE", "https://b.example/z", io.MultiReader(strings.NewReader("body")))
	if res, err = c.Do(r); err != nil {
		t.Fatal(err)
	}
	b, _ = io.ReadAll(res.Body)
	res.Body.Close()
	if !strings.HasPrefix(string(b), `DELETE b.example /z "body" len=-1 te=[chunked]`) {
		t.Errorf("%s", b)
	}
	res, err = c.Head("https://a.example/")
	if err != nil || res.StatusCode != 200 {
		t.Errorf("%v %v", res, err)
	}
	for _, a := range w.accesses() {
		if a.Proto != "HTTP/3.0" || a.Status != 200 || a.Exposure.Name == "" || a.Visitor != netip.MustParseAddr("127.0.0.1") {
			t.Errorf("access %+v", a)
		}
	}
	if n := len(w.accesses()); n != 4 {
		t.Errorf("%d in the access log", n)
	}
	// HTTP/1 and HTTP/2 tell of it, where TLS ends; a workload may have its own word.
	for _, h2 := range []bool{false, true} {
		if _, _, h := get(t, w.client(h2), "https://a.example/"); h.Get("Alt-Svc") != `h3=":443"; ma=86400` {
			t.Errorf("h2 %v: %v", h2, h)
		}
		if _, _, h := get(t, w.client(h2), "https://a.example:443/"); h.Get("Alt-Svc") == "" {
			t.Errorf("h2 %v: %v", h2, h)
		}
	}
	if _, _, h := get(t, w.client(false), "http://a.example/"); h.Get("Alt-Svc") != "" {
		t.Errorf("without TLS: %v", h)
	}
}

func TestHTTP3IsJudgedLikeTheOthers(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "in") })
	limited := web1("limited", at)
	limited.Exposure.Policy = &webgw.Policy{MaxBody: 10, RequestRate: &webgw.RateLimit{Address: &webgw.Rate{Rate: "2/m", Burst: 2}}, HSTS: &webgw.HSTS{MaxAge: 60}}
	closed := web1("closed", at)
	closed.Exposure.Policy = &webgw.Policy{Deny: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}
	w := start(t, withQUIC, web1("a", at), limited, closed, expose("vault", webgw.TLS, []string{"vault.example"}, at))
	tr := w.transport3(w.socket(nil))
	c := &http.Client{Transport: tr}
	do := func(method, url string, body io.Reader, change func(*http.Request)) (int, string, http.Header) {
		t.Helper()
		r, err := http.NewRequest(method, url, body)
		if err != nil {
			t.Fatal(err)
		}
		if change != nil {
			change(r)
		}
		res, err := c.Do(r)
		if err != nil {
			return 0, err.Error(), nil
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			return 0, err.Error(), nil
		}
		return res.StatusCode, string(b), res.Header
	}
	for name, tt := range map[string]struct {
		method, url string
		host        string
		status      int
		code        string
	}{
		"another name":          {"GET", "https://a.example/", "nobody.example", 421, "misdirected"},
		"a name passed through": {"GET", "https://a.example/", "vault.example", 421, "misdirected"},
		"trace":                 {"TRACE", "https://a.example/", "", 405, ""},
		"denied":                {"GET", "https://closed.example/", "", 403, "address_denied"},
		"well":                  {"GET", "https://a.example/", "", 200, ""},
	} {
		status, body, h := do(tt.method, tt.url, nil, func(r *http.Request) { r.Host = tt.host })
		if status != tt.status || tt.code != "" && h.Get(ErrorHeader) != tt.code {
			t.Errorf("%s: %d %s %v", name, status, body, h)
		}
	}
	if status, body, h := do("POST", "https://limited.example/", strings.NewReader("01234567890"), nil); status != 413 || h.Get("Strict-Transport-Security") == "" {
		t.Errorf("body: %d %s %v", status, body, h)
	}
	do("GET", "https://limited.example/", nil, nil)
	if status, _, h := do("GET", "https://limited.example/", nil, nil); status != 429 || h.Get("Retry-After") == "" {
		t.Errorf("rate: %d %v", status, h)
	}
	// Names that are not terminated here, or not at all.
	for _, host := range []string{"vault.example", "nobody.example", "uncertified.example"} {
		if status, err, _ := do("GET", "https://"+host+"/", nil, nil); status != 0 && host != "uncertified.example" || !strings.Contains(err, "unrecognized name") {
			t.Errorf("%s: %d %s", host, status, err)
		}
	}
}

func TestHTTP3Bodies(t *testing.T) {
	const size = 8 << 20
	began, ended := make(chan bool), make(chan bool)
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/up":
			io.WriteString(w, sum(t, r.Body))
		case "/down":
			io.Copy(w, noise(size))
		case "/echo":
			http.NewResponseController(w).EnableFullDuplex()
			w.WriteHeader(200)
			http.NewResponseController(w).Flush()
			io.Copy(w, r.Body)
		case "/hints":
			w.Header().Set("Link", "</x.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
			io.Copy(w, r.Body)
		case "/trailers":
			w.Header().Set("Trailer", "Announced")
			io.Copy(io.Discard, r.Body)
			io.WriteString(w, r.Trailer.Get("Sum")+r.Trailer.Get("X-Forwarded-For"))
			w.Header().Set("Announced", "a")
			w.Header().Set(http.TrailerPrefix+"Unannounced", "u")
		case "/wait":
			began <- true
			<-r.Context().Done()
			ended <- true
		case "/cut":
			io.WriteString(w, "half")
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
	})
	w := start(t, withQUIC, web1("big", at))
	c := w.client3()
	want := sum(t, noise(size))
	post := func(path string, body io.Reader, change func(r *http.Request)) *http.Response {
		t.Helper()
		r, err := http.NewRequest("POST", "https://big.example"+path, body)
		if err != nil {
			t.Fatal(err)
		}
		if change != nil {
			change(r)
		}
		res, err := c.Do(r)
		if err != nil {
			t.Fatal(path, err)
		}
		t.Cleanup(func() { res.Body.Close() })
		return res
	}
	if b, err := io.ReadAll(post("/up", noise(size), nil).Body); string(b) != want || err != nil {
		t.Errorf("up: %s, %v", b, err)
	}
	if got := sum(t, post("/down", nil, nil).Body); got != want {
		t.Errorf("down: %s", got)
	}
	if got := sum(t, post("/echo", noise(size), nil).Body); got != want {
		t.Errorf("echo: %s", got)
	}
	var mu sync.Mutex
	var seen []int
	trace := func(r *http.Request) {
		*r = *r.WithContext(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			mu.Lock()
			seen = append(seen, code)
			mu.Unlock()
			return nil
		}}))
		r.Header.Set("Expect", "100-continue")
	}
	b, err := io.ReadAll(post("/hints", strings.NewReader("body"), trace).Body)
	if string(b) != "body" || err != nil || fmt.Sprint(seen) != "[100 103]" {
		t.Errorf("%q, %v, 1xx %v", b, err, seen)
	}
	res := post("/trailers", io.MultiReader(strings.NewReader("body")), func(r *http.Request) { r.Trailer = http.Header{"Sum": {"42"}, "X-Forwarded-For": {"evil"}} })
	b, err = io.ReadAll(res.Body)
	if string(b) != "42" || err != nil || res.Trailer.Get("Announced") != "a" || res.Trailer.Get("Unannounced") != "u" {
		t.Errorf("%q, %v, %v", b, err, res.Trailer)
	}
	// What was cut off must not look whole.
	if res, err := c.Post("https://big.example/cut", "", nil); err == nil { // a reset may overtake the head
		if b, err := io.ReadAll(res.Body); err == nil {
			t.Errorf("cut: %q", b)
		}
		res.Body.Close()
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-began; cancel() }()
	r, _ := http.NewRequestWithContext(ctx, "GET", "https://big.example/wait", nil)
	if _, err := c.Do(r); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	<-ended
}

func TestHTTP3GRPC(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Proto) })
	w := start(t, withQUIC, web1("g", at))
	r, _ := http.NewRequest("POST", "https://g.example/", strings.NewReader("x"))
	r.Header.Set("Content-Type", "application/grpc")
	res, err := w.client3().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if b, _ := io.ReadAll(res.Body); string(b) != "HTTP/2.0" {
		t.Errorf("%s", b)
	}
}

func TestHTTP3ClientCertificates(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, r.Header.Get("X-Forwarded-Client-Subject"))
	})
	own := web1("own", at)
	later := time.Now().Add(time.Hour)
	ca := clientCert(t, "ca", nil, later)
	own.Exposure.Policy = &webgw.Policy{ClientCA: inPEM(ca)}
	w := start(t, withQUIC, own, web1("open", at))
	tr := w.transport3(w.socket(nil))
	tr.TLSClientConfig.ServerName = "own.example"
	c := &http.Client{Transport: tr}
	if status, _, h := get(t, c, "https://own.example/"); status != 403 || h.Get(ErrorHeader) != "certificate_required" {
		t.Errorf("without: %d %v", status, h)
	}
	with := w.transport3(w.socket(nil))
	with.TLSClientConfig.Certificates = []tls.Certificate{*clientCert(t, "ann", ca, later)}
	if status, body, _ := get(t, &http.Client{Transport: with}, "https://own.example/"); status != 200 || body != "CN=ann" {
		t.Errorf("with: %d %s", status, body)
	}
}

// quicBubble is a server with QUIC on a network in memory, with fake time.
func quicBubble(t *testing.T, limits Limits, change func(*Server), f func(t *testing.T, w *world, m *memnet.World), table ...Declared) {
	synctest.Test(t, func(t *testing.T) {
		m := memnet.New(1)
		gateway := m.Host("gateway", gwAddrs...)
		w := start(t, func(s *Server) {
			s.Net, s.Limits, s.QUIC = gateway, limits, true
			s.HTTPAddr, s.TLSAddr, s.BindHost = ":80", ":443", ""
			if change != nil {
				change(s)
			}
		}, table...)
		f(t, w, m)
	})
}

// memSite runs an HTTP workload on a host of a network in memory.
func memSite(t *testing.T, h *memnet.Host, handler http.HandlerFunc) {
	t.Helper()
	l, err := h.Listen(t.Context(), "tcp", ":8080")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: handler}
	var wg sync.WaitGroup
	wg.Go(func() { s.Serve(l) })
	t.Cleanup(func() { s.Close(); wg.Wait() })
}

func hostAt(m *memnet.World, addr string) *memnet.Host {
	return m.Host("at "+addr, netip.MustParseAddr(addr))
}

func TestHTTP3Shutdown(t *testing.T) {
	quicBubble(t, Limits{Drain: time.Minute}, nil, func(t *testing.T, w *world, m *memnet.World) {
		begun := make(chan bool)
		memSite(t, w.Net.(*memnet.Host), func(rw http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/slow" {
				begun <- true
				time.Sleep(20 * time.Second)
			}
			io.WriteString(rw, "answer")
		})
		w.use(web1("a", "gateway:8080"))
		idle := &http.Client{Transport: w.transport3(w.socket(hostAt(m, "203.0.113.1")))}
		get(t, idle, "https://a.example/")
		busy := &http.Client{Transport: w.transport3(w.socket(hostAt(m, "203.0.113.2")))}
		got := make(chan string)
		go func() {
			_, body, _ := get(t, busy, "https://a.example/slow")
			got <- body
		}()
		<-begun
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		down := make(chan struct{})
		go func() { defer close(down); w.Shutdown(ctx) }()
		if body := <-got; body != "answer" {
			t.Errorf("%q", body)
		}
		<-down
		if took := time.Since(began); took < 20*time.Second || took > 25*time.Second {
			t.Errorf("took %v", took)
		}
		if n := w.doors.total.Load(); n != 0 {
			t.Errorf("%d connections are still counted", n)
		}
	})
}

func TestHTTP3Doors(t *testing.T) {
	quicBubble(t, Limits{PerAddress: 2}, nil, func(t *testing.T, w *world, m *memnet.World) {
		memSite(t, w.Net.(*memnet.Host), func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "answer") })
		w.use(web1("a", "gateway:8080"))
		h := hostAt(m, "203.0.113.1")
		tcp := connect(t, h, "443")
		clients := make([]*http.Client, 3)
		for i := range clients {
			clients[i] = &http.Client{Transport: w.transport3(w.socket(h))}
		}
		synctest.Wait()
		get(t, clients[0], "https://a.example/")
		if res, err := clients[1].Get("https://a.example/"); err == nil {
			t.Errorf("a third connection of an address: %v", res.Status)
		}
		other := &http.Client{Transport: w.transport3(w.socket(hostAt(m, "203.0.113.2")))}
		get(t, other, "https://a.example/")
		tcp.Close()
		time.Sleep(time.Second)
		get(t, clients[2], "https://a.example/")
		// Idle connections end.
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if n := w.doors.total.Load(); n != 0 {
			t.Errorf("%d connections are still counted", n)
		}
	})
}

// Visitors on other addresses of the gateway are answered from there, and one
// whose address changes keeps the connection.
func TestHTTP3Addresses(t *testing.T) {
	quicBubble(t, Limits{}, nil, func(t *testing.T, w *world, m *memnet.World) {
		memSite(t, w.Net.(*memnet.Host), func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, r.Header.Get("X-Forwarded-Port")) })
		w.use(web1("a", "gateway:8080"))
		for i, at := range gwAddrs {
			h := m.Host(fmt.Sprint("visitor ", i))
			c, err := h.Dial(t.Context(), "udp", netip.AddrPortFrom(at, 443).String(), nil)
			if err != nil {
				t.Fatal(err)
			}
			tr := &quic.Transport{Conn: connected{quiet{c.(net.PacketConn)}, c}}
			t3 := w.transport3(tr)
			if _, body, _ := get(t, &http.Client{Transport: t3}, "https://a.example/"); body != "443" {
				t.Errorf("%v: %q", at, body)
			}
			t3.Close()
			tr.Close()
			c.Close()
		}
		nat := &rebound{on: hostAt(m, "203.0.113.7")}
		nat.rebind(t)
		tr := &quic.Transport{Conn: nat}
		t3 := w.transport3(tr)
		c := &http.Client{Transport: t3}
		get(t, c, "https://a.example/")
		nat.rebind(t)
		get(t, c, "https://a.example/")
		if n := value(t, w.metrics.accepted.WithLabelValues(carriesQUIC)); n != float64(len(gwAddrs)+1) {
			t.Errorf("%v connections", n)
		}
		t3.Close()
		tr.Close()
		nat.Close()
	})
}

// connected sends on a connected socket: answers from elsewhere don't arrive.
type connected struct {
	quiet
	c net.Conn
}

func (c connected) WriteTo(p []byte, _ net.Addr) (int, error) { return c.c.Write(p) }

// rebound is a socket whose address changes without its owner's knowledge, as
// behind a NAT that has forgotten.
type rebound struct {
	quiet
	on  *memnet.Host
	mu  sync.Mutex
	now net.PacketConn
}

func (r *rebound) rebind(t *testing.T) {
	t.Helper()
	c, err := r.on.ListenPacket(context.Background(), "udp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.now != nil {
		r.now.Close()
	}
	r.now = c
}

func (r *rebound) current() net.PacketConn {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.now
}

func (r *rebound) ReadFrom(p []byte) (int, net.Addr, error) {
	for {
		c := r.current()
		n, from, err := c.ReadFrom(p)
		if errors.Is(err, net.ErrClosed) && c != r.current() {
			continue
		}
		return n, from, err
	}
}

func (r *rebound) WriteTo(p []byte, to net.Addr) (int, error) { return r.current().WriteTo(p, to) }
func (r *rebound) LocalAddr() net.Addr                        { return r.current().LocalAddr() }
func (r *rebound) Close() error                               { return r.current().Close() }
func (r *rebound) SetReadDeadline(t time.Time) error          { return r.current().SetReadDeadline(t) }
func (r *rebound) SetDeadline(t time.Time) error              { return r.current().SetDeadline(t) }
func (r *rebound) SetWriteDeadline(t time.Time) error         { return nil }

func TestOwnIDs(t *testing.T) {
	ids, err := newOwnIDs()
	if err != nil {
		t.Fatal(err)
	}
	other, err := newOwnIDs()
	if err != nil {
		t.Fatal(err)
	}
	a, _ := ids.GenerateConnectionID()
	b, _ := ids.GenerateConnectionID()
	if !ids.own(a.Bytes()) || !ids.own(b.Bytes()) || bytes.Equal(a.Bytes(), b.Bytes()) || other.own(a.Bytes()) || ids.own(a.Bytes()[:15]) {
		t.Errorf("%v %v", a, b)
	}
}

func TestPeersArePackedWhole(t *testing.T) {
	for _, k := range []flowKey{
		{netip.MustParseAddrPort("203.0.113.1:5"), netip.MustParseAddr("198.51.100.1")},
		{netip.MustParseAddrPort("[2001:db8::1]:5"), netip.MustParseAddr("2001:db8::2")},
		{netip.MustParseAddrPort("[fe80::1%3]:5"), netip.MustParseAddr("fe80::2%3")},
		{netip.MustParseAddrPort("203.0.113.1:5"), netip.Addr{}},
	} {
		if visitor, local := unpackPeer(packPeer(k)); visitor != k.visitor || local != k.local {
			t.Errorf("%v: %v %v", k, visitor, local)
		}
	}
}
