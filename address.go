package webgw

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

func index(field string, i int) string { return fmt.Sprintf("%s[%d]", field, i) }

// CheckLabel checks a name within an owner: 1 to 63 of a–z, 0–9 and inner
// hyphens, as a DNS label (RFC 1123 section 2.1).
func CheckLabel(field, s string) error {
	if s == "" {
		return invalid(field, "missing")
	}
	if len(s) > 63 {
		return invalid(field, "is longer than 63 characters")
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		case c == '-' && i > 0 && i < len(s)-1:
		case c >= 'A' && c <= 'Z':
			return invalid(field, "%q has upper-case letters; write %q", s, strings.ToLower(s))
		default:
			return invalid(field, "%q may hold only a–z, 0–9 and inner hyphens", clip(s, 63))
		}
	}
	return nil
}

// NormalizeHost brings a host name as people and clients write it into the
// one form that records hold: lower case, no trailing dot. It checks nothing,
// and leaves what is not ASCII alone: Unicode has letters whose lower case is
// an ASCII letter (U+212A, the Kelvin sign), which must not become one.
func NormalizeHost(s string) string { return lower(strings.TrimSuffix(s, ".")) }

// lower is strings.ToLower for ASCII only.
func lower(s string) string {
	for i := range len(s) {
		if s[i] >= 'A' && s[i] <= 'Z' {
			b := []byte(s)
			for j := i; j < len(b); j++ {
				if b[j] >= 'A' && b[j] <= 'Z' {
					b[j] += 'a' - 'A'
				}
			}
			return string(b)
		}
	}
	return s
}

// CheckHost checks that s is a host name in the form that records hold: at
// least two labels (or "localhost"), lower-case ASCII, at most 253 characters,
// no trailing dot, not an IP address. With wildcard, a first label "*" may
// stand for exactly one label (RFC 6125 section 6.4.3, not RFC 4592).
func CheckHost(field, s string, wildcard bool) error {
	_, err := checkHost(field, s, wildcard)
	return err
}

func checkHost(field, s string, wildcard bool) (string, error) {
	if s == "" {
		return "", invalid(field, "missing")
	}
	if len(s) > 253 {
		return "", invalid(field, "is longer than 253 characters (RFC 1035 section 2.3.4)")
	}
	for i := range len(s) {
		if s[i] >= utf8.RuneSelf {
			return "", invalid(field, "%q is not ASCII; write it in its IDNA form (xn--…)", clip(s, 80))
		}
	}
	if strings.HasSuffix(s, ".") {
		return "", invalid(field, "%q ends in a dot; leave it out", clip(s, 80))
	}
	if _, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return "", invalid(field, "%q is an address, not a name", s)
	}
	rest, isWild := strings.CutPrefix(s, "*.")
	if isWild && !wildcard {
		return "", invalid(field, "%q: a wildcard is not allowed here", s)
	}
	labels := strings.Split(rest, ".")
	for _, l := range labels {
		if l == "" {
			return "", invalid(field, "%q has an empty label", clip(s, 80))
		}
		// Service labels such as _acme-challenge are names too, hosts not.
		if err := CheckLabel(field, l); err != nil {
			return "", err
		}
	}
	if len(labels) < 2 && (s != "localhost") {
		return "", invalid(field, "%q needs at least two labels, as in name.zone", s)
	}
	// inet_aton(3) and browsers take hexadecimal for a number too.
	last := labels[len(labels)-1]
	hex, isHex := strings.CutPrefix(last, "0x")
	if strings.Trim(last, "0123456789") == "" || isHex && strings.Trim(hex, "0123456789abcdef") == "" {
		return "", invalid(field, "%q ends in a number and would be taken for an address", s)
	}
	return s, nil
}

// Under reports whether host lies strictly below zone, label by label:
// "evilgent.example" is not under "gent.example".
func Under(host, zone string) bool {
	return zone != "" && len(host) > len(zone)+1 && strings.HasSuffix(host, zone) && host[len(host)-len(zone)-1] == '.'
}

