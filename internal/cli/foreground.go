package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/daemon"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/run"
)

// What is exposed in the foreground ends soon by itself, should the machine
// fall silent.
const (
	foregroundLife  = 24 * time.Hour
	foregroundRenew = foregroundLife / 2
	renewRetry      = time.Minute
	pollFast        = 200 * time.Millisecond // until it is up everywhere
	pollSlow        = 5 * time.Second
	patience        = 10 * time.Second // after which it is told what is missing
)

// foreground runs a node in this process that leads to one target, and
// withdraws everything when ctx ends.
func (v *exposing) foreground(ctx context.Context, a *app, d *directory, p *plan, target webgw.Target) (err error) {
	c := d.c
	dir, key, done, err := a.foregroundNode(p)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	target.Node = key.ID()
	p.exposure.Targets = []webgw.Target{target}

	registry, err := a.pinned(ctx, registryOf(c), c.Key, c.Net)
	if err != nil {
		return err
	}
	name := p.name // the node keeps it, should the exposure have to take another
	config := daemon.NodeConfig{Common: daemon.Common{StateDir: dir, Proxy: v.Proxy}, Name: name, Registry: registry, Owners: []string{c.Key.ID().String()}}
	for n := range p.count {
		config.Only = append(config.Only, target.At(uint16(n)).Address)
	}
	if err := reachOf(ctx, target.Address, &config); err != nil {
		return err
	}
	log := slog.New(slog.DiscardHandler)
	if v.Verbose {
		log = newLogger(a.env.Stderr, daemon.Common{})
	}
	f := &foreground{a: a, c: c, d: d, p: p, target: target, lines: make(chan any, 256)}

	// The registry takes an exposure only of a node that it knows; the exposure
	// comes before the node runs, so that a name that is taken disturbs nobody.
	self := &client.Client{Endpoints: c.Endpoints, Server: c.Server, TrustServer: c.TrustServer, Key: key, Net: c.Net}
	defer self.Close()
	_, _, err = self.Declare(ctx, webgw.Record{Kind: webgw.KindNode, Name: name, Expires: time.Now().Add(foregroundLife),
		Node: &webgw.Node{Owners: []webgw.ID{c.Key.ID()}}})
	if err != nil {
		return err
	}
	forget := func() error { return forgetNode(ctx, self, name) }
	if _, err := p.declare(ctx, c, foregroundLife); err != nil {
		return errors.Join(err, forget())
	}
	// The node outlives ctx: first the exposure is withdrawn, then it drains.
	env := daemon.Env{Net: a.env.Net, Log: log, Key: key, Drain: 2 * time.Second, OnAccess: f.access, OnStream: f.stream, Release: version().Version}
	nodeCtx, stopNode := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- config.Run(nodeCtx, env) }()
	stop := func() error {
		stopNode()
		err := <-ended
		if errors.Is(err, context.Canceled) {
			return nil
		}
		return err
	}
	err = f.follow(ctx, ended)
	return errors.Join(err, f.withdraw(ctx), stop(), forget())
}

func registryOf(c *client.Client) string {
	if c.Server.IsZero() {
		return c.Endpoints[0]
	}
	return c.Server.String() + "@" + c.Endpoints[0]
}

// foregroundNode gives the node its key and directory: lasting ones for a name
// that was chosen, passing ones for a made-up name.
func (a *app) foregroundNode(p *plan) (dir string, key ident.Key, done func() error, err error) {
	fail := func(err error) (string, ident.Key, func() error, error) { return "", ident.Key{}, nil, err }
	if p.chosen {
		if dir, err = os.MkdirTemp("", "webgw-expose-*"); err != nil {
			return fail(err)
		}
		done = func() error { return os.RemoveAll(dir) }
		if key, err = ident.Generate(); err != nil {
			return fail(errors.Join(err, done()))
		}
		return dir, key, done, nil
	}
	base, err := a.stateDir("expose")
	if err != nil {
		return fail(err)
	}
	dir = filepath.Join(base, p.name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fail(explain(err))
	}
	lock, err := run.Lock(filepath.Join(dir, "lock"))
	if errors.Is(err, run.ErrLocked) {
		err = &webgw.Error{Op: "expose", Kind: webgw.Taken, Field: "name", Public: "another webgw expose runs here with the name " + p.name, Hint: "stop it, or choose another --name"}
	} else if err != nil {
		err = explain(err)
	}
	if err != nil {
		return fail(err)
	}
	done = lock.Close
	if key, _, err = ident.LoadOrCreate(filepath.Join(dir, "node.key")); err != nil {
		if errors.Is(err, fs.ErrPermission) {
			err = explain(err)
		}
		return fail(errors.Join(err, done()))
	}
	return dir, key, done, nil
}

