package authdns

import (
	"encoding/hex"
	"net/netip"

	"github.com/miekg/dns"
)

func hexOf(s string) string { return hex.EncodeToString([]byte(s)) }

// trimRoot makes the root joinable: "*." and "" are the wildcard below it.
func trimRoot(name string) string {
	if name == "." {
		return ""
	}
	return name
}

// prefixOf is the network of a resolver, as wide as who runs one.
func prefixOf(ip netip.Addr) netip.Prefix {
	ip = ip.Unmap()
	bits := 56
	if ip.Is4() {
		bits = 24
	}
	p, err := ip.Prefix(bits)
	if err != nil { // no address, so no place
		return netip.Prefix{}
	}
	return p
}

// subnetOf reads a client subnet option (RFC 7871). The prefix is not valid
// if the client wants none to be used; not ok is a malformed option.
func subnetOf(o *dns.EDNS0_SUBNET) (p netip.Prefix, ok bool) {
	if o.SourceScope != 0 { // must be 0 in queries (section 6)
		return p, false
	}
	if o.SourceNetmask == 0 {
		return p, true
	}
	ip, ok := netip.AddrFromSlice(o.Address)
	if !ok {
		return p, false
	}
	if o.Family == 1 {
		ip = ip.Unmap()
	}
	p, err := ip.Prefix(int(o.SourceNetmask))
	return p, err == nil
}
