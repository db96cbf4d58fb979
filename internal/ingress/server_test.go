package ingress

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/netx/memnet"
)

func value(t *testing.T, c prometheus.Metric) float64 {
	t.Helper()
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}

// bubble runs a server on a network in memory, with fake time.
func bubble(t *testing.T, limits Limits, f func(t *testing.T, w *world, visitor *memnet.Host), table ...Declared) {
	synctest.Test(t, func(t *testing.T) {
		m := memnet.New(1)
		gateway, visitor := m.Host("gateway"), m.Host("visitor")
		w := start(t, func(s *Server) {
			s.Net, s.Limits = gateway, limits
			s.HTTPAddr, s.TLSAddr, s.BindHost = ":80", ":443", ""
		}, table...)
		f(t, w, visitor)
	})
}

func connect(t *testing.T, h *memnet.Host, port string) netx.CloseWriter {
	t.Helper()
	c, err := h.Dial(t.Context(), "tcp", "gateway:"+port, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(netx.CloseWriter)
}

func TestSilentAndSenselessVisitors(t *testing.T) {
	bubble(t, Limits{}, func(t *testing.T, w *world, visitor *memnet.Host) {
		hello := helloBytes(t, &tls.Config{ServerName: "nobody.example"})
		for _, tt := range []struct {
			name, port, say string
			end             bool // half-close after it
			answer          string
			within          time.Duration
			reason          string
		}{
			{"silent on TLS", "443", "", false, "", 10 * time.Second, reasonSilent},
			{"silent on HTTP", "80", "", false, "", 10 * time.Second, reasonSilent},
			{"half a hello", "443", string(hello[:700]), false, "", 10 * time.Second, reasonSlow},
			{"half a hello, then the end", "443", string(hello[:700]), true, "", 0, reasonGone},
			{"unknown name", "443", string(hello), false, string(alert(alertUnrecognized)), time.Second, reasonName},
			{"garbage on TLS", "443", "\x00\x01\x02", false, "", 0, reasonGarbage},
			{"garbage on HTTP", "80", "\x00\x01\x02", false, "", 0, reasonGarbage},
			{"TLS on HTTP", "80", string(hello), false, string(alert(alertUnexpected)), time.Second, reasonTLS},
			{"bad hello", "443", "\x16\x03\x01\x00\x00", false, string(alert(alertDecode)), time.Second, reasonHello},
			{"large hello", "443", "\x16\x03\x01\x00\x04\x01\x01\x00\x00", false, string(alert(alertDecode)), time.Second, reasonLarge},
			{"HTTP on TLS", "443", "GET / HTTP/1.1\r\n\r\n", false, "HTTP/1.1 400 Bad Request", time.Second, reasonPlain},
		} {
			before := value(t, w.metrics.refusals.WithLabelValues(tt.reason))
			began := time.Now()
			c := connect(t, visitor, tt.port)
			if _, err := io.WriteString(c, tt.say); err != nil {
				t.Fatal(tt.name, err)
			}
			if tt.end {
				c.CloseWrite()
			}
			got, _ := io.ReadAll(c) // ends by a reset, mostly
			if !strings.HasPrefix(string(got), tt.answer) || tt.answer == "" && len(got) > 0 {
				t.Errorf("%s: %q", tt.name, got)
			}
			if took := time.Since(began); took > tt.within {
				t.Errorf("%s: took %v", tt.name, took)
			}
			c.Close()
			time.Sleep(2 * partingTime)
			synctest.Wait()
			if n := value(t, w.metrics.refusals.WithLabelValues(tt.reason)) - before; n != 1 {
				t.Errorf("%s: %v counted as %s", tt.name, n, tt.reason)
			}
		}
		if n := w.doors.total.Load(); n != 0 {
			t.Errorf("%d connections are still counted", n)
		}
	})
}

func TestSlowRequests(t *testing.T) {
	bubble(t, Limits{}, func(t *testing.T, w *world, visitor *memnet.Host) {
		for name, say := range map[string]string{"first": "", "second": "GET / HTTP/1.1\r\nHost: nobody.example\r\n\r\n"} {
			c := connect(t, visitor, "80")
			io.WriteString(c, say)
			time.Sleep(time.Minute) // keep-alive: idle is no sin
			if say == "" {
				c.Close()
				c = connect(t, visitor, "80")
			}
			began := time.Now()
			go func() {
				for i := 0; ; i++ {
					if _, err := c.Write([]byte("GET / HTTP/1.1\r\nX: yyyyyyyyyyyyyyyyyyyy")[i%30 : i%30+1]); err != nil {
						return
					}
					time.Sleep(time.Second)
				}
			}()
			got, _ := io.ReadAll(c)
			if took := time.Since(began); took > 12*time.Second || !strings.Contains(string(got), "408 Request Timeout") {
				t.Errorf("%s: %v, %q", name, took, got)
			}
			c.Close()
		}
		// Idle connections end, too.
		c := connect(t, visitor, "80")
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: nobody.example\r\n\r\n")
		began := time.Now()
		io.ReadAll(c)
		if took := time.Since(began); took < 119*time.Second || took > 125*time.Second {
			t.Errorf("idle for %v", took)
		}
	})
}

func TestLimits(t *testing.T) {
	tcp := expose("tcp", webgw.TCP, nil, "10.9.9.9:1")
	tcp.Exposure.Port = 2222
	bubble(t, Limits{Connections: 6, PerAddress: 4}, func(t *testing.T, w *world, visitor *memnet.Host) {
		open := func(h *memnet.Host, port string) (netx.CloseWriter, bool) {
			c := connect(t, h, port)
			c.SetReadDeadline(time.Now().Add(time.Second))
			_, err := c.Read(make([]byte, 1))
			var timeout net.Error
			return c, errors.As(err, &timeout) && timeout.Timeout()
		}
		var in []netx.CloseWriter
		for i := range 6 {
			c, ok := open(visitor, "443")
			if ok != (i < 4) {
				t.Errorf("connection %d: open %v", i, ok)
			}
			if ok {
				in = append(in, c)
			}
		}
		in[0].Close()
		synctest.Wait()
		if _, ok := open(visitor, "443"); !ok {
			t.Error("not let in though one has left")
		}
	}, tcp)

	// By /64 for IPv6, by address for IPv4.
	var d doors
	limits := Limits{Connections: 100, PerAddress: 1}
	try := func(a string) string {
		return d.enter(&visit{visitor: netip.AddrPortFrom(netip.MustParseAddr(a), 1)}, &limits)
	}
	for _, tt := range []struct{ a, want string }{{"2001:db8::1", ""}, {"2001:db8::2", reasonAddress}, {"2001:db8:0:1::1", ""}, {"192.0.2.1", ""}, {"192.0.2.2", ""}, {"192.0.2.1", reasonAddress}} {
		if got := try(tt.a); got != tt.want {
			t.Errorf("%s: %q", tt.a, got)
		}
	}
	if d.total.Load() != 4 {
		t.Error("refused ones are counted")
	}
}

func TestOwnersHaveALimit(t *testing.T) {
	began, finish := make(chan bool), make(chan bool)
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wait" {
			began <- true
			<-finish
		}
	})
	other := web1("other", at)
	other.Key.Owner = webgw.ID{2}
	w := start(t, func(s *Server) { s.Limits.PerOwner = 1 }, web1("a", at), web1("b", at), other)
	var wg sync.WaitGroup
	wg.Go(func() { get(t, w.client(false), "http://a.example/wait") })
	<-began
	if status, _, h := get(t, w.client(false), "http://b.example"); status != 503 || h.Get(ErrorHeader) != "owner_limit" {
		t.Error(status, h)
	}
	if status, _, _ := get(t, w.client(false), "http://other.example"); status != 200 {
		t.Error("another owner is refused:", status)
	}
	close(finish)
	wg.Wait()
	for status := 0; status != 200; { // counted out when its handler has returned
		status, _, _ = get(t, w.client(false), "http://b.example")
	}
}

