package ingress

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// An Accept that fails (EMFILE, ECONNABORTED, …) is tried again after a pause
// between these: the shortage passes when connections end.
const (
	acceptPauseMin = 5 * time.Millisecond
	acceptPauseMax = time.Second
)

// listener is one open port and what is spoken there.
type listener struct {
	net.Listener
	speaks string // "http", "tls" or "tcp": label of a metric
	serve  func(*visit)
}

// visit is one accepted connection.
type visit struct {
	server  *Server
	raw     net.Conn // as accepted: never wrapped, so that the kernel may splice
	visitor netip.AddrPort
	local   netip.AddrPort
	since   time.Time
	early   []byte // read already, behind a PROXY header
	trusted bool   // comes by a balancer whose PROXY header is believed
	asked   string // the host that its PROXY header says the visitor asked for, normalized; "": it does not say
	counted bool   // against the limits, under the shard's lock
	held    *Route // it counts against; set before it is served
	gone    atomic.Bool
	joint   atomic.Pointer[Stream]    // that it is joined with
	paced   atomic.Pointer[pacedConn] // raw, if limits on bandwidth bound it
	passes  *passage                  // counts against its route
}

// cut ends the connection at once, whatever it is doing.
func (v *visit) cut() {
	netx.Reset(v.raw)
	if c := v.paced.Load(); c != nil {
		c.Close() // wakes who waits; an error means that it is closed
	}
	if s := v.joint.Load(); s != nil {
		(*s).Cut()
	}
}

// Listen opens the HTTP and TLS ports, and those TCP ports of the table that
// can be had. Visitors are served from then on; Run must follow.
func (s *Server) Listen(ctx context.Context) error {
	s.setup()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bound {
		return nil
	}
	if s.stopping {
		return &webgw.Error{Op: "listen", Kind: webgw.Unavailable, Public: "the gateway is stopping"}
	}
	for _, f := range []struct {
		addr, speaks string
		serve        func(*visit)
	}{{s.HTTPAddr, "http", s.serveHTTP}, {s.TLSAddr, "tls", s.serveTLS}} {
		if f.addr == "" {
			continue
		}
		l, err := s.Net.Listen(ctx, "tcp", f.addr)
		if err != nil {
			for _, open := range s.fixed {
				open.Close()
			}
			s.fixed = nil
			return &webgw.Error{Op: "listen", Kind: webgw.Unavailable, Public: fmt.Sprintf("the %s port %s can't be opened", f.speaks, f.addr),
				Hint: "is another server running there, or is a privilege missing?", Err: err}
		}
		s.fixed = append(s.fixed, &listener{l, f.speaks, f.serve})
	}
	s.bound = true
	for _, l := range s.fixed {
		s.listeners.Go(func() { s.accept(l) })
		if s.QUIC && l.speaks == "tls" {
			s.startQUICLocked(l)
		}
	}
	s.syncPortsLocked()
	return nil
}

// Addrs returns where the server listens: the HTTP port, the TLS port, then
// TCP ports and UDP ports in order.
func (s *Server) Addrs() (addrs []net.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.fixed {
		addrs = append(addrs, l.Addr())
	}
	for _, p := range slices.Sorted(maps.Keys(s.ports)) {
		addrs = append(addrs, s.ports[p].Addr())
	}
	for _, p := range slices.Sorted(maps.Keys(s.udp)) {
		addrs = append(addrs, s.udp[p].conn.LocalAddr())
	}
	return addrs
}

// accept takes in connections until the listener is closed.
func (s *Server) accept(l *listener) {
	var pause time.Duration
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.metrics.acceptErrors.Inc()
			pause = min(max(2*pause, acceptPauseMin), acceptPauseMax)
			s.log.Warn("accept failed; trying again", "port", l.Addr(), "pause", pause, "err", err)
			select {
			case <-time.After(pause):
				continue
			case <-s.ctx.Done():
				return
			}
		}
		pause = 0
		s.metrics.accepted.WithLabelValues(l.speaks).Inc()
		v := &visit{server: s, raw: c, visitor: addrPort(c.RemoteAddr()), local: addrPort(c.LocalAddr()), since: time.Now()}
		v.trusted = s.trusts(v.visitor.Addr())
		if reason := s.doors.enter(v, &s.limits); reason != "" {
			s.metrics.refused(reason)
			netx.Reset(c)
			continue
		}
		s.visits.Add(1)
		go s.serve(l, v)
	}
}

