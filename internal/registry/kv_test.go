package registry

import (
	"context"
	"errors"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"webgw.dev/webgw/internal/store"
)

// kv is a store for these tests, with faults: it can forget its history, fail,
// and hold its watches back.
type kv struct {
	mu      sync.Mutex
	rev     int64
	items   map[string]store.Item
	log     []store.Batch
	floor   int64 // revisions up to here are forgotten
	changed chan struct{}
	fail    error  // of every call
	before  func() // run once, before the next transaction
	leases  map[store.Lease]*time.Timer
	nextID  store.Lease
}

func newKV() *kv {
	return &kv{items: map[string]store.Item{}, changed: make(chan struct{}), leases: map[store.Lease]*time.Timer{}}
}

func (k *kv) Get(_ context.Context, key string) (store.Item, bool, int64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	it, ok := k.items[key]
	return it, ok, k.rev, k.fail
}

// List answers as of now only: these tests load while nobody writes, or accept
// what came in between, which the watch tells again.
func (k *kv) List(_ context.Context, prefix, after string, limit int, at int64) ([]store.Item, int64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail != nil {
		return nil, 0, k.fail
	}
	var out []store.Item
	for key, it := range k.items {
		if strings.HasPrefix(key, prefix) && key > after {
			out = append(out, it)
		}
	}
	slices.SortFunc(out, func(a, b store.Item) int { return strings.Compare(a.Key, b.Key) })
	if limit > 0 && len(out) > limit {
		out = out[:limit]
	}
	if at == 0 {
		at = k.rev
	}
	return out, at, nil
}

func (k *kv) Txn(_ context.Context, conds []store.Cond, ops []store.Op) (bool, int64, error) {
	k.mu.Lock()
	before := k.before
	k.before = nil
	k.mu.Unlock()
	if before != nil {
		before()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail != nil {
		return false, 0, k.fail
	}
	for _, c := range conds {
		if k.items[c.Key].Mod != c.Mod {
			return false, k.rev, nil
		}
	}
	for _, op := range ops {
		if op.Lease != 0 && k.leases[op.Lease] == nil {
			return false, k.rev, store.ErrLease
		}
	}
	if len(conds) > 128 || len(ops) > 128 {
		return false, 0, errors.New("etcd allows 128 by default")
	}
	k.writeLocked(ops)
	return true, k.rev, nil
}

func (k *kv) writeLocked(ops []store.Op) {
	k.rev++
	b := store.Batch{Rev: k.rev}
	for _, op := range ops {
		if op.Delete {
			delete(k.items, op.Key)
			b.Events = append(b.Events, store.Event{Item: store.Item{Key: op.Key, Mod: k.rev}, Deleted: true})
			continue
		}
		it := store.Item{Key: op.Key, Value: op.Value, Create: k.rev, Mod: k.rev, Lease: op.Lease}
		if old, ok := k.items[op.Key]; ok {
			it.Create = old.Create
		}
		k.items[op.Key] = it
		b.Events = append(b.Events, store.Event{Item: it})
	}
	k.log = append(k.log, b)
	close(k.changed)
	k.changed = make(chan struct{})
}

func (k *kv) Watch(ctx context.Context, prefix string, from int64) iter.Seq2[store.Batch, error] {
	return func(yield func(store.Batch, error) bool) {
		for next := from; ; {
			k.mu.Lock()
			var todo []store.Batch
			changed, floor, fail := k.changed, k.floor, k.fail
			if next <= k.rev && next > floor {
				todo = k.log[next-1:]
			}
			k.mu.Unlock()
			if fail != nil {
				yield(store.Batch{}, fail)
				return
			}
			if next <= floor {
				yield(store.Batch{}, store.ErrCompacted)
				return
			}
			for _, b := range todo {
				if !yield(b, nil) {
					return
				}
				next = b.Rev + 1
			}
			if len(todo) > 0 {
				continue
			}
			select {
			case <-changed:
			case <-ctx.Done():
				yield(store.Batch{}, ctx.Err())
				return
			}
		}
	}
}

func (k *kv) Grant(_ context.Context, ttl time.Duration) (store.Lease, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.nextID++
	id := k.nextID
	k.leases[id] = time.AfterFunc(ttl, func() { k.end(id) })
	return id, nil
}

func (k *kv) end(id store.Lease) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.leases, id)
	var ops []store.Op
	for key, it := range k.items {
		if it.Lease == id {
			ops = append(ops, store.Op{Key: key, Delete: true})
		}
	}
	if len(ops) > 0 {
		k.writeLocked(ops)
	}
}

func (k *kv) KeepAlive(_ context.Context, id store.Lease) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	t := k.leases[id]
	if t == nil {
		return store.ErrLease
	}
	t.Reset(livenessTTL)
	return nil
}

func (k *kv) Revoke(_ context.Context, id store.Lease) error {
	k.end(id)
	return nil
}

func (k *kv) Close() error { return nil }

// setFail makes every call fail from now on, and watches end; nil heals.
func (k *kv) setFail(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fail = err
	close(k.changed)
	k.changed = make(chan struct{})
}

// forget drops the history up to now, and ends watches that have yet to read it.
func (k *kv) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.floor = k.rev
}

// spoil overwrites a value behind everybody's back.
func (k *kv) spoil(key string, value []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.writeLocked([]store.Op{{Key: key, Value: value}})
}

func (k *kv) at() int64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.rev
}
