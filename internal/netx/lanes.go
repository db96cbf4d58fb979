package netx

import (
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Bulk transfers and short exchanges share the processors of a process. The
// runtime looks for connections that have become readable when a processor has
// nothing else to do, or else every 10 ms: as many bulk transfers as there are
// processors make everybody else wait that long, at each hop and both ways. So
// while there are short exchanges beside them, pieces of bulk work are done one
// processor short: in lanes.
var road struct {
	bulk   atomic.Uint32 // rises with each piece of bulk work
	polite atomic.Int64  // until when bulk work keeps to the lanes, on the clock below
	once   sync.Once
	lanes  chan struct{} // one less than there are processors
}

var roadBegan = time.Now()

const (
	courtesy  = 100 * time.Millisecond // how long a short exchange is remembered
	briefRead = 4 << 10                // bytes: a read of more, or one after large ones, is no short exchange
	bulkPiece = 64 << 10               // bytes: what is moved, copied or encrypted in one go is bulk work from here on
)

// Lane is the leave to do one piece of bulk work.
type Lane struct{ taken bool }

// EnterLane waits until a piece of bulk work may be done, which must not itself
// wait for anything. Leave must follow.
func EnterLane() Lane {
	road.bulk.Add(1)
	if !polite() {
		return Lane{}
	}
	road.once.Do(func() { road.lanes = make(chan struct{}, max(1, runtime.GOMAXPROCS(0)-1)) })
	road.lanes <- struct{}{}
	return Lane{true}
}

// polite is false in bubbles of testing/synctest, whose clock is earlier.
func polite() bool {
	now := int64(time.Since(roadBegan))
	return now >= 0 && road.polite.Load() > now
}

// Leave lets the next one go.
func (l Lane) Leave() {
	if l.taken {
		<-road.lanes
	}
}

// brief notes a short read, if there was bulk work since the source's last one.
func (s *Source) brief() {
	if n := road.bulk.Load(); n != s.bulkSeen {
		s.bulkSeen = n
		road.polite.Store(int64(time.Since(roadBegan) + courtesy))
	}
}

// WriteBulk writes all of p to c, in a lane for as long as c takes it without
// waiting.
func WriteBulk(c net.Conn, p []byte) (n int, err error) {
	var raw syscall.RawConn
	if len(p) >= bulkPiece && descriptors {
		if road.bulk.Add(1); polite() {
			raw = Raw(c)
		}
	}
	if raw == nil {
		return c.Write(p)
	}
	var failed error
	err = raw.Write(func(fd uintptr) bool {
		lane := EnterLane()
		defer lane.Leave()
		for n < len(p) {
			m, err := writeDescriptor(fd, p[n:])
			n += max(m, 0)
			switch err {
			case nil, syscall.EINTR:
			case syscall.EAGAIN:
				return false
			default:
				failed = &net.OpError{Op: "write", Net: "tcp", Addr: c.RemoteAddr(), Err: err}
				return true
			}
		}
		return true
	})
	if err == nil {
		err = failed
	}
	return n, err
}
