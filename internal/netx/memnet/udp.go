package memnet

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"webgw.dev/webgw/internal/netx"
)

// A UDP socket holds so much that was not read; more is dropped.
const (
	maxPackets     = 4096
	maxPacketBytes = 4 << 20
	maxPacket      = 65507 // payload over IPv4
)

// PacketConn is a UDP socket of a Host, connected or not. Datagrams take the
// latency of their link, may be lost as its Loss says, and are lost while it is
// cut.
type PacketConn struct {
	host    *Host
	network string
	at      netip.AddrPort // own address
	seen    netip.AddrPort // what others see it as; differs behind NAT
	remote  netip.AddrPort // of a connected socket

	// Under World.mu.
	arrived sync.Cond
	queue   []packet
	held    int // bytes in queue
	closed  bool
	refused bool // a connected socket's peer does not listen
	before  deadline
}

type packet struct {
	peer  netip.AddrPort
	local netip.Addr
	data  []byte
}

var (
	_ net.PacketConn = (*PacketConn)(nil)
	_ net.Conn       = (*PacketConn)(nil)
	_ netx.Packets   = (*PacketConn)(nil)
)

// ListenPacket implements netx.Net.
func (h *Host) ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error) {
	fail := func(err error) (net.PacketConn, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	if !strings.HasPrefix(network, "udp") {
		return fail(net.UnknownNetworkError(network))
	}
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	at, err := h.bindLocked("tcp"+network[3:], address)
	for err == nil && strings.HasSuffix(address, ":0") && h.hasPacketsLocked(at.Port()) {
		at, err = h.bindLocked("tcp"+network[3:], address)
	}
	if err != nil {
		return fail(err)
	}
	c := h.newPacketConnLocked(network, at)
	for o := range h.packets {
		if o.at.Port() == at.Port() && (o.at.Addr() == at.Addr() || o.covers(at.Addr()) || c.covers(o.at.Addr())) {
			return fail(os.NewSyscallError("bind", syscall.EADDRINUSE))
		}
	}
	if h.dead {
		return fail(os.NewSyscallError("bind", syscall.ENETDOWN))
	}
	h.packets[c] = struct{}{}
	return c, nil
}

func (h *Host) newPacketConnLocked(network string, at netip.AddrPort) *PacketConn {
	c := &PacketConn{host: h, network: network, at: at, seen: at}
	c.arrived.L = &h.w.mu
	return c
}

// dialUDP makes a connected socket. Nothing is sent, so only what this host
// knows by itself can fail.
func (h *Host) dialUDP(network, address string, control netx.Control) (net.Conn, error) {
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err}
	}
	dsts, err := h.resolve("tcp"+network[3:], address)
	if err != nil {
		return fail(err)
	}
	var first error
	for _, dst := range dsts {
		if control != nil {
			err = control("udp"+family(dst.Addr())[3:], dst.String())
		}
		if err == nil {
			var c *PacketConn
			if c, err = h.connectUDP(network, dst); err == nil {
				return c, nil
			}
		}
		if first == nil {
			first = err
		}
		err = nil
	}
	return fail(first)
}

func (h *Host) connectUDP(network string, dst netip.AddrPort) (*PacketConn, error) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	own, seen, ok := h.sourceLocked(dst.Addr())
	switch {
	case h.dead:
		return nil, os.NewSyscallError("connect", syscall.ENETDOWN)
	case !ok:
		return nil, os.NewSyscallError("connect", syscall.ENETUNREACH)
	}
	port := h.w.portLocked(seen)
	for h.hasPacketsLocked(port) {
		port = h.w.portLocked(seen)
	}
	c := h.newPacketConnLocked(network, netip.AddrPortFrom(own, port))
	c.seen, c.remote = netip.AddrPortFrom(seen, port), dst
	h.packets[c] = struct{}{}
	return c, nil
}

func (h *Host) hasPacketsLocked(port uint16) bool {
	for o := range h.packets {
		if o.at.Port() == port {
			return true
		}
	}
	return false
}