// shortNet has listeners whose Accept fails at first.
type shortNet struct {
	netx.Host
	failures int
}

type shortListener struct {
	net.Listener
	left atomic.Int64
}

func (n shortNet) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	l, err := n.Host.Listen(ctx, network, address)
	s := &shortListener{Listener: l}
	s.left.Store(int64(n.failures))
	return s, err
}

func (l *shortListener) Accept() (net.Conn, error) {
	if l.left.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

func TestAcceptErrorsPass(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok") })
	w := start(t, func(s *Server) { s.Net = shortNet{failures: 4} }, web1("a", at))
	if status, body, _ := get(t, w.client(false), "http://a.example"); status != 200 || body != "ok" {
		t.Error(status, body)
	}
	if n := value(t, w.metrics.acceptErrors); n < 4 {
		t.Error(n)
	}
}

func TestHandlersTakeOver(t *testing.T) {
	got := make(chan string, 1)
	w := start(t, func(s *Server) {
		s.Handlers = map[string]Handler{webgw.ALPNTunnel: func(ctx context.Context, c net.Conn, head []byte) {
			defer c.Close()
			_, raw := c.(*net.TCPConn)
			got <- fmt.Sprint(raw, s.doors.total.Load(), len(head))
		}}
	})
	hello := helloBytes(t, &tls.Config{ServerName: "any", NextProtos: []string{webgw.ALPNTunnel}})
	w.raw(w.tls, string(hello))
	if g := <-got; g != fmt.Sprint(true, 0, len(hello)) {
		t.Error(g)
	}
}

func TestNoCertificate(t *testing.T) {
	w := start(t, nil, web1("uncertified", "127.0.0.1:1"))
	got := w.raw(w.tls, string(helloBytes(t, &tls.Config{ServerName: "uncertified.example"})))
	if got != string(alert(alertUnrecognized)) {
		t.Errorf("%q", got)
	}
}

// A new table changes where new connections lead; old ones stay.
func TestTablesChangeUnderTraffic(t *testing.T) {
	one, two := echo(t, "one"), echo(t, "two")
	port, other := freePort(t), freePort(t)
	tcp := func(port uint16, at string) Declared {
		d := expose("tcp", webgw.TCP, nil, at)
		d.Exposure.Port = port
		return d
	}
	page := func(s string) string {
		return site(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, s) })
	}
	p1, p2 := page("one"), page("two")
	w := start(t, nil, tcp(port, one), web1("a", p1))
	at := func(port uint16) string { return fmt.Sprintf("127.0.0.1:%d", port) }
	greeting := func(c net.Conn) string {
		b := make([]byte, 3)
		io.ReadFull(c, b)
		return string(b)
	}
	old := w.dial(at(port))
	if greeting(old) != "one" {
		t.Fatal("not there")
	}

	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 2 {
		client := w.client(true)
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if status, body, _ := get(t, client, "https://a.example"); status != 200 || body != "one" && body != "two" {
					t.Errorf("%d %q", status, body)
				}
			}
		})
	}
	for range 20 {
		w.use(tcp(port, one), web1("a", p1))
		w.use(tcp(port, two), web1("a", p2))
	}
	close(stop)
	wg.Wait()
	if greeting(w.dial(at(port))) != "two" {
		t.Error("new connections don't follow the new table")
	}
	w.use(tcp(other, two))
	if greeting(w.dial(at(other))) != "two" {
		t.Error("the new port is not open")
	}
	if c, err := net.Dial("tcp", at(port)); err == nil {
		c.Close()
		t.Error("the old port is still open")
	}
	if status, _, _ := get(t, w.client(false), "http://a.example"); status != 404 {
		t.Error("withdrawn, and still there:", status)
	}
	io.WriteString(old, "still")
	old.CloseWrite()
	if b, err := io.ReadAll(old); string(b) != "stillbye" || err != nil {
		t.Errorf("the old connection: %q, %v", b, err)
	}
}

