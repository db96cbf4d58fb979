package daemon

import (
	"context"
	"errors"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/registry"
	"webgw.dev/webgw/internal/run"
)

func runRegistry(ctx context.Context, c RegistryConfig, env Env) error {
	if err := c.Validate(); err != nil {
		return err
	}
	env, err := env.prepare(c.Common, "registry")
	if err != nil {
		return err
	}
	listen := c.Listen
	if listen == "" {
		listen = DefaultRegistryListen
	}
	g := run.New(ctx, env.Log)
	g.Drain = env.Drain + 10*time.Second
	s, err := c.start(ctx, g, env, env.Key)
	if err != nil {
		return errors.Join(err, g.Stop())
	}
	l, err := env.Net.Listen(ctx, "tcp", listen)
	if err != nil {
		err = &webgw.Error{Op: "start", Kind: webgw.Unavailable, Field: "listen", Public: "can't listen on " + listen, Err: err}
		return errors.Join(err, g.Stop())
	}
	info := Info{Role: "registry", ID: env.Key.ID(), Addrs: map[string]net.Addr{"api": l.Addr()}}
	info.Registry = info.ID.String() + "@" + reachable(c.Address, l.Addr())
	if err := env.startStatus(ctx, g, c.Common, &info, []check{{"store", registryReady(s)}}); err != nil {
		return errors.Join(err, l.Close(), g.Stop())
	}
	g.Go("api", func(ctx context.Context) error { return s.Serve(ctx, l) })
	g.Go("ready", func(ctx context.Context) error {
		if err := s.Ready(ctx); err != nil {
			return err
		}
		env.Log.Info("registry", "registry", info.Registry)
		env.Ready(info)
		return nil
	})
	return g.Wait()
}

// start opens the store and starts what keeps a registry going, but listens on
// nothing. The store is closed after everything that uses it.
func (c RegistryConfig) start(ctx context.Context, g *run.Group, env Env, key ident.Key) (*registry.Server, error) {
	kv := env.Store
	if kv == nil {
		var err error
		if kv, err = openEtcd(ctx, c, env); err != nil {
			return nil, err
		}
		g.Go("store", func(ctx context.Context) error { <-ctx.Done(); return kv.Close() })
	}
	admitted, err := c.admitted()
	if err != nil {
		return nil, err
	}
	s := &registry.Server{Key: key, Store: kv, Quota: registry.Quota{Records: c.Quota}, Writes: registry.WriteRate{PerSecond: c.WriteRate}, Grace: c.NameGrace, Zone: c.GridZone, Operator: env.Key.ID(), Log: env.Log, Metrics: env.Metrics}
	if c.proves() {
		s.Domains = &registry.Domains{Resolvers: c.Resolvers, Net: env.Net}
	} else {
		env.Log.Info("registry: host names outside of the gateways' zones need no proof here; give --resolver to change that")
	}
	if admitted != nil {
		s.Admit = func(id webgw.ID) error {
			if slices.Contains(admitted, id) {
				return nil
			}
			return &webgw.Error{Op: "admit", Kind: webgw.Forbidden, Public: "this registry admits invited identities only", Hint: "ask its operator to admit " + id.String()}
		}
	}
	g.Go("registry", s.Run)
	return s, nil
}

func registryReady(s *registry.Server) func() error {
	return func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		return s.Ready(ctx)
	}
}

// reachable is the address that others are told: as configured, or else where
// the listener is bound, and under the machine's name if that is everywhere.
func reachable(configured string, bound net.Addr) string {
	if configured != "" {
		return configured
	}
	t, ok := bound.(*net.TCPAddr)
	if !ok || !t.IP.IsUnspecified() {
		return bound.String()
	}
	return net.JoinHostPort(hostName(), strconv.Itoa(t.Port))
}

// handed is a listener whose connections another one has accepted: those of
// the gateway's TLS port that turn out to be the registry's.
type handed struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newHanded(addr net.Addr) *handed {
	return &handed{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

// take is an ingress.Handler.
func (h *handed) take(ctx context.Context, c net.Conn, head []byte) {
	select {
	case h.conns <- &headed{Conn: c, head: head}:
	case <-h.done:
		c.Close()
	case <-ctx.Done():
		c.Close()
	}
}

// Accept implements net.Listener.
func (h *handed) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (h *handed) Close() error { h.once.Do(func() { close(h.done) }); return nil }

// Addr implements net.Listener.
func (h *handed) Addr() net.Addr { return h.addr }

// headed is a connection of which something was read already.
type headed struct {
	net.Conn
	head []byte
}

func (c *headed) Read(p []byte) (int, error) {
	if len(c.head) > 0 {
		n := copy(p, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}
