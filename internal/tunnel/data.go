package tunnel

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// Exporter labels (RFC 8446 section 7.5). What is exported is unique to one
// TLS connection: a proof made for one can't be replayed on another, which is
// what makes it a token for a single use.
const (
	labelAttach  = "EXPORTER-webgw-attach"
	labelHandoff = "EXPORTER-webgw-handoff"
)

// proof shows that whoever opened this TLS connection holds the session's
// secret.
func proof(cs *tls.ConnectionState, secret []byte, a attach) ([32]byte, error) {
	unique, err := cs.ExportKeyingMaterial(labelAttach, nil, 32)
	if err != nil {
		return [32]byte{}, err
	}
	m := hmac.New(sha256.New, secret)
	m.Write(unique)
	m.Write(a.encode()[:attachLen-32])
	return [32]byte(m.Sum(nil)), nil
}

// dataConn is one data connection, at either end. At most one goroutine sends
// and one receives at a time.
type dataConn struct {
	kind Kind
	raw  net.Conn

	// Sealed and flows: all frames go through TLS.
	tls  *tls.Conn
	wire *wire

	// Handoff: frames are raw on the connection, requests and refusals are
	// sealed with a key per direction from the TLS handshake that began it.
	keys  [2][32]byte // gateway to node, node to gateway
	count [2]uint64   // nonces used
	src   *netx.Source

	in    *netx.Buffer // received, not yet consumed; nil: nothing
	frame int          // bytes left of the data frame being received
	ended bool         // the peer's direction of the stream has ended
	sent  bool         // our end has been sent
	torn  bool         // a write failed: part of a frame may have left, so nothing may follow

	doubted bool // used by watch only: its session has ended

	due   []byte // our answer to a request, to go out with the first bytes
	relay atomic.Pointer[relay]
	left  func() // the node's: called when the connection has ended

	restIn, restOut bool // no frames any more in this direction: it ends with the connection

	bytesIn, bytesOut atomic.Int64 // stream payload received and sent on this connection
}

// newDataConn takes over a connection of the session with that secret, after
// its handshake and attach message.
func newDataConn(kind Kind, t *tls.Conn, w *wire, secret []byte) (*dataConn, error) {
	d := &dataConn{kind: kind, raw: w.Conn}
	if kind != Handoff {
		w.batch()
		d.tls, d.wire = t, w
		return d, nil
	}
	// The secret came over the control connection, whose key exchange is
	// post-quantum; this connection's need not be then, which costs less.
	cs := t.ConnectionState()
	exported, err := cs.ExportKeyingMaterial(labelHandoff, nil, 32)
	if err != nil {
		return nil, err
	}
	key, err := hkdf.Key(sha256.New, exported, secret, labelHandoff, 64)
	if err != nil {
		return nil, err
	}
	copy(d.keys[0][:], key[:32])
	copy(d.keys[1][:], key[32:])
	d.src = netx.NewSource(d.raw)
	return d, nil
}

const toNode, toGateway = 0, 1

// aead seals the n-th request or refusal of one direction. It is made anew
// each time: one is needed per stream at most, and idle connections are many.
func (d *dataConn) aead(direction int) (cipher.AEAD, []byte, error) {
	block, err := aes.NewCipher(d.keys[direction][:])
	if err != nil {
		return nil, nil, err
	}
	a, err := cipher.NewGCM(block)
	nonce := make([]byte, 12)
	binary.BigEndian.PutUint64(nonce[4:], d.count[direction])
	d.count[direction]++
	return a, nonce, err
}

// openingFrame returns the whole frame that asks for a stream.
func (d *dataConn) openingFrame(r *Request) ([]byte, error) {
	plain, err := appendRequest(make([]byte, 0, 256), r)
	if err != nil {
		return nil, err
	}
	return d.sealedFrame(frameOpen, toNode, plain)
}

// refusingFrame returns the whole frame that refuses one.
func (d *dataConn) refusingFrame(r refusal) ([]byte, error) {
	plain, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	return d.sealedFrame(frameRefuse, toGateway, plain)
}

// sealedFrame returns a whole frame around plain.
func (d *dataConn) sealedFrame(t frameType, direction int, plain []byte) ([]byte, error) {
	f := make([]byte, headerLen, headerLen+len(plain)+16)
	if d.kind == Handoff {
		a, nonce, err := d.aead(direction)
		if err != nil {
			return nil, err
		}
		f = a.Seal(f, nonce, plain, []byte{byte(t)})
	} else {
		f = append(f, plain...)
	}
	if len(f)-headerLen > maxRequest {
		return nil, fmt.Errorf("tunnel: request of %d bytes", len(f))
	}
	putHeader(f, t, len(f)-headerLen)
	return f, nil
}

