package world

import (
	"bufio"
	"context"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/daemon"
	"webgw.dev/webgw/internal/netx"
)

// A gateway without a registry address embeds one, which answers on its TLS
// port: two machines make a grid.
func TestAGatewayEmbedsARegistry(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		gent := w.Gateway("gent", func(d *Daemon, c *daemon.GatewayConfig) { c.Registry = "" })
		if !strings.HasSuffix(gent.info.Registry, "@gent.test:443") {
			t.Fatalf("the registry is %q", gent.info.Registry)
		}
		w.registry = gent.info.Registry
		home := w.Node("home1", BehindNAT)
		home.HTTP(8080)
		w.Apply("blog.example -> home1:8080 via gent")
		w.Get("https://blog.example/").Want(200, "hello from home1")
		w.Restart("gent")
		time.Sleep(15 * time.Second)
		w.Get("https://blog.example/").Want(200, "hello from home1")
		w.Withdraw("blog.example")
		if a := w.Get("https://blog.example/"); a.Status == 200 {
			t.Error("withdrawn, and still there")
		}
	})
}

// Who runs a node is told of each request and each stream.
func TestTheNodeTellsWhatHappens(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		var mu sync.Mutex
		var requests []webgw.Access
		var streams []daemon.Stream
		home := w.Node("home1", BehindNAT, func(d *Daemon, _ *daemon.NodeConfig) {
			d.Env = func(e *daemon.Env) {
				e.OnAccess = func(a webgw.Access) { mu.Lock(); requests = append(requests, a); mu.Unlock() }
				e.OnStream = func(s daemon.Stream) { mu.Lock(); streams = append(streams, s); mu.Unlock() }
			}
		})
		home.HTTP(8080)
		home.Echo(7)
		gent := w.Gateway("gent")
		w.Apply("blog.example -> home1:8080 via gent")
		w.Apply("tcp 20007 -> home1:7 via gent")
		w.Get("https://blog.example/page?secret=1").Want(200)
		c, err := w.Dial("gent", 20007)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Echo(c, "hello"); err != nil {
			t.Fatal(err)
		}
		w.Settle()
		mu.Lock()
		defer mu.Unlock()
		if len(requests) != 1 {
			t.Fatalf("requests: %+v", requests)
		}
		a := requests[0]
		if a.Gateway != gent.ID() || a.Exposure != w.Alice.ExposureKey("blog.example") || a.Path != "/page" || a.Status != 200 || a.Visitor != w.desk.Addrs()[0] {
			t.Errorf("told of %+v", a)
		}
		ended := false
		for _, s := range streams {
			ended = ended || s.Ended && s.Target == "127.0.0.1:7" && s.In == 5 && s.Out == 5 && s.Err == nil
		}
		if !ended {
			t.Errorf("streams: %+v", streams)
		}
	})
}

// The status says what is up, and why something is not.
func TestStatus(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		page := home.HTTP(8080)
		w.Gateway("gent")
		w.Apply("blog.example -> home1:8080 via gent")
		w.Apply("tcp 20007 -> home1:7 via gent")
		status := func() webgw.Overview {
			t.Helper()
			o, err := w.Client(w.Alice.Key, w.desk).Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return o
		}
		of := func(left string) webgw.ExposureStatus {
			t.Helper()
			for _, e := range status().Exposures {
				if e.Key == w.Alice.ExposureKey(left) {
					return e
				}
			}
			t.Fatalf("no status of %s", left)
			panic("not reached")
		}
		time.Sleep(10 * time.Second)
		if e := of("blog.example"); !e.Up {
			t.Errorf("blog: %s", e.Why)
		}
		page.Close()
		w.Get("https://blog.example/").Want(502)
		time.Sleep(10 * time.Second)
		if e := of("blog.example"); e.Up || !strings.Contains(e.Why, "nothing listens") {
			t.Errorf("blog without its workload: up %v, %s", e.Up, e.Why)
		}
		w.Kill("home1")
		time.Sleep(30 * time.Second)
		if e := of("blog.example"); e.Up {
			t.Errorf("blog without its node: %s", e.Why)
		}
	})
}

// A direct target must be public; the gateway itself is none.
func TestDirectTargets(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		gent := w.Gateway("gent", func(d *Daemon, c *daemon.GatewayConfig) {
			c.AllowDirect = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15")}
		})
		site := w.Node("site") // any machine with an address of its own
		site.Workload(":8080", serveHTTP("hello from the site"))
		inner := gent.Workload("127.0.0.1:9000", serveHTTP("for the farmer only"))
		at := site.Host.Addrs()[0].String()
		w.Apply("open.example -> direct " + at + ":8080 via gent")
		w.Apply("inner.example -> direct 127.0.0.1:9000 via gent")
		w.Apply("loop.example -> direct gent.test:80 via gent")
		w.Get("https://open.example/").Want(200, "hello from the site")
		w.Get("https://inner.example/").Want(502)
		w.Get("https://loop.example/").Want(502)
		if inner.Accepted() != 0 {
			t.Error("the gateway's loopback was reached")
		}
	})
}

