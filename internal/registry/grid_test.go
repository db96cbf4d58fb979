package registry

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/netx/memnet"
)

// key returns the same identity for the same number in every run.
func key(n int) ident.Key {
	return ident.FromSeed([32]byte{byte(n), byte(n >> 8), 7})
}

// grid is a registry of some replicas in a bubble, and its clients.
type grid struct {
	t        *testing.T
	kv       *kv
	world    *memnet.World
	replicas []*Server
	hosts    []*memnet.Host // of the replicas
	ctx      context.Context
	stop     context.CancelFunc
	done     sync.WaitGroup
	clients  []*client.Client
}

// bubble runs f in a bubble with a registry of n replicas; set may change
// their fields.
func bubble(t *testing.T, n int, set func(*Server), f func(g *grid)) {
	synctest.Test(t, func(t *testing.T) {
		g := &grid{t: t, kv: newKV(), world: memnet.New(1)}
		g.ctx, g.stop = context.WithCancel(t.Context())
		for i := range n {
			g.start(i, set)
		}
		for _, s := range g.replicas {
			if err := s.Ready(g.ctx); err != nil {
				t.Fatal(err)
			}
		}
		defer func() {
			for _, c := range g.clients {
				c.Close()
			}
			g.stop()
			g.done.Wait()
		}()
		f(g)
	})
}

func (g *grid) start(i int, set func(*Server)) {
	s := &Server{Key: key(1000), Store: g.kv, Grace: -1}
	if set != nil {
		set(s)
	}
	g.replicas = append(g.replicas, s)
	g.hosts = append(g.hosts, g.world.Host(fmt.Sprintf("registry%d", i), g.addr(i)))
	l, err := g.hosts[i].Listen(g.ctx, "tcp", ":8443")
	if err != nil {
		g.t.Fatal(err)
	}
	g.done.Go(func() { s.Run(g.ctx) })
	g.done.Go(func() { s.Serve(g.ctx, l) })
}

func (g *grid) addr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}) }

// as returns a client with a key, which asks the given replicas (none: all).
func (g *grid) as(k ident.Key, replicas ...int) *client.Client {
	if len(replicas) == 0 {
		for i := range g.replicas {
			replicas = append(replicas, i)
		}
	}
	n := len(g.clients)
	host := g.world.Host(fmt.Sprintf("client%d", n), netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}))
	c := &client.Client{Key: k, Server: key(1000).ID(), Net: host}
	for _, i := range replicas {
		c.Endpoints = append(c.Endpoints, netip.AddrPortFrom(g.addr(i), 8443).String())
	}
	g.clients = append(g.clients, c)
	return c
}

// declare declares and must not fail.
func (g *grid) declare(k ident.Key, r webgw.Record) ident.Signed {
	g.t.Helper()
	s, _, err := g.as(k).Declare(g.ctx, r)
	if err != nil {
		g.t.Fatalf("declare %s: %v", r.Name, err)
	}
	return s
}

func gateway(name, zone string) webgw.Record {
	return webgw.Record{Kind: webgw.KindGateway, Name: name, Gateway: &webgw.Gateway{Addresses: []string{"192.0.2.1:443"}, TLSPort: 443, Zone: zone, Ports: "2000-2009"}}
}

func node(name string, owners ...webgw.ID) webgw.Record {
	return webgw.Record{Kind: webgw.KindNode, Name: name, Node: &webgw.Node{Owners: owners}}
}

func claimed(host string, subtree bool) webgw.Record {
	return webgw.Record{Kind: webgw.KindName, Name: host, NameClaim: &webgw.NameClaim{Subtree: subtree}}
}

// web is an HTTP exposure by gateway 100 toward node 200.
func web(name string, hosts ...string) webgw.Record {
	return webgw.Record{Kind: webgw.KindExposure, Name: name, Exposure: &webgw.Exposure{
		Protocol: webgw.HTTP, Hosts: hosts, Gateways: []webgw.ID{key(100).ID()},
		Targets: []webgw.Target{{Node: key(200).ID(), Address: "127.0.0.1:8080"}},
	}}
}

func tcp(name string, port uint16, gateways ...webgw.ID) webgw.Record {
	return webgw.Record{Kind: webgw.KindExposure, Name: name, Exposure: &webgw.Exposure{
		Protocol: webgw.TCP, Port: port, Gateways: gateways, Targets: []webgw.Target{{Direct: "198.51.100.1:22"}},
	}}
}

// site declares gateway 100 ("gent", zone gent.example) and node 200 ("home1").
func (g *grid) site() {
	g.t.Helper()
	g.declare(key(100), gateway("gent", "gent.example"))
	g.declare(key(200), node("home1", key(1).ID()))
}

// heard gathers what a watch tells, as "name@seq…" in order, until the test ends.
type heard struct {
	mu      sync.Mutex
	rev     int64
	epoch   string
	records map[webgw.Key]*webgw.Record // newest
	lines   int
	resets  int
	synced  bool
	bad     int
	err     error
	cancel  context.CancelFunc
	done    chan struct{}
}

func (g *grid) watch(c *client.Client, scope client.Scope, since int64, epoch string) *heard {
	ctx, cancel := context.WithCancel(g.ctx)
	n := &heard{records: map[webgw.Key]*webgw.Record{}, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(n.done)
		for ch, err := range c.Watch(ctx, scope, since, epoch) {
			n.mu.Lock()
			if err != nil {
				n.err = err
				n.mu.Unlock()
				continue
			}
			n.lines++
			for _, s := range ch.Records {
				if s.Record.Supersedes(n.records[s.Record.Key()]) {
					n.records[s.Record.Key()] = s.Record
				}
			}
			n.rev = max(n.rev, ch.Rev)
			if ch.Epoch != "" {
				n.epoch = ch.Epoch
			}
			if ch.Reset {
				n.resets++
			}
			n.synced = n.synced || ch.Synced
			n.mu.Unlock()
		}
	}()
	return n
}

func (n *heard) end() {
	n.cancel()
	<-n.done
}

// has returns the newest version of a record that the watch has told, or nil.
func (n *heard) has(k webgw.Key) *webgw.Record {
	synctest.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.records[k]
}

func wantKind(t *testing.T, err error, kind webgw.ErrorKind, what string) {
	t.Helper()
	if got := webgw.KindOf(err); got != kind {
		t.Errorf("%s: got %q (%v), want %q", what, got, err, kind)
	}
}

const lifetime = 24 * time.Hour
