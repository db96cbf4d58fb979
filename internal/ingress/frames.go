package ingress

import (
	"encoding/binary"
	"errors"
	"net"

	"golang.org/x/net/http2/hpack"

	"webgw.dev/webgw/internal/netx"
)

// Of HTTP/2 frames (RFC 9113 section 4.1).
const (
	frameHeader   = 9
	maxFrame      = 16 << 10 // bytes of payload that the gateway takes: the least that it must
	typeHeaders   = 1
	typeSettings  = 4
	typeContinue  = 9
	flagAck       = 0x1
	flagEnd       = 0x4 // END_HEADERS
	flagPadded    = 0x8
	flagPriority  = 0x20
	hpackTable    = 4 << 10 // SETTINGS_HEADER_TABLE_SIZE, which is left at its default
	settingLen    = 6
	maxSettings   = 64 * settingLen // bytes of a frame in which repeated ones are looked for
	clientPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
)

var (
	errPreface         = errors.New("ingress: HTTP/2 was agreed on, and something else is spoken")
	errConnectionField = errors.New("ingress: a field of HTTP/1 connections in HTTP/2")
)

// frames is a visitor's connection that speaks HTTP/2, read by net/http's
// server. It ends the connection where that server would answer what must be
// refused: fields that belong to HTTP/1 connections (RFC 9113 section 8.2.2). And
// it lets a client state a setting twice, of which the later counts (section
// 6.5.3) and which that server refuses. All else is passed on as it is: what is
// wrong there, the server finds.
type frames struct {
	net.Conn
	v *visit

	out     []byte // judged, not handed out yet
	err     error  // sticky
	preface int    // bytes of it that have passed
	head    [frameHeader]byte
	have    int    // bytes of head
	left    int    // bytes of the frame's payload to come
	held    []byte // payload of a frame that must be looked at
	block   bool   // a block of fields goes on in the next frame
	blind   bool   // the server is going to end the connection: nothing is judged any more
	bad     bool   // the block has a field that must not be
	fields  *hpack.Decoder
}

func newFrames(c net.Conn, v *visit) *frames {
	f := &frames{Conn: c, v: v}
	f.fields = hpack.NewDecoder(hpackTable, func(h hpack.HeaderField) {
		switch h.Name {
		case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
			f.bad = true
		case "te":
			f.bad = f.bad || h.Value != "trailers"
		}
	})
	f.fields.SetMaxStringLength(maxHead)
	return f
}

// CloseWrite ends the direction to the visitor.
func (f *frames) CloseWrite() error { return netx.CloseWrite(f.Conn) }

// Read hands out what was judged.
func (f *frames) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if len(f.out) > 0 {
			n := copy(p, f.out)
			if f.out = f.out[n:]; len(f.out) == 0 {
				f.out = nil
			}
			return n, nil
		}
		if f.err != nil {
			return 0, f.err
		}
		n, err := f.Conn.Read(p)
		if n == 0 {
			return 0, err
		}
		if n = f.judge(p[:n]); n > 0 {
			return n, nil
		}
	}
}

// judge goes through b. It returns how many bytes at its front go on as they
// are; what follows them is put into out.
func (f *frames) judge(b []byte) (same int) {
	direct := true
	pass := func(p []byte) {
		if direct {
			same += len(p)
		} else {
			f.out = append(f.out, p...)
		}
	}
	for len(b) > 0 && f.err == nil {
		switch {
		case f.blind:
			pass(b)
			b = nil
		case f.preface < len(clientPreface):
			n := min(len(b), len(clientPreface)-f.preface)
			if string(b[:n]) != clientPreface[f.preface:f.preface+n] {
				// The server might take it for HTTP/1, and answers any error but
				// that of a read as HTTP/1.
				f.err = &net.OpError{Op: "read", Net: "tcp", Err: errPreface}
				return same
			}
			f.preface += n
			pass(b[:n])
			b = b[n:]
		case f.have == 0 && len(b) >= frameHeader && b[3] != typeSettings:
			copy(f.head[:], b)
			f.begin()
			pass(b[:frameHeader])
			b = b[frameHeader:]
		case f.have < frameHeader:
			direct = false
			n := copy(f.head[f.have:], b)
			b = b[n:]
			if f.have += n; f.have == frameHeader {
				f.begin()
				if f.head[3] != typeSettings || f.blind {
					f.out = append(f.out, f.head[:]...)
				}
			}
		default:
			n := min(len(b), f.left)
			f.left -= n
			switch f.head[3] {
			case typeSettings:
				direct = false
				f.held = append(f.held, b[:n]...)
			case typeHeaders, typeContinue:
				f.held = append(f.held, b[:n]...)
				if f.left == 0 {
					f.judgeFields()
				}
				if f.err == nil {
					pass(b[:n])
				}
			default:
				pass(b[:n])
			}
			b = b[n:]
		}
		if f.have == frameHeader && f.left == 0 && !f.blind {
			if f.head[3] == typeSettings {
				f.settle()
			}
			f.have, f.held = 0, nil
		}
	}
	return same
}

// begin looks at the frame's header, which is complete.
func (f *frames) begin() {
	f.have = frameHeader
	f.left = int(f.head[0])<<16 | int(f.head[1])<<8 | int(f.head[2])
	t := f.head[3]
	switch {
	case f.left > maxFrame, f.block != (t == typeContinue):
		f.blind = true // the server ends the connection: FRAME_SIZE_ERROR, or PROTOCOL_ERROR
	case t == typeHeaders || t == typeContinue:
		f.block = f.head[4]&flagEnd == 0
	}
}

// judgeFields decodes a frame's part of a block of fields.
func (f *frames) judgeFields() {
	b, flags := f.held, f.head[4]
	if f.head[3] == typeHeaders {
		pad := 0
		if flags&flagPadded != 0 && len(b) > 0 {
			pad, b = int(b[0]), b[1:]
		}
		if flags&flagPriority != 0 {
			b = b[min(5, len(b)):]
		}
		if pad > len(b) {
			f.blind = true // PROTOCOL_ERROR
			return
		}
		b = b[:len(b)-pad]
	}
	_, err := f.fields.Write(b)
	if err == nil && !f.block {
		err = f.fields.Close()
	}
	if err != nil {
		f.blind = true // COMPRESSION_ERROR
	} else if f.bad {
		f.v.server.metrics.refused("http_" + badRequest.code)
		f.err = errConnectionField
	}
}

// settle puts a frame of settings into out, each setting once.
func (f *frames) settle() {
	b := f.held
	if len(b)%settingLen == 0 && len(b) <= maxSettings && f.head[4]&flagAck == 0 {
		var once []byte
		for i := 0; i < len(b); i += settingLen {
			repeated := false
			for j := i + settingLen; j < len(b) && !repeated; j += settingLen {
				repeated = b[i] == b[j] && b[i+1] == b[j+1]
			}
			if !repeated {
				once = append(once, b[i:i+settingLen]...)
			}
		}
		b = once
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(b)))
		copy(f.head[:3], n[1:])
	}
	f.out = append(append(f.out, f.head[:]...), b...)
}
