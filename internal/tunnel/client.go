package tunnel

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/netx"
)

// Timing and limits of the node's end.
const (
	dialTimeout    = 5 * time.Second
	backoffMin     = 200 * time.Millisecond
	backoffMax     = 10 * time.Second
	supersededWait = 30 * time.Second // two processes of one identity must not fight
	settled        = 10 * time.Second // a session that lasted this long starts the backoff anew
	connectTimeout = 10 * time.Second
	maxDialing     = 64   // data connections being dialed at once
	maxConns       = 8192 // data connections with one gateway, of all sessions together
	discardBytes   = 256 << 10
	discardTime    = 10 * time.Second
)

// Client is the node's end of its session with one gateway: it keeps it up
// until its context ends.
type Client struct {
	Key         ident.Key
	Gateway     webgw.ID        // the only identity it will talk to
	Addresses   func() []string // host:port, best first; asked before each attempt
	Net         netx.Net
	Connect     Connect
	ConnectFlow Connect               // judges a request for a flow and returns a connected UDP socket; nil: no flows
	FlowIdle    time.Duration         // how long a flow lasts without a datagram; 0: FlowIdle
	Event       func(json.RawMessage) // what the gateway tells the node's owner; nil: not asked for
	Changed     func(State)           // told of each change, in order; may be nil
	Ended       func(Ended)           // told of each stream that was connected, at its end; may be nil
	Software    string                // shown to the gateway's farmer
	Log         *slog.Logger
	Metrics     *ClientMetrics // shared by a node's clients; nil: not counted

	draining atomic.Bool
	links    atomic.Int64 // data connections for flows, open or being dialed
	flows    atomic.Int64
	count    atomic.Int64  // other data connections that are open or being dialed
	freed    chan struct{} // capacity 1: count has sunk

	mu       sync.Mutex
	current  *attachment
	conns    map[*dataConn]*attachment // every data connection, of this session and earlier ones
	watching bool                      // over the streams of sessions that have ended

	naps naps
}

// Connect judges a request that gateway makes and dials the workload. Its error,
// a *webgw.Error by preference, is told to the gateway. The returned connection
// belongs to the tunnel.
type Connect func(ctx context.Context, gateway webgw.ID, r Request) (net.Conn, error)

// Ended tells what a stream carried.
type Ended struct {
	Request Request
	In, Out int64 // bytes to and from the workload
	Took    time.Duration
	Err     error // what cut it; nil: both directions ended in order
}

// State of a session, as the node sees it.
type State struct {
	Up       bool
	Epoch    uint64
	Since    time.Time
	Address  string // where the gateway was reached
	Draining bool   // the gateway takes no new visitors
	Err      error  // why it is not up
}

// ClientMetrics counts what the clients of one node do.
type ClientMetrics struct {
	m       *metrics
	streams prometheus.Gauge
	flows   prometheus.Gauge
	dials   *prometheus.CounterVec
}

// NewClientMetrics makes and registers (unless r is nil) the metrics of the
// node's end.
func NewClientMetrics(r prometheus.Registerer) *ClientMetrics {
	c := &ClientMetrics{
		m:       newMetrics(r, "node", func() []gauge { return nil }),
		streams: prometheus.NewGauge(prometheus.GaugeOpts{Name: "webgw_tunnel_node_streams", Help: "Open streams."}),
		flows:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "webgw_tunnel_node_flows", Help: "Open flows."}),
		dials:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "webgw_tunnel_dials_total", Help: "Data connections dialed, by kind and result."}, []string{"kind", "result"}),
	}
	if r != nil {
		r.MustRegister(c.streams, c.flows, c.dials)
	}
	return c
}

// attachment is one session while it lasts.
type attachment struct {
	c       *Client
	addr    string
	control *tls.Conn
	epoch   uint64
	secret  []byte
	dataTLS *tls.Config
	dialing chan struct{}
	run     context.Context // Run's: data connections outlive the session

	wmu sync.Mutex // writes on control

	over bool // under c.mu
}

