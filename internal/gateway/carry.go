package gateway

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/live"
)

// Codes of problems that the status tells; those of the ingress come along.
const (
	PortNotOffered = "port_not_offered" // the port is not among those on offer
	NameTaken      = "name_taken"       // another owner, who was here first, holds the name or port
	NoCertificate  = "no_certificate"   // no certificate covers the name
	TargetRefused  = "target_refused"   // the last dial of a direct target failed
)

// carried is what this gateway serves out of one view. It never changes.
type carried struct {
	exposures map[webgw.Key]*webgw.Record
	nodes     map[webgw.ID]bool // targets of the exposures
	problems  []webgw.Problem
}

// carry picks the exposures that name this gateway and that it can serve.
// Where two owners claim the same name or port, who was carried before wins, then who
// was issued first: the registry lets only one through, so that this happens
// only if it is broken or lies, and then nobody is thrown out by it.
func carry(v *live.View, self webgw.ID, ports webgw.PortSet, before *carried) *carried {
	c := &carried{exposures: map[webgw.Key]*webgw.Record{}, nodes: map[webgw.ID]bool{}}
	var mine []*webgw.Record
	for r := range v.Of(webgw.KindExposure) {
		if slices.Contains(r.Exposure.Gateways, self) {
			mine = append(mine, r)
		}
	}
	rank := func(r *webgw.Record) int {
		if before.exposures[r.Key()] != nil {
			return 0
		}
		return 1
	}
	slices.SortFunc(mine, func(a, b *webgw.Record) int {
		return cmp.Or(rank(a)-rank(b), a.Issued.Compare(b.Issued), cmp.Compare(a.Key().String(), b.Key().String()))
	})
	holders := map[string]*webgw.Record{}
	problem := func(r *webgw.Record, code, format string, args ...any) {
		c.problems = append(c.problems, webgw.Problem{Exposure: r.Key(), Code: code, Text: fmt.Sprintf(format, args...)})
	}
each:
	for _, r := range mine {
		wanted, byPort := r.Exposure.Ports()
		if byPort && !ports.Covers(wanted) {
			problem(r, PortNotOffered, "this gateway does not offer port %s; it offers %s", wanted, cmp.Or(string(ports), "none"))
			continue
		}
		var claims []string
		for _, h := range r.Exposure.Hosts {
			if byPort {
				h += " on port " + wanted.String()
			}
			claims = append(claims, h)
		}
		names := len(claims)
		for n := int(wanted.First); byPort && n <= int(wanted.Last); n++ {
			claims = append(claims, transport(r.Exposure.Protocol)+" port "+strconv.Itoa(n))
		}
		for i, name := range claims {
			h := holders[name]
			if h == nil || h.Owner == r.Owner || i >= names && h.Exposure.SharesPort() && r.Exposure.SharesPort() {
				continue
			}
			problem(r, NameTaken, "another owner already holds %s at this gateway", name)
			continue each
		}
		for _, name := range claims {
			if holders[name] == nil {
				holders[name] = r
			}
		}
		c.exposures[r.Key()] = r
		for _, t := range r.Exposure.AllTargets() {
			if !t.Node.IsZero() {
				c.nodes[t.Node] = true
			}
		}
	}
	return c
}

func transport(p webgw.ExposureProtocol) string {
	if p == webgw.UDP {
		return "udp"
	}
	return "tcp"
}

// trouble is why the last dial for an exposure failed.
type trouble struct {
	at   time.Time
	text string
}

const rememberTrouble = 5 * time.Minute
