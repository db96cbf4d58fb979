// Package memkv is a store in memory, for tests and bubbles: nothing survives
// the process. Every wait in it is durable for testing/synctest.
//
// It must not know what the values mean.
package memkv

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"webgw.dev/webgw/internal/store"
)

// DefaultHistory is how many revisions a Store remembers.
const DefaultHistory = 100_000

// Store implements store.KV. Use New.
type Store struct {
	History int // revisions that watches and lists can go back; set before use

	mu      sync.Mutex
	rev     int64
	first   int64                // oldest revision remembered
	keys    map[string][]version // ascending by Mod
	log     []store.Batch        // revisions first to rev
	changed chan struct{}        // closed at each change
	leases  map[store.Lease]*lease
	granted store.Lease
	closed  bool
}

type version struct {
	store.Item
	deleted bool
}

type lease struct {
	ttl   time.Duration
	until time.Time // a timer that fired before a KeepAlive finds it later
	timer *time.Timer
	keys  map[string]struct{}
}

var _ store.KV = (*Store)(nil)

// New returns an empty store at revision 1.
func New() *Store {
	return &Store{History: DefaultHistory, rev: 1, first: 2, keys: map[string][]version{}, changed: make(chan struct{}), leases: map[store.Lease]*lease{}}
}

// at returns the item as of revision rev.
func at(vs []version, rev int64) (store.Item, bool) {
	for _, v := range slices.Backward(vs) {
		if v.Mod <= rev {
			return v.Item, !v.deleted
		}
	}
	return store.Item{}, false
}

// Get implements store.KV.
func (s *Store) Get(ctx context.Context, key string) (store.Item, bool, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usableLocked(ctx); err != nil {
		return store.Item{}, false, 0, err
	}
	item, ok := at(s.keys[key], s.rev)
	item.Value = slices.Clone(item.Value)
	return item, ok, s.rev, nil
}

func (s *Store) usableLocked(ctx context.Context) error {
	if s.closed {
		return store.ErrClosed
	}
	return ctx.Err()
}

// List implements store.KV.
func (s *Store) List(ctx context.Context, prefix, after string, limit int, rev int64) ([]store.Item, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usableLocked(ctx); err != nil {
		return nil, 0, err
	}
	switch {
	case rev == 0:
		rev = s.rev
	case rev < s.first-1:
		return nil, 0, store.ErrCompacted
	case rev > s.rev:
		return nil, 0, fmt.Errorf("memkv: revision %d lies in the future", rev)
	}
	var names []string
	for k := range s.keys {
		if strings.HasPrefix(k, prefix) && k > after {
			names = append(names, k)
		}
	}
	slices.Sort(names)
	var out []store.Item
	for _, k := range names {
		if item, ok := at(s.keys[k], rev); ok {
			item.Value = slices.Clone(item.Value)
			if out = append(out, item); len(out) == limit {
				break
			}
		}
	}
	return out, rev, nil
}

// Txn implements store.KV.
func (s *Store) Txn(ctx context.Context, conds []store.Cond, ops []store.Op) (bool, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usableLocked(ctx); err != nil {
		return false, 0, err
	}
	for _, c := range conds {
		item, ok := at(s.keys[c.Key], s.rev)
		if !ok {
			item.Mod = 0
		}
		if item.Mod != c.Mod {
			return false, s.rev, nil
		}
	}
	seen := map[string]bool{}
	for _, op := range ops {
		if seen[op.Key] {
			return false, 0, fmt.Errorf("memkv: key %q is written twice in one transaction", op.Key)
		}
		seen[op.Key] = true
		if !op.Delete && op.Lease != 0 && s.leases[op.Lease] == nil {
			return false, 0, store.ErrLease
		}
	}
	s.writeLocked(ops)
	return true, s.rev, nil
}

// writeLocked does ops at one new revision, if they change anything.
func (s *Store) writeLocked(ops []store.Op) {
	b := store.Batch{Rev: s.rev + 1}
	for _, op := range ops {
		old, exists := at(s.keys[op.Key], s.rev)
		if op.Delete && !exists {
			continue
		}
		if l := s.leases[old.Lease]; exists && l != nil {
			delete(l.keys, op.Key)
		}
		v := version{Item: store.Item{Key: op.Key, Mod: b.Rev}, deleted: op.Delete}
		if !op.Delete {
			v.Value, v.Lease, v.Create = slices.Clone(op.Value), op.Lease, b.Rev
			if exists {
				v.Create = old.Create
			}
			if l := s.leases[op.Lease]; l != nil {
				l.keys[op.Key] = struct{}{}
			}
		}
		s.keys[op.Key] = append(s.keys[op.Key], v)
		b.Events = append(b.Events, store.Event{Item: v.Item, Deleted: op.Delete})
	}
	if len(b.Events) == 0 {
		return
	}
	s.rev = b.Rev
	s.log = append(s.log, b)
	s.trimLocked(s.History)
	close(s.changed)
	s.changed = make(chan struct{})
}

