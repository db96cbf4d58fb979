package gateway

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/ingress"
	"webgw.dev/webgw/internal/live"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/run"
	"webgw.dev/webgw/internal/tunnel"
)

// Gateway is the role. Set the fields, then Run.
type Gateway struct {
	Key         ident.Key
	Ports       webgw.PortSet              // public ports on offer, each for TCP and for UDP
	Addresses   []string                   // where nodes reach it, for its status
	AllowDirect []netip.Prefix             // what direct targets may lead to besides public addresses
	Ingress     *ingress.Server            // its addresses, names, limits and certificates; the rest is set by Run
	Covered     func(host string) bool     // is there a certificate for the host name? nil: for every one
	Handlers    map[string]ingress.Handler // further ALPN protocols on the TLS port
	Net         netx.Net
	Feed        live.Feed                                                  // scope gateway
	Declare     func(ctx context.Context, issued, expires time.Time) error // declares the gateway's own record; nil: it is not declared
	Report      func(ctx context.Context, s webgw.Status) error            // nil: nothing is reported
	Snapshot    string                                                     // file of the last good state; "": none
	Release     string                                                     // of the software, for people
	Drain       time.Duration                                              // how long open connections may go on at the end; 0: they are cut
	Ready       func(addrs []net.Addr)                                     // told once it serves, and where; nil: nobody
	Metrics     prometheus.Registerer                                      // nil: counted but not registered
	Log         *slog.Logger                                               // nil: discards

	since    time.Time
	follow   *live.Follower
	declare  *live.Declarer
	tunnel   *tunnel.Server
	direct   *direct
	carried  atomic.Pointer[carried]
	handlers sync.WaitGroup // sessions; added to by visits that the ingress counts
	flows    sync.WaitGroup // to direct targets; added to while the ingress runs
	news     chan struct{}  // capacity 1: the status has changed

	mu       sync.Mutex
	troubles map[webgw.Key]trouble
	epochs   map[webgw.ID]uint64 // of the sessions, by node, as of the last change
}

// life is how long the gateway's own record counts without being declared
// anew: a registry that is gone for weeks cuts nobody off.
const life = 90 * 24 * time.Hour

// Run serves until ctx ends; then it drains and returns.
func (g *Gateway) Run(ctx context.Context) error {
	g.setup()
	group := run.New(ctx, g.Log)
	group.Drain = g.Drain + 5*time.Second
	// Started in the order in which one relies on the other: the routes of the
	// last good state come before the first visitor. Stopped in the reverse:
	// nothing new is told or declared, visitors are drained, and the state is
	// saved last.
	loaded := make(chan struct{})
	var once sync.Once
	apply := g.follow.Apply
	g.follow.Apply = func(v *live.View) { apply(v); once.Do(func() { close(loaded) }) }
	group.Go("live", g.follow.Run)
	group.Go("ingress", func(ctx context.Context) error {
		select {
		case <-loaded:
		case <-ctx.Done():
			return nil
		}
		return g.serve(ctx)
	})
	if g.Declare != nil {
		group.Go("declare", g.declare.Run)
	}
	if g.Report != nil {
		group.Go("report", func(ctx context.Context) error {
			return live.Every(ctx, reportEvery, reportAfter, g.news, func(ctx context.Context) error { return g.Report(ctx, g.Status()) }, g.Log)
		})
	}
	return group.Wait()
}

// Pauses of status reports.
const (
	reportEvery = 5 * time.Second
	reportAfter = 200 * time.Millisecond // a change is told so soon, together with its like
)

