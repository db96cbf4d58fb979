package gateway

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ingress"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/tunnel"
)

// OpenFlow implements ingress.FlowUpstream.
func (u upstream) OpenFlow(ctx context.Context, r *ingress.Route, t webgw.Target, from ingress.Origin, deliver func(p []byte)) (ingress.Flow, error) {
	g := u.g
	if !t.Node.IsZero() {
		f, err := g.tunnel.OpenFlow(t.Node, tunnel.Request{Exposure: r.Key, Target: t.Address,
			Visitor: from.Visitor, Local: from.Local, Host: from.Host}, deliver)
		if err != nil {
			return nil, err // not f: a nil *Flow in an interface is not nil
		}
		return f, nil
	}
	conn, err := g.direct.dial(ctx, "udp", t.Direct)
	if err != nil {
		g.troubled(r.Key, err)
		return nil, err
	}
	packets, err := netx.NewPackets(conn)
	if err != nil {
		conn.Close()
		return nil, &webgw.Error{Op: "dial target", Kind: webgw.Internal, Public: "the socket carries no datagrams", Err: err}
	}
	f := &directFlow{conn: conn, packets: packets}
	g.flows.Go(func() { g.troubled(r.Key, f.receive(deliver)) })
	return f, nil
}

// directFlow is a flow to a target that the gateway reaches itself.
type directFlow struct {
	conn    net.Conn
	packets netx.Packets
	end     atomic.Pointer[error]
}

var (
	_ ingress.FlowUpstream = upstream{}
	_ ingress.FlowEnd      = (*directFlow)(nil)
	_ ingress.FlowEnd      = (*tunnel.Flow)(nil)
)

// receive passes on what comes from the target until the flow ends. It returns
// what was wrong with the target.
func (f *directFlow) receive(deliver func(p []byte)) error {
	for {
		err := f.packets.Receive(func(p []byte, _ netip.AddrPort, _ netip.Addr) { deliver(p) })
		if err != nil {
			f.fail(err)
			break
		}
	}
	f.conn.Close()
	if err := f.Ended(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// fail ends the flow, unless it has ended.
func (f *directFlow) fail(err error) {
	if !errors.Is(err, net.ErrClosed) {
		public := "the target's socket failed"
		if errors.Is(err, syscall.ECONNREFUSED) {
			public = "nothing listens at the target's address"
		}
		err = &webgw.Error{Op: "dial target", Kind: webgw.Unavailable, Public: public, Err: err}
	}
	f.end.CompareAndSwap(nil, &err)
}

// Send implements ingress.Flow.
func (f *directFlow) Send(p []byte) {
	// Dropped is dropped; but an answer that nobody listens comes only once.
	if err := f.packets.Send(p, netip.AddrPort{}, netip.Addr{}); errors.Is(err, syscall.ECONNREFUSED) {
		f.fail(err)
		f.conn.Close()
	}
}

// Ended implements ingress.FlowEnd.
func (f *directFlow) Ended() error {
	if e := f.end.Load(); e != nil {
		return *e
	}
	return nil
}

// Close implements ingress.Flow.
func (f *directFlow) Close() error {
	err := net.ErrClosed
	f.end.CompareAndSwap(nil, &err)
	return f.conn.Close()
}
