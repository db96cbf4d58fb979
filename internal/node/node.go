// Package node is the role of a machine that runs workloads: it follows what
// owners have declared, keeps one session with each gateway that carries an
// exposure of its own, and connects streams to local workloads, after checking
// each request against what the owner has signed and what the farmer allows.
//
// It listens on nothing. It must not know how gateways find visitors, and it
// must not believe what a gateway or the registry merely says.
package node

import (
	"context"
	"encoding/json"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/live"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/run"
	"webgw.dev/webgw/internal/tunnel"
)

// Node is the role. Set the fields, then Run.
type Node struct {
	Key      ident.Key
	Policy   Policy
	Net      netx.Net                                                   // by which workloads are dialed
	Outward  netx.Net                                                   // by which gateways are dialed; nil: Net
	Feed     live.Feed                                                  // scope node
	Declare  func(ctx context.Context, issued, expires time.Time) error // declares the node's own record; nil: it is not declared
	Report   func(ctx context.Context, s webgw.Status) error            // nil: nothing is reported
	Snapshot string                                                     // file of the last good state; "": none
	Release  string                                                     // of the software, for people
	Drain    time.Duration                                              // how long open streams may go on at the end; 0: they are cut
	Metrics  prometheus.Registerer                                      // nil: counted but not registered
	Log      *slog.Logger                                               // nil: discards

	Ready func() // told once, when the last good state is in force; nil: nobody

	// Told, from many goroutines, what happens; nil: nobody.
	OnStream func(Stream)
	OnAccess func(webgw.Access)

	since   time.Time
	once    sync.Once // Ready
	allowed atomic.Pointer[allowed]
	follow  *live.Follower
	declare *live.Declarer
	wake    chan struct{} // capacity 1: the wanted gateways may have changed
	news    chan struct{} // capacity 1: the status has changed
	m       metrics
	tunnels *tunnel.ClientMetrics

	mu       sync.Mutex
	states   map[webgw.ID]*gatewayState
	problems map[webgw.Key]problem
}

type gatewayState struct {
	tunnel.State
	since   time.Time // of the state
	refused bool      // it asked for what no exposure allows
}

// problem is what went wrong with an exposure's target last; a success ends it.
type problem struct {
	at   time.Time
	code string
	text string
}

type metrics struct {
	refused             *prometheus.CounterVec
	sessions, exposures prometheus.Gauge
}

// life is how long the node's own record counts without being declared anew.
const life = 90 * 24 * time.Hour

// Run serves until ctx ends; then it drains and returns.
func (n *Node) Run(ctx context.Context) error {
	n.setup()
	g := run.New(ctx, n.Log)
	g.Drain = n.Drain + 5*time.Second
	// Stopped in the reverse order: first sessions, which drain while the view
	// is still kept; the snapshot is written last.
	g.Go("live", n.follow.Run)
	if n.Declare != nil {
		g.Go("declare", n.declare.Run)
	}
	if n.Report != nil {
		g.Go("report", n.report)
	}
	g.Go("sessions", n.sessions)
	return g.Wait()
}

func (n *Node) setup() {
	if n.Log == nil {
		n.Log = slog.New(slog.DiscardHandler)
	}
	n.wake, n.news = make(chan struct{}, 1), make(chan struct{}, 1)
	n.states, n.problems = map[webgw.ID]*gatewayState{}, map[webgw.Key]problem{}
	n.since = time.Now()
	n.allowed.Store(digest(&live.View{}, n.Key.ID(), nil))
	n.m = metrics{
		refused:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "webgw_node_refused_total", Help: "Requests of gateways refused, by what did not fit: exposure, gateway, target, kind, address."}, []string{"reason"}),
		sessions:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "webgw_node_sessions", Help: "Sessions that are up."}),
		exposures: prometheus.NewGauge(prometheus.GaugeOpts{Name: "webgw_node_exposures", Help: "Exposures that lead here and are allowed."}),
	}
	if n.Metrics != nil {
		n.Metrics.MustRegister(n.m.refused, n.m.sessions, n.m.exposures)
	}
	n.tunnels = tunnel.NewClientMetrics(n.Metrics)
	n.follow = &live.Follower{Feed: n.Feed, Path: n.Snapshot, Apply: n.apply, Metrics: n.Metrics, Log: n.Log}
	n.declare = live.NewDeclarer(life, n.Declare, n.Log)
}

// View is what is in force.
func (n *Node) View() *live.View { return n.follow.View() }

