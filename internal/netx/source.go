package netx

import (
	"io"
	"net"
	"syscall"
	"time"
)

// Source reads a connection into borrowed buffers and holds none while it
// waits for bytes, so that an idle connection costs no buffer. It must be used
// by one goroutine at a time.
type Source struct {
	conn  net.Conn
	raw   syscall.RawConn // nil where there is no descriptor, as in memnet
	class int

	few int // most bytes that the next buffer may hold; 0: what fits

	bulk     bool // bytes come in plenty: move them in the kernel
	noSplice bool // this kind of socket can't

	bulkSeen uint32 // how much bulk work there had been at its last short read

	try func(fd uintptr) bool // made once: a closure per read would be garbage
	buf *Buffer
	n   int
	err error
}

// NewSource reads from c.
func NewSource(c net.Conn) *Source {
	s := &Source{conn: c}
	if sc, ok := c.(syscall.Conn); ok && descriptors {
		s.raw, _ = sc.SyscallConn() // an error means no descriptor: the plain way then
	}
	s.try = func(fd uintptr) bool {
		s.buf = borrowClass(s.class)
		var lane Lane
		if s.class >= bulkClass {
			lane = EnterLane()
		}
		for {
			s.n, s.err = readDescriptor(fd, s.room(s.buf))
			if s.err != syscall.EINTR {
				break
			}
		}
		lane.Leave()
		if s.err == syscall.EAGAIN {
			s.buf.Return()
			s.buf = nil
			return false
		}
		return true
	}
	return s
}

// room is what may be filled of b.
func (s *Source) room(b *Buffer) []byte {
	if s.few > 0 {
		return b.Free()[:s.few]
	}
	return b.Free()
}

// Next waits for bytes and returns them in a buffer that the caller must
// Return; io.EOF at the end of the direction.
func (s *Source) Next() (*Buffer, error) {
	if s.raw == nil {
		return s.nextPlain()
	}
	s.buf, s.n, s.err = nil, 0, nil
	if err := s.raw.Read(s.try); err != nil {
		if s.buf != nil {
			s.buf.Return()
		}
		return nil, err
	}
	return s.took(s.buf, s.n, s.err)
}

func (s *Source) nextPlain() (*Buffer, error) {
	b := borrowClass(s.class)
	n, err := s.conn.Read(s.room(b))
	if n > 0 {
		err = nil // an error that comes with bytes comes again
	} else if err == nil {
		err = io.ErrNoProgress
	}
	return s.took(b, n, err)
}

func (s *Source) took(b *Buffer, n int, err error) (*Buffer, error) {
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		b.Return()
		if errno, ok := err.(syscall.Errno); ok {
			err = s.opError(errno)
		}
		return nil, err
	}
	if s.raw != nil && s.class == 0 && s.few == 0 && n <= briefRead {
		s.brief()
	}
	switch room := len(b.Free()); {
	case s.few > 0:
		s.few = 0
	case n == room && s.class < bulkClass:
		s.class++
	case n == room && s.raw != nil && !s.noSplice && !s.bulk:
		s.bulk = true
	case n == room && s.class < largest:
		s.class++
	case n < room/8 && s.class > 0:
		s.class--
	}
	b.Grow(n)
	return b, nil
}

func (s *Source) opError(errno syscall.Errno) error {
	return &net.OpError{Op: "read", Net: "tcp", Addr: s.conn.RemoteAddr(), Err: errno}
}

// Raw returns the descriptor of c for Parcel.Send, or nil where there is none.
func Raw(c net.Conn) syscall.RawConn {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// Reads that fill a buffer of bulkClass are followed by moves in the kernel, as
// long as those bring bulkMin bytes each. Below that, two system calls and a
// pipe cost more than a copy.
const (
	bulkClass = 2
	bulkMin   = 32 << 10
	pipeSize  = 1 << 20 // most that one move brings; what an unprivileged process may have
)

// Stalled makes the next buffer the smallest: told by a writer that could not
// get rid of what was read for longer than StallAfter, so that a slow receiver
// ties up little memory.
func (s *Source) Stalled() { s.class, s.bulk = 0, false }

// Few lets the next buffer, a small one, hold at most n bytes: told by a reader
// that knows a header of n bytes to come and wants what follows as a Parcel.
func (s *Source) Few(n int) { s.class, s.bulk, s.few = 0, false, min(n, sizes[0]) }

// Plenty tells that many bytes are known to come: NextParcel is worth it.
func (s *Source) Plenty() { s.bulk = s.raw != nil && !s.noSplice }

// StallAfter is how long a write may take before its reader shrinks its buffers.
const StallAfter = 100 * time.Millisecond

// WriteFrom writes all of p to c and tells src when it took long.
func WriteFrom(src *Source, c net.Conn, p []byte) error {
	if len(p) < sizes[1] {
		_, err := c.Write(p)
		return err
	}
	start := time.Now()
	_, err := WriteBulk(c, p)
	if time.Since(start) > StallAfter {
		src.Stalled()
	}
	return err
}
