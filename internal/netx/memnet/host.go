package memnet

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"webgw.dev/webgw/internal/netx"
)

// Host is one machine of a World; it implements netx.Net.
type Host struct {
	w    *World
	name string

	// Under World.mu.
	addrs     []netip.Addr
	nat       []netip.Addr // public addresses it is seen under; none: not behind NAT
	listeners map[*listener]struct{}
	packets   map[*PacketConn]struct{}
	dead      bool
}

var _ netx.Net = (*Host)(nil)

// backlog is how many connections wait for Accept; further ones try again
// after a second, as TCP does.
const backlog = 512

// Name returns the host's name.
func (h *Host) Name() string { return h.name }

// Addrs returns the host's own addresses.
func (h *Host) Addrs() []netip.Addr {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	return slices.Clone(h.addrs)
}

// BehindNAT hides the host: no other host can dial it any more, and others see
// its connections come from public, in the family that they arrive by; in a
// family that public lacks they come from its own address. It returns h.
func (h *Host) BehindNAT(public ...netip.Addr) *Host {
	if len(public) == 0 {
		panic("memnet: NAT needs a public address")
	}
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.nat = slices.Clone(public)
	return h
}

// Dial implements netx.Net. A connection takes one round trip. A name's
// addresses are tried in order, of networks tcp4 and tcp6 only those of that
// family; a deadline of ctx is shared among them, as package net does. Errors
// are *net.OpError around ECONNREFUSED (nobody listens there), ENETUNREACH (no
// address of that family here), ENETDOWN (this host is killed), the error of
// control or of ctx, or a *net.DNSError.
func (h *Host) Dial(ctx context.Context, network, address string, control netx.Control) (net.Conn, error) {
	switch network {
	case "unix":
		return h.dialUnix(ctx, address, control)
	case "udp", "udp4", "udp6":
		return h.dialUDP(network, address, control)
	}
	fail := func(addr net.Addr, err error) error {
		return &net.OpError{Op: "dial", Net: network, Addr: addr, Err: err}
	}
	dsts, err := h.resolve(network, address)
	if err != nil {
		return nil, fail(nil, err)
	}
	var first error
	for i, dst := range dsts {
		c, err := func() (*Conn, error) {
			ctx := ctx
			if deadline, ok := ctx.Deadline(); ok {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(len(dsts)-i))
				defer cancel()
			}
			if control != nil {
				if err := control(family(dst.Addr()), dst.String()); err != nil {
					return nil, err
				}
			}
			return h.connect(ctx, dst)
		}()
		if err == nil {
			return c, nil
		}
		if first == nil {
			first = fail(net.TCPAddrFromAddrPort(dst), err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, first
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "tcp4"
	}
	return "tcp6"
}

// resolve returns the addresses that a dial tries, in order.
func (h *Host) resolve(network, address string) ([]netip.AddrPort, error) {
	if network != "tcp" && network != "tcp4" && network != "tcp6" {
		return nil, net.UnknownNetworkError(network)
	}
	name, portText, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return nil, &net.AddrError{Err: "invalid port", Addr: address}
	}
	var addrs []netip.Addr
	if a, err := netip.ParseAddr(name); err == nil {
		addrs = []netip.Addr{a.Unmap()}
	} else if name == "" || foldName(name) == "localhost" {
		addrs = []netip.Addr{loopback4, netip.IPv6Loopback()}
	} else {
		addrs = h.w.lookup(foldName(name))
		if len(addrs) == 0 {
			return nil, &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
		}
	}
	var out []netip.AddrPort
	for _, a := range addrs {
		if a.IsUnspecified() { // as on Linux: this host
			if a.Is4() {
				a = loopback4
			} else {
				a = netip.IPv6Loopback()
			}
		}
		if network == "tcp" || network == family(a) {
			out = append(out, netip.AddrPortFrom(a, uint16(port)))
		}
	}
	if len(out) == 0 {
		return nil, &net.AddrError{Err: "no suitable address found", Addr: name}
	}
	return out, nil
}

var loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})

func (w *World) lookup(name string) []netip.Addr {
	w.mu.Lock()
	defer w.mu.Unlock()
	if addrs, ok := w.names[name]; ok {
		return addrs
	}
	for _, h := range w.hosts {
		if foldName(h.name) == name {
			return h.addrs
		}
	}
	return nil
}

// sourceLocked chooses the address that a connection to dst comes from, and
// the one under which dst sees it.
func (h *Host) sourceLocked(dst netip.Addr) (own, seen netip.Addr, ok bool) {
	if dst.IsLoopback() || slices.Contains(h.addrs, dst) {
		return dst, dst, true
	}
	same := func(a netip.Addr) bool { return a.Is4() == dst.Is4() }
	i := slices.IndexFunc(h.addrs, same)
	if i < 0 {
		return own, seen, false
	}
	own, seen = h.addrs[i], h.addrs[i]
	if i := slices.IndexFunc(h.nat, same); i >= 0 {
		seen = h.nat[i]
	}
	return own, seen, true
}