// unseal returns what sealedFrame was given, from the frame's payload.
func (d *dataConn) unseal(t frameType, direction int, payload []byte) ([]byte, error) {
	if d.kind != Handoff {
		return payload, nil
	}
	a, nonce, err := d.aead(direction)
	if err != nil {
		return nil, err
	}
	if payload, err = a.Open(nil, nonce, payload, []byte{byte(t)}); err != nil {
		return nil, errors.New("tunnel: a request does not authenticate")
	}
	return payload, nil
}

var errTorn = errors.New("tunnel: an earlier write has failed")

// write sends whole frames.
func (d *dataConn) write(p []byte) (err error) {
	switch {
	case d.torn:
		return errTorn
	case d.kind == Handoff:
		_, err = d.raw.Write(p)
	case len(p) <= tlsRecord:
		_, err = d.tls.Write(p)
	default:
		d.wire.hold()
		lane := netx.EnterLane()
		_, err = d.tls.Write(p)
		lane.Leave()
		err = errors.Join(err, d.wire.flush())
	}
	d.torn = err != nil
	return err
}

// fill adds received bytes to d.in, waiting for them.
func (d *dataConn) fill() (err error) {
	if d.in != nil && len(d.in.Bytes()) == 0 {
		d.in.Return()
		d.in = nil
	}
	if d.kind == Handoff {
		if d.in == nil {
			d.in, err = d.src.Next()
			return err
		}
		// Part of a frame that must be whole is here: a rare wait with a buffer.
		d.makeRoom()
		n, err := d.raw.Read(d.in.Free())
		d.in.Grow(n)
		return noBytes(n, err)
	}
	if err := d.wire.wait(); err != nil {
		return err
	}
	if d.in == nil {
		d.in = netx.Borrow(max(tlsRecord, len(d.wire.in.Bytes()))) // a record always fits
	} else {
		d.makeRoom()
	}
	if d.wire.buffered() && len(d.wire.in.Bytes()) >= bulkFrame {
		defer netx.EnterLane().Leave()
	}
	for {
		n, err := d.tls.Read(d.in.Free())
		d.in.Grow(n)
		if err := noBytes(n, err); err != nil {
			return err
		}
		// Reading on only while a whole record fits leaves none half inside
		// crypto/tls, where buffered would not see it.
		if len(d.in.Free()) < tlsRecord || !d.wire.buffered() {
			return nil
		}
	}
}

// makeRoom guarantees room for a request frame or a TLS record.
func (d *dataConn) makeRoom() {
	d.in.Compact()
	if len(d.in.Free()) < tlsRecord {
		b := netx.Borrow(len(d.in.Bytes()) + maxRequest + tlsRecord)
		b.Grow(copy(b.Free(), d.in.Bytes()))
		d.in.Return()
		d.in = b
	}
}

