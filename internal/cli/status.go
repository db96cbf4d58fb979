package cli

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/idn"
)

type statusVerb struct {
	ownerFlags
}

func (v *statusVerb) Run(ctx context.Context, a *app) error {
	c, err := a.connect(v.ownerFlags)
	if err != nil {
		return err
	}
	defer c.Close()
	o, err := c.Status(ctx)
	if err != nil {
		return err
	}
	byName(&o)
	if a.json {
		return a.printJSON(o)
	}
	d := newDirectory(c)
	if len(o.Gateways)+len(o.Nodes)+len(o.Exposures) == 0 {
		a.printf("the registry answers; there are no gateways, and you have declared nothing\n")
		return nil
	}
	for _, p := range o.Gateways {
		a.printf("%s gateway %s: %s\n", mark(p.Up), printable(p.Name), printable(p.Why))
	}
	for _, p := range o.Nodes {
		a.printf("%s node %s: %s\n", mark(p.Up), printable(p.Name), printable(p.Why))
	}
	now := time.Now()
	for _, e := range o.Exposures {
		whose := ""
		if e.Key.Owner != c.Key.ID() {
			whose = " of " + e.Key.Owner.Short()
		}
		a.printf("%s exposure %s%s: %s\n", mark(e.Up), printable(e.Key.Name), whose, printable(e.Why))
		for _, w := range e.Warnings {
			a.printf("     %s\n", printable(w))
		}
		if e.Key.Owner == c.Key.ID() {
			s, err := d.find(ctx, webgw.KindExposure, e.Key.Name)
			if err != nil && webgw.KindOf(err) != webgw.NotFound { // withdrawn meanwhile
				return err
			}
			if err == nil {
				if left := s.Record.Expires.Sub(now); left < s.Record.Expires.Sub(s.Record.Issued)/10 {
					a.printf("     it ends in %s; declare it again to keep it\n", until(s.Record.Expires, now))
				}
			}
		}
	}
	return nil
}

// byName sorts an overview as people look for things.
func byName(o *webgw.Overview) {
	party := func(a, b webgw.PartyStatus) int { return cmp.Or(cmp.Compare(a.Name, b.Name), a.ID.Compare(b.ID)) }
	slices.SortFunc(o.Gateways, party)
	slices.SortFunc(o.Nodes, party)
	slices.SortFunc(o.Exposures, func(a, b webgw.ExposureStatus) int {
		return cmp.Or(cmp.Compare(a.Key.Name, b.Key.Name), a.Key.Owner.Compare(b.Key.Owner))
	})
}

func mark(up bool) string {
	if up {
		return "up  "
	}
	return "DOWN"
}

type describeVerb struct {
	Kind string `arg:"" help:"farm, gateway, node, name, zone, network or exposure."`
	Name string `arg:"" help:"Name of the record, or the identity of a gateway or node."`
	ownerFlags
}

type describeJSON struct {
	Record *webgw.Record         `json:"record"`
	Live   bool                  `json:"live"`
	URLs   []string              `json:"urls,omitempty"`   // of an exposure
	Status *webgw.ExposureStatus `json:"status,omitempty"` // of an exposure
	Party  *webgw.PartyStatus    `json:"party,omitempty"`  // of a gateway or node
}

func (v *describeVerb) Run(ctx context.Context, a *app) error {
	kind, err := webgw.ParseKind(v.Kind)
	if err != nil {
		return err
	}
	c, err := a.connect(v.ownerFlags)
	if err != nil {
		return err
	}
	defer c.Close()
	d := newDirectory(c)
	s, err := d.find(ctx, kind, v.Name)
	if err != nil {
		return err
	}
	r, now := s.Record, time.Now()
	out := describeJSON{Record: r, Live: r.Live(now)}
	o, err := c.Status(ctx)
	if err != nil {
		return err
	}
	for _, e := range o.Exposures {
		if e.Key == r.Key() {
			out.Status = &e
		}
	}
	for _, p := range append(o.Gateways, o.Nodes...) {
		if p.ID == r.Owner && p.Name == r.Name && (r.Kind == webgw.KindGateway || r.Kind == webgw.KindNode) {
			out.Party = &p
		}
	}
	if r.Exposure != nil {
		if out.URLs, err = urls(ctx, d, r.Exposure); err != nil {
			return err
		}
	}
	if a.json {
		return a.printJSON(out)
	}
	signer := r.Owner.String()
	if r.Owner == c.Key.ID() {
		signer += " (you)"
	}
	a.printf("%s %s\n", r.Kind, printable(idn.Both(r.Name)))
	line := func(what, format string, args ...any) {
		a.printf("  %-12s %s\n", what, printable(fmt.Sprintf(format, args...)))
	}
	line("signed by", "%s", signer)
	line("version", "%d, of %s", r.Seq, r.Issued.Local().Format(time.RFC3339))
	line("expires", "%s (in %s)", r.Expires.Local().Format(time.RFC3339), until(r.Expires, now))
	if out.Party != nil {
		line("state", "%s: %s", strings.TrimSpace(mark(out.Party.Up)), out.Party.Why)
	}
	if e := r.Exposure; e != nil {
		line("protocol", "%s", e.Protocol)
		for _, t := range e.AllTargets() {
			name, err := d.target(ctx, t)
			if err != nil {
				return err
			}
			line("target", "%s", name)
		}
		for _, u := range out.URLs {
			line("public", "%s", u)
		}
		for _, h := range e.Hosts {
			if shown := idn.Unicode(h); shown != "" {
				line("reads", "%s", shown)
			}
		}
		all, err := fields(r)
		if err != nil {
			return err
		}
		for _, f := range sortedKeys(all) {
			if rest, ok := strings.CutPrefix(f, "policy."); ok {
				line("policy", "%s: %s", rest, brief(all[f]))
			}
		}
		if out.Status != nil {
			line("state", "%s: %s", strings.TrimSpace(mark(out.Status.Up)), out.Status.Why)
			for _, w := range out.Status.Warnings {
				line("warning", "%s", w)
			}
			for _, w := range out.Status.Gateways {
				line("gateway", "%s %s: %s", w.Name, strings.TrimSpace(mark(w.Up)), w.Why)
			}
		}
		return nil
	}
	all, err := fields(r)
	if err != nil {
		return err
	}
	delete(all, "lifetime")
	for _, f := range sortedKeys(all) {
		line(f, "%s", all[f])
	}
	return nil
}

// brief is a value in at most so many characters, on one line: certificates and
// sealed secrets say nothing to people.
func brief(s string) string {
	const most = 60
	first, more, _ := strings.Cut(s, "\n")
	if len(first) > most {
		return strings.ToValidUTF8(first[:most], "") + "…"
	}
	if more != "" {
		return first + "…"
	}
	return first
}