// Run keeps the session up, with jittered backoff between attempts, until ctx
// ends; then it closes what is idle and cuts what is still open. Use Drain
// first to let streams finish.
func (c *Client) Run(ctx context.Context) error {
	if c.Metrics == nil {
		c.Metrics = NewClientMetrics(nil)
	}
	c.mu.Lock()
	c.conns, c.freed = map[*dataConn]*attachment{}, make(chan struct{}, 1)
	c.mu.Unlock()
	var serving sync.WaitGroup // data connections; added to only by attach, below
	control, err := c.Key.ClientTLS(c.Gateway, webgw.ALPNTunnel)
	if err != nil {
		return err
	}
	data, err := ident.Key{}.ClientTLS(c.Gateway, webgw.ALPNData)
	if err != nil {
		return err
	}
	data.DynamicRecordSizingDisabled = true
	log := c.Log.With("gateway", c.Gateway.String())
	pause := backoffMin
	for {
		began := time.Now()
		err := c.attach(ctx, control, data, log, &serving)
		if ctx.Err() != nil {
			break
		}
		c.changed(State{Err: err})
		if time.Since(began) > settled {
			pause = backoffMin
		}
		wait := pause/2 + rand.N(pause)
		if webgw.KindOf(err) == webgw.Taken {
			wait = supersededWait + rand.N(supersededWait)
		}
		pause = min(pause*2, backoffMax)
		log.Info("session down", "err", err, "retry", wait.Round(time.Millisecond))
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() != nil {
			break
		}
	}
	c.mu.Lock()
	for d := range c.conns {
		d.reset()
	}
	c.mu.Unlock()
	serving.Wait()
	c.naps.end()
	return ctx.Err()
}

