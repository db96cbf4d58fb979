package tunnel

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw/internal/netx"
)

// relay joins a data connection's stream with the connection of a visitor or a
// workload, the far one. Each direction has a goroutine, whose stack would be
// most of what an idle stream costs: the goroutine ends when nothing has come
// for a while, and another begins when something comes. The direction naps.
type relay struct {
	d     *dataConn
	far   net.Conn
	owner relayOwner
	lot   *netx.Lot // nil: no naps
	ways  [2]way
	left  atomic.Int32 // directions that have not ended
	asked atomic.Bool  // the stream may still be refused: no naps
}

// The directions of a relay: out is what far sends, in what comes for it.
const in, out = 0, 1

type relayOwner interface {
	// wayEnded is called when a direction has ended.
	wayEnded(i int, err error)
	// ended is called after both have, unless begin or run tells its caller so.
	ended()
}

// way is one direction of a relay.
type way struct {
	mu      sync.Mutex
	on      bool // it may nap
	drowsy  bool // its read deadline was set to wake it, so that it naps
	seen    int64
	waiting *netx.Parked
}

// start prepares r for run.
func (r *relay) start() {
	r.left.Store(2)
	r.d.relay.Store(r)
	if netx.Raw(r.far) == nil {
		r.lot = nil
	}
}

// run relays direction i until it ends or naps. It reports whether both have
// ended.
func (r *relay) run(i int) (ended bool) {
	r.ways[i].begin(r.lot != nil)
	for {
		var err error
		if i == in {
			err = r.d.recvTo(r.far)
		} else {
			err = r.d.sendFrom(r.far)
		}
		switch r.doze(i, err) {
		case over:
			return r.end(i, err)
		case asleep:
			return false
		}
	}
}

// end ends a direction, and reports whether both have.
func (r *relay) end(i int, err error) (ended bool) {
	r.owner.wayEnded(i, err)
	if r.left.Add(-1) > 0 {
		return false
	}
	r.d.relay.Store(nil)
	return true
}

// resume is run on a new goroutine.
func (r *relay) resume(i int) {
	if r.run(i) {
		r.owner.ended()
	}
}

// source is where the bytes of a direction come from.
func (r *relay) source(i int) net.Conn {
	if i == in {
		return r.d.raw
	}
	return r.far
}

func (r *relay) moved(i int) int64 {
	if i == in {
		return r.d.bytesIn.Load()
	}
	return r.d.bytesOut.Load()
}

func (w *way) begin(may bool) {
	w.mu.Lock()
	w.on, w.seen, w.waiting = may, -1, nil
	w.mu.Unlock()
}

// What comes after a direction has stopped.
type waking int

const (
	over   waking = iota // it has ended
	awake                // go on
	asleep               // it goes on when something comes
)

// doze naps if err tells that the time for it has come.
func (r *relay) doze(i int, err error) waking {
	w := &r.ways[i]
	w.mu.Lock()
	defer w.mu.Unlock()
	drowsy := w.drowsy
	if w.drowsy {
		w.drowsy = false
		r.source(i).SetReadDeadline(time.Time{}) // an error means that it is closed: the next read tells
	}
	if !drowsy || !waitedInVain(err) {
		w.on = false
		return over
	}
	if i == in {
		r.d.giveBack()
	}
	if w.waiting = r.lot.Park(r.source(i), func() { r.resume(i) }); w.waiting == nil {
		w.seen = -1
		return awake
	}
	w.on = false
	return asleep
}

// waitedInVain reports whether err is the end of a wait for bytes by deadline,
// not of a write: nothing is lost then.
func waitedInVain(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && (op.Op == "read" || op.Op == "raw-read") && errors.Is(err, os.ErrDeadlineExceeded)
}

// drowse lets the directions nap in which nothing has come since the last call.
func (r *relay) drowse() {
	if r.asked.Load() {
		return
	}
	for i := range r.ways {
		w := &r.ways[i]
		w.mu.Lock()
		if n := r.moved(i); w.on && !w.drowsy && n != w.seen {
			w.seen = n
		} else if w.on && !w.drowsy {
			w.drowsy = true
			r.source(i).SetReadDeadline(time.Unix(1, 0)) // an error means that it is closed: its reader sees that
		}
		w.mu.Unlock()
	}
}

// awaken ends all naps, after a connection was closed.
func (r *relay) awaken() {
	for i := range r.ways {
		w := &r.ways[i]
		w.mu.Lock()
		p := w.waiting
		w.mu.Unlock()
		if p != nil {
			p.Wake()
		}
	}
}

// napAfter is how often it is looked who may nap: a direction does after one to
// two times as long without a byte.
const napAfter = 5 * time.Second

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

func (d *dataConn) drowse() {
	if r := d.relay.Load(); r != nil {
		r.drowse()
	}
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
