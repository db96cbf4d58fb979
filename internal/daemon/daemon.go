package daemon

import (
	"context"
	"log/slog"
	"net"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/live"
	"webgw.dev/webgw/internal/netx"
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
	Ready   func(Info)           // told once, when the role serves; may be nil
	Store   store.KV             // of the registry; nil: etcd, as configured
	Key     ident.Key            // the role's identity; zero: StateDir/<role>.key, made if missing
	Drain   time.Duration        // 0: the constant Drain

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