// foreground follows one exposure and tells what happens to it.
type foreground struct {
	a      *app
	c      *client.Client
	d      *directory
	p      *plan
	target webgw.Target
	lines  chan any // webgw.Access or daemon.Stream; what does not fit is lost

	up   map[webgw.ID]bool
	told map[string]bool // URLs
}

// access and stream take news from the node; they never wait.
func (f *foreground) access(x webgw.Access) { f.tell(x) }
func (f *foreground) stream(s daemon.Stream) {
	// Requests tell of themselves; their streams matter only when they fail.
	if s.Err != nil || s.Ended && f.p.exposure.Protocol != webgw.HTTP {
		f.tell(s)
	}
}

func (f *foreground) tell(x any) {
	select {
	case f.lines <- x:
	default:
	}
}

// follow prints until ctx ends or the node does.
func (f *foreground) follow(ctx context.Context, ended chan error) error {
	f.up, f.told = map[webgw.ID]bool{}, map[string]bool{}
	news := make(chan webgw.ExposureStatus)
	poll, stop := context.WithCancel(ctx)
	var polling sync.WaitGroup
	polling.Go(func() { f.poll(poll, news) })
	defer polling.Wait()
	defer stop()
	renew := time.NewTimer(foregroundRenew)
	defer renew.Stop()
	late := time.NewTimer(patience)
	defer late.Stop()
	var last webgw.ExposureStatus
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-ended:
			ended <- err
			return nil
		case s := <-news:
			last = s
			if err := f.news(s); err != nil {
				return err
			}
		case <-late.C:
			if len(f.up) == 0 && last.Why != "" && !f.a.json {
				f.a.notef("not up yet: %s\n", printable(last.Why))
			}
		case x := <-f.lines:
			if err := f.print(x); err != nil {
				return err
			}
		case <-renew.C:
			again := foregroundRenew
			if _, err := f.p.put(ctx, f.c, foregroundLife); err != nil && ctx.Err() == nil {
				f.a.notef("not renewed, will be tried again: %s\n", printable(err.Error()))
				again = renewRetry
			}
			renew.Reset(again)
		}
	}
}