func (g *Gateway) setup() {
	if g.Log == nil {
		g.Log = slog.New(slog.DiscardHandler)
	}
	g.since, g.news, g.troubles = time.Now(), make(chan struct{}, 1), map[webgw.Key]trouble{}
	g.carried.Store(&carried{})
	g.follow = &live.Follower{Feed: g.Feed, Path: g.Snapshot, Apply: g.apply, Metrics: g.Metrics, Log: g.Log}
	g.declare = live.NewDeclarer(life, g.Declare, g.Log)
	g.tunnel = &tunnel.Server{Key: g.Key, Admit: g.admit, Changed: g.sessionsChanged, Log: g.Log, Metrics: g.Metrics}
	g.direct = &direct{net: g.Net, allow: g.AllowDirect, bound: g.Ingress.Addrs, owns: g.owns}
	in := g.Ingress
	in.OpenSecret = func(owner webgw.ID, s webgw.Sealed) ([]byte, error) { return g.Key.Open(s, owner) }
	in.Flows, in.DialIssuer = upstream{g}, g.direct.dialIssuer
	in.Net, in.Upstream, in.Log, in.Metrics, in.AccessLog = g.Net, upstream{g}, g.Log, g.Metrics, g.access
	in.Limits.Drain = g.Drain
	in.Handlers = map[string]ingress.Handler{webgw.ALPNTunnel: g.apart(g.tunnel.ServeControl), webgw.ALPNData: g.apart(g.tunnel.ServeData)}
	maps.Copy(in.Handlers, g.Handlers)
}

// View is what is in force.
func (g *Gateway) View() *live.View { return g.follow.View() }

