package tunnel

import (
	"encoding/binary"
	"net"
	"sync"

	"webgw.dev/webgw/internal/netx"
)

const (
	tlsHeader = 5
	tlsRecord = 16 << 10 // plaintext of a full TLS record, RFC 8446 section 5.1
	corkSize  = 256<<10 + netx.Headroom + 17*32
)

var corks = sync.Pool{New: func() any { b := make([]byte, 0, corkSize); return &b }}

// wire stands between crypto/tls and the connection. crypto/tls reads ahead and
// writes record by record; wire gives back control over both. It never hands
// out a byte beyond the current TLS record, so that
//
//   - during the handshake nothing beyond the record is taken from the
//     connection either, which can then be used raw;
//   - afterwards (batch) bytes are read in large borrowed pieces, and what TLS
//     has not seen yet is known to be in them and nowhere else;
//
// and while held, records are gathered and leave in one system call.
type wire struct {
	net.Conn
	head []byte // already read from the connection by whoever sniffed it
	need int    // bytes left of the current record's body
	hdr  [tlsHeader]byte
	nhdr int // bytes of hdr known

	src *netx.Source // nil: not batched
	in  *netx.Buffer // batched: read, not yet taken by TLS

	mu   sync.Mutex
	cork *[]byte // nil: not corked
}

func newWire(c net.Conn, head []byte) *wire { return &wire{Conn: c, head: head} }

// batch starts to read ahead, in large pieces.
func (w *wire) batch() { w.src = netx.NewSource(w.Conn) }

// Read serves crypto/tls.
func (w *wire) Read(p []byte) (n int, err error) {
	most := w.need
	if w.nhdr < tlsHeader {
		most = tlsHeader - w.nhdr
	}
	p = p[:min(len(p), most)]
	switch {
	case len(p) == 0:
		return 0, nil
	case len(w.head) > 0:
		n = copy(p, w.head)
		w.head = w.head[n:]
	case w.src == nil:
		n, err = w.Conn.Read(p)
	default:
		if err := w.wait(); err != nil {
			return 0, err
		}
		n = copy(p, w.in.Bytes())
		w.in.Consume(n)
		if len(w.in.Bytes()) == 0 {
			w.in.Return()
			w.in = nil
		}
	}
	if w.nhdr < tlsHeader {
		w.nhdr += copy(w.hdr[w.nhdr:], p[:n])
		if w.nhdr == tlsHeader {
			w.need = int(binary.BigEndian.Uint16(w.hdr[3:]))
		}
	} else {
		w.need -= n
	}
	if w.nhdr == tlsHeader && w.need == 0 {
		w.nhdr = 0
	}
	return n, err
}

// wait returns once there are bytes for TLS to read. Nothing is held while it
// waits.
func (w *wire) wait() (err error) {
	if w.in == nil {
		w.in, err = w.src.Next()
	}
	return err
}

// buffered reports whether a whole TLS record is at hand, so that reading it
// won't wait.
func (w *wire) buffered() bool {
	if w.in == nil {
		return false
	}
	b := w.in.Bytes()
	return len(b) >= tlsHeader && len(b) >= tlsHeader+int(binary.BigEndian.Uint16(b[3:]))
}

// Write serves crypto/tls.
func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cork == nil {
		return w.Conn.Write(p)
	}
	if len(*w.cork)+len(p) > cap(*w.cork) {
		if err := w.flushLocked(); err != nil {
			return 0, err
		}
		if len(p) > cap(*w.cork) {
			return w.Conn.Write(p)
		}
	}
	*w.cork = append(*w.cork, p...)
	return len(p), nil
}

// hold starts to gather what is written; flush sends it.
func (w *wire) hold() {
	w.mu.Lock()
	w.cork = corks.Get().(*[]byte)
	w.mu.Unlock()
}

func (w *wire) flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.flushLocked()
	corks.Put(w.cork)
	w.cork = nil
	return err
}

func (w *wire) flushLocked() error {
	if len(*w.cork) == 0 {
		return nil
	}
	_, err := netx.WriteBulk(w.Conn, *w.cork)
	*w.cork = (*w.cork)[:0]
	return err
}
