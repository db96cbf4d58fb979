package tunnel

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/netx"
)

// Timing of a session. A peer that has been silent for silence is gone: two
// pings were lost and a third was late.
const (
	pingEvery        = 1500 * time.Millisecond
	silence          = 4 * time.Second
	handshakeTimeout = 10 * time.Second
	maxHandshakes    = 1024 // under way at once, of strangers and nodes together
	maxOfAddress     = 128  // of those, from one address (IPv6: one /64)
	maxHello         = 4 << 10
)

// Server is the gateway's end of all its sessions.
type Server struct {
	Key     ident.Key
	Admit   func(node webgw.ID) error // may this identity have a session? nil: any
	Changed func()                    // told, without locks held, when sessions come or go; may be nil
	Log     *slog.Logger
	Metrics prometheus.Registerer // nil: counted but not registered

	once       sync.Once
	err        error
	controlTLS *tls.Config
	dataTLS    *tls.Config
	handshakes gate
	metrics    *metrics

	mu       sync.Mutex
	sessions map[webgw.ID]*session
	draining bool
	epoch    uint64

	smu      sync.Mutex
	streams  map[*dataConn]*session // open ones, of sessions that have ended, too
	closed   bool
	quit     chan struct{}  // closed by Close
	watching bool           // over the streams of sessions that have ended
	lingers  sync.WaitGroup // streams that wait for the workload's end, and links; added to under smu
	naps     naps
}

// Session tells what is known of one node's attachment.
type Session struct {
	Node     webgw.ID
	Epoch    uint64 // rises with every session that this gateway grants
	Since    time.Time
	Remote   net.Addr
	Software string
	Draining bool
	Streams  int // open now
	Idle     int // ready data connections
	Flows    int // open now
}

type session struct {
	node    webgw.ID
	epoch   uint64
	secret  []byte
	since   time.Time
	conn    net.Conn
	hello   hello
	pools   [3]*pool // by Kind; 0 is unused
	flows   *flows
	wake    chan struct{}
	events  chan json.RawMessage
	streams atomic.Int64
	drained atomic.Bool // the node takes no new streams
	done    chan struct{}
	once    sync.Once
	why     error // set before done is closed
}

func (s *Server) setup() error {
	s.once.Do(func() {
		if s.controlTLS, s.err = s.Key.ServerTLS(true, webgw.ALPNTunnel); s.err != nil {
			return
		}
		if s.dataTLS, s.err = s.Key.ServerTLS(false, webgw.ALPNData); s.err != nil {
			return
		}
		s.dataTLS.DynamicRecordSizingDisabled = true
		s.handshakes.from = map[netip.Addr]int{}
		s.mu.Lock() // Sessions may be asked before the first one comes
		s.sessions = map[webgw.ID]*session{}
		s.streams = map[*dataConn]*session{}
		s.quit = make(chan struct{})
		s.mu.Unlock()
		// Epochs rise across restarts, too.
		s.epoch = uint64(time.Now().UnixMilli()) << 16
		s.metrics = newMetrics(s.Metrics, "gateway", s.gauges)
	})
	return s.err
}

var errBusy = errors.New("too many handshakes under way")

// gate counts handshakes, so that strangers who never finish theirs, from few
// addresses, keep no node out.
type gate struct {
	mu   sync.Mutex
	all  int
	from map[netip.Addr]int
}

func (g *gate) enter(c net.Conn) bool {
	a := sourceOf(c)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.all >= maxHandshakes || g.from[a] >= maxOfAddress {
		return false
	}
	g.all++
	g.from[a]++
	return true
}

func (g *gate) leave(c net.Conn) {
	a := sourceOf(c)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all--
	if g.from[a]--; g.from[a] == 0 {
		delete(g.from, a)
	}
}

