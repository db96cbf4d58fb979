package tunnel

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// Flow carries one visitor's datagrams to a workload, at the gateway's end.
type Flow struct {
	flows   *flows
	link    *gatewayLink
	id      uint32
	deliver func(p []byte)
	end     atomic.Pointer[error]
}

// flows are those of one session, and the links that they share.
type flows struct {
	m    *metrics
	poke func() // a link should be demanded

	mu     sync.Mutex
	links  []*gatewayLink // in the order in which they were wanted
	count  int            // of flows
	asked  int            // of links, to be demanded
	closed bool
}

// gatewayLink is a link and its flows, which are under flows.mu.
type gatewayLink struct {
	link
	flows    map[uint32]*Flow
	last     uint32 // the newest flow
	attached bool
	since    time.Time // when it was wanted
}

func flowError(kind webgw.ErrorKind, public string) *webgw.Error {
	return &webgw.Error{Op: "open flow", Kind: kind, Public: public}
}

var (
	errFlowOver = errors.New("tunnel: the node has ended the flow")
	errLinkLost = flowError(webgw.Unavailable, "the node's connection was lost")
	errNoLink   = flowError(webgw.Unavailable, "the node did not open a data connection in time")
)

// OpenFlow begins a flow to a node, without waiting: datagrams may follow at
// once, and the request leaves with them. deliver is called with each datagram
// of the workload, from one goroutine at a time; it must not wait nor keep p.
// What the node refuses shows in Ended. The error is a *webgw.Error.
func (s *Server) OpenFlow(node webgw.ID, r Request, deliver func(p []byte)) (*Flow, error) {
	if err := s.setup(); err != nil {
		return nil, err
	}
	r.Kind = Flows
	f, err := s.openFlow(node, r, deliver)
	result := "ok"
	if err != nil {
		result = string(webgw.KindOf(err))
	}
	s.metrics.opens.WithLabelValues(Flows.String(), result).Inc()
	return f, err
}

func (s *Server) openFlow(node webgw.ID, r Request, deliver func(p []byte)) (*Flow, error) {
	s.mu.Lock()
	sess := s.sessions[node]
	s.mu.Unlock()
	switch {
	case sess == nil:
		return nil, errNoSession
	case sess.drained.Load():
		return nil, flowError(webgw.Unavailable, "the node is stopping and takes no new flows")
	case !sess.hello.Flows:
		return nil, flowError(webgw.Unsupported, "the node carries no datagrams")
	}
	body, err := json.Marshal(r)
	if err != nil || len(body) > maxRequest {
		return nil, &webgw.Error{Op: "open flow", Kind: webgw.Internal, Public: "the request can't be sent", Err: err}
	}
	f, err := sess.flows.add(deliver)
	if err != nil {
		return nil, err
	}
	if !f.link.carry(frameOpen, f.id, body) {
		f.flows.remove(f)
		return nil, flowError(webgw.Exhausted, "the connection to the node is overloaded")
	}
	return f, nil
}

// add makes a flow on the link that has the fewest.
func (s *flows) add(deliver func(p []byte)) (*Flow, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errNoSession
	}
	if s.count >= maxFlows {
		return nil, flowError(webgw.Exhausted, "too many flows are open to the node")
	}
	var best *gatewayLink
	coming := false
	for _, l := range s.links {
		coming = coming || !l.attached
		if best == nil || l.attached && !best.attached || l.attached == best.attached && len(l.flows) < len(best.flows) {
			best = l
		}
	}
	if best == nil || len(best.flows) > 0 && !coming && len(s.links) < maxLinks {
		l := &gatewayLink{link: newLink(), flows: map[uint32]*Flow{}, since: time.Now()}
		s.links = append(s.links, l)
		s.asked++
		if best == nil {
			best = l
		}
		defer s.poke()
	}
	// Numbers come round after 16 million, so that nothing late is taken for
	// another flow's.
	for best.last++; best.last > maxFlowID || best.flows[best.last] != nil; best.last++ {
		if best.last > maxFlowID {
			best.last = 0
		}
	}
	f := &Flow{flows: s, link: best, id: best.last, deliver: deliver}
	best.flows[f.id] = f
	s.count++
	return f, nil
}

// remove takes f off the books; false if it was off already.
func (s *flows) remove(f *Flow) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.link.flows[f.id] != f {
		return false
	}
	delete(f.link.flows, f.id)
	s.count--
	return true
}

// ask returns how many links to demand.
func (s *flows) ask() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, s.asked = s.asked, 0
	return n
}

