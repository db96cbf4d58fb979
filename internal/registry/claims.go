package registry

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/store"
)

// holding is the value of an index key: who holds something of which there is
// one per grid, and through which records.
type holding struct {
	Owner webgw.ID `json:"owner"`
	Uses  []use    `json:"uses,omitempty"`
	// Until, in Unix seconds, is how long a holding without uses stays its
	// owner's, and Subtree whether it covered the names below.
	Until   int64 `json:"until,omitempty"`
	Subtree bool  `json:"subtree,omitempty"`

	mod int64
}

// use is one record that holds it.
type use struct {
	Record  webgw.Key `json:"record"`
	Subtree bool      `json:"subtree,omitempty"` // a name claim with everything below
	Zone    bool      `json:"zone,omitempty"`    // a gateway's zone
	Port    uint16    `json:"port,omitempty"`    // a host name on this port alone; 0: on the gateways' own
	Shared  bool      `json:"shared,omitempty"`  // a port, together with others of this kind
}

// as reports whether u is held for what c claims.
func (u use) as(c claim) bool {
	return u.Subtree == c.subtree && u.Zone == c.zone && u.Port == c.on && u.Shared == c.shared
}

func (h *holding) use(k webgw.Key) (use, bool) {
	if h != nil {
		for _, u := range h.Uses {
			if u.Record == k {
				return u, true
			}
		}
	}
	return use{}, false
}

// claim is one thing that a record wants to hold.
type claim struct {
	key     string // index key without prefix
	field   string // of the record, for errors
	host    string // for host names
	port    int    // for ports: index of the gateway
	subtree bool
	zone    bool
	on      uint16 // for host names: the port, if it is not the gateways' own
	shared  bool
}

// claims lists what a record holds, in the order of its fields.
func claims(r *webgw.Record) []claim {
	host := func(field, h string) claim { return claim{key: "host/" + h, field: field, host: h} }
	switch r.Kind {
	case webgw.KindFarm, webgw.KindNode:
		return []claim{{key: string(r.Kind) + "/" + r.Name, field: "name"}}
	case webgw.KindGateway:
		cs := []claim{{key: "gateway/" + r.Name, field: "name"}}
		if r.Gateway.Zone != "" {
			c := host("gateway.zone", r.Gateway.Zone)
			c.zone = true
			cs = append(cs, c)
		}
		return cs
	case webgw.KindName:
		c := host("name", r.Name)
		c.subtree = r.NameClaim.Subtree
		return []claim{c}
	case webgw.KindZone:
		// What lies below is in the zone's data, and so its owner's to say.
		c := host("name", r.Name)
		c.subtree = true
		return []claim{c}
	case webgw.KindExposure:
		var cs []claim
		for i, h := range r.Exposure.Hosts {
			c := host(fmt.Sprintf("exposure.hosts[%d]", i), h)
			c.on = r.Exposure.Port
			cs = append(cs, c)
		}
		if ports, ok := r.Exposure.Ports(); ok {
			for i, g := range r.Exposure.Gateways {
				cs = append(cs, claim{key: portSpace(g, r.Exposure.Protocol).key(ports), field: "exposure.port", port: i, shared: r.Exposure.SharesPort()})
			}
		}
		return cs
	}
	return nil
}

// hosts counts the host names among a record's claims.
func hosts(r *webgw.Record) int {
	switch {
	case r.Exposure != nil:
		return len(r.Exposure.Hosts)
	case r.NameClaim != nil, r.Zone != nil, r.Gateway != nil && r.Gateway.Zone != "":
		return 1
	}
	return 0
}

// audience lists whom a version of a record names and who must therefore hear
// of it and of every later one.
func audience(r *webgw.Record) (ids []webgw.ID) {
	switch r.Kind {
	case webgw.KindExposure:
		ids = append(ids, r.Exposure.Gateways...)
		for _, t := range r.Exposure.AllTargets() {
			if !t.Node.IsZero() {
				ids = append(ids, t.Node)
			}
		}
	case webgw.KindZone:
		ids = r.Zone.Gateways
	case webgw.KindNode:
		ids = append(ids, r.Node.Owners...)
		if !r.Node.Farmer.IsZero() {
			ids = append(ids, r.Node.Farmer)
		}
	}
	return ids
}

// plan works out one transaction against the mirror, which stays locked for
// reading meanwhile. Everything that it relies on becomes a condition.
type plan struct {
	m     *mirror
	now   time.Time
	grace time.Duration
	quota Quota
	owner webgw.ID

	conds map[string]int64 // store key to revision
	ops   map[string]store.Op
}

