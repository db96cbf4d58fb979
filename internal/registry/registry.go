// Package registry is the registry role: it holds what owners have declared,
// judges what one record means for another (who holds a name, a port, a
// quota), and tells gateways, nodes and owners of every change that is theirs,
// over an HTTPS API (docs/spec/api.md).
//
// It can't forge what it hands out, and must not know how anything is served:
// no tunnel, route, certificate or DNS answer; nor which engine keeps its
// keys: only the contract in package store.
package registry

import (
	"context"
	"crypto/rand"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/run"
	"webgw.dev/webgw/internal/store"
)

// Server is one replica of a registry. Set the fields, then call Run in one
// goroutine and Serve in as many others as there are listeners.
type Server struct {
	Key   ident.Key // by which clients know the registry; replicas share it or have their own
	Store store.KV

	// Admit judges who may declare records; its error, best a *webgw.Error, is
	// the answer. nil: everybody, within the quota. It is asked often and
	// concurrently.
	Admit func(webgw.ID) error

	// Quota per owner; zero fields take DefaultQuota's.
	Quota Quota

	// Writes bounds how fast one identity writes; zero fields take
	// DefaultWriteRate's.
	Writes WriteRate

	// Grace is how long a freed name stays its owner's. 0: DefaultGrace;
	// negative: it is free at once.
	Grace time.Duration

	// Zone is the DNS zone of the whole grid, for which every gateway answers
	// and in which names are given out one by one; "": there is none. It is
	// nobody's, nor are its wildcard and its reserved labels.
	Zone string

	// Domains is how names outside of the grid's and of gateways' zones are
	// proved. nil: they are not, and the first comes first.
	Domains *Domains

	// Operator is the identity whose names need no proof: of the gateway that
	// embeds this registry. Zero: nobody's.
	Operator webgw.ID

	Log     *slog.Logger          // nil: discard
	Metrics prometheus.Registerer // nil: kept, but not registered

	once    sync.Once
	mirror  *mirror
	metrics *metrics
	reports *reports
	lanes   *lanes
	tokens  chan struct{} // bounds the writes under way
	watches watchCount
	rates   rates
	asked   rates         // look-ups
	lookups chan struct{} // bounds those under way
}

// Quota is what one owner may hold. A record of one name counts as one name in
// addition.
type Quota struct {
	Records int // live records
	Names   int // host names in live records
	Ports   int // public ports in live records, each once however many gateways it is taken on
}

// Defaults of the Server's fields.
const (
	DefaultGrace = 24 * time.Hour
	maxWrites    = 256 // at once, further ones wait
)

// DefaultQuota is used for the zero fields of Server.Quota.
var DefaultQuota = Quota{Records: 1000, Names: 1000, Ports: 2000}

// init makes what the fields alone can't hold; it is safe to call from any
// method.
func (s *Server) init() {
	s.once.Do(func() {
		s.mirror = newMirror()
		s.mirror.grid, s.mirror.operator = s.Zone, s.Operator
		if s.Domains != nil {
			s.mirror.proving, s.mirror.proofGrace = true, s.Domains.grace()
		}
		s.lookups = make(chan struct{}, maxLookups)
		s.asked.of = map[webgw.ID]*rate.Limiter{}
		s.reports = &reports{local: map[webgw.ID]*report{}, first: make(chan struct{}, 1)}
		s.lanes = newLanes()
		s.tokens = make(chan struct{}, maxWrites)
		s.watches.n = map[webgw.ID]int{}
		s.rates.of = map[webgw.ID]*rate.Limiter{}
		s.metrics = newMetrics(s.Metrics, s)
	})
}

func (s *Server) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}

func (s *Server) grace() time.Duration {
	switch {
	case s.Grace == 0:
		return DefaultGrace
	case s.Grace < 0:
		return 0
	}
	return s.Grace
}

func (s *Server) quota() Quota {
	q := s.Quota
	if q.Records == 0 {
		q.Records = DefaultQuota.Records
	}
	if q.Names == 0 {
		q.Names = DefaultQuota.Names
	}
	if q.Ports == 0 {
		q.Ports = DefaultQuota.Ports
	}
	return q
}

func (s *Server) backoff() *run.Backoff {
	return &run.Backoff{Min: 50 * time.Millisecond, Max: 5 * time.Second}
}

