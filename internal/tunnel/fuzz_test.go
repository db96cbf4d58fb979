package tunnel

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"webgw.dev/webgw/internal/netx"
)

// scripted is a connection that reads from a script, in pieces.
type scripted struct {
	net.Conn
	r *bytes.Reader
}

func (s *scripted) Read(p []byte) (int, error)      { return s.r.Read(p[:min(len(p), 777)]) }
func (s *scripted) Write(p []byte) (int, error)     { return len(p), nil }
func (s *scripted) Close() error                    { return nil }
func (s *scripted) SetReadDeadline(time.Time) error { return nil }
func (s *scripted) RemoteAddr() net.Addr            { return &net.TCPAddr{} }

// Whatever the peer sends, a data connection either yields what was framed or
// an error; never a panic, never more bytes than came.
func FuzzFrames(f *testing.F) {
	frame := func(t frameType, p string) []byte {
		b := make([]byte, headerLen)
		putHeader(b, t, len(p))
		return append(b, p...)
	}
	f.Add(bytes.Join([][]byte{frame(frameAccept, ""), frame(frameData, "hello"), frame(frameData, "x"), frame(frameEnd, "")}, nil))
	f.Add(frame(frameRefuse, `{"kind":"forbidden","message":"no"}`))
	f.Add(frame(frameOpen, `{"target":"127.0.0.1:80"}`))
	f.Add([]byte{1, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, script []byte) {
		for _, node := range []bool{false, true} {
			d, err := scriptedConn(script)
			if err != nil {
				t.Fatal(err)
			}
			if node {
				if _, err := d.awaitRequest(); err != nil {
					continue
				}
			} else if err := d.answer(); err != nil {
				continue
			}
			total := 0
			for {
				p, err := d.payload(true)
				total += len(p)
				if total > len(script) {
					t.Fatalf("%d bytes out of a script of %d", total, len(script))
				}
				if err == io.EOF && !d.ended {
					t.Fatal("an end without an end frame")
				}
				if err != nil {
					break
				}
			}
		}
	})
}

func FuzzControl(f *testing.F) {
	var b bytes.Buffer
	writeMessage(&b, msgHello, hello{1, 1, "webgw", true, true})
	f.Add(b.Bytes())
	f.Add([]byte{0, 0, 0, 0, 1})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, p []byte) {
		_, body, err := readMessage(bytes.NewReader(p), maxHello)
		if err == nil && len(body) >= maxHello {
			t.Fatalf("a message of %d bytes passed a limit of %d", len(body), maxHello)
		}
		if a, err := decodeAttach(p); err == nil && !bytes.Equal(a.encode(), p) {
			t.Fatal("an attach message has two spellings")
		}
	})
}

func scriptedConn(script []byte) (*dataConn, error) {
	c := &scripted{r: bytes.NewReader(script)}
	d := &dataConn{kind: Handoff, raw: c, src: netx.NewSource(c)}
	return d, nil
}
