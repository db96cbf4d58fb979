// Package authdns answers DNS queries with authority for the zones of a
// gateway: from an immutable table of zones behind one atomic pointer, after
// the algorithm of RFC 1034, section 4.3.2. It never asks another server.
//
// It must not know what an exposure, a session or the registry is: addresses
// that change come from a Steer function that the gateway gives.
package authdns

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// typeALIAS stands for the pseudo type ALIAS inside a table; it is from the
// range for private use (RFC 6895, section 3.1) and never sent.
const typeALIAS = 65401

// Record is one record as a zone file would write it: "www.example.org",
// 300, "A", "192.0.2.1". Names are absolute, with or without the last dot.
type Record struct {
	Name string
	TTL  uint32 // seconds
	Type string // also ALIAS: the addresses of the name in Data
	Data string
}

// Steered is a name whose addresses are asked for with every query.
type Steered struct {
	Name  string // absolute; may be a wildcard
	Steer Steer
}

// Steer returns what a visitor from the network near should be given for
// name (lower case, absolute), best first. It is called for each query, by
// several goroutines, and must not wait.
type Steer func(name string, near netip.Prefix) Targets

// Targets are the addresses that carry a name now.
type Targets struct {
	Addrs []netip.Addr // IPv4 and IPv6, best first
	ALPN  []string     // for the HTTPS record; none: no HTTPS record
}

// Zone is what a table is built from. Records must hold one SOA and at least
// one NS at Name.
type Zone struct {
	Name    string
	Records []Record
	Steered []Steered
}

// Table is an immutable set of zones.
type Table struct {
	zones map[string]*zone // by canonical name
}

type zone struct {
	name   string
	labels int
	nodes  map[string]*node // by canonical name, empty non-terminals included
	soa    *dns.SOA         // with the TTL of negative answers (RFC 2308, section 5)
}

// node is a name in a zone; one without sets and steer is an empty
// non-terminal.
type node struct {
	sets  [][]dns.RR // each of one type
	steer Steer
}

func (n *node) set(t uint16) []dns.RR {
	for _, s := range n.sets {
		if s[0].Header().Rrtype == t {
			return s
		}
	}
	return nil
}

// NewTable builds a table, or says all that is wrong with the zones.
func NewTable(zones []Zone) (*Table, error) {
	t := &Table{zones: make(map[string]*zone, len(zones))}
	var errs []error
	for _, in := range zones {
		z, err := newZone(in)
		if err != nil {
			errs = append(errs, fmt.Errorf("zone %q: %w", in.Name, err))
			continue
		}
		if t.zones[z.name] != nil {
			errs = append(errs, fmt.Errorf("zone %q: given twice", in.Name))
		}
		t.zones[z.name] = z
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return t, nil
}

func newZone(in Zone) (*zone, error) {
	name, err := canonical(in.Name)
	if err != nil {
		return nil, err
	}
	z := &zone{name: name, labels: dns.CountLabel(name), nodes: map[string]*node{}}
	var errs []error
	for _, r := range in.Records {
		if err := z.add(r); err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", r.Name, r.Type, err))
		}
	}
	for _, s := range in.Steered {
		if err := z.addSteered(s); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.Name, err))
		}
	}
	for name, n := range z.nodes {
		if err := z.check(name, n); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	apex := z.nodes[name]
	switch {
	case apex == nil || len(apex.set(dns.TypeSOA)) != 1:
		errs = append(errs, errors.New("one SOA is needed at its top"))
	case apex.set(dns.TypeNS) == nil:
		errs = append(errs, errors.New("an NS is needed at its top"))
	default:
		z.soa = dns.Copy(apex.set(dns.TypeSOA)[0]).(*dns.SOA)
		z.soa.Hdr.Ttl = min(z.soa.Hdr.Ttl, z.soa.Minttl)
	}
	return z, errors.Join(errs...)
}

// node returns the node of name, which it makes together with the empty
// non-terminals above it.
func (z *zone) node(name string) (*node, error) {
	if !dns.IsSubDomain(z.name, name) {
		return nil, errors.New("outside the zone")
	}
	n := z.nodes[name]
	if n == nil {
		n = &node{}
		z.nodes[name] = n
		for up := name; up != z.name; {
			up = parent(up)
			if z.nodes[up] != nil {
				break
			}
			z.nodes[up] = &node{}
		}
	}
	return n, nil
}

