package netx

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// packets is a UDP socket read with recvmmsg(2).
type packets struct {
	raw       syscall.RawConn
	connected bool
	six       bool       // an AF_INET6 socket; IPv4 is mapped there
	bound     netip.Addr // the only local address; zero: any, and each datagram tells

	// Of the receiver. Kept here, so that receiving allocates nothing.
	batch *batch
	n     int
	errno syscall.Errno
	read  func(fd uintptr) bool
}

// socketBuffer is what a socket should hold of datagrams that were not read
// yet, bytes. The kernel may allow less, and takes memory only for what is there.
const socketBuffer = 2 << 20

func newPackets(c *net.UDPConn) (Packets, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &packets{raw: raw, connected: c.RemoteAddr() != nil}
	s.read = s.readOnce
	c.SetReadBuffer(socketBuffer) // a wish
	if a, ok := c.LocalAddr().(*net.UDPAddr); ok && !a.IP.IsUnspecified() {
		s.bound = a.AddrPort().Addr().Unmap()
	}
	var opt error
	err = raw.Control(func(fd uintptr) {
		family, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN)
		s.six = family == unix.AF_INET6
		switch {
		case err != nil:
			opt = err
		case s.bound.IsValid():
		case s.six:
			opt = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
		default:
			opt = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		}
	})
	if err == nil {
		err = os.NewSyscallError("setsockopt", opt)
	}
	return s, err
}

const (
	batchSize   = 32
	packetSize  = 64 << 10 // a datagram is never cut off
	controlSize = 64       // one IP_PKTINFO or IPV6_PKTINFO
)

type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// batch is memory for datagrams. Nearly all of it stays untouched, and so takes
// up addresses only; it is borrowed while datagrams are being read.
type batch struct {
	hdrs     [batchSize]mmsghdr
	iovs     [batchSize]unix.Iovec
	names    [batchSize]unix.RawSockaddrInet6
	controls [batchSize][controlSize]byte
	mem      []byte
}

var batches = sync.Pool{New: func() any {
	b := &batch{mem: make([]byte, batchSize*packetSize)}
	for i := range b.hdrs {
		b.iovs[i].Base = &b.mem[i*packetSize]
		b.iovs[i].SetLen(packetSize)
		h := &b.hdrs[i].hdr
		h.Iov = &b.iovs[i]
		h.SetIovlen(1)
		h.Name = (*byte)(unsafe.Pointer(&b.names[i]))
		h.Control = &b.controls[i][0]
		b.reset(i)
	}
	return b
}}

// reset makes message i ready to be received into.
func (b *batch) reset(i int) {
	h := &b.hdrs[i].hdr
	h.Namelen = unix.SizeofSockaddrInet6
	h.SetControllen(controlSize)
	h.Flags = 0
}

// Receive implements Packets. Nothing is held while it waits.
func (s *packets) Receive(f func(p []byte, peer netip.AddrPort, local netip.Addr)) error {
	if err := s.raw.Read(s.read); err != nil {
		return err
	}
	if s.errno != 0 {
		return os.NewSyscallError("recvmmsg", s.errno)
	}
	b := s.batch
	s.batch = nil
	for i := range s.n {
		h := &b.hdrs[i]
		f(b.mem[i*packetSize:][:h.n], peerOf(&b.names[i]), s.localOf(b.controls[i][:h.hdr.Controllen]))
		b.reset(i)
	}
	batches.Put(b)
	return nil
}

func (s *packets) readOnce(fd uintptr) bool {
	b := batches.Get().(*batch)
	var n uintptr
	errno := syscall.EINTR
	for errno == syscall.EINTR {
		n, _, errno = unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&b.hdrs[0])), batchSize, unix.MSG_DONTWAIT, 0, 0)
	}
	if errno != 0 {
		batches.Put(b)
		s.errno = errno
		return errno != syscall.EAGAIN
	}
	s.batch, s.n, s.errno = b, int(n), 0
	return true
}

func peerOf(name *unix.RawSockaddrInet6) netip.AddrPort {
	switch name.Family {
	case unix.AF_INET:
		four := (*unix.RawSockaddrInet4)(unsafe.Pointer(name))
		return netip.AddrPortFrom(netip.AddrFrom4(four.Addr), swap(four.Port))
	case unix.AF_INET6:
		a := netip.AddrFrom16(name.Addr).Unmap()
		if name.Scope_id != 0 {
			a = a.WithZone(strconv.FormatUint(uint64(name.Scope_id), 10))
		}
		return netip.AddrPortFrom(a, swap(name.Port))
	}
	return netip.AddrPort{}
}

