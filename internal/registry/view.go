package registry

import (
	"cmp"
	"slices"
	"time"

	"webgw.dev/webgw"
)

// Scope is what a watch is for.
type Scope string

// The scopes.
const (
	ScopeGateway Scope = "gateway"
	ScopeNode    Scope = "node"
	ScopeOwner   Scope = "owner"
)

// visibleLocked reports whether id may see a record. What it may not see does
// not exist for it.
func (m *mirror) visibleLocked(id webgw.ID, e *entry) bool {
	if e.key.Owner == id {
		return true
	}
	switch e.key.Kind {
	case webgw.KindGateway, webgw.KindFarm:
		return true
	case webgw.KindExposure, webgw.KindZone:
		_, named := e.meta.Audience[id]
		return named
	case webgw.KindNode:
		if _, named := e.meta.Audience[id]; named {
			return true
		}
		// Owners and gateways of exposures that lead to the node.
		for _, x := range m.byNamed[e.key.Owner] {
			if x.key.Kind == webgw.KindExposure && targets(x, e.key.Owner) {
				if _, named := x.meta.Audience[id]; named || x.key.Owner == id {
					return true
				}
			}
		}
	}
	return false
}

func targets(x *entry, node webgw.ID) bool {
	return x.Record.Exposure.LeadsTo(func(t webgw.Target) bool { return t.Node == node })
}

// getLocked returns a record that id may see.
func (m *mirror) getLocked(id webgw.ID, k webgw.Key) (*entry, error) {
	if e := m.records[k]; e != nil && m.visibleLocked(id, e) {
		return e, nil
	}
	return nil, &webgw.Error{Kind: webgw.NotFound, Public: "there is no such record"}
}

// listLocked returns what id may see of a kind ("": every kind) and an owner
// (zero: every owner), in key order. withdrawn adds what is withdrawn or has
// expired and is still stored.
func (m *mirror) listLocked(id webgw.ID, kind webgw.Kind, owner webgw.ID, withdrawn bool, now time.Time) []*entry {
	found := map[webgw.Key]*entry{}
	add := func(set map[webgw.Key]*entry) {
		for k, e := range set {
			if (kind == "" || k.Kind == kind) && (owner.IsZero() || k.Owner == owner) && (withdrawn || e.Record.Live(now)) && found[k] == nil && m.visibleLocked(id, e) {
				found[k] = e
			}
		}
	}
	if !owner.IsZero() {
		add(m.byOwner[owner])
	} else {
		add(m.byOwner[id])
		add(m.byNamed[id])
		for _, k := range []webgw.Kind{webgw.KindGateway, webgw.KindFarm} {
			if kind == "" || kind == k {
				add(m.byKind[k])
			}
		}
		if kind == "" || kind == webgw.KindNode {
			for _, e := range m.nodesOfLocked(id) {
				add(map[webgw.Key]*entry{e.key: e})
			}
		}
	}
	out := make([]*entry, 0, len(found))
	for _, e := range found {
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b *entry) int { return cmp.Compare(a.key.String(), b.key.String()) })
	return out
}

// nodesOfLocked returns the nodes that exposures of id, or naming id, lead to.
func (m *mirror) nodesOfLocked(id webgw.ID) (nodes []*entry) {
	for _, set := range []map[webgw.Key]*entry{m.byOwner[id], m.byNamed[id]} {
		for k, x := range set {
			if k.Kind == webgw.KindExposure {
				nodes = append(nodes, m.targetsLocked(x)...)
			}
		}
	}
	return nodes
}

// targetsLocked returns the records of the nodes that an exposure leads to.
func (m *mirror) targetsLocked(x *entry) (nodes []*entry) {
	for _, t := range x.Record.Exposure.AllTargets() {
		nodes = append(nodes, m.ofLocked(webgw.KindNode, t.Node)...)
	}
	return nodes
}

// ofLocked returns the records of a kind that an identity owns.
func (m *mirror) ofLocked(kind webgw.Kind, id webgw.ID) (es []*entry) {
	for k, e := range m.byOwner[id] {
		if k.Kind == kind {
			es = append(es, e)
		}
	}
	return es
}

