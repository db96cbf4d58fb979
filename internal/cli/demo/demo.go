// Package demo is a whole grid on one machine: a registry, two gateways, two
// hidden nodes and four workloads behind them, all in this process, by the
// same code as the roles, on sockets of the loopback.
//
// It must not know how any role works inside: it starts them through package
// daemon and asks them through the registry's API.
package demo

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/daemon"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/run"
)

// Grid is a running demo.
type Grid struct {
	Dir       string // everything that it writes; removed at its end
	Gateways  []*Gateway
	Nodes     []string
	Exposures []Exposure
	TLSCert   string // file: the TLS workload's own certificate

	group     *run.Group
	owner     *client.Client
	listening []netip.AddrPort // every socket that is meant to listen
	refused   atomic.Int32     // times that a node wanted to listen
}

// Gateway is where visitors of the demo knock.
type Gateway struct {
	Name   string
	ID     webgw.ID
	Zone   string
	Addr   netip.Addr
	HTTP   uint16
	TLS    uint16
	TCP    uint16 // and UDP
	CAFile string // authority of its certificates
}

// Exposure is what visitors of the demo can reach, through every gateway.
type Exposure struct {
	Name     string
	Protocol webgw.ExposureProtocol
	Hosts    []string // one per gateway, in their order
	Node     string
	Workload string // where it listens
}

// Ports that are taken if they are free: people remember them, and pages that
// were open in a browser go on to work.
const (
	httpPort = 8080
	tlsPort  = 8443
	tcpPort  = 2200
)

// Start starts everything and returns when visitors get through. Whoever
// started it calls Stop.
func Start(ctx context.Context, log *slog.Logger) (g *Grid, err error) {
	dir, err := os.MkdirTemp("", "webgw-demo-*")
	if err != nil {
		return nil, err
	}
	g = &Grid{Dir: dir, group: run.New(ctx, log)}
	g.group.Drain = 30 * time.Second
	defer func() {
		if err != nil {
			err = errors.Join(err, g.Stop())
		}
	}()
	return g, g.start(ctx, log)
}

// Stop ends everything and removes what was written.
func (g *Grid) Stop() error {
	if g.owner != nil {
		g.owner.Close()
	}
	return errors.Join(g.group.Stop(), os.RemoveAll(g.Dir))
}

// Wait returns when something of the grid has ended by itself, or ctx has.
func (g *Grid) Wait(ctx context.Context) error {
	ended := make(chan error, 1)
	go func() { ended <- g.group.Wait() }() // ends with Stop at the latest
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return nil
	}
}

func (g *Grid) start(ctx context.Context, log *slog.Logger) error {
	key, err := ident.Generate()
	if err != nil {
		return err
	}
	owner := key.ID().String()
	info, err := g.role(ctx, "registry", daemon.Env{Log: log}, daemon.RegistryConfig{Common: g.common("registry"), Listen: "127.0.0.1:0"}.Run)
	if err != nil {
		return err
	}
	registry := info.Registry
	id, addr, err := client.ParseRegistry(registry)
	if err != nil {
		return err
	}
	g.owner = &client.Client{Endpoints: []string{addr}, Server: id, Key: key, Log: log}

	first, second := loopbacks(ctx)
	ips := []netip.Addr{first, second}
	var ports [3]uint16
	for i, p := range []uint16{httpPort, tlsPort, tcpPort} {
		if ports[i], err = freePort(ctx, ips, p); err != nil {
			return err
		}
	}
	for i, name := range []string{"gent", "cairo"} {
		g.Gateways = append(g.Gateways, &Gateway{Name: name, Zone: name + ".localhost", Addr: ips[i], HTTP: ports[0], TLS: ports[1], TCP: ports[2]})
	}
	// What ends last starts first: gateways send visitors away before nodes and
	// workloads end.
	if err := g.workloads(ctx); err != nil {
		return err
	}
	nodes := map[string]webgw.ID{}
	for _, name := range []string{"home", "office"} {
		config := daemon.NodeConfig{Common: g.common(name), Name: name, Registry: registry, Owners: []string{owner}}
		env := daemon.Env{Log: log.With("node", name), Net: hidden{netx.Host{}, &g.refused}}
		info, err := g.role(ctx, "node "+name, env, config.Run)
		if err != nil {
			return err
		}
		nodes[name] = info.ID
		g.Nodes = append(g.Nodes, name)
	}
	for _, gw := range g.Gateways {
		config := daemon.GatewayConfig{Common: g.common(gw.Name), Name: gw.Name, Zone: gw.Zone, Bind: gw.Addr.String(),
			HTTPAddr: gw.at(gw.HTTP), TLSAddr: gw.at(gw.TLS), Ports: webgw.PortSet(strconv.Itoa(int(gw.TCP))),
			Addresses: []string{gw.at(gw.TLS)}, Registry: registry, DevCA: true}
		info, err := g.role(ctx, "gateway "+gw.Name, daemon.Env{Log: log.With("gateway", gw.Name)}, config.Run)
		if err != nil {
			return err
		}
		gw.ID, gw.CAFile = info.ID, info.CAFile
		g.listening = append(g.listening, netip.AddrPortFrom(gw.Addr, gw.TCP))
	}
	for _, e := range g.Exposures {
		if err := g.expose(ctx, e, nodes[e.Node]); err != nil {
			return err
		}
	}
	return g.up(ctx)
}

