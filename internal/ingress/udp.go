package ingress

import (
	"context"
	"errors"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// Limits of a flow that has just begun.
const (
	earlyPackets = 32 // kept until the flow is open
	earlyBytes   = 128 << 10

	// A visitor whose exposure can't be reached is not tried again before.
	flowPause = 250 * time.Millisecond
)

// flowPort is an open UDP port.
type flowPort struct {
	s       *Server
	port    uint16
	carries string        // label of metrics, and in access logs
	idle    time.Duration // after which a flow without a datagram ends
	conn    net.PacketConn
	packets netx.Packets
	ctx     context.Context // of what is being opened
	close   context.CancelFunc
	opening sync.WaitGroup // added to by the receiver only
}

// udpPort is the port of an exposure and the flows of its visitors.
type udpPort struct {
	flowPort

	mu    sync.Mutex
	flows map[flowKey]*visitFlow
}

// flowKey tells flows apart: who sends, and where to.
type flowKey struct {
	visitor netip.AddrPort
	local   netip.Addr
}

// visitFlow is one visitor's flow.
type visitFlow struct {
	p         *flowPort
	books     flowBooks
	key       flowKey
	host      string // server name, "" for udp
	route     *Route
	only      *target // nil: any of the route's
	above     uint16  // how far the port lies above the exposure's first
	since     time.Time
	inward    *throttle // limits on bandwidth; nil: none
	outward   *throttle
	last      atomic.Int64 // when a datagram passed, Unix nanoseconds
	in, out   atomic.Int64 // bytes to and from the workload
	replied   atomic.Bool  // the workload has answered
	confirmed atomic.Bool  // and the visitor has sent again: the address is not made up

	mu     sync.Mutex
	table  *Table // by which it was judged
	flow   Flow   // nil: not open
	target *target
	early  [][]byte
	held   int   // bytes in early
	err    error // why it could not be opened
}

// flowBooks is who keeps flows.
type flowBooks interface {
	leads(f *visitFlow, t *Table) *Route      // where the flow would lead by t, or nil
	heard(f *visitFlow, to *target, p []byte) // the workload has sent p
	forget(f *visitFlow) bool                 // takes f off the books; false if it is on them no more
}

// syncUDPLocked opens and closes UDP ports as the table says.
func (s *Server) syncUDPLocked(t *Table) {
	for port := range s.udp {
		if t.UDP(port) == nil {
			s.closeUDPLocked(port)
		}
	}
	clear(s.failedUDP)
	for _, port := range slices.Sorted(maps.Keys(t.udp)) {
		if s.udp[port] != nil {
			continue
		}
		p, err := s.listenUDP(port)
		if err != nil {
			s.log.Error("UDP port can't be opened", "exposure", t.udp[port].Key.String(), "port", port, "err", err)
			s.failedUDP[port] = true
			continue
		}
		s.udp[port] = p
		s.listeners.Go(p.receive)
		s.listeners.Go(p.sweep)
	}
}

var errNoFlows = errors.New("this gateway carries no datagrams")

func (s *Server) listenUDP(port uint16) (*udpPort, error) {
	if s.Flows == nil {
		return nil, errNoFlows
	}
	p := &udpPort{flows: map[flowKey]*visitFlow{}}
	return p, p.open(s, net.JoinHostPort(s.BindHost, strconv.Itoa(int(port))), string(webgw.UDP))
}

// open opens the port at an address.
func (p *flowPort) open(s *Server, address, carries string) (err error) {
	p.s, p.carries, p.idle = s, carries, s.limits.FlowIdle
	if p.conn, err = s.Net.ListenPacket(s.ctx, "udp", address); err != nil {
		return err
	}
	if p.packets, err = netx.NewPackets(p.conn); err != nil {
		p.conn.Close()
		return err
	}
	p.port = addrPort(p.conn.LocalAddr()).Port()
	p.ctx, p.close = context.WithCancel(s.ctx)
	return nil
}

// closeUDPLocked closes a port. Its flows, which have no end of their own, end
// with it.
func (s *Server) closeUDPLocked(port uint16) {
	p := s.udp[port]
	p.close()
	if err := p.conn.Close(); err != nil {
		s.log.Warn("closing a UDP port", "port", port, "err", err)
	}
	delete(s.udp, port)
}

// receive takes in datagrams until the port is closed.
func (p *udpPort) receive() {
	p.receiveAll(p.take)
	for _, f := range p.all() {
		f.end()
	}
}

// receiveAll gives datagrams to take until the port is closed.
func (p *flowPort) receiveAll(take func(b []byte, visitor netip.AddrPort, local netip.Addr)) {
	pause := time.Duration(0)
	for {
		err := p.packets.Receive(take)
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err == nil {
			pause = 0
			continue
		}
		p.s.metrics.acceptErrors.Inc()
		pause = min(max(2*pause, acceptPauseMin), acceptPauseMax)
		p.s.log.Warn("receiving datagrams failed; trying again", "port", p.port, "pause", pause, "err", err)
		select {
		case <-time.After(pause):
		case <-p.ctx.Done():
		}
	}
	p.close() // also when the machine's network ended it
	p.opening.Wait()
}

func (p *udpPort) all() []*visitFlow {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Collect(maps.Values(p.flows))
}

// take passes one datagram of a visitor on.
func (p *udpPort) take(b []byte, visitor netip.AddrPort, local netip.Addr) {
	key := flowKey{visitor, local}
	now := time.Now()
	p.mu.Lock()
	f := p.flows[key]
	p.mu.Unlock()
	if f != nil && f.done(now) {
		f.end()
		f = nil
	}
	if f == nil {
		if f = p.begin(key, now); f == nil {
			return
		}
	}
	f.take(b, now)
}

// take passes one datagram of the visitor on.
func (f *visitFlow) take(b []byte, now time.Time) {
	f.last.Store(now.UnixNano())
	if f.inward.drops(len(b)) {
		return
	}
	f.in.Add(int64(len(b)))
	if !f.confirmed.Load() && f.replied.Load() {
		f.confirmed.Store(true)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.flow != nil:
		f.flow.Send(b)
	case f.err == nil && len(f.early) < earlyPackets && f.held+len(b) <= earlyBytes:
		f.early = append(f.early, slices.Clone(b))
		f.held += len(b)
	default:
		f.p.s.metrics.datagramsDropped.Inc()
	}
}

// begin makes a flow and starts to open it; nil if it must not be.
func (p *udpPort) begin(key flowKey, now time.Time) *visitFlow {
	t := p.s.table.Load()
	r := t.UDP(p.port)
	if r == nil { // withdrawn this very moment
		return nil
	}
	f := p.admit(&visitFlow{p: &p.flowPort, books: p, key: key, route: r, above: r.above(p.port), table: t, since: now})
	if f == nil {
		return nil
	}
	p.mu.Lock()
	p.flows[key] = f
	p.mu.Unlock()
	p.opening.Go(f.open)
	return f
}

// leads implements flowBooks.
func (p *udpPort) leads(_ *visitFlow, t *Table) *Route { return t.UDP(p.port) }

// heard implements flowBooks.
func (p *udpPort) heard(*visitFlow, *target, []byte) {}

// forget implements flowBooks.
func (p *udpPort) forget(f *visitFlow) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	mine := p.flows[f.key] == f
	if mine {
		delete(p.flows, f.key)
	}
	return mine
}

