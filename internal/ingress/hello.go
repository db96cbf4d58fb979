package ingress

import (
	"encoding/binary"
	"errors"
)

// Hello is what a ClientHello says that routing needs (RFC 8446 section 4.1.2).
type Hello struct {
	ServerName string   // as sent, or ""
	ALPN       []string // in the client's order
}

// maxHello bounds the bytes of a ClientHello, record headers included. Real
// ones, post-quantum key shares and padding included, stay below 4 KiB.
const maxHello = 64 << 10

// maxExtensions bounds the extensions of a ClientHello; browsers send about 20.
const maxExtensions = 100

var (
	errNotTLS     = errors.New("not a TLS ClientHello")
	errBadHello   = errors.New("malformed ClientHello")
	errHelloLarge = errors.New("ClientHello too large")
)

const (
	recordHandshake = 22
	typeClientHello = 1
	recordHeader    = 5
	maxRecord       = 1 << 14 // RFC 8446 section 5.1
	maxLegacyMajor  = 3
)

// helloReader finds a ClientHello in the bytes of a connection as they come.
// It may be split over reads and over records at any byte.
type helloReader struct {
	next    int    // offset of the next record header
	message []byte // of the handshake message, once it spans records
	spans   bool
}

// feed looks at raw: all bytes so far, more than at the last call. done is
// false when more are needed.
func (r *helloReader) feed(raw []byte) (hello Hello, done bool, err error) {
	if len(raw) > 0 && raw[0] != recordHandshake || len(raw) > 1 && raw[1] != maxLegacyMajor {
		return Hello{}, false, errNotTLS
	}
	for len(raw)-r.next >= recordHeader {
		h := raw[r.next:]
		size := int(binary.BigEndian.Uint16(h[3:]))
		if h[0] != recordHandshake || h[1] != maxLegacyMajor || size == 0 || size > maxRecord {
			return Hello{}, false, errBadHello
		}
		if r.next+recordHeader+size > maxHello {
			return Hello{}, false, errHelloLarge
		}
		if len(h) < recordHeader+size {
			// What there is already may show that waiting is in vain.
			if !r.spans && len(h) > recordHeader && h[recordHeader] != typeClientHello {
				return Hello{}, false, errNotTLS
			}
			return Hello{}, false, nil
		}
		fragment := h[recordHeader : recordHeader+size]
		r.next += recordHeader + size
		if r.spans {
			r.message = append(r.message, fragment...)
		} else {
			r.message = fragment
		}
		if r.message[0] != typeClientHello {
			return Hello{}, false, errNotTLS
		}
		if len(r.message) >= 4 {
			want := 4 + int(r.message[1])<<16 + int(r.message[2])<<8 + int(r.message[3])
			switch {
			case want > maxHello:
				return Hello{}, false, errHelloLarge
			case len(r.message) > want:
				// Nothing may follow it in its record (RFC 8446 section 5.1: a
				// key change could come next).
				return Hello{}, false, errBadHello
			case len(r.message) == want:
				hello, ok := parseHello(r.message[4:])
				if !ok {
					return Hello{}, false, errBadHello
				}
				return hello, true, nil
			}
		}
		if !r.spans {
			r.spans = true
			r.message = append(make([]byte, 0, 4<<10), fragment...)
		}
	}
	return Hello{}, false, nil
}

// bytesOf is a cursor over a structure of TLS (RFC 8446 section 3).
type bytesOf []byte

// take removes n bytes from the front.
func (b *bytesOf) take(n int) (p bytesOf, ok bool) {
	if n > len(*b) {
		return nil, false
	}
	p, *b = (*b)[:n], (*b)[n:]
	return p, true
}

// vector removes a vector whose length takes size bytes.
func (b *bytesOf) vector(size int) (p bytesOf, ok bool) {
	l, ok := b.take(size)
	if !ok {
		return nil, false
	}
	n := 0
	for _, c := range l {
		n = n<<8 | int(c)
	}
	return b.take(n)
}

// parseHello reads the body of a ClientHello. It is as strict as crypto/tls in
// all that leads to the name and the protocols.
func parseHello(body bytesOf) (h Hello, ok bool) {
	if _, ok = body.take(2 + 32); !ok { // legacy_version, random
		return h, false
	}
	if id, ok := body.vector(1); !ok || len(id) > 32 {
		return h, false
	}
	if suites, ok := body.vector(2); !ok || len(suites)%2 != 0 {
		return h, false
	}
	if _, ok = body.vector(1); !ok { // legacy_compression_methods
		return h, false
	}
	if len(body) == 0 {
		return h, true // before TLS 1.2 there may be no extensions
	}
	extensions, ok := body.vector(2)
	if !ok || len(body) != 0 {
		return h, false
	}
	var seen [maxExtensions]uint16
	for n := 0; len(extensions) > 0; n++ {
		t, ok1 := extensions.take(2)
		data, ok2 := extensions.vector(2)
		if !ok1 || !ok2 || n == maxExtensions {
			return h, false
		}
		seen[n] = binary.BigEndian.Uint16(t)
		for _, s := range seen[:n] {
			if s == seen[n] {
				return h, false // RFC 8446 section 4.2: at most one of each type
			}
		}
		switch seen[n] {
		case 0: // server_name, RFC 6066 section 3
			if h.ServerName, ok = parseServerName(data); !ok {
				return h, false
			}
		case 16: // application_layer_protocol_negotiation, RFC 7301
			if h.ALPN, ok = parseALPN(data); !ok {
				return h, false
			}
		}
	}
	return h, true
}

func parseServerName(data bytesOf) (name string, ok bool) {
	list, ok := data.vector(2)
	if !ok || len(data) != 0 || len(list) == 0 {
		return "", false
	}
	for len(list) > 0 {
		t, ok1 := list.take(1)
		n, ok2 := list.vector(2)
		if !ok1 || !ok2 || len(n) == 0 {
			return "", false
		}
		if t[0] != 0 { // not a host_name
			continue
		}
		if name != "" || len(n) > 255 {
			return "", false
		}
		name = string(n)
	}
	return name, true
}

func parseALPN(data bytesOf) (protocols []string, ok bool) {
	list, ok := data.vector(2)
	if !ok || len(data) != 0 || len(list) == 0 {
		return nil, false
	}
	for len(list) > 0 {
		p, ok := list.vector(1)
		if !ok || len(p) == 0 || len(protocols) == 64 {
			return nil, false
		}
		protocols = append(protocols, string(p))
	}
	return protocols, true
}
