package netx

import (
	"errors"
	"io"
	"net"
)

// Join relays between a and b until both directions have ended; the end of one
// direction is passed on as a half-close. head goes to b first. It returns the
// bytes that went from a to b and from b to a, and resets both connections if
// either fails. Closing them afterwards is up to the caller.
func Join(a, b net.Conn, head []byte) (ab, ba int64, err error) {
	done := make(chan error, 1)
	go func() {
		var err error
		if ba, err = Copy(a, b, nil); err != nil {
			Reset(a)
			Reset(b)
		}
		done <- err
	}()
	if ab, err = Copy(b, a, head); err != nil {
		Reset(a)
		Reset(b)
	}
	if other := <-done; err == nil || errors.Is(err, net.ErrClosed) {
		err = other
	}
	return ab, ba, err
}

// Copy writes head and then what src sends to dst until src ends, and passes
// the end on. It returns the bytes written.
func Copy(dst, src net.Conn, head []byte) (n int64, err error) {
	if len(head) > 0 {
		w, err := dst.Write(head)
		if n += int64(w); err != nil {
			return n, err
		}
	}
	from, to := NewSource(src), Raw(dst)
	for {
		if to != nil {
			switch p, ok, err := from.NextParcel(pipeSize); {
			case err == io.EOF:
				return n, CloseWrite(dst)
			case err != nil:
				return n, err
			case ok:
				if err := p.Send(to, nil); err != nil {
					return n, err
				}
				n += int64(p.N)
				continue
			}
		}
		b, err := from.Next()
		if err == io.EOF {
			return n, CloseWrite(dst)
		}
		if err != nil {
			return n, err
		}
		err = WriteFrom(from, dst, b.Bytes())
		if err == nil {
			n += int64(len(b.Bytes()))
		}
		b.Return()
		if err != nil {
			return n, err
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

// Reset closes c so that the other side sees a reset (RST), not an orderly end
// that a cut stream could be mistaken for.
func Reset(c net.Conn) {
	if l, ok := c.(interface{ SetLinger(sec int) error }); ok {
		l.SetLinger(0) // an error means that c is closed already
	}
	c.Close()
}
