package tunnel

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/netx/memnet"
)

// inbox gathers what a flow delivers.
type inbox struct {
	mu  sync.Mutex
	all []string
}

func (b *inbox) deliver(p []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all = append(b.all, string(p))
}

func (b *inbox) take() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := b.all
	b.all = nil
	return out
}

// flowGrid is a gateway, a node and a UDP echo beside the node.
type flowGrid struct {
	*pair
	t        *testing.T
	w        *memnet.World
	gw, home *memnet.Host
	client   *Client
	ended    chan Ended
}

const echoAt = "127.0.0.1:5353"

// flowBubble runs f with an echo of datagrams on the node's host.
func flowBubble(t *testing.T, f func(g *flowGrid)) {
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		g := &flowGrid{t: t, w: w, gw: w.Host("gent"), home: w.Host("home1"), ended: make(chan Ended, 1000)}
		w.SetLink(g.gw, g.home, memnet.Link{Latency: 20 * time.Millisecond})
		g.pair = newPair(t, g.gw, ":443")
		g.addr = "gent:443"
		ctx, cancel := context.WithCancel(g.ctx)
		g.client = &Client{Key: key(2), Gateway: key(1).ID(), Addresses: func() []string { return []string{g.addr} }, Net: g.home,
			Changed: func(s State) { g.states <- s }, Log: g.log, Ended: func(e Ended) { g.ended <- e },
			Connect: func(context.Context, webgw.ID, Request) (net.Conn, error) { return nil, net.ErrClosed },
			ConnectFlow: func(ctx context.Context, _ webgw.ID, r Request) (net.Conn, error) {
				if r.Kind != Flows || r.Exposure != exposure {
					return nil, &webgw.Error{Kind: webgw.Forbidden, Public: "no such exposure"}
				}
				return g.home.Dial(ctx, "udp", r.Target, nil)
			}}
		var wg sync.WaitGroup
		wg.Go(func() { g.client.Run(ctx) })
		echo, err := g.home.ListenPacket(ctx, "udp", echoAt)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			packets := echo.(netx.Packets)
			for packets.Receive(func(p []byte, peer netip.AddrPort, local netip.Addr) { packets.Send(p, peer, local) }) == nil {
			}
		})
		g.waitUp()
		f(g)
		echo.Close()
		cancel()
		wg.Wait()
		g.stop()
		if open := w.Open(); len(open) > 0 {
			t.Errorf("left open: %q", open)
		}
	})
}

func (g *flowGrid) open(b *inbox) *Flow {
	g.t.Helper()
	f, err := g.server.OpenFlow(key(2).ID(), Request{Exposure: exposure, Target: echoAt}, b.deliver)
	if err != nil {
		g.t.Fatal(err)
	}
	return f
}

// settle lets everything happen that will within d.
func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestFlowsCarryDatagrams(t *testing.T) {
	flowBubble(t, func(g *flowGrid) {
		var a, b inbox
		fa, fb := g.open(&a), g.open(&b)
		// Datagrams that come before the connection is there wait for it.
		fa.Send([]byte("a1"))
		fb.Send([]byte("b1"))
		fb.Send(nil)
		settle(time.Second)
		if got := a.take(); !slices.Equal(got, []string{"a1"}) {
			t.Errorf("flow a got %q", got)
		}
		if got := b.take(); !slices.Equal(got, []string{"b1", ""}) {
			t.Errorf("flow b got %q", got)
		}
		start := time.Now()
		fa.Send([]byte("a2"))
		settle(40 * time.Millisecond)
		if got := a.take(); !slices.Equal(got, []string{"a2"}) {
			t.Errorf("%q after one round trip (%v)", got, time.Since(start))
		}
		for _, n := range []int{1, 1200, 9000, 16384, MaxDatagram} {
			want := strings.Repeat("x", n)
			fa.Send([]byte(want))
			settle(time.Second)
			if got := a.take(); len(got) != 1 || got[0] != want {
				t.Errorf("of %d bytes came %d datagrams", n, len(got))
			}
		}
		fa.Send(make([]byte, MaxDatagram+1))
		settle(time.Second)
		if got := a.take(); len(got) != 0 {
			t.Errorf("a datagram that is too large came as %d", len(got))
		}
		if s := g.server.Sessions(); len(s) != 1 || s[0].Flows != 2 {
			t.Errorf("sessions %+v", s)
		}
		fa.Close()
		fb.Close()
		settle(time.Second)
		if e := <-g.ended; e.Err != nil || e.In == 0 || e.In != e.Out {
			t.Errorf("ended: %+v", e)
		}
		if n := g.client.flows.Load(); n != 0 || g.server.Sessions()[0].Flows != 0 {
			t.Errorf("%d flows are left", n)
		}
		fa.Send([]byte("late"))
	})
}

