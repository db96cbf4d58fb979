package memnet

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// bufferSize is how many bytes one direction of a connection holds, in flight
// and unread together, before its writer waits.
const bufferSize = 256 << 10

// wire is one connection: two ends, and one lock over both directions.
type wire struct {
	w    *World
	link *link
	rand *rand.Rand

	mu   sync.Mutex
	cut  bool
	ends [2]*Conn
}

// newWireLocked makes the two ends of a connection; World.mu is held.
func (w *World) newWireLocked(l *link) (near, far *Conn) {
	w.wires++
	wr := &wire{w: w, link: l, cut: l.cut, rand: rand.New(rand.NewPCG(w.seed, w.wires))}
	near, far = &Conn{wire: wr}, &Conn{wire: wr}
	near.peer, far.peer = far, near
	near.heard = time.Now()
	far.heard = near.heard
	near.moved.L, far.moved.L = &wr.mu, &wr.mu
	wr.ends = [2]*Conn{near, far}
	l.wires[wr] = struct{}{}
	return near, far
}

// Conn is one end of a connection: a net.Conn with half-close that behaves as
// a *net.TCPConn does on Linux, without being one.
//
// Close with unread data, or after SetLinger(0), resets the connection, as
// does writing to an end that has closed.
type Conn struct {
	wire          *wire
	peer          *Conn
	host          *Host
	local, remote net.Addr

	// Under wire.mu.
	moved       sync.Cond    // anything below, or what of it concerns the peer, has changed
	ready       bytes.Buffer // arrived, not read
	eof         bool         // the peer's end of data has arrived
	reset       bool         // a reset has arrived, or was made here
	closed      bool         // by this end
	ended       bool         // this end has sent its end of data or a reset
	linger0     bool
	writing     bool // a Write is at work; others wait, so that writes never mix
	flight      []parcel
	inFlight    int         // bytes in flight
	heard       time.Time   // when anything last came from the peer, or something sent arrived there
	arrival     *time.Timer // for flight[0]; nil: none is armed
	readBefore  deadline
	writeBefore deadline
}

var (
	_ net.Conn                          = (*Conn)(nil)
	_ interface{ CloseWrite() error }   = (*Conn)(nil)
	_ interface{ SetLinger(int) error } = (*Conn)(nil)
)

// parcel is what this end has sent and the other has not yet received.
type parcel struct {
	at   time.Time // when it arrives
	what parcelKind
	data []byte
}

type parcelKind int

const (
	data parcelKind = iota
	fin
	rst
)

// maxParcel bounds how much data of one instant travels as one piece.
const maxParcel = 32 << 10

// sendLocked puts a parcel on its way.
func (c *Conn) sendLocked(what parcelKind, p []byte) {
	wr := c.wire
	delay := wr.link.props.Load().delay(wr.rand)
	if delay == 0 && len(c.flight) == 0 && !wr.cut {
		c.peer.receiveLocked(what, p)
		return
	}
	at := time.Now().Add(delay)
	c.inFlight += len(p)
	if n := len(c.flight); n > 0 {
		last := &c.flight[n-1]
		if last.at.After(at) { // order is kept
			at = last.at
		}
		if what == data && last.what == data && last.at.Equal(at) && len(last.data)+len(p) <= maxParcel {
			last.data = append(last.data, p...)
			return
		}
	}
	c.flight = append(c.flight, parcel{at, what, bytes.Clone(p)})
	c.armLocked()
}

// armLocked sees to it that the first parcel in flight arrives in time. On a
// cut link nothing does.
func (c *Conn) armLocked() {
	if len(c.flight) == 0 || c.wire.cut || c.arrival != nil {
		return
	}
	c.arrival = time.AfterFunc(time.Until(c.flight[0].at), c.arrive)
}

func (c *Conn) arrive() {
	c.wire.mu.Lock()
	defer c.wire.mu.Unlock()
	c.arrival = nil
	now := time.Now()
	for len(c.flight) > 0 && !c.wire.cut && !c.flight[0].at.After(now) {
		p := c.flight[0]
		c.flight[0] = parcel{}
		c.flight = c.flight[1:]
		c.inFlight -= len(p.data)
		c.peer.receiveLocked(p.what, p.data)
	}
	if len(c.flight) == 0 {
		c.flight = nil
	}
	c.armLocked()
}