func noBytes(n int, err error) error {
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// header parses the next frame header, waiting for it only if wait. ok is
// false when it isn't here.
func (d *dataConn) header(wait bool) (t frameType, n int, ok bool, err error) {
	for d.in == nil || len(d.in.Bytes()) < headerLen {
		if !wait {
			return 0, 0, false, nil
		}
		if err := d.fill(); err != nil {
			if err == io.EOF && d.in != nil && len(d.in.Bytes()) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return 0, 0, false, err
		}
	}
	t, n, err = parseHeader(d.in.Bytes())
	return t, n, err == nil, err
}

// body waits for the n bytes after a header and consumes both. The slice is
// valid until the next fill.
func (d *dataConn) body(n int) ([]byte, error) {
	for len(d.in.Bytes()) < headerLen+n {
		if err := d.fill(); err != nil {
			return nil, unexpected(err)
		}
	}
	b := d.in.Bytes()[headerLen : headerLen+n]
	d.in.Consume(headerLen + n)
	return b, nil
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// payload returns the next bytes of the stream, valid until the next call that
// waits; io.EOF after the peer's end. With wait false it returns only what is
// here already, or nil.
func (d *dataConn) payload(wait bool) ([]byte, error) {
	for {
		if d.frame > 0 && d.in != nil {
			if b := d.in.Bytes(); len(b) > 0 {
				b = b[:min(len(b), d.frame)]
				d.in.Consume(len(b))
				d.frame -= len(b)
				d.bytesIn.Add(int64(len(b)))
				return b, nil
			}
		}
		if d.ended {
			if !wait {
				return nil, nil // what was returned before is still in use
			}
			d.giveBack()
			return nil, io.EOF
		}
		if d.frame > 0 {
			if !wait {
				return nil, nil
			}
			err := d.fill()
			if err == io.EOF && d.restIn {
				d.frame, d.ended = 0, true
			} else if err != nil {
				return nil, unexpected(err)
			}
			continue
		}
		t, n, ok, err := d.header(wait)
		switch {
		case err != nil:
			return nil, unexpected(err)
		case !ok:
			return nil, nil
		case t == frameData:
			d.in.Consume(headerLen)
			d.frame = n
		case t == frameEnd:
			d.in.Consume(headerLen)
			d.ended = true
		case t == frameRest && d.kind == Handoff:
			d.in.Consume(headerLen)
			d.restIn, d.frame = true, math.MaxInt
		default:
			return nil, fmt.Errorf("tunnel: frame type %d inside a stream", t)
		}
	}
}

// giveBack returns the receive buffer when nothing is left in it.
func (d *dataConn) giveBack() {
	if d.in != nil && len(d.in.Bytes()) == 0 {
		d.in.Return()
		d.in = nil
	}
}

// recvTo writes the stream to dst until the peer's end, and passes the end on.
func (d *dataConn) recvTo(dst net.Conn) error {
	var segments net.Buffers
	var direct syscall.RawConn
	if d.kind == Handoff {
		direct = netx.Raw(dst)
	}
	slow := d.src
	if d.wire != nil {
		slow = d.wire.src
	}
	for {
		nothing := d.in == nil || len(d.in.Bytes()) == 0
		if d.restIn && nothing {
			d.giveBack()
			err := netx.Copy(dst, d.raw, nil, &d.bytesIn)
			if err == nil {
				d.frame, d.ended = 0, true
			}
			return err
		}
		if direct != nil && d.frame >= bulkFrame && nothing {
			if err := d.moveTo(direct); err != nil {
				return err
			}
		}
		p, err := d.payload(true)
		if err == io.EOF {
			return netx.CloseWrite(dst)
		}
		if err != nil {
			return err
		}
		segments = append(segments[:0], p)
		for {
			if p, err = d.payload(false); err != nil {
				return err
			}
			if p == nil {
				break
			}
			segments = append(segments, p)
		}
		if len(segments) == 1 {
			err = netx.WriteFrom(slow, dst, segments[0])
		} else {
			rest := segments // WriteTo consumes its receiver
			_, err = rest.WriteTo(dst)
		}
		d.giveBack()
		if err != nil {
			return err
		}
	}
}

// bulkFrame is how much of a frame must be left for it to be moved inside the
// kernel rather than copied.
const bulkFrame = 64 << 10

// moveTo moves the rest of the current frame, and large frames that follow it,
// to dst.
func (d *dataConn) moveTo(dst syscall.RawConn) error {
	for {
		d.giveBack()
		d.src.Plenty()
		for d.frame > 0 {
			p, ok, err := d.src.NextParcel(d.frame)
			if err != nil {
				return unexpected(err)
			}
			if !ok {
				return nil // copy it
			}
			if err := p.Send(dst, nil); err != nil {
				return err
			}
			d.frame -= p.N
			d.bytesIn.Add(int64(p.N))
		}
		// What follows is a header: read no more, so that nothing of the next
		// large frame is copied.
		d.src.Few(headerLen)
		t, n, _, err := d.header(true)
		if err != nil {
			return unexpected(err)
		}
		if t != frameData || n < bulkFrame || len(d.in.Bytes()) > headerLen {
			return nil // payload takes it from here
		}
		d.in.Consume(headerLen)
		d.frame = n
	}
}

// sendFrom sends all of src as the stream until src ends, and then our end. It
// may be called again after a wait in vain.
func (d *dataConn) sendFrom(src net.Conn) error {
	from := netx.NewSource(src)
	var direct syscall.RawConn // where bytes may go as they are
	if d.kind == Handoff {
		direct = netx.Raw(d.raw)
	}
	for {
		if d.restOut || d.kind == Handoff && d.bytesOut.Load() >= restAfter {
			return d.sendRest(src)
		}
		if direct != nil {
			p, ok, err := from.NextParcel(maxData)
			if err == io.EOF {
				return d.sendEnd(d.owed())
			}
			if err != nil {
				return err
			}
			if ok {
				h := make([]byte, headerLen)
				putHeader(h, frameData, p.N)
				if err := p.Send(direct, append(d.owed(), h...)); err != nil {
					d.torn = true
					return err
				}
				d.bytesOut.Add(int64(p.N))
				continue
			}
		}
		b, err := from.Next()
		if err == io.EOF {
			return d.sendEnd(d.owed())
		}
		if err != nil {
			return err
		}
		err = d.sendBuffer(b, d.owed(), from)
		b.Return()
		if err != nil {
			return err
		}
	}
}

// owed takes what is due.
func (d *dataConn) owed() []byte {
	f := d.due
	d.due = nil
	return f
}

// restAfter is how many bytes a direction of a handoff stream carries in frames.
// Beyond that, a new connection for the next stream costs less than the frames
// of this one do: they split what the kernel would move in one piece.
const restAfter = 4 << 20

// sendRest sends what is left of src without frames, until src ends.
func (d *dataConn) sendRest(src net.Conn) error {
	if !d.restOut {
		// The end of the connection will be the stream's: our own death must not
		// look like it.
		netx.AbortUnlessEnded(d.raw, true)
		d.restOut = true
		var h [headerLen]byte
		putHeader(h[:], frameRest, 0)
		if err := d.write(h[:]); err != nil {
			return err
		}
	}
	if err := netx.Copy(d.raw, src, nil, &d.bytesOut); err != nil {
		return err
	}
	d.sent = true
	return nil
}

// sendBuffer sends a frame header (or nothing) and the buffer's content as one
// data frame, without a copy.
func (d *dataConn) sendBuffer(b *netx.Buffer, before []byte, from *netx.Source) error {
	n := len(b.Bytes())
	var h [headerLen]byte
	putHeader(h[:], frameData, n)
	b.Prepend(h[:])
	b.Prepend(before)
	d.bytesOut.Add(int64(n))
	if d.kind == Handoff {
		err := netx.WriteFrom(from, d.raw, b.Bytes())
		d.torn = err != nil
		return err
	}
	return d.write(b.Bytes())
}

// sendWith sends prefix (whole frames) and p as one data frame in one write.
func (d *dataConn) sendWith(prefix, p []byte) error {
	const most = 128 << 10
	for len(prefix)+len(p) > 0 {
		chunk := p[:min(len(p), most)]
		p = p[len(chunk):]
		b := netx.Borrow(len(prefix) + headerLen + len(chunk))
		b.Grow(copy(b.Free(), prefix))
		prefix = nil
		if len(chunk) > 0 {
			putHeader(b.Free(), frameData, len(chunk))
			b.Grow(headerLen)
			b.Grow(copy(b.Free(), chunk))
			d.bytesOut.Add(int64(len(chunk)))
		}
		err := d.write(b.Bytes())
		b.Return()
		if err != nil {
			return err
		}
	}
	return nil
}

// sendEnd ends our direction, after prefix (whole frames).
func (d *dataConn) sendEnd(prefix []byte) error {
	d.sent = true
	f := make([]byte, len(prefix)+headerLen)
	copy(f, prefix)
	putHeader(f[len(prefix):], frameEnd, 0)
	return d.write(f)
}

// reset closes the connection so that the peer sees that a stream was cut.
func (d *dataConn) reset() {
	netx.Reset(d.raw)
	if r := d.relay.Load(); r != nil {
		r.awaken()
	}
}

// reuse reports whether the connection may be used again, and prepares it for
// that: both directions of the stream have ended in order, and no deadline of
// the stream's is left. Otherwise it closes the connection.
func (d *dataConn) reuse() bool {
	d.giveBack()
	switch {
	case !d.ended || !d.sent || d.torn || d.frame != 0:
		d.reset()
		return false
	case d.restIn || d.restOut:
		netx.AbortUnlessEnded(d.raw, false)
		d.raw.Close()
		return false
	}
	if d.raw.SetDeadline(time.Time{}) != nil {
		return false // it was closed meanwhile
	}
	d.renew()
	return true
}

// unread reports whether bytes have come that nobody asked for yet.
func (d *dataConn) unread() bool {
	return d.in != nil && len(d.in.Bytes()) > 0 || d.wire != nil && d.wire.in != nil
}

func (d *dataConn) renew() {
	d.ended, d.sent, d.due = false, false, nil
	d.bytesIn.Store(0)
	d.bytesOut.Store(0)
}

// asError finds our error type in err's tree.
func asError(err error) (*webgw.Error, bool) { return errors.AsType[*webgw.Error](err) }
