package tunnel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/netx/memnet"
)

func key(n byte) ident.Key { return ident.FromSeed([32]byte{n}) }

var exposure = webgw.Key{Kind: webgw.KindExposure, Owner: key(9).ID(), Name: "blog"}

// pair is a gateway and what it takes to start nodes that attach to it.
type pair struct {
	t      testing.TB
	server *Server
	addr   string
	gwNet  netx.Net
	states chan State
	log    *slog.Logger
	ctx    context.Context
	stop   func()
	wg     sync.WaitGroup
}

func newPair(t testing.TB, gw netx.Net, listen string) *pair {
	ctx, cancel := context.WithCancel(context.Background())
	p := &pair{t: t, gwNet: gw, states: make(chan State, 100), ctx: ctx, log: slog.New(slog.NewTextHandler(testWriter{t}, nil))}
	p.server = &Server{Key: key(1), Log: p.log}
	l, err := gw.Listen(ctx, "tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	p.addr = l.Addr().String()
	p.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.accept(c) })
		}
	})
	p.stop = func() { cancel(); l.Close(); p.server.Close(); p.wg.Wait() }
	return p
}

// accept does what the ingress does: it looks at the ClientHello only.
func (p *pair) accept(c net.Conn) {
	head := make([]byte, 5)
	if _, err := io.ReadFull(c, head); err != nil {
		c.Close()
		return
	}
	rest := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(c, rest); err != nil {
		c.Close()
		return
	}
	head = append(head, rest...)
	if bytes.Contains(head, []byte(webgw.ALPNData)) {
		p.server.ServeData(p.ctx, c, head)
	} else {
		p.server.ServeControl(p.ctx, c, head)
	}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(string(bytes.TrimSpace(p)))
	return len(p), nil
}

// node attaches a node; connect answers its requests. The returned function
// ends it.
func (p *pair) node(n netx.Net, k ident.Key, connect Connect) (c *Client, stop func()) {
	ctx, cancel := context.WithCancel(p.ctx)
	c = &Client{Key: k, Gateway: key(1).ID(), Addresses: func() []string { return []string{p.addr} }, Net: n,
		Connect: connect, Changed: func(s State) { p.states <- s }, Log: p.log}
	var wg sync.WaitGroup
	wg.Go(func() { c.Run(ctx) })
	return c, func() { cancel(); wg.Wait() }
}

func (p *pair) waitUp() State {
	p.t.Helper()
	for s := range p.states {
		if s.Up {
			return s
		}
	}
	panic("unreachable")
}

func (p *pair) open(k Kind, node ident.Key) *Stream {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, 20*time.Second)
	defer cancel()
	s, err := p.server.Open(ctx, node.ID(), Request{Kind: k, Exposure: exposure, Target: "127.0.0.1:80", Host: "blog.example"})
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

// bubble runs f with a gateway and a node behind NAT on a network in memory.
func bubble(t *testing.T, connect func(w *memnet.World) Connect, f func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host)) {
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		gw, home := w.Host("gent"), w.Host("home1")
		w.SetLink(gw, home, memnet.Link{Latency: 20 * time.Millisecond})
		p := newPair(t, gw, ":443")
		p.addr = "gent:443"
		_, stop := p.node(home, key(2), connect(w))
		p.waitUp()
		f(t, p, w, gw, home)
		stop()
		p.stop()
	})
}

// echo is a workload that sends back what it gets and ends when it ends.
func echo(*memnet.World) Connect {
	return func(ctx context.Context, _ webgw.ID, r Request) (net.Conn, error) {
		w := memnet.New(2)
		h := w.Host("workload")
		l, err := h.Listen(ctx, "tcp", "127.0.0.1:1")
		if err != nil {
			return nil, err
		}
		go func() {
			c, err := l.Accept()
			l.Close()
			if err != nil {
				return
			}
			if _, err := io.Copy(c, c); err != nil {
				netx.Reset(c)
				return
			}
			c.Close()
		}()
		return h.Dial(ctx, "tcp", "127.0.0.1:1", nil)
	}
}

func kinds(t *testing.T, f func(t *testing.T, k Kind)) {
	for _, k := range []Kind{Sealed, Handoff} {
		t.Run(k.String(), func(t *testing.T) { f(t, k) })
	}
}

