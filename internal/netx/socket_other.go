//go:build !linux

package netx

import (
	"net"
	"time"
)

// Alive reports whether an idle connection is still open as far as this
// machine knows; here it can't be known.
func Alive(net.Conn) bool { return true }

// Probe makes the machine ask the peer of c whether it is still there.
func Probe(c net.Conn) {
	if c, ok := c.(*net.TCPConn); ok {
		c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 2}) // an error means that c is closed
	}
}

// Unheard is how long nothing has come from the peer of c while it was asked in
// vain; here it can't be known.
func Unheard(net.Conn) time.Duration { return 0 }

// TuneLong prepares a connection that lives long and crosses the internet.
func TuneLong(net.Conn) {}

// unpace chooses the congestion control of a near path; here it can't.
func unpace(net.Conn) {}

// TuneFlows prepares a connection that carries datagrams; here it can't.
func TuneFlows(net.Conn) {}