func (c *PacketConn) covers(a netip.Addr) bool {
	return c.at.Addr().IsUnspecified() && (c.at.Addr().Is4() == a.Is4() || a.Is4() && c.network == "udp")
}

// socketLocked returns who takes a datagram from peer to dst.
func (h *Host) socketLocked(dst, peer netip.AddrPort) (best *PacketConn) {
	rank := 0
	for c := range h.packets {
		n := 0
		switch {
		case c.remote.IsValid():
			if c.remote == peer && (c.at == dst || c.seen == dst) {
				n = 3
			}
		case c.at == dst:
			n = 2
		case c.at.Port() == dst.Port() && c.covers(dst.Addr()):
			n = 1
		}
		if n > rank {
			best, rank = c, n
		}
	}
	return best
}

// routeLocked returns the host that has an address, as from sees it, also one
// behind NAT that has a socket there.
func (c *PacketConn) routeLocked(dst, peer netip.AddrPort) (*Host, *PacketConn) {
	h := c.host
	if dst.Addr().IsLoopback() || slices.Contains(h.addrs, dst.Addr()) {
		return h, h.socketLocked(dst, peer)
	}
	if to := h.w.atLocked(dst.Addr()); to != nil {
		return to, to.socketLocked(dst, peer)
	}
	for _, to := range h.w.hosts {
		for s := range to.packets {
			if s.seen == dst && s.remote == peer {
				return to, s
			}
		}
	}
	return nil, nil
}

// Send implements netx.Packets.
func (c *PacketConn) Send(p []byte, peer netip.AddrPort, local netip.Addr) error {
	fail := func(err error) error { return &net.OpError{Op: "write", Net: c.network, Err: err} }
	w := c.host.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if c.remote.IsValid() {
		peer = c.remote
	}
	peer = netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())
	switch {
	case c.closed:
		return fail(net.ErrClosed)
	case len(p) > maxPacket:
		return fail(os.NewSyscallError("sendmsg", syscall.EMSGSIZE))
	case c.refused:
		c.refused = false
		return fail(os.NewSyscallError("sendmsg", syscall.ECONNREFUSED))
	}
	from := c.seen
	if from.Addr().IsUnspecified() {
		own, seen, ok := c.host.sourceLocked(peer.Addr())
		if !ok {
			return fail(os.NewSyscallError("sendmsg", syscall.ENETUNREACH))
		}
		if local.IsValid() && local.Unmap() != own {
			if seen = local.Unmap(); !slices.Contains(c.host.addrs, seen) && !seen.IsLoopback() {
				return fail(os.NewSyscallError("sendmsg", syscall.EINVAL))
			}
		}
		from = netip.AddrPortFrom(seen, from.Port())
	}
	to, s := c.routeLocked(peer, from)
	if to == nil {
		return nil // lost on the way
	}
	l := w.linkLocked(c.host, to)
	props := *l.props.Load()
	w.wires++
	if l.cut || props.Loss > 0 && rand.New(rand.NewPCG(w.seed, w.wires)).Float64() < props.Loss {
		return nil
	}
	if s == nil {
		if c.remote.IsValid() { // ICMP port unreachable
			c.later(2*props.Latency, func() { c.refused = true; c.arrived.Broadcast() })
		}
		return nil
	}
	d := packet{peer: from, local: peer.Addr(), data: slices.Clone(p)}
	c.later(props.Latency, func() { s.receiveLocked(d) })
	return nil
}

// later runs f under World.mu, which is held, after a while.
func (c *PacketConn) later(wait time.Duration, f func()) {
	if wait == 0 {
		f()
		return
	}
	time.AfterFunc(wait, func() {
		c.host.w.mu.Lock()
		defer c.host.w.mu.Unlock()
		f()
	})
}

func (c *PacketConn) receiveLocked(d packet) {
	if c.closed || len(c.queue) >= maxPackets || c.held+len(d.data) > maxPacketBytes {
		return
	}
	c.queue = append(c.queue, d)
	c.held += len(d.data)
	c.arrived.Broadcast()
}

