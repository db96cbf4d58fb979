package world

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/daemon"
	"webgw.dev/webgw/internal/netx/memnet"
	"webgw.dev/webgw/internal/tunnel"
)

func TestUDP(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		gent := w.Gateway("gent")
		echo := home.EchoUDP("127.0.0.1:5353")
		home.Echo(7)
		w.Apply("udp 20053 -> home1:5353 via gent")
		w.Apply("tcp 20053 -> home1:7 via gent") // another port

		a, b := w.DialUDP("gent", 20053), w.DialUDP("gent", 20053)
		for _, n := range []int{1, 500, 1200, 9000, 65507} {
			for name, v := range map[string]*UDPVisitor{"a": a, "b": b} {
				want := strings.Repeat(name, n)
				if got := v.Ask(want); got != want {
					t.Errorf("visitor %s: %d bytes of %d came back", name, len(got), n)
				}
			}
		}
		if n := echo.Peers(); n != 2 {
			t.Errorf("the workload sees %d peers, want one per visitor", n)
		}
		c, err := w.Dial("gent", 20053)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Echo(c, "tcp"); got != "tcp" || err != nil {
			t.Errorf("tcp beside it: %q, %v", got, err)
		}

		// Silence ends the flows on both sides, and the visitor notices nothing.
		if got := home.Metric("webgw_tunnel_node_flows"); got != 2 {
			t.Errorf("%v flows at the node", got)
		}
		time.Sleep(2 * time.Minute)
		if at, node := gent.Metric("webgw_tunnel_flows"), home.Metric("webgw_tunnel_node_flows"); at+node != 0 {
			t.Errorf("%v flows at the gateway and %v at the node after two minutes of silence", at, node)
		}
		if got := a.Ask("again"); got != "again" {
			t.Errorf("after silence: %q", got)
		}

		// Elsewhere, without the visitor doing anything; then nowhere.
		other := home.EchoUDP("127.0.0.1:5354")
		w.Apply("udp 20053 -> home1:5354 via gent")
		if got := a.Ask("moved"); got != "moved" || other.Got.Load() == 0 {
			t.Errorf("after a change: %q, %d datagrams at the new target", got, other.Got.Load())
		}
		w.Withdraw("udp 20053")
		b.c.Write([]byte("x")) // may be refused
		if got := b.Receive(5 * time.Second); got != "" {
			t.Errorf("withdrawn, and yet: %q", got)
		}
	})
}

func TestUDPOverALossyPath(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		gent := w.Gateway("gent")
		home.EchoUDP("127.0.0.1:5353")
		w.Apply("udp 20053 -> home1:5353 via gent")
		w.Net.SetLink(w.desk, gent.Host, memnet.Link{Latency: 10 * time.Millisecond, Loss: 0.1})
		w.Net.SetLink(home.Host, gent.Host, memnet.Link{Latency: 10 * time.Millisecond, Loss: 0.01})
		v := w.DialUDP("gent", 20053)
		const n = 1000
		for i := range n {
			v.Send(fmt.Sprint(i))
			time.Sleep(time.Millisecond)
		}
		came := map[string]bool{}
		for got := v.Receive(5 * time.Second); got != ""; got = v.Receive(5 * time.Second) {
			if came[got] {
				t.Errorf("%s came twice", got)
			}
			came[got] = true
		}
		// A tenth is lost each way on the visitor's path, and nothing in the tunnel.
		if lost := n - len(came); lost < 100 || lost > 300 {
			t.Errorf("%d of %d lost", lost, n)
		}
	})
}

func TestUDPComesBackAfterACut(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home, spare := w.Node("home1", BehindNAT), w.Node("home2", BehindNAT)
		w.Gateway("gent")
		echo := home.EchoUDP("127.0.0.1:5353")
		spare.EchoUDP("127.0.0.1:5353")
		w.Apply("udp 20053 -> home1:5353 via gent")
		w.Apply("udp 20054 -> home1:5353, home2:5353 via gent")
		one, two := w.DialUDP("gent", 20053), w.DialUDP("gent", 20054)
		if one.Ask("a") != "a" || two.Ask("a") != "a" {
			t.Fatal("no answer")
		}
		w.Cut("home1", "gent")
		time.Sleep(5 * time.Second)
		if got := one.Ask("b"); got != "" {
			t.Errorf("through a cut: %q", got)
		}
		if got := two.Ask("b"); got != "b" {
			t.Errorf("the other target did not take over: %q", got)
		}
		w.Repair("home1", "gent")
		time.Sleep(10 * time.Second)
		if got := one.Ask("c"); got != "c" {
			t.Errorf("after the cut: %q", got)
		}
		// A workload that is gone, and back.
		echo.Close()
		if got := one.Ask("d"); got != "" {
			t.Errorf("without a workload: %q", got)
		}
		home.EchoUDP("127.0.0.1:5353")
		if got := one.Ask("e"); got != "e" {
			t.Errorf("after its return: %q", got)
		}
	})
}

