package manifest

import (
	"context"
	"fmt"
	"strings"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/idn"
)

// Ref names a gateway or node: by the name of its record, or by its identity.
type Ref struct {
	Text string

	path string
	at   place
}

// UnmarshalText takes any text; it is judged when it is resolved.
func (r *Ref) UnmarshalText(text []byte) error {
	r.Text = string(text)
	return nil
}

// MarshalText gives the text.
func (r Ref) MarshalText() ([]byte, error) { return []byte(r.Text), nil }

// IsZero reports whether nothing is named.
func (r Ref) IsZero() bool { return r.Text == "" }

func (r *Ref) setPlace(path string, at place) { r.path, r.at = path, at }

// resolver turns references into identities, each name looked up once.
type resolver struct {
	ctx   context.Context
	dir   Directory
	doc   *document
	known map[resolved]webgw.ID
}

type resolved struct {
	kind webgw.Kind
	name string
}

func (res *resolver) all(kind webgw.Kind, refs []Ref) ([]webgw.ID, error) {
	var out []webgw.ID
	for _, r := range refs {
		id, err := res.one(kind, r)
		if err != nil {
			return nil, err
		}
		out = append(out, id)
	}
	return out, nil
}

func (res *resolver) targets(targets []target) (out []webgw.Target, err error) {
	for _, t := range targets {
		x := webgw.Target{Address: t.Address, Direct: t.Direct}
		if t.Node.Text != "" {
			if x.Node, err = res.one(webgw.KindNode, t.Node); err != nil {
				return nil, err
			}
		}
		out = append(out, x)
	}
	return out, nil
}

func (res *resolver) one(kind webgw.Kind, r Ref) (webgw.ID, error) {
	id, ok := res.known[resolved{kind, r.Text}]
	if ok {
		return id, nil
	}
	id, err := Resolve(res.ctx, res.dir, kind, r.path, r.Text)
	if e, ok := err.(*webgw.Error); ok {
		return id, &Error{res.doc.place(r.at), e}
	}
	if err == nil {
		res.known[resolved{kind, r.Text}] = id
	}
	return id, err
}

// Resolve returns the identity that text names: an identity itself, or the
// name of exactly one gateway or node that dir knows.
func Resolve(ctx context.Context, dir Directory, kind webgw.Kind, field, text string) (webgw.ID, error) {
	fail := func(k webgw.ErrorKind, hint, format string, args ...any) (webgw.ID, error) {
		return webgw.ID{}, &webgw.Error{Op: "resolve", Kind: k, Field: field, Public: fmt.Sprintf(format, args...), Hint: hint}
	}
	if text == "" {
		return fail(webgw.Invalid, "", "missing")
	}
	if webgw.LooksLikeID(text) {
		id, err := webgw.ParseID(text)
		if e, ok := err.(*webgw.Error); ok {
			return fail(webgw.Invalid, "", "%s", e.Public)
		}
		return id, err
	}
	if err := webgw.CheckLabel(field, text); err != nil {
		return webgw.ID{}, err
	}
	ids, err := dir.Lookup(ctx, kind, text)
	if err != nil {
		return webgw.ID{}, err
	}
	switch len(ids) {
	case 1:
		return ids[0], nil
	case 0:
		return fail(webgw.NotFound, "webgw get "+string(kind)+"s lists those that you may see; an identity always works", "there is no %s %q", kind, text)
	}
	var names []string
	for _, id := range ids {
		names = append(names, id.String())
	}
	return fail(webgw.Invalid, "give one identity: "+strings.Join(names, ", "), "%d %ss are called %q", len(ids), kind, text)
}

// Host brings a host name as people write it into the form that records hold:
// lower case, no trailing dot, and letters beyond ASCII in their IDNA form, by
// the rules of browsers (UTS #46, not transitional). What could be taken for
// another name is refused.
func Host(field, s string, wildcard bool) (string, error) { return idn.Host(field, s, wildcard) }
