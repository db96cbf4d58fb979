package ingress

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw"
)

// Limits of what strangers can make the QUIC port hold before anything of them
// is known. Whoever is in excess makes room: the oldest.
const (
	maxFresh      = 4096            // connections that have only just begun
	maxFreshHeld  = 8               // datagrams of one of them that wait for the rest of its ClientHello
	maxFreshBytes = 16 << 20        // of all of them
	freshTime     = 5 * time.Second // for a ClientHello to come whole

	maxLaneIDs = 8 // connection ids that are remembered of one connection to a workload
	minSureID  = 8 // bytes of a connection id that nobody hits by chance
)

// carriesQUIC marks passed-through QUIC in metrics and access logs.
const carriesQUIC = "quic"

// quicPort is the UDP socket beside the TLS port. It reads the server name from
// the first packets of a connection, and goes by the routing table as serveTLS
// does: to the HTTP/3 server here, or as a flow to a workload. Afterwards it
// goes by connection ids, which say where a packet belongs even when its
// visitor's address has changed (RFC 9000 section 5.2).
//
// A flow belongs to one address of a visitor. A visitor who comes from another
// gets another flow to the same workload, which so learns of the change and can
// validate the path: the gateway can't.
type quicPort struct {
	flowPort
	h3       *h3Server
	draining atomic.Bool

	mu     sync.Mutex
	fresh  map[freshKey]*fresh
	order  []freshKey // of those in fresh, oldest first; may name some that are gone
	held   int        // bytes that wait in fresh
	flows  map[flowKey][]*visitFlow
	lanes  map[*visitFlow]*lane
	routes map[connID]*lane // by the ids that workloads have chosen
	sizes  [maxConnID + 1]int
}

// connID is a connection id as a key.
type connID struct {
	n  uint8
	id [maxConnID]byte
}

func connIDOf(b []byte) (c connID) {
	c.n = uint8(copy(c.id[:], b))
	return c
}

func (c *connID) bytes() []byte { return c.id[:c.n] }

// freshKey is a connection that has just begun. The visitor has made the id up.
type freshKey struct {
	flowKey
	dcid connID
}

// fresh is a connection of which nothing but first packets is known. Once that
// is decided, the entry tells where further ones with the same id go.
type fresh struct {
	since  time.Time
	reader *initialReader // nil: the connection ends here
	scid   connID
	held   [][]byte
	wait   int // bytes in held
	bytes  int // that the entry counts for, with what the reader holds
}

// lane is one QUIC connection with a workload, by the ids in packets to it.
type lane struct {
	key    webgw.Key
	host   string
	target *target  // nil as long as the workload has not answered
	ids    []connID // of the workload's choice, oldest first
	flows  int      // one per address that the visitor has come from

	first, visitor connID // the ids that the visitor began with: for the workload, and its own
}

// listenQUIC opens the port with the number that the TLS port has.
func (s *Server) listenQUIC(address string) (*quicPort, error) {
	p := &quicPort{fresh: map[freshKey]*fresh{}, flows: map[flowKey][]*visitFlow{}, lanes: map[*visitFlow]*lane{}, routes: map[connID]*lane{}}
	if err := p.open(s, address, carriesQUIC); err != nil {
		return nil, err
	}
	p.idle = max(s.limits.FlowIdle, s.limits.Idle)
	h3, err := newH3Server(s, p)
	if err != nil {
		p.conn.Close()
		return nil, err
	}
	p.h3 = h3
	return p, nil
}

// receive takes in datagrams until the port is closed.
func (p *quicPort) receive() {
	p.receiveAll(p.take)
	for _, f := range p.all() {
		f.end()
	}
}

func (p *quicPort) all() (all []*visitFlow) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for f := range p.lanes {
		all = append(all, f)
	}
	return all
}

// take passes one datagram on. All packets in it are of one connection.
func (p *quicPort) take(b []byte, visitor netip.AddrPort, local netip.Addr) {
	key := flowKey{visitor, local}
	switch {
	case len(b) == 0:
	case isLong(b):
		p.takeLong(b, key)
	case len(b) > ownIDLen && p.h3.ids.own(b[1:1+ownIDLen]):
		p.h3.deliver(b, key)
	default:
		p.takeShort(b, key)
	}
}

