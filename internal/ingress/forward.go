package ingress

import (
	"context"
	"errors"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// A target that failed is tried last for a while: twice as long each time.
const (
	restMin = 500 * time.Millisecond
	restMax = 30 * time.Second
)

// target is one of a route's targets, and how it has been lately.
type target struct {
	webgw.Target

	fails atomic.Int32
	until atomic.Int64 // tried last until then, Unix nanoseconds

	mu    sync.Mutex
	http1 *http.Transport
	h2c   *http.Transport
}

// failed takes the target out of its turn. Failures of the same moment count
// once.
func (t *target) failed(now time.Time) {
	until := t.until.Load()
	if now.UnixNano() < until {
		return
	}
	rest := restMax
	if n := t.fails.Load(); n < 6 {
		rest = restMin << n
	}
	if t.until.CompareAndSwap(until, now.Add(rest).UnixNano()) {
		t.fails.Add(1)
	}
}

func (t *target) worked() {
	if t.fails.Load() != 0 {
		t.fails.Store(0)
		t.until.Store(0)
	}
}

func (t *target) closeIdle() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, tr := range []*http.Transport{t.http1, t.h2c} {
		if tr != nil {
			tr.CloseIdleConnections()
		}
	}
}

// turn goes through the targets of a route for one connection or request:
// those that are well in rotation, the others after them.
type turn struct {
	route *Route
	start int
	tried uint32 // bit per target: webgw.MaxTargets is 32
}

func (r *Route) turn() turn {
	return turn{route: r, start: int(r.next.Add(1)-1) % len(r.targets)}
}

// pick returns the next target to try, or nil.
func (t *turn) pick(now time.Time) *target {
	best := -1
	for i := range t.route.targets {
		n := (t.start + i) % len(t.route.targets)
		if t.tried&(1<<n) != 0 {
			continue
		}
		until := t.route.targets[n].until.Load()
		if until <= now.UnixNano() {
			best = n
			break
		}
		if best < 0 || until < t.route.targets[best].until.Load() {
			best = n
		}
	}
	if best < 0 {
		return nil
	}
	t.tried |= 1 << best
	return t.route.targets[best]
}

// openError is a stream that could not be opened: nothing of the visitor's has
// been passed on.
type openError struct {
	target  *target
	refused bool // the workload's end said no, rather than being out of reach
	err     error
}

func (e *openError) Error() string { return "open " + e.target.String() + ": " + e.err.Error() }
func (e *openError) Unwrap() error { return e.err }

// open opens a stream to one target.
func (s *Server) open(ctx context.Context, r *Route, t *target, from Origin) (Stream, error) {
	start := time.Now()
	short, cancel := context.WithTimeout(ctx, s.limits.Open)
	defer cancel()
	stream, err := s.Upstream.Open(short, r, t.Target, from)
	refused := err != nil && t.Direct != "" && !isTimeout(err)
	if err == nil && from.Prompt {
		if a, ok := stream.(interface{ Accepted() error }); ok {
			err = stream.SetReadDeadline(start.Add(s.limits.Open))
			if err == nil {
				err = a.Accepted()
			}
			if err == nil {
				err = stream.SetReadDeadline(time.Time{})
			}
			if err != nil {
				stream.Close()
				refused = !isTimeout(err)
			}
		}
	}
	if err != nil {
		if ctx.Err() == nil {
			t.failed(time.Now())
			s.metrics.openErrors.WithLabelValues(string(webgw.KindOf(err))).Inc()
		}
		return nil, &openError{t, refused, err}
	}
	s.metrics.open.WithLabelValues(string(r.Exposure.Protocol)).Observe(time.Since(start).Seconds())
	return stream, nil
}

func isTimeout(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded)
}

// forward passes the connection's bytes to a target of r and back, as they
// are. head was read already. What can't be connected is reset.
func (s *Server) forward(v *visit, r *Route, head []byte, host string) {
	defer v.leave()
	v.arrive()
	if !r.admit(&s.limits) {
		s.turnAway(v, reasonOwner, nil)
		return
	}
	defer r.release()
	protocol := string(r.Exposure.Protocol)
	gauge := s.metrics.streams.WithLabelValues(protocol)
	gauge.Inc()
	defer gauge.Dec()

	ctx, cancel := context.WithTimeout(s.ctx, 3*s.limits.Open) // for opening; joining takes as long as it takes
	defer cancel()
	from := Origin{Visitor: v.visitor, Local: v.local, Host: host, Protocol: r.Exposure.Protocol}
	done := Access{Access: webgw.Access{Time: v.since, Exposure: r.Key, Visitor: v.visitor.Addr(), Host: host, Proto: protocol}}
	result := resultUnreached
	turn := r.turn()
	for t := turn.pick(time.Now()); t != nil && ctx.Err() == nil; t = turn.pick(time.Now()) {
		done.Target = t.Target
		var stream Stream
		if stream, done.Err = s.open(ctx, r, t, from); done.Err != nil {
			continue
		}
		joined := time.Now()
		done.BytesIn, done.BytesOut, done.Err = stream.Join(v.raw, head)
		if isRefusal(done.Err) && done.BytesOut == 0 {
			t.failed(time.Now())
			// Nothing but the head has been taken from the visitor: the next
			// target may have it, if the visitor is still there.
			if done.BytesIn <= int64(len(head)) && v.raw.SetReadDeadline(time.Time{}) == nil {
				continue
			}
			break
		}
		s.metrics.join.WithLabelValues(protocol).Observe(time.Since(joined).Seconds())
		if done.Err == nil || done.BytesOut > 0 {
			t.worked()
		}
		result = resultOK
		if done.Err != nil {
			result = resultBroken
		}
		break
	}
	if result == resultUnreached {
		netx.Reset(v.raw)
		s.log.Info("no target could be reached", "exposure", r.Key.String(), "visitor", v.visitor, "err", done.Err)
	} else if err := v.raw.Close(); err != nil {
		s.log.Debug("closing a visitor", "visitor", v.visitor, "err", err)
	}
	s.metrics.result(protocol, result)
	s.metrics.carried(protocol, done.BytesIn, done.BytesOut)
	done.Took = time.Since(v.since)
	s.record(done)
}

// isRefusal reports whether a stream ended because the workload's end refused it.
func isRefusal(err error) bool {
	_, ok := errors.AsType[*webgw.Error](err)
	return ok
}