// connect does what SYN and SYN-ACK do for one address.
func (h *Host) connect(ctx context.Context, dst netip.AddrPort) (*Conn, error) {
	find := func() (*Host, *listener, error) {
		if _, _, ok := h.sourceLocked(dst.Addr()); !ok {
			return nil, nil, os.NewSyscallError("connect", syscall.ENETUNREACH)
		}
		target := h
		if !dst.Addr().IsLoopback() && !slices.Contains(h.addrs, dst.Addr()) {
			if target = h.w.atLocked(dst.Addr()); target == nil {
				return nil, nil, os.NewSyscallError("connect", syscall.ECONNREFUSED)
			}
		}
		return target, target.listenerLocked(dst), nil
	}
	ends := func() (local, seen net.Addr) {
		own, seenAs, _ := h.sourceLocked(dst.Addr())
		port := h.w.portLocked(seenAs)
		return tcpAddr(own, port), tcpAddr(seenAs, port)
	}
	return h.handshake(ctx, find, ends, tcpAddr(dst.Addr(), dst.Port()))
}

func tcpAddr(a netip.Addr, port uint16) net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, port))
}

func (h *Host) dialUnix(ctx context.Context, path string, control netx.Control) (net.Conn, error) {
	addr := &net.UnixAddr{Name: path, Net: "unix"}
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "unix", Addr: addr, Err: err}
	}
	if control != nil {
		if err := control("unix", path); err != nil {
			return fail(err)
		}
	}
	find := func() (*Host, *listener, error) {
		for l := range h.listeners {
			if u, ok := l.addr.(*net.UnixAddr); ok && u.Name == path {
				return h, l, nil
			}
		}
		return nil, nil, os.NewSyscallError("connect", syscall.ENOENT)
	}
	ends := func() (local, seen net.Addr) {
		a := &net.UnixAddr{Net: "unix"}
		return a, a
	}
	c, err := h.handshake(ctx, find, ends, addr)
	if err != nil {
		return fail(err)
	}
	return c, nil
}