// poll asks for the exposure's status and passes on what differs.
func (f *foreground) poll(ctx context.Context, news chan<- webgw.ExposureStatus) {
	key := webgw.Key{Kind: webgw.KindExposure, Owner: f.c.Key.ID(), Name: f.p.name}
	var last string
	for {
		wait := pollFast
		o, err := f.c.Status(ctx)
		i := slices.IndexFunc(o.Exposures, func(e webgw.ExposureStatus) bool { return e.Key == key })
		if err == nil && i >= 0 { // else it is tried again; what serves goes on serving
			s := o.Exposures[i]
			if !slices.ContainsFunc(s.Gateways, func(w webgw.WayStatus) bool { return !w.Up }) {
				wait = pollSlow
			}
			if now := fmt.Sprint(s); now != last {
				last = now
				select {
				case news <- s:
				case <-ctx.Done():
				}
			}
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// news tells which gateways have begun or ceased to serve.
func (f *foreground) news(s webgw.ExposureStatus) error {
	for _, w := range s.Gateways {
		if f.up[w.ID] == w.Up {
			continue
		}
		f.up[w.ID] = w.Up
		if !w.Up {
			delete(f.up, w.ID)
		}
		if f.a.json {
			out := struct {
				Event   string   `json:"event"`
				Gateway string   `json:"gateway"`
				ID      webgw.ID `json:"id"`
				Up      bool     `json:"up"`
				Why     string   `json:"why"`
			}{"gateway", w.Name, w.ID, w.Up, w.Why}
			if err := f.a.printJSON(out); err != nil {
				return err
			}
		} else if !w.Up {
			f.a.notef("down at %s: %s\n", printable(w.Name), printable(w.Why))
		}
	}
	public, err := f.urls()
	if err != nil {
		return err
	}
	var fresh []string
	for _, u := range public {
		if !f.told[u] {
			f.told[u] = true
			fresh = append(fresh, u)
		}
	}
	switch {
	case len(fresh) == 0:
	case f.a.json:
		return f.a.printJSON(exposedJSON{"exposed", f.p.name, fresh, f.target.Node})
	default:
		for _, u := range fresh {
			f.a.printf("%s -> %s\n", u, spread(&f.p.exposure, f.target.Address))
		}
	}
	return nil
}

// urls are the public ones of gateways that serve.
func (f *foreground) urls() ([]string, error) {
	serving := f.p.exposure
	serving.Gateways, serving.Hosts = nil, nil
	for _, id := range f.p.exposure.Gateways {
		if f.up[id] {
			serving.Gateways = append(serving.Gateways, id)
		}
	}
	for _, h := range f.p.exposure.Hosts {
		if g := gatewayFor(f.p.gateways, h); f.up[g.Owner] || !webgw.Under(h, g.Gateway.Zone) {
			serving.Hosts = append(serving.Hosts, h)
		}
	}
	return urls(context.Background(), f.d, &serving) // the gateways are known already
}

// print writes a line per request or stream.
func (f *foreground) print(x any) error {
	switch x := x.(type) {
	case webgw.Access:
		if f.a.json {
			return f.a.printJSON(struct {
				Event string `json:"event"`
				webgw.Access
			}{"request", x})
		}
		gateway, err := f.d.call(context.Background(), webgw.KindGateway, x.Gateway)
		if err != nil {
			return err
		}
		f.a.printf("%s %s\n", x.Time.Local().Format("15:04:05"), printable(fmt.Sprintf("%s %s %d %s %s %s via %s", x.Method, x.Path, x.Status, size(x.BytesOut), took(x.Took), x.Visitor, gateway)))
	case daemon.Stream:
		why := ""
		if x.Err != nil {
			why = x.Err.Error()
			if e, ok := errors.AsType[*webgw.Error](x.Err); ok {
				why = e.Sentence()
			}
		}
		if f.a.json {
			return f.a.printJSON(struct {
				Event   string   `json:"event"`
				Gateway webgw.ID `json:"gateway"`
				Visitor string   `json:"visitor,omitempty"`
				In      int64    `json:"bytesIn"`
				Out     int64    `json:"bytesOut"`
				Took    int64    `json:"took"` // nanoseconds
				Error   string   `json:"error,omitempty"`
			}{"stream", x.Gateway, x.Visitor, x.In, x.Out, int64(x.Took), why})
		}
		gateway, err := f.d.call(context.Background(), webgw.KindGateway, x.Gateway)
		if err != nil {
			return err
		}
		now := time.Now().Format("15:04:05")
		if !x.Ended {
			f.a.printf("%s %s\n", now, printable(fmt.Sprintf("refused %s via %s: %s", x.Visitor, gateway, why)))
			return nil
		}
		f.a.printf("%s %s\n", now, printable(strings.TrimSpace(fmt.Sprintf("stream %s in %s out %s %s via %s %s", size(x.In), size(x.Out), took(x.Took), x.Visitor, gateway, why))))
	}
	return nil
}

// withdraw ends the exposure for everybody.
func (f *foreground) withdraw(ctx context.Context) error {
	ctx, cancel := shortly(ctx)
	defer cancel()
	_, err := f.c.Delete(ctx, webgw.Key{Kind: webgw.KindExposure, Owner: f.c.Key.ID(), Name: f.p.name})
	if err != nil && webgw.KindOf(err) != webgw.NotFound {
		return &webgw.Error{Op: "withdraw", Kind: webgw.Unavailable, Public: "the exposure " + f.p.name + " could not be withdrawn; it ends by itself within a day", Hint: "webgw delete exposure " + f.p.name, Err: err}
	}
	if f.a.json {
		return f.a.printJSON(struct {
			Event string `json:"event"`
			Name  string `json:"name"`
		}{"withdrawn", f.p.name})
	}
	f.a.printf("withdrawn\n")
	return nil
}

// forgetNode withdraws the record of the node, which is of no use without the
// exposure.
func forgetNode(ctx context.Context, self *client.Client, name string) error {
	ctx, cancel := shortly(ctx)
	defer cancel()
	_, err := self.Delete(ctx, webgw.Key{Kind: webgw.KindNode, Owner: self.Key.ID(), Name: name})
	if webgw.KindOf(err) == webgw.NotFound {
		return nil
	}
	return err
}
