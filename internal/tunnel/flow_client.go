package tunnel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// Limits of the node's end of a flow.
const (
	// FlowIdle is how long a flow lasts without a datagram in either direction.
	FlowIdle = time.Minute

	earlyPackets = 32 // that come before the workload's socket is there
	earlyBytes   = 128 << 10
)

// nodeLink is one link at the node's end and the flows on it.
type nodeLink struct {
	a *attachment
	link
	running sync.WaitGroup // flows; added to by the reader only

	fmu   sync.Mutex
	flows map[uint32]*nodeFlow
}

// nodeFlow is one flow at the node's end.
type nodeFlow struct {
	l       *nodeLink
	id      uint32
	request Request
	began   time.Time
	stop    context.CancelFunc // gives up connecting
	last    atomic.Int64       // when a datagram passed, Unix nanoseconds
	in, out atomic.Int64       // bytes to and from the workload

	mu      sync.Mutex
	conn    net.Conn // nil: not connected yet
	packets netx.Packets
	early   [][]byte
	held    int // bytes in early
	over    bool
	err     error // that the socket gave a sender
}

// dialLink dials a link and serves the flows on it.
func (a *attachment) dialLink(ctx context.Context, serving *sync.WaitGroup) {
	c := a.c
	d, err := (*dataConn)(nil), errors.New("tunnel: too many connections for flows")
	if c.links.Add(1) <= 2*maxLinks { // those of a session that is ending may be there still
		d, err = a.dialData(ctx, Flows)
	}
	c.release(1) // a link carries no streams: Drain need not wait for it
	result := "ok"
	if err != nil {
		result = "failed"
	}
	c.Metrics.dials.WithLabelValues(Flows.String(), result).Inc()
	if err == nil {
		serving.Go(func() {
			defer c.links.Add(-1)
			a.serveFlows(a.run, d)
		})
		return
	}
	c.links.Add(-1)
	if ctx.Err() == nil {
		c.Log.Debug("data connection not opened", "gateway", c.Gateway.String(), "err", err)
		a.send(msgShort, demand{Flows: 1}) // an error has ended the session
	}
}

// serveFlows carries out what the gateway asks for on a link, until it ends.
func (a *attachment) serveFlows(ctx context.Context, d *dataConn) {
	defer a.forget(d)
	l := &nodeLink{a: a, link: newLink(), flows: map[uint32]*nodeFlow{}}
	l.attach(d)
	defer l.cut()
	if c := a.c; c.ConnectFlow == nil || !a.park(d) {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { l.write(d) })
	wg.Go(func() { l.expire(ctx) })
	err := l.read(d, func(t frameType, id uint32, p []byte) error { return l.receive(ctx, t, id, p) })
	a.c.Log.Debug("a connection for flows ended", "gateway", a.c.Gateway.String(), "err", err)
	cancel()
	l.cut()
	l.fmu.Lock()
	all := make([]*nodeFlow, 0, len(l.flows))
	for _, f := range l.flows {
		all = append(all, f)
	}
	l.fmu.Unlock()
	for _, f := range all {
		f.close()
	}
	l.running.Wait()
	wg.Wait()
}

// receive takes one frame of the gateway.
func (l *nodeLink) receive(ctx context.Context, t frameType, id uint32, p []byte) error {
	l.fmu.Lock()
	f := l.flows[id]
	l.fmu.Unlock()
	switch t {
	case frameOpen:
		if f != nil {
			return errors.New("tunnel: a flow is opened twice")
		}
		return l.open(ctx, id, p)
	case frameData:
		if f == nil {
			l.carry(frameEnd, id, nil) // the gateway has not heard that it is over
			return nil
		}
		l.a.c.Metrics.m.received.Inc()
		f.send(p)
	case frameEnd:
		if f != nil {
			f.close()
		}
	default:
		return fmt.Errorf("tunnel: frame type %d from a gateway", t)
	}
	return nil
}

func (l *nodeLink) open(ctx context.Context, id uint32, body []byte) error {
	f := &nodeFlow{l: l, id: id, began: time.Now()}
	if err := json.Unmarshal(body, &f.request); err != nil {
		return fmt.Errorf("tunnel: request: %w", err)
	}
	f.request.Kind = Flows
	if l.a.c.flows.Add(1) > maxFlows {
		l.a.c.flows.Add(-1)
		l.refuse(id, flowError(webgw.Exhausted, "the node carries too many flows"))
		return nil
	}
	f.last.Store(f.began.UnixNano())
	ctx, f.stop = context.WithCancel(ctx)
	l.fmu.Lock()
	l.flows[id] = f
	l.fmu.Unlock()
	l.a.c.Metrics.flows.Inc()
	l.running.Go(func() { f.run(ctx) })
	return nil
}

