// Package tunnel carries public connections from a gateway to nodes that can't
// be dialed. A node dials out and keeps, per gateway, one control connection
// (the session) and a pool of ready data connections; each data connection
// carries one stream at a time and is reused. The wire format is specified in
// docs/spec/tunnel.md.
//
// It must not know what an exposure means, who may reach what, or what is
// spoken inside a stream: the node's role judges every request, the gateway's
// role chooses the node.
package tunnel

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"webgw.dev/webgw"
)

// Kind of a data connection: how a stream's bytes are protected on it.
type Kind uint8

const (
	// Sealed streams travel inside TLS 1.3.
	Sealed Kind = 1
	// Handoff streams travel as they are, because the visitor and the workload
	// encrypt end to end already: only the request is sealed.
	Handoff Kind = 2
	// Flows of datagrams share a few connections, inside TLS 1.3.
	Flows Kind = 3
)

// String gives the kind's name, a metric label.
func (k Kind) String() string {
	switch k {
	case Sealed:
		return "sealed"
	case Handoff:
		return "handoff"
	case Flows:
		return "flows"
	}
	return "unknown"
}

// frameType is the first byte of a frame on a data connection; three bytes of
// payload length (big endian) follow.
type frameType uint8

const (
	frameData   frameType = 1 // bytes of the stream
	frameOpen   frameType = 2 // gateway to node: a Request; begins a stream
	frameAccept frameType = 3 // node to gateway: the workload is connected
	frameRefuse frameType = 4 // node to gateway: a refusal; no stream
	frameEnd    frameType = 5 // the sender's direction has ended
	frameRest   frameType = 6 // what follows on the connection is the rest of the stream, to its end
)

const (
	headerLen  = 4
	maxRequest = 16 << 10 // payload of frameOpen and frameRefuse, bytes
	maxData    = 1 << 20  // payload of frameData a receiver accepts, bytes
	attachLen  = 2 + 8 + 32 + 32
	maxControl = 64 << 10 // a control message, bytes
)

func putHeader(h []byte, t frameType, n int) {
	binary.BigEndian.PutUint32(h, uint32(t)<<24|uint32(n))
}

// parseHeader reads a frame header and refuses lengths that the type doesn't
// allow, before anything is kept for them.
func parseHeader(h []byte) (t frameType, n int, err error) {
	v := binary.BigEndian.Uint32(h)
	t, n = frameType(v>>24), int(v&0xffffff)
	switch t {
	case frameData:
		if n == 0 || n > maxData {
			return t, n, fmt.Errorf("tunnel: data frame of %d bytes", n)
		}
	case frameOpen, frameRefuse:
		if n == 0 || n > maxRequest {
			return t, n, fmt.Errorf("tunnel: request frame of %d bytes", n)
		}
	case frameAccept:
		if n > 64 {
			return t, n, fmt.Errorf("tunnel: accept frame of %d bytes", n)
		}
	case frameEnd, frameRest:
		if n != 0 {
			return t, n, fmt.Errorf("tunnel: frame type %d of %d bytes", t, n)
		}
	default:
		return t, n, fmt.Errorf("tunnel: unknown frame type %d", t)
	}
	return t, n, nil
}

// attach is the first message of the node on a data connection, inside TLS. It
// is of fixed length, so that a stranger costs the gateway 74 bytes.
type attach struct {
	version uint8
	kind    Kind
	epoch   uint64
	node    webgw.ID
	proof   [32]byte
}

func (a attach) encode() []byte {
	b := make([]byte, 0, attachLen)
	b = append(b, a.version, byte(a.kind))
	b = binary.BigEndian.AppendUint64(b, a.epoch)
	b = append(b, a.node[:]...)
	return append(b, a.proof[:]...)
}

