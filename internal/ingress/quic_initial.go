package ingress

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
)

// Versions of QUIC whose Initial packets can be read here.
const (
	quicV1 = 0x00000001 // RFC 9000
	quicV2 = 0x6b3343cf // RFC 9369
)

// Limits of what is read before anything of a visitor is known.
const (
	minInitial    = 1200     // bytes of a datagram with an Initial packet, RFC 9000 section 14.1
	maxConnID     = 20       // bytes, RFC 9000 section 17.2
	maxQUICHello  = 16 << 10 // bytes of a ClientHello; browsers send up to 3 KiB
	maxFragments  = 128      // of a ClientHello that wait for those before them
	maxHelloInits = 64       // Initial packets that one ClientHello may come in
)

var (
	errNotInitial = errors.New("not a QUIC Initial packet that can be read")
	errBadInitial = errors.New("malformed QUIC Initial packet")
)

// quicKind is a type of packets with a long header, RFC 9000 section 17.2.
type quicKind uint8

const (
	quicInitial quicKind = iota
	quicZeroRTT
	quicHandshake
	quicRetry
	quicUnknown // of a version that is not known here
)

// longHeader is what a packet with a long header shows to everybody.
type longHeader struct {
	version    uint32
	kind       quicKind
	dcid, scid []byte
	rest       []byte // what follows the connection ids
}

func isLong(p []byte) bool { return p[0]&0x80 != 0 }

// parseLong reads a long header as far as all versions have it in common
// (RFC 8999 section 5.1), and the packet's type where the version is known.
func parseLong(p []byte) (h longHeader, ok bool) {
	b := bytesOf(p)
	if _, ok = b.take(1); !ok || !isLong(p) {
		return h, false
	}
	v, ok := b.take(4)
	if !ok {
		return h, false
	}
	h.version = binary.BigEndian.Uint32(v)
	d, ok1 := b.vector(1)
	s, ok2 := b.vector(1)
	if !ok1 || !ok2 {
		return h, false
	}
	h.dcid, h.scid, h.rest, h.kind = d, s, b, quicUnknown
	switch h.version {
	case quicV1:
		h.kind = quicKind(p[0] >> 4 & 3)
	case quicV2:
		h.kind = quicKind((p[0]>>4 + 3) & 3) // RFC 9369 section 3.2
	default:
		return h, true
	}
	return h, len(d) <= maxConnID && len(s) <= maxConnID
}

// varint removes an integer of RFC 9000 section 16.
func (b *bytesOf) varint() (n uint64, ok bool) {
	if len(*b) == 0 {
		return 0, false
	}
	first := (*b)[0]
	p, ok := b.take(1 << (first >> 6))
	if !ok {
		return 0, false
	}
	n = uint64(first & 0x3f)
	for _, c := range p[1:] {
		n = n<<8 | uint64(c)
	}
	return n, true
}

// initialKeys open the Initial packets that a visitor sends. They are made of
// the connection id that the visitor has chosen: no secret, RFC 9001 section 5.2.
type initialKeys struct {
	aead cipher.AEAD
	iv   [12]byte
	hp   cipher.Block
}

var (
	saltV1 = []byte{0x38, 0x76, 0x2c, 0xf7, 0xf5, 0x59, 0x34, 0xb3, 0x4d, 0x17, 0x9a, 0xe6, 0xa4, 0xc8, 0x0c, 0xad, 0xcc, 0xbb, 0x7f, 0x0a}
	saltV2 = []byte{0x0d, 0xed, 0xe3, 0xde, 0xf7, 0x00, 0xa6, 0xdb, 0x81, 0x93, 0x81, 0xbe, 0x6e, 0x26, 0x9d, 0xcb, 0xf9, 0xbd, 0x2e, 0xd9}
)