// serve runs the corridor for one connection.
func (s *Server) serve(l *listener, v *visit) {
	defer s.mourn(v)
	if v.trusted {
		if reason := s.heed(v); reason != "" {
			s.turnAway(v, reason, nil)
			return
		}
	}
	l.serve(v)
}

// mourn is deferred by whoever serves v: a bug there ends that connection
// loudly, not the gateway.
func (s *Server) mourn(v *visit) {
	if p := recover(); p != nil {
		s.metrics.panics.Inc()
		s.log.Error("connection panicked", "err", p, "stack", string(debug.Stack()))
		netx.Reset(v.raw)
		v.leave()
	}
}

// leave takes the visit off the books, once; its connection is closed.
func (v *visit) leave() {
	if v.gone.CompareAndSwap(false, true) {
		v.unhold()
		if v.passes != nil {
			v.passes.release()
		}
		v.server.doors.leave(v)
		v.server.visits.Done()
	}
}

// addrPort returns the address as visitors know it: IPv4 never mapped.
func addrPort(a net.Addr) netip.AddrPort {
	var p netip.AddrPort
	if t, ok := a.(*net.TCPAddr); ok {
		p = t.AddrPort()
	} else if q, err := netip.ParseAddrPort(a.String()); err == nil {
		p = q
	}
	return netip.AddrPortFrom(p.Addr().Unmap().WithZone(""), p.Port())
}

// serveTLS serves a connection to the TLS port.
func (s *Server) serveTLS(v *visit) {
	deadline := v.since.Add(s.limits.Hello)
	seen, reason := sniffTLS(v.raw, v.early, deadline)
	if reason != "" {
		s.turnAway(v, reason, lastWord(s, v, reason))
		return
	}
	for _, p := range seen.hello.ALPN {
		if h := s.Handlers[p]; h != nil {
			s.doors.uncount(v)
			defer v.leave()
			h(s.ctx, v.raw, seen.head)
			return
		}
	}
	t := s.table.Load()
	r := t.TLS(seen.hello.ServerName)
	if r == nil && seen.hello.ServerName != "" {
		r = s.otherwise(t)
	}
	switch {
	case r == nil:
		s.turnAway(v, reasonName, alert(alertUnrecognized))
	case r.Exposure.Protocol == webgw.TLS:
		s.forward(v, r, seen.head, webgw.NormalizeHost(seen.hello.ServerName), 0)
	case s.hurries(v, r):
		s.turnAway(v, reasonRate, nil)
	case s.Certificates == nil:
		s.turnAway(v, reasonCert, alert(alertUnrecognized))
	default:
		s.web.terminate(v, r, seen, deadline)
	}
}

// serveHTTP serves a connection to the HTTP port.
func (s *Server) serveHTTP(v *visit) {
	head, reason := sniffHTTP(v.raw, v.early, v.since.Add(s.limits.Hello))
	if reason != "" {
		s.turnAway(v, reason, lastWord(s, v, reason))
		return
	}
	s.web.take(v, head)
}

// turnAway ends a connection that leads nowhere, with a last word if there is one.
func (s *Server) turnAway(v *visit, reason string, word []byte) {
	defer v.leave()
	s.metrics.refused(reason)
	if word == nil {
		netx.Reset(v.raw)
		return
	}
	part(v.raw, word)
}

// lastWord is what a visitor is told whose first bytes make no sense here.
func lastWord(s *Server, v *visit, reason string) []byte {
	switch reason {
	case reasonPlain:
		return s.rawPage(v, plainOnTLS)
	case reasonTLS:
		return alert(alertUnexpected)
	case reasonHello, reasonLarge:
		return alert(alertDecode)
	}
	return nil
}
