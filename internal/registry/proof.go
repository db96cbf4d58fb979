package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/store"
)

// proof is what the store holds of a domain that an identity has proved to be
// its own. It covers every name at and below the domain.
type proof struct {
	Seen int64 `json:"seen"`           // Unix seconds: last time, roughly
	Lost int64 `json:"lost,omitempty"` // since when resolvers say that it is gone; 0: it is there

	mod int64
}

// proofKey is a proof's key in the mirror, and with its prefix in the store.
func proofKey(domain string, id webgw.ID) string { return domain + "/" + id.String() }

func parseProofKey(key string) (domain string, id webgw.ID, err error) {
	domain, text, _ := strings.Cut(key, "/")
	id, err = webgw.ParseID(text)
	return domain, id, err
}

// lapses is when a proof counts no more; zero: not as long as it is there.
func (m *mirror) lapses(p *proof) time.Time {
	if p.Lost == 0 {
		return time.Time{}
	}
	return time.Unix(p.Lost, 0).Add(m.proofGrace)
}

// proofLocked returns the best proof by which one of ids has host: one that is
// there, else the one that lapses last; nil: none that counts.
func (m *mirror) proofLocked(host string, ids []webgw.ID, now time.Time) (best *proof, key string) {
	for _, d := range proofDomains(host) {
		for _, id := range ids {
			k := proofKey(d, id)
			p := m.proofs[k]
			if p == nil || p.Lost != 0 && !now.Before(m.lapses(p)) {
				continue
			}
			if best == nil || best.Lost != 0 && (p.Lost == 0 || p.Lost > best.Lost) {
				best, key = p, k
			}
		}
	}
	return best, key
}

// needsProof reports whether a host may be held only by whom its domain belongs
// to: all may but those in the zones of the grid and of gateways.
func (p *plan) needsProof(host string) bool {
	return p.m.proving && host != p.m.grid && !p.inZone(host)
}

// provers lists whose proofs count for a record: its owner's, and for a gateway
// those of the farmer whose farm lists it.
func (p *plan) provers(r *webgw.Record) []webgw.ID {
	ids := []webgw.ID{r.Owner}
	if r.Gateway == nil || r.Gateway.Farmer.IsZero() {
		return ids
	}
	for k, e := range p.m.byOwner[r.Gateway.Farmer] {
		if k.Kind == webgw.KindFarm && e.Record.Live(p.now) && slices.Contains(e.Record.Farm.Gateways, r.Owner) {
			p.onRecord(k)
			return append(ids, r.Gateway.Farmer)
		}
	}
	return ids
}

// proved judges a host name of a record by the proofs that are stored. The one
// that it relies on becomes a condition.
func (p *plan) proved(r *webgw.Record, c claim) error {
	if c.host == "" || r.Owner == p.m.operator || !p.needsProof(c.host) {
		return nil
	}
	best, key := p.m.proofLocked(c.host, p.provers(r), p.now)
	if best == nil {
		return unproved(c, "")
	}
	p.on(prefixProof+key, best.mod)
	return nil
}

func unproved(c claim, seen string) error {
	e := &webgw.Error{Op: "prove domain", Kind: webgw.Forbidden, Field: c.field, Public: fmt.Sprintf("%q has not been proved to be yours", c.host), Hint: "webgw domain check " + c.host + " tells which record is missing"}
	if seen != "" {
		e.Public += ": " + seen
	}
	return e
}

// standing reports whether a use of a host name still has the proof that it
// needs: without one, it is in nobody's way who has.
func (p *plan) standing(key string, u use) bool {
	host, ok := strings.CutPrefix(key, "host/")
	e := p.m.records[u.Record]
	if !ok || e == nil || u.Record.Owner == p.m.operator || !p.needsProof(host) {
		return true
	}
	ids := p.provers(e.Record)
	if best, _ := p.m.proofLocked(host, ids, p.now); best != nil {
		return true
	}
	for _, d := range proofDomains(host) { // a proof that comes back in the same instant counts
		for _, id := range ids {
			k := proofKey(d, id)
			var mod int64
			if q := p.m.proofs[k]; q != nil {
				mod = q.mod
			}
			p.on(prefixProof+k, mod)
		}
	}
	return false
}

// prove sees to it that every host of a record that needs a proof has one
// stored, as far as resolvers show it. It runs before the record is planned, for
// it takes time.
func (s *Server) prove(ctx context.Context, caller webgw.ID, r *webgw.Record) error {
	if s.Domains == nil || r.Deleted || r.Owner == s.Operator {
		return nil
	}
	type missing struct {
		c   claim
		ids []webgw.ID
	}
	var todo []missing
	now := time.Now()
	s.mirror.mu.RLock()
	p := newPlan(s.mirror, now, s.grace(), s.quota())
	for _, c := range claims(r) {
		if c.host == "" || !p.needsProof(c.host) {
			continue
		}
		ids := p.provers(r)
		best, _ := s.mirror.proofLocked(c.host, ids, now)
		if best == nil || best.Lost != 0 {
			todo = append(todo, missing{c, ids})
		}
	}
	s.mirror.mu.RUnlock()
	errs := make([]error, len(todo))
	var wg sync.WaitGroup
	for i, t := range todo {
		if err := s.mayLookUp(caller); err != nil {
			return err
		}
		wg.Go(func() {
			fs := s.lookUp(ctx, t.c.host, t.ids)
			for _, f := range slices.Backward(fs) { // the widest: one for many names
				if f.verdict == present {
					errs[i] = s.keepProof(ctx, f, t.ids, now)
					return
				}
			}
			errs[i] = unproved(t.c, words(fs))
		})
	}
	wg.Wait()
	s.mirror.mu.RLock()
	defer s.mirror.mu.RUnlock()
	for i, err := range errs {
		if err == nil {
			continue
		}
		// What is missing but has not lapsed still counts.
		if best, _ := s.mirror.proofLocked(todo[i].c.host, todo[i].ids, now); best == nil || webgw.KindOf(err) != webgw.Forbidden {
			return err
		}
	}
	return nil
}

