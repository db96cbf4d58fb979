package netx

import (
	"errors"
	"net"
	"net/netip"
)

// Packets receives and sends datagrams on a UDP socket.
type Packets interface {
	// Receive waits until datagrams have come and hands those that are there to
	// f, one by one: the payload, which is valid until f returns, who sent it, and
	// the local address that it was sent to (zero where that can't be told). One
	// goroutine may receive. It returns an error after the socket was closed, and
	// on a connected socket ECONNREFUSED when nobody listens at the peer.
	Receive(f func(p []byte, peer netip.AddrPort, local netip.Addr)) error

	// Send sends p to peer, from local unless that is zero. On a connected socket
	// both are ignored. It never waits: what the socket has no room for is
	// dropped, with ErrNoRoom. Any number of goroutines may send.
	Send(p []byte, peer netip.AddrPort, local netip.Addr) error
}

// ErrNoRoom tells that a datagram was dropped because the socket's buffer is full.
var ErrNoRoom = errors.New("netx: no room for a datagram")

// Socket is what ListenPacket returns, or Dial on network "udp".
type Socket interface {
	LocalAddr() net.Addr
	Close() error
}

// NewPackets takes over a UDP socket; closing it stays the caller's.
func NewPackets(s Socket) (Packets, error) {
	switch c := s.(type) {
	case Packets:
		return c, nil
	case *net.UDPConn:
		return newPackets(c)
	}
	return nil, errors.New("netx: not a UDP socket")
}

// unmapped is a with IPv4 never written as IPv6.
func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
