//go:build linux

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/tls"
	"encoding/base64"
	bits "encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/coder/websocket"
)

// frame is one frame of RFC 6455 section 5.2.
type frame struct {
	first   byte // FIN, RSV1-3, opcode
	payload string
}

const (
	fin      = 0x80
	rsv1     = 0x40
	more     = 0x00 // a continuation
	text     = 0x01
	binaryOp = 0x02
	closing  = 0x08
	ping     = 0x09
	pong     = 0x0a
	masked   = 0x80 // in the second byte
)

// closeFrame is a Close with a code and a reason.
func closeFrame(code uint16, reason string) frame {
	return frame{fin | closing, string(bits.BigEndian.AppendUint16(nil, code)) + reason}
}

// append appends the frame as it is sent, masked if mask is not nil.
func (f frame) append(b []byte, mask []byte) []byte {
	bit := byte(0)
	if mask != nil {
		bit = masked
	}
	b = append(b, f.first)
	switch n := len(f.payload); {
	case n < 126:
		b = append(b, bit|byte(n))
	case n < 1<<16:
		b = bits.BigEndian.AppendUint16(append(b, bit|126), uint16(n))
	default:
		b = bits.BigEndian.AppendUint64(append(b, bit|127), uint64(n))
	}
	b = append(b, mask...)
	at := len(b)
	b = append(b, f.payload...)
	if mask != nil {
		for i := range b[at:] {
			b[at+i] ^= mask[i%4]
		}
	}
	return b
}

// readFrame reads a frame; wasMasked tells how it was sent.
func readFrame(r io.Reader) (f frame, wasMasked bool, err error) {
	var head [8]byte
	if _, err := io.ReadFull(r, head[:2]); err != nil {
		return f, false, err
	}
	f.first, wasMasked = head[0], head[1]&masked != 0
	n := uint64(head[1] &^ masked)
	switch n {
	case 126:
		if _, err = io.ReadFull(r, head[:2]); err == nil {
			n = uint64(bits.BigEndian.Uint16(head[:2]))
		}
	case 127:
		if _, err = io.ReadFull(r, head[:8]); err == nil {
			n = bits.BigEndian.Uint64(head[:8])
		}
	}
	if err == nil && n > 1<<26 {
		err = fmt.Errorf("a frame of %d bytes", n)
	}
	var mask [4]byte
	if err == nil && wasMasked {
		_, err = io.ReadFull(r, mask[:])
	}
	if err != nil {
		return f, wasMasked, err
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return f, wasMasked, err
	}
	if wasMasked {
		for i := range b {
			b[i] ^= mask[i%4]
		}
	}
	f.payload = string(b)
	return f, wasMasked, nil
}

// judgeFrame is what section 5 and 7 ask a server to find wrong: the code to
// close with, or 0. opened is the opcode of the message under way, or 0.
func judgeFrame(f frame, wasMasked bool, opened byte) (code uint16) {
	op := f.first & 0x0f
	switch {
	case !wasMasked || f.first&0x70 != 0:
		return 1002
	case op >= closing && (f.first&fin == 0 || len(f.payload) > 125 || op > pong):
		return 1002
	case op == more && opened == 0 || (op == text || op == binaryOp) && opened != 0 || op > binaryOp && op < closing:
		return 1002
	case op == closing && len(f.payload) == 1:
		return 1002
	case op == closing && len(f.payload) > 1:
		switch c := bits.BigEndian.Uint16([]byte(f.payload)); {
		case c < 1000 || c >= 1004 && c <= 1006 || c >= 1015 && c < 3000 || c > 4999:
			return 1002
		case !utf8.ValidString(f.payload[2:]):
			return 1007
		}
	}
	return 0
}

