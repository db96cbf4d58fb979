package ingress

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"webgw.dev/webgw"
)

// isForwardingField reports whether a field, by its canonical name, tells who
// the visitor is or how it came: the gateway alone says that. CGI makes one
// variable of "_" and "-".
func isForwardingField(name string) bool {
	switch name {
	case "Forwarded", "X-Real-Ip", "X-Client-Ip", "X-Cluster-Client-Ip", "True-Client-Ip", "X-Request-Id", "X-Original-Url", "X-Rewrite-Url",
		"Client-Cert", "Client-Cert-Chain": // RFC 9440
		return true
	}
	return strings.HasPrefix(name, "X-Forwarded-") || strings.HasPrefix(name, "Webgw-")
}

// isDroppedField reports whether a field goes no further than the gateway.
func isDroppedField(name string) bool {
	switch name {
	case "Proxy", // becomes HTTP_PROXY in CGI: httpoxy, CVE-2016-5385
		"Http2-Settings":
		return true
	}
	if strings.Contains(name, "_") {
		name = http.CanonicalHeaderKey(strings.ReplaceAll(name, "_", "-"))
		return isForwardingField(name) || isFramingField(name)
	}
	return isForwardingField(name)
}

// rewrite makes the request to the workload. The proxy has removed hop-by-hop
// fields already, so that what is set here stands.
func rewrite(pr *httputil.ProxyRequest) {
	x := pr.In.Context().Value(exchangeKey{}).(*exchange)
	out := pr.Out
	for name := range out.Header {
		if isDroppedField(name) {
			delete(out.Header, name)
		}
	}
	for name := range out.Trailer {
		if isDroppedField(name) {
			delete(out.Trailer, name)
		}
	}
	if !x.upgrade || hasToken(pr.In.Header.Get("Upgrade"), "h2c") {
		out.Header.Del("Upgrade")
		out.Header.Del("Connection")
	}
	out.URL.Scheme, out.URL.Host, out.URL.User = "http", "workload", nil
	if x.route.Exposure.UpstreamTLS != nil {
		out.URL.Scheme = "https"
	}
	out.URL.RawQuery = pr.In.URL.RawQuery // as it is: a workload may read it in its own way
	out.Host = pr.In.Host
	delete(out.Header, "Host")

	for _, f := range x.forwarded() {
		out.Header.Set(f[0], f[1])
	}
	for _, f := range x.ruled.extra() {
		out.Header.Set(f[0], f[1])
	}
}

// forwarded is what the gateway says of the visitor, as fields.
func (x *exchange) forwarded() [6][2]string {
	proto := "http"
	if x.conn.tls {
		proto = "https"
	}
	c, host := x.conn.c, x.askedHost()
	c.naming.Do(func() {
		addr := c.v.visitor.Addr()
		c.from, c.node, c.port = addr.String(), forwardedNode(addr), strconv.Itoa(int(c.v.local.Port()))
	})
	return [...][2]string{
		{"X-Forwarded-For", c.from},
		{"X-Forwarded-Host", host},
		{"X-Forwarded-Proto", proto},
		{"X-Forwarded-Port", c.port},
		{"Forwarded", "for=" + c.node + ";host=" + quoted(host) + ";proto=" + proto},
		{"X-Request-Id", x.id},
	}
}

// forwardedNode writes an address as RFC 7239 section 6 wants it.
func forwardedNode(a netip.Addr) string {
	if a.Is6() {
		return `"[` + a.String() + `]"`
	}
	return a.String()
}

// quoted writes a host as a token, or as a quoted string if it is none.
func quoted(host string) string {
	if isToken(host) {
		return host
	}
	return `"` + host + `"` // isAuthority lets nothing in that would have to be escaped
}

func modifyResponse(res *http.Response) error {
	x := res.Request.Context().Value(exchangeKey{}).(*exchange)
	if res.StatusCode != http.StatusSwitchingProtocols {
		if err := x.limitAnswer(res); err != nil {
			return err
		}
	}
	x.empty = res.ContentLength == 0
	for name := range res.Header {
		if strings.HasPrefix(name, "Webgw-") {
			delete(res.Header, name)
		}
	}
	res.Header.Set("X-Request-Id", x.id) // by which the visitor can ask for help
	return nil
}

