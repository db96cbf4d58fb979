package world

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw/internal/netx"
)

// UDPWorkload is a server of datagrams on a daemon's host.
type UDPWorkload struct {
	At    string
	Got   atomic.Int64 // datagrams
	peers sync.Map
	conn  net.PacketConn
	over  sync.WaitGroup
}

// Peers returns how many different sockets have sent to it: one per flow.
func (u *UDPWorkload) Peers() (n int) {
	u.peers.Range(func(any, any) bool { n++; return true })
	return n
}

// Close ends it.
func (u *UDPWorkload) Close() {
	u.conn.Close()
	u.over.Wait()
}

// EchoUDP sends back the datagrams it gets.
func (d *Daemon) EchoUDP(at string) *UDPWorkload {
	d.w.T.Helper()
	conn, err := d.Host.ListenPacket(d.w.T.Context(), "udp", at)
	if err != nil {
		d.w.T.Fatal(err)
	}
	packets, err := netx.NewPackets(conn)
	if err != nil {
		d.w.T.Fatal(err)
	}
	u := &UDPWorkload{At: at, conn: conn}
	u.over.Go(func() {
		for packets.Receive(func(p []byte, peer netip.AddrPort, local netip.Addr) {
			u.Got.Add(1)
			u.peers.Store(peer, true)
			packets.Send(p, peer, local)
		}) == nil {
		}
	})
	d.w.T.Cleanup(u.Close)
	return u
}

// UDPVisitor is a visitor's socket, connected to a port of a gateway.
type UDPVisitor struct {
	w *World
	c net.Conn
}

// DialUDP makes a visitor of a UDP port of a gateway.
func (w *World) DialUDP(gateway string, port int) *UDPVisitor {
	w.T.Helper()
	ctx, cancel := context.WithTimeout(w.T.Context(), patience)
	defer cancel()
	c, err := w.desk.Dial(ctx, "udp", w.Daemon(gateway).Address(port), nil)
	if err != nil {
		w.T.Fatal(err)
	}
	w.T.Cleanup(func() { c.Close() })
	return &UDPVisitor{w, c}
}

// Send sends a datagram.
func (v *UDPVisitor) Send(what string) {
	v.w.T.Helper()
	if _, err := v.c.Write([]byte(what)); err != nil {
		v.w.T.Fatal(err)
	}
}

// Receive returns the next datagram that comes within a time, or "".
func (v *UDPVisitor) Receive(within time.Duration) string {
	v.w.T.Helper()
	if err := v.c.SetReadDeadline(time.Now().Add(within)); err != nil {
		v.w.T.Fatal(err)
	}
	b := make([]byte, 64<<10)
	n, err := v.c.Read(b)
	if err != nil {
		return ""
	}
	return string(b[:n])
}

// Ask sends a datagram, again each second for some seconds, until one comes
// back, which it returns.
func (v *UDPVisitor) Ask(what string) string {
	v.w.T.Helper()
	for range 5 {
		v.Send(what)
		if got := v.Receive(time.Second); got != "" {
			return got
		}
	}
	return ""
}
