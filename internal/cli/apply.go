package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client/manifest"
)

type applyVerb struct {
	Files  []string `name:"file" short:"f" required:"" help:"Manifests, several documents each; - is standard input." placeholder:"FILE"`
	DryRun bool     `help:"Show what would change, and change nothing."`
	ownerFlags
}

// What is done to a record.
const (
	actionCreate   = "create"
	actionChange   = "change"
	actionRenew    = "renew" // says the same for longer
	actionNothing  = "unchanged"
	actionWithdraw = "withdraw"
)

type results struct {
	DryRun  bool     `json:"dryRun,omitempty"`
	Results []result `json:"results"`
}

type result struct {
	Kind    webgw.Kind `json:"kind"`
	Name    string     `json:"name"`
	Action  string     `json:"action"`
	Changes []change   `json:"changes,omitempty"`
}

// change is one field that differs; "" stands for absent.
type change struct {
	Field string `json:"field"`
	From  string `json:"from"`
	To    string `json:"to"`
}

func (v *applyVerb) Run(ctx context.Context, a *app) error {
	ms, err := a.readManifests(v.Files)
	if err != nil {
		return err
	}
	c, err := a.connect(v.ownerFlags)
	if err != nil {
		return err
	}
	defer c.Close()
	// Everything is checked before anything is declared.
	type step struct {
		result
		m *manifest.Manifest
		r webgw.Record
	}
	var steps []step
	d := newDirectory(c)
	now := time.Now()
	for _, m := range ms {
		r, err := m.Record(ctx, c.Key.ID(), now, d)
		if err != nil {
			return err
		}
		old, err := c.Get(ctx, r.Key())
		if err != nil && webgw.KindOf(err) != webgw.NotFound {
			return err
		}
		action, changes, err := difference(old.Record, &r, now)
		if err != nil {
			return err
		}
		steps = append(steps, step{result{r.Kind, r.Name, action, changes}, m, r})
	}
	out := results{DryRun: v.DryRun, Results: []result{}}
	for _, s := range steps {
		if !v.DryRun && s.Action != actionNothing {
			s.r.Issued, s.r.Expires = time.Time{}, time.Now().Add(s.m.Lifetime)
			if _, _, err := c.Declare(ctx, s.r); err != nil {
				return a.printResults(out, s.m.Locate(err))
			}
		}
		out.Results = append(out.Results, s.result)
	}
	return a.printResults(out, nil)
}

// readManifests reads files in the order in which their records apply.
func (a *app) readManifests(files []string) ([]*manifest.Manifest, error) {
	var all []*manifest.Manifest
	where := map[string]manifest.Place{}
	for _, name := range files {
		data, shown := []byte(nil), name
		var err error
		if name == "-" {
			shown = "standard input"
			data, err = io.ReadAll(io.LimitReader(a.env.Stdin, manifest.MaxSize+1))
		} else {
			data, err = readFile(name)
		}
		if err != nil {
			return nil, err
		}
		ms, err := manifest.Parse(shown, data)
		if err != nil {
			return nil, err
		}
		for _, m := range ms {
			key := string(m.Kind) + " " + m.Name
			if first, ok := where[key]; ok {
				return nil, invalid("", "", "%s stands twice, at %s and %s", key, first, m.Place())
			}
			where[key] = m.Place()
		}
		all = append(all, ms...)
	}
	if len(all) == 0 {
		return nil, invalid("", "", "the files hold no documents")
	}
	slices.SortStableFunc(all, func(x, y *manifest.Manifest) int {
		return cmp.Compare(slices.Index(webgw.Kinds, x.Kind), slices.Index(webgw.Kinds, y.Kind))
	})
	return all, nil
}

// difference tells what declaring r would do to old (nil: there is none).
func difference(old, r *webgw.Record, now time.Time) (action string, changes []change, err error) {
	fresh, err := fields(r)
	if err != nil {
		return "", nil, err
	}
	if old == nil || !old.Live(now) {
		for _, f := range slices.Sorted(maps.Keys(fresh)) {
			changes = append(changes, change{Field: f, To: fresh[f]})
		}
		return actionCreate, changes, nil
	}
	stale, err := fields(old)
	if err != nil {
		return "", nil, err
	}
	all := maps.Clone(stale)
	maps.Copy(all, fresh)
	for _, f := range slices.Sorted(maps.Keys(all)) {
		if stale[f] != fresh[f] {
			changes = append(changes, change{f, stale[f], fresh[f]})
		}
	}
	switch life := r.Expires.Sub(r.Issued); {
	case len(changes) > 0:
		return actionChange, changes, nil
	case old.Expires.Sub(now) < life/2:
		return actionRenew, nil, nil
	}
	return actionNothing, nil, nil
}

// fields flattens what a record says into paths and JSON values.
func fields(r *webgw.Record) (map[string]string, error) {
	body := *r
	body.Owner, body.Issued, body.Expires, body.Seq, body.Version = webgw.ID{}, time.Time{}, time.Time{}, 0, 0
	raw, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	var tree map[string]any
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.UseNumber()
	if err := decoder.Decode(&tree); err != nil {
		return nil, err
	}
	out := map[string]string{}
	var walk func(path string, v any)
	walk = func(path string, v any) {
		switch x := v.(type) {
		case map[string]any:
			for k, e := range x {
				if path != "" {
					k = path + "." + k
				}
				walk(k, e)
			}
		case []any:
			for i, e := range x {
				walk(fmt.Sprintf("%s[%d]", path, i), e)
			}
		case nil:
		case string:
			if x == "" { // as in match.headers: there, and not absent
				x = `""`
			}
			out[path] = x
		default:
			out[path] = fmt.Sprint(x)
		}
	}
	for k, v := range tree {
		switch k {
		case "v", "owner", "seq", "issued", "expires", "kind", "name", "deleted":
		default: // the body; its name goes without saying
			walk("", v)
		}
	}
	life, err := manifest.Lifetime(r.Expires.Sub(r.Issued).Round(time.Second)).MarshalText()
	out["lifetime"] = string(life)
	return out, err
}

// printResults prints what was done before err, which it returns.
func (a *app) printResults(out results, err error) error {
	if a.json {
		return errors.Join(err, a.printJSON(out))
	}
	done := map[string]string{actionCreate: "created", actionChange: "changed", actionRenew: "renewed", actionNothing: "unchanged", actionWithdraw: "withdrawn"}
	for _, r := range out.Results {
		word := done[r.Action]
		if out.DryRun && r.Action != actionNothing {
			word = "would be " + word
		}
		a.printf("%s %s %s\n", r.Kind, printable(r.Name), word)
		if !out.DryRun && r.Action == actionCreate {
			continue
		}
		for _, c := range r.Changes {
			switch {
			case c.From == "":
				a.printf("  + %s: %s\n", c.Field, printable(c.To))
			case c.To == "":
				a.printf("  - %s: %s\n", c.Field, printable(c.From))
			default:
				a.printf("  ~ %s: %s -> %s\n", c.Field, printable(c.From), printable(c.To))
			}
		}
	}
	return err
}

var _ manifest.Directory = (*directory)(nil)
