package tunnel

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// Stream is one public connection on its way to a workload, at the gateway's
// end. It is a net.Conn with half-close for those who speak HTTP on it; those
// who only pass bytes on use Join, which is cheaper.
//
// The request leaves with the first bytes (or with Join, CloseWrite or
// Accepted), in one packet with them. Whether the node could connect shows in
// the first Read, Accepted or Join: a refusal is a *webgw.Error.
type Stream struct {
	d       *dataConn
	server  *Server
	session *session

	wmu     sync.Mutex
	request *Request // until it is sent
	asked   atomic.Bool

	rmu      sync.Mutex
	answered bool
	rest     []byte // received payload that Read has not returned yet
	readErr  error

	cmu    sync.Mutex
	closed bool
	joined bool // Join goes on

	head []byte // Join's, while the stream may still be refused
}

// Write sends p.
func (s *Stream) Write(p []byte) (int, error) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if s.isClosed() || s.d.sent {
		return 0, net.ErrClosed
	}
	prefix, err := s.takeRequest()
	if err == nil {
		err = s.d.sendWith(prefix, p)
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// takeRequest returns the frame that asks for the stream, the first time.
func (s *Stream) takeRequest() ([]byte, error) {
	if s.request == nil {
		return nil, nil
	}
	r := s.request
	s.request = nil
	s.asked.Store(true)
	return s.d.openingFrame(r)
}

// CloseWrite ends the direction to the workload.
func (s *Stream) CloseWrite() error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if s.isClosed() || s.d.sent {
		return net.ErrClosed
	}
	prefix, err := s.takeRequest()
	if err != nil {
		return err
	}
	return s.d.sendEnd(prefix)
}

// Accepted waits until the node has connected to the workload, or returns its
// refusal.
func (s *Stream) Accepted() error {
	if err := s.flushRequest(); err != nil {
		return err
	}
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if s.isClosed() {
		return net.ErrClosed
	}
	return s.answerLocked()
}

// flushRequest sends the request if nobody has. A writer that is held up by
// back-pressure must not hold up the reader as well: no lock once it is sent.
func (s *Stream) flushRequest() error {
	if s.asked.Load() {
		return nil
	}
	// Whoever holds the lock sends the request before anything else, or closes the
	// stream. Waiting for it could be for ever: its bytes may be held up until
	// ours are read.
	if !s.wmu.TryLock() {
		return nil
	}
	defer s.wmu.Unlock()
	if s.isClosed() {
		return net.ErrClosed // its connection may serve somebody else by now
	}
	prefix, err := s.takeRequest()
	if prefix == nil {
		return err
	}
	return s.d.write(prefix)
}

func (s *Stream) answerLocked() error {
	if s.answered || s.readErr != nil {
		return s.readErr
	}
	err := s.d.answer()
	if err == nil {
		s.answered = true
	} else if !errors.Is(err, os.ErrDeadlineExceeded) {
		s.readErr = err
	}
	return err
}

// answer waits for the node's answer to a request.
func (d *dataConn) answer() error {
	t, n, _, err := d.header(true)
	if err != nil {
		return &webgw.Error{Op: "open stream", Kind: webgw.Unavailable, Public: "the node's connection was lost", Err: unexpected(err)}
	}
	if t != frameAccept && t != frameRefuse {
		return fmt.Errorf("tunnel: frame type %d in answer to a request", t)
	}
	p, err := d.body(n)
	if err != nil || t == frameAccept {
		return err
	}
	var r refusal
	if p, err = d.unseal(t, toGateway, p); err == nil {
		err = json.Unmarshal(p, &r)
	}
	if err != nil {
		return err
	}
	d.ended = true // a refusal ends the node's direction
	return r.err("open stream")
}

// Read returns bytes of the workload, io.EOF after its end.
func (s *Stream) Read(p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := s.flushRequest(); err != nil {
		return 0, err
	}
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if s.isClosed() {
		return 0, net.ErrClosed
	}
	if err := s.answerLocked(); err != nil {
		return 0, err
	}
	if len(s.rest) == 0 {
		if s.readErr != nil {
			return 0, s.readErr
		}
		if s.rest, err = s.d.payload(true); err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				s.readErr = err
			}
			return 0, err
		}
	}
	n = copy(p, s.rest)
	s.rest = s.rest[n:]
	if len(s.rest) == 0 {
		s.rest = nil
		s.d.giveBack()
	}
	return n, nil
}

// Close ends the stream as TCP's close does: with an orderly end where
// everything received has been read, else with a reset. After an orderly end
// the connection goes back to the pool.
func (s *Stream) Close() error {
	s.cmu.Lock()
	if s.closed {
		s.cmu.Unlock()
		return net.ErrClosed
	}
	s.closed = true
	s.cmu.Unlock()

	// Somebody who reads or writes right now can't be waited for: cut.
	if !s.wmu.TryLock() {
		return s.cut()
	}
	defer s.wmu.Unlock()
	if !s.rmu.TryLock() {
		return s.cut()
	}
	defer s.rmu.Unlock()
	d := s.d
	switch {
	case s.request != nil: // never asked for: nothing to end
		d.ended, d.sent = true, true
	case len(s.rest) > 0 || s.readErr != nil && !d.ended:
		return s.cut()
	case !d.sent && d.sendEnd(nil) != nil:
		return s.cut()
	case !d.ended:
		if !s.server.later(s.linger) {
			return s.cut()
		}
		return nil
	}
	s.server.release(s.session, d)
	return nil
}

// cut ends the stream with a reset. It leaves the state to whoever is using
// it right now.
func (s *Stream) cut() error {
	s.d.reset()
	s.server.forget(s.session, s.d)
	return nil
}

const (
	lingerTime  = 5 * time.Second
	lingerBytes = 64 << 10
)

