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
	"time"

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
		if _, err = client.Get(try, s.prefix, clientv3.WithKeysOnly(), clientv3.WithLimit(1)); err == nil {
			s.client = client
			s.log.running.Store(true)
			return nil
		}
		err = errors.Join(err, client.Close())
	}
	return &webgw.Error{Op: "open store", Kind: webgw.Unavailable, Public: "etcd does not answer at " + strings.Join(c.Endpoints, ", "), Err: err}
}

// fail turns what etcd returns into what the contract promises.
func (s *Store) fail(err error) error {
	switch {
	case err == nil:
		return nil
	case s.ctx.Err() != nil:
		return store.ErrClosed
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
	r, err := s.client.Get(ctx, s.prefix+key)
	if err != nil {
		return store.Item{}, false, 0, s.fail(err)
	}
	if len(r.Kvs) == 0 {
		return store.Item{}, false, r.Header.Revision, nil
	}
	return s.item(r.Kvs[0]), true, r.Header.Revision, nil
}

// List implements store.KV. It reads page by page, all of one revision.
func (s *Store) List(ctx context.Context, prefix, after string, limit int, at int64) ([]store.Item, int64, error) {
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
		r, err := s.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(int64(page)), clientv3.WithRev(at))
		if err != nil {
			return nil, 0, s.fail(err)
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
	r, err := s.client.Txn(ctx).If(cmps...).Then(writes...).Commit()
	if err != nil {
		return false, 0, s.fail(err)
	}
	return r.Succeeded, r.Header.Revision, nil
}

// Watch implements store.KV.
func (s *Store) Watch(ctx context.Context, prefix string, from int64) iter.Seq2[store.Batch, error] {
	return func(yield func(store.Batch, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(s.ctx, cancel)()
		// Without a leader there is no news: better an error than silence.
		responses := s.client.Watch(clientv3.WithRequireLeader(ctx), s.prefix+prefix, clientv3.WithPrefix(), clientv3.WithRev(from), clientv3.WithProgressNotify())
		for r := range responses {
			if err := r.Err(); err != nil {
				if r.CompactRevision != 0 {
					err = rpctypes.ErrCompacted
				}
				yield(store.Batch{}, s.fail(err))
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
		err := s.fail(ctx.Err())
		if err == nil {
			err = errors.New("etcd: the watch ended")
		}
		if ctx.Err() != nil && s.ctx.Err() == nil {
			err = ctx.Err()
		}
		yield(store.Batch{}, err)
	}
}

// Grant implements store.KV.
func (s *Store) Grant(ctx context.Context, ttl time.Duration) (store.Lease, error) {
	r, err := s.client.Grant(ctx, int64(max(ttl, 2*time.Second)/time.Second))
	if err != nil {
		return 0, s.fail(err)
	}
	return store.Lease(r.ID), nil
}

// KeepAlive implements store.KV.
func (s *Store) KeepAlive(ctx context.Context, lease store.Lease) error {
	_, err := s.client.KeepAliveOnce(ctx, clientv3.LeaseID(lease))
	return s.fail(err)
}

// Revoke implements store.KV.
func (s *Store) Revoke(ctx context.Context, lease store.Lease) error {
	_, err := s.client.Revoke(ctx, clientv3.LeaseID(lease))
	return s.fail(err)
}

// Close implements store.KV.
func (s *Store) Close() error {
	if s.ctx.Err() != nil {
		return nil
	}
	s.log.running.Store(false)
	s.cancel()
	err := s.client.Close()
	if errors.Is(err, context.Canceled) {
		err = nil // its streams end with our context
	}
	if s.server != nil {
		s.server.Close()
	}
	s.unlock()
	return err
}