// strictEcho is a server that sends each message back, and is strict.
func strictEcho(r io.Reader, w io.Writer) error {
	send := func(f frame) error {
		_, err := w.Write(f.append(nil, nil))
		return err
	}
	var message []byte
	var opened byte
	for {
		f, wasMasked, err := readFrame(r)
		if err != nil {
			return err
		}
		if code := judgeFrame(f, wasMasked, opened); code != 0 {
			return send(closeFrame(code, ""))
		}
		switch op := f.first & 0x0f; op {
		case closing:
			return send(f)
		case ping:
			if err := send(frame{fin | pong, f.payload}); err != nil {
				return err
			}
		case text, binaryOp, more:
			if op != more {
				opened = op
			}
			message = append(message, f.payload...)
			if f.first&fin == 0 {
				continue
			}
			if opened == text && !utf8.Valid(message) {
				return send(closeFrame(1007, ""))
			}
			if err := send(frame{fin | opened, string(message)}); err != nil {
				return err
			}
			message, opened = nil, 0
		}
	}
}

// chat is the workload of the tests below. Each path has its own manners.
type chat struct {
	smuggled atomic.Int64
	counted  chan int64 // bytes that came after the server's half-close
}

func (c *chat) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/":
		return
	case "/smuggled":
		c.smuggled.Add(1)
		return
	case "/coder":
		coderEcho(w, r)
		return
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), 500)
		return
	}
	defer conn.Close()
	fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n", accept(r.Header.Get("Sec-WebSocket-Key")))
	if rw.Flush() != nil {
		return
	}
	switch r.URL.Path {
	case "/strict":
		if strictEcho(rw, conn) == nil { // the visitor closes TCP after the Close, or is late
			io.Copy(io.Discard, rw)
		}
	case "/visitor-ends-first":
		n, err := io.Copy(io.Discard, rw)
		conn.Write(frame{fin | text, fmt.Sprint(n, " bytes, then ", err)}.append(nil, nil))
	case "/workload-ends-first":
		conn.Write(frame{fin | text, "bye"}.append(nil, nil))
		conn.(interface{ CloseWrite() error }).CloseWrite()
		n, _ := io.Copy(io.Discard, rw)
		c.counted <- n
	}
}

func accept(key string) string {
	h := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(h[:])
}

func coderEcho(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{CompressionMode: websocket.CompressionContextTakeover, Subprotocols: []string{"echo.v1"}})
	if err != nil {
		return
	}
	defer c.CloseNow()
	c.SetReadLimit(1 << 25)
	for {
		kind, p, err := c.Read(r.Context())
		if err != nil {
			return
		}
		if string(p) == "close 4001" {
			c.Close(4001, "as you wish")
			return
		}
		if err := c.Write(r.Context(), kind, p); err != nil {
			return
		}
	}
}

// The three ways of a WebSocket through the gateway.
type wsWay struct {
	name, host string
	dial       func(ctx context.Context) (net.Conn, error)
}

func TestWebSocketConformance(t *testing.T) {
	g := startGateway(t)
	g.startNode()
	c := &chat{counted: make(chan int64, 1)}
	s := httptest.NewServer(c)
	t.Cleanup(s.Close)
	host := g.exposeHTTP("ws", s.Listener.Addr().String())
	const own = "ws.example.org"
	addr, _ := tlsWorkload(t, own, c)
	g.expose("wss", "protocol: tls\nhosts: ["+own+"]", addr)
	secure := func(host string) func(context.Context) (net.Conn, error) {
		config := insecure(host)
		config.NextProtos = []string{"http/1.1"}
		return func(ctx context.Context) (net.Conn, error) {
			return (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", g.tlsPort))
		}
	}
	ways := []wsWay{
		{"plain", host, func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", g.httpPort))
		}},
		{"terminated", host, secure(host)},
		{"passthrough", own, secure(own)},
	}
	g.wait(own, func() error {
		conn, err := ways[2].dial(t.Context())
		if err == nil {
			conn.Close()
		}
		return err
	})
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			for _, tt := range webSocketCases() {
				t.Run(tt.name, func(t *testing.T) { tt.run(t, way) })
			}
			t.Run("the visitor ends first", func(t *testing.T) { visitorEndsFirst(t, way) })
			t.Run("the workload ends first", func(t *testing.T) { workloadEndsFirst(t, way, c.counted) })
			t.Run("a request behind 101", func(t *testing.T) {
				conn, r := upgrade(t, way, "/strict")
				if _, err := io.WriteString(conn, "GET /smuggled HTTP/1.1\r\nHost: "+way.host+"\r\nX: "+strings.Repeat("y", 100)+"\r\n\r\n"); err != nil {
					t.Fatal(err)
				}
				f, _, err := readFrame(r)
				if want := closeFrame(1002, ""); err != nil || f != want || c.smuggled.Load() != 0 {
					t.Errorf("answered %+v, %v, and %d requests got through", f, err, c.smuggled.Load())
				}
			})
			t.Run("coder/websocket", func(t *testing.T) { coderClient(t, way) })
		})
	}
}

