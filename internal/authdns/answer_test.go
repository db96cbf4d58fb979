package authdns

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func records(text string) (out []Record) {
	for line := range strings.Lines(strings.TrimSpace(text)) {
		f := strings.SplitN(strings.TrimSpace(line), " ", 3)
		out = append(out, Record{Name: f[0], TTL: 300, Type: f[1], Data: f[2]})
	}
	return out
}

func testServer(t testing.TB) *Server {
	t.Helper()
	steer := func(name string, near netip.Prefix) Targets {
		first := "192.0.2.1"
		if near.Contains(netip.MustParseAddr("198.51.100.1")) {
			first = "192.0.2.2"
		}
		return Targets{Addrs: []netip.Addr{netip.MustParseAddr(first), netip.MustParseAddr("2001:db8::1")}, ALPN: []string{"h3", "h2"}}
	}
	table, err := NewTable([]Zone{{
		Name: "Example.org",
		Records: records(`example.org SOA ns.example.org. host.example.org. 1 3600 600 86400 60
			example.org NS ns.example.org.
			ns.example.org A 192.0.2.53
			example.org ALIAS blog.example.org
			example.org TXT "hello"
			www.example.org CNAME a.b.example.org.
			a.b.example.org A 192.0.2.10
			out.example.org CNAME elsewhere.test.
			gone.example.org CNAME nothing.example.org.
			loop1.example.org CNAME loop2.example.org.
			loop2.example.org CNAME loop1.example.org.
			*.w.example.org TXT "wild"
			x.y.w.example.org TXT "below"
			*.al.example.org ALIAS foo.al.example.org
			sub.example.org NS ns.sub.example.org.
			ns.sub.example.org A 192.0.2.54
			other.example.org NS ns.other.test.
			other.example.org DS 1 13 2 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
			cross.example.org CNAME t.child.example.org.`),
		Steered: []Steered{{Name: "blog.example.org", Steer: steer}, {Name: "*.s.example.org", Steer: steer}},
	}, {
		Name: "child.example.org",
		Records: records(`child.example.org SOA ns.example.org. host.example.org. 1 3600 600 86400 60
			child.example.org NS ns.example.org.
			t.child.example.org TXT "in the child"`),
	}})
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{NSID: "gent"}
	s.SetTable(table)
	return s
}

func ask(t testing.TB, s *Server, m *dns.Msg, stream bool) *dns.Msg {
	t.Helper()
	q, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	out := s.Answer(q, netip.MustParseAddr("203.0.113.9"), stream)
	var r dns.Msg
	if err := r.Unpack(out); err != nil {
		t.Fatalf("%x: %v", out, err)
	}
	if r.Id != m.Id || !r.Response || r.RecursionAvailable {
		t.Fatalf("header %+v", r.MsgHdr)
	}
	return &r
}

func short(rrs []dns.RR) string {
	var out []string
	for _, rr := range rrs {
		if rr.Header().Rrtype == dns.TypeOPT {
			continue
		}
		out = append(out, rr.Header().Name+" "+dns.TypeToString[rr.Header().Rrtype]+" "+strings.TrimPrefix(rr.String(), rr.Header().String()))
	}
	return strings.Join(out, "; ")
}

