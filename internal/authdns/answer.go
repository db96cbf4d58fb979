package authdns

import (
	"net"
	"net/netip"
	"sync/atomic"

	"github.com/miekg/dns"
)

const (
	maxUDP     = 1232 // bytes of an answer by UDP that is not fragmented anywhere
	maxChain   = 8    // CNAMEs followed for one answer
	steeredTTL = 30   // seconds
)

// Server answers queries from its table.
type Server struct {
	NSID string // name of this server for who asks (RFC 5001); empty: none

	table atomic.Pointer[Table]
}

// SetTable makes t the table of all queries that come from now on.
func (s *Server) SetTable(t *Table) { s.table.Store(t) }

// Answer returns the answer to the packed query from a resolver, or nil if it
// deserves none. By UDP (not stream) it is truncated to what the resolver
// takes, at most 1232 bytes.
func (s *Server) Answer(query []byte, from netip.Addr, stream bool) []byte {
	if len(query) < 12 || query[2]&0x80 != 0 { // no header, or an answer: two servers must not talk for ever
		return nil
	}
	if query[2]>>3&15 != dns.OpcodeQuery {
		return refuse(query, dns.RcodeNotImplemented)
	}
	var q dns.Msg
	// QDCOUNT other than 1: RFC 9619.
	if err := q.Unpack(query); err != nil || len(q.Question) != 1 || len(q.Answer) != 0 || len(q.Ns) != 0 {
		return refuse(query, dns.RcodeFormatError)
	}
	m := new(dns.Msg)
	m.SetReply(&q)
	m.CheckingDisabled = false // nothing here validates
	m.Compress = true
	size := 512
	near := prefixOf(from)
	var opt, ropt *dns.OPT
	for _, rr := range q.Extra {
		o, ok := rr.(*dns.OPT)
		if !ok {
			continue
		}
		if opt != nil || o.Hdr.Name != "." { // RFC 6891, section 6.1.1
			return refuse(query, dns.RcodeFormatError)
		}
		opt = o
	}
	var subnet *dns.EDNS0_SUBNET
	if opt != nil {
		size = min(max(512, int(opt.UDPSize())), maxUDP)
		ropt = &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		ropt.SetUDPSize(maxUDP)
		ropt.SetDo(opt.Do())
		m.Extra = append(m.Extra, ropt)
		if opt.Version() != 0 {
			m.Rcode = dns.RcodeBadVers
			return pack(m, query)
		}
		for _, o := range opt.Option {
			switch o := o.(type) {
			case *dns.EDNS0_NSID:
				if s.NSID != "" {
					ropt.Option = append(ropt.Option, &dns.EDNS0_NSID{Code: dns.EDNS0NSID, Nsid: hexOf(s.NSID)})
				}
			case *dns.EDNS0_SUBNET:
				p, ok := subnetOf(o)
				if !ok || subnet != nil {
					return refuse(query, dns.RcodeFormatError)
				}
				e := *o
				e.SourceScope = 0
				subnet = &e
				ropt.Option = append(ropt.Option, subnet)
				if p.IsValid() {
					near = p
				}
			}
		}
	}
	a := answer{table: s.table.Load(), m: m, near: near}
	a.resolve(q.Question[0])
	if subnet != nil && a.steered {
		subnet.SourceScope = subnet.SourceNetmask
	}
	if stream {
		size = dns.MaxMsgSize
	}
	m.Truncate(size)
	return pack(m, query)
}

// refuse answers with the header alone.
func refuse(query []byte, rcode int) []byte {
	out := make([]byte, 12)
	copy(out, query[:2])
	out[2] = 0x80 | query[2]&0x79 // QR, opcode, RD
	out[3] = byte(rcode)
	return out
}

func pack(m *dns.Msg, query []byte) []byte {
	out, err := m.Pack()
	if err != nil {
		return refuse(query, dns.RcodeServerFailure)
	}
	return out
}

