// Package gateway is the role of a machine with public addresses: it follows
// what owners have declared, turns that into the routing table of the ingress,
// and opens streams to nodes over their sessions, or to targets that it dials
// itself. It serves from its last good state when the registry is gone.
//
// It must not believe what the registry merely says, and it must not know how
// bytes are sniffed, spliced or framed.
package gateway

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// direct dials the targets that the gateway reaches itself: public addresses,
// and those that the farmer lists.
type direct struct {
	net   netx.Net
	allow []netip.Prefix
	bound func() []net.Addr      // where this gateway listens, as far as it knows the addresses
	owns  func(port uint16) bool // does it listen on the port, at any address?
}

func refusedTarget(err error) *webgw.Error {
	return &webgw.Error{Op: "dial target", Kind: webgw.Forbidden, Public: "the gateway does not dial the address that the target leads to",
		Hint: "direct targets must be public addresses; others go through a node", Err: err}
}

// dial connects to a direct target on network "tcp" or "udp".
func (d *direct) dial(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := d.net.Dial(ctx, network, address, d.control)
	if err == nil {
		// A wildcard listener does not tell the machine's addresses. Who
		// connects to an own address comes from that very address.
		if err = d.checkSelf(c); err == nil {
			return c, nil
		}
		netx.Reset(c)
	}
	if e, ok := errors.AsType[*webgw.Error](err); ok {
		return nil, e
	}
	public := "the target can't be reached"
	if errors.Is(err, syscall.ECONNREFUSED) {
		public = "nothing listens at the target's address"
	} else if errors.Is(err, context.DeadlineExceeded) {
		public = "the target did not answer in time"
	}
	return nil, &webgw.Error{Op: "dial target", Kind: webgw.Unavailable, Public: public, Err: err}
}

// control judges each resolved address just before it is connected to.
func (d *direct) control(_, address string) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return refusedTarget(err)
	}
	if err := netx.Judge(at.Addr(), d.allow, netx.Public); err != nil {
		return refusedTarget(err)
	}
	for _, own := range d.bound() {
		if o := addrPort(own); o.Port() == at.Port() && o.Addr().Unmap() == at.Addr().WithZone("").Unmap() {
			return refusedTarget(errors.New("it is the gateway itself"))
		}
	}
	return nil
}

// dialIssuer connects to the issuer of tokens that a policy names, which may be
// exposed at this very gateway. Else it is judged like a direct target.
func (d *direct) dialIssuer(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := d.net.Dial(ctx, network, address, func(_, address string) error {
		at, err := netip.ParseAddrPort(address)
		if err != nil {
			return err
		}
		return netx.Judge(at.Addr(), d.allow, netx.Public)
	})
	if err != nil {
		return nil, err
	}
	if remote := addrPort(c.RemoteAddr()); !d.owns(remote.Port()) {
		if err := d.checkSelf(c); err != nil {
			netx.Reset(c)
			return nil, err
		}
	}
	return c, nil
}

// checkSelf refuses a connection of the machine with itself, unless the farmer
// lists the address and the gateway is not who listens there.
func (d *direct) checkSelf(c net.Conn) error {
	local, remote := addrPort(c.LocalAddr()), addrPort(c.RemoteAddr())
	if local.Addr().Unmap() != remote.Addr().Unmap() {
		return nil
	}
	if d.owns(remote.Port()) {
		return refusedTarget(errors.New("it is the gateway itself"))
	}
	for _, p := range d.allow {
		if p.Contains(remote.Addr().Unmap()) {
			return nil
		}
	}
	return refusedTarget(errors.New("it is an address of the gateway's machine"))
}

func addrPort(a net.Addr) netip.AddrPort {
	switch t := a.(type) {
	case *net.TCPAddr:
		return t.AddrPort()
	case *net.UDPAddr:
		return t.AddrPort()
	}
	return netip.AddrPort{}
}

// directStream is a dialed target as the ingress wants it. It embeds the
// connection itself, so that a copy sees the descriptor.
type directStream struct {
	netx.CloseWriter
	moved *netx.Moved
}

// Join relays until both directions have ended, and closes the target.
func (s directStream) Join(visitor net.Conn, head []byte, done func(in, out int64, err error)) {
	err := s.moved.Join(visitor, s.CloseWriter, head)
	s.Close() // an error means that it was reset
	in, out := s.Progress()
	done(in, out, err)
}

// Cut ends a joined stream.
func (s directStream) Cut() { netx.Reset(s.CloseWriter) }

// Progress returns the bytes that have passed so far.
func (s directStream) Progress() (in, out int64) { return s.moved.AB.Load(), s.moved.BA.Load() }

// Quiet reports whether the target has neither ended the connection nor said
// anything that was not read.
func (s directStream) Quiet() bool { return netx.Alive(s.CloseWriter) }