// takeLong passes a packet on that belongs to a handshake.
func (p *quicPort) takeLong(b []byte, key flowKey) {
	h, ok := parseLong(b)
	if !ok || h.version == 0 { // version negotiation is the server's
		p.drop()
		return
	}
	if len(h.dcid) == ownIDLen && p.h3.ids.own(h.dcid) {
		p.h3.deliver(b, key)
		return
	}
	if h.kind == quicUnknown {
		// The server here says which versions there are.
		if len(b) >= minInitial && !p.draining.Load() {
			p.h3.deliver(b, key)
		}
		return
	}
	now := time.Now()
	if f := p.flowTo(key, h.dcid, &h, now); f != nil {
		f.take(b, now)
		return
	}
	k := freshKey{key, connIDOf(h.dcid)}
	p.mu.Lock()
	n := p.fresh[k]
	p.mu.Unlock()
	switch {
	case n != nil && n.reader == nil:
		p.h3.deliver(b, key)
	case n != nil:
		p.feed(k, n, b)
	case h.kind == quicInitial && len(b) >= minInitial && len(h.dcid) >= minSureID && !p.draining.Load():
		reader, err := newInitialReader(h)
		if err != nil {
			p.drop()
			return
		}
		p.feed(k, &fresh{since: now, reader: reader, scid: connIDOf(h.scid)}, b)
	default:
		p.drop()
	}
}

// takeShort passes a packet on of an established connection with a workload.
func (p *quicPort) takeShort(b []byte, key flowKey) {
	now := time.Now()
	f := p.flowTo(key, b[1:], nil, now)
	if f == nil {
		p.drop()
		return
	}
	f.take(b, now)
}

// flowTo returns the flow by which a packet goes on, or nil. id is the packet's,
// or in a packet without a long header, what begins with it. A visitor whose
// address has changed gets another flow.
func (p *quicPort) flowTo(key flowKey, id []byte, h *longHeader, now time.Time) *visitFlow {
	f := p.lookUp(key, id, h)
	if f != nil && f.done(now) {
		f.end()
		f = nil
	}
	if f != nil {
		return f
	}
	if l := p.laneTo(id); l != nil {
		return p.begin(l, key, now)
	}
	return nil
}

// lookUp finds a flow of the visitor's address: the one whose connection has the
// id, else, unless the id is another connection's, the one whose visitor has the
// long header's source, else the latest: workloads give ids out that nobody but
// the visitor sees. Packets that may begin a connection go by their id alone.
func (p *quicPort) lookUp(key flowKey, id []byte, h *longHeader) (found *visitFlow) {
	p.mu.Lock()
	defer p.mu.Unlock()
	flows := p.flows[key]
	for _, f := range flows {
		if p.lanes[f].has(id) {
			return f
		}
	}
	if len(flows) == 0 || h != nil && h.kind != quicHandshake && len(id) > 0 || p.byIDLocked(id) != nil {
		return nil
	}
	sure := len(flows) == 1
	for _, f := range flows {
		if h != nil && len(h.scid) > 0 && string(p.lanes[f].visitor.bytes()) == string(h.scid) {
			found, sure = f, true
			break
		}
		if found == nil || f.last.Load() > found.last.Load() {
			found = f
		}
	}
	l := p.lanes[found]
	if l.target == nil {
		return nil // the workload has not answered: its ids are not known to the visitor
	}
	if sure && len(l.ids) > 0 {
		if n := int(l.ids[0].n); n <= len(id) {
			p.learnLocked(l, connIDOf(id[:n]))
		}
	}
	return found
}

// has reports whether id is, or begins with, one of the connection's.
func (l *lane) has(id []byte) bool {
	if string(l.first.bytes()) == string(id) {
		return true
	}
	for i := range l.ids {
		own := l.ids[i].bytes()
		if len(own) <= len(id) && string(own) == string(id[:len(own)]) {
			return true
		}
	}
	return false
}

// laneTo finds a connection by its id alone.
func (p *quicPort) laneTo(id []byte) *lane {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.byIDLocked(id)
	if l == nil || l.target == nil {
		return nil
	}
	return l
}

