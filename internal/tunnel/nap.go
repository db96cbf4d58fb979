package tunnel

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"webgw.dev/webgw/internal/netx"
)

// A stream has two directions and so two goroutines at each end, whose stacks
// are most of what it costs. The one that waits for the peer ends when nothing
// has come for a while, and begins again when something comes: it naps.

// napAfter is how often it is looked who may nap: a direction does after one to
// two times as long without a byte.
const napAfter = 5 * time.Second

// nap is what a data connection keeps for that.
type nap struct {
	mu      sync.Mutex
	on      bool // a receive is under way that may nap
	drowsy  bool // its read deadline was set to wake it, so that it naps
	seen    int64
	waiting *netx.Parked
}

// receive relays the stream to dst as recvTo does and calls done with its
// result. It naps meanwhile where that is possible, and returns early then.
func (d *dataConn) receive(dst net.Conn, lot *netx.Lot, done func(error)) {
	d.nap.mu.Lock()
	d.nap.on, d.nap.seen, d.nap.waiting = lot != nil, -1, nil
	d.nap.mu.Unlock()
	for {
		err := d.recvTo(dst)
		switch d.doze(err, func() { d.receive(dst, lot, done) }, lot) {
		case over:
			done(err)
			return
		case asleep:
			return
		}
	}
}

// What comes after recvTo has returned.
type waking int

const (
	over   waking = iota // the direction has ended
	awake                // go on
	asleep               // it goes on when something comes
)

// doze naps if err tells that the time for it has come.
func (d *dataConn) doze(err error, resume func(), lot *netx.Lot) waking {
	n := &d.nap
	n.mu.Lock()
	defer n.mu.Unlock()
	drowsy := n.drowsy
	if n.drowsy {
		n.drowsy = false
		d.raw.SetReadDeadline(time.Time{}) // an error means that it is closed: the next read tells
	}
	if !drowsy || !waitedInVain(err) {
		n.on = false
		return over
	}
	d.giveBack()
	if n.waiting = lot.Park(d.raw, resume); n.waiting == nil {
		n.seen = -1
		return awake
	}
	n.on = false
	return asleep
}

// waitedInVain reports whether err is the end of a wait for bytes by deadline,
// not of a write: nothing is lost then.
func waitedInVain(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && (op.Op == "read" || op.Op == "raw-read") && errors.Is(err, os.ErrDeadlineExceeded)
}

// drowse lets the receiving direction nap if nothing has come since the last
// call.
func (d *dataConn) drowse() {
	n := &d.nap
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.on || n.drowsy {
		return
	}
	if in := d.bytesIn.Load(); in != n.seen {
		n.seen = in
		return
	}
	n.drowsy = true
	d.raw.SetReadDeadline(time.Unix(1, 0)) // an error means that it is closed: its reader sees that
}

// awaken ends a nap, after the connection was closed.
func (d *dataConn) awaken() {
	d.nap.mu.Lock()
	p := d.nap.waiting
	d.nap.mu.Unlock()
	if p != nil {
		p.Wake()
	}
}

// naps lets the streams of one end nap.
type naps struct {
	began, ended sync.Once

	lot  *netx.Lot // nil where there are no naps
	quit chan struct{}
	done chan struct{}
}

// begin makes naps possible for connections like c. streams returns those that
// carry a stream. Without a descriptor, as in memnet, there are none.
func (n *naps) begin(c net.Conn, streams func() []*dataConn) *netx.Lot {
	if netx.Raw(c) == nil {
		return nil
	}
	n.began.Do(func() {
		lot, err := netx.NewLot()
		if err != nil {
			return // not on this system, or out of descriptors: streams cost more then
		}
		n.lot, n.quit, n.done = lot, make(chan struct{}), make(chan struct{})
		go func() {
			defer close(n.done)
			tick := time.NewTicker(napAfter)
			defer tick.Stop()
			for {
				select {
				case <-n.quit:
					return
				case <-tick.C:
				}
				for _, d := range streams() {
					d.drowse()
				}
			}
		}()
	})
	return n.lot
}

// end wakes everyone. No stream naps after it.
func (n *naps) end() {
	n.began.Do(func() {})
	n.ended.Do(func() {
		if n.lot != nil {
			close(n.quit)
			<-n.done
			n.lot.Close()
		}
	})
}
