//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"os"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/daemon"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/tunnel"
)

// The tunnel alone: what the two ends of a session do without the ingress
// before them and the roles around them.

var (
	tunnelGateway = ident.FromSeed([32]byte{1})
	tunnelNode    = ident.FromSeed([32]byte{2})
)

type tunnelPorts struct{ Nodes, Passthrough, TCP string }

type tunnelConfig struct{ Nodes, Target string }

func (r *rig) tunnel(ctx context.Context) (*system, error) {
	var at tunnelPorts
	gateway, err := startRole(ctx, "tunnel-gateway", tunnelConfig{Target: r.ports.Raw}, &at)
	if err != nil {
		return nil, err
	}
	node, err := startRole(ctx, "tunnel-node", tunnelConfig{Nodes: at.Nodes}, nil)
	if err != nil {
		gateway.stop()
		return nil, err
	}
	return &system{name: nameTunnel, rest: tidied, hops: []hop{{child: gateway, role: true}, {child: node, role: true}},
		services: map[string]Endpoint{passthrough: {Addr: at.Passthrough, Hello: passHost}, sealedTCP: {Addr: at.TCP}}}, nil
}

func warnings() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// readHello reads the first TLS record of c.
func readHello(c net.Conn) ([]byte, error) {
	head := make([]byte, 5, 2048)
	if _, err := io.ReadFull(c, head); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(head[3:]))
	head = append(head, make([]byte, n)...)
	_, err := io.ReadFull(c, head[5:])
	return head, err
}

func serveTunnelGateway(ctx context.Context, config json.RawMessage) (at tunnelPorts, err error) {
	var c tunnelConfig
	if err := json.Unmarshal(config, &c); err != nil {
		return at, err
	}
	go daemon.Tidy(ctx)
	s := &tunnel.Server{Key: tunnelGateway, Log: warnings()}
	if at.Nodes, err = listen(func(c *net.TCPConn) {
		head, err := readHello(c)
		switch {
		case err != nil:
			c.Close()
		case bytes.Contains(head, []byte(webgw.ALPNData)):
			s.ServeData(ctx, c, head)
		default:
			s.ServeControl(ctx, c, head)
		}
	}); err != nil {
		return at, err
	}
	carry := func(v *net.TCPConn, kind tunnel.Kind, head []byte) {
		up, err := s.Open(ctx, tunnelNode.ID(), tunnel.Request{Kind: kind, Target: c.Target, Host: passHost})
		if err != nil {
			netx.Reset(v) // the visitor counts it
			return
		}
		up.Join(v, head, func(_, _ int64, err error) {
			if err != nil {
				netx.Reset(v)
			}
			v.Close()
		})
	}
	if at.Passthrough, err = listen(func(v *net.TCPConn) {
		head, err := readHello(v)
		if err != nil {
			v.Close()
			return
		}
		carry(v, tunnel.Handoff, head)
	}); err != nil {
		return at, err
	}
	at.TCP, err = listen(func(v *net.TCPConn) { carry(v, tunnel.Sealed, nil) })
	return at, err
}

func serveTunnelNode(ctx context.Context, config json.RawMessage) (ready string, err error) {
	var c tunnelConfig
	if err := json.Unmarshal(config, &c); err != nil {
		return "", err
	}
	go daemon.Tidy(ctx)
	up := make(chan struct{}, 1)
	t := &tunnel.Client{
		Key: tunnelNode, Gateway: tunnelGateway.ID(), Net: netx.Host{}, Log: warnings(),
		Addresses: func() []string { return []string{c.Nodes} },
		Connect: func(ctx context.Context, _ webgw.ID, r tunnel.Request) (net.Conn, error) {
			return netx.Host{}.Dial(ctx, "tcp", r.Target, nil)
		},
		Changed: func(s tunnel.State) {
			if s.Up {
				select {
				case up <- struct{}{}:
				default:
				}
			}
		},
	}
	ended := make(chan error, 1)
	go func() { ended <- t.Run(ctx) }()
	select {
	case <-up:
		return "up", nil
	case err := <-ended:
		return "", err
	}
}