// keepProof stores a proof that was seen, for whom it is.
func (s *Server) keepProof(ctx context.Context, f found, ids []webgw.ID, now time.Time) error {
	for _, id := range ids {
		if judge(f.heard, []webgw.ID{id}) != present {
			continue
		}
		v, err := json.Marshal(proof{Seen: now.Unix()})
		if err != nil {
			return err
		}
		_, rev, err := s.Store.Txn(ctx, nil, []store.Op{{Key: prefixProof + proofKey(f.domain, id), Value: v}})
		if err != nil {
			return busy(err)
		}
		if err := s.mirror.wait(ctx, rev); err != nil {
			return busy(err)
		}
	}
	return nil
}

// Rechecking.
const (
	recheckTick  = time.Minute
	recheckLost  = 10 * time.Minute // how often what is missing is looked for
	recheckAtOne = 16               // domains at once
)

// recheck looks at every proof again and again. Every replica does: what one
// has written, another need not.
func (s *Server) recheck(ctx context.Context) error {
	t := time.NewTicker(recheckTick)
	defer t.Stop()
	tried := map[string]time.Time{}
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		var wg sync.WaitGroup
		slots := make(chan struct{}, recheckAtOne)
		for key, p := range s.dueProofs(time.Now(), tried) {
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				if err := s.recheckOne(ctx, key, p); err != nil && ctx.Err() == nil {
					s.log().Warn("registry: a domain's proof not looked at again, will be tried later", "domain", key, "err", err)
				}
			})
		}
		wg.Wait()
	}
}

// dueProofs lists the proofs to look at now. tried is when each was last.
func (s *Server) dueProofs(now time.Time, tried map[string]time.Time) map[string]proof {
	m := s.mirror
	m.mu.RLock()
	defer m.mu.RUnlock()
	due := map[string]proof{}
	for key, p := range m.proofs {
		wait, last := s.Domains.every(), time.Unix(p.Seen, 0)
		if p.Lost != 0 {
			wait = recheckLost
		}
		if tried[key].After(last) {
			last = tried[key]
		}
		if now.Sub(last) >= wait || last.After(now) {
			due[key] = *p
			tried[key] = now
		}
	}
	for key := range tried {
		if m.proofs[key] == nil {
			delete(tried, key)
		}
	}
	return due
}

// recheckOne looks at one proof and writes what is new. Resolvers that don't
// answer are no reason to take a name from anybody.
func (s *Server) recheckOne(ctx context.Context, key string, old proof) error {
	domain, id, err := parseProofKey(key)
	if err != nil {
		return err
	}
	now := time.Now()
	op := store.Op{Key: prefixProof + key}
	if !s.usesDomain(domain, id, now) {
		op.Delete = true
	} else {
		next := proof{Seen: old.Seen, Lost: old.Lost}
		switch judge(s.texts(ctx, proofLabel+"."+domain), []webgw.ID{id}) {
		case present:
			next = proof{Seen: now.Unix()}
			if old.Lost != 0 {
				s.log().Info("registry: the proof of a domain is back", "domain", domain, "owner", id.Short())
			}
		case absent:
			if old.Lost != 0 {
				return nil
			}
			next.Lost = now.Unix()
			s.log().Warn("registry: the proof of a domain is gone", "domain", domain, "owner", id.Short(), "lapses", now.Add(s.Domains.grace()).UTC().Format(time.RFC3339))
		case unknown:
			s.log().Warn("registry: resolvers don't tell whether the proof of a domain is there", "domain", domain, "owner", id.Short())
			return nil
		}
		if op.Value, err = json.Marshal(next); err != nil {
			return err
		}
	}
	_, _, err = s.Store.Txn(ctx, []store.Cond{{Key: op.Key, Mod: old.mod}}, []store.Op{op})
	return err // a broken condition: another replica was quicker
}

// usesDomain reports whether an identity, or a gateway of its farm, holds a
// name that a proof of domain is for.
func (s *Server) usesDomain(domain string, id webgw.ID, now time.Time) bool {
	m := s.mirror
	m.mu.RLock()
	defer m.mu.RUnlock()
	uses := func(owner webgw.ID) bool {
		for _, e := range m.byOwner[owner] {
			if !e.Record.Live(now) {
				continue
			}
			for _, c := range claims(e.Record) {
				if host := strings.TrimPrefix(c.host, "*."); host == domain || webgw.Under(host, domain) {
					return true
				}
			}
		}
		return false
	}
	if uses(id) {
		return true
	}
	for k, e := range m.byOwner[id] {
		if k.Kind == webgw.KindFarm && e.Record.Live(now) && slices.ContainsFunc(e.Record.Farm.Gateways, uses) {
			return true
		}
	}
	return false
}
