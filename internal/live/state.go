package live

import (
	"bytes"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
)

// take works a change into the state.
func (f *Follower) take(c Change) answer {
	now := time.Now()
	if c.Refused > 0 {
		f.m.refused.WithLabelValues("unverified").Add(float64(c.Refused))
		f.Log.Error("the registry hands out records that do not verify", "count", c.Refused, "rev", c.Rev)
	}
	switch {
	case c.Reset:
		if f.epoch != "" && f.epoch != c.Epoch {
			f.Log.Warn("the registry began a new epoch", "epoch", c.Epoch, "before", f.epoch)
		}
		f.seen = map[webgw.Key]bool{}
		f.epoch, f.rev, f.dirty = c.Epoch, 0, true
	case c.Epoch != "" && f.epoch != c.Epoch:
		f.epoch, f.rev = "", 0
		return answer{again: true}
	}
	for _, s := range c.Records {
		f.consider(s, now)
		if f.seen != nil {
			f.seen[s.Record.Key()] = true
		}
	}
	// Until everything is told, an interrupted resync must begin anew.
	if f.seen == nil {
		f.rev = max(f.rev, c.Rev)
	}
	if !c.Synced {
		return answer{}
	}
	f.dirty = f.dirty || !f.synced
	f.synced, f.rev = true, max(f.rev, c.Rev)
	if f.seen == nil {
		return answer{}
	}
	var missing []webgw.Key
	for key, e := range f.records {
		gone := !f.seen[key] && e.signed.Record.Live(now)
		if gone && !e.missing {
			f.Log.Warn("the registry leaves out a record that its owner has not withdrawn; it stays in force", "record", key)
		}
		if e.missing = gone; gone {
			missing = append(missing, key)
		}
	}
	f.seen = nil
	f.m.missing.Set(float64(len(missing)))
	return answer{missing: missing}
}

// consider takes a record in if it is newer than what is known. It reports
// whether the state has changed.
func (f *Follower) consider(s ident.Signed, now time.Time) bool {
	r, key := s.Record, s.Record.Key()
	e := f.records[key]
	refuse := func(reason, why string) bool {
		f.m.refused.WithLabelValues(reason).Inc()
		f.Log.Error("a record was refused: "+why, "record", key, "seq", r.Seq)
		return false
	}
	if e != nil && !r.Supersedes(e.signed.Record) {
		switch {
		case r.Seq < e.signed.Record.Seq:
			return refuse("rollback", "it is older than what its owner has declared since; a replay?")
		case !bytes.Equal(s.Envelope(), e.signed.Envelope()):
			return refuse("conflict", "its owner has signed two different versions of the same number")
		}
		if e.missing {
			e.missing = false
			f.m.missing.Dec()
		}
		return false
	}
	if r.Issued.After(now.Add(webgw.MaxSkew)) {
		if len(f.later) < maxLater {
			f.later = append(f.later, s)
		}
		return refuse("early", "it was issued in the future, by this clock")
	}
	if e == nil && len(f.records) >= maxRecords {
		return refuse("full", "more records than can be held")
	}
	if e != nil && e.missing {
		f.m.missing.Dec()
	}
	f.records[key] = &entry{signed: s}
	f.m.taken.Inc()
	f.dirty = true
	return true
}

// nextWake is when the state changes by itself: a record expires, becomes
// forgettable, or its time comes. Zero: never.
func (f *Follower) nextWake() (next time.Time) {
	sooner := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	now := time.Now()
	for _, e := range f.records {
		if r := e.signed.Record; r.Live(now) {
			sooner(r.Expires.Add(webgw.MaxSkew + 1))
		} else {
			sooner(forgetAt(r).Add(1))
		}
	}
	for _, s := range f.later {
		sooner(s.Record.Issued.Add(-webgw.MaxSkew))
	}
	return next
}

// publish makes a view of the state and applies it. Where only the revision
// has moved, it is told in the view and nothing is applied.
func (f *Follower) publish() {
	if old := f.view.Load(); old != nil && !f.dirty {
		f.view.Store(&View{Rev: f.rev, Epoch: f.epoch, Synced: f.synced, Records: old.Records})
		f.m.rev.Set(float64(f.rev))
		return
	}
	f.dirty = false
	now := time.Now()
	v := &View{Rev: f.rev, Epoch: f.epoch, Synced: f.synced, Records: make(map[webgw.Key]ident.Signed, len(f.records))}
	for key, e := range f.records {
		switch r := e.signed.Record; {
		case r.Live(now):
			v.Records[key] = e.signed
		case now.After(forgetAt(r)):
			delete(f.records, key)
		}
	}
	f.view.Store(v)
	f.m.live.Set(float64(len(v.Records)))
	f.m.rev.Set(float64(v.Rev))
	if f.Apply != nil {
		f.Apply(v)
	}
}
