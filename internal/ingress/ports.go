package ingress

import (
	"fmt"
	"iter"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"webgw.dev/webgw"
)

// portRetry is how often a port that could not be opened is tried again.
const portRetry = 30 * time.Second

// eachPort yields the public ports that an exposure takes.
func eachPort(e *webgw.Exposure) iter.Seq[uint16] {
	return func(yield func(uint16) bool) {
		r, ok := e.Ports()
		if !ok {
			return
		}
		for n := int(r.First); n <= int(r.Last); n++ {
			if !yield(uint16(n)) {
				return
			}
		}
	}
}

// inTheWay returns a route that has one of the exposure's ports, or nil.
func (t *Table) inTheWay(e *webgw.Exposure) *Route {
	for port := range eachPort(e) {
		if e.Protocol == webgw.UDP {
			if r := t.udp[port]; r != nil {
				return r
			}
			continue
		}
		if r := t.ports[port]; r != nil {
			return r
		}
		if h := t.shared[port]; h != nil {
			return h.any()
		}
	}
	return nil
}

// any returns one of the routes; nil if there is none.
func (h *hosts) any() *Route {
	for _, m := range []map[string]*Route{h.exact, h.wildcard} {
		for _, r := range m {
			return r
		}
	}
	return nil
}

// Port returns the route of a public TCP port that one exposure has for itself,
// or nil.
func (t *Table) Port(port uint16) *Route {
	if t == nil {
		return nil
	}
	return t.ports[port]
}

// Shared returns the route of a server name on a TCP port that several may
// share, or nil; and whether it is such a port.
func (t *Table) Shared(port uint16, name string) (r *Route, shared bool) {
	if t == nil || t.shared[port] == nil {
		return nil, false
	}
	return t.shared[port].find(webgw.NormalizeHost(name)), true
}

// UDP returns the route of a public UDP port, or nil.
func (t *Table) UDP(port uint16) *Route {
	if t == nil {
		return nil
	}
	return t.udp[port]
}

// opens reports whether the table has a use for a TCP port.
func (t *Table) opens(port uint16) bool { return t.ports[port] != nil || t.shared[port] != nil }

// above is how far a port lies above the exposure's first.
func (r *Route) above(port uint16) uint16 { return port - r.Exposure.Port }

// syncPortsLocked opens and closes TCP and UDP ports as the table says.
// Connections through a port that closes go on.
func (s *Server) syncPortsLocked() {
	t := s.table.Load()
	if t == nil {
		return
	}
	s.syncUDPLocked(t)
	for port := range s.ports {
		if !t.opens(port) {
			s.closePortLocked(port)
		}
	}
	clear(s.failed)
	for _, port := range slices.Sorted(maps.Keys(t.ports)) {
		s.openPortLocked(port)
	}
	for _, port := range slices.Sorted(maps.Keys(t.shared)) {
		s.openPortLocked(port)
	}
}

func (s *Server) openPortLocked(port uint16) {
	if s.ports[port] != nil {
		return
	}
	nl, err := s.Net.Listen(s.ctx, "tcp", net.JoinHostPort(s.BindHost, strconv.Itoa(int(port))))
	if err != nil {
		s.log.Error("port can't be opened", "port", port, "err", err)
		s.failed[port] = true
		return
	}
	l := &listener{nl, "tcp", func(v *visit) { s.serveTCP(v, port) }}
	s.ports[port] = l
	s.listeners.Go(func() { s.accept(l) })
}

func (s *Server) closePortLocked(port uint16) {
	if err := s.ports[port].Close(); err != nil {
		s.log.Warn("closing a port", "port", port, "err", err)
	}
	delete(s.ports, port)
}

// Unverified is the code of a problem: a workload could not prove, over TLS,
// that it is the right one.
const Unverified = "target_unverified"