type webSocketCase struct {
	name      string
	send      []frame
	want      []frame // the last one may be a Close, behind which the connection ends
	unmasked  bool
	piecemeal bool // byte by byte
}

func webSocketCases() []webSocketCase {
	large := make([]byte, 4<<20)
	newNoise(int64(len(large))).Read(large)
	word := "κόσμε" // of two and three bytes a letter
	say := func(s string) []frame { return []frame{{fin | text, s}} }
	cases := []webSocketCase{
		{name: "text", send: say("hello"), want: say("hello")},
		{name: "empty", send: say(""), want: say("")},
		{name: "125, 126, 127, 65535 and 65536 bytes", send: sizes(125, 126, 127, 65535, 65536), want: sizes(125, 126, 127, 65535, 65536)},
		{name: "4 MB in one frame", send: []frame{{fin | binaryOp, string(large)}}, want: []frame{{fin | binaryOp, string(large)}}},
		{name: "4 MB in three frames", send: []frame{{binaryOp, string(large[:1<<20])}, {more, string(large[1<<20 : 3<<20])}, {fin | more, string(large[3<<20:])}},
			want: []frame{{fin | binaryOp, string(large)}}},
		{name: "fragments", send: []frame{{text, "he"}, {more, ""}, {more, "l"}, {fin | more, "lo"}}, want: say("hello")},
		{name: "control frames between fragments", send: []frame{{text, "he"}, {fin | ping, "1"}, {more, "l"}, {fin | pong, "?"}, {fin | ping, "2"}, {fin | more, "lo"}},
			want: []frame{{fin | pong, "1"}, {fin | pong, "2"}, {fin | text, "hello"}}},
		{name: "byte by byte", send: []frame{{text, "he"}, {fin | ping, "1"}, {fin | more, "llo"}}, want: []frame{{fin | pong, "1"}, {fin | text, "hello"}}, piecemeal: true},
		{name: "a ping of 125 bytes", send: []frame{{fin | ping, strings.Repeat("p", 125)}}, want: []frame{{fin | pong, strings.Repeat("p", 125)}}},
		{name: "a ping of 126 bytes", send: []frame{{fin | ping, strings.Repeat("p", 126)}}, want: []frame{closeFrame(1002, "")}},
		{name: "an unasked pong", send: append([]frame{{fin | pong, "x"}}, say("y")...), want: say("y")},
		{name: "a ping in fragments", send: []frame{{ping, "x"}, {fin | more, "y"}}, want: []frame{closeFrame(1002, "")}},
		{name: "UTF-8 split in a letter", send: []frame{{text, word[:1]}, {fin | more, word[1:]}}, want: say(word)},
		{name: "not UTF-8", send: say("a\xffb"), want: []frame{closeFrame(1007, "")}},
		{name: "overlong UTF-8", send: say("\xc0\xaf"), want: []frame{closeFrame(1007, "")}},
		{name: "a surrogate", send: say("\xed\xa0\x80"), want: []frame{closeFrame(1007, "")}},
		{name: "half a letter", send: say(word[:1]), want: []frame{closeFrame(1007, "")}},
		{name: "not UTF-8, in fragments", send: []frame{{text, "ok"}, {fin | more, "\xfe"}}, want: []frame{closeFrame(1007, "")}},
		{name: "no UTF-8 is asked of binary", send: []frame{{fin | binaryOp, "\xff\xfe\x00"}}, want: []frame{{fin | binaryOp, "\xff\xfe\x00"}}},
		{name: "a continuation of nothing", send: []frame{{fin | more, "x"}}, want: []frame{closeFrame(1002, "")}},
		{name: "a message in a message", send: []frame{{text, "x"}, {fin | text, "y"}}, want: []frame{closeFrame(1002, "")}},
		{name: "an unknown opcode", send: []frame{{fin | 3, "x"}}, want: []frame{closeFrame(1002, "")}},
		{name: "an unknown control opcode", send: []frame{{fin | 0xb, "x"}}, want: []frame{closeFrame(1002, "")}},
		{name: "a reserved bit", send: []frame{{fin | rsv1 | text, "x"}}, want: []frame{closeFrame(1002, "")}},
		{name: "not masked", send: say("x"), want: []frame{closeFrame(1002, "")}, unmasked: true},
		{name: "a Close without a code", send: []frame{{fin | closing, ""}}, want: []frame{{fin | closing, ""}}},
		{name: "a Close of one byte", send: []frame{{fin | closing, "x"}}, want: []frame{closeFrame(1002, "")}},
		{name: "a Close with the longest reason", send: []frame{closeFrame(1000, strings.Repeat("r", 123))}, want: []frame{closeFrame(1000, strings.Repeat("r", 123))}},
		{name: "a Close whose reason is not UTF-8", send: []frame{closeFrame(1000, "\xff")}, want: []frame{closeFrame(1007, "")}},
		{name: "a Close between fragments", send: []frame{{text, "x"}, closeFrame(1001, "off")}, want: []frame{closeFrame(1001, "off")}},
	}
	for _, code := range []uint16{1000, 1001, 1003, 1007, 1011, 1014, 3000, 3999, 4000, 4999} {
		cases = append(cases, webSocketCase{name: fmt.Sprint("Close ", code), send: []frame{closeFrame(code, "why")}, want: []frame{closeFrame(code, "why")}})
	}
	for _, code := range []uint16{0, 999, 1004, 1005, 1006, 1015, 1100, 2999, 5000, 65535} {
		cases = append(cases, webSocketCase{name: fmt.Sprint("Close ", code, ", which nobody may send"), send: []frame{closeFrame(code, "")}, want: []frame{closeFrame(1002, "")}})
	}
	return cases
}

