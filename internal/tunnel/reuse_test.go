package tunnel

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

// say sends p on a stream to an echoing workload and wants it back.
func say(t *testing.T, s *Stream, p string) {
	t.Helper()
	if _, err := s.Write([]byte(p)); err != nil {
		t.Fatalf("write: %v", err)
	}
	b := make([]byte, len(p))
	if _, err := io.ReadFull(s, b); err != nil || string(b) != p {
		t.Fatalf("read %q, %v; want %q", b, err, p)
	}
}

// same opens streams until one comes on d; the others stay open.
func (p *pair) same(d *dataConn) *Stream {
	for range 64 {
		if s := p.open(d.kind, key(2)); s.d == d {
			return s
		}
	}
	return nil
}

// Whoever asks for an answer within some time and is refused leaves that time
// on the connection: the next stream must not end with it.
func TestDeadlinesEndWithTheirStream(t *testing.T) {
	refusing := true
	connect := func(w *memnet.World) Connect {
		answer := echo(w)
		return func(ctx context.Context, g webgw.ID, r Request) (net.Conn, error) {
			if refusing {
				return nil, &webgw.Error{Kind: webgw.Unavailable, Public: "nobody listens"}
			}
			return answer(ctx, g, r)
		}
	}
	kinds(t, func(t *testing.T, k Kind) {
		refusing = true
		bubble(t, connect, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
			s := p.open(k, key(2))
			s.SetDeadline(time.Now().Add(10 * time.Second))
			if err := s.Accepted(); webgw.KindOf(err) != webgw.Unavailable {
				t.Fatal(err)
			}
			s.Close()
			s.SetDeadline(time.Now().Add(-time.Second)) // too late to matter
			refusing = false
			next := p.same(s.d)
			if next == nil {
				t.Fatal("the connection was not kept")
			}
			say(t, next, "at once")
			time.Sleep(11 * time.Second)
			say(t, next, "after the deadline of another")
			next.Close()
		})
	})
}

// A frame of which only a part could be sent swallows what follows: nothing may
// follow, neither of this stream nor of another.
func TestAConnectionWithHalfAFrameIsNotUsedAgain(t *testing.T) {
	ended := make(chan struct{})
	mute := func(w *memnet.World) Connect {
		return func(ctx context.Context, _ webgw.ID, r Request) (net.Conn, error) {
			a, b := memPipe(t)
			go func() {
				<-ended
				b.(interface{ CloseWrite() error }).CloseWrite()
				io.Copy(io.Discard, b)
				b.Close()
			}()
			return a, nil
		}
	}
	kinds(t, func(t *testing.T, k Kind) {
		bubble(t, func(w *memnet.World) Connect { ended = make(chan struct{}); return mute(w) }, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
			s := p.open(k, key(2))
			s.SetWriteDeadline(time.Now().Add(5 * time.Second))
			var err error
			for err == nil {
				_, err = s.Write(make([]byte, 128<<10))
			}
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
			s.SetWriteDeadline(time.Time{})
			close(ended)
			if _, err := io.ReadAll(s); err != nil {
				t.Log(err)
			}
			if _, err := s.Write([]byte("x")); err == nil {
				t.Error("a write after half a frame succeeds")
			}
			s.Close()
			time.Sleep(10 * time.Second)
			if p.same(s.d) != nil {
				t.Error("a connection with half a frame carries another stream")
			}
		})
	})
}

func TestNothingCanBeDoneOnAClosedStream(t *testing.T) {
	kinds(t, func(t *testing.T, k Kind) {
		bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
			s := p.open(k, key(2))
			s.Close() // before anything was asked for: it goes back as it came
			next := p.same(s.d)
			if next == nil {
				t.Fatal("the connection was not kept")
			}
			if _, err := s.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Read: %v", err)
			}
			if err := s.Accepted(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Accepted: %v", err)
			}
			if err := s.SetReadDeadline(time.Unix(1, 0)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("SetReadDeadline: %v", err)
			}
			visitor, far := memPipe(t)
			if _, _, err := join(s, visitor, nil); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Join: %v", err)
			}
			far.Close()
			say(t, next, "mine alone")
			next.Close()
		})
	})
}

