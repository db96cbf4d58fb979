//go:build linux

package e2e

import (
	endian "encoding/binary"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"
)

// udpEcho is a server on the loopback that sends back what it gets.
func udpEcho(t *testing.T) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	c.SetReadBuffer(4 << 20) // a wish
	var over sync.WaitGroup
	over.Go(func() {
		b := make([]byte, 64<<10)
		for {
			n, peer, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			c.WriteToUDPAddrPort(b[:n], peer)
		}
	})
	t.Cleanup(func() { c.Close(); over.Wait() })
	return c
}

// Datagrams of the usual sizes pass the real processes and sockets at a modest
// rate, and none is lost.
func TestUDPIsNotLost(t *testing.T) {
	g := startGateway(t)
	g.startNode()
	echo := udpEcho(t)
	g.expose("echo", fmt.Sprintf("protocol: udp\nport: %d", g.firstPort), echo.LocalAddr().String())
	visitors := make([]*net.UDPConn, 3)
	for i := range visitors {
		c, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: g.firstPort})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		visitors[i] = c
		g.wait("the exposure", func() error { return exchange(c, make([]byte, 100), time.Second) })
	}
	for _, size := range []int{500, 1200, 9000} {
		var all sync.WaitGroup
		for _, c := range visitors {
			all.Go(func() {
				const n, every = 500, 2 * time.Millisecond // 500 a second for each visitor
				came := make([]bool, n)
				left := n
				var reader sync.WaitGroup
				reader.Go(func() {
					b := make([]byte, 64<<10)
					for left > 0 {
						c.SetReadDeadline(time.Now().Add(3 * time.Second))
						m, err := c.Read(b)
						if err != nil {
							return
						}
						i := int(endian.BigEndian.Uint64(b))
						if m != size || i < 0 || i >= n || came[i] {
							t.Errorf("a datagram of %d bytes with number %d", m, i)
							return
						}
						came[i] = true
						left--
					}
				})
				p := make([]byte, size)
				pace := time.NewTicker(every)
				defer pace.Stop()
				for i := range n {
					endian.BigEndian.PutUint64(p, uint64(i))
					if _, err := c.Write(p); err != nil {
						t.Error(err)
						break
					}
					<-pace.C
				}
				reader.Wait()
				if left > 0 {
					t.Errorf("%d of %d datagrams of %d bytes were lost", left, n, size)
				}
			})
		}
		all.Wait()
	}
}

// exchange sends p and waits for its echo.
func exchange(c *net.UDPConn, p []byte, within time.Duration) error {
	if _, err := c.Write(p); err != nil {
		return err
	}
	if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	n, err := c.Read(make([]byte, 64<<10))
	if err == nil && n != len(p) {
		err = fmt.Errorf("%d bytes of %d came back", n, len(p))
	}
	return err
}