func (g *Grid) common(name string) daemon.Common {
	return daemon.Common{StateDir: filepath.Join(g.Dir, name)}
}

func (gw *Gateway) at(port uint16) string { return netip.AddrPortFrom(gw.Addr, port).String() }

// role starts a role and waits until it serves.
func (g *Grid) role(ctx context.Context, name string, env daemon.Env, start func(context.Context, daemon.Env) error) (daemon.Info, error) {
	ready := make(chan daemon.Info, 1)
	failed := make(chan error, 1)
	env.Ready = func(i daemon.Info) { ready <- i }
	env.Drain = 2 * time.Second
	g.group.Go(name, func(ctx context.Context) error {
		err := start(ctx, env)
		failed <- err
		return err
	})
	select {
	case i := <-ready:
		for _, a := range i.Addrs {
			if t, ok := a.(*net.TCPAddr); ok {
				g.listening = append(g.listening, netip.AddrPortFrom(t.AddrPort().Addr().Unmap(), t.AddrPort().Port()))
			}
		}
		return i, nil
	case err := <-failed:
		if err == nil {
			err = ctx.Err()
		}
		return daemon.Info{}, fmt.Errorf("%s: %w", name, err)
	case <-ctx.Done():
		return daemon.Info{}, ctx.Err()
	}
}

// hidden is the network of a machine on which nobody may listen.
type hidden struct {
	netx.Net
	refused *atomic.Int32
}

func (h hidden) Listen(context.Context, string, string) (net.Listener, error) {
	h.refused.Add(1)
	return nil, errors.New("demo: a hidden node listens on nothing")
}

// ListenPacket is for servers of datagrams.
func (h hidden) ListenPacket(context.Context, string, string) (net.PacketConn, error) {
	h.refused.Add(1)
	return nil, errors.New("demo: a hidden node listens on nothing")
}

func (g *Grid) expose(ctx context.Context, e Exposure, node webgw.ID) error {
	x := &webgw.Exposure{Protocol: e.Protocol, Hosts: e.Hosts, Targets: []webgw.Target{{Node: node, Address: e.Workload}}}
	for _, gw := range g.Gateways {
		x.Gateways = append(x.Gateways, gw.ID)
		if e.Protocol.ByPort() {
			x.Port = gw.TCP
		}
	}
	_, _, err := g.owner.Declare(ctx, webgw.Record{Kind: webgw.KindExposure, Name: e.Name, Exposure: x})
	return err
}

// Limits of the start.
const (
	patience = 30 * time.Second
	pollTime = 100 * time.Millisecond
)

// up waits until every exposure is up at every gateway.
func (g *Grid) up(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	why := "the registry has not told yet"
	for {
		if o, err := g.Status(ctx); err == nil {
			if why = missing(o, len(g.Exposures)); why == "" {
				return nil
			}
		}
		t := time.NewTimer(pollTime)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			if context.Cause(ctx) == context.Canceled {
				return ctx.Err()
			}
			return &webgw.Error{Op: "demo", Kind: webgw.Unavailable, Public: "not everything is up after " + patience.String() + ": " + why}
		}
	}
}

// missing says what is not up yet, "" if nothing.
func missing(o webgw.Overview, exposures int) string {
	if len(o.Exposures) < exposures {
		return "not every exposure is known"
	}
	for _, e := range o.Exposures {
		for _, w := range e.Gateways {
			if !w.Up {
				return "exposure " + e.Key.Name + ": " + w.Why
			}
		}
	}
	return ""
}

// Status asks the registry how everything is.
func (g *Grid) Status(ctx context.Context) (webgw.Overview, error) { return g.owner.Status(ctx) }

// loopbacks returns two addresses of this machine's loopback: both gateways
// offer the same TCP port, so that they can't share one. Without a second one
// it is the IPv6 loopback.
func loopbacks(ctx context.Context) (first, second netip.Addr) {
	first = netip.MustParseAddr("127.0.0.1")
	second = netip.MustParseAddr("127.0.0.2")
	l, err := netx.Host{}.Listen(ctx, "tcp", second.String()+":0")
	if err != nil { // not Linux
		return first, netip.IPv6Loopback()
	}
	l.Close() // nothing was sent over it
	return first, second
}

// freePort returns a port that is free on every address, for TCP and for UDP:
// the wanted one, else any.
func freePort(ctx context.Context, ips []netip.Addr, wanted uint16) (uint16, error) {
	const tries = 20
	for try := range tries {
		port := wanted
		if try > 0 {
			port = 0
		}
		l, err := netx.Host{}.Listen(ctx, "tcp", netip.AddrPortFrom(ips[0], port).String())
		if err != nil {
			continue
		}
		port = l.Addr().(*net.TCPAddr).AddrPort().Port()
		free := true
		for _, ip := range ips {
			packets, err := netx.Host{}.ListenPacket(ctx, "udp", netip.AddrPortFrom(ip, port).String())
			if err != nil {
				free = false
				break
			}
			packets.Close()
		}
		for _, ip := range ips[1:] {
			other, err := netx.Host{}.Listen(ctx, "tcp", netip.AddrPortFrom(ip, port).String())
			if err != nil {
				free = false
				break
			}
			other.Close()
		}
		l.Close()
		if free {
			return port, nil
		}
	}
	return 0, &webgw.Error{Op: "demo", Kind: webgw.Exhausted, Public: "no port is free on the loopback"}
}