func newInitialKeys(version uint32, dcid []byte) (k initialKeys, err error) {
	salt, prefix := saltV1, "quic "
	if version == quicV2 {
		salt, prefix = saltV2, "quicv2 "
	}
	initial, err := hkdf.Extract(sha256.New, dcid, salt)
	if err != nil {
		return k, err
	}
	secret, err := expandLabel(initial, "client in", sha256.Size)
	if err != nil {
		return k, err
	}
	key, err1 := expandLabel(secret, prefix+"key", 16)
	iv, err2 := expandLabel(secret, prefix+"iv", len(k.iv))
	hp, err3 := expandLabel(secret, prefix+"hp", 16)
	if err = errors.Join(err1, err2, err3); err != nil {
		return k, err
	}
	copy(k.iv[:], iv)
	block, err1 := aes.NewCipher(key)
	k.hp, err2 = aes.NewCipher(hp)
	if err = errors.Join(err1, err2); err != nil {
		return k, err
	}
	k.aead, err = cipher.NewGCM(block)
	return k, err
}

// expandLabel is HKDF-Expand-Label of RFC 8446 section 7.1, without a context.
func expandLabel(secret []byte, label string, n int) ([]byte, error) {
	label = "tls13 " + label
	info := make([]byte, 0, 4+len(label))
	info = binary.BigEndian.AppendUint16(info, uint16(n))
	info = append(info, byte(len(label)))
	info = append(info, label...)
	info = append(info, 0)
	return hkdf.Expand(sha256.New, secret, string(info), n)
}

// open takes protection off a packet: first byte to end, pn is where the packet
// number begins. p stays as it is; the payload lies in buf if that is large enough.
func (k *initialKeys) open(p []byte, pn int, buf []byte) (payload []byte, ok bool) {
	if len(p) < pn+4+aes.BlockSize {
		return nil, false
	}
	var mask [aes.BlockSize]byte
	k.hp.Encrypt(mask[:], p[pn+4:pn+4+aes.BlockSize]) // RFC 9001 section 5.4
	first := p[0] ^ mask[0]&0x0f
	size := int(first&3) + 1
	head := append(buf[:0], p[:pn+size]...)
	head[0] = first
	nonce := k.iv
	for i := range size {
		head[pn+i] ^= mask[1+i]
		// A visitor has had nothing acknowledged yet: the number is whole.
		nonce[len(nonce)-size+i] ^= head[pn+i]
	}
	payload, err := k.aead.Open(head[len(head):], nonce[:], p[pn+size:], head)
	return payload, err == nil
}

// initialReader finds the ClientHello in the Initial packets of one connection,
// in whatever order and pieces they come.
type initialReader struct {
	version uint32
	dcid    []byte
	keys    initialKeys
	packets int

	data  []byte // of the CRYPTO stream, from 0
	known []span // which bytes of data have come: in order, apart from each other
}

type span struct{ from, to int }

// newInitialReader reads packets like h; it fails for a version that is not known.
func newInitialReader(h longHeader) (*initialReader, error) {
	if h.kind != quicInitial {
		return nil, errNotInitial
	}
	keys, err := newInitialKeys(h.version, h.dcid)
	if err != nil {
		return nil, err
	}
	return &initialReader{version: h.version, dcid: append([]byte(nil), h.dcid...), keys: keys}, nil
}

// feed reads a datagram. done is false as long as more are needed. An error
// says that no ClientHello will come of it; packets that can't be opened are
// passed over, for anybody can send them in the visitor's name.
func (r *initialReader) feed(datagram []byte) (hello Hello, done bool, err error) {
	var mem [2048]byte
	for len(datagram) > 0 {
		h, ok := parseLong(datagram)
		if !ok || h.version != r.version || string(h.dcid) != string(r.dcid) {
			break // coalesced packets have one connection id, RFC 9000 section 12.2
		}
		b := bytesOf(h.rest)
		if h.kind == quicInitial {
			if _, ok = b.varintVector(); !ok { // token
				break
			}
		} else if h.kind == quicRetry {
			break
		}
		n, ok := b.varint()
		if !ok || n > uint64(len(b)) {
			break
		}
		pn := len(datagram) - len(b)
		packet := datagram[:pn+int(n)]
		datagram = datagram[len(packet):]
		if h.kind != quicInitial {
			continue
		}
		if r.packets++; r.packets > maxHelloInits {
			return Hello{}, false, errBadInitial
		}
		payload, ok := r.keys.open(packet, pn, mem[:])
		if !ok {
			continue
		}
		if err := r.frames(payload); err != nil {
			return Hello{}, false, err
		}
	}
	return r.hello()
}

