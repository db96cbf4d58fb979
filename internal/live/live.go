// Package live is the one reconciler of gateways and nodes: it follows the
// registry's feed, checks every record again, keeps the last good state in
// memory and on disk, and hands immutable views of it to whoever applies them.
//
// The registry is not trusted: what it can't prove is refused, what it leaves
// out stays. A record ends by its owner's tombstone, by a newer version, or by
// its expiry, and in no other way.
//
// It must not know what records mean to the role, nor how the feed travels.
package live

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/run"
)

// Feed is where changes come from.
type Feed interface {
	// Watch yields changes from revision since of epoch on, until ctx ends or
	// with an error as its last element. With since 0 or an epoch that is not
	// the registry's it begins with a Reset and everything there is.
	Watch(ctx context.Context, since int64, epoch string) iter.Seq2[Change, error]

	// Get returns the newest version of a record, tombstones included, or an
	// error of kind webgw.NotFound.
	Get(ctx context.Context, key webgw.Key) (ident.Signed, error)
}

// Change is one step of the feed. Its records are verified: nothing else makes
// an ident.Signed.
type Change struct {
	Rev     int64  // what is told up to here; 0: more of the same revision follows
	Epoch   string // of the registry's store; a restore begins a new one; "": as before
	Records []ident.Signed
	Refused int  // records that came along and did not verify
	Reset   bool // everything follows, up to Synced
	Synced  bool // everything that there is has been told
}

// View is the state at one moment. It never changes; holders share it.
type View struct {
	Rev     int64
	Epoch   string
	Synced  bool                       // the registry has told everything since this process began
	Records map[webgw.Key]ident.Signed // live ones only; must not be changed
}

// Of yields the live records of a kind, in no order.
func (v *View) Of(kind webgw.Kind) iter.Seq[*webgw.Record] {
	return func(yield func(*webgw.Record) bool) {
		for k, s := range v.Records {
			if k.Kind == kind && !yield(s.Record) {
				return
			}
		}
	}
}

// Limits and pauses.
const (
	gather     = 20 * time.Millisecond // changes that come within it are applied together
	saveEvery  = time.Second           // at most; after a pause a change is saved at once
	saveRetry  = 30 * time.Second
	backoffMin = 200 * time.Millisecond
	backoffMax = 10 * time.Second
	maxRecords = 1 << 20 // versions held, tombstones included
	maxLater   = 1000    // records from the future that wait for their time
	lookups    = 16      // of missing records, at a time
	lookupTime = 10 * time.Second
)

// Follower keeps one role's state. Set the fields, then Run.
type Follower struct {
	Feed    Feed
	Path    string                // snapshot file; "": none is kept
	Apply   func(*View)           // takes a new view; called by one goroutine; nil: none
	Metrics prometheus.Registerer // nil: counted but not registered
	Log     *slog.Logger          // nil: discards

	view atomic.Pointer[View]
	at   atomic.Pointer[position]
	m    metrics

	// Of the loop alone.
	records map[webgw.Key]*entry
	later   []ident.Signed // issued in the future, by this clock
	rev     int64
	epoch   string
	synced  bool
	dirty   bool               // the view must be made anew
	seen    map[webgw.Key]bool // since a Reset, until Synced; else nil
}

// entry is the newest version known of one record. It stays past its
// tombstone and its expiry, as the floor under which nothing comes back.
type entry struct {
	signed  ident.Signed
	missing bool // a full resync did not tell of it
}

// forgetAt is when no older version can be valid any more: it was issued
// before this one, and nothing lives longer than webgw.MaxLifetime.
func forgetAt(r *webgw.Record) time.Time { return r.Issued.Add(webgw.MaxLifetime + 2*webgw.MaxSkew) }

// position is where a watch resumes.
type position struct {
	since int64
	epoch string
}

// View returns the newest view; an empty one before Run has read the snapshot.
func (f *Follower) View() *View {
	if v := f.view.Load(); v != nil {
		return v
	}
	return &View{}
}

// Run reads the snapshot, applies it, and follows the feed until ctx ends; then
// it saves what it knows. Its error is that of the last save.
func (f *Follower) Run(ctx context.Context) error {
	if f.Log == nil {
		f.Log = slog.New(slog.DiscardHandler)
	}
	f.m.register(f.Metrics)
	f.records = map[webgw.Key]*entry{}
	f.load()
	f.publish()
	f.at.Store(&position{f.rev, f.epoch})

	news := make(chan news)
	watch, stop := context.WithCancel(ctx)
	g := run.New(context.WithoutCancel(ctx), f.Log)
	g.Go("feed", func(context.Context) error { f.follow(watch, news); return nil })
	err := f.loop(ctx, news)
	stop()
	return errors.Join(err, g.Wait())
}

// news is what the watching goroutine tells the loop: a change, or why the
// watch has ended.
type news struct {
	change Change
	err    error
	answer chan<- answer // gets exactly one
}

// answer tells the watching goroutine how to go on.
type answer struct {
	again   bool        // end this watch and begin a new one
	missing []webgw.Key // look these up
}