func TestUDPDirectTargets(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		gent := w.Gateway("gent", func(d *Daemon, c *daemon.GatewayConfig) {
			c.AllowDirect = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15")}
		})
		site := w.Node("site")
		site.EchoUDP(":5353")
		inner := gent.EchoUDP("127.0.0.1:9000")
		at := site.Host.Addrs()[0].String()
		w.Apply("udp 20053 -> direct " + at + ":5353 via gent")
		w.Apply("udp 20054 -> direct 127.0.0.1:9000 via gent")
		w.Apply("udp 20055 -> direct gent.test:20055 via gent") // itself
		if got := w.DialUDP("gent", 20053).Ask("open"); got != "open" {
			t.Errorf("got %q", got)
		}
		for _, port := range []int{20054, 20055} {
			if got := w.DialUDP("gent", port).Ask("closed"); got != "" {
				t.Errorf("port %d answered %q", port, got)
			}
		}
		if inner.Got.Load() != 0 {
			t.Error("the gateway's loopback was reached")
		}
	})
}

// askFlow opens a flow, sends on it, and returns why it ended: nil if it lives.
func (h *hostileGateway) askFlow(node *Daemon, key webgw.Key, target string) error {
	f, err := h.tunnel.OpenFlow(node.ID(), tunnel.Request{Exposure: key, Target: target}, func([]byte) {})
	if err != nil {
		return err
	}
	f.Send([]byte("knock"))
	time.Sleep(3 * time.Second)
	err = f.Ended()
	f.Close()
	return err
}

func TestAHostileGatewaySendsNoDatagramsIntoTheNode(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		dns, secret, same := home.EchoUDP("127.0.0.1:5353"), home.EchoUDP("127.0.0.1:53"), home.EchoUDP("127.0.0.1:7")
		tcp := home.Echo(5353)
		home.Echo(7)
		w.hostileGateway("gent")
		evil := w.hostileGateway("evil")
		w.Apply("udp 20053 -> home1:5353 via evil")
		w.Apply("udp 20054 -> home1:53 via gent")
		w.Apply("tcp 20007 -> home1:7 via evil")
		key, other, stream := w.Alice.ExposureKey("udp 20053"), w.Alice.ExposureKey("udp 20054"), w.Alice.ExposureKey("tcp 20007")
		if err := evil.askFlow(home, key, "127.0.0.1:5353"); err != nil {
			t.Fatalf("what is exposed: %v", err)
		}
		refused := func(err error, what string) {
			t.Helper()
			if webgw.KindOf(err) != webgw.Forbidden {
				t.Errorf("%s: %v, want forbidden", what, err)
			}
		}
		for _, target := range []string{"127.0.0.1:53", "[::1]:53", "localhost:5353", "169.254.169.254:53", "unix:/run/x", ""} {
			refused(evil.askFlow(home, key, target), target)
		}
		refused(evil.askFlow(home, other, "127.0.0.1:53"), "another gateway's exposure")
		refused(evil.askFlow(home, webgw.Key{}, "127.0.0.1:53"), "no exposure")
		refused(evil.askFlow(home, stream, "127.0.0.1:7"), "datagrams to what is exposed for TCP")
		refused(evil.ask(home, tunnel.Sealed, key, "127.0.0.1:5353"), "a stream to what is exposed for UDP")
		if secret.Got.Load()+same.Got.Load() != 0 || tcp.Accepted() != 0 || dns.Got.Load() != 1 {
			t.Errorf("reached: %d and %d datagrams, %d streams; %d datagrams to what is exposed", secret.Got.Load(), same.Got.Load(), tcp.Accepted(), dns.Got.Load())
		}
	})
}