// refuse tells the gateway why there is no flow, or no longer.
func (l *nodeLink) refuse(id uint32, err error) {
	if body, e := json.Marshal(refusalOf(err)); e == nil {
		l.carry(frameRefuse, id, body)
	}
}

// run connects the flow to its workload and passes on what comes from there.
func (f *nodeFlow) run(ctx context.Context) {
	err := f.connect(ctx)
	connected := err == nil
	for err == nil {
		err = f.packets.Receive(func(p []byte, _ netip.AddrPort, _ netip.Addr) { f.reply(p) })
	}
	f.mu.Lock()
	mine := !f.over // nobody else has ended it
	f.over = true
	if f.err != nil {
		err = f.err
	}
	if f.conn != nil {
		f.conn.Close()
	}
	f.early = nil
	f.mu.Unlock()
	f.stop()
	l := f.l
	l.fmu.Lock()
	delete(l.flows, f.id)
	l.fmu.Unlock()
	l.a.c.flows.Add(-1)
	c := l.a.c
	c.Metrics.flows.Dec()
	if !mine {
		err = nil
	} else if connected {
		err = &webgw.Error{Op: "relay", Kind: webgw.Unavailable, Public: "the workload's socket failed", Err: err}
		if errors.Is(err, syscall.ECONNREFUSED) {
			err = &webgw.Error{Op: "relay", Kind: webgw.Unavailable, Public: "nothing listens at the workload's address", Err: err}
		}
	}
	if err != nil {
		l.refuse(f.id, err)
	}
	if connected && c.Ended != nil {
		c.Ended(Ended{f.request, f.in.Load(), f.out.Load(), time.Since(f.began), err})
	}
}

// connect asks the role for the workload's socket.
func (f *nodeFlow) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	c := f.l.a.c
	conn, err := c.ConnectFlow(ctx, c.Gateway, f.request)
	result := "ok"
	if err != nil {
		result = string(webgw.KindOf(err))
	}
	c.Metrics.m.opened(Flows, result, f.began)
	if err != nil {
		return err
	}
	packets, err := netx.NewPackets(conn)
	if err != nil {
		conn.Close()
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conn, f.packets = conn, packets
	if f.over {
		return net.ErrClosed
	}
	for _, p := range f.early {
		f.passLocked(p)
	}
	f.early = nil
	return nil
}

// send passes a datagram of the visitor to the workload.
func (f *nodeFlow) send(p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.over:
	case f.conn != nil:
		f.passLocked(p)
	case len(f.early) < earlyPackets && f.held+len(p) <= earlyBytes:
		f.early = append(f.early, append([]byte(nil), p...))
		f.held += len(p)
	default:
		f.l.a.c.Metrics.m.dropped.Inc()
	}
}

func (f *nodeFlow) passLocked(p []byte) {
	f.last.Store(time.Now().UnixNano())
	err := f.packets.Send(p, netip.AddrPort{}, netip.Addr{})
	switch {
	case err == nil:
		f.in.Add(int64(len(p)))
	case errors.Is(err, syscall.ECONNREFUSED):
		// An answer to an earlier datagram; the receiver doesn't get it any more.
		f.err = err
		f.conn.Close()
	default:
		f.l.a.c.Metrics.m.dropped.Inc()
	}
}

// reply passes a datagram of the workload to the gateway.
func (f *nodeFlow) reply(p []byte) {
	f.last.Store(time.Now().UnixNano())
	m := f.l.a.c.Metrics.m
	if len(p) > MaxDatagram || !f.l.carry(frameData, f.id, p) {
		m.dropped.Inc()
		return
	}
	m.sent.Inc()
	f.out.Add(int64(len(p)))
}

// close ends the flow without telling the gateway.
func (f *nodeFlow) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.over = true
	f.stop()
	if f.conn != nil {
		f.conn.Close()
	}
}

// expire ends flows that have been silent for too long.
func (l *nodeLink) expire(ctx context.Context) {
	idle := l.a.c.FlowIdle
	if idle == 0 {
		idle = FlowIdle
	}
	tick := time.NewTicker(idle / 4)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			var silent []*nodeFlow
			l.fmu.Lock()
			for _, f := range l.flows {
				if now.Sub(time.Unix(0, f.last.Load())) >= idle {
					silent = append(silent, f)
				}
			}
			l.fmu.Unlock()
			for _, f := range silent {
				f.close()
				l.carry(frameEnd, f.id, nil)
			}
		}
	}
}
