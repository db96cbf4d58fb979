package netx

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
)

// Join relays between a and b until both directions have ended; the end of one
// direction is passed on as a half-close. head goes to b first. It returns the
// bytes that went from a to b and from b to a, and resets both connections if
// either fails. Closing them afterwards is up to the caller.
func Join(a, b net.Conn, head []byte) (ab, ba int64, err error) {
	var m Moved
	err = m.Join(a, b, head)
	return m.AB.Load(), m.BA.Load(), err
}

// Moved is how many bytes a join has relayed so far.
type Moved struct{ AB, BA atomic.Int64 }

// Join is like the function, and counts as it goes.
func (m *Moved) Join(a, b net.Conn, head []byte) (err error) {
	done := make(chan error, 1)
	go func() {
		err := Copy(a, b, nil, &m.BA)
		if err != nil {
			Reset(a)
			Reset(b)
		}
		done <- err
	}()
	if err = Copy(b, a, head, &m.AB); err != nil {
		Reset(a)
		Reset(b)
	}
	if other := <-done; err == nil || errors.Is(err, net.ErrClosed) {
		err = other
	}
	return err
}

// Copy writes head and then what src sends to dst until src ends, and passes
// the end on. It adds the bytes written to passed as they go.
func Copy(dst, src net.Conn, head []byte, passed *atomic.Int64) error {
	if len(head) > 0 {
		n, err := dst.Write(head)
		if passed.Add(int64(n)); err != nil {
			return err
		}
	}
	from, to := NewSource(src), Raw(dst)
	for {
		if to != nil {
			switch p, ok, err := from.NextParcel(pipeSize); {
			case err == io.EOF:
				return CloseWrite(dst)
			case err != nil:
				return err
			case ok:
				if err := p.Send(to, nil); err != nil {
					return err
				}
				passed.Add(int64(p.N))
				continue
			}
		}
		b, err := from.Next()
		if err == io.EOF {
			return CloseWrite(dst)
		}
		if err != nil {
			return err
		}
		err = WriteFrom(from, dst, b.Bytes())
		if err == nil {
			passed.Add(int64(len(b.Bytes())))
		}
		b.Return()
		if err != nil {
			return err
		}
	}
}

// CloseWrite ends the writing direction of c, or closes c where it has no
// half-close.
func CloseWrite(c net.Conn) error {
	if cw, ok := c.(CloseWriter); ok {
		return cw.CloseWrite()
	}
	return c.Close()
}

// AbortUnlessEnded makes the kernel end c with a reset if this process dies, as
// if Reset had been called; with false, an orderly end is sent again.
func AbortUnlessEnded(c net.Conn, abort bool) {
	sec := -1
	if abort {
		sec = 0
	}
	if l, ok := c.(interface{ SetLinger(sec int) error }); ok {
		l.SetLinger(sec) // an error means that c is closed already
	}
}

// Reset closes c so that the other side sees a reset (RST), not an orderly end
// that a cut stream could be mistaken for.
func Reset(c net.Conn) {
	AbortUnlessEnded(c, true)
	c.Close()
}
