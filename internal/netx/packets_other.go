//go:build !linux

package netx

import (
	"net"
	"net/netip"
)

// packets is the portable way: a datagram at a time, and the system chooses
// where replies leave from.
type packets struct {
	c         *net.UDPConn
	connected bool
	buf       []byte
}

func newPackets(c *net.UDPConn) (Packets, error) {
	return &packets{c: c, connected: c.RemoteAddr() != nil, buf: make([]byte, 64<<10)}, nil
}

func (s *packets) Receive(f func(p []byte, peer netip.AddrPort, local netip.Addr)) error {
	n, peer, err := s.c.ReadFromUDPAddrPort(s.buf)
	if err != nil {
		return err
	}
	f(s.buf[:n], unmapped(peer), netip.Addr{})
	return nil
}

func (s *packets) Send(p []byte, peer netip.AddrPort, _ netip.Addr) (err error) {
	if s.connected {
		_, err = s.c.Write(p)
	} else {
		_, err = s.c.WriteToUDPAddrPort(p, peer)
	}
	return err
}
