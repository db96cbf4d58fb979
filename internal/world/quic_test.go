package world

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/daemon"
	"webgw.dev/webgw/internal/netx"
)

// packetConn is a socket whose buffers quic-go leaves alone.
type packetConn struct{ net.PacketConn }

func (packetConn) SetReadBuffer(int) error  { return nil }
func (packetConn) SetWriteBuffer(int) error { return nil }

// client3 is a visitor who speaks HTTP/3 to a gateway, whatever the name. Its
// address changes when it is told so, without its knowledge.
func (w *World) client3(gateway string) (c *http.Client, rebind func()) {
	w.T.Helper()
	to := netip.AddrPortFrom(w.Daemon(gateway).Host.Addrs()[0], 443)
	nat := &natted{t: w.T, net: w.desk}
	nat.rebind()
	tr := &quic.Transport{Conn: nat}
	t3 := &http3.Transport{TLSClientConfig: &tls.Config{RootCAs: w.roots()}, QUICConfig: &quic.Config{MaxIdleTimeout: time.Minute},
		Dial: func(ctx context.Context, _ string, t *tls.Config, c *quic.Config) (*quic.Conn, error) {
			return tr.Dial(ctx, net.UDPAddrFromAddrPort(to), t, c)
		}}
	w.T.Cleanup(func() { t3.Close(); tr.Close(); nat.Close() })
	return &http.Client{Transport: t3, Timeout: 20 * time.Second}, nat.rebind
}

type natted struct {
	packetConn
	t   testing.TB
	net netx.Net
	mu  sync.Mutex
	now net.PacketConn
}

func (n *natted) rebind() {
	n.t.Helper()
	c, err := n.net.ListenPacket(context.Background(), "udp", ":0")
	if err != nil {
		n.t.Fatal(err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.now != nil {
		n.now.Close()
	}
	n.now = c
}

func (n *natted) current() net.PacketConn {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.now
}

func (n *natted) ReadFrom(p []byte) (int, net.Addr, error) {
	for {
		c := n.current()
		k, from, err := c.ReadFrom(p)
		if err == nil || c == n.current() {
			return k, from, err
		}
	}
}

func (n *natted) WriteTo(p []byte, to net.Addr) (int, error) { return n.current().WriteTo(p, to) }
func (n *natted) LocalAddr() net.Addr                        { return n.current().LocalAddr() }
func (n *natted) Close() error                               { return n.current().Close() }
func (n *natted) SetReadDeadline(t time.Time) error          { return n.current().SetReadDeadline(t) }

// HTTP3 serves pages over QUIC on the loopback, with a certificate of its own
// for host, and returns how to learn from how many addresses visitors came.
func (d *Daemon) HTTP3(port int, host string) (peers func() int) {
	d.w.T.Helper()
	c, err := d.Host.ListenPacket(d.w.T.Context(), "udp", loopback(port))
	if err != nil {
		d.w.T.Fatal(err)
	}
	var mu sync.Mutex
	seen := map[string]bool{}
	tr := &quic.Transport{Conn: packetConn{c}, ConnectionIDLength: 8}
	ln, err := tr.ListenEarly(http3.ConfigureTLSConfig(&tls.Config{Certificates: []tls.Certificate{d.w.selfSigned(host)}}), &quic.Config{})
	if err != nil {
		d.w.T.Fatal(err)
	}
	s := &http3.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen[r.RemoteAddr] = true
		mu.Unlock()
		fmt.Fprintf(rw, "hello from %s in %s %s", d.Name, r.Proto, r.URL.Path)
	})}
	var wg sync.WaitGroup
	wg.Go(func() { s.ServeListener(ln) })
	d.w.T.Cleanup(func() { s.Close(); ln.Close(); tr.Close(); c.Close(); wg.Wait() })
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(seen)
	}
}

func page(c *http.Client, url string) string {
	res, err := c.Get(url)
	if err != nil {
		return err.Error()
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%d %s", res.StatusCode, b)
}

func TestHTTP3AndQUIC(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		home.HTTP(8080)
		home.TLS(8443, "vault.example")
		peers := home.HTTP3(8443, "vault.example")
		gent := w.Gateway("gent")
		w.Apply("blog.example -> home1:8080 via gent")
		vault := func(q bool) {
			t.Helper()
			if err := w.applyWith("tls vault.example -> home1:8443 via gent", func(e *webgw.Exposure) { e.QUIC = q }); err != nil {
				t.Fatal(err)
			}
		}
		vault(true)
		if h := w.Get("https://blog.example/").Want(200, "hello from home1").Header; h.Get("Alt-Svc") != `h3=":443"; ma=86400` {
			t.Errorf("Alt-Svc: %q", h.Get("Alt-Svc"))
		}
		w.Get("https://vault.example/").Want(200, "hello from home1 in TLS") // by TCP as ever
		c, rebind := w.client3("gent")
		for range 3 {
			if got := page(c, "https://blog.example/x"); got != "200 hello from home1 /x" {
				t.Errorf("terminated: %s", got)
			}
			if got := page(c, "https://vault.example/y"); got != "200 hello from home1 in HTTP/3.0 /y" {
				t.Errorf("passed through: %s", got)
			}
			rebind()
		}
		if n := peers(); n < 1 {
			t.Errorf("the workload saw %d addresses", n)
		}
		if n := gent.Metric("webgw_tunnel_flows"); n != 3 && n != 4 { // after the last change something may have been said
			t.Errorf("%v flows, want one per address", n)
		}
		// Only if the owner says so.
		vault(false)
		other, _ := w.client3("gent")
		if got := page(other, "https://vault.example/"); got == "200 hello from home1 in HTTP/3.0 /" {
			t.Errorf("against the owner's will: %s", got)
		}
		time.Sleep(3 * time.Minute)
		if n := gent.Metric("webgw_tunnel_flows"); n != 0 {
			t.Errorf("%v flows after three minutes", n)
		}
	})
}

func TestWithoutQUIC(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).HTTP(8080)
		w.Gateway("gent", func(d *Daemon, c *daemon.GatewayConfig) { c.NoQUIC = true })
		w.Apply("blog.example -> home1:8080 via gent")
		if h := w.Get("https://blog.example/").Want(200).Header; h.Get("Alt-Svc") != "" {
			t.Errorf("Alt-Svc: %q", h.Get("Alt-Svc"))
		}
		c, _ := w.client3("gent")
		c.Timeout = 3 * time.Second
		if got := page(c, "https://blog.example/"); got == "200 hello from home1 /" {
			t.Error("HTTP/3 is served")
		}
	})
}

func TestQUICBelongsToTLS(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).HTTP(8080)
		w.Gateway("gent")
		for _, line := range []string{"blog.example -> home1:8080 via gent", "udp 20053 -> home1:8080 via gent"} {
			if err := w.applyWith(line, func(e *webgw.Exposure) { e.QUIC = true }); webgw.KindOf(err) != webgw.Invalid {
				t.Errorf("%s: %v", line, err)
			}
		}
	})
}
