package cli

import (
	"context"
	"strings"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/client/manifest"
	"webgw.dev/webgw/internal/idn"
)

type domainVerb struct {
	Check    domainCheck    `cmd:"" help:"Tell whether a host name is proved to be yours, which record is missing and what is seen now."`
	Claim    domainClaim    `cmd:"" help:"Hold a host name, whether or not anything is exposed there; also one that was offered to you."`
	Transfer domainTransfer `cmd:"" help:"Offer a host name of yours to another owner, who takes it by webgw domain claim or by exposing there."`
}

type domainCheck struct {
	Name string `arg:"" help:"Host name."`
	ownerFlags
}

func (v *domainCheck) Run(ctx context.Context, a *app) error {
	host, err := manifest.Host("name", v.Name, true)
	if err != nil {
		return err
	}
	c, err := a.connect(v.ownerFlags)
	if err != nil {
		return err
	}
	defer c.Close()
	d, err := c.Domain(ctx, host)
	if err != nil {
		return err
	}
	failed := error(nil)
	if d.Needed && !d.Proved {
		failed = &webgw.Error{Op: "check domain", Kind: webgw.Forbidden, Public: host + " is not proved to be yours", Hint: "set the record that is missing; resolvers may take as long to see it as its predecessor's TTL"}
	}
	if a.json {
		if err := a.printJSON(d); err != nil {
			return err
		}
		return failed
	}
	a.printf("%s %s\n", printable(idn.Both(host)), printable(d.Why))
	if !d.Free {
		a.printf("another owner holds this name\n")
	}
	if !d.Lapses.IsZero() {
		a.printf("the proof counts until %s (%s)\n", d.Lapses.Local().Format(time.RFC3339), until(d.Lapses, time.Now()))
	}
	if failed == nil {
		return nil
	}
	a.printf("one of these records is missing, whichever you like:\n")
	for _, w := range d.Want {
		a.printf("  %s. %s \"%s\"\n", printable(w.Name), w.Type, printable(w.Value))
	}
	a.printf("seen now:\n")
	for _, s := range d.Seen {
		what := s.Fault
		if len(s.Values) > 0 {
			what = `"` + strings.Join(s.Values, `" "`) + `"`
		}
		a.printf("  %s at %s: %s\n", printable(s.Name), printable(s.Resolver), printable(what))
	}
	return failed
}

type domainClaim struct {
	Name    string `arg:"" help:"Host name."`
	Subtree bool   `help:"And every name below it."`
	ownerFlags
}

func (v *domainClaim) Run(ctx context.Context, a *app) error {
	return a.claim(ctx, v.ownerFlags, v.Name, func(n *webgw.NameClaim) error {
		n.Subtree, n.To = v.Subtree, webgw.ID{}
		return nil
	})
}

type domainTransfer struct {
	Name string `arg:"" help:"Host name."`
	To   string `arg:"" help:"Identity of the new owner, as their webgw whoami prints it."`
	ownerFlags
}

func (v *domainTransfer) Run(ctx context.Context, a *app) error {
	return a.claim(ctx, v.ownerFlags, v.Name, func(n *webgw.NameClaim) (err error) {
		n.To, err = webgw.ParseID(v.To)
		return err
	})
}

// claim declares a claim of a host name, changed from what it was.
func (a *app) claim(ctx context.Context, f ownerFlags, name string, change func(*webgw.NameClaim) error) error {
	host, err := manifest.Host("name", name, false)
	if err != nil {
		return err
	}
	next := webgw.NameClaim{}
	c, err := a.connect(f)
	if err != nil {
		return err
	}
	defer c.Close()
	old, err := c.Get(ctx, webgw.Key{Kind: webgw.KindName, Owner: c.Key.ID(), Name: host})
	if err != nil && webgw.KindOf(err) != webgw.NotFound {
		return err
	}
	if err == nil && old.Record.Live(time.Now()) {
		next = *old.Record.NameClaim
	}
	if err := change(&next); err != nil {
		return err
	}
	return a.declareOne(ctx, c, webgw.Record{Kind: webgw.KindName, Name: host, NameClaim: &next}, old, false)
}

// declareOne declares a record for the default lifetime and prints what that
// changed; with dry, what it would.
func (a *app) declareOne(ctx context.Context, c *client.Client, r webgw.Record, old client.Signed, dry bool) error {
	now := time.Now()
	r.Version, r.Owner, r.Seq, r.Issued, r.Expires = 1, c.Key.ID(), 1, now, now.Add(manifest.DefaultLifetime)
	if err := r.Validate(); err != nil {
		return err
	}
	action, changes, err := difference(old.Record, &r, now)
	if err != nil {
		return err
	}
	out := results{DryRun: dry, Results: []result{{r.Kind, r.Name, action, changes}}}
	if dry || action == actionNothing {
		return a.printResults(out, nil)
	}
	if _, _, err := c.Declare(ctx, r); err != nil {
		return err
	}
	return a.printResults(out, nil)
}
