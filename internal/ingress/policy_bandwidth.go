package ingress

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// Whoever has bytes to pass through a valve passes a quantum at a time, in the
// order in which they ask, so that all of them get on alike.
const (
	quantumTime    = 10 * time.Millisecond // of the rate
	minQuantum     = 1 << 10               // bytes
	maxQuantum     = 32 << 10
	quantumsWaited = 8      // at about so many who wait, quanta become smaller
	quantumsPerSec = 20_000 // but there are at most about so many

	saved   = 50 * time.Millisecond // of the rate, by who has not used it
	noPause = time.Millisecond      // shorter pauses are saved up
)

// valve is one limit on bandwidth, in one direction.
type valve struct {
	rate float64 // bytes a second

	mu        sync.Mutex
	next      time.Time // when what is asked for next may pass
	waiting   int
	datagrams time.Time // as next, for datagrams alone
}

// newValve returns nil for no limit.
func newValve(rate int64) *valve {
	if rate == 0 {
		return nil
	}
	return &valve{rate: float64(rate)}
}

func (v *valve) time(n int) time.Duration {
	return time.Duration(float64(n) / v.rate * float64(time.Second))
}

// ask returns when n bytes may pass. If that is not now, it counts who asks
// among those who wait, until waited.
func (v *valve) ask(n int, now time.Time) (at time.Time, wait bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	at = later(v.next, now.Add(-saved))
	v.next = at.Add(v.time(n))
	if wait = at.Sub(now) > noPause; wait {
		v.waiting++
	}
	return at, wait
}

// waited ends a wait; passed is false if the bytes are not going to.
func (v *valve) waited(n int, passed bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.waiting--
	if !passed {
		v.next = v.next.Add(-v.time(n))
	}
}

// drop reports whether a datagram of n bytes is too much. Datagrams don't wait:
// they have as much of the rate as each of those who do.
func (v *valve) drop(n int, now time.Time) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	at := later(v.datagrams, now.Add(-saved))
	if at.After(now) {
		return true
	}
	v.datagrams = at.Add(time.Duration(1+v.waiting) * v.time(n))
	v.next = later(v.next, now.Add(-saved)).Add(v.time(n))
	return false
}

