// Package storetest holds every store to the contract of store.KV.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"webgw.dev/webgw/internal/store"
)

// Run runs the suite; open gives an empty store and closes it when t ends.
func Run(t *testing.T, open func(t *testing.T) store.KV) {
	for name, f := range map[string]func(*testing.T, *kv){
		"a key is absent, put, changed, deleted":                    life,
		"a transaction holds its conditions or writes nothing":      conditions,
		"revisions rise by one with each transaction":               revisions,
		"a list is cut by prefix, start and limit, at one revision": list,
		"a watch from the past misses nothing and repeats nothing":  watchPast,
		"a watch sees all of a transaction in one batch":            watchBatch,
		"a watch keeps up with many writers":                        watchWriters,
		"a watch ends with its context":                             watchEnds,
		"a hundred claimants of a key have one winner":              claimants,
		"a lease takes its keys with it, and the watch sees it":     leases,
		"a lease that is kept alive lives":                          keptLease,
		"a closed store ends watches and refuses everything":        closed,
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			f(t, &kv{open(t), t, ctx})
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

// collect reads a watch until n events have come.
func (s *kv) collect(prefix string, from int64, n int) (out []store.Event, batches int) {
	s.t.Helper()
	last := from - 1
	for b, err := range s.Watch(s.ctx, prefix, from) {
		if err != nil {
			s.t.Fatalf("watch after %d of %d events: %v", len(out), n, err)
		}
		if b.Rev <= last {
			s.t.Fatalf("revision %d after %d", b.Rev, last)
		}
		last = b.Rev
		if len(b.Events) > 0 {
			batches++
		}
		for _, e := range b.Events {
			if e.Mod != b.Rev {
				s.t.Fatalf("an event of revision %d in the batch of %d", e.Mod, b.Rev)
			}
		}
		if out = append(out, b.Events...); len(out) >= n {
			break
		}
	}
	return out, batches
}

func watchPast(t *testing.T, s *kv) {
	from := s.put("p/a", "1")
	s.put("q/a", "not ours")
	s.put("p/a", "2")
	s.txn(nil, store.Op{Key: "p/a", Delete: true})
	go func() { s.put("p/b", "3") }()
	got, _ := s.collect("p/", from, 4)
	text := ""
	for _, e := range got {
		text += fmt.Sprintf("%s=%s,%v ", e.Key, e.Value, e.Deleted)
	}
	if want := "p/a=1,false p/a=2,false p/a=,true p/b=3,false "; text != want {
		t.Errorf("saw %s, want %s", text, want)
	}
	if got, _ := s.collect("p/", from+1, 1); string(got[0].Value) != "2" {
		t.Errorf("resumed with %s", got[0].Value)
	}
}

func watchBatch(t *testing.T, s *kv) {
	rev := s.txn(nil, store.Op{Key: "p/a", Value: []byte("1")}, store.Op{Key: "p/b", Value: []byte("1")}, store.Op{Key: "p/c", Value: []byte("1")})
	if got, batches := s.collect("p/", rev, 3); len(got) != 3 || batches != 1 {
		t.Errorf("%d events in %d batches", len(got), batches)
	}
}

func watchWriters(t *testing.T, s *kv) {
	const writers, each = 8, 50
	from := s.put("start", "") + 1
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if ok, _, err := s.Txn(s.ctx, nil, []store.Op{{Key: fmt.Sprintf("p/%d/%d", w, i), Value: []byte("x")}}); err != nil || !ok {
					t.Errorf("write: %v %v", ok, err)
				}
			}
		})
	}
	got, _ := s.collect("p/", from, writers*each)
	wg.Wait()
	seen := map[string]bool{}
	for _, e := range got {
		seen[e.Key] = true
	}
	if len(seen) != writers*each || len(got) != writers*each {
		t.Errorf("%d events about %d keys, want %d", len(got), len(seen), writers*each)
	}
}

func watchEnds(t *testing.T, s *kv) {
	ctx, cancel := context.WithCancel(s.ctx)
	from := s.put("p/a", "1")
	var last error
	for b, err := range s.Watch(ctx, "p/", from) {
		if last = err; err == nil && len(b.Events) > 0 {
			cancel()
		}
	}
	cancel()
	if !errors.Is(last, context.Canceled) {
		t.Errorf("the last element is %v", last)
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

func leases(t *testing.T, s *kv) {
	lease, err := s.Grant(s.ctx, 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	rev := s.txn(nil, store.Op{Key: "p/a", Value: []byte("1"), Lease: lease}, store.Op{Key: "p/b", Value: []byte("1"), Lease: lease})
	s.put("p/b", "kept: no longer of the lease")
	got, _ := s.collect("p/", rev+2, 1)
	if len(got) != 1 || !got[0].Deleted || got[0].Key != "p/a" {
		t.Errorf("saw %+v", got)
	}
	s.wantNone("p/a")
	if err := s.KeepAlive(s.ctx, lease); !errors.Is(err, store.ErrLease) {
		t.Errorf("keeping an ended lease alive: %v", err)
	}
	if _, _, err := s.Txn(s.ctx, nil, []store.Op{{Key: "p/c", Lease: lease}}); !errors.Is(err, store.ErrLease) {
		t.Errorf("writing under an ended lease: %v", err)
	}
	if lease, err = s.Grant(s.ctx, time.Hour); err != nil {
		t.Fatal(err)
	}
	s.txn(nil, store.Op{Key: "p/d", Lease: lease})
	if err := s.Revoke(s.ctx, lease); err != nil {
		t.Fatal(err)
	}
	s.wantNone("p/d")
}

func keptLease(t *testing.T, s *kv) {
	lease, err := s.Grant(s.ctx, 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	rev := s.txn(nil, store.Op{Key: "a", Value: []byte("1"), Lease: lease})
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for range 8 {
		<-tick.C
		if err := s.KeepAlive(s.ctx, lease); err != nil {
			t.Fatal(err)
		}
	}
	s.want("a", "1", rev)
}

func closed(t *testing.T, s *kv) {
	from := s.put("a", "1")
	ended := make(chan error, 1)
	began := make(chan struct{})
	go func() {
		var last error
		for b, err := range s.Watch(s.ctx, "", from) {
			if last = err; err == nil && len(b.Events) > 0 {
				close(began)
			}
		}
		ended <- last
	}()
	<-began
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, store.ErrClosed) {
		t.Errorf("the watch ended with %v", err)
	}
	if _, _, _, err := s.Get(s.ctx, "a"); !errors.Is(err, store.ErrClosed) {
		t.Errorf("get: %v", err)
	}
	if _, _, err := s.Txn(s.ctx, nil, []store.Op{{Key: "a"}}); !errors.Is(err, store.ErrClosed) {
		t.Errorf("txn: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
}