func TestAnswers(t *testing.T) {
	s := testServer(t)
	const soa = "example.org. SOA ns.example.org. host.example.org. 1 3600 600 86400 60"
	for _, c := range []struct{ ask, rcode, answer, ns, extra string }{
		{"eXample.ORG TXT", "NOERROR aa", `eXample.ORG. TXT "hello"`, "", ""},
		{"example.org A", "NOERROR aa", "example.org. A 192.0.2.1", "", ""},
		{"www.example.org A", "NOERROR aa", "www.example.org. CNAME a.b.example.org.; a.b.example.org. A 192.0.2.10", "", ""},
		{"www.example.org MX", "NOERROR aa", "www.example.org. CNAME a.b.example.org.", soa, ""},
		{"b.example.org A", "NOERROR aa", "", soa, ""},
		{"no.example.org A", "NXDOMAIN aa", "", soa, ""},
		{"out.example.org A", "NOERROR aa", "out.example.org. CNAME elsewhere.test.", "", ""},
		{"gone.example.org A", "NXDOMAIN aa", "gone.example.org. CNAME nothing.example.org.", soa, ""},
		{"loop1.example.org A", "NOERROR aa", "loop1.example.org. CNAME loop2.example.org.; loop2.example.org. CNAME loop1.example.org.", "", ""},
		{"q.w.example.org TXT", "NOERROR aa", `q.w.example.org. TXT "wild"`, "", ""},
		{"a.q.w.example.org TXT", "NOERROR aa", `a.q.w.example.org. TXT "wild"`, "", ""},
		{"q.w.example.org A", "NOERROR aa", "", soa, ""},
		{"y.w.example.org TXT", "NOERROR aa", "", soa, ""},
		{"q.y.w.example.org TXT", "NXDOMAIN aa", "", soa, ""},
		{"*.w.example.org TXT", "NOERROR aa", `*.w.example.org. TXT "wild"`, "", ""},
		{"q.al.example.org A", "NOERROR aa", "", soa, ""},
		{"h.sub.example.org A", "NOERROR", "", "sub.example.org. NS ns.sub.example.org.", "ns.sub.example.org. A 192.0.2.54"},
		{"sub.example.org NS", "NOERROR", "", "sub.example.org. NS ns.sub.example.org.", "ns.sub.example.org. A 192.0.2.54"},
		{"sub.example.org DS", "NOERROR aa", "", soa, ""},
		{"other.example.org DS", "NOERROR aa", "other.example.org. DS 1 13 2 0123456789ABCDEF0123456789ABCDEF0123456789ABCDEF0123456789ABCDEF", "", ""},
		{"child.example.org DS", "NXDOMAIN aa", "", soa, ""},
		{"cross.example.org TXT", "NOERROR aa", `cross.example.org. CNAME t.child.example.org.; t.child.example.org. TXT "in the child"`, "", ""},
		{"example.org ANY", "NOERROR aa", "example.org. " + soa[len("example.org. "):], "", ""},
		{"blog.example.org AAAA", "NOERROR aa", "blog.example.org. AAAA 2001:db8::1", "", ""},
		{"q.s.example.org HTTPS", "NOERROR aa", `q.s.example.org. HTTPS 1 . alpn="h3,h2" ipv4hint="192.0.2.1" ipv6hint="2001:db8::1"`, "", ""},
		{"blog.example.org TXT", "NOERROR aa", "", soa, ""},
		{"example.org AXFR", "REFUSED", "", "", ""},
		{"evilexample.org A", "REFUSED", "", "", ""},
		{"org A", "REFUSED", "", "", ""},
		{". NS", "REFUSED", "", "", ""},
		{"example.org TYPE65401", "NOERROR aa", "", soa, ""},
		{"example.org TYPE1234", "NOERROR aa", "", soa, ""},
	} {
		name, typ, _ := strings.Cut(c.ask, " ")
		m := new(dns.Msg)
		code, ok := dns.StringToType[typ]
		if !ok {
			code = map[string]uint16{"TYPE1234": 1234, "TYPE65401": typeALIAS}[typ]
		}
		m.SetQuestion(dns.Fqdn(name), code)
		r := ask(t, s, m, false)
		rcode := dns.RcodeToString[r.Rcode]
		if r.Authoritative {
			rcode += " aa"
		}
		if got := [4]string{rcode, short(r.Answer), short(r.Ns), short(r.Extra)}; got != [4]string{c.rcode, c.answer, c.ns, c.extra} {
			t.Errorf("%s:\n got %q\nwant %q", c.ask, got, [4]string{c.rcode, c.answer, c.ns, c.extra})
		}
		if r.Question[0] != m.Question[0] {
			t.Errorf("%s: question %v", c.ask, r.Question)
		}
	}
}

func TestEDNS(t *testing.T) {
	s := testServer(t)
	with := func(name string, change func(o *dns.OPT)) *dns.Msg {
		m := new(dns.Msg)
		m.SetQuestion(name, dns.TypeA)
		m.SetEdns0(4096, true)
		change(m.IsEdns0())
		return ask(t, s, m, false)
	}
	r := with("ns.example.org.", func(o *dns.OPT) { o.SetVersion(1) })
	if r.Rcode != dns.RcodeBadVers || r.IsEdns0().Version() != 0 || len(r.Answer) != 0 {
		t.Errorf("version 1: %v", r)
	}
	r = with("ns.example.org.", func(o *dns.OPT) { o.SetZ(0x7fff); o.Option = []dns.EDNS0{&dns.EDNS0_NSID{}} })
	if o := r.IsEdns0(); o.Z() != 0 || !o.Do() || o.UDPSize() != maxUDP || len(o.Option) != 1 || o.Option[0].(*dns.EDNS0_NSID).Nsid != hexOf("gent") {
		t.Errorf("NSID: %v", o)
	}
	subnet := func(name string) (string, uint8) {
		r := with(name, func(o *dns.OPT) {
			o.Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: []byte{198, 51, 100, 0}}}
		})
		return short(r.Answer), r.IsEdns0().Option[0].(*dns.EDNS0_SUBNET).SourceScope
	}
	if got, scope := subnet("blog.example.org."); got != "blog.example.org. A 192.0.2.2" || scope != 24 {
		t.Errorf("steered by subnet: %s, scope %d", got, scope)
	}
	if got, scope := subnet("ns.example.org."); got != "ns.example.org. A 192.0.2.53" || scope != 0 {
		t.Errorf("static with subnet: %s, scope %d", got, scope)
	}
}