// Run keeps the mirror up to date and the store tidy until ctx ends. The
// registry serves nothing before Run has read the store once.
func (s *Server) Run(ctx context.Context) error {
	s.init()
	g := run.New(ctx, s.log())
	g.Go("mirror", s.follow)
	g.Go("leases", s.keepLease)
	g.Go("janitor", s.janitor)
	if s.Domains != nil {
		g.Go("proofs", s.recheck)
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

// Ready returns once the store has been read, or ctx's error.
func (s *Server) Ready(ctx context.Context) error {
	s.init()
	return s.mirror.wait(ctx, 1)
}

// ensureEpoch makes the epoch if the store has none: it names this history of
// the store, so that nobody resumes a watch in another.
func (s *Server) ensureEpoch(ctx context.Context) error {
	for {
		_, ok, _, err := s.Store.Get(ctx, keyEpoch)
		if ok || err != nil {
			return err
		}
		_, _, err = s.Store.Txn(ctx, []store.Cond{{Key: keyEpoch}}, []store.Op{{Key: keyEpoch, Value: []byte(rand.Text())}})
		if err != nil {
			return err
		}
	}
}

// janitorEvery is how often, and janitorMargin how long after its end, what
// nobody needs any more is removed. Every replica does it: removing twice does
// no harm, for the second finds its conditions broken.
const (
	janitorEvery  = 10 * time.Minute
	janitorMargin = time.Hour
)

func (s *Server) janitor(ctx context.Context) error {
	t := time.NewTicker(janitorEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if n, err := s.sweep(ctx, time.Now()); err != nil && ctx.Err() == nil {
				s.log().Warn("registry: tidying failed, will be tried again", "err", err)
			} else if n > 0 {
				s.log().Info("registry: removed what has expired", "keys", n)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// sweep removes records that no older version can stand for any more, index
// keys that nobody holds, and guards of domains without names and of ports.
func (s *Server) sweep(ctx context.Context, now time.Time) (removed int, err error) {
	m := s.mirror
	var records []webgw.Key
	var idle, bare []string
	m.mu.RLock()
	for k, e := range m.records {
		end := time.Unix(max(e.meta.Keep, e.Record.Expires.Unix()), 0).Add(webgw.MaxSkew + janitorMargin)
		if !e.Record.Deleted && end.Before(e.Record.Expires.Add(webgw.MaxSkew+s.grace()+janitorMargin)) {
			end = e.Record.Expires.Add(webgw.MaxSkew + s.grace() + janitorMargin)
		}
		if now.After(end) {
			records = append(records, k)
		}
	}
	for k, h := range m.holdings {
		if len(h.Uses) == 0 && now.After(time.Unix(h.Until, 0).Add(janitorMargin)) {
			idle = append(idle, k)
		}
	}
	for d := range m.guards {
		if m.holdings["host/"+d] == nil && len(m.kids[d]) == 0 {
			bare = append(bare, d)
		}
	}
	m.mu.RUnlock()

	remove := func(f func(p *plan) error) error {
		m.mu.RLock()
		p := newPlan(m, now, s.grace(), s.quota())
		err := f(p)
		m.mu.RUnlock()
		if err != nil || len(p.ops) == 0 {
			return err
		}
		conds, ops := p.txn()
		ok, _, err := s.Store.Txn(ctx, conds, ops)
		if ok {
			removed++
		}
		return err
	}
	for _, k := range records {
		err := remove(func(p *plan) error {
			e := m.records[k]
			if e == nil {
				return nil
			}
			p.owner = k.Owner
			p.onRecord(k)
			for _, c := range claims(e.Record) {
				if err := p.release(k, c, e.Record.Expires.Add(webgw.MaxSkew)); err != nil {
					return err
				}
			}
			p.ops[recordKey(k)] = store.Op{Key: recordKey(k), Delete: true}
			return nil
		})
		if err != nil {
			return removed, err
		}
	}
	for _, k := range idle {
		err := remove(func(p *plan) error {
			if h := p.onHolding(k); h != nil && len(h.Uses) == 0 {
				p.ops[prefixIndex+k] = store.Op{Key: prefixIndex + k, Delete: true}
			}
			return nil
		})
		if err != nil {
			return removed, err
		}
	}
	for _, d := range bare {
		err := remove(func(p *plan) error {
			if m.holdings["host/"+d] == nil && len(m.kids[d]) == 0 {
				p.on(prefixGuard+d, m.guards[d])
				p.ops[prefixGuard+d] = store.Op{Key: prefixGuard + d, Delete: true}
			}
			return nil
		})
		if err != nil {
			return removed, err
		}
	}
	return removed, nil
}
