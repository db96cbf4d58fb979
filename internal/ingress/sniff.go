package ingress

import (
	"errors"
	"net"
	"os"
	"time"

	"webgw.dev/webgw/internal/netx"
)

// sniffed is what the first bytes of a connection show. head holds them all;
// nobody else has to read them again.
type sniffed struct {
	hello Hello
	head  []byte
}

// Why a connection was turned away: the values of a metric's label.
const (
	reasonSilent   = "silent"      // closed or timed out before the first byte
	reasonSlow     = "slow"        // began, and did not get through in time
	reasonGone     = "gone"        // closed by the visitor half-way
	reasonPlain    = "http"        // plain HTTP on the TLS port
	reasonTLS      = "tls"         // TLS on the HTTP port
	reasonGarbage  = "garbage"     // neither
	reasonHello    = "hello"       // malformed ClientHello
	reasonLarge    = "too_large"   // ClientHello over the cap
	reasonName     = "no_route"    // nothing is exposed there
	reasonTotal    = "connections" // limits
	reasonAddress  = "address"
	reasonOwner    = "owner"
	reasonExposure = "exposure"
	reasonCert     = "certificate" // none for the name
	reasonTLSFail  = "handshake"
	reasonProxy    = "proxy_header" // malformed, from a trusted balancer
)

// peek waits for the first bytes of c until the deadline and gives them to
// enough until that says that there are. No buffer is held for a visitor who
// is silent. head was read before. What was read is returned in any case; reason
// tells, when it is not enough, why.
func peek(c net.Conn, head []byte, deadline time.Time, most int, enough func(head []byte) bool) (all []byte, reason string) {
	if len(head) > 0 && enough(head) {
		return head, ""
	}
	if c.SetReadDeadline(deadline) != nil {
		return nil, reasonGone
	}
	src := netx.NewSource(c)
	for {
		b, err := src.Next()
		switch {
		case err == nil:
		case len(head) == 0:
			return nil, reasonSilent
		case errors.Is(err, os.ErrDeadlineExceeded):
			return head, reasonSlow
		default:
			return head, reasonGone
		}
		head = append(head, b.Bytes()...)
		b.Return()
		if enough(head) {
			break
		}
		if len(head) > most {
			return head, reasonLarge
		}
	}
	if c.SetReadDeadline(time.Time{}) != nil {
		return head, reasonGone
	}
	return head, ""
}

// sniffTLS reads the ClientHello.
func sniffTLS(c net.Conn, early []byte, deadline time.Time) (s sniffed, reason string) {
	var r helloReader
	var bad error
	s.head, reason = peek(c, early, deadline, maxHello, func(head []byte) (done bool) {
		s.hello, done, bad = r.feed(head)
		return done || bad != nil
	})
	switch {
	case reason != "":
	case errors.Is(bad, errHelloLarge):
		reason = reasonLarge
	case errors.Is(bad, errBadHello):
		reason = reasonHello
	case bad != nil && looksLikeHTTP(s.head):
		reason = reasonPlain
	case bad != nil:
		reason = reasonGarbage
	}
	return s, reason
}

// sniffHTTP waits for the first bytes of a request; the rest is http1's.
func sniffHTTP(c net.Conn, early []byte, deadline time.Time) (head []byte, reason string) {
	head, reason = peek(c, early, deadline, maxHead, func(head []byte) bool { return len(head) > 0 })
	switch {
	case reason != "":
	case head[0] == recordHandshake:
		reason = reasonTLS
	case !looksLikeHTTP(head):
		reason = reasonGarbage
	}
	return head, reason
}

// looksLikeHTTP reports whether head begins with a letter, as methods do. What
// the request is worth is the parser's to say.
func looksLikeHTTP(head []byte) bool {
	return len(head) > 0 && (head[0]|0x20 >= 'a' && head[0]|0x20 <= 'z' || head[0] == '\r')
}

// alert is a fatal alert (RFC 8446 section 6) as a plain record.
func alert(description byte) []byte { return []byte{21, 3, 3, 0, 2, 2, description} }

const (
	alertUnexpected   = 10
	alertDecode       = 50
	alertUnrecognized = 112 // unrecognized_name, RFC 6066 section 3
)

// Closing a socket with unread bytes sends a reset, which may overtake what
// was said: so they are read for a moment.
const (
	partingTime  = time.Second
	partingBytes = 64 << 10
)

// part says a last word and closes.
func part(c net.Conn, word []byte) {
	defer c.Close()
	if c.SetDeadline(time.Now().Add(partingTime)) != nil {
		return
	}
	if _, err := c.Write(word); err != nil || netx.CloseWrite(c) != nil {
		return
	}
	src := netx.NewSource(c)
	for n := 0; n < partingBytes; {
		b, err := src.Next()
		if err != nil {
			return
		}
		n += len(b.Bytes())
		b.Return()
	}
}
