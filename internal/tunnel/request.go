package tunnel

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"webgw.dev/webgw"
)

// Request tells the node what to connect a stream to, and for whom. A node
// believes none of it before it has checked it against signed records.
type Request struct {
	Kind     Kind           `json:"-"`
	Exposure webgw.Key      `json:"exposure"`
	Target   string         `json:"target"`           // address as seen from the node
	Visitor  netip.AddrPort `json:"visitor,omitzero"` // who connected
	Local    netip.AddrPort `json:"local,omitzero"`   // where they connected to
	Host     string         `json:"host,omitempty"`   // host or server name, if known
	Prompt   bool           `json:"prompt,omitempty"` // the gateway waits for the answer: send it at once
}

// flagPrompt is Request.Prompt on the wire.
const flagPrompt = 1

var (
	errRequest      = errors.New("tunnel: malformed request")
	errRequestField = errors.New("tunnel: a field of the request is too long")
)

// appendRequest appends the wire form of r: one comes before every stream, so
// it is kept short. See docs/spec/tunnel.md.
func appendRequest(b []byte, r *Request) ([]byte, error) {
	if len(r.Exposure.Kind) > 0xff || len(r.Exposure.Name) > 0xff || len(r.Target) > 0xffff || len(r.Host) > 0xffff {
		return nil, errRequestField
	}
	var flags byte
	if r.Prompt {
		flags |= flagPrompt
	}
	b = append(b, flags)
	b = append(append(b, byte(len(r.Exposure.Kind))), r.Exposure.Kind...)
	b = append(b, r.Exposure.Owner[:]...)
	b = append(append(b, byte(len(r.Exposure.Name))), r.Exposure.Name...)
	b = append(binary.BigEndian.AppendUint16(b, uint16(len(r.Target))), r.Target...)
	b = append(binary.BigEndian.AppendUint16(b, uint16(len(r.Host))), r.Host...)
	b = appendAddress(b, r.Visitor)
	return appendAddress(b, r.Local), nil
}

// appendAddress appends 16 bytes of address, IPv4 as in RFC 4291 section
// 2.5.5.2, and a port; zeros for none. A zone is left out.
func appendAddress(b []byte, a netip.AddrPort) []byte {
	if !a.IsValid() {
		return append(b, make([]byte, 18)...)
	}
	ip := a.Addr().As16()
	return binary.BigEndian.AppendUint16(append(b, ip[:]...), a.Port())
}

// parseRequest reads a request; what follows it belongs to later versions.
func parseRequest(b []byte, r *Request) error {
	p := parser{b: b}
	flags := p.take(1)
	kind := p.take(p.length(1))
	owner := p.take(32)
	name := p.take(p.length(1))
	target := p.take(p.length(2))
	host := p.take(p.length(2))
	visitor, local := p.take(18), p.take(18)
	if p.short {
		return errRequest
	}
	r.Prompt = flags[0]&flagPrompt != 0
	r.Exposure = webgw.Key{Kind: webgw.Kind(kind), Owner: webgw.ID(owner), Name: string(name)}
	r.Target, r.Host = string(target), string(host)
	r.Visitor, r.Local = parseAddress(visitor), parseAddress(local)
	return nil
}

func parseAddress(b []byte) netip.AddrPort {
	a := netip.AddrFrom16([16]byte(b)).Unmap()
	port := binary.BigEndian.Uint16(b[16:])
	if a.IsUnspecified() && port == 0 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a, port)
}

// parser takes fields off the front of b; short tells that one was not there.
type parser struct {
	b     []byte
	short bool
}

func (p *parser) take(n int) []byte {
	if p.short = p.short || n > len(p.b); p.short {
		return nil
	}
	f := p.b[:n]
	p.b = p.b[n:]
	return f
}

// length takes a length of so many bytes.
func (p *parser) length(bytes int) (n int) {
	for _, c := range p.take(bytes) {
		n = n<<8 | int(c)
	}
	return n
}