// failed answers a request that got no answer from a workload.
func (x *exchange) failed(err error) {
	x.err = err
	if x.hijacked != nil {
		return // nobody is there to be told
	}
	if x.ruled.tooLarge() {
		x.web.s.metrics.refused(reasonBody)
		x.answer(&bodyTooLarge)
		return
	}
	if x.stalled() {
		x.answer(&requestTimeout)
		return
	}
	if h := x.conn.http1; h != nil {
		if p := h.Refusal(); p != nil {
			x.answer(p)
			return
		}
	}
	if err == errAnswerTooLarge {
		x.web.s.metrics.refused(reasonAnswer)
		x.answer(&answerLarge)
		return
	}
	if x.late() {
		x.web.s.metrics.refused(reasonTime)
		x.answer(&outOfTime)
		return
	}
	if x.ctx.Err() != nil && x.web.s.ctx.Err() == nil {
		panic(http.ErrAbortHandler) // the visitor is gone
	}
	var open *openError
	p := &brokenPage
	switch {
	case errors.As(err, &open) && open.unproven:
		p = &unprovenPage
	case isTimeout(err) || isNetTimeout(err):
		p = &noAnswer
	case open != nil && !open.refused:
		p = &noTarget
	case open != nil || isRefusal(err):
		p = &refusedPage
	}
	x.web.s.log.Info("request got no answer", "exposure", x.route.Key.String(), "request", x.id, "err", err)
	x.answer(p)
}

func isNetTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// RoundTrip sends a request over HTTP/2 to the targets of its route, one after
// the other as long as none can have had any of it.
func (w *web) RoundTrip(r *http.Request) (*http.Response, error) {
	x := r.Context().Value(exchangeKey{}).(*exchange)
	turn := x.route.turn()
	var last error
	for t := turn.pick(time.Now()); t != nil; t = turn.pick(time.Now()) {
		x.target = t
		body := &attempt{from: r.Body, x: x}
		try := r.WithContext(r.Context())
		if r.Body != nil {
			try.Body = body
			body.trailer, body.fields = try.Trailer, x.in.Trailer
		}
		res, err := w.transport(t).RoundTrip(try)
		if err == nil {
			t.worked()
			return res, nil
		}
		if r.Context().Err() != nil || !neverHad(err) {
			return nil, err
		}
		if _, ok := errors.AsType[*openError](err); !ok {
			t.failed(time.Now()) // refused late; open has counted the others
		}
		last = err
		if !body.stop() {
			break // some of the body is gone
		}
	}
	return nil, last
}

// neverHad reports whether the workload can't have had the request.
func neverHad(err error) bool {
	_, open := errors.AsType[*openError](err)
	return open || isRefusal(err)
}

// overH2C decides how the workload is spoken to.
func overH2C(u webgw.Upstream, r *http.Request) bool {
	switch u {
	case webgw.UpstreamH2C, webgw.UpstreamH2:
		return true
	case webgw.UpstreamHTTP1:
		return false
	}
	kind := r.Header.Get("Content-Type")
	return r.ProtoMajor >= 2 && (kind == "application/grpc" || strings.HasPrefix(kind, "application/grpc+") || strings.HasPrefix(kind, "application/grpc;"))
}

// attempt is the request's body during one attempt to send it. Closing it
// leaves the visitor's body alone.
type attempt struct {
	from    io.ReadCloser
	x       *exchange
	state   atomic.Int32
	trailer http.Header // of the outgoing request: announced names, to be filled
	fields  http.Header // of the visitor's request
}

const (
	attemptFresh int32 = iota
	attemptBegun
	attemptOver
)

func (a *attempt) Read(p []byte) (int, error) {
	if !a.state.CompareAndSwap(attemptFresh, attemptBegun) && a.state.Load() == attemptOver {
		return 0, http.ErrBodyReadAfterClose
	}
	n, err := a.from.Read(p)
	a.x.read.Add(int64(n))
	if err == io.EOF {
		for name := range a.trailer {
			a.trailer[name] = a.fields[name]
		}
	}
	return n, err
}

func (a *attempt) Close() error { return nil }

// stop ends the attempt; false if some of the body may have been read.
func (a *attempt) stop() bool {
	return a.from == nil || a.state.CompareAndSwap(attemptFresh, attemptOver)
}

// Of HTTP/2 to workloads.
const (
	upstreamPing   = 30 * time.Second
	upstreamPinged = 15 * time.Second
)

// transport returns the target's transport for HTTP/2, whose connections are
// streams to it. It lives as long as the target stands in the table, and by its
// idle connections a little longer.
func (w *web) transport(t *target) *http.Transport {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.h2c != nil {
		return t.h2c
	}
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	protocols.SetHTTP2(true)
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		stream, err := w.openHTTP(ctx.Value(exchangeKey{}).(*exchange), t, true, "h2")
		if err != nil {
			return nil, err
		}
		if s, ok := stream.(*securedStream); ok {
			return s.Conn, nil // by whose type the transport knows that it may speak HTTP/2
		}
		return stream, nil
	}
	t.h2c = &http.Transport{
		DialContext:            dial,
		DialTLSContext:         dial,
		Protocols:              &protocols,
		DisableCompression:     true,
		IdleConnTimeout:        upstreamIdle,
		ResponseHeaderTimeout:  w.s.limits.Answer,
		MaxResponseHeaderBytes: maxAnswerHead,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: upstreamPing, PingTimeout: upstreamPinged},
	}
	return t.h2c
}
