//go:build linux

package main

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/netip"
)

// relayPorts is where a relay listens, or what it passes on to.
type relayPorts struct{ TCP, UDP string }

// splice starts two relays that only copy: connections, which Go does by
// splice(2), and datagrams.
func (r *rig) splice(ctx context.Context) (*system, error) {
	var first, second relayPorts
	node, err := startRole(ctx, "relay", relayPorts{r.ports.Raw, r.ports.UDP}, &second)
	if err != nil {
		return nil, err
	}
	gateway, err := startRole(ctx, "relay", second, &first)
	if err != nil {
		node.stop()
		return nil, err
	}
	return &system{name: nameSplice, hops: []hop{{child: gateway, role: true}, {child: node, role: true}}, services: map[string]Endpoint{
		passthrough: {Addr: first.TCP, Hello: passHost},
		sealedTCP:   {Addr: first.TCP},
		udp:         {Addr: first.UDP, UDP: true},
	}}, nil
}

// serveRelay copies between its ports and two addresses.
func serveRelay(config json.RawMessage) (at relayPorts, err error) {
	var to relayPorts
	if err := json.Unmarshal(config, &to); err != nil {
		return at, err
	}
	if at.TCP, err = listen(func(a *net.TCPConn) { relayTCP(a, to.TCP) }); err != nil {
		return at, err
	}
	l, err := listenUDP()
	if err != nil {
		return at, err
	}
	go relayUDP(l, to.UDP)
	at.UDP = l.LocalAddr().String()
	return at, nil
}

func relayTCP(a *net.TCPConn, to string) {
	defer a.Close()
	c, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	b := c.(*net.TCPConn)
	defer b.Close()
	done := make(chan struct{})
	go func() { defer close(done); io.Copy(a, b); a.CloseWrite() }()
	io.Copy(b, a)
	b.CloseWrite()
	<-done
}

// relayUDP passes datagrams on by one socket per peer, the plain way: one
// system call for each.
func relayUDP(l *net.UDPConn, to string) {
	flows := map[netip.AddrPort]net.Conn{}
	p := make([]byte, 64<<10)
	for {
		n, peer, err := l.ReadFromUDPAddrPort(p)
		if err != nil {
			panic(err) // no measure is worth anything then
		}
		c := flows[peer]
		if c == nil {
			if c, err = net.Dial("udp", to); err != nil {
				panic(err)
			}
			c.(*net.UDPConn).SetReadBuffer(datagramBuffer) // a wish
			flows[peer] = c
			go func() {
				p := make([]byte, 64<<10)
				for {
					n, err := c.Read(p)
					if err != nil {
						panic(err)
					}
					l.WriteToUDPAddrPort(p[:n], peer) // lost is lost
				}
			}()
		}
		c.Write(p[:n]) // lost is lost
	}
}