// varintVector removes a vector whose length is a variable-length integer.
func (b *bytesOf) varintVector() (p bytesOf, ok bool) {
	n, ok := b.varint()
	if !ok || n > uint64(len(*b)) {
		return nil, false
	}
	return b.take(int(n))
}

// frames takes in the frames of a packet: those that an Initial packet of a
// visitor may hold, RFC 9000 section 17.2.2.
func (r *initialReader) frames(b bytesOf) error {
	for len(b) > 0 {
		kind := b[0]
		b = b[1:]
		switch kind {
		case 0x00, 0x01: // PADDING, PING
		case 0x02, 0x03: // ACK
			if !skipACK(&b, kind == 0x03) {
				return errBadInitial
			}
		case 0x06: // CRYPTO
			offset, ok1 := b.varint()
			data, ok2 := b.varintVector()
			if !ok1 || !ok2 {
				return errBadInitial
			}
			if offset+uint64(len(data)) > maxQUICHello {
				return errHelloLarge
			}
			if !r.add(int(offset), data) {
				return errBadInitial
			}
		default: // CONNECTION_CLOSE, or nothing that may be here
			return errBadInitial
		}
	}
	return nil
}

func skipACK(b *bytesOf, ecn bool) bool {
	_, ok1 := b.varint() // largest
	_, ok2 := b.varint() // delay
	n, ok3 := b.varint()
	_, ok4 := b.varint() // first range
	if !ok1 || !ok2 || !ok3 || !ok4 || n > uint64(len(*b)) {
		return false
	}
	n *= 2
	if ecn {
		n += 3
	}
	for range n {
		if _, ok := b.varint(); !ok {
			return false
		}
	}
	return true
}

// add takes in a piece of the CRYPTO stream; false if there are too many gaps.
func (r *initialReader) add(from int, p []byte) bool {
	to := from + len(p)
	if to == from {
		return true
	}
	if to > len(r.data) {
		r.data = append(r.data, make([]byte, to-len(r.data))...)
	}
	copy(r.data[from:], p)
	merged := make([]span, 0, len(r.known)+1)
	in := span{from, to}
	for _, s := range r.known {
		switch {
		case s.to < in.from:
			merged = append(merged, s)
		case in.to < s.from:
			merged = append(merged, in)
			in = s
		default:
			in = span{min(s.from, in.from), max(s.to, in.to)}
		}
	}
	r.known = append(merged, in)
	return len(r.known) <= maxFragments
}

// hello reads what has come without a gap.
func (r *initialReader) hello() (Hello, bool, error) {
	if len(r.known) == 0 || r.known[0].from != 0 {
		return Hello{}, false, nil
	}
	b := r.data[:r.known[0].to]
	if b[0] != typeClientHello {
		return Hello{}, false, errBadHello
	}
	if len(b) < 4 {
		return Hello{}, false, nil
	}
	want := 4 + int(b[1])<<16 + int(b[2])<<8 + int(b[3])
	switch {
	case want > maxQUICHello:
		return Hello{}, false, errHelloLarge
	case len(b) < want:
		return Hello{}, false, nil
	}
	hello, ok := parseHello(b[4:want])
	if !ok {
		return Hello{}, false, errBadHello
	}
	return hello, true, nil
}
