package ingress

import (
	"context"

	"webgw.dev/webgw"
)

// FlowUpstream opens flows to workloads: through a node's session, or direct.
type FlowUpstream interface {
	// OpenFlow begins a flow to one target of a route. deliver is called, from
	// one goroutine at a time, with each datagram of the workload; it must not
	// wait, nor keep p, and may be called a last time while Close returns. That
	// the other side refuses may show only later, as FlowEnd tells. The error is a
	// *webgw.Error. ctx bounds the opening, not the flow.
	OpenFlow(ctx context.Context, r *Route, t webgw.Target, from Origin, deliver func(p []byte)) (Flow, error)
}

// Flow carries a visitor's datagrams to a workload, as unreliably as UDP does.
type Flow interface {
	// Send passes a datagram of up to MaxDatagram bytes on, or drops it. It
	// never waits, and copies p if it must keep it.
	Send(p []byte)

	// Close ends the flow.
	Close() error
}

// FlowEnd is implemented by flows that may end on their own.
type FlowEnd interface {
	// Ended returns nil while the flow lives, then why it has ended: a
	// *webgw.Error if the other side has refused it or was lost, another error if
	// it was only idle.
	Ended() error
}

// MaxDatagram is the payload of the largest UDP datagram over IPv4, bytes.
const MaxDatagram = 65507
