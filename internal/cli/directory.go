package cli

import (
	"context"
	"slices"
	"strings"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/client/manifest"
)

// directory finds gateways and nodes by name, and names by identity, among
// what the owner may see. It asks the registry once per kind. It implements
// manifest.Directory.
type directory struct {
	c    *client.Client
	seen map[webgw.Kind][]client.Signed
}

func newDirectory(c *client.Client) *directory {
	return &directory{c, map[webgw.Kind][]client.Signed{}}
}

func (d *directory) list(ctx context.Context, kind webgw.Kind) ([]client.Signed, error) {
	if all, ok := d.seen[kind]; ok {
		return all, nil
	}
	all, err := d.c.List(ctx, kind, webgw.ID{})
	if err == nil {
		d.seen[kind] = all
	}
	return all, err
}

// Lookup implements manifest.Directory.
func (d *directory) Lookup(ctx context.Context, kind webgw.Kind, name string) ([]webgw.ID, error) {
	all, err := d.list(ctx, kind)
	var ids []webgw.ID
	for _, s := range all {
		if s.Record.Name == name && !slices.Contains(ids, s.Record.Owner) {
			ids = append(ids, s.Record.Owner)
		}
	}
	return ids, err
}

// label returns the name of a gateway or node if it leads back to the
// identity, else "".
func (d *directory) label(ctx context.Context, kind webgw.Kind, id webgw.ID) (string, error) {
	all, err := d.list(ctx, kind)
	if err != nil {
		return "", err
	}
	for _, s := range all {
		if s.Record.Owner != id {
			continue
		}
		if ids, err := d.Lookup(ctx, kind, s.Record.Name); err == nil && len(ids) == 1 {
			return s.Record.Name, nil
		}
	}
	return "", nil
}

// call is what people are shown of an identity: its name, else its beginning.
func (d *directory) call(ctx context.Context, kind webgw.Kind, id webgw.ID) (string, error) {
	name, err := d.label(ctx, kind, id)
	if name == "" {
		name = id.Short()
	}
	return name, err
}

// target names a target for people, as "node address".
func (d *directory) target(ctx context.Context, t webgw.Target) (string, error) {
	if t.Direct != "" {
		return "direct " + t.Direct, nil
	}
	node, err := d.call(ctx, webgw.KindNode, t.Node)
	return node + " " + t.Address, err
}

// gateway returns the record of a gateway, or nil.
func (d *directory) gateway(ctx context.Context, id webgw.ID) (*webgw.Record, error) {
	all, err := d.list(ctx, webgw.KindGateway)
	for _, s := range all {
		if s.Record.Owner == id {
			return s.Record, err
		}
	}
	return nil, err
}

// find returns the one record of a kind that is meant: the asker's own, else
// the only one visible by this name or, for gateways and nodes, identity.
func (d *directory) find(ctx context.Context, kind webgw.Kind, name string) (client.Signed, error) {
	if kind == webgw.KindName || kind == webgw.KindZone {
		host, err := manifest.Host("name", name, false)
		if err != nil {
			return client.Signed{}, err
		}
		name = host
	}
	all, err := d.list(ctx, kind)
	if err != nil {
		return client.Signed{}, err
	}
	var found []client.Signed
	for _, s := range all {
		r := s.Record
		byID := (kind == webgw.KindGateway || kind == webgw.KindNode) && webgw.LooksLikeID(name) && strings.EqualFold(r.Owner.String(), name)
		switch {
		case r.Name == name && r.Owner == d.c.Key.ID():
			return s, nil
		case r.Name == name || byID:
			found = append(found, s)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return client.Signed{}, &webgw.Error{Op: "find record", Kind: webgw.NotFound, Public: "there is no " + string(kind) + " " + printable(name), Hint: "webgw get " + string(kind) + "s lists those that you may see"}
	}
	var owners []string
	for _, s := range found {
		owners = append(owners, s.Record.Owner.String())
	}
	hint := ""
	if kind == webgw.KindGateway || kind == webgw.KindNode {
		hint = "give one identity: " + strings.Join(owners, ", ")
	}
	return client.Signed{}, invalid("name", hint, "several owners have a %s %q", kind, name)
}
