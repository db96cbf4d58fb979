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

	try func(fd uintptr) bool // made once: a closure per read would be garbage
	buf *Buffer
	n   int
	err error
}

// NewSource reads from c.
func NewSource(c net.Conn) *Source {
	s := &Source{conn: c}
	if sc, ok := c.(syscall.Conn); ok {
		s.raw, _ = sc.SyscallConn() // an error means no descriptor: the plain way then
	}
	s.try = func(fd uintptr) bool {
		s.buf = borrowClass(s.class)
		for {
			s.n, s.err = syscall.Read(int(fd), s.buf.Free())
			if s.err != syscall.EINTR {
				break
			}
		}
		if s.err == syscall.EAGAIN {
			s.buf.Return()
			s.buf = nil
			return false
		}
		return true
	}
	return s
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
	n, err := s.conn.Read(b.Free())
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
			err = &net.OpError{Op: "read", Net: "tcp", Addr: s.conn.RemoteAddr(), Err: errno}
		}
		return nil, err
	}
	switch room := len(b.Free()); {
	case n == room && s.class < largest:
		s.class++
	case n < room/8 && s.class > 0:
		s.class--
	}
	b.Grow(n)
	return b, nil
}

// Stalled makes the next buffer the smallest: told by a writer that could not
// get rid of what was read for longer than StallAfter, so that a slow receiver
// ties up little memory.
func (s *Source) Stalled() { s.class = 0 }

// StallAfter is how long a write may take before its reader shrinks its buffers.
const StallAfter = 100 * time.Millisecond

// WriteFrom writes all of p to c and tells src when it took long.
func WriteFrom(src *Source, c io.Writer, p []byte) error {
	if len(p) < sizes[1] {
		_, err := c.Write(p)
		return err
	}
	start := time.Now()
	_, err := c.Write(p)
	if time.Since(start) > StallAfter {
		src.Stalled()
	}
	return err
}