// Drain tells the gateway that no new streams are taken and waits until the
// open ones have ended or ctx ends. The gateway lets go of its idle data
// connections then: as long as one is there a stream may be under way on it.
func (c *Client) Drain(ctx context.Context) error {
	c.draining.Store(true)
	c.mu.Lock()
	a := c.current
	c.mu.Unlock()
	if a != nil {
		a.send(msgDrain, nil) // an error ends the session, which drains as well
	}
	for c.count.Load() > 0 {
		select {
		case <-c.freed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// carrying are all connections; those without a stream don't nap.
func (c *Client) carrying() []*dataConn {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Keys(c.conns))
}

func (c *Client) changed(s State) {
	if c.Changed != nil {
		c.Changed(s)
	}
}

// dial connects to the first address that answers.
func (c *Client) dial(ctx context.Context, addrs []string) (net.Conn, string, error) {
	if len(addrs) == 0 {
		return nil, "", errors.New("no address of the gateway is known")
	}
	var errs []error
	for _, addr := range addrs {
		one, cancel := context.WithTimeout(ctx, dialTimeout)
		conn, err := c.Net.Dial(one, "tcp", addr, nil)
		cancel()
		if err == nil {
			return conn, addr, nil
		}
		errs = append(errs, err)
	}
	return nil, "", errors.Join(errs...)
}

// attach dials, greets and serves one session until it ends.
func (c *Client) attach(ctx context.Context, controlTLS, dataTLS *tls.Config, log *slog.Logger, serving *sync.WaitGroup) error {
	raw, addr, err := c.dial(ctx, c.Addresses())
	if err != nil {
		return err
	}
	defer raw.Close()
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()

	raw.SetDeadline(time.Now().Add(handshakeTimeout))
	conn := tls.Client(raw, controlTLS)
	if err := conn.HandshakeContext(ctx); err != nil {
		return err
	}
	if p := conn.ConnectionState().NegotiatedProtocol; p != webgw.ALPNTunnel {
		return fmt.Errorf("tunnel: %s is no gateway (ALPN %q)", addr, p)
	}
	if err := writeMessage(conn, msgHello, hello{webgw.MinProtocol, webgw.Protocol, c.Software, c.Event != nil, c.ConnectFlow != nil}); err != nil {
		return err
	}
	t, body, err := readMessage(conn, maxControl)
	if err != nil {
		return err
	}
	var w welcome
	switch t {
	case msgRefuse:
		return parseRefusal(body)
	case msgWelcome:
		if err := json.Unmarshal(body, &w); err != nil {
			return fmt.Errorf("tunnel: welcome: %w", err)
		}
	default:
		return fmt.Errorf("tunnel: message type %d instead of welcome", t)
	}
	if w.Version != webgw.Protocol || len(w.Secret) < 16 {
		return fmt.Errorf("tunnel: welcome of version %d with a secret of %d bytes", w.Version, len(w.Secret))
	}
	raw.SetDeadline(time.Time{})
	netx.TuneLong(raw)

	a := &attachment{c: c, addr: addr, control: conn, epoch: w.Epoch, secret: w.Secret, dataTLS: dataTLS,
		dialing: make(chan struct{}, maxDialing), run: ctx}
	c.mu.Lock()
	c.current = a
	c.mu.Unlock()
	c.Metrics.m.reconnects.Inc()
	log.Info("session up", "session", a.epoch, "address", addr)
	state := State{Up: true, Epoch: a.epoch, Since: time.Now(), Address: addr}
	c.changed(state)

	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { a.ping(ctx) })
	err = a.read(ctx, &wg, serving, state)
	cancel()
	raw.Close()
	c.mu.Lock()
	c.current = nil
	c.mu.Unlock()
	if a.finish() {
		serving.Go(func() { watch(a.run.Done(), c.orphans) })
	}
	wg.Wait()
	return err
}

func parseRefusal(body []byte) error {
	var r refusal
	if err := json.Unmarshal(body, &r); err != nil {
		return fmt.Errorf("tunnel: refusal: %w", err)
	}
	return r.err("session")
}

func (a *attachment) send(t messageType, body any) error {
	a.wmu.Lock()
	defer a.wmu.Unlock()
	a.control.SetWriteDeadline(time.Now().Add(silence))
	err := writeMessage(a.control, t, body)
	if err != nil {
		a.control.NetConn().Close()
	}
	return err
}

func (a *attachment) ping(ctx context.Context) {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	if a.c.draining.Load() && a.send(msgDrain, nil) != nil {
		return
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if a.send(msgPing, nil) != nil {
				return
			}
		}
	}
}

// read serves the gateway's messages until the session is lost.
func (a *attachment) read(ctx context.Context, wg, serving *sync.WaitGroup, state State) error {
	for {
		a.control.SetReadDeadline(time.Now().Add(silence))
		t, body, err := readMessage(a.control, maxControl)
		if err != nil {
			if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
				err = fmt.Errorf("nothing heard from the gateway for %v", silence)
			}
			return err
		}
		switch t {
		case msgRefuse:
			return parseRefusal(body)
		case msgDemand:
			var d demand
			if err := json.Unmarshal(body, &d); err != nil {
				return fmt.Errorf("tunnel: demand: %w", err)
			}
			short := demand{Sealed: a.reserve(&d.Sealed, maxConns), Handoff: a.reserve(&d.Handoff, maxConns), Flows: a.reserve(&d.Flows, maxLinks)}
			for range d.Sealed {
				wg.Go(func() { a.data(ctx, Sealed, serving) })
			}
			for range d.Handoff {
				wg.Go(func() { a.data(ctx, Handoff, serving) })
			}
			for range d.Flows {
				wg.Go(func() { a.dialLink(ctx, serving) })
			}
			if short != (demand{}) {
				a.send(msgShort, short) // an error has ended the session
			}
		case msgDrain:
			if !state.Draining {
				state.Draining = true
				a.c.changed(state)
			}
		case msgEvent:
			if a.c.Event != nil {
				a.c.Event(body)
			}
		}
	}
}