// apply takes a new view into force.
func (g *Gateway) apply(v *live.View) {
	c := carry(v, g.Key.ID(), g.Ports, g.carried.Load())
	all := make([]ingress.Declared, 0, len(c.exposures))
	for key, r := range c.exposures {
		all = append(all, ingress.Declared{Key: key, Exposure: r.Exposure})
	}
	table, problems := ingress.Build(all)
	c.problems = append(c.problems, problems...)
	for key, r := range c.exposures {
		if r.Exposure.Protocol != webgw.HTTP || g.Covered == nil {
			continue
		}
		for _, h := range r.Exposure.Hosts {
			if !g.Covered(h) {
				c.problems = append(c.problems, webgw.Problem{Exposure: key, Code: NoCertificate, Text: "this gateway has no certificate for " + h})
				break
			}
		}
	}
	g.carried.Store(c)
	g.Ingress.SetTable(table)
	poke(g.news)
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// admit says whether a node may have a session: if an exposure that this
// gateway carries leads to it. A node learns of such an exposure at about the
// same time, and asks again soon if it was first; nobody else has business
// here, so that strangers can't make the gateway hold state for them.
func (g *Gateway) admit(node webgw.ID) error {
	if g.carried.Load().nodes[node] {
		return nil
	}
	return &webgw.Error{Op: "session", Kind: webgw.Forbidden, Public: "no exposure at this gateway leads to the node"}
}

// sessionsChanged drops the kept connections to nodes whose session has ended
// or was replaced.
func (g *Gateway) sessionsChanged() {
	now := map[webgw.ID]uint64{}
	g.mu.Lock() // also around the look, so that an older one never comes later
	for _, s := range g.tunnel.Sessions() {
		now[s.Node] = s.Epoch
	}
	before := g.epochs
	g.epochs = now
	g.mu.Unlock()
	for node, epoch := range before {
		if now[node] != epoch {
			g.Ingress.DropIdle(node)
		}
	}
	poke(g.news)
}

// upstream opens the ingress's streams.
type upstream struct{ g *Gateway }

// Open implements ingress.Upstream.
func (u upstream) Open(ctx context.Context, r *ingress.Route, t webgw.Target, from ingress.Origin) (ingress.Stream, error) {
	g := u.g
	if !t.Node.IsZero() {
		kind := tunnel.Sealed
		if r.Exposure.Protocol == webgw.TLS {
			kind = tunnel.Handoff
		}
		s, err := g.tunnel.Open(ctx, t.Node, tunnel.Request{Kind: kind, Exposure: r.Key, Target: t.Address,
			Visitor: from.Visitor, Local: from.Local, Host: from.Host, Prompt: from.Prompt})
		if err != nil {
			return nil, err // not s: a nil *Stream in an interface is not nil
		}
		return s, nil
	}
	c, err := g.direct.dial(ctx, "tcp", t.Direct)
	g.troubled(r.Key, err)
	if err != nil {
		return nil, err
	}
	cw, ok := c.(netx.CloseWriter)
	if !ok {
		c.Close()
		return nil, &webgw.Error{Op: "dial target", Kind: webgw.Internal, Public: "the connection has no half-close"}
	}
	return directStream{cw, new(netx.Moved)}, nil
}

// troubled notes how the last dial of a direct target went. What nodes refuse
// they tell themselves.
func (g *Gateway) troubled(key webgw.Key, err error) {
	e, bad := errors.AsType[*webgw.Error](err)
	g.mu.Lock()
	_, known := g.troubles[key]
	if bad {
		g.troubles[key] = trouble{time.Now(), e.Sentence()}
	} else if known {
		delete(g.troubles, key)
	}
	g.mu.Unlock()
	if known != bad {
		poke(g.news)
	}
}

// access passes an HTTP request's line on to the nodes of its exposure, for
// whoever watches there.
func (g *Gateway) access(a ingress.Access) {
	r := g.carried.Load().exposures[a.Exposure]
	if a.Method == "" || r == nil {
		return
	}
	var told []webgw.ID // mostly nobody watches, and it stays empty
	tell := func(targets []webgw.Target) {
		for _, t := range targets {
			if !t.Node.IsZero() && g.tunnel.Listens(t.Node) && !slices.Contains(told, t.Node) {
				told = append(told, t.Node)
				e := a.Access
				e.Gateway = g.Key.ID()
				g.tunnel.Notify(t.Node, e)
			}
		}
	}
	tell(r.Exposure.Targets)
	for i := range r.Exposure.Rules {
		tell(r.Exposure.Rules[i].Targets)
	}
}

// Status returns what the gateway knows of itself, in a fixed order.
func (g *Gateway) Status() webgw.Status {
	now := time.Now()
	c := g.carried.Load()
	out := &webgw.GwStatus{Addresses: g.Addresses}
	for _, s := range g.tunnel.Sessions() {
		out.Sessions = append(out.Sessions, s.Node)
	}
	slices.SortFunc(out.Sessions, webgw.ID.Compare)
	out.Problems = slices.Clone(c.problems)
	for _, p := range g.Ingress.Problems() {
		p.Text = live.Text(p.Text) // it may say what a workload's certificate does
		out.Problems = append(out.Problems, p)
	}
	g.mu.Lock()
	for key, t := range g.troubles {
		if now.Sub(t.at) > rememberTrouble || c.exposures[key] == nil {
			delete(g.troubles, key)
			continue
		}
		out.Problems = append(out.Problems, webgw.Problem{Exposure: key, Code: TargetRefused, Text: live.Text(t.text)})
	}
	g.mu.Unlock()
	slices.SortFunc(out.Problems, func(a, b webgw.Problem) int {
		return cmp.Or(strings.Compare(a.Exposure.String(), b.Exposure.String()), strings.Compare(a.Code, b.Code))
	})
	return webgw.Status{Release: g.Release, Protocol: webgw.Protocol, Since: g.since, Rev: g.follow.View().Rev, Gateway: out}
}

// serve runs the ingress until ctx ends, then drains it: visitors first, while
// the sessions that carry them last, then the sessions.
func (g *Gateway) serve(ctx context.Context) error {
	if err := g.Ingress.Listen(ctx); err != nil {
		return err
	}
	if g.Ready != nil {
		g.Ready(g.Ingress.Addrs())
	}
	stop := context.AfterFunc(ctx, func() {
		g.Log.Info("draining", "for", g.Drain)
		g.tunnel.Drain()
	})
	defer stop()
	err := g.Ingress.Run(ctx)
	g.tunnel.Close()
	g.handlers.Wait()
	g.flows.Wait()
	return err
}

// apart makes a handler of what serves a connection for as long as it lasts:
// visitors' connections are drained without waiting for it.
func (g *Gateway) apart(serve func(ctx context.Context, c net.Conn, head []byte)) ingress.Handler {
	return func(ctx context.Context, c net.Conn, head []byte) {
		g.handlers.Go(func() { serve(ctx, c, head) })
	}
}

// owns reports whether the gateway listens on a port.
func (g *Gateway) owns(port uint16) bool {
	return slices.ContainsFunc(g.Ingress.Addrs(), func(a net.Addr) bool { return addrPort(a).Port() == port })
}
