package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"webgw.dev/webgw/internal/store"
)

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
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, _, err := s.Txn(s.ctx, nil, []store.Op{{Key: "p/b", Value: []byte("3")}}); err != nil {
			t.Error(err)
		}
	})
	got, _ := s.collect("p/", from, 4)
	wg.Wait()
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

func watchAll(t *testing.T, s *kv) {
	s.put("p/a", "1")
	s.put("p/a", "2")
	if got, _ := s.collect("p/", 0, 2); string(got[0].Value) != "1" || string(got[1].Value) != "2" {
		t.Errorf("saw %s, %s", got[0].Value, got[1].Value)
	}
}

func watchBatch(t *testing.T, s *kv) {
	const n = 1000
	var ops []store.Op
	for i := range n {
		// In no order of keys, as much as a transaction of records has.
		ops = append(ops, store.Op{Key: fmt.Sprintf("p/%03d", i*7%n), Value: bytes.Repeat([]byte("x"), 1000)})
	}
	before := s.put("p/000", "before")
	s.txn(nil, ops...)
	s.put("p/000", "after")
	got, batches := s.collect("p/", before, n+2)
	if len(got) != n+2 || batches != 3 {
		t.Fatalf("%d events in %d batches, want %d in 3", len(got), batches, n+2)
	}
	for i, e := range got[1 : n+1] {
		if e.Key != ops[i].Key {
			t.Fatalf("event %d is of %s, not %s as written", i, e.Key, ops[i].Key)
		}
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

func watchIdle(t *testing.T, s *kv) {
	from := s.put("p/a", "1") + 1
	rev := s.put("q/a", "not ours")
	for b, err := range s.Watch(s.ctx, "p/", from) {
		if err != nil || len(b.Events) > 0 {
			t.Fatalf("saw %+v, %v", b, err)
		}
		if b.Rev >= rev {
			break
		}
	}
}

func compacted(t *testing.T, s *kv) {
	c, ok := s.KV.(Compacter)
	if !ok {
		t.Skip("this store can't be told to compact")
	}
	old := s.put("p/a", "1")
	s.put("p/a", "2")
	s.put("p/a", "3")
	last := s.put("p/a", "4")
	if err := c.Compact(s.ctx, last); err != nil {
		t.Fatal(err)
	}
	var end error
	for b, err := range s.Watch(s.ctx, "p/", old) {
		if end = err; err == nil {
			t.Errorf("saw %+v", b)
		}
	}
	if !errors.Is(end, store.ErrCompacted) {
		t.Errorf("the watch ended with %v", end)
	}
	if _, _, err := s.List(s.ctx, "p/", "", 0, old); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("list: %v", err)
	}
	s.want("p/a", "4", last)
	next := s.put("p/a", "5")
	if got, _ := s.collect("p/", last+1, 1); got[0].Mod != next {
		t.Errorf("saw %+v", got)
	}
}