func (p *quicPort) byIDLocked(id []byte) *lane {
	for n := min(maxConnID, len(id)); n >= minSureID; n-- {
		if p.sizes[n] > 0 {
			if l := p.routes[connIDOf(id[:n])]; l != nil {
				return l
			}
		}
	}
	return nil
}

// learnLocked notes an id of a connection. Short ones say something only among
// those of one visitor: else a workload could draw others' packets to itself.
func (p *quicPort) learnLocked(l *lane, id connID) {
	if id.n == 0 || l.has(id.bytes()) || p.routes[id] != nil || p.h3.ids.own(id.bytes()) {
		return
	}
	if len(l.ids) == maxLaneIDs {
		p.unlearnLocked(l.ids[0])
		l.ids = slices.Delete(l.ids, 0, 1)
	}
	l.ids = append(l.ids, id)
	if id.n >= minSureID {
		p.routes[id] = l
		p.sizes[id.n]++
	}
}

func (p *quicPort) unlearnLocked(id connID) {
	if p.routes[id] != nil {
		delete(p.routes, id)
		p.sizes[id.n]--
	}
}

// feed reads a datagram of a fresh connection, and decides where it goes as soon
// as its name is known.
func (p *quicPort) feed(k freshKey, n *fresh, b []byte) {
	hello, done, err := n.reader.feed(b)
	switch {
	case err != nil:
		p.s.metrics.refused(reasonHello)
		p.discard(k)
	case !done && len(n.reader.known) == 0:
		p.drop() // nothing that could be opened
	case !done:
		p.keep(k, n, b)
	default:
		held := n.held
		p.discard(k)
		r := p.s.table.Load().TLS(hello.ServerName)
		if r == nil || !r.passesQUIC() {
			// What leads nowhere is refused in TLS, by the server here.
			p.keep(k, &fresh{since: n.since}, nil)
			for _, b := range held {
				p.h3.deliver(b, k.flowKey)
			}
			p.h3.deliver(b, k.flowKey)
			return
		}
		now := time.Now()
		f := p.begin(&lane{key: r.Key, host: webgw.NormalizeHost(hello.ServerName), first: k.dcid, visitor: n.scid}, k.flowKey, now)
		if f == nil {
			return
		}
		for _, b := range held {
			f.take(b, now)
		}
		f.take(b, now)
	}
}

// passesQUIC reports whether QUIC goes to the workload.
func (r *Route) passesQUIC() bool { return r.Exposure.Protocol == webgw.TLS && r.Exposure.QUIC }

// keep holds a datagram until more of its ClientHello has come.
func (p *quicPort) keep(k freshKey, n *fresh, b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fresh[k] == nil {
		p.fresh[k] = n
		p.order = append(p.order, k)
		p.held += n.bytes
	}
	before := n.bytes
	if b != nil && len(n.held) < maxFreshHeld {
		n.held = append(n.held, slices.Clone(b))
		n.wait += len(b)
	}
	n.bytes = n.wait
	if n.reader != nil {
		n.bytes += cap(n.reader.data)
	}
	p.held += n.bytes - before
	for len(p.fresh) > maxFresh || p.held > maxFreshBytes {
		p.dropOldestLocked()
	}
	if len(p.order) > 2*maxFresh { // most of them gone
		p.order = slices.DeleteFunc(p.order, func(k freshKey) bool { return p.fresh[k] == nil })
	}
}

func (p *quicPort) dropOldestLocked() {
	k := p.order[0]
	p.order = p.order[1:]
	p.discardLocked(k)
}

func (p *quicPort) discard(k freshKey) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.discardLocked(k)
}

func (p *quicPort) discardLocked(k freshKey) {
	if n := p.fresh[k]; n != nil {
		p.held -= n.bytes
		delete(p.fresh, k)
	}
}

func (p *quicPort) drop() { p.s.metrics.datagramsDropped.Inc() }

