package netx_test

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"webgw.dev/webgw/internal/netx"
)

func packetsOf(t *testing.T, s netx.Socket, err error) netx.Packets {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	p, err := netx.NewPackets(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

type got struct {
	p     []byte
	peer  netip.AddrPort
	local netip.Addr
}

func receive(t *testing.T, p netx.Packets, n int) (all []got) {
	t.Helper()
	for len(all) < n {
		if err := p.Receive(func(p []byte, peer netip.AddrPort, local netip.Addr) {
			all = append(all, got{bytes.Clone(p), peer, local})
		}); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

func TestDatagramsAndTheirAddresses(t *testing.T) {
	both(t, func(t *testing.T, n netx.Net) {
		for _, at := range []struct{ network, listen, dial string }{
			{"udp", ":0", "127.0.0.1"}, {"udp4", "0.0.0.0:0", "127.0.0.1"}, {"udp", "127.0.0.1:0", "127.0.0.1"}, {"udp", ":0", "::1"}, {"udp6", "[::1]:0", "::1"},
		} {
			s, err := n.ListenPacket(t.Context(), at.network, at.listen)
			if err != nil && at.dial == "::1" && (errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT)) {
				t.Log("no IPv6 here:", err)
				continue
			}
			server := packetsOf(t, s, err)
			port := s.LocalAddr().(*net.UDPAddr).AddrPort().Port()
			ip := netip.MustParseAddr(at.dial)
			c, err := n.Dial(t.Context(), "udp", netip.AddrPortFrom(ip, port).String(), nil)
			client := packetsOf(t, c, err)
			for _, size := range []int{0, 1, 1200, 9000, 65507} {
				want := bytes.Repeat([]byte{'x'}, size)
				if err := client.Send(want, netip.AddrPort{}, netip.Addr{}); err != nil {
					t.Fatalf("%v: %d bytes: %v", at, size, err)
				}
				d := receive(t, server, 1)[0]
				if !bytes.Equal(d.p, want) || d.local != ip || d.peer.Addr() != ip {
					t.Fatalf("%v: %d bytes of %d from %v to %v", at, len(d.p), size, d.peer, d.local)
				}
				// A connected socket hears only what comes from where it sends to.
				if err := server.Send(d.p, d.peer, d.local); err != nil {
					t.Fatal(err)
				}
				if d := receive(t, client, 1)[0]; !bytes.Equal(d.p, want) {
					t.Fatalf("%v: %d bytes of %d came back", at, len(d.p), size)
				}
			}
			if err := server.Send(make([]byte, 65536), netip.AddrPortFrom(ip, 9), netip.Addr{}); err == nil {
				t.Error("a datagram of 65536 bytes was sent")
			}
			c.Close()
			s.Close()
			if err := server.Receive(nil); !errors.Is(err, net.ErrClosed) {
				t.Errorf("after close: %v", err)
			}
			if err := server.Send(nil, netip.AddrPortFrom(ip, 9), netip.Addr{}); !errors.Is(err, net.ErrClosed) {
				t.Errorf("after close: %v", err)
			}
		}
	})
}

func TestRepliesLeaveFromWhereTheVisitorSentTo(t *testing.T) {
	n := netx.Host{}
	for _, network := range []string{"udp", "udp4"} {
		s, err := n.ListenPacket(t.Context(), network, ":0")
		server := packetsOf(t, s, err)
		port := s.LocalAddr().(*net.UDPAddr).AddrPort().Port()
		for _, ip := range []string{"127.0.0.1", "127.0.0.2"} { // Linux answers on all of 127.0.0.0/8
			c, err := n.Dial(t.Context(), "udp", netip.AddrPortFrom(netip.MustParseAddr(ip), port).String(), nil)
			client := packetsOf(t, c, err)
			if err := client.Send([]byte("a"), netip.AddrPort{}, netip.Addr{}); err != nil {
				t.Fatal(err)
			}
			d := receive(t, server, 1)[0]
			if err := server.Send([]byte("b"), d.peer, d.local); err != nil {
				t.Fatal(err)
			}
			receive(t, client, 1)
			c.Close()
		}
	}
}

func TestNobodyListensForDatagrams(t *testing.T) {
	both(t, func(t *testing.T, n netx.Net) {
		s, err := n.ListenPacket(t.Context(), "udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		c, err := n.Dial(t.Context(), "udp", s.LocalAddr().String(), nil)
		client := packetsOf(t, c, err)
		if err := client.Send([]byte("a"), netip.AddrPort{}, netip.Addr{}); err != nil {
			t.Fatal(err)
		}
		if err := client.Receive(nil); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("got %v", err)
		}
		c.Close()
		judge := errors.New("judged")
		if _, err := n.Dial(t.Context(), "udp", "127.0.0.1:9", func(network, address string) error { return judge }); !errors.Is(err, judge) {
			t.Errorf("control was not asked: %v", err)
		}
	})
}

func TestReceivingAllocatesNothing(t *testing.T) {
	s, err := netx.Host{}.ListenPacket(t.Context(), "udp", "127.0.0.1:0")
	server := packetsOf(t, s, err)
	c, err := netx.Host{}.Dial(t.Context(), "udp", s.LocalAddr().String(), nil)
	client := packetsOf(t, c, err)
	p := make([]byte, 500)
	f := func([]byte, netip.AddrPort, netip.Addr) {}
	if n := testing.AllocsPerRun(200, func() {
		if client.Send(p, netip.AddrPort{}, netip.Addr{}) != nil || server.Receive(f) != nil {
			t.Fatal("failed")
		}
	}); n >= 1 && !raced {
		t.Errorf("%v allocations per datagram", n)
	}
}