func newPlan(m *mirror, now time.Time, grace time.Duration, quota Quota) *plan {
	return &plan{m: m, now: now, grace: grace, quota: quota, conds: map[string]int64{}, ops: map[string]store.Op{}}
}

// txn returns the transaction in a fixed order.
func (p *plan) txn() (conds []store.Cond, ops []store.Op) {
	for k, mod := range p.conds {
		conds = append(conds, store.Cond{Key: k, Mod: mod})
	}
	for _, op := range p.ops {
		ops = append(ops, op)
	}
	slices.SortFunc(conds, func(a, b store.Cond) int { return strings.Compare(a.Key, b.Key) })
	slices.SortFunc(ops, func(a, b store.Op) int { return strings.Compare(a.Key, b.Key) })
	return conds, ops
}

func (p *plan) onRecord(k webgw.Key) {
	var mod int64
	if e := p.m.records[k]; e != nil {
		mod = e.mod
	}
	p.on(recordKey(k), mod)
}

func (p *plan) onHolding(key string) *holding {
	h := p.m.holdings[key]
	var mod int64
	if h != nil {
		mod = h.mod
	}
	p.on(prefixIndex+key, mod)
	return h
}

func (p *plan) on(key string, mod int64) {
	if odd, ok := p.m.odd[key]; ok {
		mod = odd
	}
	p.conds[key] = mod
}

func (p *plan) putHolding(key string, h holding) error {
	v, err := json.Marshal(h)
	if err != nil {
		return err
	}
	p.ops[prefixIndex+key] = store.Op{Key: prefixIndex + key, Value: v}
	return nil
}

// live returns the uses of a holding whose records count now, and until when
// it stays its owner's if there is none. That a record does not count any more
// becomes a condition: a renewal in the same instant must not slip through.
func (p *plan) live(key string, h *holding) (uses []use, until time.Time) {
	uses, until = p.unjudged(key, h)
	if p.m.proving {
		uses = slices.DeleteFunc(uses, func(u use) bool { return !p.standing(key, u) })
	}
	return uses, until
}

// unjudged is live without a look at proofs.
func (p *plan) unjudged(key string, h *holding) (uses []use, until time.Time) {
	if h == nil {
		return nil, time.Time{}
	}
	grace := p.grace
	if strings.HasPrefix(key, portPrefix) {
		grace = 0
	}
	if h.Until != 0 {
		until = time.Unix(h.Until, 0)
	}
	for _, u := range h.Uses {
		e := p.m.records[u.Record]
		if e != nil && e.Record.Live(p.now) {
			uses = append(uses, u)
			continue
		}
		p.onRecord(u.Record)
		if e != nil && !e.Record.Deleted {
			if end := e.Record.Expires.Add(webgw.MaxSkew + grace); end.After(until) {
				until = end
			}
		}
	}
	return uses, until
}

// others reports whether somebody else than the owner holds key.
func (p *plan) others(key string) bool {
	h := p.m.holdings[key]
	if h == nil {
		return false
	}
	uses, until := p.live(key, h)
	if len(uses) == 0 {
		return h.Owner != p.owner && p.now.Before(until)
	}
	return !slices.ContainsFunc(uses, func(u use) bool { return u.Record.Owner == p.owner })
}

// subtree reports whether key is held with everything below it.
func (p *plan) subtree(key string) bool {
	h := p.m.holdings[key]
	uses, until := p.live(key, h)
	if h == nil {
		return false
	}
	if len(uses) > 0 {
		return slices.ContainsFunc(uses, func(u use) bool { return u.Subtree })
	}
	return p.now.Before(until) && (h.Subtree || slices.ContainsFunc(h.Uses, func(u use) bool { return u.Subtree }))
}

// zone reports whether host is the apex of the grid's zone or of a live
// gateway's.
func (p *plan) zone(host string) bool {
	if host == p.m.grid {
		return true
	}
	key := "host/" + host
	uses, _ := p.unjudged(key, p.m.holdings[key])
	return slices.ContainsFunc(uses, func(u use) bool { return u.Zone })
}

// inZone reports whether host lies below the apex of such a zone.
func (p *plan) inZone(host string) bool {
	for a := above(host); a != ""; a = above(a) {
		if p.zone(a) {
			return true
		}
	}
	return false
}

func taken(field, hint, format string, args ...any) error {
	return &webgw.Error{Kind: webgw.Taken, Field: field, Public: fmt.Sprintf(format, args...), Hint: hint}
}