func TestManyFlowsShareFewConnections(t *testing.T) {
	flowBubble(t, func(g *flowGrid) {
		boxes := make([]inbox, 200)
		flows := make([]*Flow, len(boxes))
		for round := range 3 {
			for i := range flows {
				if flows[i] == nil {
					flows[i] = g.open(&boxes[i])
				}
				flows[i].Send(fmt.Appendf(nil, "%d in %d", i, round))
			}
			settle(time.Second)
			for i := range boxes {
				if got := boxes[i].take(); len(got) != 1 || got[0] != fmt.Sprintf("%d in %d", i, round) {
					t.Fatalf("flow %d, round %d: %q", i, round, got)
				}
			}
		}
		if n := g.client.links.Load(); n < 1 || n > maxLinks {
			t.Errorf("%d connections carry the flows", n)
		}
		for _, f := range flows {
			f.Close()
		}
	})
}

func TestFlowsExpireAtBothEnds(t *testing.T) {
	flowBubble(t, func(g *flowGrid) {
		var b inbox
		f := g.open(&b)
		f.Send([]byte("x"))
		settle(50 * time.Second)
		if f.Ended() != nil {
			t.Fatal("ended early")
		}
		f.Send([]byte("y"))
		settle(50 * time.Second)
		if f.Ended() != nil || len(b.take()) != 2 {
			t.Fatal("the second datagram did not keep the flow")
		}
		settle(40 * time.Second)
		if f.Ended() == nil || g.client.flows.Load() != 0 {
			t.Errorf("after 90 s: %v, %d flows at the node", f.Ended(), g.client.flows.Load())
		}
	})
}

func TestRefusedFlowsTellWhy(t *testing.T) {
	flowBubble(t, func(g *flowGrid) {
		other := exposure
		other.Name = "other"
		f, err := g.server.OpenFlow(key(2).ID(), Request{Exposure: other, Target: echoAt}, func([]byte) { t.Error("a datagram came") })
		if err != nil {
			t.Fatal(err)
		}
		f.Send([]byte("x"))
		settle(time.Second)
		if webgw.KindOf(f.Ended()) != webgw.Forbidden {
			t.Errorf("ended with %v", f.Ended())
		}
		// Nobody listens: that shows with the first datagram.
		f, err = g.server.OpenFlow(key(2).ID(), Request{Exposure: exposure, Target: "127.0.0.1:9"}, func([]byte) { t.Error("a datagram came") })
		if err != nil {
			t.Fatal(err)
		}
		f.Send([]byte("x"))
		settle(time.Second)
		if e, ok := asError(f.Ended()); !ok || e.Kind != webgw.Unavailable || !strings.Contains(e.Public, "nothing listens") {
			t.Errorf("ended with %v", f.Ended())
		}
		if _, err := g.server.OpenFlow(key(7).ID(), Request{}, nil); webgw.KindOf(err) != webgw.Unavailable {
			t.Errorf("a node without a session: %v", err)
		}
	})
}