// follow watches again and again, from where the loop has come to.
func (f *Follower) follow(ctx context.Context, to chan<- news) {
	tell := func(n news) (answer, bool) {
		c := make(chan answer, 1)
		n.answer = c
		select {
		case to <- n:
		case <-ctx.Done():
			return answer{}, false
		}
		select {
		case a := <-c:
			return a, true
		case <-ctx.Done():
			return answer{}, false
		}
	}
	b := run.Backoff{Min: backoffMin, Max: backoffMax}
	for ctx.Err() == nil {
		at := *f.at.Load()
		var err error
		for change, e := range f.Feed.Watch(ctx, at.since, at.epoch) {
			if err = e; err != nil {
				break
			}
			b.Reset()
			a, ok := tell(news{change: change})
			if !ok || a.again {
				break
			}
			if found := f.lookUp(ctx, a.missing); len(found) > 0 {
				tell(news{change: Change{Rev: change.Rev, Epoch: change.Epoch, Records: found}})
			}
		}
		if err != nil && ctx.Err() == nil {
			tell(news{err: err})
		}
		if b.Wait(ctx) != nil {
			return
		}
	}
}

// lookUp asks for the newest versions of records that a full resync left out:
// one that moved to other gateways or nodes is told of there only.
func (f *Follower) lookUp(ctx context.Context, keys []webgw.Key) []ident.Signed {
	todo, found := make(chan webgw.Key), make(chan ident.Signed)
	var workers sync.WaitGroup
	for range min(lookups, len(keys)) {
		workers.Go(func() {
			for key := range todo {
				one, cancel := context.WithTimeout(ctx, lookupTime)
				s, err := f.Feed.Get(one, key)
				cancel()
				if err == nil && s.Record.Key() == key {
					found <- s
				} else if webgw.KindOf(err) != webgw.NotFound {
					f.Log.Debug("a missing record can't be looked up", "record", key, "err", err)
				}
			}
		})
	}
	go func() {
		for _, k := range keys {
			todo <- k
		}
		close(todo)
		workers.Wait()
		close(found)
	}()
	var out []ident.Signed
	for s := range found {
		out = append(out, s)
	}
	return out
}

// loop owns the state.
func (f *Follower) loop(ctx context.Context, from <-chan news) error {
	var applyAt, saveAt, wakeAt alarm
	defer func() { applyAt.stop(); saveAt.stop(); wakeAt.stop() }()
	down := false
	var saved time.Time
	unsaved := false // saving the same again would cost the generation before
	saveDue := func() time.Time {
		now, next := time.Now(), saved.Add(saveEvery)
		if next.Before(now.Add(gather)) {
			next = now.Add(gather)
		}
		return next
	}
	wakeAt.set(f.nextWake())
	for {
		f.at.Store(&position{f.rev, f.epoch})
		select {
		case <-ctx.Done():
			if unsaved {
				return f.save()
			}
			return nil
		case n := <-from:
			if n.err != nil {
				if !down {
					f.Log.Warn("the registry can't be followed; what is known stays in force", "err", n.err)
				}
				down, f.seen = true, nil
				f.m.connected.Set(0)
				n.answer <- answer{}
				continue
			}
			if down {
				f.Log.Info("following the registry again", "rev", n.change.Rev)
			}
			down = false
			f.m.connected.Set(1)
			a := f.take(n.change)
			f.at.Store(&position{f.rev, f.epoch})
			n.answer <- a
			applyAt.soonest(time.Now().Add(gather))
			if f.dirty {
				unsaved = true
				saveAt.soonest(saveDue())
			}
		case <-applyAt.C():
			applyAt.stop()
			f.publish()
			wakeAt.set(f.nextWake())
		case <-wakeAt.C():
			now := time.Now()
			f.later = slices.DeleteFunc(f.later, func(s ident.Signed) bool {
				due := !s.Record.Issued.After(now.Add(webgw.MaxSkew))
				if due {
					f.consider(s, now)
				}
				return due
			})
			f.dirty = true // something has expired, if nothing came
			f.publish()
			wakeAt.set(f.nextWake())
			unsaved = true
			saveAt.soonest(saveDue())
		case <-saveAt.C():
			saveAt.stop()
			saved = time.Now()
			if err := f.save(); err != nil {
				f.m.saveFailed.Inc()
				f.Log.Error("the snapshot can't be written", "err", err)
				saveAt.set(time.Now().Add(saveRetry))
			} else {
				unsaved = false
			}
		}
	}
}

// alarm is a timer that may be unset.
type alarm struct {
	timer *time.Timer
	when  time.Time
}

// C fires once at the time set; nil, which blocks, if none is.
func (a *alarm) C() <-chan time.Time {
	if a.timer == nil {
		return nil
	}
	return a.timer.C
}

// set sets the alarm anew; the zero time unsets it.
func (a *alarm) set(t time.Time) {
	a.stop()
	if !t.IsZero() {
		a.timer, a.when = time.NewTimer(max(0, time.Until(t))), t
	}
}

// soonest sets it unless it is set to an earlier time.
func (a *alarm) soonest(t time.Time) {
	if a.timer == nil || t.Before(a.when) {
		a.set(t)
	}
}

func (a *alarm) stop() {
	if a.timer != nil {
		a.timer.Stop()
		a.timer = nil
	}
}
