package ingress

import (
	"net/netip"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw"
)

// Why a policy turned a visitor away: further values of the metric's label.
const (
	reasonDenied    = "policy_address"
	reasonCountry   = "policy_country"
	reasonNoCountry = "policy_country_unknown"
	reasonRate      = "policy_rate"
	reasonBusy      = "policy_concurrent"
	reasonTime      = "policy_time"
	reasonBody      = "policy_body"
	reasonAnswer    = "policy_answer"
	reasonAuth      = "policy_auth"
	reasonIssuer    = "policy_issuer"
	reasonClient    = "policy_certificate"
	reasonPath      = "ambiguous_path" // where rules look at paths
)

// guard enforces the policy of one exposure. It outlives the tables in which
// the same policy stands, so that a change elsewhere lets nobody off.
type guard struct {
	key    webgw.Key // of the exposure
	policy *webgw.Policy
	active atomic.Int64 // streams and requests

	// What follows is derived from the policy when it is first needed: a table
	// may hold very many that are not.
	once        sync.Once
	allow, deny *ranges    // nil: none
	countries   *Countries // nil: they can't be told
	connections *meter     // nil: no limit
	requests    *meter
	bandwidth   valves         // of all together
	auth        *authenticator // nil: nobody must identify themselves
	login       *login         // nil: nobody can log in
	tls         *clientTLS     // nil: no certificate is asked for
}

func newGuard(key webgw.Key, p *webgw.Policy) *guard {
	if p == nil {
		return nil
	}
	return &guard{key: key, policy: p}
}

// adopt returns the guard of an earlier table if its policy is the same.
func (g *guard) adopt(was *guard) *guard {
	if g == nil || was == nil || g.policy != was.policy && !reflect.DeepEqual(g.policy, was.policy) {
		return g
	}
	return was
}

// ready derives what the policy needs. What can't be derived, because the
// record was checked by other rules than today's, lets nobody in.
func (g *guard) ready(s *Server) *guard {
	g.once.Do(func() {
		p := g.policy
		g.allow, g.deny = newRanges(p.Allow), newRanges(p.Deny)
		g.countries = s.Countries
		g.connections, g.requests = newMeter(p.ConnectionRate), newMeter(p.RequestRate)
		if p.Bandwidth != nil {
			g.bandwidth = newValves(p.Bandwidth.Total)
		}
		var err error
		if g.auth, err = newAuthenticator(p); err != nil {
			s.log.Error("policy can't be applied; nobody gets in", "err", err)
		}
		if g.login, err = newLogin(p.OIDC, g.key, s.OpenSecret); err != nil {
			s.log.Error("a policy's secret can't be read; nobody can log in", "exposure", g.key.String(), "err", err)
		}
		if g.tls, err = newClientTLS(p, s); err != nil {
			s.log.Error("policy can't be applied; nobody gets in", "err", err)
		}
	})
	return g
}

// enter counts a stream or request in. Each true needs a leave.
func (g *guard) enter() bool {
	if n := g.active.Add(1); g.policy.Concurrent > 0 && n > int64(g.policy.Concurrent) {
		g.active.Add(-1)
		return false
	}
	return true
}

func (g *guard) leave() { g.active.Add(-1) }

// admitStream counts a connection in that is passed on as it is, or says why
// it must not be.
func (s *Server) admitStream(v *visit, r *Route) (reason string) {
	if r.guard != nil {
		g := r.guard.ready(s)
		if reason := g.lets(v.visitor.Addr()); reason != "" {
			return reason
		}
		if s.buckets.take(g.connections, v.visitor.Addr(), time.Now()) > 0 {
			return reasonRate
		}
	}
	return r.admit(&s.limits)
}

// hurries reports whether a TLS connection for a name that is terminated comes
// too soon after others: it is not worth a handshake.
func (s *Server) hurries(v *visit, r *Route) bool {
	return r.guard != nil && s.buckets.take(r.guard.ready(s).connections, v.visitor.Addr(), time.Now()) > 0
}

// ranges is a set of networks; its look-up takes time by the number of
// different prefix lengths.
type ranges struct {
	bits4, bits6 []int
	set          map[netip.Prefix]struct{}
}

func newRanges(list []netip.Prefix) *ranges {
	if len(list) == 0 {
		return nil
	}
	r := &ranges{set: map[netip.Prefix]struct{}{}}
	var seen4, seen6 [129]bool
	for _, p := range list {
		r.set[p] = struct{}{}
		seen, bits := &seen6, &r.bits6
		if p.Addr().Is4() {
			seen, bits = &seen4, &r.bits4
		}
		if !seen[p.Bits()] {
			seen[p.Bits()] = true
			*bits = append(*bits, p.Bits())
		}
	}
	return r
}

func (r *ranges) contains(a netip.Addr) bool {
	if r == nil {
		return false
	}
	bits := r.bits6
	if a.Is4() {
		bits = r.bits4
	}
	for _, n := range bits {
		if p, err := a.Prefix(n); err == nil {
			if _, ok := r.set[p]; ok {
				return true
			}
		}
	}
	return false
}
