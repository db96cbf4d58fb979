package node

import (
	"context"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/live"
	"webgw.dev/webgw/internal/tunnel"
)

// Policy is what this node's farmer allows, whatever anybody has signed.
type Policy struct {
	Owners  []webgw.ID     // whose exposures it carries; none: nobody's
	Targets []netip.Prefix // where workloads may be dialed; none: the loopback
	Unix    []string       // directories whose unix sockets may be dialed; none: no socket
	Only    []string       // the only targets that may be asked for, as exposures write them; none: any
}

var loopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

func (p Policy) targets() []netip.Prefix {
	if len(p.Targets) == 0 {
		return loopback
	}
	return p.Targets
}

// allowsSocket reports whether a unix socket's path lies below an allowed
// directory.
func (p Policy) allowsSocket(name string) bool {
	if path.Clean(name) != name || !path.IsAbs(name) {
		return false
	}
	return slices.ContainsFunc(p.Unix, func(dir string) bool {
		return strings.HasPrefix(name, strings.TrimSuffix(path.Clean(dir), "/")+"/")
	})
}

// allowed is what gateways may ask for: an immutable digest of one view.
type allowed struct {
	exposures map[webgw.Key]*webgw.Record // of allowed owners, with a target here
	gateways  map[webgw.ID]*webgw.Record  // gateway records, by the gateway's identity
	superior  chan struct{}               // closed when a newer digest is in force
}

// digest picks from a view what concerns this node.
func digest(v *live.View, self webgw.ID, owners []webgw.ID) *allowed {
	a := &allowed{map[webgw.Key]*webgw.Record{}, map[webgw.ID]*webgw.Record{}, make(chan struct{})}
	for key, s := range v.Records {
		switch r := s.Record; key.Kind {
		case webgw.KindExposure:
			here := r.Exposure.LeadsTo(func(t webgw.Target) bool { return t.Node == self })
			if here && slices.Contains(owners, r.Owner) {
				a.exposures[key] = r
			}
		case webgw.KindGateway:
			// One identity, one gateway: the record that was issued last counts.
			if old := a.gateways[r.Owner]; old == nil || r.Issued.After(old.Issued) || r.Issued.Equal(old.Issued) && r.Name > old.Name {
				a.gateways[r.Owner] = r
			}
		}
	}
	return a
}

// wanted returns the gateways that carry any of the exposures.
func (a *allowed) wanted(now time.Time) map[webgw.ID]bool {
	out := map[webgw.ID]bool{}
	for _, r := range a.exposures {
		if r.Live(now) {
			for _, g := range r.Exposure.Gateways {
				out[g] = true
			}
		}
	}
	return out
}

// Reasons of refusals, as the metric counts them.
const (
	reasonExposure = "exposure"
	reasonGateway  = "gateway"
	reasonTarget   = "target"
	reasonKind     = "kind"
	reasonAddress  = "address"
)

func forbidden(public string) *webgw.Error {
	return &webgw.Error{Op: "open stream", Kind: webgw.Forbidden, Public: public}
}

// judge decides whether gateway may have the request carried out. Every word
// of the request is checked against what the owner has signed.
func (a *allowed) judge(self, gateway webgw.ID, r tunnel.Request, now time.Time) (reason string, err *webgw.Error) {
	e := a.exposures[r.Exposure]
	if e == nil || !e.Live(now) {
		return reasonExposure, forbidden("the node carries no such exposure")
	}
	if !slices.Contains(e.Exposure.Gateways, gateway) {
		return reasonGateway, forbidden("the exposure does not name this gateway")
	}
	if want := (webgw.Target{Node: self, Address: r.Target}); !e.Exposure.Reaches(want) {
		return reasonTarget, forbidden("the exposure does not lead to this target")
	}
	datagrams := e.Exposure.Protocol == webgw.UDP || e.Exposure.Protocol == webgw.TLS && e.Exposure.QUIC
	if r.Kind == tunnel.Flows && !datagrams || r.Kind != tunnel.Flows && e.Exposure.Protocol == webgw.UDP {
		return reasonKind, forbidden("datagrams lead to exposures of protocol udp, or tls with quic, streams to all but udp")
	}
	if r.Kind == tunnel.Handoff && e.Exposure.Protocol != webgw.TLS {
		return reasonKind, forbidden("only exposures of protocol tls may be handed off")
	}
	return "", nil
}

// settle is how long a request for something unknown waits for the node's own
// view to catch up: the gateway may have heard of an exposure a moment before.
const settle = time.Second

// judgeSoon is judge, but gives a view that is under way the time to arrive.
func (n *Node) judgeSoon(ctx context.Context, gateway webgw.ID, r tunnel.Request) (string, *webgw.Error) {
	var late <-chan time.Time
	for {
		a := n.allowed.Load()
		reason, err := a.judge(n.Key.ID(), gateway, r, time.Now())
		if err == nil || reason == reasonKind {
			return reason, err
		}
		if late == nil {
			t := time.NewTimer(settle)
			defer t.Stop()
			late = t.C
		}
		select {
		case <-a.superior:
		case <-late:
			return reason, err
		case <-ctx.Done():
			return reason, err
		}
	}
}