func TestHeaders(t *testing.T) {
	s := testServer(t)
	m := new(dns.Msg)
	m.SetQuestion("example.org.", dns.TypeTXT)
	m.Question = append(m.Question, m.Question[0])
	if r := ask(t, s, m, false); r.Rcode != dns.RcodeFormatError {
		t.Errorf("two questions: %v", r)
	}
	m.Question = nil
	if r := ask(t, s, m, false); r.Rcode != dns.RcodeFormatError {
		t.Errorf("no question: %v", r)
	}
	m.SetUpdate("example.org.")
	if r := ask(t, s, m, false); r.Rcode != dns.RcodeNotImplemented || r.Opcode != dns.OpcodeUpdate {
		t.Errorf("update: %v", r)
	}
	if out := s.Answer([]byte{0, 1, 0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0}, netip.Addr{}, false); out != nil {
		t.Errorf("an answer was answered: %x", out)
	}
}

func TestTruncation(t *testing.T) {
	z := Zone{Name: "big.test", Records: records("big.test SOA a. b. 1 2 3 4 5\nbig.test NS a.")}
	for i := range 100 {
		z.Records = append(z.Records, Record{Name: "big.test", TTL: 1, Type: "TXT", Data: `"` + strings.Repeat("x", 50+i) + `"`})
	}
	table, err := NewTable([]Zone{z})
	if err != nil {
		t.Fatal(err)
	}
	s := new(Server)
	s.SetTable(table)
	m := new(dns.Msg)
	m.SetQuestion("big.test.", dns.TypeTXT)
	r := ask(t, s, m, false)
	r.Compress = true
	if !r.Truncated || r.Len() > 512 {
		t.Errorf("by UDP: %d bytes, truncated %v", r.Len(), r.Truncated)
	}
	if r := ask(t, s, m, true); r.Truncated || len(r.Answer) != 100 {
		t.Errorf("by TCP: %d records, truncated %v", len(r.Answer), r.Truncated)
	}
}

func TestRefusedZones(t *testing.T) {
	base := "z.test SOA a. b. 1 2 3 4 5\nz.test NS a.\n"
	for text, want := range map[string]string{
		"z.test NS a.":                                   "one SOA",
		"z.test SOA a. b. 1 2 3 4 5":                     "an NS",
		base + "evilz.test A 192.0.2.1":                  "outside",
		base + "c.z.test CNAME a.\nc.z.test A 192.0.2.1": "stands alone",
		base + "c.z.test CNAME a.\nc.z.test CNAME b.":    "more than one CNAME",
		base + "c.z.test DNAME a.":                       "can't be added",
		base + "*.z.test NS a.":                          "wildcard",
		base + "c.z.test ALIAS a.\nc.z.test A 192.0.2.1": "beside",
		base + "c.z.test A 192.0.2.300":                  "",
	} {
		if _, err := NewTable([]Zone{{Name: "z.test", Records: records(text)}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	z := Zone{Name: "z.test", Records: slices.Concat(records(base), []Record{{Name: "c.z.test", Type: "A", Data: "192.0.2.1\nevil. A 192.0.2.2"}})}
	if _, err := NewTable([]Zone{z}); err == nil {
		t.Error("two lines of data were taken")
	}
}

func FuzzAnswer(f *testing.F) {
	s := testServer(f)
	m := new(dns.Msg)
	m.SetQuestion("q.s.example.org.", dns.TypeHTTPS)
	m.SetEdns0(1232, true)
	seed, err := m.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, query []byte) {
		out := s.Answer(query, netip.MustParseAddr("2001:db8::9"), false)
		if out == nil {
			return
		}
		var r dns.Msg
		if err := r.Unpack(out); err != nil || !r.Response || len(out) > maxUDP {
			t.Fatalf("%x: %x: %v", query, out, err)
		}
	})
}