// take makes the record hold one claim, or says who is in the way.
func (p *plan) take(r *webgw.Record, c claim) error {
	self := r.Key()
	h := p.onHolding(c.key)
	uses, _ := p.live(c.key, h)
	old := p.m.records[self]
	had, has := h.use(self)
	if err := p.proved(r, c); err != nil {
		return err
	}
	mine := has && old != nil && old.Record.Live(p.now)
	if mine && had.as(c) {
		return nil // as before
	}
	if c.host != "" {
		if err := p.takeHost(r, c, uses); err != nil {
			return err
		}
	} else if strings.HasPrefix(c.key, portPrefix) {
		if err := p.takePorts(r, c); err != nil {
			return err
		}
	} else if p.others(c.key) || slices.ContainsFunc(uses, func(u use) bool { return u.Record != self }) {
		// A name is one record's, even among those of one owner.
		return taken(c.field, "choose another name", "the %s name %q is taken", r.Kind, r.Name)
	}
	next := holding{Owner: p.owner}
	if c.host != "" && p.others(c.key) && p.offered(uses) {
		uses = nil // handed over
	} else if h != nil && len(uses) > 0 {
		next.Owner = h.Owner // a shared zone stays with whoever had it first
	}
	for _, u := range uses {
		if u.Record != self {
			next.Uses = append(next.Uses, u)
		}
	}
	next.Uses = append(next.Uses, use{Record: self, Subtree: c.subtree, Zone: c.zone, Port: c.on, Shared: c.shared})
	return p.putHolding(c.key, next)
}

// takeHost judges a host name against every name that bears on it.
func (p *plan) takeHost(r *webgw.Record, c claim, uses []use) error {
	self := r.Key()
	// Whatever is decided here holds only as long as no name comes in between
	// anywhere in the domain: whoever takes one there writes the guard.
	guard := prefixGuard + domain(c.host)
	p.on(guard, p.m.guards[domain(c.host)])
	p.ops[guard] = store.Op{Key: guard}

	if p.others(c.key) && !(c.zone && p.sharesZone(r, uses)) && !p.offered(uses) {
		return taken(c.field, "choose another name", "%q is held by another owner", c.host)
	}
	if err := p.besideGrid(c); err != nil {
		return err
	}
	if r.Kind == webgw.KindExposure {
		for _, u := range uses {
			if u.Record.Kind == webgw.KindExposure && u.Record != self && u.Port == c.on {
				return taken(c.field, "withdraw it there first", "%q is in your exposure %q already", c.host, u.Record.Name)
			}
		}
	}
	parent := above(c.host)
	label, _, _ := strings.Cut(c.host, ".")
	if label == "*" {
		for kid := range p.m.kids[parent] {
			if kid != c.host && p.others("host/"+kid) {
				return taken(c.field, "name each host instead", "%q would cover a name that another owner holds", c.host)
			}
		}
		if p.zone(parent) && p.others("host/"+parent) {
			return taken(c.field, "name each host instead", "%q would cover the whole zone of a gateway", c.host)
		}
	} else if p.others("host/*." + parent) {
		return taken(c.field, "choose another name", "%q is covered by a wildcard that another owner holds", c.host)
	}
	if c.zone && p.others("host/*."+c.host) {
		return taken(c.field, "choose another zone", "another owner holds the wildcard over %q", c.host)
	}
	if c.subtree && p.othersBelow(c.host) {
		return taken(c.field, "claim the name without what lies below", "another owner holds a name below %q", c.host)
	}
	for a := parent; a != ""; a = above(a) {
		key := "host/" + a
		if a == p.m.grid && reserved(labelBelow(c.host, a)) {
			return taken(c.field, "choose another name", "%q is reserved in the grid's zone %q", c.host, a)
		}
		if !p.others(key) {
			continue
		}
		if p.subtree(key) {
			return taken(c.field, "choose another name", "another owner holds %q with everything below it", a)
		}
		if p.inZone(a) {
			// Names in a zone are given out one by one; what lies below one could
			// pass for it, and set its cookies. Elsewhere, DNS says who may.
			return taken(c.field, "choose another name", "another owner holds %q, above it", a)
		}
		if p.zone(a) && reserved(labelBelow(c.host, a)) {
			return taken(c.field, "choose another name", "%q is reserved for the gateway of %q", c.host, a)
		}
	}
	return nil
}