func TestStreamEchoesAndConnectionIsReused(t *testing.T) {
	kinds(t, func(t *testing.T, k Kind) {
		bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
			used := map[*dataConn]int{}
			for i := range 20 {
				s := p.open(k, key(2))
				used[s.d]++
				want := bytes.Repeat([]byte{byte(i)}, 1+i*20000)
				go func() {
					s.Write(want)
					s.CloseWrite()
				}()
				got, err := io.ReadAll(s)
				if err != nil || !bytes.Equal(got, want) {
					t.Fatalf("stream %d: %d bytes, %v; want %d", i, len(got), err, len(want))
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if len(used) > 2 {
				t.Errorf("20 streams, one after another, used %d connections", len(used))
			}
		})
	})
}

func TestFirstByteOfANewStreamTakesOneRoundTrip(t *testing.T) {
	kinds(t, func(t *testing.T, k Kind) {
		bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
			time.Sleep(time.Second) // fake time: the pool fills
			start := time.Now()
			s := p.open(k, key(2))
			s.Write([]byte("x"))
			if _, err := io.ReadFull(s, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); took != 40*time.Millisecond {
				t.Errorf("took %v, want one round trip of 40ms", took)
			}
			s.Close()
		})
	})
}

func TestRefusalReachesTheCallerAndTheConnectionLivesOn(t *testing.T) {
	refuse := func(*memnet.World) Connect {
		return func(context.Context, webgw.ID, Request) (net.Conn, error) {
			return nil, &webgw.Error{Kind: webgw.Forbidden, Public: "no such exposure"}
		}
	}
	kinds(t, func(t *testing.T, k Kind) {
		bubble(t, refuse, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
			used := map[*dataConn]bool{}
			for range 5 {
				s := p.open(k, key(2))
				used[s.d] = true
				visitor, far := memPipe(t)
				go far.Write([]byte("more"))
				_, _, err := join(s, visitor, []byte("hello"))
				if webgw.KindOf(err) != webgw.Forbidden {
					t.Fatalf("Join: %v, want forbidden", err)
				}
				if _, err := visitor.Write([]byte("sorry")); err != nil {
					t.Errorf("after a refusal the visitor can't be answered: %v", err)
				}
				visitor.Close()
				far.Close()
				if s = p.open(k, key(2)); webgw.KindOf(s.Accepted()) != webgw.Forbidden {
					t.Fatal("Accepted: want forbidden")
				}
				s.Close()
			}
			if len(used) > 2 {
				t.Errorf("5 refusals used %d connections", len(used))
			}
		})
	})
}

func memPipe(t *testing.T) (a, b net.Conn) {
	w := memnet.New(3)
	h := w.Host("h")
	l, err := h.Listen(t.Context(), "tcp", "127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = h.Dial(t.Context(), "tcp", "127.0.0.1:1", nil); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return a, b
}

func TestJoinPassesHalfClosesAndCounts(t *testing.T) {
	kinds(t, func(t *testing.T, k Kind) {
		bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
			visitor, far := memPipe(t)
			go func() {
				far.Write(bytes.Repeat([]byte("abc"), 100000))
				far.(netx.CloseWriter).CloseWrite()
			}()
			got := make(chan int)
			go func() {
				b, err := io.ReadAll(far)
				if err != nil {
					t.Error(err)
				}
				got <- len(b)
			}()
			in, out, err := join(p.open(k, key(2)), visitor, []byte("head"))
			visitor.Close()
			if n := <-got; err != nil || in != 300004 || out != 300004 || n != 300004 {
				t.Errorf("in %d out %d read %d, %v", in, out, n, err)
			}
			far.Close()
		})
	})
}

// A long handoff stream sheds its frames and ends with its connection.
func TestTheRestOfALongStreamHasNoFrames(t *testing.T) {
	bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
		for range 2 {
			const size = restAfter + 1<<20
			visitor, far := memPipe(t)
			go func() {
				far.Write(make([]byte, size))
				far.(netx.CloseWriter).CloseWrite()
			}()
			read := make(chan int64)
			go func() {
				n, err := io.Copy(io.Discard, far)
				if err != nil {
					t.Error(err)
				}
				read <- n
			}()
			s := p.open(Handoff, key(2))
			in, out, err := join(s, visitor, nil)
			visitor.Close()
			if n := <-read; err != nil || in != size || out != size || n != size {
				t.Errorf("in %d out %d read %d, %v", in, out, n, err)
			}
			if !s.d.restIn || !s.d.restOut {
				t.Error("frames to the end")
			}
			if _, err := s.d.raw.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the connection lives on: %v", err)
			}
			far.Close()
		}
	})
}

