package memkv

import (
	"errors"
	"testing"
	"testing/synctest"

	"webgw.dev/webgw/internal/store"
	"webgw.dev/webgw/internal/store/storetest"
)

func TestContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.KV {
		s := New()
		t.Cleanup(func() { s.Close() })
		return s
	})
}

func TestHistoryIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		s.History = 3
		for range 10 {
			if _, _, err := s.Txn(t.Context(), nil, []store.Op{{Key: "a", Value: []byte("x")}}); err != nil {
				t.Fatal(err)
			}
		}
		for _, err := range s.Watch(t.Context(), "", 5) {
			if !errors.Is(err, store.ErrCompacted) {
				t.Errorf("a watch from too far back: %v", err)
			}
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
