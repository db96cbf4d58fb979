// Package world builds whole grids for tests: a registry, gateways, nodes,
// workloads and visitors, the real code of each, on a network in memory and
// on fake time. A test says what there is, what happens to it, and what a
// visitor must see.
//
// It must not know how any of it works inside: what it starts it starts
// through package daemon.
package world

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/daemon"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/netx/memnet"
	"webgw.dev/webgw/internal/store"
	"webgw.dev/webgw/internal/store/memkv"
)

// Promise is how long a change may take to be in force everywhere, sessions
// included, on a healthy network.
const Promise = 2 * time.Second

// World is one grid. Its methods fail the test instead of returning errors.
type World struct {
	T   *testing.T
	Net *memnet.World

	seed     uint64
	dir      string
	store    store.KV
	registry string       // ID@host:port
	desk     *memnet.Host // where owners and visitors sit
	daemons  map[string]*Daemon
	order    []*Daemon
	hosts    map[string]*memnet.Host
	dns      map[string][]*Daemon // host name → gateways that carry it
	declared map[webgw.Key]webgw.Record
	trusted  []*x509.Certificate
	keys     byte
	trace    trace

	// Alice owns what Apply declares; every node carries her exposures.
	Alice *Owner
}

// Test runs f in a bubble of fake time with a world of its own. f must use the
// t that it gets: the outer one's context does not belong to the bubble.
func Test(t *testing.T, f func(t *testing.T, w *World)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, New(t)) })
}

// New makes a world with a registry and nothing else. The test must run in a
// bubble of testing/synctest.
func New(t *testing.T) *World {
	t.Helper()
	w := &World{T: t, seed: 1, dir: t.TempDir(), daemons: map[string]*Daemon{}, hosts: map[string]*memnet.Host{},
		dns: map[string][]*Daemon{}, declared: map[webgw.Key]webgw.Record{}}
	w.Net = memnet.New(w.seed)
	w.store = memkv.New()
	w.desk = w.Net.Host("desk")
	w.Alice = w.Owner("alice")
	t.Cleanup(w.close)
	w.daemon("registry", func(d *Daemon) runner {
		return daemon.RegistryConfig{Common: d.common(), Listen: ":8443", Address: d.Address(8443)}
	})
	w.registry = w.daemons["registry"].info.Registry
	return w
}

// close ends what still runs, in reverse, and tells the story if the test has
// failed.
func (w *World) close() {
	for i := len(w.order) - 1; i >= 0; i-- {
		w.order[i].Stop()
	}
	if err := w.store.Close(); err != nil {
		w.T.Errorf("store: %v", err)
	}
	if w.T.Failed() {
		w.T.Logf("seed %d; what happened, hop by hop:\n%s", w.seed, w.trace.String())
	}
}

// Key makes a new identity, the same in every run.
func (w *World) Key() ident.Key {
	w.keys++
	return ident.FromSeed([32]byte{w.keys, 'w'})
}

// runner is a role's configuration.
type runner interface {
	Run(ctx context.Context, env daemon.Env) error
}

// Daemon is one running role on its own host.
type Daemon struct {
	w       *World
	Name    string
	Host    *memnet.Host
	Key     ident.Key
	Metrics *prometheus.Registry // of the present run
	Env     func(*daemon.Env)    // changes the environment of further starts; may be nil

	build func(*Daemon) runner
	info  daemon.Info
	stop  context.CancelFunc // nil: not running
	done  chan error
}

// ID is the daemon's identity.
func (d *Daemon) ID() webgw.ID { return d.Key.ID() }

// Address is the daemon's public name with a port.
func (d *Daemon) Address(port int) string { return fmt.Sprintf("%s.test:%d", d.Name, port) }

func (d *Daemon) common() daemon.Common {
	return daemon.Common{StateDir: filepath.Join(d.w.dir, d.Name)}
}