// swap turns a port between the order of the network and of this machine.
func swap(port uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	return binary.BigEndian.Uint16(b[:])
}

// localOf returns where a datagram was sent to, from its control messages
// (RFC 3542 section 6; ip(7)).
func (s *packets) localOf(control []byte) netip.Addr {
	for !s.bound.IsValid() && len(control) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&control[0]))
		n := int(h.Len)
		if n < unix.SizeofCmsghdr || n > len(control) {
			break
		}
		data := control[unix.CmsgLen(0):n]
		switch {
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			a := netip.AddrFrom16([16]byte(data)).Unmap()
			if a.IsMulticast() {
				return netip.Addr{}
			}
			if a.IsLinkLocalUnicast() && a.Is6() {
				a = a.WithZone(strconv.FormatUint(uint64(binary.NativeEndian.Uint32(data[16:])), 10))
			}
			return a
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			return netip.AddrFrom4([4]byte(data[4:])) // ipi_spec_dst: ours, also for a broadcast
		}
		control = control[min(len(control), unix.CmsgSpace(n-unix.CmsgLen(0))):]
	}
	return s.bound
}

// sending is one call of sendmsg(2).
type sending struct {
	hdr     unix.Msghdr
	iov     unix.Iovec
	name    unix.RawSockaddrInet6
	control [controlSize]byte
	errno   syscall.Errno
	write   func(fd uintptr)
}

var sendings = sync.Pool{New: func() any {
	o := &sending{}
	o.hdr.Iov = &o.iov
	o.hdr.SetIovlen(1)
	o.write = func(fd uintptr) {
		_, _, o.errno = unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&o.hdr)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	}
	return o
}}

// Send implements Packets.
func (s *packets) Send(p []byte, peer netip.AddrPort, local netip.Addr) error {
	o := sendings.Get().(*sending)
	defer sendings.Put(o)
	o.iov.Base = unsafe.SliceData(p)
	o.iov.SetLen(len(p))
	o.hdr.Name, o.hdr.Namelen, o.hdr.Control = nil, 0, nil
	o.hdr.SetControllen(0)
	if !s.connected {
		s.address(o, peer)
		if local.IsValid() && !s.bound.IsValid() {
			s.source(o, local)
		}
	}
	err := s.raw.Control(o.write)
	o.iov.Base = nil
	switch {
	case err != nil:
		return err
	case o.errno == 0:
		return nil
	case o.errno == unix.EAGAIN || o.errno == unix.ENOBUFS || o.errno == unix.EINTR:
		return ErrNoRoom
	}
	return os.NewSyscallError("sendmsg", o.errno)
}

func zoneOf(a netip.Addr) uint32 {
	n, err := strconv.ParseUint(a.Zone(), 10, 32)
	if err != nil {
		return 0 // none
	}
	return uint32(n)
}

func (s *packets) address(o *sending, peer netip.AddrPort) {
	o.hdr.Name = (*byte)(unsafe.Pointer(&o.name))
	if !s.six {
		four := (*unix.RawSockaddrInet4)(unsafe.Pointer(&o.name))
		*four = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: swap(peer.Port())}
		if a := peer.Addr().Unmap(); a.Is4() {
			four.Addr = a.As4()
		}
		o.hdr.Namelen = unix.SizeofSockaddrInet4
		return
	}
	o.name = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: swap(peer.Port()), Addr: peer.Addr().As16(), Scope_id: zoneOf(peer.Addr())}
	o.hdr.Namelen = unix.SizeofSockaddrInet6
}

// source makes the datagram leave from local.
func (s *packets) source(o *sending, local netip.Addr) {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&o.control[0]))
	data := o.control[unix.CmsgLen(0):]
	n := unix.SizeofInet4Pktinfo
	if s.six {
		n = unix.SizeofInet6Pktinfo
		h.Level, h.Type = unix.IPPROTO_IPV6, unix.IPV6_PKTINFO
		a := local.As16()
		copy(data, a[:])
		binary.NativeEndian.PutUint32(data[16:], zoneOf(local))
	} else {
		h.Level, h.Type = unix.IPPROTO_IP, unix.IP_PKTINFO
		clear(data[:n])
		a := local.Unmap().As4()
		copy(data[4:], a[:])
	}
	h.SetLen(unix.CmsgLen(n))
	o.hdr.Control = &o.control[0]
	o.hdr.SetControllen(unix.CmsgSpace(n))
}