// receiveLocked takes what has arrived from the peer.
func (c *Conn) receiveLocked(what parcelKind, p []byte) {
	c.heard = time.Now()
	c.peer.heard = c.heard
	switch {
	case c.reset:
	case what == rst:
		c.resetLocked()
	case c.closed && what == data:
		// Nobody will read it: TCP answers with a reset (RFC 9293 section 3.6).
		c.sendLocked(rst, nil)
	case c.closed:
	case what == fin:
		c.eof = true
	default:
		c.ready.Write(p)
	}
	c.moved.Broadcast()
	c.peer.moved.Broadcast()
}

// resetLocked ends this end. What has arrived stays readable, as on Linux.
func (c *Conn) resetLocked() {
	c.reset = true
	c.ended = true
	c.flight, c.inFlight = nil, 0
	if c.arrival != nil {
		c.arrival.Stop()
		c.arrival = nil
	}
	c.moved.Broadcast()
}

// Probe asks the peer whether it is still there, as TCP's keep-alive does.
func (c *Conn) Probe() {
	c.wire.mu.Lock()
	defer c.wire.mu.Unlock()
	if !c.closed && !c.reset && len(c.flight) == 0 {
		c.sendLocked(data, nil)
	}
}

// Unheard is how long nothing has come from the peer while what was sent, or a
// probe, has been overdue for a second at least; 0: nothing is waited for.
func (c *Conn) Unheard() time.Duration {
	c.wire.mu.Lock()
	defer c.wire.mu.Unlock()
	if c.closed || c.reset || len(c.flight) == 0 || time.Since(c.flight[0].at) < time.Second {
		return 0
	}
	return time.Since(c.heard)
}

// Alive reports for netx.Alive that the peer has neither ended the connection
// nor sent anything that was not read.
func (c *Conn) Alive() bool {
	c.wire.mu.Lock()
	defer c.wire.mu.Unlock()
	return !c.closed && !c.reset && !c.eof && c.ready.Len() == 0
}

func (wr *wire) setCut(cut bool) {
	wr.mu.Lock()
	defer wr.mu.Unlock()
	wr.cut = cut
	for _, c := range wr.ends {
		if c.arrival != nil {
			c.arrival.Stop()
			c.arrival = nil
		}
		if cut {
			continue
		}
		at := time.Now().Add(wr.link.props.Load().Latency)
		for i := range c.flight {
			c.flight[i].at = at
		}
		c.armLocked()
	}
}

// reset resets both ends.
func (wr *wire) reset() {
	wr.mu.Lock()
	defer wr.mu.Unlock()
	for _, c := range wr.ends {
		c.resetLocked()
	}
}

// kill resets the ends on h; the others learn it over the link.
func (wr *wire) kill(h *Host) {
	wr.mu.Lock()
	defer wr.mu.Unlock()
	for _, c := range wr.ends {
		if c.host == h && !c.reset {
			c.resetLocked()
			c.sendLocked(rst, nil)
		}
	}
}

func (wr *wire) open() []string {
	wr.mu.Lock()
	defer wr.mu.Unlock()
	var out []string
	for _, c := range wr.ends {
		if !c.closed {
			out = append(out, fmt.Sprintf("%s holds %s %s>%s", c.host.name, c.local.Network(), c.local, c.remote))
		}
	}
	return out
}

func (c *Conn) fail(op string, err error) error {
	if errno, ok := err.(syscall.Errno); ok {
		err = os.NewSyscallError(op, errno)
	}
	return &net.OpError{Op: op, Net: c.local.Network(), Source: c.local, Addr: c.remote, Err: err}
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	c.wire.mu.Lock()
	defer c.wire.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.fail("read", net.ErrClosed)
		case len(p) == 0:
			return 0, nil
		case c.readBefore.passed:
			return 0, c.fail("read", os.ErrDeadlineExceeded)
		case c.ready.Len() > 0:
			n, _ := c.ready.Read(p) // fails on empty buffers only
			if c.ready.Len() == 0 && c.ready.Cap() > maxParcel {
				c.ready = bytes.Buffer{} // idle connections hold no memory
			}
			c.peer.moved.Broadcast()
			return n, nil
		case c.eof:
			return 0, io.EOF
		case c.reset:
			return 0, c.fail("read", syscall.ECONNRESET)
		}
		c.moved.Wait()
	}
}

