// Package etcdkv keeps a store in etcd: embedded in this process with its data
// in a directory, or an external cluster. Writes are on disk before they are
// acknowledged.
//
// It must not know what the values mean.
package etcdkv

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/store"
)

// Config says where the data is.
type Config struct {
	Dir       string       // embedded: where its data is kept, mode 0700
	Endpoints []string     // external: URLs of the cluster; none embeds
	TLS       *tls.Config  // external: nil for clear text
	Prefix    string       // of every key; "" is DefaultPrefix
	Log       *slog.Logger // nil: silent
}

// DefaultPrefix keeps our keys apart from others' in a shared cluster.
const DefaultPrefix = "/webgw/"

const (
	pageSize    = 1000
	dialTimeout = 5 * time.Second
	maxTxnOps   = 1024

	// How often a watch without changes hears of the revision; an external
	// cluster is told with --watch-progress-notify-interval.
	progressInterval = 5 * time.Second
)

// Store implements store.KV.
type Store struct {
	prefix string
	client *clientv3.Client
	server *embed.Etcd // nil: external
	log    *etcdLog
	unlock func()
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	closed error // what closing gave
	once   sync.Once

	// Held shared by each call: an embedded etcd must not lose its data file
	// under one that reads.
	using sync.RWMutex
}

var _ store.KV = (*Store)(nil)

// Open starts the embedded etcd, or connects to the external cluster, and
// returns once it answers.
func Open(ctx context.Context, c Config) (*Store, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{prefix: c.Prefix, log: &etcdLog{log: c.Log}, unlock: func() {}}
	if s.prefix == "" {
		s.prefix = DefaultPrefix
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	var err error
	if len(c.Endpoints) == 0 {
		err = s.embed(ctx, c)
	} else {
		err = s.dial(ctx, c)
	}
	if err != nil {
		s.cancel()
		return nil, err
	}
	return s, nil
}

func (s *Store) dial(ctx context.Context, c Config) error {
	client, err := clientv3.New(clientv3.Config{Endpoints: c.Endpoints, TLS: c.TLS, DialTimeout: dialTimeout,
		DialKeepAliveTime: 3 * time.Second, DialKeepAliveTimeout: 3 * time.Second, Context: s.ctx, Logger: s.log.zap()})
	if err == nil {
		try, cancel := context.WithTimeout(ctx, dialTimeout)
		defer cancel()
		_, err = client.Get(try, s.prefix, clientv3.WithKeysOnly(), clientv3.WithLimit(1))
		if err != nil && ctx.Err() == nil {
			// That tried again until the time was up. One more try, that does
			// not, tells why.
			why, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			_, err = pb.NewKVClient(client.ActiveConnection()).Range(why, &pb.RangeRequest{Key: []byte(s.prefix)})
		}
		if err == nil {
			s.client = client
			s.log.running.Store(true)
			return nil
		}
		err = errors.Join(err, client.Close())
	}
	return &webgw.Error{Op: "open store", Kind: webgw.Unavailable, Public: "etcd does not answer at " + strings.Join(c.Endpoints, ", "), Err: err}
}

// begin begins a call, whose context ends also when the store is closed, and
// which is over with done.
func (s *Store) begin(ctx context.Context) (_ context.Context, done func(), err error) {
	s.using.RLock()
	if err := errors.Join(s.ctx.Err(), ctx.Err()); err != nil {
		s.using.RUnlock()
		return nil, nil, s.fail(ctx, err)
	}
	call, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.ctx, cancel)
	return call, func() { stop(); cancel(); s.using.RUnlock() }, nil
}

// fail turns what etcd returns to a caller with ctx into what the contract
// promises.
func (s *Store) fail(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case s.ctx.Err() != nil:
		return store.ErrClosed
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, rpctypes.ErrCompacted):
		return store.ErrCompacted
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		return store.ErrLease
	}
	return fmt.Errorf("etcd: %w", err)
}

func (s *Store) item(kv *mvccpb.KeyValue) store.Item {
	return store.Item{Key: strings.TrimPrefix(string(kv.Key), s.prefix), Value: kv.Value, Create: kv.CreateRevision, Mod: kv.ModRevision, Lease: store.Lease(kv.Lease)}
}

// Get implements store.KV.
func (s *Store) Get(ctx context.Context, key string) (store.Item, bool, int64, error) {
	call, done, err := s.begin(ctx)
	if err != nil {
		return store.Item{}, false, 0, err
	}
	defer done()
	r, err := s.client.Get(call, s.prefix+key)
	if err != nil {
		return store.Item{}, false, 0, s.fail(ctx, err)
	}
	if len(r.Kvs) == 0 {
		return store.Item{}, false, r.Header.Revision, nil
	}
	return s.item(r.Kvs[0]), true, r.Header.Revision, nil
}