// daemon makes a host, starts a role on it and waits until it serves.
func (w *World) daemon(name string, build func(*Daemon) runner) *Daemon {
	w.T.Helper()
	d := &Daemon{w: w, Name: name, Host: w.Net.Host(name), Key: w.Key(), build: build}
	w.Net.Name(name+".test", d.Host.Addrs()...)
	w.hosts[name], w.daemons[name] = d.Host, d
	w.order = append(w.order, d)
	d.Start()
	w.Settle() // it declares itself
	return d
}

// Start starts the role, with the state that it left behind.
func (d *Daemon) Start() {
	d.w.T.Helper()
	if d.stop != nil {
		d.w.T.Fatalf("%s runs already", d.Name)
	}
	role := d.build(d)
	ctx, cancel := context.WithCancel(context.Background())
	ready := make(chan daemon.Info, 1)
	d.Metrics = prometheus.NewRegistry()
	env := daemon.Env{
		Net: d.Host, Log: d.w.trace.log(d.Name), Metrics: d.Metrics, Key: d.Key, Store: d.w.store,
		Ready: func(i daemon.Info) { ready <- i },
	}
	if d.Env != nil {
		d.Env(&env)
	}
	d.stop, d.done = cancel, make(chan error, 1)
	go func() { d.done <- role.Run(ctx, env) }()
	late := time.NewTimer(time.Minute)
	defer late.Stop()
	select {
	case d.info = <-ready:
	case err := <-d.done:
		d.stop = nil
		d.w.T.Fatalf("%s ended at its start: %v", d.Name, err)
	case <-late.C:
		d.w.T.Fatalf("%s is not ready after a minute", d.Name)
	}
	d.w.trace.add("world", d.Name+" serves")
}

// Stop asks the role to end and waits until it has.
func (d *Daemon) Stop() {
	d.w.T.Helper()
	if d.stop == nil {
		return
	}
	d.stop()
	d.stop = nil
	if err := <-d.done; err != nil && !errors.Is(err, context.Canceled) {
		d.w.T.Errorf("%s ended with: %v", d.Name, err)
	}
	d.w.trace.add("world", d.Name+" has stopped")
}

// Daemon returns a daemon by its name.
func (w *World) Daemon(name string) *Daemon {
	w.T.Helper()
	d := w.daemons[name]
	if d == nil {
		w.T.Fatalf("nobody is called %q", name)
	}
	return d
}

// GatewayOption changes how a gateway is made; it is called before each start.
type GatewayOption func(*Daemon, *daemon.GatewayConfig)

// Gateway starts a gateway whose public name is name.test.
func (w *World) Gateway(name string, options ...GatewayOption) *Daemon {
	w.T.Helper()
	return w.daemon(name, func(d *Daemon) runner {
		c := daemon.GatewayConfig{Common: d.common(), Name: name, Zone: name + ".test", Addresses: []string{d.Address(443)}, Registry: w.registry}
		for _, o := range options {
			o(d, &c)
		}
		return c
	})
}

// NodeOption changes how a node is made; it is called before each start.
type NodeOption func(*Daemon, *daemon.NodeConfig)

// BehindNAT hides the node's host from everybody else.
func BehindNAT(d *Daemon, _ *daemon.NodeConfig) {
	d.Host.BehindNAT(netip.AddrFrom4([4]byte{198, 19, 0, 1}), netip.MustParseAddr("2001:db8:1::1"))
}

// Node starts a node that carries Alice's exposures.
func (w *World) Node(name string, options ...NodeOption) *Daemon {
	w.T.Helper()
	return w.daemon(name, func(d *Daemon) runner {
		c := daemon.NodeConfig{Common: d.common(), Name: name, Registry: w.registry, Owners: []string{w.Alice.ID().String()}}
		for _, o := range options {
			o(d, &c)
		}
		return c
	})
}

func (w *World) host(name string) *memnet.Host {
	w.T.Helper()
	if name == "desk" {
		return w.desk
	}
	return w.Daemon(name).Host
}