// SplitHostPort splits host:port with a numeric port from 1 to 65535.
func SplitHostPort(s string) (host string, port uint16, err error) {
	h, p, err := net.SplitHostPort(s)
	if err != nil {
		return "", 0, invalid("", "%q is not host:port", clip(s, 100))
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != p {
		return "", 0, invalid("", "%q: the port must be a number from 1 to 65535", clip(s, 100))
	}
	return h, uint16(n), nil
}

// checkHostPort accepts one way to write each address: a canonical IP without
// zone and not IPv4-mapped, or a host name. Decimal, octal and short IPv4
// forms, which resolvers read in their own ways, are refused by checkHost.
func checkHostPort(field, s string) error {
	h, port, err := SplitHostPort(s)
	if err != nil {
		return in(field, err)
	}
	if one := net.JoinHostPort(h, strconv.Itoa(int(port))); one != s {
		return invalid(field, "%q: write %s", clip(s, 100), clip(one, 100))
	}
	if a, err := netip.ParseAddr(h); err == nil {
		switch {
		case a.Zone() != "":
			return invalid(field, "%q: an address with a zone means something else on every machine", s)
		case a.Is4In6():
			return invalid(field, "%q: write the IPv4 address %s", s, a.Unmap())
		case a.String() != h:
			return invalid(field, "%q: write the address as %s", s, a)
		case a.IsUnspecified() || a.IsMulticast() || a == broadcast:
			return invalid(field, "%q can't be dialed", s)
		}
		return nil
	}
	if h == "localhost" {
		return nil
	}
	_, err = checkHost(field, h, false)
	return err
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255}) // RFC 919 section 7

// CheckTargetAddress checks an address as seen from a node: host:port, or
// unix: and an absolute path.
func CheckTargetAddress(field, s string) error {
	if s == "" {
		return invalid(field, "missing")
	}
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		if !strings.HasPrefix(path, "/") || len(path) > 107 || slices.Contains(strings.Split(path, "/"), "..") || checkText(field, path, 107) != nil {
			return invalid(field, "%q must be unix: and an absolute path of at most 107 bytes, printable, without ..", clip(s, 120))
		}
		return nil
	}
	return checkHostPort(field, s)
}

// PortSet is a comma-separated list of ports and ranges, "2222,20000-20999".
type PortSet string

// PortRange is First to Last, both included.
type PortRange struct{ First, Last uint16 }

// Ranges parses the set, sorted, not overlapping.
func (s PortSet) Ranges() ([]PortRange, error) {
	if s == "" {
		return nil, nil
	}
	if len(s) > 1000 {
		return nil, invalid("", "the list of ports is longer than 1000 characters")
	}
	var out []PortRange
	for part := range strings.SplitSeq(string(s), ",") {
		lo, hi, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			hi = lo
		}
		a, err1 := strconv.ParseUint(lo, 10, 16)
		b, err2 := strconv.ParseUint(hi, 10, 16)
		if err1 != nil || err2 != nil || a == 0 || b < a {
			return nil, invalid("", "%q is not a port or a range such as 20000-20999", clip(part, 40))
		}
		out = append(out, PortRange{uint16(a), uint16(b)})
	}
	slices.SortFunc(out, func(a, b PortRange) int { return int(a.First) - int(b.First) })
	for i := 1; i < len(out); i++ {
		if out[i].First <= out[i-1].Last {
			return nil, invalid("", "port %d stands twice", out[i].First)
		}
	}
	return out, nil
}

// Contains reports whether port is in the set; a malformed set holds none.
func (s PortSet) Contains(port uint16) bool {
	ranges, _ := s.Ranges()
	return slices.ContainsFunc(ranges, func(r PortRange) bool { return r.First <= port && port <= r.Last })
}

func checkIDs(field string, ids []ID, most int) error {
	if len(ids) > most {
		return invalid(field, "holds more than %d identities", most)
	}
	seen := make(map[ID]bool, len(ids))
	for i, id := range ids {
		if id.IsZero() {
			return invalid(index(field, i), "missing")
		}
		if seen[id] {
			return invalid(index(field, i), "stands twice")
		}
		seen[id] = true
	}
	return nil
}

// checkText allows printable characters only: names and descriptions end up
// in terminals and pages.
func checkText(field, s string, most int) error {
	if utf8.RuneCountInString(s) > most {
		return invalid(field, "is longer than %d characters", most)
	}
	for _, r := range s {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return invalid(field, "holds a character that can't be printed")
		}
	}
	return nil
}
