package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
)

// Bounds of one write.
const (
	writeTries   = 30
	writeTimeout = 20 * time.Second
)

// lanes keep writes of this replica that would only collide in the store in
// line: those of one owner, and those that take names in one domain. They are
// channels, not mutexes, so that a waiter can give up.
type lanes struct {
	seed  maphash.Seed
	slots [512]chan struct{}
}

func newLanes() *lanes {
	l := &lanes{seed: maphash.MakeSeed()}
	for i := range l.slots {
		l.slots[i] = make(chan struct{}, 1)
	}
	return l
}

// enter waits for every named lane, in one order so that nobody waits in a
// circle. leave must be called when err is nil.
func (l *lanes) enter(ctx context.Context, names []string) (leave func(), err error) {
	var slots []int
	for _, n := range names {
		slots = append(slots, int(maphash.String(l.seed, n)%uint64(len(l.slots))))
	}
	slices.Sort(slots)
	slots = slices.Compact(slots)
	for i, n := range slots {
		select {
		case l.slots[n] <- struct{}{}:
		case <-ctx.Done():
			for _, n := range slots[:i] {
				<-l.slots[n]
			}
			return nil, ctx.Err()
		}
	}
	return func() {
		for _, n := range slots {
			<-l.slots[n]
		}
	}, nil
}

func lanesOf(r *webgw.Record) []string {
	names := []string{r.Owner.String()}
	for _, c := range claims(r) {
		if s, ports, ok := parsePortKey(c.key); ok {
			names = append(names, s.guards(ports)...)
		} else if c.host != "" {
			names = append(names, domain(c.host))
		} else {
			names = append(names, c.key)
		}
	}
	return names
}

func busy(err error) error {
	return &webgw.Error{Kind: webgw.Unavailable, Public: "the registry can't write now", Hint: "try again", Err: err}
}

// admit asks whether id may declare records.
func (s *Server) admit(id webgw.ID) error {
	if s.Admit == nil {
		return nil
	}
	err := s.Admit(id)
	if err != nil && webgw.KindOf(err) == webgw.Internal {
		return &webgw.Error{Kind: webgw.Forbidden, Public: "this registry has not admitted " + id.String(), Hint: "ask whoever runs it", Err: err}
	}
	return err
}

// write takes in an envelope for key from caller and returns the revision at
// which it stands, after the mirror has reached it.
func (s *Server) write(ctx context.Context, caller webgw.ID, key webgw.Key, raw []byte, deleted bool) (rev int64, err error) {
	start := time.Now()
	// To strangers, a key of somebody else is unknown unless they bring what
	// its owner has signed; they learn nothing about what exists.
	unknown := func(err error) error {
		if caller == key.Owner {
			return err
		}
		return &webgw.Error{Kind: webgw.NotFound, Public: "there is no such record", Err: err}
	}
	if len(raw) > webgw.MaxEnvelope {
		return 0, unknown(&webgw.Error{Kind: webgw.Invalid, Public: "the envelope is larger than 64 KiB"})
	}
	// One line, as the watch feed needs it.
	var line bytes.Buffer
	if json.Compact(&line, raw) == nil {
		raw = line.Bytes()
	}
	signed, err := ident.Verify(raw)
	if err != nil {
		return 0, unknown(err)
	}
	r := signed.Record
	if r.Key() != key {
		return 0, unknown(&webgw.Error{Kind: webgw.Invalid, Field: "name", Public: "the envelope holds the record " + r.Key().String() + ", not the one addressed"})
	}
	if r.Deleted != deleted {
		if deleted {
			return 0, &webgw.Error{Kind: webgw.Invalid, Field: "deleted", Public: "a DELETE needs the signed withdrawal of the record as its body"}
		}
		return 0, &webgw.Error{Kind: webgw.Invalid, Field: "deleted", Public: "a withdrawal is sent by DELETE"}
	}
	if err := r.CheckAt(start); err != nil {
		return 0, err
	}
	if !r.Deleted {
		if err := checkNames(r); err != nil {
			return 0, err
		}
	}
	if caller != r.Owner {
		if err := s.admit(caller); err != nil {
			return 0, err
		}
	}

	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	if err := s.prove(ctx, caller, r); err != nil {
		return 0, err
	}
	leave, err := s.lanes.enter(ctx, lanesOf(r))
	if err != nil {
		return 0, busy(err)
	}
	defer leave()
	select {
	case s.tokens <- struct{}{}:
		defer func() { <-s.tokens }()
	case <-ctx.Done():
		return 0, busy(ctx.Err())
	}
	rev, err = s.commit(ctx, signed)
	if webgw.KindOf(err) == webgw.Exhausted {
		s.metrics.limited.WithLabelValues("quota").Inc()
	}
	if err == nil {
		s.metrics.writes.Observe(time.Since(start).Seconds())
		s.log().Debug("registry: declared", "record", r.Key().String(), "seq", r.Seq, "deleted", r.Deleted, "rev", rev)
	}
	return rev, err
}

// commit plans and tries until nothing came in between.
func (s *Server) commit(ctx context.Context, signed ident.Signed) (int64, error) {
	m := s.mirror
	key := signed.Record.Key()
	m.mu.RLock()
	known := m.records[key] != nil
	m.mu.RUnlock()
	if !signed.Record.Deleted || !known {
		// Withdrawing what is stored stays open to those no longer admitted.
		if err := s.admit(signed.Record.Owner); err != nil {
			return 0, err
		}
	}
	for range writeTries {
		m.mu.RLock()
		if old := m.records[key]; old != nil && bytes.Equal(old.Envelope(), signed.Envelope()) {
			m.mu.RUnlock()
			return old.mod, nil // sent twice
		}
		p := newPlan(m, time.Now(), s.grace(), s.quota())
		err := p.declare(signed)
		m.mu.RUnlock()
		if err != nil {
			return 0, err
		}
		conds, ops := p.txn()
		ok, rev, err := s.Store.Txn(ctx, conds, ops)
		if err != nil {
			return 0, busy(err)
		}
		if ok {
			if err := m.wait(ctx, rev); err != nil {
				return 0, busy(err)
			}
			return rev, nil
		}
		s.metrics.conflicts.Inc()
		if err := s.catchUp(ctx, rev); err != nil {
			return 0, busy(err)
		}
	}
	return 0, busy(nil)
}

// catchUp waits until the mirror has seen what came in between, but not for
// long: the store may be at rev for reasons that are none of the registry's.
func (s *Server) catchUp(ctx context.Context, rev int64) error {
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond+rand.N(20*time.Millisecond))
	defer cancel()
	if err := s.mirror.wait(short, rev); err != nil {
		return ctx.Err()
	}
	return nil
}
