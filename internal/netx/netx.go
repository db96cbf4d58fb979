// Package netx is every listen and every dial of the process. Production code
// uses Host, worlds in tests use memnet; nothing else in the tree calls
// net.Dial or net.Listen.
//
// It must not know what is spoken over a connection.
package netx

import (
	"context"
	"net"
	"syscall"
)

// Net is a network as one machine sees it.
type Net interface {
	// Dial connects to address on network "tcp", "tcp4", "tcp6" or "unix"; on
	// "udp", "udp4" or "udp6" it returns a connected socket for NewPackets.
	// control, if not nil, sees each resolved address just before it is
	// connected to and may refuse it: policies judge the address, not the name.
	Dial(ctx context.Context, network, address string, control Control) (net.Conn, error)

	// Listen listens on network "tcp", "tcp4", "tcp6" or "unix".
	Listen(ctx context.Context, network, address string) (net.Listener, error)

	// ListenPacket takes datagrams on network "udp", "udp4" or "udp6". The socket
	// is for NewPackets; the machine's own is a *net.UDPConn.
	ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error)
}

// Control judges a resolved address ("ip:port", or a path) before it is
// connected to; its error ends the dial.
type Control func(network, address string) error

// CloseWriter is a connection whose writing direction can end on its own, as
// TCP's can (half-close, RFC 9293 section 3.6).
type CloseWriter interface {
	net.Conn
	CloseWrite() error
}

// Host is the machine's own network. The zero Host is ready.
type Host struct{}

// Dial implements Net.
func (Host) Dial(ctx context.Context, network, address string, control Control) (net.Conn, error) {
	var d net.Dialer
	if control != nil {
		d.ControlContext = func(_ context.Context, network, address string, _ syscall.RawConn) error {
			return control(network, address)
		}
	}
	c, err := d.DialContext(ctx, network, address)
	if err == nil {
		unpace(c)
	}
	return c, err
}

// Listen implements Net.
func (Host) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return listener{l}, nil
}

// listener tunes what it accepts.
type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		unpace(c)
	}
	return c, err
}

// ListenPacket implements Net.
func (Host) ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error) {
	var lc net.ListenConfig
	return lc.ListenPacket(ctx, network, address)
}