func TestPortsThatCannotBeHadAreReported(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := expose("tcp", webgw.TCP, nil, "127.0.0.1:1")
	d.Exposure.Port = uint16(l.Addr().(*net.TCPAddr).Port)
	w := start(t, nil, d)
	if p := w.Problems(); len(p) != 1 || p[0].Exposure != d.Key {
		t.Error(p)
	}
	l.Close()
	w.use(d)
	if p := w.Problems(); len(p) != 0 || len(w.Addrs()) != 3 {
		t.Error(p, w.Addrs())
	}
	if err := (&Server{HTTPAddr: w.http}).Listen(t.Context()); webgw.KindOf(err) != webgw.Unavailable {
		t.Error(err)
	}
}

func TestShutdownLetsFinish(t *testing.T) {
	began, finish := make(chan bool), make(chan bool)
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		began <- true
		<-finish
		io.WriteString(w, "done")
	})
	d := expose("tcp", webgw.TCP, nil, echo(t, "hello"))
	d.Exposure.Port = freePort(t)
	w := start(t, nil, d, web1("a", at))
	c := w.dial(w.Addrs()[2].String())
	io.ReadFull(c, make([]byte, 5))
	answers := make(chan string)
	for _, h2 := range []bool{false, true} {
		client := w.client(h2)
		go func() {
			res, err := client.Get("https://a.example")
			if err != nil {
				answers <- err.Error()
				return
			}
			defer res.Body.Close()
			b, _ := io.ReadAll(res.Body)
			answers <- string(b)
		}()
		<-began
	}
	over := make(chan struct{})
	go func() {
		w.Shutdown(context.Background())
		close(over)
	}()
	// The listeners are closed first.
	for {
		n, err := net.Dial("tcp", w.http)
		if err != nil {
			break
		}
		n.Close()
	}
	io.WriteString(c, "x")
	if b := make([]byte, 1); !readsFully(c, b) || b[0] != 'x' {
		t.Error("the stream was cut")
	}
	close(finish)
	for range 2 {
		if a := <-answers; a != "done" {
			t.Error(a)
		}
	}
	select {
	case <-over:
		t.Error("over before the stream is")
	default:
	}
	c.Close()
	<-over
	<-w.done
}