// reserve lowers n to the connections that may be dialed (most at once), counts
// them, and returns how many it leaves out.
func (a *attachment) reserve(n *int, most int) (short int) {
	asked := max(0, *n)
	some := min(asked, most)
	over := max(0, min(a.c.count.Add(int64(some))-maxConns, int64(some)))
	a.c.release(int(over))
	*n = some - int(over)
	return asked - *n
}

// data dials one data connection and serves streams on it, one after another.
func (a *attachment) data(ctx context.Context, kind Kind, serving *sync.WaitGroup) {
	d, err := a.dialData(ctx, kind)
	if err != nil {
		a.c.Metrics.dials.WithLabelValues(kind.String(), "failed").Inc()
		if ctx.Err() == nil {
			a.c.Log.Debug("data connection not opened", "gateway", a.c.Gateway.String(), "err", err)
			short := demand{Sealed: 1}
			if kind == Handoff {
				short = demand{Handoff: 1}
			}
			a.send(msgShort, short) // an error has ended the session
		}
		a.c.release(1)
		return
	}
	a.c.Metrics.dials.WithLabelValues(kind.String(), "ok").Inc()
	// The rest outlives the session: what is open when it ends carries on.
	d.left = func() {
		a.c.release(1)
		serving.Done()
	}
	serving.Add(1)
	go a.serve(d)
}