// admit counts a flow in; it returns nil if a limit or the policy forbids it.
func (p *flowPort) admit(f *visitFlow) *visitFlow {
	s, key, r := p.s, f.key, f.route
	addr := key.visitor.Addr().WithZone("")
	if reason := s.flowDoors.enter(addr, &s.limits); reason != "" {
		s.metrics.refused(reason)
		return nil
	}
	if reason := s.admitStream(&visit{visitor: netip.AddrPortFrom(addr, key.visitor.Port())}, r); reason != "" {
		s.flowDoors.leave(addr)
		s.metrics.refused(reason)
		return nil
	}
	f.inward, f.outward = s.throttles(r, r.guard.own())
	s.metrics.streams.WithLabelValues(p.carries).Inc()
	return f
}

// open opens the flow to the next target that can be reached.
func (f *visitFlow) open() {
	s := f.p.s
	ctx, cancel := context.WithTimeout(f.p.ctx, 3*s.limits.Open)
	defer cancel()
	from := Origin{Visitor: f.key.visitor, Local: netip.AddrPortFrom(f.key.local, f.p.port), Host: f.host, Protocol: f.route.Exposure.Protocol, Above: f.above}
	turn := f.route.turn()
	next := func() *target {
		if f.only == nil {
			return turn.pick(time.Now())
		}
		if turn.tried != 0 {
			return nil
		}
		turn.tried = 1
		return f.only
	}
	var flow Flow
	var t *target
	err := error(&webgw.Error{Op: "open flow", Kind: webgw.Unavailable, Public: "no target is left to try"})
	for t = next(); t != nil && ctx.Err() == nil; t = next() {
		start, to := time.Now(), t
		one, cancel := context.WithTimeout(ctx, s.limits.Open)
		flow, err = s.Flows.OpenFlow(one, f.route, t.At(f.above), from, func(p []byte) { f.reply(to, p) })
		cancel()
		if err == nil {
			s.metrics.open.WithLabelValues(f.p.carries).Observe(time.Since(start).Seconds())
			break
		}
		if ctx.Err() == nil {
			t.failed(time.Now())
			s.metrics.openErrors.WithLabelValues(string(webgw.KindOf(err))).Inc()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.flow, f.target, f.err = flow, t, err
	for _, p := range f.early {
		if flow != nil {
			flow.Send(p)
		} else {
			s.metrics.datagramsDropped.Inc()
		}
	}
	f.early = nil
}

// reply passes a datagram of the workload to the visitor, from where they sent
// theirs to.
func (f *visitFlow) reply(t *target, p []byte) {
	f.last.Store(time.Now().UnixNano())
	if !f.replied.Swap(true) {
		t.worked()
	}
	f.books.heard(f, t, p)
	if f.outward.drops(len(p)) {
		return
	}
	if err := f.p.packets.Send(p, f.key.visitor, f.key.local); err != nil {
		f.p.s.metrics.datagramsDropped.Inc()
		return
	}
	f.out.Add(int64(len(p)))
}

// done reports whether the flow is of no use any more: it is idle, has ended, or
// leads where the routing table does not.
func (f *visitFlow) done(now time.Time) bool {
	idle := f.p.idle
	if !f.confirmed.Load() {
		idle /= 4
	}
	quiet := now.Sub(time.Unix(0, f.last.Load()))
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.flow == nil && f.err == nil:
		return false // being opened
	case f.err != nil:
		return now.Sub(f.since) > flowPause
	case f.last.Load() != 0 && quiet >= idle:
		return true
	case f.outlived(now, quiet):
		f.p.s.metrics.refused(reasonTime)
		return true
	}
	if t := f.p.s.table.Load(); t != f.table {
		f.table = t
		r := f.books.leads(f, t)
		leads := r != nil && r.Key == f.route.Key && r.Exposure.Port == f.route.Exposure.Port && slices.Contains(r.Exposure.Targets, f.target.Target)
		if !leads || r.guard != nil && r.guard.ready(f.p.s).lets(f.key.visitor.Addr().WithZone("")) != "" {
			return true
		}
	}
	e, ok := f.flow.(FlowEnd)
	return ok && e.Ended() != nil
}

// end takes the flow off the books and tells how it went.
func (f *visitFlow) end() {
	s := f.p.s
	if !f.books.forget(f) {
		return
	}
	f.mu.Lock()
	flow, target, err := f.flow, f.target, f.err
	f.mu.Unlock()
	result := resultOK
	if e, ok := flow.(FlowEnd); ok && isRefusal(e.Ended()) {
		err = e.Ended()
		target.failed(time.Now())
		s.metrics.openErrors.WithLabelValues(string(webgw.KindOf(err))).Inc()
	}
	if flow != nil {
		flow.Close() // what it returns says nothing about datagrams
	}
	switch {
	case err != nil && f.out.Load() == 0:
		result = resultUnreached
		s.log.Debug("no target could be reached", "exposure", f.route.Key.String(), "visitor", f.key.visitor, "err", err)
	case err != nil:
		result = resultBroken
	}
	f.route.release()
	s.flowDoors.leave(f.key.visitor.Addr().WithZone(""))
	proto := f.p.carries
	s.metrics.streams.WithLabelValues(proto).Dec()
	s.metrics.join.WithLabelValues(proto).Observe(time.Since(f.since).Seconds())
	s.metrics.result(proto, result)
	s.metrics.carried(proto, f.in.Load(), f.out.Load())
	a := Access{Access: webgw.Access{Time: f.since, Exposure: f.route.Key, Visitor: f.key.visitor.Addr(), Proto: proto,
		BytesIn: f.in.Load(), BytesOut: f.out.Load(), Took: time.Since(f.since)}, Err: err}
	if target != nil {
		a.Target = target.At(f.above)
	}
	s.record(a)
}

// sweep ends flows that are of no use any more.
func (p *udpPort) sweep() {
	tick := time.NewTicker(max(p.s.limits.FlowIdle/12, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case now := <-tick.C:
			for _, f := range p.all() {
				if f.done(now) {
					f.end()
				}
			}
		}
	}
}

// flowDoors counts flows, in all and per address.
type flowDoors struct {
	mu  sync.Mutex
	all int
	by  map[netip.Addr]int
}

func (d *flowDoors) enter(a netip.Addr, limits *Limits) (reason string) {
	a = place(a)
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.all >= limits.Flows:
		return reasonTotal
	case d.by[a] >= limits.FlowsPerAddress:
		return reasonAddress
	}
	if d.by == nil {
		d.by = map[netip.Addr]int{}
	}
	d.all++
	d.by[a]++
	return ""
}

func (d *flowDoors) leave(a netip.Addr) {
	a = place(a)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.all--
	if d.by[a]--; d.by[a] == 0 {
		delete(d.by, a)
	}
}