func readsFully(r io.Reader, b []byte) bool { _, err := io.ReadFull(r, b); return err == nil }

// Who has connected when a shutdown begins is answered, too.
func TestShutdownAnswersWhoIsJustArriving(t *testing.T) {
	bubble(t, Limits{}, func(t *testing.T, w *world, visitor *memnet.Host) {
		w.up.set(&w.up.down, "10.9.9.9:1", true)
		c, silent := connect(t, visitor, "443"), connect(t, visitor, "80")
		synctest.Wait()
		over := make(chan struct{})
		began := time.Now()
		go func() {
			w.Shutdown(context.Background())
			close(over)
		}()
		synctest.Wait()
		if _, err := visitor.Dial(t.Context(), "tcp", "gateway:443", nil); err == nil {
			t.Error("still listening")
		}
		time.Sleep(arrivalTime / 2)
		client := tls.Client(c, &tls.Config{ServerName: "a.example", RootCAs: w.roots})
		io.WriteString(client, "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
		if got, _ := io.ReadAll(client); !strings.HasPrefix(string(got), "HTTP/1.1 503") || !strings.Contains(string(got), "Connection: close") {
			t.Errorf("%q", got)
		}
		io.ReadAll(silent)
		<-over
		if took := time.Since(began); took > 11*time.Second {
			t.Errorf("took %v", took)
		}
	}, web1("a", "10.9.9.9:1"))
}

func TestShutdownCutsInTheEnd(t *testing.T) {
	began := make(chan bool, 1)
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		began <- true
		<-r.Context().Done()
	})
	d := expose("tcp", webgw.TCP, nil, echo(t, "hello"))
	d.Exposure.Port = freePort(t)
	w := start(t, nil, d, web1("a", at), web1("up", upgradeSite(t)))
	c := w.dial(w.Addrs()[2].String())
	io.ReadFull(c, make([]byte, 5))
	silent := w.dial(w.tls)
	up := w.dial(w.http)
	io.WriteString(up, "GET / HTTP/1.1\r\nHost: up.example\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	io.ReadFull(up, make([]byte, 12))
	go func() {
		if res, err := w.client(false).Get("https://a.example"); err == nil {
			res.Body.Close()
		}
	}()
	<-began
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	w.Shutdown(ctx)
	for _, c := range []net.Conn{c, silent, up} {
		if _, err := io.Copy(io.Discard, c); errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	}
	if n := w.doors.total.Load(); n != 0 {
		t.Errorf("%d connections are still counted", n)
	}
}

func TestMetricsAreRegistered(t *testing.T) {
	r := prometheus.NewRegistry()
	w := start(t, func(s *Server) { s.Metrics = r }, web1("a", site(t, func(w http.ResponseWriter, r *http.Request) {})))
	get(t, w.client(false), "http://a.example")
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "webgw_ingress_") {
			t.Error(f.GetName())
		}
	}
	if len(families) < 6 {
		t.Error(len(families))
	}
}
