package ingress

import (
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

func TestRequestsHaveTheirTime(t *testing.T) {
	for _, upstream := range []webgw.Upstream{webgw.UpstreamHTTP1, webgw.UpstreamH2C} {
		quicBubble(t, Limits{}, nil, func(t *testing.T, w *world, m *memnet.World) {
			host := w.Net.(*memnet.Host)
			l, err := host.Listen(t.Context(), "tcp", ":8080")
			if err != nil {
				t.Fatal(err)
			}
			s := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				switch r.URL.Path {
				case "/begun", "/much":
					io.WriteString(rw, "begun")
					http.NewResponseController(rw).Flush()
				}
				switch r.URL.Path {
				case "/late", "/begun":
					select {
					case <-r.Context().Done():
					case <-time.After(time.Hour):
					}
				case "/much":
					for err := error(nil); err == nil; {
						_, err = rw.Write(make([]byte, 64<<10))
					}
				}
			})}
			s.Protocols.SetHTTP1(true)
			s.Protocols.SetUnencryptedHTTP2(true)
			var serving sync.WaitGroup
			serving.Go(func() { s.Serve(l) })
			t.Cleanup(func() { s.Close(); serving.Wait() })
			d := under(web1("a", "gateway:8080"), webgw.Policy{Timeouts: &webgw.Timeouts{Request: "90s"}})
			d.Exposure.Upstream = upstream
			w.use(d)
			for version, c := range map[string]*http.Client{"h1": w.client(false), "h2": w.client(true), "h3": {Transport: w.transport3(w.socket(hostAt(m, "203.0.113.1")))}} {
				took := func(what string, start time.Time) {
					t.Helper()
					if d := time.Since(start); d < 90*time.Second || d > 93*time.Second {
						t.Errorf("%s, %s, %s: after %v", upstream, version, what, d)
					}
				}
				start := time.Now()
				if status, _, h := get(t, c, "https://a.example/late"); status != 504 || h.Get(ErrorHeader) != "request_time" {
					t.Error(version, status, h)
				}
				took("late", start)
				start = time.Now()
				res, err := c.Get("https://a.example/begun")
				if err != nil {
					t.Fatal(version, err)
				}
				if b, err := io.ReadAll(res.Body); string(b) != "begun" || err == nil {
					t.Errorf("%s, %s: the cut answer looks whole: %q, %v", upstream, version, b, err)
				}
				res.Body.Close()
				took("begun", start)

				if upstream == webgw.UpstreamH2C {
					continue // net/http's reverse proxy writes under a lock that its flushes wait for, which stops a bubble
				}
				start = time.Now()
				if res, err = c.Get("https://a.example/much"); err != nil { // of which nothing is taken
					t.Fatal(version, err)
				}
				for w.table.Load().TLS("a.example").use.active.Load() > 0 {
					time.Sleep(time.Second / 2)
				}
				took("taken by nobody", start)
				res.Body.Close()
				if status, _, _ := get(t, c, "https://a.example/"); status != 200 {
					t.Error(version, "in time:", status)
				}
			}
			if n := value(t, w.metrics.refusals.WithLabelValues(reasonTime)); n != 3 {
				t.Error(n, "pages")
			}
		})
	}
}

func TestStreamsHaveTheirTime(t *testing.T) {
	quicBubble(t, Limits{}, nil, func(t *testing.T, w *world, m *memnet.World) {
		host := w.Net.(*memnet.Host)
		l, err := host.Listen(t.Context(), "tcp", ":7")
		if err != nil {
			t.Fatal(err)
		}
		var serving sync.WaitGroup
		serving.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				serving.Go(func() { io.Copy(c, c); c.Close() })
			}
		})
		t.Cleanup(func() { l.Close(); serving.Wait() })
		memSite(t, host, func(rw http.ResponseWriter, r *http.Request) {
			c, b, err := http.NewResponseController(rw).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			fmt.Fprint(b, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
			b.Flush()
			io.Copy(c, b)
		})
		visitor := hostAt(m, "203.0.113.7")
		limits := webgw.Policy{Timeouts: &webgw.Timeouts{Idle: "1m", Connection: "10m"}}
		tcp := under(expose("tcp", webgw.TCP, nil, "gateway:7"), limits)
		tcp.Exposure.Port = 7000
		both := limits
		both.Timeouts = &webgw.Timeouts{Request: "5s", Idle: "1m", Connection: "10m"}
		w.use(tcp, under(web1("a", "gateway:8080"), both))
		open := map[string]func() io.ReadWriter{
			"tcp": func() io.ReadWriter { return connect(t, visitor, "7000") },
			"upgraded": func() io.ReadWriter {
				c := connect(t, visitor, "80")
				io.WriteString(c, "GET / HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
				for seen := ""; len(seen) < 4 || seen[len(seen)-4:] != "\r\n\r\n"; {
					b := make([]byte, 1)
					if _, err := c.Read(b); err != nil {
						t.Fatal(err)
					}
					seen += string(b)
				}
				return c
			},
		}
		for kind, dial := range open {
			c, start := dial(), time.Now()
			if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
				t.Errorf("%s: an idle stream: %v", kind, err)
			}
			if d := time.Since(start); d < time.Minute || d > 76*time.Second {
				t.Errorf("%s: idle for %v", kind, d)
			}
			c, start = dial(), time.Now()
			for err = nil; err == nil; time.Sleep(50 * time.Second) {
				b := make([]byte, 1)
				if _, err = c.Write(b); err == nil {
					_, err = io.ReadFull(c, b)
				}
			}
			if d := time.Since(start); d < 10*time.Minute || d > 12*time.Minute {
				t.Errorf("%s: a busy stream lasts %v", kind, d)
			}
		}
		synctest.Wait()
		if n := value(t, w.metrics.refusals.WithLabelValues(reasonTime)); n != 4 {
			t.Error(n)
		}
	})
}

func TestFlowsHaveTheirTime(t *testing.T) {
	f := &visitFlow{route: &Route{guard: newGuard(webgw.Key{}, &webgw.Policy{Timeouts: &webgw.Timeouts{Idle: "20s", Connection: "5m"}})}, since: time.Now()}
	f.last.Store(f.since.UnixNano())
	for _, tt := range []struct {
		age, quiet time.Duration
		over       bool
	}{{time.Minute, 19 * time.Second, false}, {time.Minute, 20 * time.Second, true}, {5 * time.Minute, 0, true}} {
		if over := f.outlived(f.since.Add(tt.age), tt.quiet); over != tt.over {
			t.Error(tt, over)
		}
	}
}
