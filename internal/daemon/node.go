package daemon

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/live"
	"webgw.dev/webgw/internal/node"
	"webgw.dev/webgw/internal/run"
)

func runNode(ctx context.Context, c NodeConfig, env Env) error {
	if err := c.Validate(); err != nil {
		return err
	}
	env, err := env.prepare(c.Common, "node")
	if err != nil {
		return err
	}
	owners, err := parseIDs("owners", c.Owners)
	if err != nil {
		return err
	}
	name := c.Name
	if name == "" {
		name = hostLabel()
	}
	reg, err := env.registry(c.Common, c.Registry)
	if err != nil {
		return err
	}
	defer reg.Close()
	outward, err := Outward(c.Proxy, env.Net)
	if err != nil {
		return err
	}
	known := newDeclared()
	n := &node.Node{
		Key: env.Key, Policy: node.Policy{Owners: owners, Targets: c.AllowTargets, Unix: c.AllowUnix, Only: c.Only}, Net: env.Net, Outward: outward,
		Feed: env.feed(reg, client.ScopeNode), Report: reg.ReportStatus, Snapshot: filepath.Join(c.StateDir, "node.snapshot"),
		Release: env.Release, Drain: env.Drain, Metrics: env.Metrics, Log: env.Log, OnAccess: env.OnAccess,
		Declare: func(ctx context.Context, issued, expires time.Time) error {
			_, _, err := reg.Declare(ctx, webgw.Record{Kind: webgw.KindNode, Name: name, Issued: issued, Expires: expires,
				Node: &webgw.Node{Farmer: c.Farmer, Owners: owners}})
			return known.note(err)
		},
	}
	if env.OnStream != nil {
		n.OnStream = func(s node.Stream) {
			out := Stream{Gateway: s.Gateway, Exposure: s.Exposure, Target: s.Target, Ended: s.Ended, In: s.In, Out: s.Out, Took: s.Took, Err: s.Err}
			if s.Visitor.IsValid() {
				out.Visitor = s.Visitor.String()
			}
			env.OnStream(out)
		}
	}
	info := Info{Role: "node", ID: env.Key.ID(), Name: name, Registry: registryName(reg), Addrs: map[string]net.Addr{}}
	env.Log.Info("node", "node", info.ID.String(), "name", name, "registry", info.Registry)
	loaded := make(chan struct{})
	n.Ready = func() { close(loaded) }

	g := run.New(ctx, env.Log)
	g.Drain = env.Drain + 10*time.Second
	// The status page is the last to go: it tells of the drain.
	if err := env.startStatus(ctx, g, c.Common, &info, []check{{"state", followed(n.View)}, {"record", known.check}}); err != nil {
		return errors.Join(err, g.Stop())
	}
	g.Go("node", n.Run)
	g.Go("ready", func(ctx context.Context) error {
		select {
		case <-loaded:
			if known.wait(ctx); ctx.Err() == nil {
				env.Ready(info)
			}
		case <-ctx.Done():
		}
		return nil
	})
	return g.Wait()
}

// followed checks that there is a state to work by: of the registry, or of the
// snapshot.
func followed(view func() *live.View) func() error {
	return func() error {
		if v := view(); v.Epoch == "" {
			return errors.New("the registry has not been reached yet, and there is no snapshot")
		}
		return nil
	}
}

// hostName is the machine's name.
func hostName() string {
	h, err := os.Hostname()
	if err != nil {
		return "localhost"
	}
	return strings.ToLower(h)
}

// hostLabel is the first label of the machine's name, fit for a record's name.
func hostLabel() string {
	label, _, _ := strings.Cut(hostName(), ".")
	label = strings.Trim(strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, label), "-")
	if webgw.CheckLabel("name", label) != nil {
		return "unnamed"
	}
	return label
}

// registryName is the registry as others are told it.
func registryName(c *client.Client) string {
	if c.Server.IsZero() {
		return c.Endpoints[0]
	}
	return c.Server.String() + "@" + c.Endpoints[0]
}