func sizes(all ...int) (frames []frame) {
	for _, n := range all {
		frames = append(frames, frame{fin | binaryOp, strings.Repeat("s", n)})
	}
	return frames
}

// upgrade opens a WebSocket by hand.
func upgrade(t *testing.T, way wsWay, path string) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn, err := way.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(15 * time.Second)); err != nil {
		t.Fatal(err)
	}
	const key = "dGhlIHNhbXBsZSBub25jZQ=="
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n", path, way.host, key); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	res, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := res.Header.Get("Sec-WebSocket-Accept"); res.StatusCode != 101 || got != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" { // section 1.3
		t.Fatalf("%s, accepted by %q", res.Status, got)
	}
	return conn, r
}

func (c webSocketCase) run(t *testing.T, way wsWay) {
	conn, r := upgrade(t, way, "/strict")
	mask := []byte{0x37, 0xfa, 0x21, 0x3d}
	if c.unmasked {
		mask = nil
	}
	var out []byte
	for _, f := range c.send {
		out = f.append(out, mask)
	}
	want := c.want
	if want[len(want)-1].first != fin|closing {
		out = closeFrame(1000, "").append(out, mask)
		want = append(want[:len(want):len(want)], closeFrame(1000, ""))
	}
	step := len(out)
	if c.piecemeal {
		step = 1
	}
	for i := 0; i < len(out); i += step {
		if _, err := conn.Write(out[i:min(i+step, len(out))]); err != nil {
			t.Fatal(err)
		}
	}
	for i, w := range want {
		got, wasMasked, err := readFrame(r)
		if err != nil || wasMasked || got != w {
			t.Fatalf("frame %d: %#x %.80q (%d bytes), %v, want %#x %.80q (%d bytes)", i, got.first, got.payload, len(got.payload), err, w.first, w.payload, len(w.payload))
		}
	}
}