// besideGrid judges a host name against the zone of the grid, which is nobody's.
func (p *plan) besideGrid(c claim) error {
	grid := p.m.grid
	covered := c.subtree || c.zone
	switch {
	case grid == "":
		return nil
	case c.host == grid:
		return taken(c.field, "every gateway answers for it by itself", "%q is the grid's own zone", c.host)
	case c.host == "*."+grid:
		return taken(c.field, "name each host instead", "%q would cover the whole zone of the grid", c.host)
	case c.host == "*."+above(grid), covered && webgw.Under(grid, c.host):
		return taken(c.field, "choose another name", "%q would cover the grid's zone %q", c.host, grid)
	}
	return nil
}

// offered reports whether the owner of a name, who has nothing there but their
// claim, has signed in it that the planner's owner may take it. The offer must
// still stand when the name is taken: it becomes a condition.
func (p *plan) offered(uses []use) bool {
	if len(uses) != 1 || uses[0].Record.Kind != webgw.KindName {
		return false
	}
	e := p.m.records[uses[0].Record]
	if e == nil || e.Record.NameClaim.To != p.owner {
		return false
	}
	p.onRecord(uses[0].Record)
	return true
}

// othersBelow reports whether anybody else holds a name below host.
func (p *plan) othersBelow(host string) bool {
	for kid := range p.m.kids[host] {
		if p.others("host/"+kid) || p.othersBelow(kid) {
			return true
		}
	}
	return false
}

// sharesZone reports whether a gateway may share the zone of those that have
// it: all of them name one farmer, and that farmer's farm lists the newcomer.
// A gateway's word alone that it belongs to somebody would be anybody's.
func (p *plan) sharesZone(r *webgw.Record, uses []use) bool {
	farmer := r.Gateway.Farmer
	if farmer.IsZero() || len(uses) == 0 {
		return false
	}
	for _, u := range uses {
		e := p.m.records[u.Record]
		if !u.Zone || e == nil || e.Record.Gateway == nil || e.Record.Gateway.Farmer != farmer {
			return false
		}
		p.onRecord(u.Record)
	}
	for k, e := range p.m.byOwner[farmer] {
		if k.Kind == webgw.KindFarm && e.Record.Live(p.now) && slices.Contains(e.Record.Farm.Gateways, r.Owner) {
			p.onRecord(k)
			return true
		}
	}
	return false
}

// release takes a record off one claim that it no longer makes. at is when the
// grace begins.
func (p *plan) release(k webgw.Key, c claim, at time.Time) error {
	if _, ours := p.m.holdings[c.key].use(k); !ours {
		return nil // lost after an expiry
	}
	h := p.onHolding(c.key)
	uses, until := p.live(c.key, h)
	next := holding{Owner: h.Owner}
	for _, u := range uses {
		if u.Record != k {
			next.Uses = append(next.Uses, u)
		}
	}
	if n := len(next.Uses); n > 0 {
		if !slices.ContainsFunc(next.Uses, func(u use) bool { return u.Record.Owner == h.Owner }) {
			next.Owner = next.Uses[0].Record.Owner
		}
		return p.putHolding(c.key, next)
	}
	grace := p.grace
	if strings.HasPrefix(c.key, portPrefix) {
		grace = 0
	}
	if end := at.Add(grace); end.After(until) {
		until = end
	}
	if !until.After(p.now) {
		key := prefixIndex + c.key
		p.ops[key] = store.Op{Key: key, Delete: true}
		return nil
	}
	next.Until = until.Unix() + 1
	next.Subtree = c.subtree
	return p.putHolding(c.key, next)
}

// referGateways checks that the gateways that a field names exist.
func (p *plan) referGateways(field string, ids []webgw.ID) error {
	for i, id := range ids {
		if p.m.gatewayLocked(id, p.now) == nil {
			return &webgw.Error{Kind: webgw.NotFound, Field: fmt.Sprintf("%s[%d]", field, i), Public: fmt.Sprintf("there is no gateway %s", id), Hint: "list them: webgw get gateways"}
		}
	}
	return nil
}

// refer checks that what an exposure or a zone names exists.
func (p *plan) refer(r *webgw.Record) error {
	if r.Kind == webgw.KindZone {
		return p.referGateways("zone.gateways", r.Zone.Gateways)
	}
	if r.Kind != webgw.KindExposure {
		return nil
	}
	x := r.Exposure
	if err := p.referGateways("exposure.gateways", x.Gateways); err != nil {
		return err
	}
	for i, id := range x.Gateways {
		field := fmt.Sprintf("exposure.gateways[%d]", i)
		g := p.m.gatewayLocked(id, p.now)
		if ports, ok := x.Ports(); ok && !g.Record.Gateway.Ports.Covers(ports) {
			offer := string(g.Record.Gateway.Ports)
			if offer == "" {
				offer = "none"
			}
			return &webgw.Error{Kind: webgw.Invalid, Field: field, Public: fmt.Sprintf("gateway %s does not offer port %s", g.Record.Name, ports), Hint: "it offers " + offer}
		}
	}
	for field, t := range x.AllTargets() {
		if !t.Node.IsZero() && p.m.nodeLocked(t.Node, p.now) == nil {
			return &webgw.Error{Kind: webgw.NotFound, Field: "exposure." + field + ".node", Public: fmt.Sprintf("there is no node %s", t.Node), Hint: "has it been started with this registry?"}
		}
	}
	return nil
}