type answer struct {
	table   *Table
	m       *dns.Msg
	near    netip.Prefix
	steered bool // an answer that depends on near
	inAlias bool // looking for the addresses of an ALIAS
}

// zoneOf returns the lowest zone that name lies in.
func (t *Table) zoneOf(name string) *zone {
	if t == nil {
		return nil
	}
	for {
		if z := t.zones[name]; z != nil {
			return z
		}
		if name == "." {
			return nil
		}
		name = parent(name)
	}
}

func (a *answer) resolve(q dns.Question) {
	switch {
	case q.Qtype == dns.TypeOPT:
		a.m.Rcode = dns.RcodeFormatError
		return
	case q.Qtype == dns.TypeMAILA || q.Qtype == dns.TypeMAILB || q.Qtype == dns.TypeTSIG || q.Qtype == dns.TypeTKEY:
		a.m.Rcode = dns.RcodeNotImplemented
		return
	case q.Qclass != dns.ClassINET || q.Qtype == dns.TypeAXFR || q.Qtype == dns.TypeIXFR:
		a.m.Rcode = dns.RcodeRefused
		return
	}
	owner := q.Name // as asked, its case too
	seen := make(map[string]bool, 1)
	for range maxChain {
		name := dns.CanonicalName(owner)
		z := a.table.zoneOf(name)
		if z != nil && q.Qtype == dns.TypeDS && z.name == name && name != "." {
			// A DS lives in the zone above (RFC 4035, section 3.1.4.1).
			if up := a.table.zoneOf(parent(name)); up != nil {
				z = up
			}
		}
		if z == nil {
			if len(seen) == 0 {
				a.m.Rcode = dns.RcodeRefused
			}
			return
		}
		if seen[name] { // a loop: the chain as far as it goes
			return
		}
		next := a.inZone(z, owner, name, q.Qtype, len(seen) == 0)
		if next == "" {
			return
		}
		seen[name] = true
		owner = next
	}
}

// inZone adds what z says about name; next is the target of a CNAME to go on
// with.
func (a *answer) inZone(z *zone, owner, name string, qtype uint16, first bool) (next string) {
	n := z.nodes[z.name]
	offsets := dns.Split(name)
	for i := len(offsets) - z.labels - 1; i >= 0; i-- {
		at := name[offsets[i]:]
		n = z.nodes[at]
		if n == nil {
			n = z.nodes["*."+trimRoot(parent(at))]
			if n == nil {
				a.m.Authoritative = true
				a.m.Rcode = dns.RcodeNameError // of the last name of the chain (RFC 6604)
				a.m.Ns = append(a.m.Ns, z.soa)
				return ""
			}
			break
		}
		if ns := n.set(dns.TypeNS); ns != nil && !(i == 0 && qtype == dns.TypeDS) {
			a.refer(z, ns)
			return ""
		}
	}
	if first || len(a.m.Answer) > 0 {
		a.m.Authoritative = true
	}
	if c := n.set(dns.TypeCNAME); c != nil && qtype != dns.TypeCNAME && qtype != dns.TypeANY {
		a.put(owner, c)
		return c[0].(*dns.CNAME).Target
	}
	before := len(a.m.Answer)
	switch {
	case qtype == dns.TypeANY: // one set (RFC 8482, section 4.1)
		for _, s := range n.sets {
			if s[0].Header().Rrtype != typeALIAS {
				a.put(owner, s)
				break
			}
		}
		if len(a.m.Answer) == before && (n.steer != nil || n.set(typeALIAS) != nil) {
			a.m.Answer = append(a.m.Answer, &dns.HINFO{Hdr: header(owner, dns.TypeHINFO, 3600), Cpu: "RFC8482"})
		}
	case qtype == typeALIAS:
	case n.set(qtype) != nil:
		a.put(owner, n.set(qtype))
	case n.steer != nil:
		a.steer(owner, name, qtype, n.steer)
	case n.set(typeALIAS) != nil && !a.inAlias && (qtype == dns.TypeA || qtype == dns.TypeAAAA):
		a.alias(owner, n.set(typeALIAS)[0].(*dns.CNAME), qtype)
	}
	if len(a.m.Answer) == before {
		a.m.Ns = append(a.m.Ns, z.soa)
	}
	return ""
}

