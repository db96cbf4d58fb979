package registry

import (
	"strings"
)

// above returns the name one label above host, or "" above a single label.
func above(host string) string {
	_, rest, _ := strings.Cut(host, ".")
	return rest
}

// domain returns the last two labels of a host name. Names that bear on each
// other (wildcard, subtree, zone, and what lies below them) share them, because
// every host name has at least two.
func domain(host string) string {
	i := strings.LastIndexByte(host, '.')
	if i < 0 {
		return host
	}
	return host[strings.LastIndexByte(host[:i], '.')+1:]
}

// reserved reports whether a label directly below a gateway's zone is kept for
// the gateway itself: names that people, mail or browsers take for those of
// whoever runs the zone (RFC 2142, RFC 6762 section 22.1 in spirit), and the
// zone's own name servers.
func reserved(label string) bool {
	if rest, ok := strings.CutPrefix(label, "ns"); ok && (rest == "" || len(rest) == 1 && rest[0] >= '0' && rest[0] <= '9') {
		return true
	}
	switch label {
	case "webgw", "registry", "gateway", "console", "admin", "abuse", "postmaster", "hostmaster", "webmaster", "security",
		"mail", "autoconfig", "autodiscover", "wpad":
		return true
	}
	return false
}

// labelBelow returns the label of host that stands directly below zone; host
// must be under zone.
func labelBelow(host, zone string) string {
	rest := strings.TrimSuffix(host, "."+zone)
	return rest[strings.LastIndexByte(rest, '.')+1:]
}