// sourceOf is the unit in which strangers are counted.
func sourceOf(c net.Conn) netip.Addr {
	t, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	a := t.AddrPort().Addr().Unmap().WithZone("")
	if a.Is6() {
		p, _ := a.Prefix(64) // a valid length for IPv6
		return p.Addr()
	}
	return a
}

// ServeControl takes over an accepted connection whose ClientHello (in head)
// offers webgw.ALPNTunnel, and returns when the session is over or was refused.
func (s *Server) ServeControl(ctx context.Context, c net.Conn, head []byte) {
	defer c.Close()
	if err := s.serveControl(ctx, c, head); err != nil {
		s.Log.Info("session ended", "remote", c.RemoteAddr(), "err", err)
	}
}

func (s *Server) serveControl(ctx context.Context, c net.Conn, head []byte) error {
	if err := s.setup(); err != nil {
		return err
	}
	if !s.handshakes.enter(c) {
		s.metrics.refused("busy")
		return errBusy
	}
	sess, conn, err := s.greet(ctx, c, head)
	s.handshakes.leave(c)
	if err != nil {
		s.metrics.refused("handshake")
		return err
	}
	log := s.Log.With("node", sess.node.String(), "session", sess.epoch)
	log.Info("session began", "remote", c.RemoteAddr(), "software", sess.hello.Software)
	defer s.removed(sess)

	stop := context.AfterFunc(ctx, func() { sess.end(errStopping) })
	defer stop()
	var reader, writer sync.WaitGroup
	reader.Go(func() { s.readControl(sess, conn) })
	writer.Go(func() { s.writeControl(sess, conn) })
	<-sess.done
	s.watch()
	writer.Wait() // it may still tell the node why
	c.Close()
	reader.Wait()
	log.Info("session ended", "err", sess.why)
	return nil
}

var (
	errStopping   = &webgw.Error{Op: "session", Kind: webgw.Unavailable, Public: "the gateway is stopping"}
	errSuperseded = &webgw.Error{Op: "session", Kind: webgw.Taken, Public: "a newer session of the same identity has taken over"}
)

// greet does the handshake and either registers the session or tells the node
// why there is none.
func (s *Server) greet(ctx context.Context, c net.Conn, head []byte) (*session, *tls.Conn, error) {
	c.SetDeadline(time.Now().Add(handshakeTimeout))
	conn := tls.Server(newWire(c, head), s.controlTLS)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, nil, err
	}
	cs := conn.ConnectionState()
	node, err := ident.PeerID(cs)
	if err != nil {
		return nil, nil, err
	}
	t, body, err := readMessage(conn, maxHello)
	if err != nil {
		return nil, nil, err
	}
	var h hello
	if t != msgHello {
		return nil, nil, fmt.Errorf("tunnel: message type %d instead of hello", t)
	}
	if err := json.Unmarshal(body, &h); err != nil {
		return nil, nil, fmt.Errorf("tunnel: hello: %w", err)
	}
	refuse := func(err *webgw.Error) (*session, *tls.Conn, error) {
		s.metrics.refused(string(err.Kind))
		return nil, nil, errors.Join(err, writeMessage(conn, msgRefuse, refusal{err.Kind, err.Sentence()}))
	}
	if h.Max < webgw.MinProtocol || h.Min > webgw.Protocol {
		return refuse(&webgw.Error{Op: "session", Kind: webgw.Unsupported,
			Public: fmt.Sprintf("the node speaks protocol %d to %d, this gateway %d to %d", h.Min, h.Max, webgw.MinProtocol, webgw.Protocol)})
	}
	if s.Admit != nil {
		if err := s.Admit(node); err != nil {
			e, ok := asError(err)
			if !ok {
				e = &webgw.Error{Op: "session", Kind: webgw.Forbidden, Public: "this gateway does not admit the node", Err: err}
			}
			return refuse(e)
		}
	}
	if len(h.Software) > 100 {
		h.Software = h.Software[:100]
	}
	sess := &session{
		node: node, hello: h, since: time.Now(), conn: c, secret: make([]byte, 32),
		wake: make(chan struct{}, 1), events: make(chan json.RawMessage, 256), done: make(chan struct{}),
	}
	rand.Read(sess.secret)
	sess.flows = &flows{m: s.metrics, poke: sess.poke}
	for _, k := range []Kind{Sealed, Handoff} {
		sess.pools[k] = &pool{target: poolMin, demand: sess.poke}
	}

	s.mu.Lock()
	if s.draining {
		s.mu.Unlock()
		return refuse(errStopping)
	}
	s.epoch++
	sess.epoch = s.epoch
	old := s.sessions[node]
	s.sessions[node] = sess
	s.mu.Unlock()
	if old != nil {
		old.end(errSuperseded)
	}
	if err := writeMessage(conn, msgWelcome, welcome{webgw.Protocol, sess.epoch, sess.secret}); err != nil {
		s.removed(sess)
		return nil, nil, err
	}
	c.SetDeadline(time.Time{})
	netx.TuneLong(c)
	sess.poke()
	s.changed()
	return sess, conn, nil
}