func (v *valve) quantum() int {
	v.mu.Lock()
	waiting := v.waiting
	v.mu.Unlock()
	q := max(v.rate*quantumTime.Seconds()/float64(1+waiting/quantumsWaited), v.rate/quantumsPerSec)
	return int(min(max(q, minQuantum), maxQuantum))
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// throttle is the limits that bytes of one direction must pass, the narrowest
// first. nil: none.
type throttle struct {
	valves  []*valve
	waited  interface{ Add(float64) } // seconds; a metric
	dropped interface{ Inc() }        // datagrams
}

// pass waits until n bytes may pass. sleep returns early, with an error, if
// they are not going to.
func (t *throttle) pass(n int, sleep func(until time.Time) error) error {
	for _, b := range t.valves {
		now := time.Now()
		at, wait := b.ask(n, now)
		if !wait {
			continue
		}
		err := sleep(at)
		b.waited(n, err == nil)
		t.waited.Add(time.Since(now).Seconds())
		if err != nil {
			return err
		}
	}
	return nil
}

// drops reports whether a datagram of n bytes must be dropped.
func (t *throttle) drops(n int) bool {
	if t == nil {
		return false
	}
	now := time.Now()
	for _, b := range t.valves { // what an earlier one has counted is lost: the narrowest is first
		if b.drop(n, now) {
			t.dropped.Inc()
			return true
		}
	}
	return false
}

// quantum is how many bytes may be asked for at once.
func (t *throttle) quantum() int {
	q := maxQuantum
	for _, b := range t.valves {
		q = min(q, b.quantum())
	}
	return q
}

// valves are a limit's for both directions; nil: no limit.
type valves struct{ in, out *valve }

func newValves(t *webgw.Throughput) valves {
	if t == nil {
		return valves{}
	}
	return valves{newValve(t.In), newValve(t.Out)}
}

// throttles returns what a connection or flow of the route must pass, of which
// it is itself bounded by own.
func (s *Server) throttles(r *Route, own valves) (in, out *throttle) {
	all := [...]valves{own, {}, r.use.share(s.limits.ExposureBandwidth), r.owner.share(s.limits.OwnerBandwidth)}
	if r.guard != nil {
		all[1] = r.guard.bandwidth
	}
	for _, b := range all {
		in = in.add(b.in, &s.metrics.paced[0])
		out = out.add(b.out, &s.metrics.paced[1])
	}
	return in, out
}

func (t *throttle) add(b *valve, m *pacedMetrics) *throttle {
	if b == nil {
		return t
	}
	if t == nil {
		t = &throttle{waited: m.waited, dropped: m.dropped}
	}
	t.valves = append(t.valves, b)
	return t
}

// own returns the limits of one connection.
func (g *guard) own() valves {
	if g == nil || g.policy.Bandwidth == nil {
		return valves{}
	}
	return newValves(g.policy.Bandwidth.Connection)
}

// share returns what the farmer leaves to an exposure or owner.
func (t *tally) share(rate int64) valves {
	if rate == 0 {
		return valves{}
	}
	if b := t.bandwidth.Load(); b != nil {
		return *b
	}
	t.bandwidth.CompareAndSwap(nil, &valves{newValve(rate), newValve(rate)})
	return *t.bandwidth.Load()
}

// pacedConn is a visitor's connection that limits bound. It has no descriptor
// for others: what is bounded is copied, not spliced.
type pacedConn struct {
	net.Conn
	in, out *throttle

	rest []byte // read, and kept when a deadline came before it might pass

	mu      sync.Mutex
	closed  bool
	limits  [2]time.Time  // deadlines
	changed chan struct{} // closed when one of them or closed changes
}

func newPacedConn(c net.Conn, in, out *throttle) *pacedConn {
	return &pacedConn{Conn: c, in: in, out: out, changed: make(chan struct{})}
}

const toRead, toWrite = 0, 1

// Read implements net.Conn, for one caller at a time. What has been read waits
// in its caller's hands, so that who sends nothing takes nobody's turn.
func (c *pacedConn) Read(p []byte) (n int, err error) {
	if c.in == nil || len(p) == 0 {
		return c.Conn.Read(p)
	}
	if len(c.rest) > 0 {
		n = copy(p, c.rest)
	} else if n, err = c.Conn.Read(p[:min(len(p), c.in.quantum())]); n == 0 {
		return n, err
	}
	if err := c.in.pass(n, func(until time.Time) error { return c.sleep(until, toRead) }); err != nil {
		if len(c.rest) == 0 {
			c.rest = append(c.rest, p[:n]...)
		}
		return 0, err
	}
	if len(c.rest) > 0 {
		c.rest = c.rest[n:]
	}
	return n, err
}

// Write implements net.Conn.
func (c *pacedConn) Write(p []byte) (n int, err error) {
	if c.out == nil {
		return c.Conn.Write(p)
	}
	for n < len(p) {
		part := p[n:min(len(p), n+c.out.quantum())]
		if err := c.out.pass(len(part), func(until time.Time) error { return c.sleep(until, toWrite) }); err != nil {
			return n, err
		}
		m, err := c.Conn.Write(part)
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// sleep waits, unless the connection is closed or a deadline comes.
func (c *pacedConn) sleep(until time.Time, way int) error {
	for {
		c.mu.Lock()
		closed, limit, changed := c.closed, c.limits[way], c.changed
		c.mu.Unlock()
		now, end := time.Now(), until
		switch {
		case closed:
			return net.ErrClosed
		case limit.IsZero():
		case !now.Before(limit):
			op := [...]string{"read", "write"}[way]
			return &net.OpError{Op: op, Net: "tcp", Addr: c.RemoteAddr(), Err: os.ErrDeadlineExceeded}
		case limit.Before(until):
			end = limit
		}
		if !now.Before(until) {
			return nil
		}
		t := time.NewTimer(end.Sub(now))
		select {
		case <-t.C:
		case <-changed:
		}
		t.Stop()
	}
}

func (c *pacedConn) change(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
	close(c.changed)
	c.changed = make(chan struct{})
}

// Close implements net.Conn; who waits for their turn is woken.
func (c *pacedConn) Close() error {
	c.change(func() { c.closed = true })
	return c.Conn.Close()
}

// CloseWrite implements netx.CloseWriter.
func (c *pacedConn) CloseWrite() error { return netx.CloseWrite(c.Conn) }

// SetLinger is what netx.Reset looks for.
func (c *pacedConn) SetLinger(sec int) error {
	if l, ok := c.Conn.(interface{ SetLinger(sec int) error }); ok {
		return l.SetLinger(sec)
	}
	return nil
}

// SetDeadline implements net.Conn.
func (c *pacedConn) SetDeadline(t time.Time) error {
	c.change(func() { c.limits = [2]time.Time{t, t} })
	return c.Conn.SetDeadline(t)
}

// SetReadDeadline implements net.Conn.
func (c *pacedConn) SetReadDeadline(t time.Time) error {
	c.change(func() { c.limits[toRead] = t })
	return c.Conn.SetReadDeadline(t)
}

// SetWriteDeadline implements net.Conn.
func (c *pacedConn) SetWriteDeadline(t time.Time) error {
	c.change(func() { c.limits[toWrite] = t })
	return c.Conn.SetWriteDeadline(t)
}

// pace prepares a passage for limits on bandwidth.
func (p *passage) pace() {
	if in, out := p.server.throttles(p.route, p.route.guard.own()); in != nil || out != nil {
		p.paced.Store(newPacedConn(p.raw, in, out))
	}
}

// visible is the visitor's connection as streams get it: as it is where no
// limit bounds it.
func (v *visit) visible() net.Conn {
	if c := v.paced.Load(); c != nil {
		return c
	}
	return v.raw
}

// pace prepares a request for limits on bandwidth.
func (x *exchange) pace() {
	x.inward, x.outward = x.web.s.throttles(x.route, x.conn.c.own(x.route.guard))
	if x.body && x.inward != nil {
		b := &pacedBody{ReadCloser: x.in.Body, in: x.inward, done: x.ctx.Done(), stop: make(chan struct{})}
		x.in.Body, x.unpace = b, sync.OnceFunc(func() { close(b.stop) })
	}
}

// paceUpgraded is pace for a connection that has left HTTP.
func (x *exchange) paceUpgraded(c net.Conn) net.Conn {
	if x.inward == nil && x.outward == nil {
		return c
	}
	paced := newPacedConn(c, x.inward, x.outward)
	x.conn.c.v.paced.Store(paced)
	return paced
}

// own returns what bounds the connection's requests to the exposure of g, all
// of them together.
func (c *visitConn) own(g *guard) valves {
	if g == nil || g.policy.Bandwidth == nil || g.policy.Bandwidth.Connection == nil {
		return valves{}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	b, ok := c.bandwidth[g]
	if !ok {
		b = g.own()
		if c.bandwidth == nil {
			c.bandwidth = map[*guard]valves{}
		}
		c.bandwidth[g] = b
	}
	return b
}

// pacedBody is a request's body.
type pacedBody struct {
	io.ReadCloser
	in   *throttle
	done <-chan struct{} // of the request
	stop chan struct{}   // nobody wants the rest
}

func (b *pacedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p[:min(len(p), b.in.quantum())])
	if n > 0 {
		if err := b.in.pass(n, b.sleep); err != nil {
			return 0, err
		}
	}
	return n, err
}

func (b *pacedBody) sleep(until time.Time) error {
	return sleepUntil(until, b.done, b.stop)
}

// sleepUntil returns an error if one of the two comes first.
func sleepUntil(until time.Time, done <-chan struct{}, stop <-chan struct{}) error {
	t := time.NewTimer(time.Until(until))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-done:
		return context.Canceled
	case <-stop:
		return net.ErrClosed
	}
}

// writePaced sends a part of the answer's body.
func (x *exchange) writePaced(p []byte) (n int, err error) {
	for n < len(p) {
		part := p[n:min(len(p), n+x.outward.quantum())]
		if err := x.outward.pass(len(part), func(until time.Time) error { return sleepUntil(until, x.ctx.Done(), nil) }); err != nil {
			return n, err
		}
		m, err := x.ResponseWriter.Write(part)
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}
