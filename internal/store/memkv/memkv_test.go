package memkv

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"webgw.dev/webgw/internal/store"
	"webgw.dev/webgw/internal/store/storetest"
)

// compacting lets the suite make the store forget.
type compacting struct{ *Store }

func (c compacting) Compact(_ context.Context, rev int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.trimLocked(int(c.rev - rev))
	return nil
}

func open(t *testing.T) store.KV {
	s := New()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return compacting{s}
}

func TestContract(t *testing.T) { storetest.Run(t, open) }

// A bubble also fails if anything is left running after Close.
func TestContractInBubble(t *testing.T) { storetest.RunIn(t, synctest.Test, open) }

func TestHistoryIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		s.History = 3
		for range 10 {
			if _, _, err := s.Txn(t.Context(), nil, []store.Op{{Key: "a", Value: []byte("x")}}); err != nil {
				t.Fatal(err)
			}
		}
		var last error
		for _, err := range s.Watch(t.Context(), "", 5) {
			last = err
		}
		if !errors.Is(last, store.ErrCompacted) {
			t.Errorf("a watch from too far back: %v", last)
		}
		if _, _, err := s.List(t.Context(), "", "", 0, 5); !errors.Is(err, store.ErrCompacted) {
			t.Errorf("a list from too far back: %v", err)
		}
		if items, _, err := s.List(t.Context(), "", "", 0, 0); err != nil || len(items) != 1 {
			t.Errorf("%v, %v", items, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// The versions of a key go with the revisions that made them.
func TestForgottenKeysTakeNoRoom(t *testing.T) {
	s := New()
	s.History = 2
	for range 5 {
		for _, del := range []bool{false, true} {
			if _, _, err := s.Txn(t.Context(), nil, []store.Op{{Key: "a", Delete: del}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := len(s.keys["a"]); n > 3 {
		t.Errorf("%d versions of a key in a store that remembers 2 revisions", n)
	}
	for range 2 {
		if _, _, err := s.Txn(t.Context(), nil, []store.Op{{Key: "b"}}); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := s.keys["a"]; ok {
		t.Error("a deleted key is still remembered")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
