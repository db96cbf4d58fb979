package ingress

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

// helloBytes returns the ClientHello that crypto/tls sends, with a
// post-quantum key share by default.
func helloBytes(t testing.TB, c *tls.Config) []byte {
	t.Helper()
	near, far := net.Pipe()
	defer far.Close()
	go func() {
		defer near.Close()
		tls.Client(near, c).Handshake() // ends when far is closed
	}()
	head := make([]byte, recordHeader)
	if _, err := io.ReadFull(far, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(far, body); err != nil {
		t.Fatal(err)
	}
	return append(head, body...)
}

// split puts a ClientHello into records of at most size bytes.
func split(hello []byte, size int) (out []byte) {
	for body := range slices.Chunk(hello[recordHeader:], size) {
		out = append(out, recordHandshake, 3, 1, byte(len(body)>>8), byte(len(body)))
		out = append(out, body...)
	}
	return out
}

func read(t *testing.T, raw []byte, at ...int) (Hello, bool, error) {
	t.Helper()
	var r helloReader
	for _, n := range append(at, len(raw)) {
		if h, done, err := r.feed(raw[:n]); done || err != nil {
			return h, done, err
		}
	}
	return Hello{}, false, nil
}

func TestHelloSplitAnywhere(t *testing.T) {
	hello := helloBytes(t, &tls.Config{ServerName: "Blog.Example", NextProtos: []string{"h2", "http/1.1"}})
	if len(hello) < 1400 {
		t.Errorf("%d bytes: no post-quantum ClientHello", len(hello))
	}
	check := func(what string, n int, raw []byte, at ...int) {
		h, done, err := read(t, raw, at...)
		if !done || err != nil || h.ServerName != "Blog.Example" || !slices.Equal(h.ALPN, []string{"h2", "http/1.1"}) {
			t.Fatalf("%s %d: %+v, %v, %v", what, n, h, done, err)
		}
	}
	for n := range len(hello) {
		check("read split at", n, hello, n)
		if n > 0 {
			check("records of", n, split(hello, n))
		}
	}
	raw := split(hello, 7)
	every := make([]int, len(raw))
	for i := range every {
		every[i] = i
	}
	check("byte by byte", 0, raw, every...)
	for n := range len(hello) - 1 {
		if _, done, err := read(t, hello[:n+1]); done || err != nil {
			t.Fatalf("%d of %d bytes: %v, %v", n+1, len(hello), done, err)
		}
	}
}

func TestHelloRefused(t *testing.T) {
	good := helloBytes(t, &tls.Config{ServerName: "a.example"})
	long := append([]byte{recordHandshake, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff}, make([]byte, 1<<14-4)...)
	for _, tt := range []struct {
		name string
		raw  string
		want error
	}{
		{"http", "GET / HTTP/1.1\r\n", errNotTLS},
		{"SSLv2", "\x80\x2e\x01\x03\x01", errNotTLS},
		{"alert", "\x15\x03\x01\x00\x02\x02\x28", errNotTLS},
		{"another handshake message", "\x16\x03\x01\x00\x04\x02\x00\x00\x00", errNotTLS},
		{"another one, seen early", "\x16\x03\x01\x01\x00\x02", errNotTLS},
		{"empty record", "\x16\x03\x01\x00\x00", errBadHello},
		{"record too long", "\x16\x03\x01\x40\x01", errBadHello},
		{"message over the cap", "\x16\x03\x01\x00\x04\x01\x01\x00\x00", errHelloLarge},
		{"records over the cap", strings.Repeat(string(long), 5), errHelloLarge},
		{"something between the records", "\x16\x03\x01\x00\x01\x01" + "\x14\x03\x03\x00\x01\x01", errBadHello},
		{"something behind it", string(good[:3]) + string(binary.BigEndian.AppendUint16(nil, uint16(len(good)-recordHeader+1))) + string(good[recordHeader:]) + "x", errBadHello},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, _, err := read(t, []byte(tt.raw)); !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
		})
	}
}

// onceConn gives a TLS server its bytes, and then the end.
type onceConn struct {
	io.Reader
	net.Conn
}

func (c onceConn) Read(p []byte) (int, error)       { return c.Reader.Read(p) }
func (onceConn) Write(p []byte) (int, error)        { return len(p), nil }
func (onceConn) Close() error                       { return nil }
func (onceConn) SetDeadline(time.Time) error        { return nil }
func (onceConn) SetReadDeadline(t time.Time) error  { return nil }
func (onceConn) SetWriteDeadline(t time.Time) error { return nil }
func (onceConn) RemoteAddr() net.Addr               { return &net.TCPAddr{} }
func (onceConn) LocalAddr() net.Addr                { return &net.TCPAddr{} }

// Whatever we route, crypto/tls must read in the same way: else a name could
// be routed as one and served as another.
func FuzzHelloAsCryptoTLS(f *testing.F) {
	for _, c := range []*tls.Config{
		{ServerName: "a.example"},
		{ServerName: "a.example", NextProtos: []string{"h2"}, MaxVersion: tls.VersionTLS12},
		{InsecureSkipVerify: true},
		{ServerName: "a.example", CurvePreferences: []tls.CurveID{tls.X25519}},
	} {
		hello := helloBytes(f, c)
		f.Add(hello)
		f.Add(split(hello, 100))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var r helloReader
		ours, done, err := r.feed(raw)
		if done && err != nil {
			t.Fatal("done and in error")
		}
		var theirs *tls.ClientHelloInfo
		stop := errors.New("seen")
		server := tls.Server(onceConn{Reader: bytes.NewReader(raw)}, &tls.Config{MinVersion: tls.VersionTLS10, GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			theirs = h
			return nil, stop
		}})
		if err := server.HandshakeContext(context.Background()); err == nil {
			t.Fatal("a handshake without an answer")
		}
		if theirs == nil || !done {
			return // either may refuse what the other reads; only what both take must agree
		}
		if ours.ServerName != theirs.ServerName || !slices.Equal(ours.ALPN, theirs.SupportedProtos) {
			t.Fatalf("ours %+v, theirs %q %q", ours, theirs.ServerName, theirs.SupportedProtos)
		}
	})
}
