package ingress

import (
	"cmp"
	"slices"
	"strings"
	"sync/atomic"

	"webgw.dev/webgw"
)

// Declared is an exposure as it comes into the routing table.
type Declared struct {
	Key      webgw.Key
	Exposure *webgw.Exposure // not changed afterwards
}

// Route is where a name or port leads.
type Route struct {
	Key      webgw.Key
	Exposure *webgw.Exposure

	// Handed on from table to table.
	owner   *tally
	use     *tally    // its own
	targets []*target // as in Exposure.Targets
	next    atomic.Uint32
	guard   *guard   // nil: no policy
	rules   *ruleset // nil: no rules. Else requests lead to the routes in it, and targets are those of all.
}

// Table is an immutable routing table. The zero Table routes nothing.
type Table struct {
	routes []*Route // one per exposure, by key
	http   hosts
	tls    hosts
	ports  map[uint16]*Route // TCP
	shared map[uint16]*hosts // TCP ports whose visitors name a host
	udp    map[uint16]*Route
	owners map[webgw.ID]*tally
}

// hosts finds a route by host name.
type hosts struct {
	exact    map[string]*Route
	wildcard map[string]*Route // by what follows "*."
}

// Build makes a table. When two exposures want the same thing, which the
// registry prevents, the one with the lower key has it and the other gets a
// problem. Exposures that this table has no use for are left out.
func Build(all []Declared) (*Table, []webgw.Problem) {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b Declared) int { return compareKeys(a.Key, b.Key) })
	t := &Table{ports: map[uint16]*Route{}, shared: map[uint16]*hosts{}, udp: map[uint16]*Route{}, owners: map[webgw.ID]*tally{}}
	var problems []webgw.Problem
	taken := func(d Declared, what string, by *Route) {
		problems = append(problems, webgw.Problem{Exposure: d.Key, Code: string(webgw.Taken), Text: what + " is held by " + by.Key.String()})
	}
	for _, d := range all {
		r := newRoute(t, d)
		switch d.Exposure.Protocol {
		case webgw.HTTP, webgw.TLS:
			h := &t.http
			if d.Exposure.Protocol == webgw.TLS {
				h = &t.tls
			}
			if port := d.Exposure.Port; port != 0 {
				if by := t.ports[port]; by != nil {
					taken(d, "the port", by)
					continue
				}
				if t.shared[port] == nil {
					t.shared[port] = &hosts{}
				}
				h = t.shared[port]
			}
			for _, name := range d.Exposure.Hosts {
				if by := h.add(name, r); by != nil {
					taken(d, name, by)
				}
			}
		case webgw.TCP, webgw.UDP:
			ports := t.ports
			if d.Exposure.Protocol == webgw.UDP {
				ports = t.udp
			}
			if by := t.inTheWay(d.Exposure); by != nil {
				taken(d, "the port", by)
				continue
			}
			for port := range eachPort(d.Exposure) {
				ports[port] = r
			}
		default:
			problems = append(problems, webgw.Problem{Exposure: d.Key, Code: string(webgw.Unsupported), Text: "this gateway does not know the protocol"})
			continue
		}
		t.routes = append(t.routes, r)
	}
	return t, problems
}

func compareKeys(a, b webgw.Key) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), a.Owner.Compare(b.Owner), cmp.Compare(a.Name, b.Name))
}

// add returns the route that has the name already, if it is another one's.
func (h *hosts) add(name string, r *Route) (by *Route) {
	if h.exact == nil {
		h.exact, h.wildcard = map[string]*Route{}, map[string]*Route{}
	}
	m := h.exact
	name, wild := strings.CutPrefix(webgw.NormalizeHost(name), "*.")
	if wild {
		m = h.wildcard
	}
	if by = m[name]; by == nil {
		m[name] = r
	} else if by == r {
		by = nil
	}
	return by
}

// find looks a normalized name up: exact before wildcard, which stands for
// exactly one label.
func (h *hosts) find(name string) *Route {
	if r := h.exact[name]; r != nil {
		return r
	}
	if label, rest, ok := strings.Cut(name, "."); ok && label != "" {
		return h.wildcard[rest]
	}
	return nil
}

// HTTP returns the route of a host name that visitors ask for in HTTP, or nil.
// The name is compared without regard to case and a trailing dot.
func (t *Table) HTTP(host string) *Route {
	if t == nil {
		return nil
	}
	return t.http.find(webgw.NormalizeHost(host))
}

// TLS returns the route of a server name on the TLS port, or nil. A name has
// one meaning there: of an exposure by tls, which is passed through, and one by
// http, which is terminated, the more exact name counts, and tls before http.
func (t *Table) TLS(name string) *Route {
	if t == nil {
		return nil
	}
	name = webgw.NormalizeHost(name)
	if r := t.tls.exact[name]; r != nil {
		return r
	}
	if r := t.http.exact[name]; r != nil {
		return r
	}
	if r := t.tls.find(name); r != nil {
		return r
	}
	return t.http.find(name)
}

// Terminates reports whether TLS for this name ends at the gateway: the only
// names for which it needs a certificate.
func (t *Table) Terminates(name string) bool {
	r := t.TLS(name)
	return r != nil && r.Exposure.Protocol == webgw.HTTP
}
