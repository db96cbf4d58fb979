package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/cli/demo"
	"webgw.dev/webgw/internal/daemon"
)

type demoVerb struct {
	Check   bool `help:"Try every exposure through every gateway, print a line for each, and exit."`
	Verbose bool `short:"v" help:"Log what the roles do."`
}

func (v *demoVerb) Run(ctx context.Context, a *app) (err error) {
	log := slog.New(slog.DiscardHandler)
	if v.Verbose {
		log = newLogger(a.env.Stderr, daemon.Common{})
	}
	if !a.json {
		a.printf("starting a registry, two gateways, two hidden nodes and four workloads …\n")
	}
	g, err := demo.Start(ctx, log)
	if err != nil {
		if ctx.Err() != nil && errors.Is(err, context.Canceled) {
			return nil // stopped before it was up
		}
		return explain(err)
	}
	defer func() { err = errors.Join(err, g.Stop()) }()
	if v.Check {
		return v.check(ctx, a, g)
	}
	if a.json {
		return v.stream(ctx, a, g)
	}
	a.printf("%s", howToTry(g))
	return v.watch(ctx, a, g)
}

// check prints a line for each trial.
func (v *demoVerb) check(ctx context.Context, a *app, g *demo.Grid) error {
	failed, n := 0, 0
	var unwritten error
	ok := g.Check(ctx, func(r demo.Result) {
		n++
		if !r.OK {
			failed++
		}
		if a.json {
			unwritten = errors.Join(unwritten, a.printJSON(r))
			return
		}
		word := "ok"
		if !r.OK {
			word = "FAILED"
		}
		line := fmt.Sprintf("%-6s %-24s %-6s %s", r.Gateway, r.What, word, took(time.Duration(r.Took)))
		if !r.OK {
			line += "  " + printable(r.Why)
		}
		a.printf("%s\n", line)
	})
	if unwritten != nil {
		return unwritten
	}
	if !ok {
		return &webgw.Error{Op: "demo", Kind: webgw.Internal, Public: fmt.Sprintf("%d of %d trials failed", failed, n), Hint: "webgw demo --check --verbose shows what the roles say"}
	}
	if !a.json {
		a.printf("all %d trials ok\n", n)
	}
	return nil
}

// howToTry prints commands that can be pasted as they are.
func howToTry(g *demo.Grid) string {
	var b strings.Builder
	for i, gw := range g.Gateways {
		site, vault := g.Exposures[0].Hosts[i], g.Exposures[2].Hosts[i]
		ip := gw.Addr.String()
		connect := fmt.Sprintf("%s:%d", ip, gw.TLS)
		resolve := ip
		if gw.Addr.Is6() {
			connect, resolve = fmt.Sprintf("[%s]:%d", ip, gw.TLS), "["+ip+"]"
		}
		fmt.Fprintf(&b, `
by gateway %s, on %s:
  the site       curl --resolve %s:%d:%s http://%s:%d/
                 curl --cacert %s --resolve %s:%d:%s https://%s:%d/
  TCP echo       echo hello | nc -N %s %d
  UDP echo       echo hello | nc -u -w 1 %s %d
  its own TLS    curl --cacert %s --resolve %s:%d:%s https://%s:%d/
                 openssl s_client -connect %s -servername %s -CAfile %s -verify_return_error </dev/null
`, gw.Name, ip,
			site, gw.HTTP, resolve, site, gw.HTTP,
			gw.CAFile, site, gw.TLS, resolve, site, gw.TLS,
			ip, gw.TCP, ip, gw.TCP,
			g.TLSCert, vault, gw.TLS, resolve, vault, gw.TLS,
			connect, vault, g.TLSCert)
	}
	fmt.Fprintf(&b, "\nin a browser: http://%s:%d/\n", g.Exposures[0].Hosts[0], g.Gateways[0].HTTP)
	fmt.Fprintf(&b, "the nodes %s listen on nothing; what is written is below %s and goes with the demo\n", strings.Join(g.Nodes, " and "), g.Dir)
	b.WriteString("Ctrl-C ends it\n\n")
	return b.String()
}

const (
	statusEvery = 2 * time.Second
	widest      = 79 // characters of a line that is refreshed in place
)

