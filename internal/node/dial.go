package node

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/tunnel"
)

// Stream tells of one connection to a workload: when it begins or is refused,
// and, with Ended, what it carried.
type Stream struct {
	Gateway  webgw.ID
	Exposure webgw.Key
	Target   string
	Visitor  netip.AddrPort
	Ended    bool
	In, Out  int64 // bytes to and from the workload
	Took     time.Duration
	Err      error
}

// connect is the node's tunnel.Connect, for streams and flows: it judges the request, then the
// addresses that its target resolves to, and dials.
func (n *Node) connect(ctx context.Context, gateway webgw.ID, r tunnel.Request) (net.Conn, error) {
	c, err := n.dial(ctx, gateway, r)
	n.tell(Stream{Gateway: gateway, Exposure: r.Exposure, Target: r.Target, Visitor: r.Visitor, Err: err})
	return c, err
}

func (n *Node) dial(ctx context.Context, gateway webgw.ID, r tunnel.Request) (net.Conn, error) {
	if reason, err := n.judgeSoon(ctx, gateway, r); err != nil {
		n.refuse(gateway, r, reason, err)
		return nil, err
	}
	if only := n.Policy.Only; len(only) > 0 && !slices.Contains(only, r.Target) {
		err := forbidden("the node leads to another target only")
		n.refuse(gateway, r, reasonTarget, err)
		return nil, err
	}
	network, address := "tcp", r.Target
	if r.Kind == tunnel.Flows {
		network = "udp"
	}
	if path, ok := strings.CutPrefix(r.Target, "unix:"); ok {
		network, address = "unix", path
	}
	c, err := n.Net.Dial(ctx, network, address, n.control)
	if err == nil {
		n.trouble(r.Exposure, nil)
		return c, nil
	}
	if e, ok := errors.AsType[*webgw.Error](err); ok && e.Kind == webgw.Forbidden {
		n.m.refused.WithLabelValues(reasonAddress).Inc()
		n.Log.Warn("a target was not dialed", "gateway", gateway.String(), "exposure", r.Exposure, "target", r.Target, "err", err)
		n.trouble(r.Exposure, e)
		return nil, e
	}
	public := "the workload can't be reached"
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT) {
		public = "nothing listens at the workload's address"
	} else if errors.Is(err, context.DeadlineExceeded) {
		public = "the workload did not answer in time"
	}
	e := &webgw.Error{Op: "dial workload", Kind: webgw.Unavailable, Public: public, Err: err}
	n.trouble(r.Exposure, e)
	return nil, e
}

// control judges each resolved address just before it is dialed: a name that
// changes between two look-ups gains nothing.
func (n *Node) control(network, address string) error {
	if network == "unix" {
		if n.Policy.allowsSocket(address) {
			return nil
		}
		return forbidden("the node's farmer does not allow this unix socket")
	}
	at, err := netip.ParseAddrPort(address)
	if err == nil {
		err = netx.Judge(at.Addr(), n.Policy.targets())
	}
	if err == nil {
		return nil
	}
	e := forbidden("the node's farmer does not allow the address that the target leads to")
	e.Err = err
	return e
}

// refuse records that a gateway asked for what it may not have.
func (n *Node) refuse(gateway webgw.ID, r tunnel.Request, reason string, err *webgw.Error) {
	n.m.refused.WithLabelValues(reason).Inc()
	n.Log.Warn("a gateway's request was refused", "gateway", gateway.String(), "exposure", r.Exposure, "target", r.Target, "err", err)
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.states[gateway]; s != nil && !s.refused {
		s.refused = true
		poke(n.news)
	}
}