// end ends the session; open streams carry on.
func (sess *session) end(why error) {
	sess.once.Do(func() {
		sess.why = why
		close(sess.done)
		for _, p := range sess.pools {
			if p != nil {
				p.close()
			}
		}
		sess.flows.close()
	})
}

func (s *Server) removed(sess *session) {
	sess.end(net.ErrClosed)
	s.mu.Lock()
	if s.sessions[sess.node] == sess {
		delete(s.sessions, sess.node)
	}
	s.mu.Unlock()
	s.changed()
}

func (s *Server) changed() {
	if s.Changed != nil {
		s.Changed()
	}
}

// poke makes the session's writer look at the pools.
func (sess *session) poke() {
	select {
	case sess.wake <- struct{}{}:
	default:
	}
}

func (s *Server) readControl(sess *session, conn *tls.Conn) {
	for {
		sess.conn.SetReadDeadline(time.Now().Add(silence))
		t, body, err := readMessage(conn, maxControl)
		if err != nil {
			if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
				err = fmt.Errorf("nothing heard for %v", silence)
			}
			sess.end(err)
			return
		}
		switch t {
		case msgShort:
			var d demand
			if err := json.Unmarshal(body, &d); err != nil {
				sess.end(fmt.Errorf("tunnel: short: %w", err))
				return
			}
			sess.pools[Sealed].short(max(0, d.Sealed))
			sess.pools[Handoff].short(max(0, d.Handoff))
			sess.flows.short(max(0, d.Flows))
		case msgDrain:
			if sess.drained.Swap(true) {
				continue
			}
			// What is ready goes back to the node, who knows by that when the last
			// stream has come.
			for _, k := range []Kind{Sealed, Handoff} {
				sess.pools[k].close()
			}
			s.changed()
		}
	}
}

// writeControl is the only writer on the control connection: pings, demands
// and events.
func (s *Server) writeControl(sess *session, conn *tls.Conn) {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	send := func(t messageType, body any) bool {
		sess.conn.SetWriteDeadline(time.Now().Add(silence))
		err := writeMessage(conn, t, body)
		if err != nil {
			sess.end(err)
		}
		return err == nil
	}
	toldDrain := false
	for {
		select {
		case <-sess.done:
			if errors.Is(sess.why, errSuperseded) {
				send(msgRefuse, refusal{errSuperseded.Kind, errSuperseded.Public})
			}
			return
		case <-sess.wake:
			d := demand{Sealed: sess.pools[Sealed].ask(), Handoff: sess.pools[Handoff].ask(), Flows: sess.flows.ask()}
			if d != (demand{}) && !send(msgDemand, d) {
				return
			}
			if !toldDrain && s.isDraining() {
				toldDrain = true
				if !send(msgDrain, nil) {
					return
				}
			}
		case e := <-sess.events:
			if !send(msgEvent, e) {
				return
			}
		case now := <-tick.C:
			sess.pools[Sealed].tick(now)
			sess.pools[Handoff].tick(now)
			sess.flows.tick(now)
			sess.poke()
			if !send(msgPing, nil) {
				return
			}
		}
	}
}

