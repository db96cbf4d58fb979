// Package storetest holds every store to the contract of store.KV.
package storetest

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"webgw.dev/webgw/internal/store"
)

// Compacter is a store that the suite can make forget its past. Suites of
// stores without it say nothing of compaction.
type Compacter interface {
	// Compact forgets what is older than revision rev.
	Compact(ctx context.Context, rev int64) error
}

// Run runs the suite; open gives an empty store that nobody else writes to, and
// closes it when t ends.
func Run(t *testing.T, open func(t *testing.T) store.KV) {
	RunIn(t, func(t *testing.T, f func(*testing.T)) { f(t) }, open)
}

// RunIn is Run with each test within in, as is synctest.Test.
func RunIn(t *testing.T, in func(*testing.T, func(*testing.T)), open func(t *testing.T) store.KV) {
	for name, f := range map[string]func(*testing.T, *kv){
		"a key is absent, put, changed, deleted":                    life,
		"a transaction holds its conditions or writes nothing":      conditions,
		"revisions rise by one with each transaction":               revisions,
		"a list is cut by prefix, start and limit, at one revision": list,
		"a hundred claimants of a key have one winner":              claimants,
		"a watch from the past misses nothing and repeats nothing":  watchPast,
		"a watch from nothing begins at the beginning":              watchAll,
		"a watch sees all of a transaction in one batch":            watchBatch,
		"a watch keeps up with many writers":                        watchWriters,
		"a watch without changes hears of the revision":             watchIdle,
		"a watch ends with its context":                             watchEnds,
		"a past that was compacted is refused":                      compacted,
		"a lease takes its keys with it, and the watch sees it":     leases,
		"a lease that is revoked takes its keys in one batch":       revoked,
		"a lease that is kept alive lives":                          keptLease,
		"a caller who has left gets their own context's error":      canceled,
		"a closed store ends watches and refuses everything":        closed,
		"a store may be closed while everybody uses it":             closedInUse,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				f(t, &kv{open(t), t, ctx})
			})
		})
	}
}

type kv struct {
	store.KV
	t   *testing.T
	ctx context.Context
}

func (s *kv) put(key, value string) int64 {
	s.t.Helper()
	return s.txn(nil, store.Op{Key: key, Value: []byte(value)})
}

func (s *kv) txn(conds []store.Cond, ops ...store.Op) int64 {
	s.t.Helper()
	ok, rev, err := s.Txn(s.ctx, conds, ops)
	if err != nil || !ok {
		s.t.Fatalf("txn: %v %v", ok, err)
	}
	return rev
}

func (s *kv) want(key, value string, mod int64) store.Item {
	s.t.Helper()
	item, ok, rev, err := s.Get(s.ctx, key)
	if err != nil || !ok || string(item.Value) != value || item.Mod != mod || item.Key != key || rev < mod {
		s.t.Fatalf("get %s: %+v ok %v rev %d, %v; want %q of revision %d", key, item, ok, rev, err, value, mod)
	}
	return item
}

func (s *kv) wantNone(key string) {
	s.t.Helper()
	if item, ok, _, err := s.Get(s.ctx, key); err != nil || ok {
		s.t.Fatalf("get %s: %+v, %v; want nothing", key, item, err)
	}
}

func life(t *testing.T, s *kv) {
	s.wantNone("a")
	first := s.put("a", "1")
	if item := s.want("a", "1", first); item.Create != first {
		t.Errorf("created at %d, want %d", item.Create, first)
	}
	second := s.put("a", "2")
	if item := s.want("a", "2", second); item.Create != first {
		t.Errorf("created at %d, want %d", item.Create, first)
	}
	s.txn(nil, store.Op{Key: "a", Delete: true})
	s.wantNone("a")
	third := s.put("a", "3")
	if item := s.want("a", "3", third); item.Create != third {
		t.Errorf("created anew at %d, want %d", item.Create, third)
	}
}