// List implements store.KV. It reads page by page, all of one revision.
func (s *Store) List(ctx context.Context, prefix, after string, limit int, at int64) ([]store.Item, int64, error) {
	call, done, err := s.begin(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer done()
	from := s.prefix + prefix
	if next := s.prefix + after + "\x00"; after != "" && next > from {
		from = next
	}
	end := clientv3.GetPrefixRangeEnd(s.prefix + prefix)
	var out []store.Item
	for {
		page := pageSize
		if limit > 0 {
			page = min(page, limit-len(out))
		}
		r, err := s.client.Get(call, from, clientv3.WithRange(end), clientv3.WithLimit(int64(page)), clientv3.WithRev(at))
		if err != nil {
			return nil, 0, s.fail(ctx, err)
		}
		if at == 0 {
			at = r.Header.Revision
		}
		for _, kv := range r.Kvs {
			out = append(out, s.item(kv))
		}
		if !r.More || len(r.Kvs) == 0 || limit > 0 && len(out) >= limit {
			return out, at, nil
		}
		from = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
	}
}

// Txn implements store.KV.
func (s *Store) Txn(ctx context.Context, conds []store.Cond, ops []store.Op) (bool, int64, error) {
	cmps := make([]clientv3.Cmp, len(conds))
	for i, c := range conds {
		cmps[i] = clientv3.Compare(clientv3.ModRevision(s.prefix+c.Key), "=", c.Mod)
	}
	writes := make([]clientv3.Op, len(ops))
	for i, op := range ops {
		switch key := s.prefix + op.Key; {
		case op.Delete:
			writes[i] = clientv3.OpDelete(key)
		default:
			writes[i] = clientv3.OpPut(key, string(op.Value), clientv3.WithLease(clientv3.LeaseID(op.Lease)))
		}
	}
	call, done, err := s.begin(ctx)
	if err != nil {
		return false, 0, err
	}
	defer done()
	r, err := s.client.Txn(call).If(cmps...).Then(writes...).Commit()
	if err != nil {
		return false, 0, s.fail(ctx, err)
	}
	return r.Succeeded, r.Header.Revision, nil
}

// Watch implements store.KV.
func (s *Store) Watch(ctx context.Context, prefix string, from int64) iter.Seq2[store.Batch, error] {
	return func(yield func(store.Batch, error) bool) {
		responses, stop, err := s.watch(ctx, prefix, max(from, 1)) // to etcd, 0 is now
		if err != nil {
			yield(store.Batch{}, err)
			return
		}
		defer stop()
		for r := range responses {
			if err := r.Err(); err != nil {
				if r.CompactRevision != 0 {
					err = rpctypes.ErrCompacted
				}
				yield(store.Batch{}, s.fail(ctx, err))
				return
			}
			if r.IsProgressNotify() && r.Header.Revision >= from {
				from = r.Header.Revision + 1
				if !yield(store.Batch{Rev: r.Header.Revision}, nil) {
					return
				}
			}
			// A response may hold several revisions, but never part of one.
			for len(r.Events) > 0 {
				b := store.Batch{Rev: r.Events[0].Kv.ModRevision}
				for len(r.Events) > 0 && r.Events[0].Kv.ModRevision == b.Rev {
					e := store.Event{Item: s.item(r.Events[0].Kv), Deleted: r.Events[0].Type == clientv3.EventTypeDelete}
					b.Events = append(b.Events, e)
					r.Events = r.Events[1:]
				}
				from = b.Rev + 1
				if !yield(b, nil) {
					return
				}
			}
		}
		yield(store.Batch{}, s.fail(ctx, errors.New("the watch ended")))
	}
}

// watch begins a watch, which ends with ctx, stop, or the store.
func (s *Store) watch(ctx context.Context, prefix string, from int64) (_ clientv3.WatchChan, stop func(), err error) {
	if _, done, err := s.begin(ctx); err != nil {
		return nil, nil, err
	} else {
		defer done()
	}
	ctx, cancel := context.WithCancel(ctx)
	unhook := context.AfterFunc(s.ctx, cancel)
	// Without a leader there is no news: better an error than silence.
	responses := s.client.Watch(clientv3.WithRequireLeader(ctx), s.prefix+prefix, clientv3.WithPrefix(), clientv3.WithRev(from), clientv3.WithProgressNotify())
	return responses, func() { unhook(); cancel() }, nil
}

// Grant implements store.KV.
func (s *Store) Grant(ctx context.Context, ttl time.Duration) (store.Lease, error) {
	call, done, err := s.begin(ctx)
	if err != nil {
		return 0, err
	}
	defer done()
	r, err := s.client.Grant(call, int64(max(ttl, 2*time.Second)/time.Second))
	if err != nil {
		return 0, s.fail(ctx, err)
	}
	return store.Lease(r.ID), nil
}

// KeepAlive implements store.KV.
func (s *Store) KeepAlive(ctx context.Context, lease store.Lease) error {
	call, done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	_, err = s.client.KeepAliveOnce(call, clientv3.LeaseID(lease))
	return s.fail(ctx, err)
}

// Revoke implements store.KV.
func (s *Store) Revoke(ctx context.Context, lease store.Lease) error {
	call, done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	_, err = s.client.Revoke(call, clientv3.LeaseID(lease))
	return s.fail(ctx, err)
}

// Close implements store.KV.
func (s *Store) Close() error {
	s.once.Do(func() {
		s.log.running.Store(false)
		s.cancel()
		s.using.Lock() // until the calls under way have seen it
		defer s.using.Unlock()
		// The client's streams end with our context, and that is no failure.
		if err := s.client.Close(); !errors.Is(err, context.Canceled) {
			s.closed = err
		}
		if s.server != nil {
			s.server.Close()
		}
		s.unlock()
	})
	return s.closed
}