// trimLocked forgets all but the last n revisions.
func (s *Store) trimLocked(n int) {
	for len(s.log) > n {
		s.forgetLocked(s.log[0])
		s.log[0] = store.Batch{} // for the collector
		s.log = s.log[1:]
		s.first++
	}
}

// forgetLocked drops the versions that b's revision made superfluous.
func (s *Store) forgetLocked(b store.Batch) {
	for _, e := range b.Events {
		vs := s.keys[e.Key]
		for len(vs) > 1 && vs[1].Mod <= b.Rev {
			vs[0] = version{} // for the collector
			vs = vs[1:]
		}
		if len(vs) == 1 && vs[0].deleted && vs[0].Mod <= b.Rev {
			delete(s.keys, e.Key)
			continue
		}
		s.keys[e.Key] = vs
	}
}

// Watch implements store.KV.
func (s *Store) Watch(ctx context.Context, prefix string, from int64) iter.Seq2[store.Batch, error] {
	return func(yield func(store.Batch, error) bool) {
		for {
			batch, changed, err := s.next(ctx, prefix, from)
			if err != nil {
				yield(store.Batch{}, err)
				return
			}
			if batch.Rev >= from && batch.Rev > 0 {
				if !yield(batch, nil) {
					return
				}
				from = batch.Rev + 1
				continue
			}
			select {
			case <-changed:
			case <-ctx.Done():
			}
		}
	}
}

// next returns the changes of the first revision from on that has any under
// prefix, or of none but the latest revision, or what to wait for.
func (s *Store) next(ctx context.Context, prefix string, from int64) (store.Batch, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usableLocked(ctx); err != nil {
		return store.Batch{}, nil, err
	}
	from = max(from, 2) // revision 1 is the empty store
	if from < s.first {
		return store.Batch{}, nil, store.ErrCompacted
	}
	for i := from - s.first; i < int64(len(s.log)); i++ {
		out := store.Batch{Rev: s.log[i].Rev}
		for _, e := range s.log[i].Events {
			if strings.HasPrefix(e.Key, prefix) {
				e.Value = slices.Clone(e.Value)
				out.Events = append(out.Events, e)
			}
		}
		if len(out.Events) > 0 {
			return out, nil, nil
		}
	}
	if s.rev >= from {
		return store.Batch{Rev: s.rev}, nil, nil
	}
	return store.Batch{}, s.changed, nil
}

// Grant implements store.KV.
func (s *Store) Grant(ctx context.Context, ttl time.Duration) (store.Lease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usableLocked(ctx); err != nil {
		return 0, err
	}
	ttl = max(ttl.Truncate(time.Second), 2*time.Second)
	s.granted++
	id := s.granted
	l := &lease{ttl: ttl, until: time.Now().Add(ttl), keys: map[string]struct{}{}}
	l.timer = time.AfterFunc(ttl, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !time.Now().Before(l.until) {
			s.endLocked(id)
		}
	})
	s.leases[id] = l
	return id, nil
}

// KeepAlive implements store.KV.
func (s *Store) KeepAlive(ctx context.Context, id store.Lease) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usableLocked(ctx); err != nil {
		return err
	}
	l := s.leases[id]
	if l == nil {
		return store.ErrLease
	}
	l.until = time.Now().Add(l.ttl)
	l.timer.Reset(l.ttl)
	return nil
}

// Revoke implements store.KV.
func (s *Store) Revoke(ctx context.Context, id store.Lease) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usableLocked(ctx); err != nil {
		return err
	}
	if s.leases[id] == nil {
		return store.ErrLease
	}
	s.endLocked(id)
	return nil
}

func (s *Store) endLocked(id store.Lease) {
	l := s.leases[id]
	if l == nil || s.closed {
		return
	}
	l.timer.Stop()
	var ops []store.Op
	for k := range l.keys {
		ops = append(ops, store.Op{Key: k, Delete: true})
	}
	slices.SortFunc(ops, func(a, b store.Op) int { return strings.Compare(a.Key, b.Key) })
	s.writeLocked(ops)
	delete(s.leases, id)
}

// Close implements store.KV.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	for _, l := range s.leases {
		l.timer.Stop()
	}
	close(s.changed)
	return nil
}