func (a *attachment) dialData(ctx context.Context, kind Kind) (*dataConn, error) {
	select {
	case a.dialing <- struct{}{}:
		defer func() { <-a.dialing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	raw, _, err := a.c.dial(ctx, []string{a.addr})
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*dataConn, error) { raw.Close(); return nil, err }
	raw.SetDeadline(time.Now().Add(handshakeTimeout))
	w := newWire(raw, nil)
	config := a.dataTLS
	if kind == Handoff {
		config = config.Clone()
		config.CurvePreferences = []tls.CurveID{tls.X25519} // its secrets don't hang on it alone: see newDataConn
	}
	conn := tls.Client(w, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return fail(err)
	}
	at := attach{version: webgw.Protocol, kind: kind, epoch: a.epoch, node: a.c.Key.ID()}
	cs := conn.ConnectionState()
	if at.proof, err = proof(&cs, a.secret, at); err != nil {
		return fail(err)
	}
	if _, err := conn.Write(at.encode()); err != nil {
		return fail(err)
	}
	raw.SetDeadline(time.Time{})
	netx.TuneLong(raw)
	if kind == Flows {
		netx.TuneFlows(raw)
	}
	d, err := newDataConn(kind, conn, w, a.secret)
	if err != nil {
		return fail(err)
	}
	return d, nil
}

// park keeps d for a request; false if the session is over and it should close.
func (a *attachment) park(d *dataConn) bool {
	a.c.mu.Lock()
	a.c.conns[d] = a
	over := a.over
	a.c.mu.Unlock()
	return !over
}

func (a *attachment) forget(d *dataConn) {
	a.c.mu.Lock()
	delete(a.c.conns, d)
	a.c.mu.Unlock()
}

// release counts n data connections as gone.
func (c *Client) release(n int) {
	c.count.Add(-int64(n))
	select {
	case c.freed <- struct{}{}:
	default:
	}
}

// finish lets go of the session's connections: those that carry a stream end
// with it, idle ones when the gateway closes them, because a request may be
// under way on them. It reports whether a watch over all these must begin.
func (a *attachment) finish() (watch bool) {
	a.c.mu.Lock()
	defer a.c.mu.Unlock()
	a.over = true
	watch = !a.c.watching
	a.c.watching = true
	return watch
}

// serve waits for requests on d and carries them out, until d ends or a stream
// naps: who ends that stream goes on.
func (a *attachment) serve(d *dataConn) {
	for a.park(d) {
		r, err := d.awaitRequest()
		if err != nil {
			break // the gateway let it go, or broke the protocol: either way it is over
		}
		t := &task{a: a, request: r}
		if !t.begin(d) {
			return
		}
		if !t.conclude() {
			break
		}
	}
	a.part(d)
}

// part ends d.
func (a *attachment) part(d *dataConn) {
	a.forget(d)
	d.raw.Close()
	d.left()
}

// awaitRequest waits for the next request. A request lies on the heap: the
// stacks of goroutines that wait, here and in stream, are most of what an idle
// connection costs.
func (d *dataConn) awaitRequest() (*Request, error) {
	t, n, _, err := d.header(true)
	if err != nil {
		return nil, err
	}
	if t != frameOpen {
		return nil, fmt.Errorf("tunnel: frame type %d instead of a request", t)
	}
	p, err := d.body(n)
	if err != nil {
		return nil, err
	}
	r := &Request{Kind: d.kind}
	if p, err = d.unseal(t, toNode, p); err == nil {
		err = parseRequest(p, r)
	}
	d.giveBack()
	return r, err
}

// task is one request that is carried out.
type task struct {
	relay
	a       *attachment
	request *Request
	began   time.Time // zero: nothing was connected
	errs    [2]error  // of the relay's directions
	err     error
}

// begin connects to the workload and joins it with the stream. It reports
// whether all is over when it returns; otherwise ended will be called.
func (t *task) begin(d *dataConn) (ended bool) {
	a := t.a
	a.c.Metrics.streams.Inc()
	t.relay = relay{d: d, owner: t}
	if t.far, t.err = a.connect(a.run, t.request); t.err != nil {
		t.err = d.refuse(t.err)
		return true
	}
	t.began = time.Now()
	if t.err = d.accept(t.request.Prompt); t.err != nil {
		return true
	}
	t.lot = a.c.naps.begin(d.raw, a.c.carrying)
	t.start()
	go t.resume(in)
	return t.run(out)
}

// wayEnded cuts both sides if a direction has failed.
func (t *task) wayEnded(i int, err error) {
	if t.errs[i] = err; err != nil {
		netx.Reset(t.far)
		t.d.reset()
	}
}

// ended goes on after a stream that has napped.
func (t *task) ended() {
	if t.conclude() {
		t.a.serve(t.d)
	} else {
		t.a.part(t.d)
	}
}

// conclude ends the task and reports whether its connection can have another.
func (t *task) conclude() (again bool) {
	a, d := t.a, t.d
	if !t.began.IsZero() {
		t.far.Close() // an error means that it was reset
		t.err = errors.Join(t.err, t.errs[out], t.errs[in])
		if a.c.Ended != nil {
			a.c.Ended(Ended{*t.request, d.bytesIn.Load(), d.bytesOut.Load(), time.Since(t.began), t.err})
		}
	}
	a.c.Metrics.streams.Dec()
	if t.err != nil {
		d.reset()
		return false
	}
	return d.reuse()
}

// connect asks the role for the workload.
func (a *attachment) connect(ctx context.Context, r *Request) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	workload, err := a.c.Connect(ctx, a.c.Gateway, *r)
	result := "ok"
	if err != nil {
		result = string(webgw.KindOf(err))
	}
	a.c.Metrics.m.opened(r.Kind, result, time.Now())
	return workload, err
}

// accept tells of the connection: at once, or with the first bytes.
func (d *dataConn) accept(prompt bool) error {
	f := make([]byte, headerLen)
	putHeader(f, frameAccept, 0)
	if prompt {
		return d.write(f)
	}
	d.due = f
	return nil
}

// refuse answers a request with err, and skips what the gateway has sent for
// the stream meanwhile.
func (d *dataConn) refuse(err error) error {
	f, err := d.refusingFrame(refusalOf(err))
	if err != nil {
		return err
	}
	d.sent = true
	if err := d.write(f); err != nil {
		return err
	}
	d.raw.SetReadDeadline(time.Now().Add(discardTime))
	for n := 0; n < discardBytes; {
		p, err := d.payload(true)
		if d.ended {
			return d.raw.SetReadDeadline(time.Time{})
		}
		if err != nil {
			return err
		}
		n += len(p)
	}
	return errors.New("tunnel: the gateway kept sending after a refusal")
}
