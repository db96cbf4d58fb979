package ingress

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

// echoFlows is a FlowUpstream whose flows send everything back, with the
// target's name before it.
type echoFlows struct {
	mu     sync.Mutex
	flows  []*echoFlow
	down   map[string]bool // can't be opened
	refuse map[string]bool // refused late, as a node does
	slow   time.Duration   // to open
}

type echoFlow struct {
	up      *echoFlows
	target  string
	from    Origin
	deliver func([]byte)
	ended   error // under up.mu
	closed  bool
}

func (u *echoFlows) OpenFlow(ctx context.Context, r *Route, t webgw.Target, from Origin, deliver func([]byte)) (Flow, error) {
	select {
	case <-time.After(u.slow):
	case <-ctx.Done():
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.down[t.Address] {
		return nil, &webgw.Error{Kind: webgw.Unavailable, Public: "no session"}
	}
	f := &echoFlow{up: u, target: t.Address, from: from, deliver: deliver}
	u.flows = append(u.flows, f)
	return f, nil
}

// set changes what flows do.
func (u *echoFlows) set(f func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	f()
}

func (f *echoFlow) Send(p []byte) {
	f.up.mu.Lock()
	if f.up.refuse[f.target] {
		f.ended = errLate
	}
	ended := f.ended
	f.up.mu.Unlock()
	if ended == nil {
		f.deliver(append([]byte(f.target+" "), p...))
	}
}

func (f *echoFlow) Ended() error {
	f.up.mu.Lock()
	defer f.up.mu.Unlock()
	return f.ended
}

func (f *echoFlow) Close() error {
	f.up.mu.Lock()
	defer f.up.mu.Unlock()
	f.closed = true
	return nil
}

func (u *echoFlows) open() (n int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, f := range u.flows {
		if !f.closed {
			n++
		}
	}
	return n
}

// udpGrid is a gateway on a network in memory.
type udpGrid struct {
	t      *testing.T
	w      *memnet.World
	gw     *memnet.Host
	server *Server
	up     *echoFlows
	mu     sync.Mutex
	access []Access
}

var gwAddrs = []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("198.51.100.2"), netip.MustParseAddr("2001:db8::1")}

func udpBubble(t *testing.T, limits Limits, f func(g *udpGrid)) {
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		g := &udpGrid{t: t, w: w, gw: w.Host("gent", gwAddrs...), up: &echoFlows{down: map[string]bool{}, refuse: map[string]bool{}}}
		g.server = &Server{Net: g.gw, Flows: g.up, Upstream: &dialer{net: g.gw}, Limits: limits, AccessLog: func(a Access) {
			g.mu.Lock()
			defer g.mu.Unlock()
			g.access = append(g.access, a)
		}}
		if err := g.server.Listen(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() { g.server.Run(ctx) })
		f(g)
		stop()
		run.Wait()
		if n := g.up.open(); n != 0 {
			t.Errorf("%d flows are left open", n)
		}
		if g.server.flowDoors.all != 0 || len(g.server.flowDoors.by) != 0 {
			t.Errorf("%d flows are left on the books", g.server.flowDoors.all)
		}
	})
}

func (g *udpGrid) route(port uint16, policy *webgw.Policy, targets ...string) {
	g.t.Helper()
	d := expose("dns", webgw.UDP, nil, targets...)
	d.Exposure.Port, d.Exposure.Policy = port, policy
	table, problems := Build([]Declared{d})
	if len(problems) > 0 {
		g.t.Fatal(problems)
	}
	g.server.SetTable(table)
}

// visitor is a socket on a host of its own.
func (g *udpGrid) visitor(addr, to string) net.Conn {
	g.t.Helper()
	h := g.w.Host("visitor at "+addr, netip.MustParseAddr(addr))
	return g.socket(h, to)
}

func (g *udpGrid) socket(h *memnet.Host, to string) net.Conn {
	g.t.Helper()
	c, err := h.Dial(g.t.Context(), "udp", to, nil)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { c.Close() })
	return c
}