// begin makes a flow of a connection and starts to open it; nil if it must not be.
func (p *quicPort) begin(l *lane, key flowKey, now time.Time) *visitFlow {
	if p.s.Flows == nil || p.draining.Load() {
		return nil
	}
	f := &visitFlow{p: &p.flowPort, books: p, key: key, host: l.host, only: l.target, table: p.s.table.Load(), since: now}
	r := p.leads(f, f.table)
	if r == nil || r.Key != l.key || l.target != nil && !slices.Contains(r.Exposure.Targets, l.target.Target) {
		return nil // withdrawn
	}
	f.route = r
	if p.admit(f) == nil {
		return nil
	}
	p.mu.Lock()
	l.flows++
	p.flows[key] = append(p.flows[key], f)
	p.lanes[f] = l
	p.mu.Unlock()
	p.opening.Go(f.open)
	return f
}

// leads implements flowBooks.
func (p *quicPort) leads(f *visitFlow, t *Table) *Route {
	if r := t.TLS(f.host); r != nil && r.passesQUIC() {
		return r
	}
	return nil
}

// heard implements flowBooks: the workload's handshake shows which ids it has
// chosen.
func (p *quicPort) heard(f *visitFlow, to *target, b []byte) {
	if len(b) == 0 || !isLong(b) {
		return
	}
	h, ok := parseLong(b)
	if !ok || h.version == 0 || h.kind == quicUnknown {
		return
	}
	id := connIDOf(h.scid)
	p.mu.Lock()
	defer p.mu.Unlock()
	if l := p.lanes[f]; l != nil {
		l.target = to
		p.learnLocked(l, id)
	}
}

// forget implements flowBooks.
func (p *quicPort) forget(f *visitFlow) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.lanes[f]
	if l == nil {
		return false
	}
	delete(p.lanes, f)
	if flows := slices.DeleteFunc(p.flows[f.key], func(o *visitFlow) bool { return o == f }); len(flows) > 0 {
		p.flows[f.key] = flows
	} else {
		delete(p.flows, f.key)
	}
	if l.flows--; l.flows == 0 {
		for _, id := range l.ids {
			p.unlearnLocked(id)
		}
	}
	return true
}

// sweep ends what is of no use any more.
func (p *quicPort) sweep() {
	tick := time.NewTicker(freshTime / 5)
	defer tick.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case now := <-tick.C:
			p.mu.Lock()
			for len(p.order) > 0 {
				if n := p.fresh[p.order[0]]; n != nil && now.Sub(n.since) < freshTime {
					break
				}
				p.dropOldestLocked()
			}
			p.mu.Unlock()
			for _, f := range p.all() {
				if f.done(now) {
					f.end()
				}
			}
		}
	}
}

// startQUICLocked opens the QUIC port beside the TLS port, at the same address.
// Without it visitors come by TCP: that is told, but no reason not to serve.
func (s *Server) startQUICLocked(tls *listener) {
	address := tls.Addr().String()
	p, err := s.listenQUIC(address)
	if err != nil {
		s.log.Error("QUIC port can't be opened; visitors use TCP", "addr", address, "err", err)
		return
	}
	s.quic = p
	s.altSvc = fmt.Sprintf(`h3=":%d"; ma=86400`, s.publicTLSPort())
	p.h3.start()
	p.h3.serving.Go(p.receive)
	p.h3.serving.Go(p.sweep)
}

// publicTLSPort is the TLS port as visitors see it.
func (s *Server) publicTLSPort() uint16 {
	if s.PublicTLSPort == 0 {
		return 443
	}
	return s.PublicTLSPort
}

// drain takes in no connections any more. Those that are open go on.
func (p *quicPort) drain(ctx context.Context) {
	p.draining.Store(true)
	p.h3.drain(ctx)
}

// end closes the port and waits for everything on it.
func (p *quicPort) end() {
	p.h3.end()
	p.close()
	if err := p.conn.Close(); err != nil {
		p.s.log.Warn("closing the QUIC port", "err", err)
	}
	p.h3.serving.Wait()
}

// announce tells a visitor that the name can be had over HTTP/3, unless the
// workload has said where it can be had.
func (x *exchange) announce() {
	if x.web.s.altSvc == "" || !x.conn.tls || x.in.ProtoMajor > 2 {
		return
	}
	if h := x.Header(); h["Alt-Svc"] == nil {
		h["Alt-Svc"] = []string{x.web.s.altSvc} // RFC 7838
	}
}
