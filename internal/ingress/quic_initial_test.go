package ingress

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"webgw.dev/webgw/internal/netx/memnet"
)

// firstFlight returns the datagrams that quic-go's client sends first.
func firstFlight(t testing.TB, c *tls.Config, version quic.Version) (flight [][]byte) {
	t.Helper()
	w := memnet.New(1)
	server, client := w.Host("server", netip.MustParseAddr("198.51.100.1")), w.Host("client", netip.MustParseAddr("203.0.113.1"))
	in, err := server.ListenPacket(t.Context(), "udp", ":443")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := client.ListenPacket(t.Context(), "udp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	tr := &quic.Transport{Conn: quiet{out}}
	ctx, cancel := context.WithCancel(t.Context())
	dialed := make(chan struct{})
	go func() {
		defer close(dialed)
		tr.Dial(ctx, &net.UDPAddr{IP: net.IPv4(198, 51, 100, 1), Port: 443}, c, &quic.Config{Versions: []quic.Version{version}})
	}()
	defer func() { cancel(); <-dialed; tr.Close() }()
	b := make([]byte, 2048)
	for range 2 { // the key share makes it too long for one
		in.SetReadDeadline(time.Now().Add(5 * time.Second))
		n, _, err := in.ReadFrom(b)
		if err != nil {
			t.Fatal(err)
		}
		flight = append(flight, bytes.Clone(b[:n]))
	}
	return flight
}

// quiet is a socket of whose buffers quic-go says nothing.
type quiet struct{ net.PacketConn }

func (quiet) SetReadBuffer(int) error  { return nil }
func (quiet) SetWriteBuffer(int) error { return nil }

func readInitials(t testing.TB, datagrams ...[]byte) (hello Hello, done bool, err error) {
	t.Helper()
	h, ok := parseLong(datagrams[0])
	if !ok {
		t.Fatal("no long header")
	}
	r, err := newInitialReader(h)
	if err != nil {
		return hello, false, err
	}
	for _, d := range datagrams {
		if hello, done, err = r.feed(d); done || err != nil {
			return hello, done, err
		}
	}
	return hello, done, nil
}

func TestInitialsOfQUICGo(t *testing.T) {
	for _, version := range []quic.Version{quic.Version1, quic.Version2} {
		flight := firstFlight(t, &tls.Config{ServerName: "vault.example", NextProtos: []string{"h3"}}, version)
		if _, done, err := readInitials(t, flight[0]); done || err != nil {
			t.Errorf("%v: one of two datagrams: done %v, %v", version, done, err)
		}
		for _, order := range [][][]byte{flight, {flight[1], flight[0]}, {flight[0], flight[0], flight[1]}} {
			hello, done, err := readInitials(t, order...)
			if err != nil || !done || hello.ServerName != "vault.example" || !slices.Equal(hello.ALPN, []string{"h3"}) {
				t.Errorf("%v: %+v, done %v, %v", version, hello, done, err)
			}
		}
		// One flipped bit: the packet is passed over, whoever has sent it.
		bad := bytes.Clone(flight[0])
		bad[len(bad)-1] ^= 1
		if _, done, err := readInitials(t, bad, flight[1]); done || err != nil {
			t.Errorf("%v: forged: done %v, %v", version, done, err)
		}
	}
}

// The packet of RFC 9001 appendix A.2, and that of RFC 9369 appendix A.2, as far
// as their headers and the start of their payload go: keys, protection, numbers.
func TestInitialKeysOfTheRFCs(t *testing.T) {
	dcid, _ := hex.DecodeString("8394c8f03e515708")
	for _, c := range []struct {
		version uint32
		sample  string
		mask    string
	}{
		{quicV1, "d1b1c98dd7689fb8ec11d242b123dc9b", "437b9aec36"},
		{quicV2, "ffe67b6abcdb4298b485dd04de806071", "94a0c95e80"},
	} {
		k, err := newInitialKeys(c.version, dcid)
		if err != nil {
			t.Fatal(err)
		}
		sample, _ := hex.DecodeString(c.sample)
		var mask [aes.BlockSize]byte
		k.hp.Encrypt(mask[:], sample)
		if got := hex.EncodeToString(mask[:5]); got != c.mask {
			t.Errorf("version %x: mask %s, want %s", c.version, got, c.mask)
		}
	}
}

// seal makes an Initial packet; frames is padded to fill a datagram of size.
func seal(t testing.TB, version uint32, dcid []byte, pn uint32, frames []byte, size int) []byte {
	t.Helper()
	return sealFrom(t, []byte{9, 9, 9, 9}, version, dcid, pn, frames, size)
}

func sealFrom(t testing.TB, scid []byte, version uint32, dcid []byte, pn uint32, frames []byte, size int) []byte {
	t.Helper()
	k, err := newInitialKeys(version, dcid)
	if err != nil {
		t.Fatal(err)
	}
	first := byte(0xc3)
	if version == quicV2 {
		first = 0xd3
	}
	p := binary.BigEndian.AppendUint32([]byte{first}, version)
	p = append(append(p, byte(len(dcid))), dcid...)
	p = append(append(p, byte(len(scid))), scid...)
	p = append(p, 0) // token
	n := max(size-len(p)-2, 4+len(frames)+k.aead.Overhead(), 4+20)
	p = binary.BigEndian.AppendUint16(p, 0x4000|uint16(n))
	at := len(p)
	p = binary.BigEndian.AppendUint32(p, pn)
	payload := append(bytes.Clone(frames), make([]byte, n-4-len(frames)-k.aead.Overhead())...)
	nonce := k.iv
	for i := range 4 {
		nonce[8+i] ^= p[at+i]
	}
	p = k.aead.Seal(p, nonce[:], payload, p)
	var mask [aes.BlockSize]byte
	k.hp.Encrypt(mask[:], p[at+4:at+4+aes.BlockSize])
	p[0] ^= mask[0] & 0x0f
	for i := range 4 {
		p[at+i] ^= mask[1+i]
	}
	return p
}

// crypto is a CRYPTO frame.
func crypto(offset int, data []byte) []byte {
	b := []byte{0x06, 0x80, byte(offset >> 16), byte(offset >> 8), byte(offset), byte(0x40 | len(data)>>8), byte(len(data))}
	return append(b, data...)
}

func helloMessage(t testing.TB, name string) []byte {
	return helloBytes(t, &tls.Config{ServerName: name, NextProtos: []string{"h3"}})[recordHeader:]
}

func TestInitialsInPieces(t *testing.T) {
	m := helloMessage(t, "blog.example")
	dcid := []byte("12345678")
	n := len(m)
	join := func(parts ...[]byte) []byte { return slices.Concat(parts...) }
	one := func(frames ...[]byte) []byte { return seal(t, quicV1, dcid, 0, join(frames...), minInitial) }
	ping, ack, ackECN := []byte{1}, []byte{2, 5, 0, 1, 0, 1, 1}, []byte{3, 5, 0, 0, 0, 1, 2, 3}
	var shreds [][]byte
	for i := 0; i < n; i += 20 {
		shreds = append(shreds, crypto(i, m[i:min(i+20, n)]))
	}
	backwards := slices.Clone(shreds)
	slices.Reverse(backwards)
	half := len(shreds) / 2
	for name, c := range map[string]struct {
		datagrams [][]byte
		done      bool
		err       error
	}{
		"in order":        {datagrams: [][]byte{one(crypto(0, m[:700])), one(crypto(700, m[700:]))}, done: true},
		"out of order":    {datagrams: [][]byte{one(crypto(700, m[700:])), one(crypto(0, m[:700]))}, done: true},
		"overlapping":     {datagrams: [][]byte{one(crypto(0, m[:900])), one(crypto(500, m[500:]))}, done: true},
		"with a hole":     {datagrams: [][]byte{one(crypto(0, m[:700])), one(crypto(701, m[701:]))}},
		"shredded":        {datagrams: [][]byte{one(join(backwards[:half]...)), one(ping, join(backwards[half:]...))}, done: true},
		"with other news": {datagrams: [][]byte{one(ping, ack, ackECN, crypto(0, m[:700])), one(crypto(700, m[700:]), ping)}, done: true},
		"coalesced": {datagrams: [][]byte{join(seal(t, quicV1, dcid, 0, crypto(0, m[:700]), 0), seal(t, quicV1, dcid, 1, crypto(700, m[700:]), 0),
			seal(t, quicV1, []byte("87654321"), 2, nil, 0))}, done: true},
		"version 2":            {datagrams: [][]byte{seal(t, quicV2, dcid, 7, crypto(0, m), 2000)}, done: true},
		"closed at once":       {datagrams: [][]byte{one([]byte{0x1c, 0, 0, 0})}, err: errBadInitial},
		"a frame out of place": {datagrams: [][]byte{one([]byte{0x08, 0, 1})}, err: errBadInitial},
		"cut frame":            {datagrams: [][]byte{seal(t, quicV1, dcid, 0, crypto(0, m[:700])[:600], 0)}, err: errBadInitial},
		"acks without end":     {datagrams: [][]byte{one([]byte{2, 5, 0, 0xff, 255, 255, 255, 255, 255, 255, 255})}, err: errBadInitial},
		"too far":              {datagrams: [][]byte{one(crypto(maxQUICHello, m[:700]))}, err: errHelloLarge},
		"not a hello":          {datagrams: [][]byte{one(crypto(0, []byte{2, 0, 0, 1, 1}))}, err: errBadHello},
		"huge":                 {datagrams: [][]byte{one(crypto(0, []byte{1, 1, 0, 0, 1}))}, err: errHelloLarge},
		"malformed hello":      {datagrams: [][]byte{one(crypto(0, []byte{1, 0, 0, 1, 1}))}, err: errBadHello},
		"nothing":              {datagrams: [][]byte{one()}},
	} {
		hello, done, err := readInitials(t, c.datagrams...)
		if done != c.done || err != c.err || done && hello.ServerName != "blog.example" {
			t.Errorf("%s: %+v, done %v, %v", name, hello, done, err)
		}
	}
	var bits [][]byte // too many gaps
	for i := range maxFragments + 2 {
		bits = append(bits, crypto(2*i+1, []byte{1}))
	}
	if _, _, err := readInitials(t, one(join(bits...))); err != errBadInitial {
		t.Errorf("%d gaps: %v", len(bits), err)
	}
	// Without an end.
	r, _ := newInitialReader(longHeader{version: quicV1, dcid: dcid})
	var err error
	for range maxHelloInits + 1 {
		_, _, err = r.feed(one(ping))
	}
	if err != errBadInitial {
		t.Errorf("%d packets: %v", maxHelloInits+1, err)
	}
}

func FuzzInitial(f *testing.F) {
	m := helloMessage(f, "blog.example")
	f.Add(crypto(0, m), uint32(0), false)
	f.Add(slices.Concat(crypto(700, m[700:]), []byte{1, 0, 2, 5, 0, 0, 0}, crypto(0, m[:700])), uint32(3), true)
	f.Fuzz(func(t *testing.T, frames []byte, pn uint32, raw bool) {
		dcid := []byte("12345678")
		if len(frames) > 8000 {
			return
		}
		p := frames
		if !raw {
			p = seal(t, quicV1, dcid, pn, frames, minInitial)
		}
		if len(p) == 0 {
			return
		}
		h, ok := parseLong(p)
		if !ok || h.kind != quicInitial {
			return
		}
		r, err := newInitialReader(h)
		if err != nil {
			t.Fatal(err)
		}
		before := bytes.Clone(p)
		r.feed(p)
		if !bytes.Equal(before, p) {
			t.Error("the datagram was changed")
		}
		if len(r.data) > maxQUICHello || len(r.known) > maxFragments+1 {
			t.Errorf("%d bytes in %d pieces are held", len(r.data), len(r.known))
		}
		for i, s := range r.known {
			if s.from >= s.to || s.to > len(r.data) || i > 0 && r.known[i-1].to >= s.from {
				t.Fatalf("pieces %v", r.known)
			}
		}
	})
}

func BenchmarkInitial(b *testing.B) {
	p := seal(b, quicV1, []byte("12345678"), 0, crypto(0, helloMessage(b, "blog.example")[:700]), minInitial)
	h, _ := parseLong(p)
	b.ReportAllocs()
	for b.Loop() {
		r, err := newInitialReader(h)
		if err != nil {
			b.Fatal(err)
		}
		if _, _, err := r.feed(p); err != nil {
			b.Fatal(err)
		}
	}
}
