package netx

import (
	"math"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Alive reports whether an idle connection is still open as far as this
// machine knows: the peer has neither ended it nor sent anything. Connections
// without a descriptor count as alive.
func Alive(c net.Conn) bool {
	if a, ok := c.(interface{ Alive() bool }); ok { // memnet's
		return a.Alive()
	}
	sc, ok := c.(syscall.Conn)
	if !ok {
		return true
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	alive := false
	err = raw.Control(func(fd uintptr) {
		var b [1]byte
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		alive = err == unix.EAGAIN
	})
	return alive && err == nil
}

// silence is how long a peer may leave keep-alive probes unanswered before an
// idle connection counts as lost. TCP_USER_TIMEOUT is not used: it also ends a
// connection whose receiver is merely slow (its window stays at zero).
const silence = 15 * time.Second

// Probe makes the machine ask the peer of c within a second whether it is still
// there, and again each second that passes in silence: told by who has reason
// to doubt the path. An idle connection is ended after three of them.
func Probe(c net.Conn) {
	switch c := c.(type) {
	case interface{ Probe() }:
		c.Probe()
	case *net.TCPConn:
		c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 2}) // an error means that c is closed
	}
}

// Unheard is how long nothing at all has come from the peer of c while it was
// asked in vain: what was sent has been sent again after three time-outs, or
// probes of an idle connection or a closed window stay unanswered. 0: nothing
// is waited for, or it isn't known. A peer that is merely slow answers.
func Unheard(c net.Conn) (silent time.Duration) {
	if u, ok := c.(interface{ Unheard() time.Duration }); ok {
		return u.Unheard()
	}
	raw := Raw(c)
	if raw == nil {
		return 0
	}
	raw.Control(func(fd uintptr) { // an error means that c is closed
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err == nil && (info.Unacked > 0 && info.Backoff >= 3 || info.Probes >= 2) {
			silent = time.Duration(info.Last_ack_recv) * time.Millisecond
		}
	})
	return silent
}

// TuneLong prepares a connection that lives long and crosses the internet:
// lost peers are noticed, and BBR (if the kernel has it) keeps it fast under
// loss. What the kernel refuses stays at its default.
func TuneLong(c net.Conn) {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: silence / 3, Interval: silence / 3, Count: 2})
	if raw, err := tcp.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			if rtt, ok := leastRTT(fd); ok && rtt > near {
				unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, paced)
			}
		})
	}
}

// near is the round trip below which a path is the machine's own or its site's:
// it loses next to nothing, and a window is refilled at once.
const near = 2 * time.Millisecond

// paced is the congestion control that sends by a clock (BBR). On near paths
// its clock is far coarser than they are fast: loopback takes a fifth of what
// it takes without.
const paced = "bbr"

// unpace takes the clock off a connection over a near path, where the
// machine's default is a paced congestion control.
func unpace(c net.Conn) {
	raw := Raw(c)
	if raw == nil {
		return
	}
	raw.Control(func(fd uintptr) { // an error means that c is closed
		if cc, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION); err != nil || cc != paced {
			return // no TCP, or nothing to do
		}
		if rtt, ok := leastRTT(fd); !ok || rtt > near {
			return
		}
		// Without privileges only some may be chosen; reno always may.
		if unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic") != nil {
			unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno")
		}
	})
}

// leastRTT is the shortest round trip of a connection so far; false if none has
// been measured.
func leastRTT(fd uintptr) (time.Duration, bool) {
	info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil || info.Min_rtt == math.MaxUint32 {
		return 0, false
	}
	return time.Duration(info.Min_rtt) * time.Microsecond, true
}

// What the kernel holds of a connection for datagrams that it has not sent yet,
// bytes, and how long what was sent may stay unacknowledged.
const (
	unsentFlows = 128 << 10
	flowsLost   = 10 * time.Second
)

// TuneFlows prepares a connection that carries datagrams: they are late rather
// than lost if they queue, so that the kernel should take no more than keeps
// the path busy. Its reader always reads, so that the time-out, which also ends
// connections whose receiver is slow, ends only what is lost. What the kernel
// refuses stays at its default.
func TuneFlows(c net.Conn) {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsentFlows)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(flowsLost.Milliseconds()))
	})
}
