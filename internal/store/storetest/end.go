package storetest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"webgw.dev/webgw/internal/store"
)

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

func revoked(t *testing.T, s *kv) {
	lease, err := s.Grant(s.ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	rev := s.txn(nil, store.Op{Key: "p/a", Lease: lease}, store.Op{Key: "p/b", Lease: lease})
	if item := s.want("p/a", "", rev); item.Lease != lease {
		t.Errorf("of lease %d, want %d", item.Lease, lease)
	}
	if err := s.Revoke(s.ctx, lease); err != nil {
		t.Fatal(err)
	}
	got, batches := s.collect("p/", rev+1, 2)
	if batches != 1 || !got[0].Deleted || !got[1].Deleted {
		t.Errorf("saw %+v in %d batches", got, batches)
	}
	for what, err := range map[string]error{
		"keep alive": s.KeepAlive(s.ctx, lease),
		"revoke":     s.Revoke(s.ctx, lease),
	} {
		if !errors.Is(err, store.ErrLease) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// each calls every method but Watch and Close, and returns their errors.
func (s *kv) each(ctx context.Context, lease store.Lease) map[string]error {
	_, _, _, get := s.Get(ctx, "a")
	_, _, list := s.List(ctx, "", "", 0, 0)
	_, _, txn := s.Txn(ctx, nil, []store.Op{{Key: "a"}})
	_, grant := s.Grant(ctx, time.Minute)
	return map[string]error{"get": get, "list": list, "txn": txn, "grant": grant,
		"keep alive": s.KeepAlive(ctx, lease), "revoke": s.Revoke(ctx, lease)}
}

func canceled(t *testing.T, s *kv) {
	lease, err := s.Grant(s.ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(s.ctx)
	cancel()
	for what, err := range s.each(ctx, lease) {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", what, err)
		}
	}
	s.wantNone("a")
	if err := s.KeepAlive(s.ctx, lease); err != nil {
		t.Errorf("the lease was revoked: %v", err)
	}
}

func closed(t *testing.T, s *kv) {
	lease, err := s.Grant(s.ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
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
	for what, err := range s.each(s.ctx, lease) {
		if !errors.Is(err, store.ErrClosed) {
			t.Errorf("%s: %v", what, err)
		}
	}
	var last error
	for _, err := range s.Watch(s.ctx, "", from) {
		last = err
	}
	if !errors.Is(last, store.ErrClosed) {
		t.Errorf("a new watch: %v", last)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
}

func closedInUse(t *testing.T, s *kv) {
	const users = 8
	first := s.put("a", "1")
	var ready, done sync.WaitGroup
	ready.Add(2 * users)
	for range users {
		done.Go(func() {
			for n := 0; ; n++ {
				_, _, err := s.Txn(s.ctx, nil, []store.Op{{Key: "a", Value: []byte("x")}})
				if err == nil {
					_, _, err = s.List(s.ctx, "", "", 0, 0)
				}
				if n == 0 {
					ready.Done()
				}
				if err != nil {
					if !errors.Is(err, store.ErrClosed) {
						t.Errorf("a user saw %v", err)
					}
					return
				}
			}
		})
		done.Go(func() {
			seen := false
			var last error
			for b, err := range s.Watch(s.ctx, "", first) {
				if last = err; !seen && len(b.Events) > 0 {
					seen = true
					ready.Done()
				}
			}
			if !errors.Is(last, store.ErrClosed) {
				t.Errorf("a watch ended with %v", last)
			}
		})
	}
	ready.Wait()
	for range 2 {
		done.Go(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	done.Wait()
}
