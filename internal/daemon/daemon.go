package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/live"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/run"
	"webgw.dev/webgw/internal/store"
)

// Drain is how long a role that was told to stop lets open connections go on.
const Drain = 10 * time.Second

// Env is where a role runs: the network, the log and the hooks of whoever
// starts it. The zero Env is the machine itself, silent.
type Env struct {
	Net     netx.Net             // nil: the machine's own
	Log     *slog.Logger         // nil: discards
	Metrics *prometheus.Registry // nil: a fresh one
	Ready   func(Info)           // told once, when the role serves and others can name it; see declared; may be nil
	Store   store.KV             // of the registry; nil: etcd, as configured
	Key     ident.Key            // the role's identity; zero: StateDir/<role>.key, made if missing
	Drain   time.Duration        // 0: the constant Drain
	Release string               // of the software, told to others; "": unknown

	// Feed, if not nil, stands between the role and the registry's feed: tests
	// put one there that lies.
	Feed func(live.Feed) live.Feed

	// Of the node, for those who show what happens; both may be nil and must
	// not block.
	OnAccess func(webgw.Access)
	OnStream func(Stream)
}

// Info tells how a role that serves is reached.
type Info struct {
	Role     string              // "registry", "gateway" or "node"
	ID       webgw.ID            // its identity
	Name     string              // of its record; "" for a registry
	Addrs    map[string]net.Addr // bound listeners: "http", "tls", "api", "metrics"
	Registry string              // the registry in use, as ID@host:port
	CAFile   string              // the development authority's certificate, or ""
}

// Stream is one connection to a workload that the node carries, told when it
// begins (Ended false) and, with what was carried, when it ends.
type Stream struct {
	Gateway  webgw.ID
	Exposure webgw.Key
	Target   string
	Visitor  string // ip:port, or ""
	Ended    bool
	In, Out  int64 // bytes to and from the workload
	Took     time.Duration
	Err      error // why the workload was not reached, or the request refused
}

// Run serves as a registry until ctx ends, and returns when everything it
// started has ended.
func (c RegistryConfig) Run(ctx context.Context, env Env) error { return runRegistry(ctx, c, env) }

// Run serves as a gateway until ctx ends, then drains, and returns when
// everything it started has ended.
func (c GatewayConfig) Run(ctx context.Context, env Env) error { return runGateway(ctx, c, env) }

// Run serves as a node until ctx ends, then drains, and returns when
// everything it started has ended.
func (c NodeConfig) Run(ctx context.Context, env Env) error { return runNode(ctx, c, env) }

// prepare fills in what was left out.
func (e Env) prepare(c Common, role string) (Env, error) {
	if e.Net == nil {
		e.Net = netx.Host{}
	}
	if e.Log == nil {
		e.Log = slog.New(slog.DiscardHandler)
	}
	if e.Metrics == nil {
		r := prometheus.NewRegistry()
		r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
		e.Metrics = r
	}
	if e.Drain == 0 {
		e.Drain = Drain
	}
	if e.Ready == nil {
		e.Ready = func(Info) {}
	}
	if e.Release == "" {
		e.Release = "unknown"
	}
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return e, &webgw.Error{Op: "start", Kind: webgw.Internal, Field: "state-dir", Public: "the directory can't be made", Err: err}
	}
	var err error
	e.Key, err = e.key(c, role)
	return e, err
}

// key returns the identity of a role.
func (e Env) key(c Common, role string) (ident.Key, error) {
	if !e.Key.IsZero() {
		return e.Key, nil
	}
	path := filepath.Join(c.StateDir, role+".key")
	k, created, err := ident.LoadOrCreate(path)
	if created {
		e.Log.Info("made a new identity; keep the file", "path", path, "id", k.ID().String())
	}
	return k, err
}

// registry returns a client of the registry that the configuration names.
func (e Env) registry(c Common, s string) (*client.Client, error) {
	id, endpoint, err := client.ParseRegistry(s)
	if err != nil {
		return nil, err
	}
	out := &client.Client{Endpoints: []string{endpoint}, Server: id, Key: e.Key, Log: e.Log}
	if out.Net, err = Outward(c.Proxy, e.Net); err != nil {
		return nil, err
	}
	if id.IsZero() {
		known := &registries{path: filepath.Join(c.StateDir, "registries"), log: e.Log}
		out.TrustServer = known.trust
	}
	return out, nil
}

func (e Env) feed(c *client.Client, scope client.Scope) live.Feed {
	var f live.Feed = feed{c, scope, e.Log}
	if e.Feed != nil {
		f = e.Feed(f)
	}
	return f
}

// startStatus opens the status page, if there is to be one.
func (e Env) startStatus(ctx context.Context, g *run.Group, c Common, info *Info, checks []check) error {
	if c.MetricsAddr == "" {
		return nil
	}
	l, err := e.Net.Listen(ctx, "tcp", c.MetricsAddr)
	if err != nil {
		return &webgw.Error{Op: "start", Kind: webgw.Unavailable, Field: "metrics-addr", Public: "can't listen on " + c.MetricsAddr, Err: err}
	}
	info.Addrs["metrics"] = l.Addr()
	g.Go("status page", func(ctx context.Context) error { return serveStatus(ctx, l, e.Metrics, checks, e.Log) })
	return nil
}

// declared is closed when a role's own record has been declared for the first
// time: from then on exposures can name it. Ready waits for that, but not for
// long, because a role serves without a registry as well.
type declared struct {
	once   sync.Once
	done   chan struct{}
	waited atomic.Bool
}

const declaredWait = 5 * time.Second

func newDeclared() *declared { return &declared{done: make(chan struct{})} }

// note passes on the error of a declaration.
func (d *declared) note(err error) error {
	if err == nil {
		d.once.Do(func() { close(d.done) })
	}
	return err
}

// check says whether wait is over.
func (d *declared) check() error {
	if !d.waited.Load() {
		return errors.New("the registry does not know it yet")
	}
	return nil
}

// wait waits for the declaration, declaredWait, or ctx.
func (d *declared) wait(ctx context.Context) {
	t := time.NewTimer(declaredWait)
	defer t.Stop()
	select {
	case <-d.done:
	case <-t.C:
	case <-ctx.Done():
	}
	d.waited.Store(true)
}