// next waits for a datagram.
func (c *PacketConn) next() (packet, error) {
	fail := func(err error) (packet, error) {
		return packet{}, &net.OpError{Op: "read", Net: c.network, Err: err}
	}
	c.host.w.mu.Lock()
	defer c.host.w.mu.Unlock()
	for {
		switch {
		case c.closed:
			return fail(net.ErrClosed)
		case c.before.passed:
			return fail(os.ErrDeadlineExceeded)
		case c.refused:
			c.refused = false
			return fail(os.NewSyscallError("recvmmsg", syscall.ECONNREFUSED))
		case len(c.queue) > 0:
			d := c.queue[0]
			c.queue = slices.Delete(c.queue, 0, 1)
			c.held -= len(d.data)
			return d, nil
		}
		c.arrived.Wait()
	}
}

// Receive implements netx.Packets.
func (c *PacketConn) Receive(f func(p []byte, peer netip.AddrPort, local netip.Addr)) error {
	d, err := c.next()
	if err == nil {
		f(d.data, d.peer, d.local)
	}
	return err
}

// ReadFrom implements net.PacketConn.
func (c *PacketConn) ReadFrom(p []byte) (int, net.Addr, error) {
	d, err := c.next()
	if err != nil {
		return 0, nil, err
	}
	return copy(p, d.data), net.UDPAddrFromAddrPort(d.peer), nil
}

// WriteTo implements net.PacketConn.
func (c *PacketConn) WriteTo(p []byte, to net.Addr) (int, error) {
	u, ok := to.(*net.UDPAddr)
	if !ok {
		return 0, &net.AddrError{Err: "not a UDP address", Addr: to.String()}
	}
	if err := c.Send(p, u.AddrPort(), netip.Addr{}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Read implements net.Conn.
func (c *PacketConn) Read(p []byte) (int, error) {
	n, _, err := c.ReadFrom(p)
	return n, err
}

// Write implements net.Conn.
func (c *PacketConn) Write(p []byte) (int, error) {
	if err := c.Send(p, netip.AddrPort{}, netip.Addr{}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close closes the socket; what it holds is lost.
func (c *PacketConn) Close() error {
	c.host.w.mu.Lock()
	defer c.host.w.mu.Unlock()
	if c.closed {
		return &net.OpError{Op: "close", Net: c.network, Err: net.ErrClosed}
	}
	c.closeLocked()
	return nil
}

func (c *PacketConn) closeLocked() {
	c.closed = true
	c.queue = nil
	c.before.stop()
	delete(c.host.packets, c)
	c.arrived.Broadcast()
}

// LocalAddr is the socket's own address.
func (c *PacketConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(c.at) }

// RemoteAddr is whom a connected socket talks with; else nil.
func (c *PacketConn) RemoteAddr() net.Addr {
	if !c.remote.IsValid() {
		return nil
	}
	return net.UDPAddrFromAddrPort(c.remote)
}

// SetDeadline implements net.Conn; writes never wait.
func (c *PacketConn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn; writes never wait.
func (c *PacketConn) SetWriteDeadline(time.Time) error { return nil }

// SetReadDeadline implements net.Conn.
func (c *PacketConn) SetReadDeadline(t time.Time) error {
	mu := &c.host.w.mu
	mu.Lock()
	defer mu.Unlock()
	if c.closed {
		return &net.OpError{Op: "set", Net: c.network, Err: net.ErrClosed}
	}
	c.before.set(t, mu, &c.arrived)
	return nil
}

// set arms the deadline; mu, which is held, guards it, and moved is told.
func (d *deadline) set(t time.Time, mu *sync.Mutex, moved *sync.Cond) {
	d.stop()
	wait := time.Until(t)
	d.passed = !t.IsZero() && wait <= 0
	if !t.IsZero() && !d.passed {
		var timer *time.Timer
		timer = time.AfterFunc(wait, func() {
			mu.Lock()
			defer mu.Unlock()
			if d.timer == timer { // else it was changed meanwhile
				d.passed = true
				moved.Broadcast()
			}
		})
		d.timer = timer
	}
	moved.Broadcast()
}