// An end of the tunnel that dies in the middle of such a stream must not look
// like the stream's end.
func TestDeathInTheRestOfALongStreamIsACut(t *testing.T) {
	p := newPair(t, netx.Host{}, "127.0.0.1:0")
	workload, toWorkload := tcpPipe(t)
	defer workload.Close()
	c, stop := p.node(netx.Host{}, key(2), func(context.Context, webgw.ID, Request) (net.Conn, error) { return toWorkload, nil })
	p.waitUp()
	visitor, far := tcpPipe(t)
	defer far.Close()
	joined := make(chan error, 1)
	go func() {
		_, _, err := join(p.open(Handoff, key(2)), visitor, []byte("x"))
		joined <- err
	}()
	go workload.Write(make([]byte, 2*restAfter))
	if _, err := io.CopyN(io.Discard, far, restAfter+restAfter/2); err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	for d := range c.conns {
		d.raw.Close() // as the kernel does when a process dies
	}
	c.mu.Unlock()
	if _, err := io.Copy(io.Discard, far); err == nil {
		t.Error("the visitor saw an orderly end")
	}
	far.Close()
	if err := <-joined; err == nil {
		t.Error("the gateway saw an orderly end")
	}
	stop()
	p.stop()
}

// tcpPipe is a TCP connection over loopback.
func tcpPipe(t *testing.T) (a, b net.Conn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return a, b
}

func TestResetOfTheVisitorResetsTheWorkload(t *testing.T) {
	seen := make(chan error, 1)
	connect := func(w *memnet.World) Connect {
		return func(ctx context.Context, _ webgw.ID, _ Request) (net.Conn, error) {
			a, b := memPipe(t)
			go func() {
				_, err := io.Copy(io.Discard, b)
				seen <- err
			}()
			return a, nil
		}
	}
	synctest.Test(t, func(t *testing.T) {
		seen = make(chan error, 1)
		w := memnet.New(1)
		gw, home := w.Host("gent"), w.Host("home1")
		p := newPair(t, gw, ":443")
		p.addr = "gent:443"
		_, stop := p.node(home, key(2), connect(w))
		p.waitUp()
		visitor, far := memPipe(t)
		go func() {
			far.Write([]byte("x"))
			synctest.Wait()
			netx.Reset(far)
		}()
		if _, _, err := join(p.open(Handoff, key(2)), visitor, nil); err == nil {
			t.Error("Join of a reset visitor reports success")
		}
		if err := <-seen; err == nil {
			t.Error("the workload saw an orderly end instead of a reset")
		}
		stop()
		p.stop()
	})
}

func TestSilentCutIsNoticedAndRepairedWithinFiveSeconds(t *testing.T) {
	bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
		time.Sleep(3 * time.Second)
		w.Cut(gw, home)
		start := time.Now()
		if s := <-p.states; s.Up || time.Since(start) > 5*time.Second {
			t.Errorf("after %v: %+v", time.Since(start), s)
		}
		time.Sleep(time.Second)
		if n := len(p.server.Sessions()); n != 0 {
			t.Errorf("the gateway still has %d sessions after %v", n, time.Since(start))
		}
		_, err := p.server.Open(p.ctx, key(2).ID(), Request{Kind: Sealed})
		if webgw.KindOf(err) != webgw.Unavailable {
			t.Errorf("Open: %v", err)
		}
		time.Sleep(time.Minute)
		w.Repair(gw, home)
		start = time.Now()
		p.waitUp()
		if took := time.Since(start); took > backoffMax*3/2+dialTimeout {
			t.Errorf("back after %v", took)
		}
		s := p.open(Sealed, key(2))
		s.Write([]byte("x"))
		if _, err := io.ReadFull(s, make([]byte, 1)); err != nil {
			t.Error(err)
		}
		s.Close()
	})
}

