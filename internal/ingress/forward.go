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
	secure *secure // nil: HTTP is spoken to it in clear text

	fails atomic.Int32
	until atomic.Int64 // tried last until then, Unix nanoseconds

	mu    sync.Mutex
	kept  []*workloadConn // for HTTP/1.1; the latest last
	epoch int             // rises when the kept connections are to be closed
	sweep *time.Timer     // set while there are any
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

// closeIdle closes the kept connections for HTTP.
func (t *target) closeIdle() {
	t.closeKept()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.h2c != nil {
		t.h2c.CloseIdleConnections()
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
	target   *target
	refused  bool // the workload's end said no, rather than being out of reach
	unproven bool // it could not prove, over TLS, to be the workload
	err      error
}

func (e *openError) Error() string { return "open " + e.target.String() + ": " + e.err.Error() }
func (e *openError) Unwrap() error { return e.err }

// open opens a stream to one target.
func (s *Server) open(ctx context.Context, r *Route, t *target, from Origin) (Stream, error) {
	start := time.Now()
	short, cancel := context.WithTimeout(ctx, s.limits.Open)
	defer cancel()
	stream, err := s.Upstream.Open(short, r, t.At(from.Above), from)
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
		return nil, &openError{target: t, refused: refused, err: err}
	}
	s.metrics.open.WithLabelValues(string(r.Exposure.Protocol)).Observe(time.Since(start).Seconds())
	return stream, nil
}

func isTimeout(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded)
}

// passage is a connection whose bytes are passed on as they are. It lies on the
// heap, and no goroutine waits for its end: an idle stream costs what it keeps.
type passage struct {
	*visit
	route   *Route
	head    []byte // read already
	from    Origin
	turn    turn
	late    time.Time // no further target is tried after that
	target  *target
	stream  Stream
	began   time.Time // of the stream
	untimed func()    // nil, or ends the watch over its time
	done    Access
}

// forward passes the connection's bytes to a target of r and back, as they
// are. head was read already; the port lies so far above the exposure's first.
// What can't be connected is reset.
func (s *Server) forward(v *visit, r *Route, head []byte, host string, above uint16) {
	if reason := s.admitStream(v, r); reason != "" {
		s.turnAway(v, reason, nil)
		return
	}
	if r.Exposure.ProxyProtocol != "" {
		head = r.announce(v, head)
	}
	p := &passage{visit: v, route: r, head: head, turn: r.turn(), late: time.Now().Add(3 * s.limits.Open),
		from: Origin{Visitor: v.visitor, Local: v.local, Host: host, Protocol: r.Exposure.Protocol, Above: above},
		done: Access{Access: webgw.Access{Time: v.since, Exposure: r.Key, Visitor: v.visitor.Addr(), Host: host, Proto: string(r.Exposure.Protocol)}}}
	p.pace()
	v.passes = p
	s.metrics.streams.WithLabelValues(p.done.Proto).Inc()
	// In a goroutine of its own, whose stack has not grown by understanding the
	// first bytes.
	go p.pass()
}

// pass joins the visitor with the next target that takes the stream.
func (p *passage) pass() {
	defer p.server.mourn(p.visit)
	if p.open() {
		p.join()
	} else {
		p.end(resultUnreached)
	}
}

// open opens a stream to the next target that can be reached; false if there
// is none.
func (p *passage) open() bool {
	for now := time.Now(); now.Before(p.late) && p.server.ctx.Err() == nil; now = time.Now() {
		t := p.turn.pick(now)
		if t == nil {
			break
		}
		p.target, p.done.Target = t, t.At(p.from.Above)
		if p.stream, p.done.Err = p.server.open(p.server.ctx, p.route, t, p.from); p.done.Err == nil {
			return true
		}
	}
	return false
}

// join joins visitor and stream. The head, a ClientHello of 2 KB these days, is
// left to streams that let go of it once they are accepted.
func (p *passage) join() {
	head := p.head
	if _, keeps := p.stream.(keeper); keeps {
		p.head = nil
	}
	p.began = time.Now()
	if p.route.timeouts() != nil {
		p.untimed = p.watchTime()
	}
	stream := p.stream
	p.joint.Store(&stream)
	stream.Join(p.visible(), head, p.joined)
}

// keeper is a stream that has kept the head it was joined with if it was refused.
type keeper interface{ Refused() (head []byte) }

// joined goes on after the stream's end: with the next target if this one has
// refused the visitor.
func (p *passage) joined(in, out int64, err error) {
	defer p.server.mourn(p.visit)
	p.joint.Store(nil)
	if p.untimed != nil {
		p.untimed()
	}
	if k, keeps := p.stream.(keeper); keeps {
		p.head = k.Refused()
	}
	p.done.BytesIn, p.done.BytesOut, p.done.Err = in, out, err
	result := p.judge()
	if result == resultUnreached && p.again() {
		go p.pass()
		return
	}
	p.end(result)
}

// judge tells how the stream ended.
func (p *passage) judge() (result string) {
	if isRefusal(p.done.Err) && p.done.BytesOut == 0 {
		p.target.failed(time.Now())
		return resultUnreached
	}
	p.server.metrics.join.WithLabelValues(p.done.Proto).Observe(time.Since(p.began).Seconds())
	if p.done.Err == nil || p.done.BytesOut > 0 {
		p.target.worked()
	}
	if p.done.Err != nil {
		return resultBroken
	}
	return resultOK
}

// again reports whether the next target may have the visitor: nothing but the
// head has been taken from them, and they are still there.
func (p *passage) again() bool {
	return p.done.BytesIn <= int64(len(p.head)) && p.visible().SetReadDeadline(time.Time{}) == nil
}

// end closes the visitor's connection and tells how it went.
func (p *passage) end(result string) {
	defer p.leave()
	s := p.server
	if result == resultUnreached {
		netx.Reset(p.visible())
		s.log.Info("no target could be reached", "exposure", p.route.Key.String(), "visitor", p.visitor, "err", p.done.Err)
	} else if err := p.visible().Close(); err != nil {
		s.log.Debug("closing a visitor", "visitor", p.visitor, "err", err)
	}
	s.metrics.result(p.done.Proto, result)
	s.metrics.carried(p.done.Proto, p.done.BytesIn, p.done.BytesOut)
	p.done.Took = time.Since(p.since)
	s.record(p.done)
}

// release takes the passage off its route's books.
func (p *passage) release() {
	p.route.release()
	p.server.metrics.streams.WithLabelValues(p.done.Proto).Dec()
}

// isRefusal reports whether a stream ended because the workload's end refused it.
func isRefusal(err error) bool {
	_, ok := errors.AsType[*webgw.Error](err)
	return ok
}
