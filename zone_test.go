package webgw

import (
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func TestCanonicalDNS(t *testing.T) {
	for _, c := range []struct {
		t        DNSType
		in, want string // want "!x": refused, with x in the sentence
	}{
		{TypeA, "192.0.2.1", "192.0.2.1"},
		{TypeA, "192.0.2.01", "!not an IPv4"},
		{TypeA, "2001:db8::1", "!not an IPv4"},
		{TypeA, "0x7f.1", "!not an IPv4"},
		{TypeAAAA, "2001:DB8:0::1", "2001:db8::1"},
		{TypeAAAA, "::ffff:192.0.2.1", "!not an IPv6"},
		{TypeAAAA, "fe80::1%eth0", "!not an IPv6"},
		{TypeCNAME, "Other.Example.", "other.example"},
		{TypeCNAME, "_dkim._domainkey.example.org", "_dkim._domainkey.example.org"},
		{TypeCNAME, ".", "!missing"},
		{TypeCNAME, "", "!missing"},
		{TypeCNAME, "a b.example", "!may hold only"},
		{TypeCNAME, "a..example", "!empty label"},
		{TypeCNAME, strings.Repeat("a", 64) + ".example", "!more than 63"},
		{TypeCNAME, strings.Repeat("a.", 127), "!longer than 253"[:0] + strings.TrimSuffix(strings.Repeat("a.", 127), ".")},
		{TypeCNAME, strings.Repeat("a.", 126) + "aa", "!longer than 253"},
		{TypeCNAME, "bücher.example", "!printable ASCII"},
		{TypeCNAME, "a.example\nb.example", "!printable ASCII"},
		{TypeCNAME, "a\\.b.example", "!may hold only"},
		{TypeMX, "10  Mail.Example.org.", "10 mail.example.org"},
		{TypeMX, "0 .", "0 ."},
		{TypeMX, "65536 mail.example.org", "!not a number up to 65535"},
		{TypeMX, "mail.example.org", "!must be preference"},
		{TypeSRV, "010 5 5060 sip.example.org", "10 5 5060 sip.example.org"},
		{TypeSRV, "10 5 sip.example.org", "!must be priority"},
		{TypeCAA, `0 Issue letsencrypt.org`, `0 issue "letsencrypt.org"`},
		{TypeCAA, `128 issue "ca.example; account=1"`, `128 issue "ca.example; account=1"`},
		{TypeCAA, `0 issue ";"`, `0 issue ";"`},
		{TypeCAA, `1 issue "ca.example"`, "!flags are 0"},
		{TypeCAA, `0 is-sue "ca.example"`, "!not a CAA tag"},
		{TypeCAA, `0 issue "a" b"`, "!quotes"},
		{TypeTXT, `v=spf1 "quoted" \ -all`, `v=spf1 "quoted" \ -all`},
		{TypeTXT, "", ""},
		{TypeTXT, "a\x00b", "!can't be printed"},
		{TypeTXT, "a\nb", "!can't be printed"},
		{TypeTXT, strings.Repeat("x", MaxTXT+1), "!longer than"},
		{TypeHTTPS, `1 . ALPN="h3,h2" port=8443`, "1 . alpn=h3,h2 port=8443"},
		{TypeHTTPS, "1 . ipv6hint=2001:db8::1 ipv4hint=192.0.2.1 alpn=h2", "1 . alpn=h2 ipv4hint=192.0.2.1 ipv6hint=2001:db8::1"},
		{TypeHTTPS, "0 other.example", "0 other.example"},
		{TypeHTTPS, "0 other.example alpn=h2", "!priority 0 is an alias"},
		{TypeHTTPS, "0 .", "!priority 0 is an alias"},
		{TypeHTTPS, "1 . alpn=h2 alpn=h3", "!stands twice"},
		{TypeHTTPS, "1 . port=0", "!must be a port"},
		{TypeHTTPS, "1 . ech=notbase64", "!must be base64"},
		{TypeHTTPS, "1 . no-default-alpn", "!needs alpn"},
		{TypeHTTPS, "1 . mandatory=port", "!not there"},
		{TypeHTTPS, "1 . key65000=x", "!is not one of"},
		{TypeSVCB, "1 svc.example mandatory=alpn alpn=h2", "1 svc.example mandatory=alpn alpn=h2"},
		{TypePTR, "host.example.org.", "host.example.org"},
		{"DNAME", "x.example", "!not served"},
		{"SOA", "x", "!made by the gateways"},
		{"DS", "x", "!unsigned"},
		{"NAPTR", "x", "!is not one of A, AAAA"},
		{"a", "192.0.2.1", "!is not one of"},
	} {
		got, err := CanonicalDNS(c.t, c.in)
		want, refused := strings.CutPrefix(c.want, "!")
		switch {
		case refused && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%s %.60q: %q, %v; want an error with %q", c.t, c.in, got, err, want)
		case !refused && (err != nil || got != c.want):
			t.Errorf("%s %.60q: %q, %v; want %q", c.t, c.in, got, err, c.want)
		}
		if err == nil {
			if again, err := CanonicalDNS(c.t, got); err != nil || again != got {
				t.Errorf("%s %q is not canonical: %q, %v", c.t, got, again, err)
			}
		}
	}
}

func TestZoneRules(t *testing.T) {
	for _, c := range []struct {
		name    string
		records []DNSRecord
		want    string // in the error; "": valid
	}{
		{"nothing", nil, ""},
		{"the usual", []DNSRecord{{"@", "A", 0, "192.0.2.1"}, {"@", "MX", 60, "10 mail.example.org"}, {"@", "CAA", 0, `0 issue "ca.example"`}, {"www", "CNAME", 0, "example.org"},
			{"*", "A", 0, "192.0.2.1"}, {"*.dev", "A", 0, "192.0.2.1"}, {"_sip._tcp", "SRV", 0, "1 2 3 sip.example.org"}, {"_acme-challenge", "TXT", 0, "x"}}, ""},
		{"names handed on", []DNSRecord{{"sub", "NS", 0, "ns.sub.example.org"}, {"ns.sub", "A", 0, "192.0.2.1"}}, ""},
		{"an acme challenge handed on", []DNSRecord{{"_acme-challenge", "NS", 0, "ns.other.example"}}, ""},
		{"CNAME beside", []DNSRecord{{"www", "CNAME", 0, "a.example"}, {"www", "TXT", 0, "x"}}, "zone.records[0]: a CNAME is the only"},
		{"two CNAMEs", []DNSRecord{{"www", "CNAME", 0, "a.example"}, {"www", "CNAME", 0, "b.example"}}, "a CNAME is the only"},
		{"CNAME at the apex", []DNSRecord{{"@", "CNAME", 0, "a.example"}}, "zone.records[0].type: a CNAME can't stand"},
		{"ALIAS at the apex", []DNSRecord{{"@", "ALIAS", 0, "a.example"}, {"@", "TXT", 0, "x"}}, ""},
		{"ALIAS with A", []DNSRecord{{"@", "ALIAS", 0, "a.example"}, {"@", "A", 0, "192.0.2.1"}}, "an ALIAS gives all"},
		{"two ALIASes", []DNSRecord{{"@", "ALIAS", 0, "a.example"}, {"@", "ALIAS", 0, "b.example"}}, "an ALIAS gives all"},
		{"NS at the apex", []DNSRecord{{"@", "NS", 0, "ns.other.example"}}, "made by the gateways"},
		{"a wildcard NS", []DNSRecord{{"*", "NS", 0, "ns.other.example"}}, "a wildcard can't hand"},
		{"below what is handed on", []DNSRecord{{"sub", "NS", 0, "ns.other.example"}, {"a.b.sub", "TXT", 0, "x"}}, "zone.records[1]: lies below sub"},
		{"beside NS", []DNSRecord{{"sub", "NS", 0, "ns.other.example"}, {"sub", "TXT", 0, "x"}}, "handed on to other servers, which alone"},
		{"twice", []DNSRecord{{"a", "A", 0, "192.0.2.1"}, {"a", "A", 0, "192.0.2.1"}}, "zone.records[1]: stands twice"},
		{"two TTLs", []DNSRecord{{"a", "A", 60, "192.0.2.1"}, {"a", "A", 300, "192.0.2.2"}}, "RFC 2181"},
		{"a short TTL", []DNSRecord{{"a", "A", 1, "192.0.2.1"}}, "zone.records[0].ttl"},
		{"not canonical", []DNSRecord{{"a", "AAAA", 0, "2001:DB8::1"}}, `zone.records[0].value: write "2001:db8::1"`},
		{"upper case", []DNSRecord{{"WWW", "A", 0, "192.0.2.1"}}, "zone.records[0].name"},
		{"a last dot", []DNSRecord{{"www.", "A", 0, "192.0.2.1"}}, "a dot too many"},
		{"NUL", []DNSRecord{{"w\x00w", "A", 0, "192.0.2.1"}}, "may hold only"},
		{"no name", []DNSRecord{{"", "A", 0, "192.0.2.1"}}, "missing"},
		{"the zone within", []DNSRecord{{"www.example.org", "A", 0, "192.0.2.1"}}, "leave the zone out"},
		{"out of the zone", []DNSRecord{{"www..other", "A", 0, "192.0.2.1"}}, "empty label"},
		{"a wildcard within", []DNSRecord{{"a.*.b", "A", 0, "192.0.2.1"}}, "may hold only"},
		{"254 characters", []DNSRecord{{strings.Repeat("a.", 120) + "aa", "A", 0, "192.0.2.1"}}, "with the zone's"},
		{"253 characters", []DNSRecord{{strings.Repeat("a.", 120) + "a", "A", 0, "192.0.2.1"}}, ""},
		{"CAA at a challenge", []DNSRecord{{"_acme-challenge", "CAA", 0, `0 issue ";"`}}, "RFC 8555"},
		{"CNAME at a proof", []DNSRecord{{"_webgw", "CNAME", 0, "a.example"}}, "proofs of domains are TXT"},
		{"too many", make([]DNSRecord, MaxDNSRecords+1), "zone.records: more than 500"},
	} {
		now := time.Now()
		r := Record{Version: 1, Kind: KindZone, Owner: testID(1), Name: "example.org", Seq: 1, Issued: now, Expires: now.Add(time.Hour),
			Zone: &Zone{Gateways: []ID{testID(2)}, Records: c.records}}
		err := r.Validate()
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v; want %q", c.name, err, c.want)
		}
		if err != nil || c.want != "" {
			continue
		}
		// What is valid is what a DNS library reads, at the name it should be.
		for _, d := range c.records {
			if d.Type == TypeALIAS {
				continue
			}
			rr, err := dns.NewRR(d.Line("example.org"))
			if err != nil || rr == nil || rr.Header().Name != dns.Fqdn(d.FQDN("example.org")) || dns.TypeToString[rr.Header().Rrtype] != string(d.Type) {
				t.Errorf("%s: %q is read as %v, %v", c.name, d.Line("example.org"), rr, err)
			}
		}
	}
}