func TestStatusPage(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		gent := w.Gateway("gent", func(d *Daemon, c *daemon.GatewayConfig) { c.MetricsAddr = ":9100" })
		get := func(path string) (int, string) {
			t.Helper()
			tr := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				return w.desk.Dial(ctx, network, addr, nil)
			}, DisableKeepAlives: true}
			defer tr.CloseIdleConnections()
			req, err := http.NewRequestWithContext(t.Context(), "GET", "http://gent.test:9100"+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			res, err := (&http.Client{Transport: tr}).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			var b strings.Builder
			if err := res.Write(&b); err != nil {
				t.Fatal(err)
			}
			return res.StatusCode, b.String()
		}
		if code, body := get("/healthz"); code != 200 {
			t.Errorf("%d %s", code, body)
		}
		if code, body := get("/readyz"); code != 200 {
			t.Errorf("%d %s", code, body)
		}
		if code, body := get("/metrics"); code != 200 || !strings.Contains(body, "webgw_live_connected 1") {
			t.Errorf("%d %s", code, body)
		}
		if gent.info.Addrs["metrics"] == nil || gent.info.Addrs["tls"] == nil {
			t.Errorf("addresses %v", gent.info.Addrs)
		}
	})
}

// A node that knows no registry's identity believes the first that it meets,
// and then no other.
func TestRegistryIsPinned(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", func(d *Daemon, c *daemon.NodeConfig) { c.Registry = "registry.test:8443" })
		home.HTTP(8080)
		w.Gateway("gent")
		w.Apply("blog.example -> home1:8080 via gent")
		w.Get("https://blog.example/").Want(200)

		w.Daemon("registry").Stop()
		w.Daemon("registry").Key = w.Key()
		w.Daemon("registry").Start()
		w.Restart("home1")
		time.Sleep(15 * time.Second)
		if home.Metric("webgw_live_connected") != 0 || !w.Logged("home1", "was webgw1") {
			t.Error("another registry is believed")
		}
		w.Get("https://blog.example/").Want(200) // from the snapshots
	})
}

// A node that may dial nothing but an HTTP proxy serves all the same.
func TestANodeBehindAnHTTPProxy(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Gateway("gent")
		proxy := w.proxy("proxy", "nobody:secret")
		home := w.Node("home1", BehindNAT, func(_ *Daemon, c *daemon.NodeConfig) { c.Proxy = "http://nobody:secret@proxy.test:3128" })
		home.HTTP(8080)
		home.TLS(8443, "vault.example")
		w.Cut("home1", "gent")
		w.Cut("home1", "registry")
		w.Restart("home1")
		w.Apply("blog.example -> home1:8080 via gent")
		w.Apply("tls vault.example -> home1:8443 via gent")
		w.Get("https://blog.example/").Want(200, "hello from home1")
		w.Get("https://vault.example/").Want(200)
		if proxy.Load() == 0 {
			t.Error("the proxy was not used")
		}
	})
}

// proxy runs an HTTP proxy that wants credentials, on port 3128 of a host of
// its own, and counts the connections it makes.
func (w *World) proxy(name, credentials string) *atomic.Int64 {
	host := w.Net.Host(name)
	w.Net.Name(name+".test", host.Addrs()...)
	l, err := host.Listen(w.T.Context(), "tcp", ":3128")
	if err != nil {
		w.T.Fatal(err)
	}
	made := new(atomic.Int64)
	var serving sync.WaitGroup
	w.T.Cleanup(serving.Wait)
	w.T.Cleanup(func() { l.Close() })
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte(credentials))
	serve := func(c net.Conn) error {
		defer c.Close()
		defer context.AfterFunc(w.T.Context(), func() { c.Close() })()
		r := bufio.NewReader(c)
		req, err := http.ReadRequest(r)
		if err != nil {
			return err
		}
		if req.Method != http.MethodConnect || req.Header.Get("Proxy-Authorization") != want {
			_, err := io.WriteString(c, "HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
			return err
		}
		up, err := host.Dial(w.T.Context(), "tcp", req.Host, nil)
		if err != nil {
			_, err := io.WriteString(c, "HTTP/1.1 502 Bad Gateway\r\n\r\n")
			return err
		}
		defer up.Close()
		defer context.AfterFunc(w.T.Context(), func() { up.Close() })()
		made.Add(1)
		if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nVia: proxy\r\n\r\n"); err != nil {
			return err
		}
		early, err := r.Peek(r.Buffered())
		if err != nil {
			return err
		}
		_, _, err = netx.Join(c, up, early)
		return err
	}
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				if err := serve(c); err != nil {
					w.T.Logf("proxy: %v", err)
				}
			})
		}
	})
	return made
}