// Problems returns the exposures with ports that could not be opened, and those
// with workloads that the last handshake did not verify.
func (s *Server) Problems() (problems []webgw.Problem) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.table.Load()
	if t == nil {
		return nil
	}
	for _, r := range t.routes {
		if p := r.Exposure.Policy; p != nil && s.Countries == nil && len(p.AllowCountries)+len(p.DenyCountries) > 0 {
			problems = append(problems, webgw.Problem{Exposure: r.Key, Code: NoCountries, Text: "this gateway has no country database, so that nobody is let in"})
		}
		if p := r.Exposure.Policy; p != nil && p.JWT != nil && p.JWT.Keys == "" {
			if why := s.issuer(p.JWT.Issuer).trouble(); why != nil {
				problems = append(problems, webgw.Problem{Exposure: r.Key, Code: IssuerUnavailable, Text: "the keys of " + p.JWT.Issuer + " can't be had: " + why.Error()})
			}
		}
		if p := r.Exposure.Policy; p != nil && p.OIDC != nil {
			if r.guard.ready(s).login.seal == nil {
				problems = append(problems, webgw.Problem{Exposure: r.Key, Code: SecretUnreadable, Text: "the secret of policy.oidc is not sealed to this gateway; webgw seal does that"})
			} else if why := s.issuer(p.OIDC.Issuer).trouble(); why != nil {
				problems = append(problems, webgw.Problem{Exposure: r.Key, Code: IssuerUnavailable, Text: p.OIDC.Issuer + " can't be asked: " + why.Error()})
			}
		}
		if r.Exposure.UpstreamTLS != nil {
			for _, target := range r.targets {
				if why := target.secure.trouble.Load(); why != nil {
					problems = append(problems, webgw.Problem{Exposure: r.Key, Code: Unverified, Text: target.String() + ": " + *why})
				}
			}
		}
		if r.Exposure.Port == 0 {
			continue
		}
		failed, what := s.failed, "port"
		if r.Exposure.Protocol == webgw.UDP {
			failed, what = s.failedUDP, "UDP port"
		}
		if which := among(failed, r.Exposure); which != "" {
			problems = append(problems, webgw.Problem{Exposure: r.Key, Code: string(webgw.Unavailable), Text: fmt.Sprintf("%s %s can't be opened on this gateway", what, which)})
		}
	}
	return problems
}

// among lists the ports of an exposure that have failed, "6000,6002-6004".
func among(failed map[uint16]bool, e *webgw.Exposure) string {
	var runs []webgw.PortRange
	for port := range eachPort(e) {
		switch n := len(runs); {
		case !failed[port]:
		case n > 0 && runs[n-1].Last == port-1:
			runs[n-1].Last = port
		default:
			runs = append(runs, webgw.PortRange{First: port, Last: port})
		}
	}
	var text []string
	for _, r := range runs[:min(len(runs), 10)] {
		text = append(text, r.String())
	}
	if len(runs) > len(text) {
		text = append(text, "…")
	}
	return strings.Join(text, ",")
}

// serveTCP serves a connection to a TCP port.
func (s *Server) serveTCP(v *visit, port uint16) {
	t := s.table.Load()
	if r := t.Port(port); r != nil {
		s.forward(v, r, v.early, "", r.above(port))
		return
	}
	head, name := v.early, v.asked
	if _, shared := t.Shared(port, ""); !shared { // withdrawn this very moment
		s.turnAway(v, reasonName, nil)
		return
	}
	if name == "" {
		seen, reason := sniffTLS(v.raw, v.early, v.since.Add(s.limits.Hello))
		if reason != "" {
			s.turnAway(v, reason, lastWord(s, v, reason))
			return
		}
		head, name = seen.head, webgw.NormalizeHost(seen.hello.ServerName)
	}
	r, _ := t.Shared(port, name)
	switch {
	case r != nil:
		s.forward(v, r, head, name, 0)
	case v.asked != "": // what is spoken here, nobody has looked
		s.turnAway(v, reasonName, nil)
	default:
		s.turnAway(v, reasonName, alert(alertUnrecognized))
	}
}