// What a node sends beyond the end of a stream must not become the beginning of
// another one.
func TestBytesAfterTheEndOfAStreamSpoilTheConnection(t *testing.T) {
	kinds(t, func(t *testing.T, k Kind) {
		synctest.Test(t, func(t *testing.T) {
			w := memnet.New(1)
			gw, home := w.Host("gent"), w.Host("home1")
			p := newPair(t, gw, ":443")
			p.addr = "gent:443"
			c, stop := p.node(home, key(2), func(context.Context, webgw.ID, Request) (net.Conn, error) {
				return nil, errors.New("refused")
			})
			p.waitUp()
			synctest.Wait()
			s := p.open(k, key(2))
			// The node's end of that connection, with everything that a node could say.
			c.mu.Lock()
			for d := range c.conns {
				if d.raw.LocalAddr().String() == s.RemoteAddr().String() {
					frames := []byte{byte(frameAccept), 0, 0, 0, byte(frameEnd), 0, 0, 0, byte(frameAccept), 0, 0, 0, byte(frameData), 0, 0, 1, 'x'}
					if err := d.write(frames); err != nil {
						t.Error(err)
					}
				}
			}
			c.mu.Unlock()
			synctest.Wait()
			if b, err := io.ReadAll(s); err != nil || len(b) > 0 {
				t.Errorf("%q, %v", b, err)
			}
			s.Close()
			if p.same(s.d) != nil {
				t.Error("the connection carries another stream")
			}
			stop()
			p.stop()
		})
	})
}

// A gateway may demand without end: what a node can't meet costs it one answer
// per demand.
func TestEndlessDemandsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		gw, home := w.Host("gent"), w.Host("home1")
		l, err := gw.Listen(t.Context(), "tcp", ":443")
		if err != nil {
			t.Fatal(err)
		}
		const demands = 20
		shorts, refused := 0, 0
		var wg sync.WaitGroup
		wg.Go(func() {
			first, err := l.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			var held []net.Conn
			defer func() {
				for _, c := range held {
					c.Close()
				}
			}()
			wg.Go(func() { // data connections: never answered
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					held = append(held, c)
				}
			})
			config, err := key(1).ServerTLS(true, webgw.ALPNTunnel)
			if err != nil {
				t.Error(err)
			}
			conn := tls.Server(first, config)
			defer conn.Close()
			if _, _, err := readMessage(conn, maxHello); err != nil {
				t.Error(err)
			}
			writeMessage(conn, msgWelcome, welcome{webgw.Protocol, 1, make([]byte, 32)})
			wg.Go(func() {
				for range demands {
					writeMessage(conn, msgDemand, demand{Sealed: 1 << 25, Handoff: 1 << 25})
				}
			})
			conn.SetReadDeadline(time.Now().Add(3 * time.Second))
			for {
				m, body, err := readMessage(conn, maxControl)
				if err != nil {
					break
				}
				var d demand
				if m == msgShort && json.Unmarshal(body, &d) == nil {
					shorts++
					refused += d.Sealed + d.Handoff
				}
			}
			l.Close()
		})
		p := &pair{t: t, addr: "gent:443", states: make(chan State, 100), log: slog.New(slog.DiscardHandler), ctx: t.Context()}
		_, stop := p.node(home, key(2), echo(w))
		p.waitUp()
		wg.Wait()
		stop()
		if shorts > 2*demands {
			t.Errorf("%d answers to %d demands", shorts, demands)
		}
		if want := demands*2*(1<<25) - maxConns; refused != want {
			t.Errorf("%d said not to come, want %d", refused, want)
		}
	})
}

// The other end chooses what a refusal says: it must not fill metrics or logs
// with words of its own.
func TestRefusalsAreTamed(t *testing.T) {
	e, ok := asError(refusal{Kind: "made up", Message: strings.Repeat("é", maxRequest)}.err("open stream"))
	if !ok || e.Kind != webgw.Unavailable || len(e.Public) > maxReason || !utf8.ValidString(e.Public) {
		t.Errorf("kind %q, %d bytes of text", e.Kind, len(e.Public))
	}
	if r := refusalOf(e); len(r.Message) > maxReason || !utf8.ValidString(r.Message) {
		t.Errorf("%d bytes of text", len(r.Message))
	}
	if err := (refusal{Kind: webgw.Taken, Message: "so"}).err("session"); webgw.KindOf(err) != webgw.Taken {
		t.Error(err)
	}
}