func visitorEndsFirst(t *testing.T, way wsWay) {
	conn, r := upgrade(t, way, "/visitor-ends-first")
	if _, err := conn.Write(frame{fin | text, "last words"}.append(nil, []byte{1, 2, 3, 4})); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	f, _, err := readFrame(r)
	if want := (frame{fin | text, "16 bytes, then <nil>"}); err != nil || f != want {
		t.Fatalf("after the visitor's end: %+v, %v, want %+v", f, err, want)
	}
	if _, err := r.ReadByte(); err != io.EOF {
		t.Errorf("behind the last frame: %v", err)
	}
}

func workloadEndsFirst(t *testing.T, way wsWay, counted <-chan int64) {
	conn, r := upgrade(t, way, "/workload-ends-first")
	f, _, err := readFrame(r)
	if want := (frame{fin | text, "bye"}); err != nil || f != want {
		t.Fatalf("%+v, %v, want %+v", f, err, want)
	}
	if _, err := r.ReadByte(); err != io.EOF {
		t.Fatalf("behind the last frame: %v", err)
	}
	if _, err := conn.Write(make([]byte, 100_000)); err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		t.Fatal(err)
	}
	select {
	case n := <-counted:
		if n != 100_000 {
			t.Errorf("%d bytes reached the workload after it had ended its direction, want 100000", n)
		}
	case <-time.After(15 * time.Second):
		t.Error("the workload still waits for the visitor's end")
	}
}

// coderClient talks to coder/websocket's server with its client, compressed.
func coderClient(t *testing.T, way wsWay) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return way.dial(ctx) }
	client := &http.Client{Transport: &http.Transport{DialContext: dial}}
	open := func() *websocket.Conn {
		t.Helper()
		// The dialer has made TLS already, if there is any.
		c, res, err := websocket.Dial(ctx, "ws://"+way.host+"/coder", &websocket.DialOptions{HTTPClient: client, CompressionMode: websocket.CompressionContextTakeover, Subprotocols: []string{"echo.v1"}})
		if err != nil {
			t.Fatal(err)
		}
		if got := res.Header.Get("Sec-WebSocket-Extensions"); !strings.HasPrefix(got, "permessage-deflate") || c.Subprotocol() != "echo.v1" {
			t.Errorf("extensions %q, subprotocol %q", got, c.Subprotocol())
		}
		c.SetReadLimit(1 << 25)
		return c
	}
	c := open()
	defer c.CloseNow()
	pinged := make(chan error, 1)
	for i, size := range []int{0, 1, 125, 1000, 65536, 1 << 20, 1 << 21} {
		want := make([]byte, size)
		newNoise(int64(size)).Read(want[:size/2]) // the other half compresses well
		if err := c.Write(ctx, websocket.MessageBinary, want); err != nil {
			t.Fatal(err)
		}
		if i == 3 {
			go func() { pinged <- c.Ping(ctx) }()
		}
		_, got, err := c.Read(ctx)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("a message of %d bytes came back as %d: %v", size, len(got), err)
		}
	}
	if err := <-pinged; err != nil {
		t.Errorf("ping: %v", err)
	}
	if err := c.Close(websocket.StatusNormalClosure, "done"); err != nil {
		t.Error(err)
	}
	c = open()
	defer c.CloseNow()
	if err := c.Write(ctx, websocket.MessageText, []byte("close 4001")); err != nil {
		t.Fatal(err)
	}
	var closed websocket.CloseError
	if _, _, err := c.Read(ctx); !errors.As(err, &closed) || closed.Code != 4001 || closed.Reason != "as you wish" {
		t.Errorf("the workload's close came as %v", err)
	}
}