func TestNewestSessionWinsAtOnce(t *testing.T) {
	bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
		first := p.server.Sessions()[0].Epoch
		_, stop := p.node(w.Host("home2"), key(2), echo(w))
		p.waitUp()
		s := <-p.states // the first node's
		if s.Up || webgw.KindOf(s.Err) != webgw.Taken {
			t.Errorf("the older session was told %+v", s)
		}
		now := p.server.Sessions()
		if len(now) != 1 || now[0].Epoch <= first {
			t.Errorf("sessions %+v", now)
		}
		time.Sleep(20 * time.Second)
		if len(p.states) != 0 {
			t.Error("two processes of one identity fight")
		}
		stop()
	})
}

func TestStrangersGetNoDataConnectionIntoASession(t *testing.T) {
	bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
		time.Sleep(time.Second)
		before := p.server.Sessions()[0].Idle
		tls, err := ident.Key{}.ClientTLS(key(1).ID(), webgw.ALPNData)
		if err != nil {
			t.Fatal(err)
		}
		thief := &attachment{c: &Client{Key: key(2), Net: w.Host("thief"), Log: p.log, Metrics: NewClientMetrics(nil)},
			addr: p.addr, epoch: p.server.Sessions()[0].Epoch, secret: make([]byte, 32), dataTLS: tls, dialing: make(chan struct{}, 1)}
		d, err := thief.dialData(t.Context(), Sealed)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.awaitRequest(); err == nil {
			t.Error("a connection with a wrong proof was kept")
		}
		if now := p.server.Sessions()[0].Idle; now != before {
			t.Errorf("pool went from %d to %d", before, now)
		}
	})
}

func TestSilentStrangersKeepNoNodeOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		gw, home, strangers := w.Host("gent"), w.Host("home1"), w.Host("strangers")
		p := newPair(t, gw, ":443")
		p.addr = "gent:443"
		for range 2 * maxHandshakes {
			c, err := strangers.Dial(t.Context(), "tcp", p.addr, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.Write([]byte{22, 3, 1, 0, 1, 1}) // as much as it takes to be handed on, and no more
		}
		synctest.Wait()
		_, stop := p.node(home, key(2), echo(w))
		start := time.Now()
		p.waitUp()
		if took := time.Since(start); took > time.Second {
			t.Errorf("the node got in after %v", took)
		}
		stop()
		p.stop()
	})
}

func TestDrainOfANodeLetsStreamsFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		gw, home := w.Host("gent"), w.Host("home1")
		p := newPair(t, gw, ":443")
		p.addr = "gent:443"
		c, stop := p.node(home, key(2), echo(w))
		p.waitUp()
		s := p.open(Sealed, key(2))
		s.Write([]byte("x"))
		io.ReadFull(s, make([]byte, 1))
		done := make(chan error, 1)
		go func() { done <- c.Drain(t.Context()) }()
		synctest.Wait()
		if _, err := p.server.Open(p.ctx, key(2).ID(), Request{Kind: Sealed}); webgw.KindOf(err) != webgw.Unavailable {
			t.Errorf("Open on a draining node: %v", err)
		}
		select {
		case <-done:
			t.Error("Drain returned with a stream open")
		default:
		}
		s.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		stop()
		p.stop()
	})
}

func TestAdmitRefusesWithItsReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		gw, home := w.Host("gent"), w.Host("home1")
		p := newPair(t, gw, ":443")
		p.addr = "gent:443"
		p.server.Admit = func(webgw.ID) error { return &webgw.Error{Kind: webgw.Forbidden, Public: "not on the list"} }
		_, stop := p.node(home, key(2), echo(w))
		if s := <-p.states; webgw.KindOf(s.Err) != webgw.Forbidden {
			t.Errorf("told %v", s.Err)
		}
		stop()
		p.stop()
	})
}

func TestPoolGrowsWithDemand(t *testing.T) {
	bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() {
				s := p.open(Sealed, key(2))
				s.Write([]byte("x"))
				s.CloseWrite()
				if b, err := io.ReadAll(s); err != nil || len(b) != 1 {
					t.Error(len(b), err)
				}
				s.Close()
			})
		}
		wg.Wait()
		if n := p.server.Sessions()[0].Idle; n < 16 {
			t.Errorf("only %d ready after a burst of 200", n)
		}
		time.Sleep(3 * time.Minute)
		if n := p.server.Sessions()[0].Idle; n > 16 {
			t.Errorf("%d still ready three minutes later", n)
		}
	})
}