// ServeData takes over an accepted connection whose ClientHello (in head)
// offers webgw.ALPNData. It returns once the connection is in its session's
// pool, or refused and closed.
func (s *Server) ServeData(ctx context.Context, c net.Conn, head []byte) {
	if err := s.serveData(ctx, c, head); err != nil {
		s.Log.Debug("data connection refused", "remote", c.RemoteAddr(), "err", err)
		c.Close()
	}
}

func (s *Server) serveData(ctx context.Context, c net.Conn, head []byte) error {
	if err := s.setup(); err != nil {
		return err
	}
	if !s.handshakes.enter(c) {
		s.metrics.refused("busy")
		return errBusy
	}
	defer s.handshakes.leave(c)
	c.SetDeadline(time.Now().Add(handshakeTimeout))
	w := newWire(c, head)
	conn := tls.Server(w, s.dataTLS)
	fail := func(reason string, err error) error {
		s.metrics.refused(reason)
		return err
	}
	if err := conn.HandshakeContext(ctx); err != nil {
		return fail("handshake", err)
	}
	var b [attachLen]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return fail("attach", err)
	}
	a, err := decodeAttach(b[:])
	if err != nil {
		return fail("attach", err)
	}
	s.mu.Lock()
	sess := s.sessions[a.node]
	s.mu.Unlock()
	if sess == nil || sess.epoch != a.epoch {
		return fail("attach", errors.New("no such session"))
	}
	cs := conn.ConnectionState()
	want, err := proof(&cs, sess.secret, a)
	if err != nil {
		return fail("attach", err)
	}
	if !hmac.Equal(want[:], a.proof[:]) {
		return fail("proof", errors.New("the proof does not match the session"))
	}
	d, err := newDataConn(a.kind, conn, w, sess.secret)
	if err != nil {
		return fail("attach", err)
	}
	c.SetDeadline(time.Time{})
	netx.TuneLong(c)
	if a.kind == Flows {
		return s.serveLink(sess, d)
	}
	if !sess.pools[a.kind].put(d, true) {
		return fail("surplus", errors.New("no data connection is wanted"))
	}
	return nil
}

// Open begins a stream to a node. It takes a ready data connection, or waits
// for one until ctx ends; the request itself leaves with the stream's first
// bytes. The error is a *webgw.Error.
func (s *Server) Open(ctx context.Context, node webgw.ID, r Request) (*Stream, error) {
	if err := s.setup(); err != nil {
		return nil, err
	}
	if r.Kind != Sealed && r.Kind != Handoff {
		return nil, &webgw.Error{Op: "open stream", Kind: webgw.Internal, Public: "no such kind of stream"}
	}
	start := time.Now()
	s.mu.Lock()
	sess := s.sessions[node]
	s.mu.Unlock()
	if sess == nil {
		s.metrics.opened(r.Kind, "no_session", start)
		return nil, errNoSession
	}
	if sess.drained.Load() {
		s.metrics.opened(r.Kind, "draining", start)
		return nil, &webgw.Error{Op: "open stream", Kind: webgw.Unavailable, Public: "the node is stopping and takes no new connections"}
	}
	d, err := sess.pools[r.Kind].take(ctx)
	if err != nil {
		s.metrics.opened(r.Kind, string(webgw.KindOf(err)), start)
		return nil, err
	}
	s.smu.Lock()
	if s.closed {
		s.smu.Unlock()
		d.raw.Close()
		return nil, errStopping
	}
	s.streams[d] = sess
	s.smu.Unlock()
	if sess.over() {
		s.watch() // the one that its end has begun may be over
	}
	s.metrics.opened(r.Kind, "ok", start)
	sess.streams.Add(1)
	return &Stream{d: d, server: s, session: sess, request: &r}, nil
}