// apply takes a new view into force.
func (n *Node) apply(v *live.View) {
	a := digest(v, n.Key.ID(), n.Policy.Owners)
	old := n.allowed.Swap(a)
	if n.Ready != nil {
		n.once.Do(n.Ready)
	}
	close(old.superior)
	n.m.exposures.Set(float64(len(a.exposures)))
	poke(n.wake)
	poke(n.news)
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// sessions keeps one tunnel client per wanted gateway.
func (n *Node) sessions(ctx context.Context) error {
	stops := map[webgw.ID]context.CancelFunc{}
	ended := make(chan webgw.ID)
	for {
		a := n.allowed.Load()
		wanted := a.wanted(time.Now())
		if ctx.Err() != nil {
			wanted = nil
			if len(stops) == 0 {
				return nil
			}
		}
		for id := range wanted {
			if stops[id] == nil {
				one, stop := context.WithCancel(context.WithoutCancel(ctx))
				stops[id] = stop
				n.set(id, func(g *gatewayState) { g.since = time.Now() })
				go func() { n.session(one, id); ended <- id }() // awaited: stops is not empty before
			}
		}
		for id, stop := range stops {
			if !wanted[id] {
				stop() // it drains, then tells
			}
		}
		stopped := ctx.Done()
		if ctx.Err() != nil {
			stopped = nil
		}
		select {
		case <-stopped:
		case <-n.wake:
		case id := <-ended:
			stops[id]()
			delete(stops, id)
			n.mu.Lock()
			delete(n.states, id)
			n.mu.Unlock()
			poke(n.news)
		}
	}
}

// session keeps up the session with one gateway until ctx ends, and drains it.
func (n *Node) session(ctx context.Context, gateway webgw.ID) {
	outward := n.Outward
	if outward == nil {
		outward = n.Net
	}
	c := &tunnel.Client{
		Key: n.Key, Gateway: gateway, Net: outward, Software: n.Release, Log: n.Log, Metrics: n.tunnels,
		Addresses: func() []string {
			if r := n.allowed.Load().gateways[gateway]; r != nil {
				return r.Gateway.Addresses
			}
			return nil
		},
		Connect: n.connect, ConnectFlow: n.connect,
		Changed: func(s tunnel.State) {
			n.set(gateway, func(g *gatewayState) {
				if g.Up != s.Up {
					g.since = time.Now()
				}
				g.State = s
			})
		},
	}
	if n.OnAccess != nil {
		c.Event = func(raw json.RawMessage) {
			var a webgw.Access
			if err := json.Unmarshal(raw, &a); err != nil {
				n.Log.Debug("an event of the gateway can't be read", "gateway", gateway.String(), "err", err)
				return
			}
			a.Gateway = gateway
			n.OnAccess(a)
		}
	}
	if n.OnStream != nil {
		c.Ended = func(e tunnel.Ended) {
			n.tell(Stream{Gateway: gateway, Exposure: e.Request.Exposure, Target: e.Request.Target, Visitor: e.Request.Visitor,
				Ended: true, In: e.In, Out: e.Out, Took: e.Took, Err: e.Err})
		}
	}
	serve, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	over := make(chan error, 1)
	go func() { over <- c.Run(serve) }()
	select {
	case err := <-over: // only if it can't run at all
		n.Log.Error("no session is possible", "gateway", gateway.String(), "err", err)
		<-ctx.Done()
		return
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.Drain)
	if err := c.Drain(drain); err != nil {
		n.Log.Info("open streams are cut", "gateway", gateway.String(), "drain", n.Drain)
	}
	cancel()
	cut()
	<-over
}

func (n *Node) set(gateway webgw.ID, change func(*gatewayState)) {
	n.mu.Lock()
	s := n.states[gateway]
	if s == nil {
		s = &gatewayState{}
		n.states[gateway] = s
	}
	change(s)
	up := 0
	for _, s := range n.states {
		if s.Up {
			up++
		}
	}
	n.mu.Unlock()
	n.m.sessions.Set(float64(up))
	poke(n.news)
}

func (n *Node) tell(s Stream) {
	if n.OnStream != nil {
		n.OnStream(s)
	}
}

// Status returns what the node knows of itself, in a fixed order.
func (n *Node) Status() webgw.Status {
	now := time.Now()
	a := n.allowed.Load()
	out := &webgw.NdStatus{}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, id := range slices.SortedFunc(maps.Keys(n.states), webgw.ID.Compare) {
		g := n.states[id]
		s := webgw.SessionStatus{Gateway: id, State: webgw.SessionConnecting, Since: g.since}
		switch {
		case g.Up && g.Draining:
			s.State = webgw.SessionDraining
		case g.Up:
			s.State = webgw.SessionUp
		case g.Err != nil:
			s.Error = live.Text(g.Err.Error())
		case a.gateways[id] == nil:
			s.Error = "no record of this gateway is known"
		}
		if g.refused {
			s.Error = "the gateway has asked for what no exposure allows"
		}
		out.Sessions = append(out.Sessions, s)
	}
	for key, p := range n.problems {
		if now.Sub(p.at) > rememberProblem || a.exposures[key] == nil {
			delete(n.problems, key)
			continue
		}
		out.Problems = append(out.Problems, webgw.Problem{Exposure: key, Code: p.code, Text: live.Text(p.text)})
	}
	slices.SortFunc(out.Problems, func(a, b webgw.Problem) int { return strings.Compare(a.Exposure.String(), b.Exposure.String()) })
	return webgw.Status{Release: n.Release, Protocol: webgw.Protocol, Since: n.since, Rev: n.follow.View().Rev, Node: out}
}

const rememberProblem = 5 * time.Minute

// trouble notes how the last dial for an exposure went.
func (n *Node) trouble(key webgw.Key, err *webgw.Error) {
	n.mu.Lock()
	_, known := n.problems[key]
	if err != nil {
		n.problems[key] = problem{time.Now(), string(err.Kind), err.Sentence()}
	} else if known {
		delete(n.problems, key)
	}
	n.mu.Unlock()
	if known != (err != nil) {
		poke(n.news)
	}
}

// Pauses of status reports.
const (
	reportEvery = 5 * time.Second
	reportAfter = 200 * time.Millisecond // a change is told so soon, together with its like
)

// report tells the registry, regularly and after changes. What fails is told
// the next time: the newest status is the only one that matters.
func (n *Node) report(ctx context.Context) error {
	return live.Every(ctx, reportEvery, reportAfter, n.news, func(ctx context.Context) error { return n.Report(ctx, n.Status()) }, n.Log)
}
