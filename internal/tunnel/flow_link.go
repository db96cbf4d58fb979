package tunnel

import (
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"webgw.dev/webgw/internal/netx"
)

// Flows carry datagrams. Those of one session share a few data connections,
// links, on which each frame names its flow; a datagram that a link has no room
// for is dropped, as UDP drops it, so that no flow waits for another.

// MaxDatagram is the payload of the largest datagram that a flow carries, bytes:
// what UDP carries over IPv4.
const MaxDatagram = 65507

const (
	flowHeaderLen = 6
	maxFlowID     = 1<<24 - 1
	maxFlows      = 16384 // of one session
	maxLinks      = 4     // of one session

	// What waits on a link while the connection is busy. It is as much as a UDP
	// socket of Linux holds by default: more would only make datagrams late.
	linkQueue   = 256 << 10
	linkReserve = 32 << 10 // of it, for frames that begin and end flows
	linkShares  = 64       // flows that the queue tells apart, by their number

	// A link whose connection takes nothing for so long is lost.
	linkStall = 10 * time.Second
)

func putFlowHeader(h []byte, t frameType, flow uint32, n int) {
	binary.BigEndian.PutUint32(h, uint32(t)<<24|flow)
	binary.BigEndian.PutUint16(h[4:], uint16(n))
}

// parseFlowHeader reads the header of a frame on a link and refuses lengths that
// the type doesn't allow.
func parseFlowHeader(h []byte) (t frameType, flow uint32, n int, err error) {
	v := binary.BigEndian.Uint32(h)
	t, flow, n = frameType(v>>24), v&0xffffff, int(binary.BigEndian.Uint16(h[4:]))
	ok := false
	switch t {
	case frameData:
		ok = n <= MaxDatagram
	case frameOpen, frameRefuse:
		ok = n > 0 && n <= maxRequest
	case frameEnd:
		ok = n == 0
	}
	if !ok {
		err = fmt.Errorf("tunnel: frame of type %d and %d bytes for a flow", t, n)
	}
	return t, flow, n, err
}

// carrier takes the frames of flows to the other end. A link is the only kind of
// it today; QUIC datagrams (RFC 9221) fit beneath the same two methods.
type carrier interface {
	// carry takes a frame, or drops it and returns false. It never waits, and
	// keeps nothing of p. Frames of one flow that are taken arrive in order, or
	// none after some point.
	carry(t frameType, flow uint32, p []byte) bool

	// cut ends the carrier, and with it its flows.
	cut()
}

// link is a data connection of kind Flows, or the wait for it: frames are taken
// from the beginning.
type link struct {
	wake chan struct{} // capacity 1: there is something in the queue
	done chan struct{} // closed when it is cut

	mu    sync.Mutex
	d     *dataConn    // nil: not here yet
	queue *netx.Buffer // frames that the connection has not taken; nil: none
	over  bool
	share [linkShares]int // bytes of datagrams in the queue, by flow
}

var _ carrier = (*link)(nil)

func newLink() link { return link{wake: make(chan struct{}, 1), done: make(chan struct{})} }

// carry implements carrier.
func (l *link) carry(t frameType, flow uint32, p []byte) (carried bool) {
	need, limit := flowHeaderLen+len(p), linkQueue
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.queue
	if t == frameData {
		// A flow may use as much as it leaves free: a flood gets half of the queue, two
		// get a third each, and there is always room for those who send little.
		limit -= linkReserve
		share := &l.share[flow%linkShares]
		if q != nil && *share > 0 && *share+need > limit-len(q.Bytes()) {
			return false
		}
		defer func() {
			if carried {
				*share += need
			}
		}()
	}
	switch {
	case l.over:
		return false
	case q == nil:
		q = netx.Borrow(need)
		l.queue = q
		select {
		case l.wake <- struct{}{}:
		default:
		}
	case len(q.Bytes())+need > limit:
		return false
	case len(q.Free()) < need:
		q = netx.Borrow(len(l.queue.Bytes()) + need)
		q.Grow(copy(q.Free(), l.queue.Bytes()))
		l.queue.Return()
		l.queue = q
	}
	putFlowHeader(q.Free(), t, flow, len(p))
	copy(q.Free()[flowHeaderLen:], p)
	q.Grow(need)
	return true
}

// cut implements carrier.
func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return
	}
	l.over = true
	close(l.done)
	if l.queue != nil {
		l.queue.Return()
		l.queue = nil
	}
	if l.d != nil {
		l.d.raw.Close()
	}
}

// attach gives the link its connection; false if it was cut.
func (l *link) attach(d *dataConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.d = d
	return !l.over
}

func (l *link) take() *netx.Buffer {
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.queue
	l.queue = nil
	l.share = [linkShares]int{}
	return q
}

// write sends what is carried until the link is cut. A lone datagram leaves at
// once; those that come while the connection is busy leave together.
func (l *link) write(d *dataConn) {
	for {
		select {
		case <-l.wake:
		case <-l.done:
			return
		}
		for q := l.take(); q != nil; q = l.take() {
			d.raw.SetWriteDeadline(time.Now().Add(linkStall))
			err := d.write(q.Bytes())
			q.Return()
			if err != nil {
				l.cut()
				return
			}
		}
	}
}

// read hands each frame to f until the connection or f fails. p is valid until
// f returns.
func (l *link) read(d *dataConn, f func(t frameType, flow uint32, p []byte) error) error {
	for {
		if err := d.need(flowHeaderLen); err != nil {
			if d.in != nil && len(d.in.Bytes()) > 0 {
				err = unexpected(err)
			}
			return err
		}
		t, flow, n, err := parseFlowHeader(d.in.Bytes())
		if err != nil {
			return err
		}
		if err := d.need(flowHeaderLen + n); err != nil {
			return unexpected(err)
		}
		p := d.in.Bytes()[flowHeaderLen : flowHeaderLen+n]
		d.in.Consume(flowHeaderLen + n)
		if err := f(t, flow, p); err != nil {
			return err
		}
	}
}

// need waits until n bytes have been received.
func (d *dataConn) need(n int) error {
	for d.in == nil || len(d.in.Bytes()) < n {
		if err := d.fill(); err != nil {
			return err
		}
	}
	return nil
}
