package registry

import (
	"testing"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
)

// dnsZone is owner's DNS data, answered for by gateway 100.
func dnsZone(name string, records ...webgw.DNSRecord) webgw.Record {
	return webgw.Record{Kind: webgw.KindZone, Name: name, Zone: &webgw.Zone{Gateways: []webgw.ID{key(100).ID()}, Records: records}}
}

// Nobody writes DNS data at, below or over another owner's name. Owner 1 holds
// what is held, owner 2 wants.
func TestZoneNames(t *testing.T) {
	caa := webgw.DNSRecord{Name: "@", Type: webgw.TypeCAA, Value: `0 issue "evil.example"`}
	acme := webgw.DNSRecord{Name: "_acme-challenge", Type: webgw.TypeTXT, Value: "x"}
	ns := webgw.DNSRecord{Name: "sub", Type: webgw.TypeNS, Value: "ns.evil.example"}
	for _, c := range []struct {
		name string
		held []webgw.Record
		want webgw.Record
		kind webgw.ErrorKind
	}{
		{"a zone of one's own", nil, dnsZone("one.example", caa, acme, ns), ""},
		{"a free name in a gateway's zone", nil, dnsZone("blog.gent.example", caa, acme), ""},
		{"CAA of a gateway's zone", nil, dnsZone("gent.example", caa), webgw.Taken},
		{"above a gateway's zone", nil, dnsZone("up.test", ns), ""},
		{"a reserved name", nil, dnsZone("ns1.gent.example", acme), webgw.Taken},
		{"another's exposed name", []webgw.Record{web("a", "blog.gent.example")}, dnsZone("blog.gent.example", acme), webgw.Taken},
		{"below another's name", []webgw.Record{web("a", "blog.gent.example")}, dnsZone("x.blog.gent.example", acme), webgw.Taken},
		{"over another's name", []webgw.Record{web("a", "blog.one.example")}, dnsZone("one.example", webgw.DNSRecord{Name: "_acme-challenge.blog", Type: webgw.TypeTXT, Value: "x"}), webgw.Taken},
		{"over another's wildcard", []webgw.Record{web("a", "*.one.example")}, dnsZone("one.example", ns), webgw.Taken},
		{"another's zone", []webgw.Record{dnsZone("one.example")}, dnsZone("one.example", caa), webgw.Taken},
		{"below another's zone", []webgw.Record{dnsZone("one.example")}, dnsZone("sub.one.example", caa), webgw.Taken},
		{"over another's zone", []webgw.Record{dnsZone("sub.one.example")}, dnsZone("one.example", caa), webgw.Taken},
		{"an exposure in another's zone", []webgw.Record{dnsZone("one.example")}, web("x", "www.one.example"), webgw.Taken},
		{"beside, ending alike", []webgw.Record{dnsZone("one.example")}, dnsZone("evilone.example", caa), ""},
		{"in upper case", []webgw.Record{dnsZone("one.example")}, dnsZone("ONE.example", caa), webgw.Invalid},
		{"with a last dot", []webgw.Record{dnsZone("one.example")}, dnsZone("one.example.", caa), webgw.Invalid},
		{"a challenge's name as a zone", nil, dnsZone("_acme-challenge.gent.example"), webgw.Invalid},
		{"a wildcard zone", nil, dnsZone("*.gent.example"), webgw.Invalid},
		{"a look-alike", nil, dnsZone("xn--80ak6aa92e.example"), webgw.Invalid},
		{"an unknown gateway", nil, func() webgw.Record {
			r := dnsZone("one.example")
			r.Zone.Gateways = []webgw.ID{key(101).ID()}
			return r
		}(), webgw.NotFound},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			b.must(100, gateway("gent", "gent.example"))
			b.must(200, node("home1"))
			for _, h := range c.held {
				b.must(1, h)
			}
			wantKind(t, b.declare(2, c.want), c.kind, "declare")
		})
	}
	b := newBench(t)
	b.must(100, gateway("gent", "gent.example"))
	b.must(200, node("home1"))
	b.must(1, web("a", "www.one.example"))
	b.must(1, dnsZone("one.example", caa))
	b.must(1, web("b", "one.example"))
	b.must(1, claimed("one.example", true))
}

// The gateways that answer for a zone are told of it, also after they were
// dropped from it; nobody else sees it.
func TestZonesReachTheirGateways(t *testing.T) {
	bubble(t, 2, nil, func(g *grid) {
		g.site()
		g.declare(key(101), gateway("cairo", ""))
		zone := webgw.Key{Kind: webgw.KindZone, Owner: key(1).ID(), Name: "one.example"}
		atGent, atCairo := g.watch(g.as(key(100)), client.ScopeGateway, 0, ""), g.watch(g.as(key(101)), client.ScopeGateway, 0, "")
		atNode := g.watch(g.as(key(200)), client.ScopeNode, 0, "")
		atOwner, stranger := g.watch(g.as(key(1)), client.ScopeOwner, 0, ""), g.watch(g.as(key(2)), client.ScopeOwner, 0, "")
		g.declare(key(1), dnsZone("one.example"))
		for who, w := range map[string]*heard{"cairo": atCairo, "the node": atNode, "a stranger": stranger} {
			if w.has(zone) != nil {
				t.Errorf("%s is told of the zone", who)
			}
		}
		if atGent.has(zone) == nil || atOwner.has(zone) == nil {
			t.Error("the gateway or the owner is not told of the zone")
		}
		if _, err := g.as(key(101)).Get(g.ctx, zone); webgw.KindOf(err) != webgw.NotFound {
			t.Errorf("another gateway gets the zone: %v", err)
		}
		if _, err := g.as(key(100)).Get(g.ctx, zone); err != nil {
			t.Errorf("its gateway does not get the zone: %v", err)
		}
		r := dnsZone("one.example", webgw.DNSRecord{Name: "@", Type: webgw.TypeA, Value: "192.0.2.1"})
		r.Zone.Gateways = []webgw.ID{key(101).ID()}
		g.declare(key(1), r)
		for who, w := range map[string]*heard{"cairo": atCairo, "gent, which was dropped": atGent, "a watch from the start": g.watch(g.as(key(100)), client.ScopeGateway, 0, "")} {
			if got := w.has(zone); got == nil || len(got.Zone.Records) != 1 {
				t.Errorf("%s does not know the new version: %v", who, got)
			}
		}
		if _, err := g.as(key(1)).Delete(g.ctx, zone); err != nil {
			t.Fatal(err)
		}
		if got := atCairo.has(zone); got == nil || !got.Deleted {
			t.Errorf("not told of the withdrawal: %v", got)
		}
	})
}
