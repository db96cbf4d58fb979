package ingress

import (
	"errors"
	"io"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

// stallBody is the body of a request over HTTP/2 or HTTP/3. It ends when the
// visitor sends nothing for as long as Limits.Stall, as over HTTP/1, unless the
// answer has begun, because both directions may be silent between messages then.
// Those of gRPC may be from the start; whether the visitor is still there is
// asked of the connection.
type stallBody struct {
	io.ReadCloser
	x         *exchange
	deadlines *http.ResponseController
	ended     atomic.Bool // by the limit
}

// limitStall bounds the silence of the request's body.
func (x *exchange) limitStall() {
	if x.in.ProtoMajor < 2 || !x.body || strings.HasPrefix(x.in.Header.Get("Content-Type"), "application/grpc") {
		return
	}
	x.stall = &stallBody{ReadCloser: x.in.Body, x: x, deadlines: http.NewResponseController(x.ResponseWriter)}
	x.in.Body = x.stall
}

// stalled reports whether the visitor was given up on.
func (x *exchange) stalled() bool { return x.stall != nil && x.stall.ended.Load() }

// Read implements io.Reader.
func (b *stallBody) Read(p []byte) (int, error) {
	if b.x.begun.Load() {
		return b.ReadCloser.Read(p)
	}
	for {
		b.deadlines.SetReadDeadline(time.Now().Add(b.x.web.s.limits.Stall)) // fails on a stream that has ended: so will the read
		n, err := b.ReadCloser.Read(p)
		b.deadlines.SetReadDeadline(time.Time{})
		if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) && !isNetTimeout(err) {
			return n, err
		}
		if !b.x.begun.Load() {
			b.ended.Store(true)
			return 0, os.ErrDeadlineExceeded
		}
	}
}