// Whatever value is taken in is one record for a DNS library, of that type.
func FuzzDNSValue(f *testing.F) {
	for _, s := range []string{"192.0.2.1", "a.example", "10 mail.example", "1 . alpn=h2", `0 issue "x"`, `a"b\c; d`, "1 2 3 _x.example"} {
		for i := range DNSTypes {
			f.Add(i, s)
		}
	}
	f.Fuzz(func(t *testing.T, n int, s string) {
		typ := DNSTypes[uint(n)%uint(len(DNSTypes))]
		v, err := CanonicalDNS(typ, s)
		if err != nil || typ == TypeALIAS {
			return
		}
		line := DNSRecord{Name: "www", Type: typ, Value: v}.Line("example.org")
		p := dns.NewZoneParser(strings.NewReader(line+"\n"), "", "")
		rr, ok := p.Next()
		if !ok || dns.TypeToString[rr.Header().Rrtype] != string(typ) || rr.Header().Name != "www.example.org." {
			t.Fatalf("%s %q: %q is read as %v, %v", typ, s, line, rr, p.Err())
		}
		if more, ok := p.Next(); ok {
			t.Fatalf("%q holds another record: %v", line, more)
		}
		if txt, isTXT := rr.(*dns.TXT); isTXT {
			buf := make([]byte, 2*MaxTXT)
			off, err := dns.PackRR(txt, buf, 0, nil, false)
			if err != nil {
				t.Fatal(err)
			}
			raw, head := buf[:off], 17+10 // name, and the rest of the header
			got := []byte{}
			for p := raw[head:]; len(p) > 0; p = p[1+int(p[0]):] {
				got = append(got, p[1:1+int(p[0])]...)
			}
			if string(got) != v {
				t.Errorf("%q became %q", v, got)
			}
		}
	})
}
