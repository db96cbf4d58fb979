package webgw

import (
	"encoding/base64"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Zone is DNS data of an owner at and below one host name (the record's name):
// a zone of its own that the owner has delegated to gateways by NS, or a name
// that lies in a gateway's or the grid's zone. What is exposed there is
// answered for by itself and needs no record here. SOA, NS of the apex and
// signatures are the gateways' to make.
type Zone struct {
	Gateways []ID        `json:"gateways"`          // which answer for it
	Records  []DNSRecord `json:"records,omitempty"` // further ones
}

// DNSRecord is one resource record. There is one spelling of each: that of
// CanonicalDNS.
type DNSRecord struct {
	Name  string  `json:"name"`          // below the zone's, "@" is the zone's: "www", "_sip._tcp", "*.dev"
	Type  DNSType `json:"type"`          //
	TTL   uint32  `json:"ttl,omitempty"` // seconds; 0 is DefaultTTL
	Value string  `json:"value"`         // as in a zone file, with whole names and no last dot; of TXT the text itself
}

// DNSType is the type of a resource record.
type DNSType string

// The types that owners may write.
const (
	TypeA     DNSType = "A"
	TypeAAAA  DNSType = "AAAA"
	TypeCNAME DNSType = "CNAME"
	TypeALIAS DNSType = "ALIAS" // the addresses of another name, also where a CNAME can't stand; no type of the wire
	TypeTXT   DNSType = "TXT"
	TypeMX    DNSType = "MX"
	TypeSRV   DNSType = "SRV"
	TypeCAA   DNSType = "CAA"
	TypeNS    DNSType = "NS" // below the apex: hands names on to other servers
	TypeHTTPS DNSType = "HTTPS"
	TypeSVCB  DNSType = "SVCB"
	TypePTR   DNSType = "PTR"
)

// DNSTypes lists the types that owners may write.
var DNSTypes = []DNSType{TypeA, TypeAAAA, TypeALIAS, TypeCAA, TypeCNAME, TypeHTTPS, TypeMX, TypeNS, TypePTR, TypeSRV, TypeSVCB, TypeTXT}

// Bounds of a zone.
const (
	MaxDNSRecords = 500  // of a zone
	MaxDNSSet     = 64   // of one name and type
	MaxTXT        = 4096 // bytes of a text
	DefaultTTL    = 300  // seconds
	minTTL        = 30
	maxTTL        = 7 * 24 * 3600
)

// FQDN returns the record's whole name in a zone, without last dot.
func (r DNSRecord) FQDN(zone string) string {
	if r.Name == "@" {
		return zone
	}
	return r.Name + "." + zone
}

// NormalizeDNS brings a record as people write it into the form that records of
// zone hold: the value by CanonicalDNS, the name in lower case, without a last
// dot and without the zone's.
func NormalizeDNS(zone string, r DNSRecord) (DNSRecord, error) {
	var err error
	r.Type = DNSType(strings.ToUpper(string(r.Type)))
	if r.TTL == DefaultTTL {
		r.TTL = 0
	}
	if r.Value, err = CanonicalDNS(r.Type, r.Value); err != nil {
		return r, err
	}
	name := NormalizeHost(r.Name)
	switch {
	case name == zone:
		name = "@"
	case name != zone && strings.HasSuffix(name, "."+zone):
		name = strings.TrimSuffix(name, "."+zone)
	case strings.HasSuffix(r.Name, "."):
		return r, invalid("name", "%q is not in the zone %s", clip(r.Name, 80), zone)
	}
	r.Name = name
	return r, r.validate(zone)
}

// Line returns the record as a line of a zone file (RFC 1035 section 5.1), for
// programs that speak DNS. The record must be valid; ALIAS is of this project.
func (r DNSRecord) Line(zone string) string {
	ttl := r.TTL
	if ttl == 0 {
		ttl = DefaultTTL
	}
	value := r.Value
	switch r.Type {
	case TypeTXT:
		value = quoteTXT(value)
	case TypeCNAME, TypeALIAS, TypeNS, TypePTR, TypeMX, TypeSRV:
		value = strings.TrimSuffix(value, ".") + "."
	case TypeHTTPS, TypeSVCB:
		f := strings.SplitN(value, " ", 3)
		f[1] = strings.TrimSuffix(f[1], ".") + "."
		value = strings.Join(f, " ")
	}
	return fmt.Sprintf("%s. %d IN %s %s", r.FQDN(zone), ttl, r.Type, value)
}

// quoteTXT writes a text as strings of up to 255 bytes (RFC 1035 section
// 3.3.14), everything but plain letters escaped.
func quoteTXT(s string) string {
	var b strings.Builder
	for i := 0; i == 0 || i < len(s); i += 255 {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteByte('"')
		for _, c := range []byte(s[i:min(i+255, len(s))]) {
			if c == '"' || c == '\\' || c < ' ' || c > '~' {
				fmt.Fprintf(&b, "\\%03d", c)
			} else {
				b.WriteByte(c)
			}
		}
		b.WriteByte('"')
	}
	return b.String()
}

// zoneOf is a zone with its name, by which the names in it are bounded.
type zoneOf struct {
	name string
	*Zone
}

func (z zoneOf) validate() error {
	zone := z.name
	if len(z.Gateways) == 0 {
		return invalid("gateways", "must name at least one gateway")
	}
	if err := checkIDs("gateways", z.Gateways, MaxGateways); err != nil {
		return err
	}
	if len(z.Records) > MaxDNSRecords {
		return invalid("records", "more than %d", MaxDNSRecords)
	}
	type set struct {
		name string
		t    DNSType
	}
	ttls := map[set]DNSRecord{}
	count := map[set]int{}
	types := map[string][]DNSType{}
	seen := map[DNSRecord]bool{}
	for i, r := range z.Records {
		f := index("records", i)
		if err := in(f, r.validate(zone)); err != nil {
			return err
		}
		k := set{r.Name, r.Type}
		if first, ok := ttls[k]; ok && first.TTL != r.TTL {
			return invalid(f+".ttl", "differs from that of the other %s records of %s (RFC 2181 section 5.2)", r.Type, r.Name)
		}
		ttls[k] = r
		r.TTL = 0
		if seen[r] {
			return invalid(f, "stands twice")
		}
		seen[r] = true
		if count[k]++; count[k] > MaxDNSSet {
			return invalid(f, "%s has more than %d %s records", r.Name, MaxDNSSet, r.Type)
		}
		types[r.Name] = append(types[r.Name], r.Type)
	}
	for i, r := range z.Records {
		if why := beside(r, types); why != "" {
			return invalid(index("records", i), "%s", why)
		}
	}
	return nil
}

// beside says why a record can't stand with the others, or "".
func beside(r DNSRecord, types map[string][]DNSType) string {
	at := types[r.Name]
	switch r.Type {
	case TypeCNAME:
		if len(at) > 1 {
			return fmt.Sprintf("a CNAME is the only record of its name (RFC 1034 section 3.6.2), and %s has others", r.Name)
		}
	case TypeALIAS:
		for i, t := range at {
			if t == TypeA || t == TypeAAAA || t == TypeALIAS && slices.Index(at, TypeALIAS) != i {
				return fmt.Sprintf("an ALIAS gives all addresses of its name, and %s has others", r.Name)
			}
		}
	case TypeNS:
		for _, t := range at {
			if t != TypeNS && t != TypeA && t != TypeAAAA { // glue
				return fmt.Sprintf("%s is handed on to other servers, which alone have its %s records", r.Name, t)
			}
		}
	}
	for name := r.Name; name != "@"; {
		_, rest, ok := strings.Cut(name, ".")
		if !ok {
			break
		}
		name = rest
		if slices.Contains(types[name], TypeNS) && r.Type != TypeA && r.Type != TypeAAAA {
			return fmt.Sprintf("lies below %s, which is handed on to other servers", name)
		}
	}
	return ""
}

func (r DNSRecord) validate(zone string) error {
	if err := checkDNSOwner(r.Name, zone); err != nil {
		return err
	}
	if r.TTL != 0 && (r.TTL < minTTL || r.TTL > maxTTL) {
		return invalid("ttl", "must be from %d to %d seconds", minTTL, maxTTL)
	}
	one, err := CanonicalDNS(r.Type, r.Value)
	if err != nil {
		return err
	}
	if one != r.Value {
		return invalid("value", "write %q", clip(one, 200))
	}
	first, _, _ := strings.Cut(r.Name, ".")
	switch {
	case r.Name == "@" && r.Type == TypeCNAME:
		return invalid("type", "a CNAME can't stand at the zone's own name (RFC 1912 section 2.4); ALIAS can")
	case r.Name == "@" && r.Type == TypeNS:
		return invalid("type", "the NS records of the zone itself are made by the gateways that answer for it")
	case first == "*" && r.Type == TypeNS:
		return invalid("type", "a wildcard can't hand names on (RFC 4592 section 4.2)")
	case first == "_acme-challenge" && r.Type != TypeTXT && r.Type != TypeCNAME && r.Type != TypeNS:
		return invalid("type", "%s: certificate authorities ask for TXT here (RFC 8555 section 8.4)", r.Name)
	case first == "_webgw" && r.Type != TypeTXT:
		return invalid("type", "%s: proofs of domains are TXT", r.Name)
	}
	return nil
}

// checkDNSOwner checks the name of a record, relative to its zone.
func checkDNSOwner(name, zone string) error {
	if name == "@" {
		return nil
	}
	rest, _ := strings.CutPrefix(name, "*.")
	if name != "*" {
		if err := checkDNSName("name", rest); err != nil {
			return err
		}
	}
	if zone != "" && (name == zone || strings.HasSuffix(name, "."+zone)) {
		return invalid("name", "%q: leave the zone out, \"@\" is its own name", clip(name, 80))
	}
	if len(name)+1+len(zone) > 253 {
		return invalid("name", "is longer than 253 characters with the zone's (RFC 1035 section 2.3.4)")
	}
	return nil
}

// checkDNSName checks a name that need not be a host's: labels may begin with
// an underscore (RFC 8552).
func checkDNSName(field, s string) error {
	if s == "" {
		return invalid(field, "missing")
	}
	if len(s) > 253 {
		return invalid(field, "is longer than 253 characters (RFC 1035 section 2.3.4)")
	}
	for label := range strings.SplitSeq(s, ".") {
		bare := strings.TrimPrefix(label, "_")
		switch {
		case label == "":
			return invalid(field, "%q has an empty label, or a dot too many", clip(s, 80))
		case len(label) > 63:
			return invalid(field, "%q has a label of more than 63 characters", clip(s, 80))
		case bare == "":
			return invalid(field, "%q has a label that is only an underscore", clip(s, 80))
		}
		for i := range len(bare) {
			c := bare[i]
			if c == '_' && strings.HasPrefix(label, "_") && i > 0 {
				continue // as in _domainkey_2
			}
			if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' && i > 0 && i < len(bare)-1) {
				return invalid(field, "%q may hold only a–z, 0–9, inner hyphens and a leading underscore in a label; letters beyond ASCII in their IDNA form", clip(s, 80))
			}
		}
	}
	return nil
}

// refusedTypes are types that owners might want, and what to do instead.
var refusedTypes = map[DNSType]string{
	"SOA":    "is made by the gateways",
	"DNAME":  "is not served: write a CNAME for each name, or a wildcard",
	"DS":     "is not served: names that are handed on stay unsigned",
	"DNSKEY": "is made by the gateways", "CDS": "is made by the gateways", "CDNSKEY": "is made by the gateways",
	"RRSIG": "is made by the gateways", "NSEC": "is made by the gateways", "NSEC3": "is made by the gateways", "NSEC3PARAM": "is made by the gateways",
	"ANY": "is a question, not a record", "AXFR": "is a question, not a record", "IXFR": "is a question, not a record",
	"SPF": "is history (RFC 7208 section 3.1): write a TXT",
}

// CanonicalDNS brings a value as people write it into the one form that records
// hold: names in lower case with no last dot, addresses and numbers in their
// shortest form, one space between fields. The error names the field.
func CanonicalDNS(t DNSType, value string) (string, error) {
	if !slices.Contains(DNSTypes, t) {
		if why, ok := refusedTypes[t]; ok {
			return "", invalid("type", "%s %s", t, why)
		}
		names := make([]string, len(DNSTypes))
		for i, t := range DNSTypes {
			names[i] = string(t)
		}
		return "", invalid("type", "%q is not one of %s", clip(string(t), 20), strings.Join(names, ", "))
	}
	if value == "" && t != TypeTXT {
		return "", invalid("value", "missing")
	}
	if len(value) > MaxTXT {
		return "", invalid("value", "is longer than %d bytes", MaxTXT)
	}
	if t == TypeTXT {
		return value, checkText("value", value, MaxTXT)
	}
	for i := range len(value) {
		if value[i] < ' ' || value[i] > '~' {
			return "", invalid("value", "holds a character that is not printable ASCII")
		}
	}
	fields := strings.Fields(value)
	switch t {
	case TypeA, TypeAAAA:
		a, err := netip.ParseAddr(value)
		if err != nil || a.Is4() != (t == TypeA) || a.Zone() != "" || a.Is4In6() {
			return "", invalid("value", "%q is not an IPv%d address", clip(value, 60), map[DNSType]int{TypeA: 4, TypeAAAA: 6}[t])
		}
		return a.String(), nil
	case TypeCNAME, TypeALIAS, TypeNS, TypePTR:
		return dnsTarget(value, false)
	case TypeMX:
		return numbered(fields, "preference and host, as in 10 mail.example.org", 1)
	case TypeSRV:
		return numbered(fields, "priority, weight, port and host, as in 10 5 5060 sip.example.org", 3)
	case TypeCAA:
		return canonicalCAA(value)
	}
	return canonicalSVCB(fields)
}

func dnsTarget(s string, root bool) (string, error) {
	if s == "." && root {
		return s, nil
	}
	s = NormalizeHost(s)
	return s, checkDNSName("value", s)
}

// numbered reads n numbers of 16 bits and a name.
func numbered(fields []string, shape string, n int) (string, error) {
	if len(fields) != n+1 {
		return "", invalid("value", "must be %s", shape)
	}
	var out []string
	for _, f := range fields[:n] {
		v, err := strconv.ParseUint(f, 10, 16)
		if err != nil {
			return "", invalid("value", "%q is not a number up to 65535: write %s", clip(f, 20), shape)
		}
		out = append(out, strconv.FormatUint(v, 10))
	}
	host, err := dnsTarget(fields[n], true)
	return strings.Join(append(out, host), " "), err
}

// canonicalCAA reads flags, tag and value (RFC 8659 section 4.1).
func canonicalCAA(s string) (string, error) {
	const shape = `flags, tag and value, as in 0 issue "letsencrypt.org"`
	flags, rest, _ := strings.Cut(strings.TrimSpace(s), " ")
	tag, value, ok := strings.Cut(strings.TrimSpace(rest), " ")
	value = strings.TrimSpace(value)
	if !ok || flags != "0" && flags != "128" {
		return "", invalid("value", "must be %s; flags are 0, or 128 for critical", shape)
	}
	tag = lower(tag)
	if len(tag) > 15 || strings.Trim(tag, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return "", invalid("value", "%q is not a CAA tag such as issue, issuewild or iodef", clip(tag, 20))
	}
	if len(value) >= 2 && value[0] == '"' && value[len(value)-1] == '"' {
		value = value[1 : len(value)-1]
	}
	if strings.ContainsAny(value, `"\`) {
		return "", invalid("value", "the value of a CAA can't hold quotes or backslashes; write %s", shape)
	}
	return fmt.Sprintf("%s %s %q", flags, tag, value), nil
}

// svcbKeys are the parameters of RFC 9460 section 14.3.2, in their order.
var svcbKeys = []string{"mandatory", "alpn", "no-default-alpn", "port", "ipv4hint", "ech", "ipv6hint"}

// canonicalSVCB reads priority, target and parameters (RFC 9460 section 2).
func canonicalSVCB(fields []string) (string, error) {
	if len(fields) < 2 {
		return "", invalid("value", "must be priority, target and parameters, as in 1 . alpn=h3,h2")
	}
	head, err := numbered(fields[:2], "priority, target and parameters, as in 1 . alpn=h3,h2", 1)
	if err != nil {
		return "", err
	}
	params := fields[2:]
	if strings.HasPrefix(head, "0 ") && (len(params) > 0 || head == "0 .") {
		return "", invalid("value", "priority 0 is an alias: it needs a target and takes no parameters (RFC 9460 section 2.4.2)")
	}
	got := map[string]string{}
	for _, p := range params {
		key, v, hasValue := strings.Cut(p, "=")
		key = lower(key)
		if len(v) >= 2 && v[0] == '"' && v[len(v)-1] == '"' {
			v = v[1 : len(v)-1]
		}
		if !slices.Contains(svcbKeys, key) {
			return "", invalid("value", "%q is not one of %s", clip(key, 30), strings.Join(svcbKeys, ", "))
		}
		if _, twice := got[key]; twice {
			return "", invalid("value", "%s stands twice", key)
		}
		if (key == "no-default-alpn") == hasValue || hasValue && v == "" {
			return "", invalid("value", "%s: only no-default-alpn stands without a value", key)
		}
		if v, err = svcbValue(key, v); err != nil {
			return "", err
		}
		got[key] = v
	}
	if _, ok := got["no-default-alpn"]; ok && got["alpn"] == "" {
		return "", invalid("value", "no-default-alpn needs alpn (RFC 9460 section 7.1.1)")
	}
	for k := range strings.SplitSeq(got["mandatory"], ",") {
		if _, ok := got[k]; k != "" && (!ok || k == "mandatory") {
			return "", invalid("value", "mandatory names %q, which is not there (RFC 9460 section 8)", clip(k, 30))
		}
	}
	out := head
	for _, k := range svcbKeys {
		v, ok := got[k]
		switch {
		case !ok:
		case v == "":
			out += " " + k
		default:
			out += " " + k + "=" + v
		}
	}
	return out, nil
}

func svcbValue(key, v string) (string, error) {
	bad := func(what string) (string, error) {
		return "", invalid("value", "%s=%s: must be %s", key, clip(v, 60), what)
	}
	list := strings.Split(v, ",")
	switch key {
	case "port":
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil || n == 0 {
			return bad("a port")
		}
		return strconv.FormatUint(n, 10), nil
	case "ipv4hint", "ipv6hint":
		for i, s := range list {
			a, err := netip.ParseAddr(s)
			if err != nil || a.Is4() != (key == "ipv4hint") || a.Zone() != "" || a.Is4In6() {
				return bad("addresses of its family")
			}
			list[i] = a.String()
		}
		return strings.Join(list, ","), nil
	case "ech":
		if raw, err := base64.StdEncoding.Strict().DecodeString(v); err != nil || base64.StdEncoding.EncodeToString(raw) != v {
			return bad("base64")
		}
	case "alpn":
		for _, s := range list {
			if s == "" || len(s) > 255 || strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-./_") != "" {
				return bad("names of protocols, as in h3,h2")
			}
		}
	case "mandatory":
		for i, s := range list {
			if slices.Contains(list[:i], s) || !slices.Contains(svcbKeys, s) {
				return bad("names of parameters, each once")
			}
		}
		slices.SortFunc(list, func(a, b string) int { return slices.Index(svcbKeys, a) - slices.Index(svcbKeys, b) })
		return strings.Join(list, ","), nil
	}
	return v, nil
}
