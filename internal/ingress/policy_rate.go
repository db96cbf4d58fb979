package ingress

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"webgw.dev/webgw"
)

// meter is one limit on a rate: by address, in all, or both.
type meter struct {
	address rate.Limit // 0: no limit
	burst   int
	total   *rate.Limiter // nil: no limit
}

// newMeter returns nil for no limit.
func newMeter(l *webgw.RateLimit) *meter {
	if l == nil {
		return nil
	}
	m := &meter{}
	if l.Address != nil {
		perSecond, burst := l.Address.PerSecond()
		m.address, m.burst = rate.Limit(perSecond), burst
	}
	if l.Total != nil {
		perSecond, burst := l.Total.PerSecond()
		m.total = rate.NewLimiter(rate.Limit(perSecond), burst)
	}
	return m
}

// buckets holds the state of all meters by address. It is bounded: when it is
// full, those make room who have used their share least.
type buckets struct {
	shards [64]struct {
		mu sync.Mutex
		by map[bucket]*rate.Limiter
	}
}

type bucket struct {
	meter *meter
	place netip.Addr
}

const (
	maxBuckets    = 2048 // per shard; 131,072 in all, some 30 MB
	bucketSamples = 16   // looked at to find the one that makes room
)

// take uses one of the address's share up. If there is none, it returns how
// long until there is, and nothing is used up.
func (b *buckets) take(m *meter, a netip.Addr, now time.Time) (wait time.Duration) {
	if m == nil {
		return 0
	}
	var mine *rate.Reservation
	if m.address > 0 {
		k := bucket{m, place(a)}
		s := &b.shards[spread(k.place)%uint32(len(b.shards))]
		s.mu.Lock()
		defer s.mu.Unlock()
		l := s.by[k]
		if l == nil {
			if s.by == nil {
				s.by = map[bucket]*rate.Limiter{}
			}
			if len(s.by) >= maxBuckets {
				makeRoom(s.by, now)
			}
			l = rate.NewLimiter(m.address, m.burst)
			s.by[k] = l
		}
		if mine, wait = reserve(l, now); wait > 0 {
			return wait
		}
	}
	if m.total != nil {
		if _, wait = reserve(m.total, now); wait > 0 && mine != nil {
			mine.CancelAt(now)
		}
	}
	return wait
}

// spent returns how long until the address has something of its share again,
// 0 if it has.
func (b *buckets) spent(m *meter, a netip.Addr, now time.Time) (wait time.Duration) {
	k := bucket{m, place(a)}
	s := &b.shards[spread(k.place)%uint32(len(b.shards))]
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.by[k]
	if l == nil {
		return 0
	}
	r, wait := reserve(l, now)
	if wait == 0 {
		r.CancelAt(now)
	}
	return wait
}

func reserve(l *rate.Limiter, now time.Time) (*rate.Reservation, time.Duration) {
	r := l.ReserveN(now, 1)
	wait := r.DelayFrom(now)
	if wait > 0 {
		r.CancelAt(now)
	}
	return r, wait
}

// makeRoom drops those, of some, that have their whole share, or else the one
// that has most of it.
func makeRoom(by map[bucket]*rate.Limiter, now time.Time) {
	var most bucket
	best, seen := -1.0, 0
	for k, l := range by { // in random order
		part := l.TokensAt(now) / float64(l.Burst())
		if part >= 1 {
			delete(by, k)
		} else if part > best {
			most, best = k, part
		}
		if seen++; seen == bucketSamples {
			break
		}
	}
	if len(by) >= maxBuckets {
		delete(by, most)
	}
}