// askUDP sends a datagram and returns what comes back within a second, or "".
func askUDP(c net.Conn, what string) string {
	if _, err := c.Write([]byte(what)); err != nil {
		return ""
	}
	c.SetReadDeadline(time.Now().Add(time.Second))
	b := make([]byte, 64<<10)
	n, err := c.Read(b)
	if err != nil {
		return ""
	}
	return string(b[:n])
}

func wantAnswer(t *testing.T, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestUDPFlowsOfVisitors(t *testing.T) {
	udpBubble(t, Limits{}, func(g *udpGrid) {
		g.route(53, nil, "a:1")
		// On every address of the gateway, each answering for itself: the visitors'
		// sockets are connected.
		for i, at := range gwAddrs {
			h := g.w.Host(fmt.Sprint("visitor ", i))
			one, two := g.socket(h, netip.AddrPortFrom(at, 53).String()), g.socket(h, netip.AddrPortFrom(at, 53).String())
			wantAnswer(g.t, askUDP(one, "x"), "a:1 x")
			wantAnswer(g.t, askUDP(two, "y"), "a:1 y")
			wantAnswer(g.t, askUDP(one, "z"), "a:1 z")
			var f *echoFlow
			g.up.set(func() {
				if n := len(g.up.flows); n != 2*(i+1) {
					t.Errorf("%d flows", n)
				}
				f = g.up.flows[2*i]
			})
			if f.from.Local != netip.AddrPortFrom(at, 53) || f.from.Visitor.Addr() != h.Addrs()[b2i(at.Is6())] || f.from.Protocol != webgw.UDP {
				t.Errorf("origin %+v", f.from)
			}
		}
		// One datagram and its answer are forgotten soon, a conversation later.
		time.Sleep(30 * time.Second)
		if n := g.up.open(); n != 3 {
			t.Errorf("%d flows after 30 s", n)
		}
		time.Sleep(40 * time.Second)
		if n := g.up.open(); n != 0 {
			t.Errorf("%d flows after 70 s", n)
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		if i := slices.IndexFunc(g.access, func(a Access) bool { return a.BytesIn == 2 && a.BytesOut == 10 && a.Proto == "udp" && a.Err == nil }); len(g.access) != 6 || i < 0 {
			t.Errorf("access: %+v", g.access)
		}
	})
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestUDPTargetsThatFail(t *testing.T) {
	udpBubble(t, Limits{}, func(g *udpGrid) {
		g.route(53, nil, "a:1", "b:1")
		g.up.set(func() { g.up.down["a:1"] = true })
		c := g.visitor("203.0.113.1", "198.51.100.1:53")
		wantAnswer(g.t, askUDP(c, "x"), "b:1 x")
		// A refusal that comes late: the next datagram goes elsewhere.
		g.up.set(func() { delete(g.up.down, "a:1"); g.up.refuse["b:1"] = true })
		wantAnswer(g.t, askUDP(c, "y"), "")
		wantAnswer(g.t, askUDP(c, "y"), "a:1 y")
		// None is left: not tried for each datagram.
		g.up.set(func() {
			g.up.down["a:1"], g.up.down["b:1"] = true, true
			g.up.flows[len(g.up.flows)-1].ended = errLate
		})
		wantAnswer(g.t, askUDP(c, "z"), "")
		g.up.set(func() { delete(g.up.down, "b:1"); delete(g.up.refuse, "b:1") })
		wantAnswer(g.t, askUDP(c, "z"), "b:1 z")
	})
}

func TestUDPWaitsForASlowUpstream(t *testing.T) {
	udpBubble(t, Limits{}, func(g *udpGrid) {
		g.route(53, nil, "a:1")
		g.up.slow = 300 * time.Millisecond
		c := g.visitor("203.0.113.1", "198.51.100.1:53")
		for i := range earlyPackets + 10 {
			c.Write(fmt.Appendf(nil, "%d", i))
		}
		other := g.visitor("203.0.113.2", "198.51.100.1:53")
		start := time.Now()
		wantAnswer(g.t, askUDP(other, "x"), "a:1 x")
		if took := time.Since(start); took > 400*time.Millisecond {
			t.Errorf("another visitor waited for %v", took)
		}
		n := 0
		for b := make([]byte, 100); ; n++ {
			c.SetReadDeadline(time.Now().Add(time.Second))
			if k, err := c.Read(b); err != nil {
				break
			} else if !bytes.Equal(b[:k], fmt.Appendf(nil, "a:1 %d", n)) {
				t.Errorf("datagram %d is %q", n, b[:k])
			}
		}
		if n != earlyPackets {
			t.Errorf("%d datagrams were kept, want %d", n, earlyPackets)
		}
	})
}

func TestUDPLimitsAndPolicies(t *testing.T) {
	udpBubble(t, Limits{Flows: 4, FlowsPerAddress: 2}, func(g *udpGrid) {
		g.route(53, nil, "a:1")
		h := g.w.Host("busy")
		for i := range 4 {
			answer := "a:1 x"
			if i >= 2 {
				answer = "" // of one address
			}
			wantAnswer(g.t, askUDP(g.socket(h, "198.51.100.1:53"), "x"), answer)
		}
		wantAnswer(g.t, askUDP(g.visitor("203.0.113.1", "198.51.100.1:53"), "x"), "a:1 x")
		wantAnswer(g.t, askUDP(g.visitor("203.0.113.2", "198.51.100.1:53"), "x"), "a:1 x")
		wantAnswer(g.t, askUDP(g.visitor("203.0.113.3", "198.51.100.1:53"), "x"), "") // in all
		time.Sleep(time.Minute)
		late := g.visitor("203.0.113.4", "198.51.100.1:53")
		wantAnswer(g.t, askUDP(late, "x"), "a:1 x")

		// A policy that comes later is in force for flows that are open, too.
		g.route(53, &webgw.Policy{Deny: []netip.Prefix{netip.MustParsePrefix("203.0.113.4/32")}}, "a:1")
		wantAnswer(g.t, askUDP(late, "x"), "")
		wantAnswer(g.t, askUDP(g.visitor("203.0.113.5", "198.51.100.1:53"), "x"), "a:1 x")
		g.route(53, &webgw.Policy{Concurrent: 1}, "a:1")
		time.Sleep(time.Minute)
		wantAnswer(g.t, askUDP(g.visitor("203.0.113.6", "198.51.100.1:53"), "x"), "a:1 x")
		wantAnswer(g.t, askUDP(g.visitor("203.0.113.7", "198.51.100.1:53"), "x"), "")
	})
}

func TestUDPPortsComeAndGo(t *testing.T) {
	udpBubble(t, Limits{}, func(g *udpGrid) {
		g.route(53, nil, "a:1")
		c := g.visitor("203.0.113.1", "198.51.100.1:53")
		wantAnswer(g.t, askUDP(c, "x"), "a:1 x")
		g.route(53, nil, "b:1") // elsewhere
		wantAnswer(g.t, askUDP(c, "x"), "b:1 x")
		other, err := g.gw.ListenPacket(t.Context(), "udp", ":54")
		if err != nil {
			t.Fatal(err)
		}
		g.route(54, nil, "a:1")
		synctest.Wait()
		if n := g.up.open(); n != 0 {
			t.Errorf("%d flows outlive their port", n)
		}
		if p := g.server.Problems(); len(p) != 1 || p[0].Exposure != key("dns") {
			t.Errorf("problems: %v", p)
		}
		other.Close()
		time.Sleep(portRetry)
		synctest.Wait()
		if p := g.server.Problems(); len(p) != 0 {
			t.Errorf("problems: %v", p)
		}
		wantAnswer(g.t, askUDP(g.visitor("203.0.113.2", "198.51.100.1:54"), "x"), "a:1 x")
	})
}