func conditions(t *testing.T, s *kv) {
	one := s.txn([]store.Cond{{Key: "a"}}, store.Op{Key: "a", Value: []byte("1")}, store.Op{Key: "b", Value: []byte("1")})
	for _, c := range [][]store.Cond{{{Key: "a"}}, {{Key: "a", Mod: one + 7}}, {{Key: "a", Mod: one}, {Key: "c", Mod: one}}} {
		ok, _, err := s.Txn(s.ctx, c, []store.Op{{Key: "a", Value: []byte("x")}, {Key: "c", Value: []byte("x")}, {Key: "b", Delete: true}})
		if err != nil || ok {
			t.Errorf("conditions %v: ok %v, %v", c, ok, err)
		}
	}
	s.want("a", "1", one)
	s.want("b", "1", one)
	s.wantNone("c")
	two := s.txn([]store.Cond{{Key: "a", Mod: one}, {Key: "c"}}, store.Op{Key: "a", Value: []byte("2")}, store.Op{Key: "b", Delete: true})
	s.want("a", "2", two)
	s.wantNone("b")
	if _, _, err := s.Txn(s.ctx, nil, []store.Op{{Key: "d"}, {Key: "d"}}); err == nil {
		t.Error("a key written twice in one transaction was accepted")
	}
	s.wantNone("d")
}

func revisions(t *testing.T, s *kv) {
	last := s.put("a", "")
	for i := range 10 {
		if rev := s.put(fmt.Sprint("a", i%3), "x"); rev != last+1 {
			t.Fatalf("revision %d after %d", rev, last)
		} else {
			last = rev
		}
	}
	_, _, rev, err := s.Get(s.ctx, "a")
	if err != nil || rev != last {
		t.Errorf("get tells revision %d, %v; want %d", rev, err, last)
	}
}

func list(t *testing.T, s *kv) {
	for i := 0; i < 2500; i += 100 {
		var ops []store.Op
		for j := range 100 {
			ops = append(ops, store.Op{Key: fmt.Sprintf("p/%04d", i+j), Value: []byte("old")})
		}
		s.txn(nil, ops...)
	}
	s.put("q/0000", "other")
	all, rev, err := s.List(s.ctx, "p/", "", 0, 0)
	if err != nil || len(all) != 2500 {
		t.Fatalf("%d items, %v", len(all), err)
	}
	s.put("p/0001", "new")
	s.txn(nil, store.Op{Key: "p/0002", Delete: true})
	after, n := "", 0
	for {
		page, at, err := s.List(s.ctx, "p/", after, 700, rev)
		if err != nil || at != rev {
			t.Fatalf("page after %q: revision %d, %v", after, at, err)
		}
		if len(page) == 0 {
			break
		}
		for _, item := range page {
			if item.Key != fmt.Sprintf("p/%04d", n) || string(item.Value) != "old" {
				t.Fatalf("item %d at revision %d: %s=%s", n, rev, item.Key, item.Value)
			}
			n++
		}
		after = page[len(page)-1].Key
	}
	if n != 2500 {
		t.Errorf("%d items over all pages", n)
	}
	now, _, err := s.List(s.ctx, "p/", "", 3, 0)
	if err != nil || len(now) != 3 || string(now[1].Value) != "new" || now[2].Key != "p/0003" {
		t.Errorf("now: %v, %v", now, err)
	}
}

func claimants(t *testing.T, s *kv) {
	var wg sync.WaitGroup
	winners := make(chan int, 100)
	for i := range 100 {
		wg.Go(func() {
			ok, _, err := s.Txn(s.ctx, []store.Cond{{Key: "name"}}, []store.Op{{Key: "name", Value: fmt.Append(nil, i)}})
			if err != nil {
				t.Error(err)
			}
			if ok {
				winners <- i
			}
		})
	}
	wg.Wait()
	close(winners)
	won := -1
	for w := range winners {
		if won >= 0 {
			t.Fatalf("both %d and %d won", won, w)
		}
		won = w
	}
	item, _, _, err := s.Get(s.ctx, "name")
	if err != nil || string(item.Value) != fmt.Sprint(won) {
		t.Errorf("%d won and %s is stored, %v", won, item.Value, err)
	}
}