// watch shows the status until ctx ends: in place on a terminal, else each
// change once.
func (v *demoVerb) watch(ctx context.Context, a *app, g *demo.Grid) error {
	inPlace := isTerminal(a.env.Stdout) && !v.Verbose
	shown := 0
	last := ""
	return v.follow(ctx, g, func(o webgw.Overview, err error) error {
		text := liveStatus(o, err)
		switch {
		case inPlace:
			if shown > 0 {
				a.printf("\x1b[%dA\x1b[J", shown) // up, and clear to the end
			}
			shown = 0
			for line := range strings.Lines(time.Now().Format("15:04:05 ") + text) {
				if r := []rune(line); len(r) > widest { // a line that wraps would be two
					line = string(r[:widest]) + "\n"
				}
				a.printf("%s", line)
				shown++
			}
		case text != last:
			a.printf("%s", text)
		}
		last = text
		return nil
	})
}

// stream prints what there is to try, then each status, as JSON.
func (v *demoVerb) stream(ctx context.Context, a *app, g *demo.Grid) error {
	type gateway struct {
		Name   string `json:"name"`
		Addr   string `json:"addr"`
		HTTP   uint16 `json:"httpPort"`
		TLS    uint16 `json:"tlsPort"`
		TCP    uint16 `json:"tcpPort"`
		CAFile string `json:"caFile"`
	}
	type exposure struct {
		Name     string                 `json:"name"`
		Protocol webgw.ExposureProtocol `json:"protocol"`
		Hosts    []string               `json:"hosts,omitempty"`
	}
	out := struct {
		Event     string     `json:"event"`
		Dir       string     `json:"dir"`
		TLSCert   string     `json:"tlsCert"`
		Gateways  []gateway  `json:"gateways"`
		Exposures []exposure `json:"exposures"`
	}{Event: "ready", Dir: g.Dir, TLSCert: g.TLSCert}
	for _, gw := range g.Gateways {
		out.Gateways = append(out.Gateways, gateway{gw.Name, gw.Addr.String(), gw.HTTP, gw.TLS, gw.TCP, gw.CAFile})
	}
	for _, e := range g.Exposures {
		out.Exposures = append(out.Exposures, exposure{e.Name, e.Protocol, e.Hosts})
	}
	if err := a.printJSON(out); err != nil {
		return err
	}
	last := ""
	return v.follow(ctx, g, func(o webgw.Overview, err error) error {
		now := liveStatus(o, err)
		if err != nil || now == last {
			return nil // the registry is asked again; nothing is decided by it
		}
		last = now
		byName(&o)
		return a.printJSON(struct {
			Event string `json:"event"`
			webgw.Overview
		}{"status", o})
	})
}

// follow shows the status again and again until ctx ends or a role does.
func (v *demoVerb) follow(ctx context.Context, g *demo.Grid, show func(webgw.Overview, error) error) error {
	ended := make(chan error, 1)
	go func() { ended <- g.Wait(ctx) }() // ends with ctx, or with the grid
	t := time.NewTicker(statusEvery)
	defer t.Stop()
	for {
		o, err := g.Status(ctx)
		if ctx.Err() == nil {
			if err := show(o, err); err != nil {
				return err
			}
		}
		select {
		case <-t.C:
		case err := <-ended:
			return err
		}
	}
}

// liveStatus is a line per part of the grid.
func liveStatus(o webgw.Overview, err error) string {
	if err != nil {
		return "the registry does not answer: " + printable(err.Error()) + "\n"
	}
	byName(&o)
	var b strings.Builder
	b.WriteString("status\n")
	for _, p := range o.Gateways {
		fmt.Fprintf(&b, "  %s gateway %-6s %s\n", mark(p.Up), printable(p.Name), printable(p.Why))
	}
	for _, p := range o.Nodes {
		fmt.Fprintf(&b, "  %s node %-9s %s\n", mark(p.Up), printable(p.Name), printable(p.Why))
	}
	for _, e := range o.Exposures {
		fmt.Fprintf(&b, "  %s exposure %-5s %s\n", mark(e.Up), printable(e.Key.Name), printable(e.Why))
	}
	return b.String()
}

// isTerminal reports whether w is a device that people look at.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
}
