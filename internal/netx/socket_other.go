//go:build !linux

package netx

import "net"

// Alive reports whether an idle connection is still open as far as this
// machine knows; here it can't be known.
func Alive(net.Conn) bool { return true }

// TuneLong prepares a connection that lives long and crosses the internet.
func TuneLong(net.Conn) {}

// TuneFlows prepares a connection that carries datagrams; here it can't.
func TuneFlows(net.Conn) {}
