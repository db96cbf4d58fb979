//go:build linux

package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ingress"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/tunnel"
)

// BenchmarkUDPEcho sends datagrams to an echo and back, over loopback, by two
// hops: a gateway's ingress, the tunnel and a node; or two relays that do
// nothing but pass datagrams on. 8 visitors keep 16 datagrams each on the way.
// Everything, visitors and echo included, shares the process, so that CPU time
// is that of all together.
func BenchmarkUDPEcho(b *testing.B) {
	for _, size := range []int{200, 1200, 9000} {
		for _, way := range []struct {
			name string
			open func(b *testing.B, echo string) (public string, stop func())
		}{{"webgw", throughWebgw}, {"relay", throughRelays}, {"none", func(_ *testing.B, echo string) (string, func()) { return echo, func() {} }}} {
			b.Run(fmt.Sprintf("%s/%d", way.name, size), func(b *testing.B) {
				echo := listenUDP(b)
				defer echo.Close()
				go echoUDP(echo)
				public, stop := way.open(b, echo.LocalAddr().String())
				defer stop()
				visit(b, public, size)
			})
		}
	}
}

func listenUDP(b *testing.B) *net.UDPConn {
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	c.SetReadBuffer(2 << 20) // a wish
	return c
}

func echoUDP(c *net.UDPConn) {
	p := make([]byte, 64<<10)
	for {
		n, peer, err := c.ReadFromUDPAddrPort(p)
		if err != nil {
			return
		}
		c.WriteToUDPAddrPort(p[:n], peer) // lost is lost
	}
}

const (
	visitors = 8
	window   = 16
)

// visit makes b.N exchanges and reports what was lost.
func visit(b *testing.B, at string, size int) {
	var conns []net.Conn
	for range visitors {
		c, err := net.Dial("udp", at)
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		c.(*net.UDPConn).SetReadBuffer(2 << 20) // a wish
		p := make([]byte, size)
		for try := 0; ; try++ { // the way is opened beforehand
			if _, err := c.Write(p); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
				b.Fatal(err)
			}
			c.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := c.Read(make([]byte, 64<<10)); err == nil {
				break
			} else if try == 10 {
				b.Fatal(err)
			}
		}
		conns = append(conns, c)
	}
	var left, lost atomic.Int64
	left.Store(int64(b.N))
	before, start := cpuTime(b), time.Now()
	b.ResetTimer()
	var all sync.WaitGroup
	for _, c := range conns {
		all.Go(func() {
			p, in := make([]byte, size), make([]byte, 64<<10)
			under := 0
			send := func() {
				if left.Add(-1) >= 0 {
					under++
					c.Write(p) // lost is lost
				}
			}
			for range window {
				send()
			}
			for under > 0 {
				c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
				if _, err := c.Read(in); errors.Is(err, os.ErrDeadlineExceeded) {
					n := under
					lost.Add(int64(n))
					under = 0
					for range n {
						send()
					}
				} else if err == nil {
					under--
					send()
				}
			}
		})
	}
	all.Wait()
	b.StopTimer()
	b.ReportMetric(float64(int64(b.N)-lost.Load())/time.Since(start).Seconds(), "echo/s")
	b.ReportMetric((cpuTime(b)-before).Seconds()*1e6/float64(b.N), "cpu-µs/echo")
	b.ReportMetric(100*float64(lost.Load())/float64(b.N), "%lost")
}

func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// throughRelays chains two relays.
func throughRelays(b *testing.B, echo string) (string, func()) {
	inner, stopInner := relayUDP(b, echo)
	outer, stopOuter := relayUDP(b, inner)
	return outer, func() { stopOuter(); stopInner() }
}

// relayUDP passes datagrams on, by one socket per peer, the plain way.
func relayUDP(b *testing.B, to string) (string, func()) {
	l := listenUDP(b)
	var all sync.WaitGroup
	all.Go(func() {
		flows := map[netip.AddrPort]net.Conn{}
		defer func() {
			for _, c := range flows {
				c.Close()
			}
		}()
		p := make([]byte, 64<<10)
		for {
			n, peer, err := l.ReadFromUDPAddrPort(p)
			if err != nil {
				return
			}
			c := flows[peer]
			if c == nil {
				if c, err = net.Dial("udp", to); err != nil {
					return
				}
				c.(*net.UDPConn).SetReadBuffer(2 << 20)
				flows[peer] = c
				all.Go(func() {
					p := make([]byte, 64<<10)
					for {
						n, err := c.Read(p)
						if err != nil {
							return
						}
						l.WriteToUDPAddrPort(p[:n], peer) // lost is lost
					}
				})
			}
			c.Write(p[:n]) // lost is lost
		}
	})
	return l.LocalAddr().String(), func() { l.Close(); all.Wait() }
}

// sessionFlows opens flows through the sessions of a node.
type sessionFlows struct{ *tunnel.Server }

func (s sessionFlows) OpenFlow(_ context.Context, r *ingress.Route, t webgw.Target, from ingress.Origin, deliver func([]byte)) (ingress.Flow, error) {
	f, err := s.Server.OpenFlow(t.Node, tunnel.Request{Exposure: r.Key, Target: t.Address, Visitor: from.Visitor, Local: from.Local}, deliver)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// throughWebgw is the data path of a gateway and a node.
func throughWebgw(b *testing.B, echo string) (string, func()) {
	ctx, cancel := context.WithCancel(b.Context())
	var all sync.WaitGroup
	gateway := &tunnel.Server{Key: key(1), Log: slog.New(slog.DiscardHandler)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			all.Go(func() { attach(ctx, gateway, c) })
		}
	})
	up := make(chan struct{}, 1)
	node := &tunnel.Client{Key: key(2), Gateway: key(1).ID(), Net: netx.Host{}, Log: gateway.Log,
		Addresses: func() []string { return []string{l.Addr().String()} },
		Changed: func(s tunnel.State) {
			if s.Up {
				up <- struct{}{}
			}
		},
		ConnectFlow: func(ctx context.Context, _ webgw.ID, r tunnel.Request) (net.Conn, error) {
			return netx.Host{}.Dial(ctx, "udp", r.Target, nil)
		}}
	all.Go(func() { node.Run(ctx) })
	<-up
	free := listenUDP(b)
	port := free.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	free.Close()
	public := &ingress.Server{BindHost: "127.0.0.1", Flows: sessionFlows{gateway}}
	table, problems := ingress.Build([]ingress.Declared{{Key: webgw.Key{Kind: webgw.KindExposure, Owner: key(3).ID(), Name: "echo"},
		Exposure: &webgw.Exposure{Protocol: webgw.UDP, Port: port, Targets: []webgw.Target{{Node: key(2).ID(), Address: echo}}}}})
	if len(problems) > 0 {
		b.Fatal(problems)
	}
	public.SetTable(table)
	if err := public.Listen(ctx); err != nil {
		b.Fatal(err)
	}
	all.Go(func() { public.Run(ctx) })
	return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port).String(), func() {
		public.Shutdown(ctx)
		cancel()
		l.Close()
		gateway.Close()
		all.Wait()
	}
}