// Nothing is waited for after an answer of the wrong type.
func TestAWrongAnswerEndsAStreamAtOnce(t *testing.T) {
	kinds(t, func(t *testing.T, k Kind) {
		synctest.Test(t, func(t *testing.T) {
			w := memnet.New(1)
			gw, home := w.Host("gent"), w.Host("home1")
			p := newPair(t, gw, ":443")
			p.addr = "gent:443"
			c, stop := p.node(home, key(2), echo(w))
			p.waitUp()
			synctest.Wait()
			s := p.open(k, key(2))
			c.mu.Lock()
			for d := range c.conns {
				if d.raw.LocalAddr().String() == s.RemoteAddr().String() {
					if err := d.write([]byte{byte(frameData), 1, 0, 0, 'x'}); err != nil {
						t.Error(err)
					}
				}
			}
			c.mu.Unlock()
			start := time.Now()
			s.SetReadDeadline(start.Add(time.Minute))
			if err := s.Accepted(); err == nil || time.Since(start) > 0 {
				t.Errorf("%v after %v", err, time.Since(start))
			}
			s.Close()
			stop()
			p.stop()
		})
	})
}

// Only what was demanded has a place in a pool.
func TestANodeCanNotFillThePool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		gw, home := w.Host("gent"), w.Host("home1")
		p := newPair(t, gw, ":443")
		p.addr = "gent:443"
		c, stop := p.node(home, key(2), echo(w))
		p.waitUp()
		synctest.Wait()
		c.mu.Lock()
		a := c.current
		c.mu.Unlock()
		var extra []*dataConn
		for range 50 {
			d, err := a.dialData(t.Context(), Sealed)
			if err != nil {
				t.Fatal(err)
			}
			extra = append(extra, d)
		}
		synctest.Wait()
		if n := p.server.Sessions()[0].Idle; n > 3*poolMin {
			t.Errorf("%d connections in the pools that nobody asked for", n)
		}
		for _, d := range extra {
			d.raw.Close()
		}
		stop()
		p.stop()
	})
}

// A stream that was under way when the node said that it drains is still served.
func TestDrainWaitsForStreamsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		gw, home := w.Host("gent"), w.Host("home1")
		w.SetLink(gw, home, memnet.Link{Latency: 100 * time.Millisecond})
		p := newPair(t, gw, ":443")
		p.addr = "gent:443"
		c, stop := p.node(home, key(2), echo(w))
		p.waitUp()
		time.Sleep(3 * time.Second)
		s := p.open(Sealed, key(2)) // taken before the gateway hears of it
		drained := make(chan error, 1)
		go func() {
			drained <- c.Drain(t.Context())
			stop()
		}()
		time.Sleep(time.Second)
		say(t, s, "still served")
		s.Close()
		if err := <-drained; err != nil {
			t.Error(err)
		}
		p.stop()
	})
}

// A node that repeats that it drains does not make the gateway think anew.
func TestDrainIsToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		gw, home := w.Host("gent"), w.Host("home1")
		p := newPair(t, gw, ":443")
		p.addr = "gent:443"
		changes := 0
		p.server.Changed = func() { changes++ }
		c, stop := p.node(home, key(2), echo(w))
		p.waitUp()
		synctest.Wait()
		before := changes
		c.mu.Lock()
		a := c.current
		c.mu.Unlock()
		for range 100 {
			a.send(msgDrain, nil)
		}
		synctest.Wait()
		if n := changes - before; n != 1 {
			t.Errorf("told %d times", n)
		}
		stop()
		p.stop()
	})
}

// The end of the node's context ends the dialing of workloads as well.
func TestNodeStopsWhileItDialsAWorkload(t *testing.T) {
	hang := func(*memnet.World) Connect {
		return func(ctx context.Context, _ webgw.ID, r Request) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
	}
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		gw, home := w.Host("gent"), w.Host("home1")
		p := newPair(t, gw, ":443")
		p.addr = "gent:443"
		_, stop := p.node(home, key(2), hang(w))
		p.waitUp()
		s := p.open(Sealed, key(2))
		go s.Accepted()
		synctest.Wait()
		start := time.Now()
		stop()
		if took := time.Since(start); took > time.Second {
			t.Errorf("it took %v", took)
		}
		s.Close()
		p.stop()
		if open := strings.Join(w.Open(), "\n"); open != "" {
			t.Errorf("left open:\n%s", open)
		}
	})
}