// linger waits a little for the workload's end after ours.
func (s *Stream) linger() {
	d := s.d
	d.raw.SetReadDeadline(time.Now().Add(lingerTime))
	var err error
	if !s.answered {
		err = d.answer()
	}
	for n := 0; err == nil && n < lingerBytes; {
		var p []byte
		p, err = d.payload(true)
		n += len(p)
	}
	s.server.release(s.session, d)
}

func (s *Stream) isClosed() bool {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	return s.closed
}

// Quiet reports whether nothing has come that was not read, nor an end: a
// stream that is kept between messages may still be used.
func (s *Stream) Quiet() bool {
	if s.isClosed() || !s.rmu.TryLock() {
		return false
	}
	defer s.rmu.Unlock()
	d := s.d
	return len(s.rest) == 0 && s.readErr == nil && !d.ended && !d.unread() && netx.Alive(d.raw)
}

// LocalAddr is the gateway's end of the data connection.
func (s *Stream) LocalAddr() net.Addr { return s.d.raw.LocalAddr() }

// RemoteAddr is the node's end of the data connection.
func (s *Stream) RemoteAddr() net.Addr { return s.d.raw.RemoteAddr() }

// SetDeadline implements net.Conn.
func (s *Stream) SetDeadline(t time.Time) error { return s.limit(s.d.raw.SetDeadline, t) }

// SetReadDeadline implements net.Conn.
func (s *Stream) SetReadDeadline(t time.Time) error { return s.limit(s.d.raw.SetReadDeadline, t) }

// SetWriteDeadline implements net.Conn. A stream whose write timed out can't be
// written to again: part of a frame may have left.
func (s *Stream) SetWriteDeadline(t time.Time) error { return s.limit(s.d.raw.SetWriteDeadline, t) }

// limit sets a deadline, but not on a connection that may be somebody else's by
// now.
func (s *Stream) limit(set func(time.Time) error, t time.Time) error {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	return set(t)
}

// Join relays visitor and stream until both directions have ended, passing on
// half-closes, and closes the stream. head was read from the visitor already
// and goes first. Join may return earlier; done is called once all is over, in
// counts the bytes to the workload, out those to the visitor. A refusal by the
// node leaves the visitor open for another answer; after any other error the
// visitor has been reset. Who closes the visitor meanwhile must call Cut as well.
func (s *Stream) Join(visitor net.Conn, head []byte, done func(in, out int64, err error)) {
	s.cmu.Lock()
	closed := s.closed
	s.closed = true // Join owns the stream from here on
	s.joined = !closed
	s.cmu.Unlock()
	if closed {
		netx.Reset(visitor)
		done(0, 0, net.ErrClosed)
		return
	}
	s.head = head
	j := &joint{s: s, done: done}
	j.relay = relay{d: s.d, far: visitor, owner: j, lot: s.server.naps.begin(s.d.raw, s.server.carrying)}
	j.asked.Store(true)
	j.start()
	go j.receive()

	prefix, err := s.takeRequest()
	if err == nil && len(prefix)+len(head) > 0 {
		err = s.d.sendWith(prefix, head)
	}
	if err != nil && j.end(out, err) || err == nil && j.run(out) {
		j.ended()
	}
}

// joint is a joined stream.
type joint struct {
	relay
	s    *Stream
	done func(in, out int64, err error)
	errs [2]error
}

// receive relays what comes for the visitor, after the answer.
func (j *joint) receive() {
	if err := j.d.answer(); err != nil {
		if j.end(in, err) {
			j.ended()
		}
		return
	}
	j.s.head = nil
	j.asked.Store(false)
	j.resume(in)
}

// wayEnded ends the other direction as well if this one has failed.
func (j *joint) wayEnded(i int, err error) {
	j.errs[i] = err
	switch {
	case err == nil:
	case i == out && errors.Is(err, os.ErrDeadlineExceeded): // woken, below
	case i == in && j.d.ended && isRefusal(err):
		j.far.SetReadDeadline(time.Unix(1, 0)) // wakes the sender
	default:
		netx.Reset(j.far)
		j.d.reset()
		if i == in {
			j.d.ended = false
		}
	}
}

func (j *joint) ended() {
	s, d := j.s, j.d
	sent, err := j.errs[out], j.errs[in]
	if e, ok := asError(err); ok && d.ended {
		// Refused. The sender was interrupted, or has ended by itself.
		if sent == nil || errors.Is(sent, os.ErrDeadlineExceeded) {
			j.far.SetReadDeadline(time.Time{})
			if !d.sent && d.sendEnd(nil) != nil {
				d.ended = false
			}
		}
		err = e
	} else if sent != nil && (err == nil || errors.Is(err, net.ErrClosed)) {
		err = sent
	}
	toWorkload, toVisitor := s.Progress()
	s.cmu.Lock()
	s.joined = false // the connection may be another stream's
	s.cmu.Unlock()
	s.server.release(s.session, d)
	j.done(toWorkload, toVisitor, err)
}

// Cut ends a joined stream at once, with an error.
func (s *Stream) Cut() {
	s.cmu.Lock()
	defer s.cmu.Unlock()
	if s.joined {
		s.d.reset()
	}
}

// Refused returns, after Join, its head if the node has refused the stream, so
// that the caller need not keep it for as long as a stream lasts.
func (s *Stream) Refused() []byte { return s.head }

func isRefusal(err error) bool { _, ok := asError(err); return ok }

// Progress returns the payload bytes sent to and received from the workload
// so far.
func (s *Stream) Progress() (in, out int64) { return s.d.bytesOut.Load(), s.d.bytesIn.Load() }

var (
	_ netx.CloseWriter = (*Stream)(nil)
	_ io.ReadWriter    = (*Stream)(nil)
)