// handshake waits until the link carries a round trip and the listener takes
// the connection. find and ends are called under World.mu.
func (h *Host) handshake(ctx context.Context, find func() (*Host, *listener, error), ends func() (local, seen net.Addr), remote net.Addr) (*Conn, error) {
	w := h.w
	for answered := false; ; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		var wait time.Duration
		var repaired <-chan struct{}
		w.mu.Lock()
		c, link, err := h.openLocked(answered, find, ends, remote)
		if c == nil && err == nil {
			switch {
			case link.cut:
				answered, repaired = false, link.changed
			case answered: // full backlog: the SYN is sent again
				wait = time.Second
			default:
				answered, wait = true, 2*link.props.Load().Latency+w.stallLocked(link)
			}
		}
		w.mu.Unlock()
		if c != nil || err != nil {
			return c, err
		}
		if wait == 0 && repaired == nil {
			continue
		}
		t := time.NewTimer(wait)
		fires := t.C
		if repaired != nil {
			fires = nil
		}
		select {
		case <-fires:
		case <-repaired:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// openLocked makes the connection if it can be made now; with no connection
// and no error the caller must wait for the link or the backlog. Only an
// answered SYN tells whether anybody listens.
func (h *Host) openLocked(answered bool, find func() (*Host, *listener, error), ends func() (local, seen net.Addr), remote net.Addr) (*Conn, *link, error) {
	if h.dead {
		return nil, nil, os.NewSyscallError("connect", syscall.ENETDOWN)
	}
	target, l, err := find()
	if err != nil {
		return nil, nil, err
	}
	link := h.w.linkLocked(h, target)
	if link.cut || !answered {
		return nil, link, nil
	}
	if l == nil {
		return nil, nil, os.NewSyscallError("connect", syscall.ECONNREFUSED)
	}
	if len(l.queue) >= backlog {
		return nil, link, nil
	}
	local, seen := ends()
	near, far := h.w.newWireLocked(link)
	near.host, near.local, near.remote = h, local, remote
	far.host, far.local, far.remote = target, remote, seen
	l.queue = append(l.queue, far)
	l.arrived.Signal()
	return near, link, nil
}

// stallLocked is what loss costs a handshake.
func (w *World) stallLocked(l *link) time.Duration {
	p := *l.props.Load()
	if p.Loss == 0 {
		return 0
	}
	w.wires++
	return p.delay(rand.New(rand.NewPCG(w.seed, w.wires))) - p.Latency
}

// Listen implements netx.Net. Port 0 chooses a free one; an empty host, or an
// unspecified address, means every address of the host and its loopback.
func (h *Host) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	fail := func(err error) (net.Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	if h.dead {
		return fail(os.NewSyscallError("bind", syscall.ENETDOWN))
	}
	l := &listener{host: h, network: network}
	l.arrived.L = &h.w.mu
	if network == "unix" {
		l.addr = &net.UnixAddr{Name: address, Net: "unix"}
	} else {
		at, err := h.bindLocked(network, address)
		if err != nil {
			return fail(err)
		}
		l.at, l.addr = at, net.TCPAddrFromAddrPort(at)
	}
	for o := range h.listeners {
		if l.conflicts(o) {
			return fail(os.NewSyscallError("bind", syscall.EADDRINUSE))
		}
	}
	h.listeners[l] = struct{}{}
	return l, nil
}

// bindLocked finds the address and port to listen on.
func (h *Host) bindLocked(network, address string) (netip.AddrPort, error) {
	var none netip.AddrPort
	if network != "tcp" && network != "tcp4" && network != "tcp6" {
		return none, net.UnknownNetworkError(network)
	}
	name, portText, err := net.SplitHostPort(address)
	if err != nil {
		return none, err
	}
	port64, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return none, &net.AddrError{Err: "invalid port", Addr: address}
	}
	addr, err := netip.ParseAddr(name)
	switch {
	case err == nil:
		addr = addr.Unmap()
	case name == "" && network == "tcp4":
		addr = netip.IPv4Unspecified()
	case name == "":
		addr = netip.IPv6Unspecified()
	case foldName(name) == "localhost" && network == "tcp6":
		addr = netip.IPv6Loopback()
	case foldName(name) == "localhost":
		addr = loopback4
	case foldName(name) == foldName(h.name):
		i := slices.IndexFunc(h.addrs, func(a netip.Addr) bool { return network == "tcp" || network == family(a) })
		if i < 0 {
			return none, &net.AddrError{Err: "no suitable address found", Addr: name}
		}
		addr = h.addrs[i]
	default:
		return none, &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
	}
	if network != "tcp" && network != family(addr) {
		return none, &net.AddrError{Err: "no suitable address found", Addr: name}
	}
	if !addr.IsUnspecified() && !addr.IsLoopback() && !slices.Contains(h.addrs, addr) {
		return none, os.NewSyscallError("bind", syscall.EADDRNOTAVAIL)
	}
	port := uint16(port64)
	for port == 0 {
		port = h.w.portLocked(addr)
		for o := range h.listeners {
			if o.at.Port() == port {
				port = 0
				break
			}
		}
	}
	return netip.AddrPortFrom(addr, port), nil
}

// listenerLocked returns who takes a connection to dst on this host, or nil:
// the exact address goes before the wildcard.
func (h *Host) listenerLocked(dst netip.AddrPort) *listener {
	var wild *listener
	for l := range h.listeners {
		if l.at == dst {
			return l
		}
		if l.at.Port() == dst.Port() && l.covers(dst.Addr()) {
			wild = l
		}
	}
	return wild
}

// listener implements net.Listener.
type listener struct {
	host    *Host
	network string
	addr    net.Addr
	at      netip.AddrPort // zero: a unix socket

	// Under World.mu.
	arrived sync.Cond
	queue   []*Conn
	closed  bool
}

// covers reports whether l, as a wildcard, answers at a. A listener on [::]
// takes IPv4 too, unless its network is tcp6.
func (l *listener) covers(a netip.Addr) bool {
	return l.at.IsValid() && l.at.Addr().IsUnspecified() &&
		(l.at.Addr().Is4() == a.Is4() || a.Is4() && l.network == "tcp")
}

func (l *listener) conflicts(o *listener) bool {
	if !l.at.IsValid() || !o.at.IsValid() {
		lu, ok1 := l.addr.(*net.UnixAddr)
		ou, ok2 := o.addr.(*net.UnixAddr)
		return ok1 && ok2 && lu.Name == ou.Name
	}
	return l.at.Port() == o.at.Port() && (l.at.Addr() == o.at.Addr() || l.covers(o.at.Addr()) || o.covers(l.at.Addr()))
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	l.host.w.mu.Lock()
	defer l.host.w.mu.Unlock()
	for len(l.queue) == 0 && !l.closed {
		l.arrived.Wait()
	}
	if l.closed {
		return nil, &net.OpError{Op: "accept", Net: l.addr.Network(), Addr: l.addr, Err: net.ErrClosed}
	}
	c := l.queue[0]
	l.queue[0] = nil
	l.queue = l.queue[1:]
	return c, nil
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return l.addr }

// Close implements net.Listener. Connections that nobody accepted are reset.
func (l *listener) Close() error {
	l.host.w.mu.Lock()
	defer l.host.w.mu.Unlock()
	if l.closed {
		return &net.OpError{Op: "close", Net: l.addr.Network(), Addr: l.addr, Err: net.ErrClosed}
	}
	l.closeLocked()
	return nil
}

func (l *listener) closeLocked() {
	l.closed = true
	delete(l.host.listeners, l)
	for _, c := range l.queue {
		c.abortUnaccepted()
	}
	l.queue = nil
	l.arrived.Broadcast()
}