// withLocked returns what travels along with an exposure in a scope: a change
// of it can make them somebody's concern who never heard of them.
func (m *mirror) withLocked(scope Scope, x *entry) (es []*entry) {
	if scope != ScopeNode {
		return m.targetsLocked(x)
	}
	for _, g := range x.Record.Exposure.Gateways {
		es = append(es, m.ofLocked(webgw.KindGateway, g)...)
	}
	return es
}

// concernsLocked returns everything that concerns id in a scope and has
// changed, or may have come to concern it, after revision since; oldest first.
// That is all that a resumed watch has missed, whatever happened in between,
// because nothing is forgotten here before it has expired: no history is kept.
func (m *mirror) concernsLocked(scope Scope, id webgw.ID, since int64, now time.Time) []*entry {
	found := map[*entry]bool{}
	add := func(e *entry, with bool) {
		if (with || e.mod > since) && !e.Record.ExpiredAt(now) {
			found[e] = true
		}
	}
	exposure := func(x *entry) {
		add(x, false)
		for _, e := range m.withLocked(scope, x) {
			add(e, x.mod > since)
		}
	}
	own := func(kind webgw.Kind) {
		for _, e := range m.ofLocked(kind, id) {
			add(e, false)
		}
	}
	switch scope {
	case ScopeGateway:
		own(webgw.KindGateway)
	case ScopeNode:
		own(webgw.KindNode)
	case ScopeOwner:
		for k, e := range m.byOwner[id] {
			if k.Kind == webgw.KindExposure {
				exposure(e)
			} else {
				add(e, false)
			}
		}
		for _, e := range m.byKind[webgw.KindGateway] {
			add(e, false)
		}
	}
	for k, e := range m.byNamed[id] {
		switch {
		case scope == ScopeOwner && k.Kind == webgw.KindNode:
			add(e, false)
		case scope == ScopeGateway && k.Kind == webgw.KindZone:
			add(e, false)
		case scope != ScopeOwner && k.Kind == webgw.KindExposure:
			exposure(e)
		}
	}
	out := make([]*entry, 0, len(found))
	for e := range found {
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b *entry) int {
		return cmp.Or(cmp.Compare(a.mod, b.mod), cmp.Compare(a.key.String(), b.key.String()))
	})
	return out
}

// publishLocked hands a changed record to the watchers that it concerns. The
// work is proportional to those, not to all.
func (m *mirror) publishLocked(e *entry) {
	told := map[*watcher]bool{}
	tell := func(id webgw.ID, scope Scope, with ...*entry) {
		for w := range m.watchers[id] {
			if w.scope == scope && !told[w] {
				told[w] = true
				w.push(e.mod, append([]*entry{e}, with...))
			}
		}
	}
	if e.key.Kind != webgw.KindExposure {
		tell(e.key.Owner, ScopeOwner)
	}
	switch e.key.Kind {
	case webgw.KindZone:
		for id := range e.meta.Audience {
			tell(id, ScopeGateway)
		}
	case webgw.KindExposure:
		nodes, gateways := m.targetsLocked(e), m.withLocked(ScopeNode, e)
		tell(e.key.Owner, ScopeOwner, nodes...)
		for id := range e.meta.Audience {
			tell(id, ScopeGateway, nodes...)
			tell(id, ScopeNode, gateways...)
		}
	case webgw.KindGateway:
		tell(e.key.Owner, ScopeGateway)
		for w := range m.owners {
			if !told[w] {
				told[w] = true
				w.push(e.mod, []*entry{e})
			}
		}
		for _, x := range m.byNamed[e.key.Owner] {
			if x.key.Kind == webgw.KindExposure && slices.Contains(x.Record.Exposure.Gateways, e.key.Owner) {
				for id := range x.meta.Audience {
					tell(id, ScopeNode)
				}
			}
		}
	case webgw.KindNode:
		tell(e.key.Owner, ScopeNode)
		for id := range e.meta.Audience {
			tell(id, ScopeOwner)
		}
		for _, x := range m.byNamed[e.key.Owner] {
			if x.key.Kind == webgw.KindExposure && targets(x, e.key.Owner) {
				tell(x.key.Owner, ScopeOwner)
				for id := range x.meta.Audience {
					tell(id, ScopeGateway)
				}
			}
		}
	}
}
