package netx

import (
	"fmt"
	"net/netip"
	"slices"
)

// Class is what kind of place an address leads to, for those who decide what
// may be dialed.
type Class string

// Classes of addresses. Only Public leads into the internet.
const (
	Public      Class = "public"
	Loopback    Class = "loopback"
	Private     Class = "private"    // RFC 1918, RFC 4193, RFC 6598
	LinkLocal   Class = "link-local" // RFC 3927, RFC 4291 section 2.5.6
	Metadata    Class = "metadata"   // where clouds hand out credentials
	Multicast   Class = "multicast"
	Unspecified Class = "unspecified"
	Reserved    Class = "reserved" // special purpose: IANA registries of RFC 6890
)

type classified struct {
	prefix netip.Prefix
	class  Class
}

func table(class Class, prefixes ...string) (out []classified) {
	for _, p := range prefixes {
		out = append(out, classified{netip.MustParsePrefix(p), class})
	}
	return out
}

// special lists every block that is not public; the first that fits counts.
// Source: IANA's IPv4 and IPv6 Special-Purpose Address Registries.
var special = slices.Concat(
	table(Metadata,
		"169.254.169.254/32", "169.254.170.2/32", // most clouds; AWS ECS
		"100.100.100.200/32",                 // Alibaba
		"168.63.129.16/32", "192.0.0.192/32", // Azure; Oracle
		"fd00:ec2::254/128", "fd20:ce::254/128"), // AWS; Google
	table(Unspecified, "0.0.0.0/32", "::/128"),
	table(Loopback, "127.0.0.0/8", "::1/128"),
	table(LinkLocal, "169.254.0.0/16", "fe80::/10"),
	table(Multicast, "224.0.0.0/4", "ff00::/8"),
	table(Private, "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "fec0::/10",
		"64:ff9b:1::/48"), // local-use NAT64, RFC 8215: leads wherever its operator likes
	table(Reserved, "0.0.0.0/8", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15",
		"198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4",
		"::/96", "100::/64", "2001::/23", "2001:db8::/32", "3fff::/20", "5f00::/16"),
)

var (
	nat64   = netip.MustParsePrefix("64:ff9b::/96")
	sixTo4  = netip.MustParsePrefix("2002::/16")
	global6 = netip.MustParsePrefix("2000::/3")
)

// Classify tells where a leads. An IPv4 address inside an IPv6 one (mapped,
// NAT64 of RFC 6052, 6to4 of RFC 3056) is judged as what it stands for: the
// network in between would deliver there.
func Classify(a netip.Addr) Class {
	if !a.IsValid() {
		return Reserved
	}
	a = a.WithZone("").Unmap()
	if a.Is6() {
		b := a.As16()
		switch {
		case nat64.Contains(a):
			return Classify(netip.AddrFrom4([4]byte(b[12:])))
		case sixTo4.Contains(a):
			return Classify(netip.AddrFrom4([4]byte(b[2:6])))
		}
	}
	for _, s := range special {
		if s.prefix.Contains(a) {
			return s.class
		}
	}
	if a.Is6() && !global6.Contains(a) {
		return Reserved
	}
	return Public
}

// Judge says whether a may be dialed: if its class is one of classes, or if
// allow lists it. Addresses that lead to what a machine must keep to itself
// (metadata, link-local, reserved) are allowed only by a prefix that holds
// nothing else, so that 0.0.0.0/0 does not open them by accident; multicast
// and unspecified ones never are. The error says which class it is.
func Judge(a netip.Addr, allow []netip.Prefix, classes ...Class) error {
	class := Classify(a)
	plain := a.WithZone("").Unmap()
	if slices.Contains(classes, class) {
		return nil
	}
	for _, p := range allow {
		if !p.Contains(plain) {
			continue
		}
		switch class {
		case Multicast, Unspecified:
		case Metadata, LinkLocal, Reserved:
			if Classify(p.Masked().Addr()) == class && Classify(last(p)) == class {
				return nil
			}
		default:
			// A mapped or translated address must be listed as what it is and
			// lead to nothing that must be listed on its own: seen above.
			return nil
		}
	}
	return &RefusedAddress{Addr: a, Class: class}
}

// last returns the last address of p.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// RefusedAddress is Judge's error.
type RefusedAddress struct {
	Addr  netip.Addr
	Class Class
}

// Error names the address and its class.
func (e *RefusedAddress) Error() string {
	return fmt.Sprintf("the address %s is %s and not allowed here", e.Addr, e.Class)
}
