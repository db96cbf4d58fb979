package registry

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"sync"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/store"
)

// Liveness: whoever has not reported for so long counts as down.
const (
	livenessTTL   = 15 * time.Second
	reportAtMost  = time.Second // how often a reporter's changes are written
	leaseEvery    = 5 * time.Second
	statusTimeout = 5 * time.Second
)

// reported is the status of a live gateway or node, as the store holds it.
type reported struct {
	webgw.Status
	mod   int64
	lease store.Lease
}

// reports is what this replica was told itself. The store is written when a
// status says something new, not at the rate of reports; all of a replica's
// reporters share one lease. If the replica dies they end with it, unless they
// have reported to another one meanwhile, which makes them its own.
type reports struct {
	mu    sync.Mutex
	local map[webgw.ID]*report
	lease store.Lease
	first chan struct{} // holds a token when a first reporter has come
}

type report struct {
	status  webgw.Status
	at      time.Time
	written time.Time // last time that the store was
	mod     int64     // revision of that
}

func (s *Server) putStatus(w http.ResponseWriter, r *http.Request, id webgw.ID) error {
	body, err := read(w, r, webgw.MaxStatus)
	if err != nil {
		return err
	}
	var st webgw.Status
	d := json.NewDecoder(bytes.NewReader(body))
	if err := d.Decode(&st); err != nil { // unknown fields are a newer release's
		return &webgw.Error{Kind: webgw.Invalid, Public: "the status is not the JSON it should be", Err: err}
	}
	if err := st.Validate(); err != nil {
		return err
	}
	m := s.mirror
	m.mu.RLock()
	kind := webgw.KindNode
	if st.Gateway != nil {
		kind = webgw.KindGateway
	}
	self := m.selfLocked(kind, id, time.Now())
	rev := m.rev
	m.mu.RUnlock()
	if self == nil {
		return &webgw.Error{Kind: webgw.NotFound, Public: "you have no live " + string(kind) + " record here", Hint: "declare it first"}
	}
	if err := s.report(r.Context(), id, st); err != nil {
		return err
	}
	return reply(w, http.StatusOK, stored{rev})
}

