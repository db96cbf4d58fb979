package ingress

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/netx/memnet"
)

// bounded is a policy of bandwidth alone.
func bounded(connection, total webgw.Throughput) webgw.Policy {
	b := &webgw.Bandwidth{}
	if connection != (webgw.Throughput{}) {
		b.Connection = &connection
	}
	if total != (webgw.Throughput{}) {
		b.Total = &total
	}
	return webgw.Policy{Bandwidth: b}
}

// serveBytes runs a workload that sends without end and counts what comes.
func serveBytes(t *testing.T, h *memnet.Host, port string, came *atomic.Int64) {
	t.Helper()
	l, err := h.Listen(t.Context(), "tcp", port)
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
			serving.Go(func() { io.Copy(c, endless{}) })
			serving.Go(func() {
				io.Copy(counting{came}, c)
				c.Close()
			})
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

type counting struct{ n *atomic.Int64 }

func (c counting) Write(p []byte) (int, error) { c.n.Add(int64(len(p))); return len(p), nil }

// near checks that n is what rate brings in d, by a tenth.
func near(t *testing.T, what string, n int64, rate float64, d time.Duration) {
	t.Helper()
	if want := rate * d.Seconds(); float64(n) < 0.9*want || float64(n) > 1.1*want {
		t.Errorf("%s: %d bytes in %v, want %.0f", what, n, d, want)
	}
}

func TestStreamsKeepToTheirBandwidth(t *testing.T) {
	const second = 3
	for _, tt := range []struct {
		name    string
		policy  webgw.Policy
		limits  Limits
		in, out float64 // of all, bytes a second
		of      int     // connections
	}{
		{name: "in all", policy: bounded(webgw.Throughput{}, webgw.Throughput{In: 500_000, Out: 2_000_000}), in: 500_000, out: 2_000_000, of: 4},
		{name: "slow", policy: bounded(webgw.Throughput{}, webgw.Throughput{In: 20_000, Out: 10_000}), in: 20_000, out: 10_000, of: 2},
		{name: "fast", policy: bounded(webgw.Throughput{}, webgw.Throughput{In: 20_000_000, Out: 50_000_000}), in: 20_000_000, out: 50_000_000, of: 1},
		{name: "many", policy: bounded(webgw.Throughput{}, webgw.Throughput{In: 1_000_000, Out: 1_000_000}), in: 1_000_000, out: 1_000_000, of: 100},
		{name: "each", policy: bounded(webgw.Throughput{In: 50_000, Out: 100_000}, webgw.Throughput{}), in: 200_000, out: 400_000, of: 4},
		{name: "each and all", policy: bounded(webgw.Throughput{In: 50_000, Out: 100_000}, webgw.Throughput{In: 1_000_000, Out: 300_000}), in: 200_000, out: 300_000, of: 4},
		{name: "the farmer's", limits: Limits{ExposureBandwidth: 300_000}, in: 300_000, out: 300_000, of: 3},
		{name: "the farmer's of the owner", limits: Limits{OwnerBandwidth: 300_000}, policy: bounded(webgw.Throughput{}, webgw.Throughput{In: 1_000_000, Out: 100_000}), in: 300_000, out: 100_000, of: 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, tt.limits, func(t *testing.T, w *world, visitor *memnet.Host) {
				var came atomic.Int64
				serveBytes(t, w.Net.(*memnet.Host), ":7", &came)
				d := under(expose("tcp", webgw.TCP, nil, "gateway:7"), tt.policy)
				d.Exposure.Port = 9000
				w.use(d)
				start := time.Now()
				gone := make([]atomic.Int64, tt.of)
				var moving sync.WaitGroup
				var visitors []net.Conn
				for i := range tt.of {
					c := connect(t, visitor, "9000")
					visitors = append(visitors, c)
					moving.Go(func() { io.Copy(c, endless{}) })
					moving.Go(func() { io.Copy(counting{&gone[i]}, c) })
				}
				begun := make([]int64, tt.of) // by when all are here
				time.Sleep(second * time.Second / 6)
				for i := range gone {
					begun[i] = gone[i].Load()
				}
				time.Sleep(second * time.Second * 5 / 6)
				var out int64
				for i := range gone {
					out += gone[i].Load()
				}
				near(t, "in", came.Load(), tt.in, time.Since(start))
				near(t, "out", out, tt.out, time.Since(start))
				for i := range gone {
					near(t, "one's share", gone[i].Load()-begun[i], tt.out/float64(tt.of), second*time.Second*5/6)
				}
				if value(t, w.metrics.paced[0].waited) == 0 || value(t, w.metrics.paced[1].waited) == 0 {
					t.Error("no wait was counted")
				}
				for _, c := range visitors {
					netx.Reset(c)
				}
				moving.Wait()
			})
		})
	}
}

