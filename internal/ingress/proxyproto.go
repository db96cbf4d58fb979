package ingress

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"net"
	"net/netip"
	"slices"

	"github.com/pires/go-proxyproto"

	"webgw.dev/webgw"
)

// The PROXY protocol, versions 1 and 2
// (https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt).

// Limits of an inbound header.
const (
	maxProxyV1 = 107     // bytes, section 2.1
	maxProxyV2 = 2 << 10 // bytes; addresses and all TLVs of a balancer with a client certificate fit
)

const proxyV2Head = 16 // bytes before the addresses

var (
	proxyV1 = []byte("PROXY ")
	proxyV2 = proxyproto.SIGV2

	errProxyHeader = errors.New("ingress: malformed PROXY header")
)

// stated is what a PROXY header says of a connection. Zero: nothing, it is the
// balancer's own.
type stated struct {
	visitor netip.AddrPort
	local   netip.AddrPort // where the visitor connected to
	asked   string         // the host that the visitor asked for, normalized; "": unknown
}

// cutProxy looks for a PROXY header at the start of all bytes so far. n is its
// length, 0 if none is there; done is false when more bytes are needed to say.
func cutProxy(head []byte) (s stated, n int, done bool, err error) {
	switch {
	case bytes.HasPrefix(head, proxyV1):
		end := bytes.Index(head[:min(len(head), maxProxyV1)], crlf)
		if end < 0 && len(head) < maxProxyV1 {
			return stated{}, 0, false, nil
		}
		if end < 0 {
			return stated{}, 0, true, errProxyHeader
		}
		n = end + len(crlf)
	case bytes.HasPrefix(head, proxyV2):
		if len(head) < proxyV2Head {
			return stated{}, 0, false, nil
		}
		n = proxyV2Head + int(binary.BigEndian.Uint16(head[proxyV2Head-2:]))
		if n > maxProxyV2 {
			return stated{}, 0, true, errProxyHeader
		}
		if len(head) < n {
			return stated{}, 0, false, nil
		}
	default:
		return stated{}, 0, !bytes.HasPrefix(proxyV1, head) && !bytes.HasPrefix(proxyV2, head), nil
	}
	s, err = parseProxy(head[:n])
	if err != nil {
		return stated{}, 0, true, err
	}
	return s, n, true, nil
}

// parseProxy reads one whole header.
func parseProxy(b []byte) (s stated, err error) {
	r := bufio.NewReader(bytes.NewReader(b))
	h, err := proxyproto.Read(r)
	if err != nil || r.Buffered() != 0 {
		return s, errProxyHeader
	}
	tlvs, err := h.TLVs()
	if err != nil {
		return s, errProxyHeader
	}
	if slices.ContainsFunc(tlvs, func(t proxyproto.TLV) bool { return t.Type == proxyproto.PP2_TYPE_CRC32C }) && !sumRight(b, len(tlvs)) {
		return s, errProxyHeader
	}
	if h.Command.IsLocal() || h.TransportProtocol.IsUnspec() {
		return stated{}, nil
	}
	from, to, ok := h.TCPAddrs()
	if !ok {
		return s, errProxyHeader // datagrams or sockets, on a TCP port
	}
	s = stated{visitor: addrPort(from), local: addrPort(to)}
	for _, t := range tlvs {
		if host := webgw.NormalizeHost(string(t.Value)); t.Type == proxyproto.PP2_TYPE_AUTHORITY && webgw.CheckHost("", host, false) == nil {
			s.asked = host
		}
	}
	if a := s.visitor.Addr(); !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || !s.local.Addr().IsValid() {
		return stated{}, errProxyHeader
	}
	return s, nil
}

// sumRight checks the CRC32C of a header of version 2 (section 2.2.3): over all
// of it, with zeros in place of the sum.
func sumRight(b []byte, tlvs int) bool {
	at := proxyV2Head
	switch b[13] >> 4 { // address family
	case 1:
		at += 12
	case 2:
		at += 36
	case 3:
		at += 216
	}
	found := false
	for range tlvs {
		if len(b)-at < 3 {
			return false
		}
		size := int(binary.BigEndian.Uint16(b[at+1:]))
		if b[at] == byte(proxyproto.PP2_TYPE_CRC32C) {
			if found || size != 4 || len(b)-at < 7 {
				return false
			}
			found = true
			zeroed := bytes.Clone(b)
			clear(zeroed[at+3 : at+7])
			if crc32.Checksum(zeroed, crc32.MakeTable(crc32.Castagnoli)) != binary.BigEndian.Uint32(b[at+3:]) {
				return false
			}
		}
		at += 3 + size
	}
	return found
}

// trusts reports whether a PROXY header is believed from this address.
func (s *Server) trusts(from netip.Addr) bool {
	return slices.ContainsFunc(s.TrustedProxies, func(p netip.Prefix) bool { return p.Contains(from) })
}

// heed reads the PROXY header of a connection from a trusted balancer, if it
// begins with one, and takes the visitor to be who it states. What was read
// beyond it stays in v.early. It returns why the connection must end, or "".
func (s *Server) heed(v *visit) (reason string) {
	var from stated
	var n int
	var bad error
	v.early, reason = peek(v.raw, nil, v.since.Add(s.limits.Hello), maxProxyV2, func(head []byte) (done bool) {
		from, n, done, bad = cutProxy(head)
		return done
	})
	if bad != nil {
		return reasonProxy
	}
	if reason != "" {
		return reason
	}
	if v.early = v.early[n:]; len(v.early) == 0 {
		v.early = nil
	}
	if !from.visitor.IsValid() {
		return ""
	}
	v.local, v.asked = from.local, from.asked
	return s.doors.move(v, from.visitor, &s.limits)
}

// announce puts the PROXY header that the exposure wants before head.
func (r *Route) announce(v *visit, head []byte) []byte {
	version := byte(2)
	if r.Exposure.ProxyProtocol == webgw.ProxyV1 {
		version = 1
	}
	h := proxyproto.HeaderProxyFromAddrs(version, net.TCPAddrFromAddrPort(v.visitor), net.TCPAddrFromAddrPort(v.local))
	if version == 2 && r.Exposure.Protocol == webgw.TLS {
		var tlvs []proxyproto.TLV
		var reader helloReader
		// It was read once already, to get here; only those who want to know
		// pay for it twice.
		if hello, done, err := reader.feed(head); done && err == nil {
			if len(hello.ALPN) > 0 {
				tlvs = append(tlvs, proxyproto.TLV{Type: proxyproto.PP2_TYPE_ALPN, Value: []byte(hello.ALPN[0])})
			}
			tlvs = append(tlvs, proxyproto.TLV{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte(webgw.NormalizeHost(hello.ServerName))})
		} else if v.asked != "" {
			tlvs = append(tlvs, proxyproto.TLV{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte(v.asked)})
		}
		if err := h.SetTLVs(tlvs); err != nil { // none of them is long enough
			v.server.log.Error("PROXY header without names", "exposure", r.Key.String(), "err", err)
		}
	}
	b, err := h.Format()
	if err != nil { // both addresses are of one family, or both can be written as IPv6
		v.server.log.Error("PROXY header can't be written", "exposure", r.Key.String(), "err", err)
		b, _ = (&proxyproto.Header{Version: version, Command: proxyproto.LOCAL, TransportProtocol: proxyproto.UNSPEC}).Format()
	}
	return append(b, head...)
}