func decodeAttach(b []byte) (attach, error) {
	if len(b) != attachLen {
		return attach{}, fmt.Errorf("tunnel: attach of %d bytes", len(b))
	}
	a := attach{version: b[0], kind: Kind(b[1]), epoch: binary.BigEndian.Uint64(b[2:]), node: webgw.ID(b[10:42]), proof: [32]byte(b[42:])}
	if a.version != webgw.Protocol {
		return a, fmt.Errorf("tunnel: attach of version %d", a.version)
	}
	if a.kind < Sealed || a.kind > Flows {
		return a, fmt.Errorf("tunnel: attach of unknown kind %d", a.kind)
	}
	return a, nil
}

// refusal is the body of frameRefuse and of the control message refuse.
type refusal struct {
	Kind    webgw.ErrorKind `json:"kind"`
	Message string          `json:"message"`
}

// err is the refusal as an error, with no more of the other end's own words
// than a sentence: kinds become labels of metrics.
func (r refusal) err(op string) error {
	switch r.Kind {
	case webgw.Invalid, webgw.Unauthenticated, webgw.Forbidden, webgw.NotFound, webgw.Taken, webgw.Stale, webgw.Expired,
		webgw.Exhausted, webgw.Unavailable, webgw.Unsupported, webgw.Internal:
	default:
		r.Kind = webgw.Unavailable
	}
	return &webgw.Error{Op: op, Kind: r.Kind, Public: shorten(r.Message)}
}

// maxReason bounds the text of a refusal, bytes.
const maxReason = 500

func shorten(s string) string {
	if len(s) > maxReason {
		s = strings.ToValidUTF8(s[:maxReason], "")
	}
	return s
}

func refusalOf(err error) refusal {
	r := refusal{Kind: webgw.KindOf(err), Message: "the node could not connect to the workload"}
	if e, ok := asError(err); ok {
		r.Message = e.Sentence()
	}
	r.Message = shorten(r.Message)
	return r
}

// messageType is the first byte of a control message. A receiver skips types
// that it does not know.
type messageType uint8

const (
	msgHello   messageType = 1 // node: who speaks which versions
	msgWelcome messageType = 2 // gateway: the session's epoch and secret
	msgRefuse  messageType = 3 // gateway: no session, and why
	msgPing    messageType = 4 // both: I am here
	msgDemand  messageType = 5 // gateway: dial so many data connections
	msgShort   messageType = 6 // node: so many of them could not be dialed
	msgDrain   messageType = 7 // both: no new streams from now on
	msgEvent   messageType = 8 // gateway: something the node's owner may want to see
)

type hello struct {
	Min      int    `json:"min"`
	Max      int    `json:"max"`
	Software string `json:"software"`
	Events   bool   `json:"events,omitempty"`
	Flows    bool   `json:"flows,omitempty"` // the node carries datagrams
}

type welcome struct {
	Version int    `json:"version"`
	Epoch   uint64 `json:"epoch"`
	Secret  []byte `json:"secret"`
}

// demand counts data connections by kind.
type demand struct {
	Sealed  int `json:"sealed,omitempty"`
	Handoff int `json:"handoff,omitempty"`
	Flows   int `json:"flows,omitempty"`
}

// writeMessage sends one control message: four bytes of length (type and body),
// the type, the body as JSON.
func writeMessage(w io.Writer, t messageType, body any) error {
	var data []byte
	if body != nil {
		var err error
		if data, err = json.Marshal(body); err != nil {
			return err
		}
	}
	if len(data)+1 > maxControl {
		return fmt.Errorf("tunnel: control message of %d bytes", len(data))
	}
	b := make([]byte, 0, 5+len(data))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)+1))
	b = append(b, byte(t))
	_, err := w.Write(append(b, data...))
	return err
}

// readMessage reads one control message of at most most bytes.
func readMessage(r io.Reader, most int) (messageType, []byte, error) {
	var h [5]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(h[:4])
	if n < 1 || n > uint32(most) {
		return 0, nil, fmt.Errorf("tunnel: control message of %d bytes", n)
	}
	body := make([]byte, n-1)
	_, err := io.ReadFull(r, body)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return messageType(h[4]), body, err
}