// What is not bounded is joined as it was accepted, so that the kernel may move
// the bytes.
func TestUnboundedStreamsAreNotWrapped(t *testing.T) {
	for _, tt := range []struct {
		policy webgw.Policy
		bound  bool
	}{{webgw.Policy{}, false}, {bounded(webgw.Throughput{Out: 1e6}, webgw.Throughput{}), true}} {
		up := &watchedUpstream{seen: make(chan net.Conn, 1)}
		w := start(t, func(s *Server) { s.Upstream = up })
		up.dialer = dialer{net: netx.Host{}}
		d := under(expose("tcp", webgw.TCP, nil, echo(t, "hello")), tt.policy)
		d.Exposure.Port = freePort(t)
		w.use(d)
		if got := knock(w.Addrs()[2].String()); got != "hellobye" {
			t.Errorf("%q", got)
		}
		if _, raw := (<-up.seen).(*net.TCPConn); raw == tt.bound {
			t.Errorf("bound: %t, raw: %t", tt.bound, raw)
		}
	}
}

type watchedUpstream struct {
	dialer
	seen chan net.Conn
}

func (u *watchedUpstream) Open(ctx context.Context, r *Route, t webgw.Target, from Origin) (Stream, error) {
	s, err := u.dialer.Open(ctx, r, t, from)
	return watchedStream{s, u.seen}, err
}

type watchedStream struct {
	Stream
	seen chan net.Conn
}

func (s watchedStream) Join(visitor net.Conn, head []byte, done func(in, out int64, err error)) {
	s.seen <- visitor
	s.Stream.Join(visitor, head, done)
}

func TestHTTPKeepsToItsBandwidth(t *testing.T) {
	quicBubble(t, Limits{}, nil, func(t *testing.T, w *world, m *memnet.World) {
		var came atomic.Int64
		host := w.Net.(*memnet.Host)
		l, err := host.Listen(t.Context(), "tcp", ":8080")
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			io.Copy(counting{&came}, r.Body)
			io.CopyN(rw, endless{}, 2_000_000)
		})}
		s.Protocols.SetHTTP1(true)
		s.Protocols.SetUnencryptedHTTP2(true)
		var serving sync.WaitGroup
		serving.Go(func() { s.Serve(l) })
		t.Cleanup(func() { s.Close(); serving.Wait() })
		for i, p := range []webgw.Policy{bounded(webgw.Throughput{}, webgw.Throughput{In: 500_000, Out: 1_000_000}), bounded(webgw.Throughput{In: 500_000, Out: 1_000_000}, webgw.Throughput{})} {
			d := under(web1("a", "gateway:8080"), p)
			w.use(d)
			for version, c := range map[string]*http.Client{"h1": w.client(false), "h2": w.client(true), "h3": {Transport: w.transport3(w.socket(hostAt(m, fmt.Sprintf("203.0.113.%d", i+1))))}} {
				get(t, c, "https://a.example/") // connects, and uses up what was saved
				post := func() {
					res, err := c.Post("https://a.example/", "", io.LimitReader(endless{}, 1_000_000))
					if err != nil {
						t.Error(version, err)
						return
					}
					defer res.Body.Close()
					if n, err := io.Copy(io.Discard, res.Body); n != 2_000_000 || err != nil {
						t.Error(version, n, err)
					}
				}
				start := time.Now()
				came.Store(0)
				post() // 2 s for each direction
				if took := time.Since(start); took < 3700*time.Millisecond || took > 4300*time.Millisecond || came.Load() != 1_000_000 {
					t.Errorf("%s, %d: %v, %d", version, i, took, came.Load())
				}
				if version == "h1" && i == 1 {
					continue // two connections, each with its own
				}
				start = time.Now()
				var both sync.WaitGroup
				both.Go(post)
				both.Go(post)
				both.Wait()
				if took := time.Since(start); took < 7400*time.Millisecond || took > 8600*time.Millisecond {
					t.Errorf("%s, %d, two: %v", version, i, took)
				}
			}
		}
	})
}