func (p *plan) nameOf(id webgw.ID) string {
	if g := p.m.gatewayLocked(id, p.now); g != nil {
		return g.Record.Name
	}
	return id.Short()
}

// storedFactor bounds withdrawn and expired records, which stay stored so that
// they can't be replayed, as a multiple of the live ones allowed.
const storedFactor = 10

// count checks the owner's quota for a new version of a record.
func (p *plan) count(r *webgw.Record) error {
	live, stored, names, ports := 1, 1, hosts(r), portsOf(r)
	if r.Deleted {
		live, names, ports = 0, 0, 0
	}
	for k, e := range p.m.byOwner[p.owner] {
		if k == r.Key() {
			continue
		}
		stored++
		if !e.Record.Live(p.now) {
			continue
		}
		live++
		names += hosts(e.Record)
		ports += portsOf(e.Record)
	}
	over := func(what string, most int) error {
		return &webgw.Error{Kind: webgw.Exhausted, Public: fmt.Sprintf("this registry lets one owner hold %d %s", most, what), Hint: "withdraw what is not used"}
	}
	switch {
	case live > p.quota.Records:
		return over("records", p.quota.Records)
	case names > p.quota.Names:
		return over("host names", p.quota.Names)
	case ports > p.quota.Ports:
		return over("ports", p.quota.Ports)
	case p.m.records[r.Key()] == nil && stored > storedFactor*p.quota.Records:
		return over("records, withdrawn ones included,", storedFactor*p.quota.Records)
	}
	return nil
}

// maxAudience bounds whom a record's versions may have named in all.
const maxAudience = 1000

// declare plans the storing of a new version.
func (p *plan) declare(n ident.Signed) error {
	r := n.Record
	self := r.Key()
	p.owner = r.Owner
	old := p.m.records[self]
	if old != nil && !r.Supersedes(old.Record) {
		return &webgw.Error{Kind: webgw.Stale, Field: "seq", Public: fmt.Sprintf("sequence %d is not above the one known", r.Seq), Hint: fmt.Sprintf("the known sequence is %d", old.Record.Seq)}
	}
	p.onRecord(self)
	var want []claim
	if !r.Deleted {
		if err := p.refer(r); err != nil {
			return err
		}
		want = claims(r)
	}
	if !r.Deleted || old == nil {
		if err := p.count(r); err != nil {
			return err
		}
	}
	for _, c := range want {
		if err := p.take(r, c); err != nil {
			return err
		}
	}
	if old != nil {
		at := p.now
		if end := old.Record.Expires.Add(webgw.MaxSkew); end.Before(at) {
			at = end
		}
		for _, c := range claims(old.Record) {
			if slices.ContainsFunc(want, func(w claim) bool { return w.key == c.key }) {
				continue
			}
			if err := p.release(self, c, at); err != nil {
				return err
			}
		}
	}
	mt := meta{Keep: r.Expires.Unix(), Audience: map[webgw.ID]int64{}}
	if old != nil {
		mt.Keep = max(mt.Keep, old.meta.Keep)
		for id, until := range old.meta.Audience {
			if p.now.Unix() <= until+int64(webgw.MaxSkew.Seconds()) {
				mt.Audience[id] = until
			}
		}
	}
	for _, id := range audience(r) {
		mt.Audience[id] = max(mt.Audience[id], r.Expires.Unix())
	}
	if named := len(audience(r)); len(mt.Audience) > max(maxAudience, named) && !r.Deleted {
		return &webgw.Error{Kind: webgw.Exhausted, Public: fmt.Sprintf("the versions of this record have named more than %d gateways and nodes", maxAudience), Hint: "withdraw it and declare it under another name"}
	}
	v, err := encodeEntry(mt, n)
	if err != nil {
		return err
	}
	p.ops[recordKey(self)] = store.Op{Key: recordKey(self), Value: v}
	return nil
}
