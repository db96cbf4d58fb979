package registry

import (
	"strings"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/idn"
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

// reserved reports whether a label directly below a gateway's or the grid's
// zone is kept for whoever runs the zone: names that people, mail or software
// take for theirs (RFC 2142, RFC 6762 section 22.1 in spirit), and the zone's
// own servers. docs/spec/records.md lists them. Labels with an underscore
// (_acme-challenge, _webgw) are no host names and can't be held at all.
func reserved(label string) bool {
	for _, server := range []string{"ns", "mx"} {
		if rest, ok := strings.CutPrefix(label, server); ok && strings.Trim(rest, "0123456789") == "" {
			return true
		}
	}
	switch label {
	case "webgw", "registry", "gateway", "console", "www", "admin", "administrator", "root", "localhost",
		"abuse", "postmaster", "hostmaster", "webmaster", "security", "noc", "support", "billing", "login", "sso", "account", "accounts",
		"dns", "doh", "acme", "acme-challenge", "mail", "smtp", "imap", "pop", "pop3", "mta-sts", "autoconfig", "autodiscover", "openpgpkey", "wpad", "isatap":
		return true
	}
	return webgw.LooksLikeID(label)
}

// checkNames judges the host names of a record as far as they need no other
// record: the letters of international ones. The record is valid otherwise.
func checkNames(r *webgw.Record) error {
	for _, c := range claims(r) {
		if c.host == "" {
			continue
		}
		if err := idn.Check(c.field, c.host); err != nil {
			return err
		}
	}
	return nil
}

// labelBelow returns the label of host that stands directly below zone; host
// must be under zone.
func labelBelow(host, zone string) string {
	rest := strings.TrimSuffix(host, "."+zone)
	return rest[strings.LastIndexByte(rest, '.')+1:]
}