// forget takes a stream off the books.
func (s *Server) forget(sess *session, d *dataConn) {
	s.smu.Lock()
	delete(s.streams, d)
	s.smu.Unlock()
	sess.streams.Add(-1)
}

// release takes back a stream's connection: into the pool if it is clean.
func (s *Server) release(sess *session, d *dataConn) {
	s.forget(sess, d)
	switch {
	case !d.reuse():
	case d.unread():
		d.reset() // the node has said something between two streams
	default:
		sess.pools[d.kind].put(d, false)
	}
}

// Close ends every session and cuts every stream. It returns when all
// goroutines of closed streams have ended; those in Join, Read or Write are
// woken with an error.
func (s *Server) Close() {
	if s.setup() != nil {
		return
	}
	s.mu.Lock()
	s.draining = true
	for _, sess := range s.sessions {
		sess.end(errStopping)
	}
	s.mu.Unlock()
	s.smu.Lock()
	if !s.closed {
		close(s.quit)
	}
	s.closed = true
	for d := range s.streams {
		d.reset()
	}
	s.smu.Unlock()
	s.lingers.Wait()
	s.naps.end()
}

// carrying are the connections that carry a stream.
func (s *Server) carrying() []*dataConn {
	s.smu.Lock()
	defer s.smu.Unlock()
	return slices.Collect(maps.Keys(s.streams))
}

// later runs f, which waits for the end of a closed stream or of a link, unless
// the server is closed.
func (s *Server) later(f func()) bool {
	s.smu.Lock()
	defer s.smu.Unlock()
	if !s.closed {
		s.lingers.Go(f)
	}
	return !s.closed
}

// Listens reports whether a node asked for events.
func (s *Server) Listens(node webgw.ID) bool {
	s.mu.Lock()
	sess := s.sessions[node]
	s.mu.Unlock()
	return sess != nil && sess.hello.Events
}

// Notify passes an event to a node that asked for events. It never waits: what
// the node is too slow for is dropped.
func (s *Server) Notify(node webgw.ID, event any) {
	s.mu.Lock()
	sess := s.sessions[node]
	s.mu.Unlock()
	if sess == nil || !sess.hello.Events {
		return
	}
	b, err := json.Marshal(event)
	if err != nil || len(b) > maxControl/2 {
		s.Log.Warn("event not sent", "node", node.String(), "err", err)
		return
	}
	select {
	case sess.events <- b:
	default:
		s.metrics.eventsDropped.Inc()
	}
}

// Sessions lists the live sessions.
func (s *Server) Sessions() []Session {
	s.mu.Lock()
	all := make([]*session, 0, len(s.sessions))
	for _, sess := range s.sessions {
		all = append(all, sess)
	}
	s.mu.Unlock()
	out := make([]Session, 0, len(all))
	for _, sess := range all {
		idle1, _ := sess.pools[Sealed].counts()
		idle2, _ := sess.pools[Handoff].counts()
		out = append(out, Session{Node: sess.node, Epoch: sess.epoch, Since: sess.since, Remote: sess.conn.RemoteAddr(),
			Software: sess.hello.Software, Draining: sess.drained.Load(), Streams: int(sess.streams.Load()), Idle: idle1 + idle2, Flows: sess.flows.len()})
	}
	return out
}

// Drain tells every node that no new streams will come, and refuses new
// sessions. Open streams carry on.
func (s *Server) Drain() {
	if s.setup() != nil {
		return
	}
	s.mu.Lock()
	s.draining = true
	all := make([]*session, 0, len(s.sessions))
	for _, sess := range s.sessions {
		all = append(all, sess)
	}
	s.mu.Unlock()
	for _, sess := range all {
		sess.poke()
	}
}

func (s *Server) isDraining() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.draining
}