// attach gives a new connection to the link that has waited longest.
func (s *flows) attach(d *dataConn) (*gatewayLink, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.links {
		if !l.attached {
			if l.attached = l.link.attach(d); l.attached {
				return l, nil
			}
		}
	}
	return nil, errors.New("no connection for flows was asked for")
}

// serveLink takes over a connection for flows.
func (s *Server) serveLink(sess *session, d *dataConn) error {
	netx.TuneFlows(d.raw)
	l, err := sess.flows.attach(d)
	if err != nil {
		s.metrics.refused("surplus")
		return err
	}
	if !s.later(func() { sess.flows.run(l, d) }) {
		l.cut()
	}
	return nil
}

// run serves a link until it is lost.
func (s *flows) run(l *gatewayLink, d *dataConn) {
	var writer sync.WaitGroup
	writer.Go(func() { l.write(d) })
	err := l.read(d, func(t frameType, id uint32, p []byte) error { return s.receive(l, t, id, p) })
	s.drop(&webgw.Error{Op: errLinkLost.Op, Kind: errLinkLost.Kind, Public: errLinkLost.Public, Err: err}, l)
	writer.Wait()
}

// receive takes one frame of the node.
func (s *flows) receive(l *gatewayLink, t frameType, id uint32, p []byte) error {
	s.mu.Lock()
	f := l.flows[id]
	s.mu.Unlock()
	switch {
	case t == frameOpen:
		return errors.New("tunnel: the node asks for a flow")
	case f == nil: // closed a moment ago
	case t == frameData:
		s.m.received.Inc()
		f.deliver(p)
	case t == frameEnd:
		f.finish(errFlowOver)
	case t == frameRefuse:
		var r refusal
		if err := json.Unmarshal(p, &r); err != nil {
			return fmt.Errorf("tunnel: refusal: %w", err)
		}
		s.m.opens.WithLabelValues(Flows.String(), "refused").Inc()
		f.finish(r.err("open flow"))
	}
	return nil
}

// drop ends links and their flows.
func (s *flows) drop(why error, gone ...*gatewayLink) {
	s.mu.Lock()
	kept := s.links[:0:0]
	for _, l := range s.links {
		if !contains(gone, l) {
			kept = append(kept, l)
		}
	}
	s.links = kept
	var ended []*Flow
	for _, l := range gone {
		for _, f := range l.flows {
			ended = append(ended, f)
		}
	}
	s.mu.Unlock()
	for _, l := range gone {
		l.cut()
	}
	for _, f := range ended {
		f.finish(why)
	}
}

func contains(all []*gatewayLink, l *gatewayLink) bool {
	for _, o := range all {
		if o == l {
			return true
		}
	}
	return false
}

// waiting returns up to n links that wait for their connection since before a
// time.
func (s *flows) waiting(n int, before time.Time) (out []*gatewayLink) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.links {
		if len(out) < n && !l.attached && l.since.Before(before) {
			out = append(out, l)
		}
	}
	return out
}

// short tells that n of the connections demanded will not come.
func (s *flows) short(n int) { s.drop(errNoLink, s.waiting(n, time.Now().Add(time.Second))...) }

// tick gives up links that nobody brings.
func (s *flows) tick(now time.Time) {
	if late := s.waiting(maxLinks, now.Add(-pendingAfter)); len(late) > 0 {
		s.drop(errNoLink, late...)
	}
}

func (s *flows) close() {
	s.mu.Lock()
	s.closed = true
	all := s.links
	s.mu.Unlock()
	s.drop(errNoSession, all...)
}

func (s *flows) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count
}

// finish ends the flow from the other side.
func (f *Flow) finish(why error) {
	f.end.CompareAndSwap(nil, &why)
	f.flows.remove(f)
}

// Send passes a datagram on, or drops it. It never waits and does not keep p.
func (f *Flow) Send(p []byte) {
	if f.end.Load() != nil {
		return
	}
	if len(p) > MaxDatagram || !f.link.carry(frameData, f.id, p) {
		f.flows.m.dropped.Inc()
		return
	}
	f.flows.m.sent.Inc()
}

// Ended returns nil while the flow lives, then why it has ended: as a
// *webgw.Error what the node refused it for, or that the node was lost; else it
// was idle, or closed here.
func (f *Flow) Ended() error {
	if e := f.end.Load(); e != nil {
		return *e
	}
	return nil
}

// Close ends the flow.
func (f *Flow) Close() error {
	why := net.ErrClosed
	f.end.CompareAndSwap(nil, &why)
	if f.flows.remove(f) {
		f.link.carry(frameEnd, f.id, nil) // if it is lost, the node's idle time-out ends the flow there
	}
	return nil
}