// By net/http's reverse proxy, which can't be had in a bubble: it sleeps under a
// lock.
func TestH2CKeepsToItsBandwidth(t *testing.T) {
	at := site(t, func(rw http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		io.CopyN(rw, endless{}, 150_000)
	})
	d := under(web1("a", at), bounded(webgw.Throughput{}, webgw.Throughput{In: 500_000, Out: 500_000}))
	d.Exposure.Upstream = webgw.UpstreamH2C
	w := start(t, nil, d)
	start := time.Now()
	if status, body, _ := fetch(t, w.client(true), "POST", "https://a.example/", string(make([]byte, 150_000))); status != 200 || len(body) != 150_000 {
		t.Error(status, len(body))
	}
	if took := time.Since(start); took < 400*time.Millisecond {
		t.Error(took)
	}
}

// Who waits for their turn is not waited for, in the end.
func TestWhoWaitsForBandwidthCanBeCut(t *testing.T) {
	bubble(t, Limits{Drain: time.Second}, func(t *testing.T, w *world, visitor *memnet.Host) {
		var came atomic.Int64
		serveBytes(t, w.Net.(*memnet.Host), ":7", &came)
		d := under(expose("tcp", webgw.TCP, nil, "gateway:7"), bounded(webgw.Throughput{}, webgw.Throughput{In: 1_000, Out: 1_000}))
		d.Exposure.Port = 9000
		w.use(d)
		var moving sync.WaitGroup
		for range 50 { // whose turns come once a minute
			c := connect(t, visitor, "9000")
			moving.Go(func() { io.Copy(c, endless{}) })
			moving.Go(func() { io.Copy(io.Discard, c) })
		}
		time.Sleep(time.Second)
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		w.Shutdown(ctx)
		if took := time.Since(start); took > time.Second {
			t.Error("the shutdown took", took)
		}
		moving.Wait()
	})
}

func TestPacedConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		defer b.Close()
		v := newValve(1_000)
		m := newMetrics(nil, &Server{})
		in, out := (*throttle)(nil).add(v, &m.paced[0]), (*throttle)(nil).add(newValve(1_000), &m.paced[1])
		c := newPacedConn(a, in, out)
		first, second := bytes.Repeat([]byte("a"), 1000), bytes.Repeat([]byte("b"), 1000)
		go func() { b.Write(first); b.Write(second) }()
		p := make([]byte, 4096)
		if n, err := c.Read(p); n != 1000 || err != nil {
			t.Fatal(n, err)
		}
		// A deadline, set before or while it waits, loses nothing.
		for _, set := range []func(){
			func() { c.SetReadDeadline(time.Now().Add(100 * time.Millisecond)) },
			func() {
				c.SetReadDeadline(time.Time{})
				time.AfterFunc(50*time.Millisecond, func() { c.SetReadDeadline(time.Unix(1, 0)) })
			},
		} {
			set()
			start := time.Now()
			if n, err := c.Read(p); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) > 100*time.Millisecond {
				t.Error(n, err, time.Since(start))
			}
		}
		c.SetReadDeadline(time.Time{})
		if n, err := c.Read(p[:300]); string(p[:n]) != string(second[:300]) || err != nil {
			t.Error(n, err)
		}
		if n, err := io.ReadFull(c, p[:700]); string(p[:n]) != string(second[:700]) || err != nil {
			t.Error(n, err)
		}
		if v.waiting != 0 {
			t.Error(v.waiting, "are said to wait")
		}
		// Closing wakes who waits.
		go io.Copy(io.Discard, b)
		c.Write(first)
		start := time.Now()
		time.AfterFunc(10*time.Millisecond, func() { c.Close() })
		if _, err := c.Write(first); !errors.Is(err, net.ErrClosed) || time.Since(start) != 10*time.Millisecond {
			t.Error(err, time.Since(start))
		}
	})
}