// Kill ends a host as a power failure does.
func (w *World) Kill(name string) {
	w.T.Helper()
	d := w.Daemon(name)
	w.trace.add("world", "kill "+name)
	w.Net.Kill(d.Host)
	if d.stop != nil {
		d.stop()
		d.stop = nil
		<-d.done // how a role ends whose network is gone does not matter
	}
}

// Restart starts a killed or stopped daemon again, or stops and starts a
// running one.
func (w *World) Restart(name string) {
	w.T.Helper()
	d := w.Daemon(name)
	d.Stop()
	w.Net.Restart(d.Host)
	d.Start()
}

// Cut makes the link between two hosts swallow everything, silently.
func (w *World) Cut(a, b string) {
	w.T.Helper()
	w.trace.add("world", "cut "+a+" "+b)
	w.Net.Cut(w.host(a), w.host(b))
}

// Repair undoes Cut.
func (w *World) Repair(a, b string) {
	w.T.Helper()
	w.trace.add("world", "repair "+a+" "+b)
	w.Net.Repair(w.host(a), w.host(b))
}

// Settle lets as much time pass as a change may take to be in force.
func (w *World) Settle() { time.Sleep(Promise) }

// Owner is somebody who declares records, from the desk.
type Owner struct {
	w    *World
	Name string
	Key  ident.Key
}

// Owner makes another owner.
func (w *World) Owner(name string) *Owner { return &Owner{w, name, w.Key()} }

// ID is the owner's identity.
func (o *Owner) ID() webgw.ID { return o.Key.ID() }

// Client returns a client of the registry for the key, on a host of the world.
func (w *World) Client(key ident.Key, from netx.Net) *client.Client {
	w.T.Helper()
	id, addr, err := client.ParseRegistry(w.registry)
	if err != nil {
		w.T.Fatal(err)
	}
	c := &client.Client{Endpoints: []string{addr}, Server: id, Key: key, Net: from, Log: w.trace.log("desk")}
	w.T.Cleanup(c.Close)
	return c
}

// trace is what every daemon logged, in the order in which it happened.
type trace struct {
	mu    sync.Mutex
	lines []string
}

const traceLines = 400 // the last ones are told

func (t *trace) add(who, line string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines = append(t.lines, fmt.Sprintf("%s %-9s %s", time.Now().Format("15:04:05.000"), who, line))
}

func (t *trace) log(who string) *slog.Logger {
	return slog.New(slog.NewTextHandler(&tracer{t, who}, &slog.HandlerOptions{Level: slog.LevelDebug,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}}))
}

func (t *trace) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := t.lines
	if len(lines) > traceLines && os.Getenv("WEBGW_TRACE") == "" {
		lines = append([]string{fmt.Sprintf("… %d lines; WEBGW_TRACE=all shows them", len(lines)-traceLines)}, lines[len(lines)-traceLines:]...)
	}
	return strings.Join(lines, "\n")
}

// Logged reports whether who has logged a line that holds all of the words.
func (w *World) Logged(who string, words ...string) bool {
	w.trace.mu.Lock()
	defer w.trace.mu.Unlock()
line:
	for _, l := range w.trace.lines {
		if !strings.Contains(l, " "+who+" ") {
			continue
		}
		for _, word := range words {
			if !strings.Contains(l, word) {
				continue line
			}
		}
		return true
	}
	return false
}

type tracer struct {
	t   *trace
	who string
}

func (t *tracer) Write(p []byte) (int, error) {
	t.t.add(t.who, string(bytes.TrimSpace(p)))
	return len(p), nil
}

// Metric sums the samples of one of the daemon's metrics, over all labels that
// contain the given pairs.
func (d *Daemon) Metric(name string, labels ...string) (sum float64) {
	d.w.T.Helper()
	families, err := d.Metrics.Gather()
	if err != nil {
		d.w.T.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	sample:
		for _, m := range f.Metric {
			for i := 0; i+1 < len(labels); i += 2 {
				found := false
				for _, l := range m.Label {
					found = found || l.GetName() == labels[i] && l.GetValue() == labels[i+1]
				}
				if !found {
					continue sample
				}
			}
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum
}
