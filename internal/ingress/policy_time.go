package ingress

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

var errTime = errors.New("ingress: the policy allows no more time")

// tellTime is how long a visitor has to take the page that says so, or the end
// of a body that is cut.
const tellTime = time.Second

// timeouts returns the policy's, nil if there are none.
func (r *Route) timeouts() *webgw.Timeouts {
	if r.guard == nil {
		return nil
	}
	return r.guard.policy.Timeouts
}

// limitTime bounds the request, as the policy says. The workload is cut off
// first; a visitor who neither sends nor takes anything, a moment later.
func (x *exchange) limitTime() (stop func()) {
	t := x.route.timeouts()
	if t == nil || t.Request == "" {
		return func() {}
	}
	most := t.Duration(t.Request)
	var cancel context.CancelCauseFunc
	x.ctx, cancel = context.WithCancelCause(x.ctx)
	end := time.AfterFunc(most, func() { cancel(errTime) })
	v, rw, major := x.conn.c.v, x.ResponseWriter, x.in.ProtoMajor
	var mu sync.Mutex
	over := false
	cut := time.AfterFunc(most+tellTime, func() {
		mu.Lock()
		defer mu.Unlock()
		switch c := http.NewResponseController(rw); {
		case over:
		case major == 1:
			netx.Reset(v.raw)
		default: // one stream of many; an error means that it has ended
			c.SetReadDeadline(time.Unix(1, 0))
			c.SetWriteDeadline(time.Unix(1, 0))
		}
	})
	x.untimed = func() {
		mu.Lock()
		defer mu.Unlock()
		over = true
		end.Stop()
		cut.Stop()
	}
	return func() {
		x.untimed()
		cancel(nil)
	}
}

// late reports whether the request has used up its time.
func (x *exchange) late() bool { return context.Cause(x.ctx) == errTime }

// watchTime bounds a stream: how long it lasts, and how long nothing passes.
// moved tells how much has; cut ends the stream.
func (s *Server) watchTime(r *Route, moved func() int64, cut func()) (stop func()) {
	t := r.timeouts()
	if t == nil || t.Idle == "" && t.Connection == "" {
		return func() {}
	}
	idle, whole := t.Duration(t.Idle), t.Duration(t.Connection)
	start := time.Now()
	last, lastAt := int64(-1), start
	var mu sync.Mutex
	over := false
	var timer *time.Timer
	next := func(now time.Time) (wait time.Duration) {
		if idle > 0 {
			wait = idle / 4 // so that the end comes at most so much late
		}
		if left := start.Add(whole).Sub(now); whole > 0 && (wait == 0 || left < wait) {
			wait = left
		}
		return wait
	}
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(next(start), func() {
		mu.Lock()
		defer mu.Unlock()
		if over {
			return
		}
		now := time.Now()
		if n := moved(); n != last {
			last, lastAt = n, now
		}
		if whole > 0 && now.Sub(start) >= whole || idle > 0 && now.Sub(lastAt) >= idle {
			over = true
			s.metrics.refused(reasonTime)
			cut()
			return
		}
		timer.Reset(next(now))
	})
	return func() {
		mu.Lock()
		defer mu.Unlock()
		over = true
		timer.Stop()
	}
}

// watchTime bounds the passage's stream.
func (p *passage) watchTime() (stop func()) {
	stream := p.stream
	return p.server.watchTime(p.route, func() int64 { in, out := stream.Progress(); return in + out }, p.cut)
}

// watchTime bounds an upgraded connection.
func (x *exchange) watchTime() (stop func()) {
	if x.untimed != nil {
		x.untimed() // it is no request any more
	}
	c, v := x.hijacked, x.conn.c.v
	return x.web.s.watchTime(x.route, func() int64 { return c.in.Load() + c.out.Load() }, v.cut)
}

// outlived reports whether the flow has had its time.
func (f *visitFlow) outlived(now time.Time, quiet time.Duration) bool {
	t := f.route.timeouts()
	if t == nil {
		return false
	}
	idle, whole := t.Duration(t.Idle), t.Duration(t.Connection)
	return idle > 0 && f.last.Load() != 0 && quiet >= idle || whole > 0 && now.Sub(f.since) >= whole
}