// put adds a set under the name that was asked for.
func (a *answer) put(owner string, set []dns.RR) {
	for _, rr := range set {
		rr = dns.Copy(rr)
		rr.Header().Name = owner
		a.m.Answer = append(a.m.Answer, rr)
	}
}

// refer adds a delegation and the addresses of its servers that this zone
// knows.
func (a *answer) refer(z *zone, ns []dns.RR) {
	a.m.Ns = append(a.m.Ns, ns...)
	for _, rr := range ns {
		n := z.nodes[dns.CanonicalName(rr.(*dns.NS).Ns)]
		if n != nil {
			a.m.Extra = append(a.m.Extra, n.set(dns.TypeA)...)
			a.m.Extra = append(a.m.Extra, n.set(dns.TypeAAAA)...)
		}
	}
}

// alias answers with the addresses that this table has for an ALIAS's target.
func (a *answer) alias(owner string, alias *dns.CNAME, qtype uint16) {
	// An ALIAS that leads to an ALIAS has no addresses: no loops.
	sub := answer{table: a.table, m: new(dns.Msg), near: a.near, inAlias: true}
	name := alias.Target
	for range maxChain {
		z := a.table.zoneOf(name)
		if z == nil {
			break
		}
		next := sub.inZone(z, name, name, qtype, true)
		if next == "" {
			break
		}
		name = dns.CanonicalName(next)
	}
	a.steered = a.steered || sub.steered
	for _, rr := range sub.m.Answer {
		if rr.Header().Rrtype == qtype {
			rr.Header().Name = owner
			rr.Header().Ttl = min(rr.Header().Ttl, alias.Hdr.Ttl)
			a.m.Answer = append(a.m.Answer, rr)
		}
	}
}

func (a *answer) steer(owner, name string, qtype uint16, steer Steer) {
	if qtype != dns.TypeA && qtype != dns.TypeAAAA && qtype != dns.TypeHTTPS {
		return
	}
	a.steered = true
	t := steer(name, a.near)
	var v4, v6 []net.IP
	for _, ip := range t.Addrs {
		if ip = ip.Unmap(); ip.Is4() {
			v4 = append(v4, ip.AsSlice())
		} else if ip.Is6() {
			v6 = append(v6, ip.AsSlice())
		}
	}
	switch qtype {
	case dns.TypeA:
		for _, ip := range v4 {
			a.m.Answer = append(a.m.Answer, &dns.A{Hdr: header(owner, qtype, steeredTTL), A: ip})
		}
	case dns.TypeAAAA:
		for _, ip := range v6 {
			a.m.Answer = append(a.m.Answer, &dns.AAAA{Hdr: header(owner, qtype, steeredTTL), AAAA: ip})
		}
	case dns.TypeHTTPS:
		if len(t.ALPN) == 0 || len(t.Addrs) == 0 {
			return
		}
		rr := &dns.HTTPS{SVCB: dns.SVCB{Hdr: header(owner, qtype, steeredTTL), Priority: 1, Target: "."}}
		rr.Value = append(rr.Value, &dns.SVCBAlpn{Alpn: t.ALPN})
		if len(v4) > 0 {
			rr.Value = append(rr.Value, &dns.SVCBIPv4Hint{Hint: v4})
		}
		if len(v6) > 0 {
			rr.Value = append(rr.Value, &dns.SVCBIPv6Hint{Hint: v6})
		}
		a.m.Answer = append(a.m.Answer, rr)
	}
}

func header(name string, typ uint16, ttl uint32) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: typ, Class: dns.ClassINET, Ttl: ttl}
}
