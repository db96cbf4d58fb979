package ingress

import (
	"net/netip"
	"sync"
	"sync/atomic"
)

// doors counts who is inside, in all and per address.
type doors struct {
	total  atomic.Int64
	shards [64]shard
}

type shard struct {
	mu     sync.Mutex
	by     map[netip.Addr]int
	visits map[*visit]struct{}
}

// place is what connections are counted by: an IPv4 address, or the /64 that a
// single customer of IPv6 usually holds.
func place(a netip.Addr) netip.Addr {
	if !a.Is6() {
		return a
	}
	b := a.As16()
	clear(b[8:])
	return netip.AddrFrom16(b)
}

func (d *doors) shard(a netip.Addr) *shard { return &d.shards[spread(a)%uint32(len(d.shards))] }

// spread is FNV-1a: it only spreads, limits hold whatever it gives.
func spread(a netip.Addr) uint32 {
	h := uint32(2166136261)
	for _, c := range a.As16() {
		h = (h ^ uint32(c)) * 16777619
	}
	return h
}

// enter counts v in, or says which limit forbids it.
func (d *doors) enter(v *visit, limits *Limits) (reason string) {
	if d.total.Add(1) > int64(limits.Connections) {
		d.total.Add(-1)
		return reasonTotal
	}
	a := place(v.visitor.Addr())
	s := d.shard(a)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.by == nil {
		s.by, s.visits = map[netip.Addr]int{}, map[*visit]struct{}{}
	}
	if s.by[a] >= limits.PerAddress && !v.trusted {
		d.total.Add(-1)
		return reasonAddress
	}
	s.by[a]++
	v.counted = true
	s.visits[v] = struct{}{}
	return ""
}

// move counts v where its visitor really is, or says which limit forbids it.
// It is among those inside all the time.
func (d *doors) move(v *visit, visitor netip.AddrPort, limits *Limits) (reason string) {
	was, is := place(v.visitor.Addr()), place(visitor.Addr())
	old, s := d.shard(was), d.shard(is)
	s.mu.Lock()
	if s.by == nil {
		s.by, s.visits = map[netip.Addr]int{}, map[*visit]struct{}{}
	}
	if s.by[is] >= limits.PerAddress {
		s.mu.Unlock()
		return reasonAddress
	}
	s.by[is]++
	s.visits[v] = struct{}{}
	s.mu.Unlock()
	old.mu.Lock()
	if old.by[was]--; old.by[was] == 0 {
		delete(old.by, was)
	}
	if old != s {
		delete(old.visits, v)
	}
	v.visitor = visitor
	old.mu.Unlock()
	return ""
}

// uncount stops counting v against the limits.
func (d *doors) uncount(v *visit) {
	a := place(v.visitor.Addr())
	s := d.shard(a)
	s.mu.Lock()
	defer s.mu.Unlock()
	d.uncountLocked(s, v, a)
}

func (d *doors) uncountLocked(s *shard, v *visit, a netip.Addr) {
	if !v.counted {
		return
	}
	v.counted = false
	d.total.Add(-1)
	if s.by[a]--; s.by[a] == 0 {
		delete(s.by, a)
	}
}

// leave forgets v.
func (d *doors) leave(v *visit) {
	a := place(v.visitor.Addr())
	s := d.shard(a)
	s.mu.Lock()
	defer s.mu.Unlock()
	d.uncountLocked(s, v, a)
	delete(s.visits, v)
}

// each calls f, which must not wait, for everybody inside.
func (d *doors) each(f func(*visit)) {
	for i := range d.shards {
		s := &d.shards[i]
		s.mu.Lock()
		for v := range s.visits {
			f(v)
		}
		s.mu.Unlock()
	}
}

// adopt takes over from the table before what outlives a table: counters,
// health and idle connections. It returns the targets that nothing leads to
// any more. The table is not yet in use.
func (t *Table) adopt(old *Table) (retired []*target) {
	if old == nil {
		return nil
	}
	var routes []*Route
	if t != nil {
		for id, o := range old.owners {
			if t.owners[id] != nil {
				t.owners[id] = o
			}
		}
		for _, r := range t.routes {
			r.owner = t.owners[r.Key.Owner]
		}
		routes = t.routes
	}
	for _, was := range old.routes { // both are in the order of their keys
		for len(routes) > 0 && compareKeys(routes[0].Key, was.Key) < 0 {
			routes = routes[1:]
		}
		if len(routes) == 0 || routes[0].Key != was.Key {
			retired = append(retired, was.targets...)
			continue
		}
		r := routes[0]
		for _, target := range was.targets {
			if !r.take(target) {
				retired = append(retired, target)
			}
		}
		r.next.Store(was.next.Load())
		r.use = was.use
		r.guard = r.guard.adopt(was.guard)
	}
	if t != nil {
		for _, r := range t.routes {
			if r.rules != nil {
				r.link()
			}
		}
	}
	return retired
}

// take makes an earlier table's target the route's, if it leads there too.
func (r *Route) take(was *target) bool {
	for i, own := range r.targets {
		if own.Target == was.Target && own.secure.same(was.secure) {
			r.targets[i] = was
			return true
		}
	}
	return false
}

func newRoute(t *Table, d Declared) *Route {
	r := &Route{Key: d.Key, Exposure: d.Exposure, owner: t.owners[d.Key.Owner], use: &tally{}, guard: newGuard(d.Key, d.Exposure.Policy)}
	if r.owner == nil {
		r.owner = &tally{}
		t.owners[d.Key.Owner] = r.owner
	}
	for _, to := range d.Exposure.AllTargets() {
		r.targets = append(r.targets, &target{Target: to, secure: newSecure(d.Exposure, to)})
	}
	if r.rules = newRuleset(r); r.rules != nil {
		r.link()
	}
	return r
}
