package tunnel

import (
	"context"
	"sync"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// Limits of a pool, data connections of one kind of one session.
const (
	poolMin      = 2                // ready without any traffic
	poolMax      = 1024             // kept ready at most; more are open under load
	surplusAfter = 30 * time.Second // an idle connection beyond the target is closed
	pendingAfter = 10 * time.Second // a demand that brought nothing is forgotten
	maxWaiting   = 4096             // streams that wait for a data connection
)

// pool keeps ready data connections, last in first out, so that the ones in use
// have open congestion windows and the others can be let go. It learns how many
// to keep from how low it runs: each time it falls below a quarter of its
// target the target doubles; while it never falls below half of it, the target
// sinks slowly.
type pool struct {
	demand func() // called, without the lock, when more should be dialed

	mu      sync.Mutex
	idle    []idleConn
	waiting []chan *dataConn
	target  int
	lowest  int  // fewest idle since the last tick
	grown   bool // since the last demand
	pending int  // asked for, not here yet
	asked   time.Time
	closed  bool
}

type idleConn struct {
	d     *dataConn
	since time.Time
}

var errNoSession = &webgw.Error{Op: "open stream", Kind: webgw.Unavailable, Public: "the node has no session with this gateway"}

// take returns a ready connection, waiting for one to be dialed if need be.
func (p *pool) take(ctx context.Context) (*dataConn, error) {
	for {
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			return nil, errNoSession
		}
		if n := len(p.idle); n > 0 {
			d := p.idle[n-1].d
			p.idle = p.idle[:n-1]
			p.lowest = min(p.lowest, n-1)
			low := n-1 < (p.target+3)/4
			if low {
				p.growLocked()
			}
			ask := low || p.wantedLocked() > 0
			p.mu.Unlock()
			if ask {
				p.demand()
			}
			if netx.Alive(d.raw) {
				return d, nil
			}
			d.raw.Close() // it died in the pool: the next one
			continue
		}
		if len(p.waiting) >= maxWaiting {
			p.mu.Unlock()
			return nil, &webgw.Error{Op: "open stream", Kind: webgw.Exhausted, Public: "too many connections wait for the node"}
		}
		c := make(chan *dataConn, 1)
		p.waiting = append(p.waiting, c)
		p.lowest = 0
		p.growLocked()
		p.mu.Unlock()
		p.demand()
		select {
		case d, ok := <-c:
			if !ok {
				return nil, errNoSession
			}
			if netx.Alive(d.raw) {
				return d, nil
			}
			d.raw.Close()
		case <-ctx.Done():
			p.leave(c)
			return nil, &webgw.Error{Op: "open stream", Kind: webgw.Unavailable, Public: "the node did not open a data connection in time", Err: ctx.Err()}
		}
	}
}

// growLocked doubles the target, once per demand: what is under way already
// answers for the streams of the same moment.
func (p *pool) growLocked() {
	if p.pending == 0 && !p.grown {
		p.grown = true
		p.target = min(p.target*2, poolMax)
	}
}

// leave gives up waiting on c; a connection that came meanwhile is kept.
func (p *pool) leave(c chan *dataConn) {
	p.mu.Lock()
	for i, w := range p.waiting {
		if w == c {
			p.waiting = append(p.waiting[:i], p.waiting[i+1:]...)
			break
		}
	}
	p.mu.Unlock()
	select {
	case d, ok := <-c:
		if ok {
			p.put(d, false)
		}
	default:
	}
}

// put adds a connection that is ready: fresh from the node, or used and clean.
// It reports false, and leaves it alone, if there is no place for a fresh one.
func (p *pool) put(d *dataConn, fresh bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	late := fresh && p.pending == 0
	if fresh && p.pending > 0 {
		p.pending--
	}
	switch {
	case p.closed && !fresh:
		d.raw.Close()
	case p.closed || late && len(p.waiting) == 0 && len(p.idle) >= p.target:
		return false
	case len(p.waiting) > 0:
		c := p.waiting[0]
		p.waiting = p.waiting[1:]
		c <- d // buffered
	default:
		p.idle = append(p.idle, idleConn{d, time.Now()})
	}
	return true
}

// short tells that n connections asked for will not come.
func (p *pool) short(n int) {
	p.mu.Lock()
	p.pending = max(0, p.pending-n)
	p.mu.Unlock()
}

// wantedLocked is how many more should be dialed now: refilled below half.
func (p *pool) wantedLocked() int {
	if p.closed {
		return 0
	}
	have := len(p.idle) + p.pending - len(p.waiting)
	if have*2 >= p.target {
		return 0
	}
	return p.target - have
}

// ask returns how many to demand, and counts them as coming.
func (p *pool) ask() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.grown = false
	n := p.wantedLocked()
	if n > 0 {
		p.pending += n
		p.asked = time.Now()
	}
	return n
}

// tick adapts the target and closes what has been idle beyond it.
func (p *pool) tick(now time.Time) {
	p.mu.Lock()
	if p.pending > 0 && now.Sub(p.asked) > pendingAfter {
		p.pending = 0
	}
	if p.lowest > p.target/2 && p.target > poolMin {
		p.target = max(poolMin, p.target*7/8)
	}
	p.lowest = len(p.idle)
	var drop []idleConn
	// The oldest lie at the bottom.
	n := 0
	for len(p.idle)-n > p.target && now.Sub(p.idle[n].since) > surplusAfter {
		n++
	}
	drop = append(drop, p.idle[:n]...)
	p.idle = append(p.idle[:0], p.idle[n:]...)
	p.mu.Unlock()
	for _, i := range drop {
		i.d.raw.Close()
	}
}

func (p *pool) close() {
	p.mu.Lock()
	idle, waiting := p.idle, p.waiting
	p.idle, p.waiting, p.closed = nil, nil, true
	p.mu.Unlock()
	for _, i := range idle {
		i.d.raw.Close()
	}
	for _, c := range waiting {
		close(c)
	}
}

func (p *pool) counts() (idle, target int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.idle), p.target
}