// Write implements net.Conn. It returns once everything is buffered.
func (c *Conn) Write(p []byte) (int, error) {
	c.wire.mu.Lock()
	defer c.wire.mu.Unlock()
	n, mine := 0, false
	defer func() {
		if mine {
			c.writing = false
			c.moved.Broadcast()
		}
	}()
	for {
		switch {
		case c.closed:
			return n, c.fail("write", net.ErrClosed)
		case c.writeBefore.passed:
			return n, c.fail("write", os.ErrDeadlineExceeded)
		case c.reset && !c.eof:
			return n, c.fail("write", syscall.ECONNRESET)
		case c.ended:
			return n, c.fail("write", syscall.EPIPE)
		case n == len(p):
			return n, nil
		case c.writing && !mine:
			c.moved.Wait()
			continue
		}
		mine, c.writing = true, true
		if space := bufferSize - c.inFlight - c.peer.ready.Len(); space > 0 {
			m := min(space, len(p)-n)
			c.sendLocked(data, p[n:n+m])
			n += m
			continue
		}
		c.moved.Wait()
	}
}

// CloseWrite ends this end's data; it can still read.
func (c *Conn) CloseWrite() error {
	c.wire.mu.Lock()
	defer c.wire.mu.Unlock()
	switch {
	case c.closed:
		return c.fail("close", net.ErrClosed)
	case c.reset:
		return c.fail("close", syscall.ENOTCONN)
	case c.ended:
		return nil
	}
	c.ended = true
	c.sendLocked(fin, nil)
	c.moved.Broadcast()
	return nil
}

// Close implements net.Conn. What was written still arrives, unless the
// connection is reset (see Conn).
func (c *Conn) Close() error {
	gone, err := c.close()
	if gone {
		c.wire.w.mu.Lock()
		delete(c.wire.link.wires, c.wire)
		c.wire.w.mu.Unlock()
	}
	return err
}

// close reports whether nothing of the wire concerns the world any more.
func (c *Conn) close() (gone bool, err error) {
	c.wire.mu.Lock()
	defer c.wire.mu.Unlock()
	if c.closed {
		return false, c.fail("close", net.ErrClosed)
	}
	c.closed = true
	c.readBefore.stop()
	c.writeBefore.stop()
	if !c.reset {
		if c.linger0 || c.ready.Len() > 0 {
			c.ended = true
			c.sendLocked(rst, nil)
		} else if !c.ended {
			c.ended = true
			c.sendLocked(fin, nil)
		}
	}
	c.ready = bytes.Buffer{}
	c.moved.Broadcast()
	c.peer.moved.Broadcast()
	return c.peer.closed, nil
}

// Abort closes the connection with a reset: the peer reads ECONNRESET after
// what had been written.
func (c *Conn) Abort() error {
	if err := c.SetLinger(0); err != nil {
		return err
	}
	return c.Close()
}

// SetLinger with 0 makes Close reset the connection; other values make it what
// it is without.
func (c *Conn) SetLinger(sec int) error {
	c.wire.mu.Lock()
	defer c.wire.mu.Unlock()
	if c.closed {
		return c.fail("set", net.ErrClosed)
	}
	c.linger0 = sec == 0
	return nil
}

// abortUnaccepted resets an end that no Accept will ever return; World.mu is
// held.
func (c *Conn) abortUnaccepted() {
	c.wire.mu.Lock()
	c.linger0 = true
	c.wire.mu.Unlock()
	if gone, _ := c.close(); gone { // an end that was never handed out is open
		delete(c.wire.link.wires, c.wire)
	}
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error { return c.setDeadline(t, &c.readBefore, &c.writeBefore) }

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(t, &c.readBefore) }

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(t, &c.writeBefore) }

// deadline is a point in time after which reads or writes fail.
type deadline struct {
	timer  *time.Timer
	passed bool
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}

func (c *Conn) setDeadline(t time.Time, ds ...*deadline) error {
	c.wire.mu.Lock()
	defer c.wire.mu.Unlock()
	if c.closed {
		return c.fail("set", net.ErrClosed)
	}
	for _, d := range ds {
		d.set(t, &c.wire.mu, &c.moved)
	}
	return nil
}