func TestFlowsOfALostSessionEndAndNewOnesWork(t *testing.T) {
	flowBubble(t, func(g *flowGrid) {
		var b inbox
		f := g.open(&b)
		f.Send([]byte("x"))
		settle(time.Second)
		g.w.Cut(g.gw, g.home)
		settle(10 * time.Second)
		if webgw.KindOf(f.Ended()) != webgw.Unavailable {
			t.Errorf("ended with %v", f.Ended())
		}
		if _, err := g.server.OpenFlow(key(2).ID(), Request{}, nil); webgw.KindOf(err) != webgw.Unavailable {
			t.Errorf("without a session: %v", err)
		}
		g.w.Repair(g.gw, g.home)
		g.waitUp()
		b.take()
		f = g.open(&b)
		f.Send([]byte("y"))
		settle(2 * time.Second)
		if got := b.take(); !slices.Equal(got, []string{"y"}) {
			t.Errorf("after the session was back: %q, %v", got, f.Ended())
		}
		f.Close()
	})
}

// Datagrams that the path has no room for are dropped, soon and for good, and
// what is sent afterwards is not late for their sake.
func TestFlowsDropRatherThanQueue(t *testing.T) {
	flowBubble(t, func(g *flowGrid) {
		var a, b inbox
		fa, fb := g.open(&a), g.open(&b)
		fa.Send([]byte("x"))
		fb.Send([]byte("x"))
		settle(time.Second)
		a.take()
		b.take()
		g.w.Cut(g.gw, g.home)
		p := make([]byte, 1200)
		for range 10_000 { // 12 MB
			fa.Send(p)
		}
		// Who sends little on the same link is not hurt.
		var c inbox
		modest := g.open(&c)
		for modest.link != fa.link {
			modest.Close()
			modest = g.open(&c)
		}
		for range 5 {
			modest.Send(p)
		}
		settle(time.Second)
		g.w.Repair(g.gw, g.home)
		settle(time.Second)
		n := len(a.take())
		if got := len(c.take()); got != 5 {
			t.Errorf("beside a flood, %d of 5 datagrams came", got)
		}
		modest.Close()
		if most := (3 * linkQueue) / len(p); n == 0 || n > most {
			t.Errorf("%d of 10,000 datagrams came, want at most %d", n, most)
		}
		fb.Send([]byte("on time"))
		settle(50 * time.Millisecond)
		if got := b.take(); !slices.Equal(got, []string{"on time"}) {
			t.Errorf("beside the flood: %q", got)
		}
		fa.Close()
		fb.Close()
	})
}

func TestOldNodesCarryNoFlows(t *testing.T) {
	bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
		if _, err := p.server.OpenFlow(key(2).ID(), Request{}, nil); webgw.KindOf(err) != webgw.Unsupported {
			t.Errorf("got %v", err)
		}
	})
}

// Whatever comes over a link, its reader passes on whole frames or fails, and
// what carry writes is read back as it was.
func FuzzFlowFrames(f *testing.F) {
	frame := func(t frameType, flow uint32, p string) []byte {
		b := make([]byte, flowHeaderLen)
		putFlowHeader(b, t, flow, len(p))
		return append(b, p...)
	}
	f.Add(bytes.Join([][]byte{frame(frameOpen, 1, `{"target":"a:1"}`), frame(frameData, 1, "x"), frame(frameData, maxFlowID, ""), frame(frameEnd, 1, "")}, nil))
	f.Add(frame(frameRefuse, 3, `{"kind":"forbidden","message":"no"}`))
	f.Add([]byte{1, 0, 0, 1, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, script []byte) {
		d, err := scriptedConn(script)
		if err != nil {
			t.Fatal(err)
		}
		l, again := newLink(), newLink()
		var back []byte
		full := false
		err = l.read(d, func(ft frameType, flow uint32, p []byte) error {
			if !full && again.carry(ft, flow, p) {
				back = append(back, frame(ft, flow, string(p))...)
			} else {
				full = true
			}
			return nil
		})
		if err == nil {
			t.Fatal("no end")
		}
		if q := again.take(); q != nil && !bytes.Equal(q.Bytes(), back) || !full && !bytes.HasPrefix(script, back) {
			t.Fatal("frames changed")
		}
		if err == io.EOF && !full && len(back) != len(script) {
			t.Fatal("part of a frame was lost")
		}
	})
}
