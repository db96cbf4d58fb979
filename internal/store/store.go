// Package store is the contract of the registry's memory: revisioned
// key-values with transactions, a resumable watch, and leases. Package etcdkv
// keeps them in etcd, memkv in memory for tests; storetest holds both to this
// contract.
//
// It must not know what the values mean.
package store

import (
	"context"
	"errors"
	"iter"
	"time"
)

// Errors that implementations return, possibly wrapped.
var (
	// ErrCompacted: the history asked for is gone; read everything anew.
	ErrCompacted = errors.New("store: revision compacted")
	// ErrLease: the lease has ended or never was.
	ErrLease = errors.New("store: no such lease")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("store: closed")
)

// Lease is a term of life shared by the keys attached to it. 0 is no lease.
type Lease int64

// Item is one key with its value and the revisions that made it.
type Item struct {
	Key    string
	Value  []byte
	Create int64 // revision of its creation
	Mod    int64 // revision of its last change
	Lease  Lease
}

// Cond is one condition of a transaction: the key's modification revision
// equals Mod; 0 means that the key does not exist.
type Cond struct {
	Key string
	Mod int64
}

// Op is one write of a transaction: put Value, or delete the key if Delete.
type Op struct {
	Key    string
	Value  []byte
	Lease  Lease
	Delete bool
}

// Event is one change. A deletion carries the key and the revision (Mod) only.
type Event struct {
	Item
	Deleted bool
}

// Batch is every change of one revision, in the order of the transaction, or,
// with no events, the mere news that the store has reached Rev.
type Batch struct {
	Rev    int64
	Events []Event
}

// KV is a store. Revisions are one sequence over all keys, rising by one with
// each transaction that writes. Acknowledged writes survive the death of the
// process. All methods may be called at once.
type KV interface {
	// Get returns the item, or ok false. rev is the store's revision as read.
	Get(ctx context.Context, key string) (item Item, ok bool, rev int64, err error)

	// List returns up to limit items (0: all) whose keys start with prefix and
	// are greater than after, in key order, all as of revision at (0: now; then
	// rev tells the revision to use for the next page).
	List(ctx context.Context, prefix, after string, limit int, at int64) (items []Item, rev int64, err error)

	// Txn does all ops at one revision if all conditions hold, else none. ok
	// tells which. A key may be written once only in a transaction.
	Txn(ctx context.Context, conds []Cond, ops []Op) (ok bool, rev int64, err error)

	// Watch yields, until ctx ends, every change to keys under prefix from
	// revision from on (inclusive), without a gap, each revision once and in
	// order. Its last element is an error: ctx's, ErrCompacted, or another
	// after which the caller may resume from the last revision plus one.
	Watch(ctx context.Context, prefix string, from int64) iter.Seq2[Batch, error]

	// Grant starts a lease that ends ttl (whole seconds, at least 2) after its
	// last KeepAlive, taking its keys with it. Revoke ends it at once.
	Grant(ctx context.Context, ttl time.Duration) (Lease, error)
	KeepAlive(ctx context.Context, lease Lease) error
	Revoke(ctx context.Context, lease Lease) error

	// Close ends watches and releases what the store holds.
	Close() error
}