func (z *zone) add(r Record) error {
	rr, err := parse(r)
	if err != nil {
		return err
	}
	n, err := z.node(rr.Header().Name)
	if err != nil {
		return err
	}
	for i, s := range n.sets {
		if s[0].Header().Rrtype != rr.Header().Rrtype {
			continue
		}
		// The TTLs of a set are equal (RFC 2181, section 5.2): the lowest.
		ttl := min(s[0].Header().Ttl, rr.Header().Ttl)
		rr.Header().Ttl = ttl
		dup := false
		for _, o := range s {
			o.Header().Ttl = ttl
			dup = dup || dns.IsDuplicate(o, rr)
		}
		if !dup {
			n.sets[i] = append(s, rr)
		}
		return nil
	}
	n.sets = append(n.sets, []dns.RR{rr})
	return nil
}

func (z *zone) addSteered(s Steered) error {
	if s.Steer == nil {
		return errors.New("steered by nothing")
	}
	name, err := canonical(s.Name)
	if err != nil {
		return err
	}
	n, err := z.node(name)
	if err != nil {
		return err
	}
	if n.steer != nil {
		return errors.New("steered twice")
	}
	n.steer = s.Steer
	return nil
}

func (z *zone) check(name string, n *node) error {
	for _, single := range []uint16{dns.TypeCNAME, typeALIAS, dns.TypeSOA} {
		if len(n.set(single)) > 1 {
			return errors.New("more than one " + typeName(single))
		}
	}
	addresses := n.set(dns.TypeA) != nil || n.set(dns.TypeAAAA) != nil
	switch {
	case n.set(dns.TypeCNAME) != nil && (len(n.sets) > 1 || n.steer != nil):
		return errors.New("a CNAME stands alone (RFC 1034, section 3.6.2)")
	case n.set(typeALIAS) != nil && (addresses || n.steer != nil):
		return errors.New("an ALIAS beside addresses")
	case n.steer != nil && (addresses || n.set(dns.TypeHTTPS) != nil):
		return errors.New("a steered name with addresses or HTTPS of its own")
	case name != z.name && n.set(dns.TypeSOA) != nil:
		return errors.New("a SOA below the top of the zone")
	case name != z.name && n.set(dns.TypeNS) != nil && n.steer != nil:
		return errors.New("a steered name is delegated")
	case strings.HasPrefix(name, "*.") && n.set(dns.TypeNS) != nil:
		return errors.New("a wildcard can't be delegated (RFC 4592, section 4.2)")
	}
	return nil
}

func typeName(t uint16) string {
	if t == typeALIAS {
		return "ALIAS"
	}
	return dns.TypeToString[t]
}

func parse(r Record) (dns.RR, error) {
	name, err := canonical(r.Name)
	if err != nil {
		return nil, err
	}
	typ := strings.ToUpper(r.Type)
	switch typ {
	case "A", "AAAA", "ALIAS", "CAA", "CNAME", "DS", "HTTPS", "MX", "NS", "PTR", "SOA", "SRV", "SVCB", "TXT":
	default:
		// DNAME is refused on purpose, and so is what DNSSEC makes by itself.
		return nil, errors.New("this type of record can't be added")
	}
	if typ == "ALIAS" {
		target, err := canonical(r.Data)
		if err != nil {
			return nil, err
		}
		return &dns.CNAME{Hdr: dns.RR_Header{Name: name, Rrtype: typeALIAS, Class: dns.ClassINET, Ttl: r.TTL}, Target: target}, nil
	}
	if strings.ContainsAny(r.Data, "\r\n") {
		return nil, errors.New("more than one line")
	}
	// The owner is put in afterwards: it must not be able to hold syntax.
	rr, err := dns.NewRR(fmt.Sprintf(". %d IN %s %s", r.TTL, typ, r.Data))
	if err != nil {
		return nil, err
	}
	if rr == nil || dns.TypeToString[rr.Header().Rrtype] != typ {
		return nil, errors.New("no data")
	}
	rr.Header().Name = name
	// What can't be packed would fail with each answer.
	if _, err := dns.PackRR(rr, make([]byte, 65535), 0, nil, false); err != nil {
		return nil, err
	}
	return rr, nil
}

// canonical returns name absolute, in lower case and with the escapes that
// unpacking a message gives, so that equal names are equal strings.
func canonical(name string) (string, error) {
	if name == "" {
		return "", errors.New("an empty name")
	}
	buf := make([]byte, 256)
	if _, err := dns.PackDomainName(dns.Fqdn(name), buf, 0, nil, false); err != nil {
		return "", fmt.Errorf("not a domain name: %w", err)
	}
	name, _, err := dns.UnpackDomainName(buf, 0)
	if err != nil {
		return "", fmt.Errorf("not a domain name: %w", err)
	}
	return dns.CanonicalName(name), nil
}

// parent returns the name above name; the root's is the root.
func parent(name string) string {
	if i, end := dns.NextLabel(name, 0); !end {
		return name[i:]
	}
	return "."
}
