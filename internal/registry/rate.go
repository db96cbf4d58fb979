package registry

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"webgw.dev/webgw"
)

// WriteRate is how fast one identity may write at one replica; zero fields
// take DefaultWriteRate's.
type WriteRate struct {
	PerSecond float64 // over time
	Burst     int     // at once, after a rest
}

// DefaultWriteRate lets an owner declare all that the quota allows at once,
// and all of it anew three times a minute.
var DefaultWriteRate = WriteRate{PerSecond: 50, Burst: 1000}

func (s *Server) writeRate() WriteRate {
	w := s.Writes
	if w.PerSecond == 0 {
		w.PerSecond = DefaultWriteRate.PerSecond
	}
	if w.Burst == 0 {
		w.Burst = DefaultWriteRate.Burst
	}
	return w
}

// rates is the allowance of every identity that has written lately.
type rates struct {
	mu    sync.Mutex
	of    map[webgw.ID]*rate.Limiter
	swept time.Time
}

// mayWrite takes one write out of id's allowance, or says that there is none
// left. It is asked before anything is spent on what id has sent.
func (s *Server) mayWrite(id webgw.ID) error {
	w := s.writeRate()
	if s.rates.take(id, w) {
		return nil
	}
	s.metrics.limited.WithLabelValues("writes").Inc()
	return &webgw.Error{Kind: webgw.Exhausted, Public: fmt.Sprintf("this registry takes %g writes a second from one identity, %d at once", w.PerSecond, w.Burst), Hint: "try again more slowly"}
}

// take takes one out of id's allowance and reports whether there was one.
func (r *rates) take(id webgw.ID, w WriteRate) bool {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	// Identities cost nothing to make, so a whole allowance is not remembered.
	// The time between sweeps is the one that an empty one takes to grow whole.
	if whole := time.Duration(min(float64(w.Burst)/w.PerSecond, 3600) * float64(time.Second)); now.Sub(r.swept) > whole {
		for id, l := range r.of {
			if l.TokensAt(now) >= float64(w.Burst) {
				delete(r.of, id)
			}
		}
		r.swept = now
	}
	l := r.of[id]
	if l == nil {
		l = rate.NewLimiter(rate.Limit(w.PerSecond), w.Burst)
		r.of[id] = l
	}
	return l.AllowN(now, 1)
}
