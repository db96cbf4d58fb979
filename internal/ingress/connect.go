package ingress

import (
	"fmt"
	"net/http"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// connects reports whether a CONNECT (RFC 9110 section 9.3.6) may lead to the
// route. Whatever port it names, it leads to the exposure's own targets, and
// never anywhere else.
func (r *Route) connects() bool { return r != nil && r.Exposure.Connect }

// isConnect reports whether the request is a CONNECT. Over HTTP/2 and HTTP/3 it
// means something else to most who send it (RFC 8441), and is not for this.
func (x *exchange) isConnect() bool {
	return x.in.Method == http.MethodConnect && x.conn.http1 != nil
}

// credentials lets clients identify themselves as they do to proxies, which is
// what they take the gateway for.
func (x *exchange) credentials() {
	h := x.in.Header
	if v := h["Proxy-Authorization"]; len(v) > 0 && len(h["Authorization"]) == 0 {
		h["Authorization"] = v
	}
}

// connect relays the visitor's bytes and a target's, after a CONNECT, until
// both directions have ended.
func (x *exchange) connect() {
	s, v := x.web.s, x.conn.c.v
	from := Origin{Visitor: v.visitor, Local: v.local, Host: x.host, Protocol: webgw.HTTP, Prompt: true}
	var stream Stream
	err := error(&webgw.Error{Op: "open stream", Kind: webgw.Unavailable, Public: "no target is left to try"})
	turn := x.route.turn()
	for t := turn.pick(time.Now()); t != nil && x.ctx.Err() == nil; t = turn.pick(time.Now()) {
		x.target = t
		if stream, err = s.open(x.ctx, x.route, t, from); err == nil {
			t.worked()
			break
		}
	}
	if err != nil {
		x.failed(err)
		return
	}
	defer stream.Close()
	visitor, rw, err := x.Hijack()
	if err != nil {
		x.err = err
		panic(http.ErrAbortHandler)
	}
	defer visitor.Close()
	x.status = http.StatusOK
	fmt.Fprintf(rw, "HTTP/1.1 200 OK\r\nX-Request-Id: %s\r\n\r\n", x.id) // a bufio.Writer keeps its first error for Flush
	if x.err = rw.Flush(); x.err != nil {
		return
	}
	early, err := rw.Reader.Peek(rw.Reader.Buffered())
	if err != nil {
		x.err = err
		return
	}
	defer x.watchTime()()
	_, _, x.err = netx.Join(x.paceUpgraded(visitor), stream, early)
}
