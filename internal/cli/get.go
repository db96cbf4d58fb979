package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/client/manifest"
	"webgw.dev/webgw/internal/idn"
)

type getVerb struct {
	Kind string `arg:"" optional:"" help:"farm, gateway, node, name, zone, network or exposure; none is every kind."`
	Name string `arg:"" optional:"" help:"Name of the record."`
	YAML bool   `name:"yaml" help:"Print your records as manifests, which webgw apply takes."`
	All  bool   `help:"Show what is withdrawn or has expired and is still stored."`
	ownerFlags
}

func (v *getVerb) Run(ctx context.Context, a *app) error {
	var kind webgw.Kind
	if v.Kind != "" {
		var err error
		if kind, err = webgw.ParseKind(v.Kind); err != nil {
			return err
		}
	}
	c, err := a.connect(v.ownerFlags)
	if err != nil {
		return err
	}
	defer c.Close()
	d := newDirectory(c)
	var all []client.Signed
	switch {
	case v.Name != "" && v.All:
		s, err := c.Get(ctx, webgw.Key{Kind: kind, Owner: c.Key.ID(), Name: v.Name})
		if err != nil {
			return err
		}
		all = append(all, s)
	case v.Name != "":
		s, err := d.find(ctx, kind, v.Name)
		if err != nil {
			return err
		}
		all = append(all, s)
	case v.All:
		if all, err = c.ListAll(ctx, kind, webgw.ID{}); err != nil {
			return err
		}
	default:
		if all, err = c.List(ctx, kind, webgw.ID{}); err != nil {
			return err
		}
	}
	switch {
	case v.YAML:
		return v.manifests(ctx, a, d, all)
	case a.json:
		out := struct {
			Records []*webgw.Record `json:"records"`
		}{[]*webgw.Record{}}
		for _, s := range all {
			out.Records = append(out.Records, s.Record)
		}
		return a.printJSON(out)
	}
	rows := [][]string{{"KIND", "NAME", "OWNER", "EXPIRES", "WHAT"}}
	now := time.Now()
	for _, s := range all {
		r := s.Record
		owner := r.Owner.Short()
		if r.Owner == c.Key.ID() {
			owner = "you"
		}
		expires := until(r.Expires, now)
		if r.Deleted {
			expires = "withdrawn"
		}
		what, err := summary(ctx, d, r)
		if err != nil {
			return err
		}
		rows = append(rows, []string{string(r.Kind), idn.Both(r.Name), owner, expires, what})
	}
	if len(rows) == 1 {
		a.notef("there is nothing\n")
		return nil
	}
	return a.table(rows)
}

// manifests prints what apply reads back: the asker's own records.
func (v *getVerb) manifests(ctx context.Context, a *app, d *directory, all []client.Signed) error {
	var failed error
	label := func(kind webgw.Kind, id webgw.ID) string {
		name, err := d.label(ctx, kind, id)
		if err != nil {
			failed = err
		}
		return name
	}
	n := 0
	for _, s := range all {
		r := s.Record
		own := r.Owner == d.c.Key.ID() && r.Kind != webgw.KindGateway && r.Kind != webgw.KindNode
		if !own && v.Name == "" || r.Deleted {
			continue
		}
		text, err := manifest.Format(r, label)
		if err != nil {
			return err
		}
		if failed != nil {
			return failed
		}
		if n > 0 {
			a.printf("---\n")
		}
		a.printf("%s", printableLines(string(text)))
		n++
	}
	return nil
}

// summary tells in a few words what a record says.
func summary(ctx context.Context, d *directory, r *webgw.Record) (string, error) {
	switch {
	case r.Exposure != nil:
		e := r.Exposure
		hosts := make([]string, len(e.Hosts))
		for i, h := range e.Hosts {
			hosts[i] = idn.Both(h)
		}
		what := strings.Join(hosts, " ")
		if ports, ok := e.Ports(); ok {
			what = strings.TrimSpace(what + " port " + ports.String())
		}
		var targets, gateways []string
		for _, t := range e.AllTargets() {
			s, err := d.target(ctx, t)
			if err != nil {
				return "", err
			}
			targets = append(targets, spread(e, s))
		}
		for _, g := range e.Gateways {
			s, err := d.call(ctx, webgw.KindGateway, g)
			if err != nil {
				return "", err
			}
			gateways = append(gateways, s)
		}
		return fmt.Sprintf("%s %s -> %s via %s", e.Protocol, what, strings.Join(targets, ", "), strings.Join(gateways, ", ")), nil
	case r.Gateway != nil:
		g := r.Gateway
		what := strings.Join(g.Addresses, " ")
		if g.Zone != "" {
			what += ", zone " + g.Zone
		}
		if g.Ports != "" {
			what += ", ports " + string(g.Ports)
		}
		return what, nil
	case r.Node != nil:
		return "for " + count(len(r.Node.Owners), "owner"), nil
	case r.NameClaim != nil && r.NameClaim.Subtree:
		return "and every name below", nil
	case r.Zone != nil:
		return count(len(r.Zone.Records), "record"), nil
	case r.Farm != nil:
		return count(len(r.Farm.Nodes), "node") + ", " + count(len(r.Farm.Gateways), "gateway"), nil
	case r.Network != nil:
		return fmt.Sprintf("%v, %s", r.Network.Ranges, count(len(r.Network.Members), "member")), nil
	}
	return "", nil
}

type deleteVerb struct {
	Kind  string   `arg:"" optional:"" help:"Kind of the record."`
	Names []string `arg:"" optional:"" help:"Names of the records."`
	Files []string `name:"file" short:"f" help:"Withdraw what these manifests declare; - is standard input." placeholder:"FILE"`
	ownerFlags
}

func (v *deleteVerb) Run(ctx context.Context, a *app) error {
	type wanted struct {
		kind webgw.Kind
		name string
	}
	var all []wanted
	switch {
	case len(v.Files) > 0 && v.Kind != "":
		return invalid("", "", "give either a kind and names, or files")
	case len(v.Files) > 0:
		ms, err := a.readManifests(v.Files)
		if err != nil {
			return err
		}
		for i := len(ms) - 1; i >= 0; i-- { // what refers before what it refers to
			all = append(all, wanted{ms[i].Kind, ms[i].Name})
		}
	case v.Kind == "" || len(v.Names) == 0:
		return invalid("", "webgw delete exposure blog", "give a kind and a name, or files by -f")
	default:
		kind, err := webgw.ParseKind(v.Kind)
		if err != nil {
			return err
		}
		for _, n := range v.Names {
			if kind == webgw.KindName || kind == webgw.KindZone {
				if n, err = manifest.Host("name", n, false); err != nil {
					return err
				}
			}
			all = append(all, wanted{kind, n})
		}
	}
	c, err := a.connect(v.ownerFlags)
	if err != nil {
		return err
	}
	defer c.Close()
	out := results{Results: []result{}}
	for _, w := range all {
		old, err := c.Get(ctx, webgw.Key{Kind: w.kind, Owner: c.Key.ID(), Name: w.name})
		if err == nil && old.Record.Deleted || webgw.KindOf(err) == webgw.NotFound {
			err = &webgw.Error{Op: "withdraw", Kind: webgw.NotFound, Public: fmt.Sprintf("you have no %s %s", w.kind, printable(w.name)), Hint: "webgw get lists what you have"}
		}
		if err == nil {
			_, err = c.Delete(ctx, old.Record.Key())
		}
		if err != nil {
			return a.printResults(out, err)
		}
		out.Results = append(out.Results, result{Kind: w.kind, Name: w.name, Action: actionWithdraw})
	}
	return a.printResults(out, nil)
}