// report takes in a status and writes it if it is news.
func (s *Server) report(ctx context.Context, id webgw.ID, st webgw.Status) error {
	s.mirror.mu.RLock()
	old, newest := s.mirror.status[id], s.mirror.newest[id]
	s.mirror.mu.RUnlock()

	now := time.Now()
	s.reports.mu.Lock()
	rp := s.reports.local[id]
	if rp == nil {
		rp = &report{}
		s.reports.local[id] = rp
		select {
		case s.reports.first <- struct{}{}:
		default:
		}
	}
	rp.status, rp.at = st, now
	write := (old == nil || old.lease != s.reports.lease || news(old.Status, st, newest)) && now.Sub(rp.written) >= reportAtMost
	if write {
		rp.written = now
	}
	s.reports.mu.Unlock()
	if !write {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	return s.writeStatus(ctx, id, st)
}

// news reports whether a status says something that people would be told: more
// than that time and revision have moved on, unless the revision now covers
// the latest exposure that concerns the reporter.
func news(old, st webgw.Status, newest int64) bool {
	if old.Rev < newest && st.Rev >= newest || st.Rev < old.Rev {
		return true
	}
	old.Rev = st.Rev
	old.Since, st.Since = old.Since.UTC().Round(0), st.Since.UTC().Round(0)
	a, errA := json.Marshal(old)
	b, errB := json.Marshal(st)
	return errA != nil || errB != nil || !bytes.Equal(a, b)
}

func (s *Server) writeStatus(ctx context.Context, id webgw.ID, st webgw.Status) error {
	v, err := json.Marshal(st)
	if err != nil {
		return err
	}
	for try := 0; ; try++ {
		lease, err := s.lease(ctx)
		if err != nil {
			return busy(err)
		}
		key := prefixStatus + id.String()
		_, rev, err := s.Store.Txn(ctx, nil, []store.Op{{Key: key, Value: v, Lease: lease}})
		if errors.Is(err, store.ErrLease) && try == 0 {
			s.dropLease(lease)
			continue
		}
		if err != nil {
			return busy(err)
		}
		s.reports.mu.Lock()
		if rp := s.reports.local[id]; rp != nil {
			rp.mod = rev
		}
		s.reports.mu.Unlock()
		return nil
	}
}

// lease returns the replica's lease, and takes one if it has none.
func (s *Server) lease(ctx context.Context) (store.Lease, error) {
	s.reports.mu.Lock()
	lease := s.reports.lease
	s.reports.mu.Unlock()
	if lease != 0 {
		return lease, nil
	}
	fresh, err := s.Store.Grant(ctx, livenessTTL)
	if err != nil {
		return 0, err
	}
	s.reports.mu.Lock()
	lease = s.reports.lease
	if lease == 0 {
		s.reports.lease, lease = fresh, fresh
	}
	s.reports.mu.Unlock()
	if lease != fresh { // another was quicker
		return lease, s.Store.Revoke(ctx, fresh)
	}
	return lease, nil
}

func (s *Server) dropLease(lease store.Lease) {
	s.reports.mu.Lock()
	defer s.reports.mu.Unlock()
	if s.reports.lease == lease {
		s.reports.lease = 0
	}
}

// keepLease keeps the replica's lease alive and takes down who fell silent.
func (s *Server) keepLease(ctx context.Context) error {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	kept := time.Now()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			// Those who report here will report elsewhere within the lease.
			return ctx.Err()
		}
		s.expire(ctx, time.Now())
		s.reports.mu.Lock()
		idle := len(s.reports.local) == 0
		if idle {
			s.reports.lease = 0 // nothing hangs on it any more: it may end
		}
		lease := s.reports.lease
		s.reports.mu.Unlock()
		if idle {
			select {
			case <-s.reports.first:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if lease == 0 || time.Since(kept) < leaseEvery {
			continue
		}
		kept = time.Now()
		limit, cancel := context.WithTimeout(ctx, leaseEvery)
		err := s.Store.KeepAlive(limit, lease)
		cancel()
		if errors.Is(err, store.ErrLease) {
			// Each reporter's next report is written anew.
			s.dropLease(lease)
		} else if err != nil && ctx.Err() == nil {
			s.log().Warn("registry: lease not kept alive, will be tried again", "err", err)
		}
	}
}

// expire takes down reporters that have been silent here and are not another
// replica's by now.
func (s *Server) expire(ctx context.Context, now time.Time) {
	silent := map[webgw.ID]int64{}
	s.reports.mu.Lock()
	for id, rp := range s.reports.local {
		if now.Sub(rp.at) >= livenessTTL {
			silent[id] = rp.mod
			delete(s.reports.local, id)
		}
	}
	s.reports.mu.Unlock()
	for id, mod := range silent {
		if mod == 0 {
			continue
		}
		key := prefixStatus + id.String()
		limit, cancel := context.WithTimeout(ctx, statusTimeout)
		_, _, err := s.Store.Txn(limit, []store.Cond{{Key: key, Mod: mod}}, []store.Op{{Key: key, Delete: true}})
		cancel()
		if err != nil && ctx.Err() == nil {
			s.log().Warn("registry: status of a silent reporter not removed", "node", id.Short(), "err", err)
			s.reports.mu.Lock()
			if s.reports.local[id] == nil { // to be tried again
				s.reports.local[id] = &report{mod: mod}
			}
			s.reports.mu.Unlock()
		}
	}
}

// statusOfLocked returns the latest status known here of a live reporter, or
// nil. The caller holds the mirror's lock.
func (s *Server) statusOfLocked(id webgw.ID) *webgw.Status {
	r := s.mirror.status[id]
	if r == nil {
		return nil
	}
	st := r.Status
	s.reports.mu.Lock()
	defer s.reports.mu.Unlock()
	if rp := s.reports.local[id]; rp != nil && rp.mod == r.mod {
		st = rp.status
	}
	return &st
}

// getStatus answers how everything is that the asker may see.
func (s *Server) getStatus(w http.ResponseWriter, _ *http.Request, id webgw.ID) error {
	return reply(w, http.StatusOK, s.overview(id, time.Now()))
}

func (s *Server) overview(id webgw.ID, now time.Time) webgw.Overview {
	m := s.mirror
	m.mu.RLock()
	defer m.mu.RUnlock()
	o := webgw.Overview{Rev: m.rev, Gateways: []webgw.PartyStatus{}, Nodes: []webgw.PartyStatus{}, Exposures: []webgw.ExposureStatus{}}
	for _, e := range m.listLocked(id, "", webgw.ID{}, false, now) {
		switch e.key.Kind {
		case webgw.KindGateway:
			o.Gateways = append(o.Gateways, s.partyLocked(e))
		case webgw.KindNode:
			o.Nodes = append(o.Nodes, s.partyLocked(e))
		case webgw.KindExposure:
			o.Exposures = append(o.Exposures, s.exposureLocked(e, now))
		}
	}
	return o
}

func (s *Server) partyLocked(e *entry) webgw.PartyStatus {
	st := s.statusOfLocked(e.key.Owner)
	p := webgw.PartyStatus{ID: e.key.Owner, Name: e.key.Name}
	p.Up, p.Why = partyWords(e.key.Kind, e.key.Name, st)
	if st == nil {
		return p
	}
	p.Release, p.Since, p.Rev = st.Release, st.Since, st.Rev
	if st.Gateway != nil {
		p.Sessions = len(st.Gateway.Sessions)
	} else {
		for _, x := range st.Node.Sessions {
			if x.State == webgw.SessionUp {
				p.Sessions++
			}
		}
	}
	return p
}

// exposureLocked gathers the facts about an exposure and puts them in words.
func (s *Server) exposureLocked(x *entry, now time.Time) webgw.ExposureStatus {
	m := s.mirror
	out := webgw.ExposureStatus{Key: x.key}
	for _, id := range x.Record.Exposure.Gateways {
		f := wayFacts{name: id.Short()}
		if g := m.gatewayLocked(id, now); g != nil {
			f.declared, f.name = true, g.key.Name
		}
		st := s.statusOfLocked(id)
		if st != nil && st.Gateway != nil {
			f.reports = true
			f.behind = st.Rev < x.mod
			f.problem = problemOf(st.Gateway.Problems, x.key)
		}
		for _, t := range x.Record.Exposure.AllTargets() {
			f.targets = append(f.targets, s.targetLocked(x.key, id, st, t, now))
		}
		w := webgw.WayStatus{ID: id, Name: f.name}
		w.Up, w.Why = wayWords(f)
		out.Gateways = append(out.Gateways, w)
	}
	out.Up, out.Why = exposureWords(out.Gateways)
	out.Warnings = s.warningsLocked(x, now)
	return out
}

func (s *Server) targetLocked(x webgw.Key, gateway webgw.ID, gw *webgw.Status, t webgw.Target, now time.Time) targetFacts {
	if t.Node.IsZero() {
		return targetFacts{direct: true, name: t.Direct}
	}
	f := targetFacts{name: t.Node.Short()}
	if n := s.mirror.nodeLocked(t.Node, now); n != nil {
		f.declared, f.name = true, n.key.Name
	}
	if gw != nil && gw.Gateway != nil {
		f.session = slices.Contains(gw.Gateway.Sessions, t.Node)
	}
	st := s.statusOfLocked(t.Node)
	if st == nil || st.Node == nil {
		return f
	}
	f.reports = true
	f.problem = problemOf(st.Node.Problems, x)
	for _, ss := range st.Node.Sessions {
		if ss.Gateway == gateway {
			f.session = f.session || ss.State == webgw.SessionUp
			f.failure = cmp.Or(ss.Error, f.failure)
		}
	}
	return f
}

func problemOf(ps []webgw.Problem, x webgw.Key) string {
	i := slices.IndexFunc(ps, func(p webgw.Problem) bool { return p.Exposure == x })
	if i < 0 {
		return ""
	}
	return cmp.Or(ps[i].Text, ps[i].Code)
}