func TestDatagramsBeyondTheBandwidthAreDropped(t *testing.T) {
	udpBubble(t, Limits{}, func(g *udpGrid) {
		p := bounded(webgw.Throughput{In: 40_000}, webgw.Throughput{In: 100_000, Out: 50_000})
		g.route(53, &p, "t")
		var out atomic.Int64
		var visitors []net.Conn
		var reading sync.WaitGroup
		for i := range 5 {
			c := g.visitor(netip.AddrFrom4([4]byte{203, 0, 113, byte(i + 1)}).String(), "198.51.100.1:53")
			visitors = append(visitors, c)
			reading.Go(func() { io.Copy(counting{&out}, c) })
		}
		start := time.Now()
		for time.Since(start) < 4*time.Second {
			for _, c := range visitors {
				c.Write(make([]byte, 500))
			}
			time.Sleep(5 * time.Millisecond) // 100,000 bytes a second of each
		}
		synctest.Wait()
		took := time.Since(start)
		g.server.mu.Lock()
		var in []int64
		for _, f := range g.server.udp[53].all() {
			in = append(in, f.in.Load())
		}
		g.server.mu.Unlock()
		var all int64
		for _, n := range in {
			if all += n; n > 44_000*4 {
				t.Error(n, "bytes of one flow")
			}
		}
		near(g.t, "in", all, 100_000, took)
		near(g.t, "out", out.Load(), 50_000, took)
		if value(g.t, g.server.metrics.paced[0].dropped) == 0 || value(g.t, g.server.metrics.paced[1].dropped) == 0 {
			t.Error("no dropped datagram was counted")
		}
		for _, c := range visitors {
			c.Close()
		}
		reading.Wait()
	})
}

// Datagrams have their share beside streams of the same owner.
func TestDatagramsBesideStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newValve(100_000)
		m := newMetrics(nil, &Server{})
		th := (*throttle)(nil).add(v, &m.paced[0])
		var streams, datagrams int
		stop := time.Now().Add(10 * time.Second)
		var mu sync.Mutex
		var moving sync.WaitGroup
		for range 3 {
			moving.Go(func() {
				for time.Now().Before(stop) {
					n := th.quantum()
					th.pass(n, func(until time.Time) error { time.Sleep(time.Until(until)); return nil })
					mu.Lock()
					streams += n
					mu.Unlock()
				}
			})
		}
		for time.Now().Before(stop) {
			if !th.drops(1000) {
				datagrams += 1000
			}
			time.Sleep(time.Millisecond)
		}
		moving.Wait()
		near(t, "both", int64(streams+datagrams), 100_000, 10*time.Second)
		if datagrams < 200_000 || datagrams > 300_000 {
			t.Error(datagrams, "bytes of datagrams")
		}
	})
}

// A body that waits for its turn holds up neither an answer that comes early nor
// the end of a visitor who leaves.
func TestPacedBodiesEnd(t *testing.T) {
	quicBubble(t, Limits{}, nil, func(t *testing.T, w *world, m *memnet.World) {
		left := make(chan error, 1)
		memSite(t, w.Net.(*memnet.Host), func(rw http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/early" {
				http.NewResponseController(rw).EnableFullDuplex() // else net/http reads much of the body before it answers
				rw.WriteHeader(413)
				return
			}
			_, err := io.Copy(io.Discard, r.Body)
			left <- err
		})
		w.use(under(web1("a", "gateway:8080"), bounded(webgw.Throughput{}, webgw.Throughput{In: 1_000})))
		for version, c := range map[string]*http.Client{"h1": w.client(false), "h2": w.client(true), "h3": {Transport: w.transport3(w.socket(hostAt(m, "203.0.113.1")))}} {
			start := time.Now()
			res, err := c.Post("https://a.example/early", "", io.LimitReader(endless{}, 10_000_000))
			if err != nil {
				t.Error(version, err) // a stream or connection that is reset after its answer
			} else {
				if res.Body.Close(); res.StatusCode != 413 {
					t.Error(version, res.StatusCode)
				}
			}
			if took := time.Since(start); took > 2*time.Second {
				t.Error(version, "early answer after", took)
			}
			start = time.Now()
			ctx, leave := context.WithTimeout(t.Context(), 5*time.Second)
			r, err := http.NewRequestWithContext(ctx, "POST", "https://a.example/", io.LimitReader(endless{}, 10_000_000))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Do(r); err == nil {
				t.Error(version, "answered")
			}
			leave()
			if err := <-left; err == nil || version != "h1" && time.Since(start) > 8*time.Second { // h1: the end is behind what was sent
				t.Error(version, "gone:", err, time.Since(start))
			}
		}
		r := w.table.Load().TLS("a.example")
		for r.use.active.Load() > 0 {
			time.Sleep(time.Second)
		}
		if v := r.guard.bandwidth.in; v.waiting != 0 {
			t.Error(v.waiting, "are said to wait")
		}
	})
}