// nettest.TestConn does not fit: after a write deadline part of a frame may
// have left, so that a Stream, like a tls.Conn, can't be written to again.
func TestStreamKeepsReadDeadlinesAndCloseWakesEverybody(t *testing.T) {
	kinds(t, func(t *testing.T, k Kind) {
		bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
			s := p.open(k, key(2))
			buf := make([]byte, 100)
			s.SetReadDeadline(time.Now().Add(-time.Second))
			if _, err := s.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("read after a past deadline: %v", err)
			}
			s.SetReadDeadline(time.Now().Add(time.Second))
			start := time.Now()
			if _, err := s.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Second {
				t.Errorf("read until a deadline: %v after %v", err, time.Since(start))
			}
			s.SetReadDeadline(time.Time{})
			s.Write([]byte("still here"))
			if n, err := s.Read(buf); err != nil || string(buf[:n]) != "still here" {
				t.Errorf("after a deadline: %q, %v", buf[:n], err)
			}
			woken := make(chan error, 2)
			go func() { _, err := s.Read(buf); woken <- err }()
			go func() {
				for {
					if _, err := s.Write(make([]byte, 64<<10)); err != nil {
						woken <- err
						return
					}
				}
			}()
			time.Sleep(time.Minute)
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			<-woken
			<-woken
			if _, err := s.Write(buf); err == nil {
				t.Error("write after close succeeds")
			}
			if err := s.Close(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("second close: %v", err)
			}
		})
	})
}

// Real sockets, both kinds, many streams of random sizes at once, both ways.
func TestBytesArriveWholeOverLoopback(t *testing.T) {
	p := newPair(t, netx.Host{}, "127.0.0.1:0")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(c, c)
				c.(*net.TCPConn).CloseWrite()
				c.Close()
			}()
		}
	}()
	_, stopNode := p.node(netx.Host{}, key(2), func(ctx context.Context, _ webgw.ID, r Request) (net.Conn, error) {
		return netx.Host{}.Dial(ctx, "tcp", l.Addr().String(), nil)
	})
	p.waitUp()
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer front.Close()
	var n int
	go func() {
		for {
			c, err := front.Accept()
			if err != nil {
				return
			}
			n++
			k := Kind(1 + n%2)
			go func() {
				if _, _, err := join(p.open(k, key(2)), c, nil); err != nil {
					t.Errorf("join: %v", err)
				}
				c.Close()
			}()
		}
	}()
	var wg sync.WaitGroup
	for i := range 30 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 1))
			size := 1 << r.IntN(23)
			if i < 4 {
				size = 2*restAfter + r.IntN(1<<20)
			}
			if err := roundTrip(front.Addr().String(), r, size); err != nil {
				t.Errorf("stream %d of %d bytes: %v", i, size, err)
			}
		})
	}
	wg.Wait()
	stopNode()
	p.stop()
}

func roundTrip(addr string, r *rand.Rand, size int) error {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	go func() {
		for p := data; len(p) > 0; {
			n := min(len(p), 1+r.IntN(300000))
			if _, err := c.Write(p[:n]); err != nil {
				return
			}
			p = p[n:]
		}
		c.(*net.TCPConn).CloseWrite()
	}()
	h := sha256.New()
	n, err := io.Copy(h, c)
	if err != nil {
		return err
	}
	if want := sha256.Sum256(data); n != int64(size) || !bytes.Equal(h.Sum(nil), want[:]) {
		return fmt.Errorf("%d bytes of another content came back", n)
	}
	return nil
}

// A stalled stream must not hold up another.
func TestStalledStreamStallsNothingElse(t *testing.T) {
	bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
		stalled := p.open(Sealed, key(2))
		stalled.SetWriteDeadline(time.Now().Add(5 * time.Second))
		for {
			if _, err := stalled.Write(make([]byte, 64<<10)); err != nil {
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal(err)
				}
				break
			}
		}
		start := time.Now()
		s := p.open(Sealed, key(2))
		s.Write([]byte("x"))
		io.ReadFull(s, make([]byte, 1))
		if took := time.Since(start); took > 200*time.Millisecond {
			t.Errorf("a stream beside a stalled one took %v", took)
		}
		s.Close()
		stalled.Close()
	})
}

// join waits until Join is over.
func join(s *Stream, visitor net.Conn, head []byte) (in, out int64, err error) {
	over := make(chan struct{})
	s.Join(visitor, head, func(i, o int64, e error) {
		in, out, err = i, o, e
		close(over)
	})
	<-over
	return in, out, err
}
