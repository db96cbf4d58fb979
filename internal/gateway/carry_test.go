package gateway

import (
	"slices"
	"testing"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/live"
)

var gent, cairo, alice, bob, home = ident.FromSeed([32]byte{1}), ident.FromSeed([32]byte{2}), ident.FromSeed([32]byte{3}), ident.FromSeed([32]byte{4}), ident.FromSeed([32]byte{5})

// exposed signs an exposure of a host, or of a TCP port if port is not 0,
// issued age ago.
func exposed(t *testing.T, by ident.Key, name, host string, port uint16, age time.Duration, via ...ident.Key) ident.Signed {
	t.Helper()
	e := &webgw.Exposure{Protocol: webgw.HTTP, Hosts: []string{host}, Targets: []webgw.Target{{Node: home.ID(), Address: "127.0.0.1:80"}}}
	if port != 0 {
		e.Protocol, e.Hosts, e.Port = webgw.TCP, nil, port
	}
	for _, g := range via {
		e.Gateways = append(e.Gateways, g.ID())
	}
	issued := time.Now().Add(-age)
	s, err := by.Sign(webgw.Record{Version: 1, Kind: webgw.KindExposure, Name: name, Seq: 1, Issued: issued, Expires: issued.Add(24 * time.Hour), Exposure: e})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func viewOf(records ...ident.Signed) *live.View {
	v := &live.View{Records: map[webgw.Key]ident.Signed{}}
	for _, s := range records {
		v.Records[s.Record.Key()] = s
	}
	return v
}

func TestCarry(t *testing.T) {
	none := &carried{}
	wants := func(c *carried, names []string, codes ...string) {
		t.Helper()
		var got, problems []string
		for k := range c.exposures {
			got = append(got, k.Name)
		}
		for _, p := range c.problems {
			problems = append(problems, p.Exposure.Name+" "+p.Code)
		}
		slices.Sort(got)
		if !slices.Equal(got, names) || !slices.Equal(problems, codes) {
			t.Errorf("carried %q with problems %q, want %q with %q", got, problems, names, codes)
		}
	}
	blog := exposed(t, alice, "blog", "blog.example", 0, time.Hour, gent, cairo)
	other := exposed(t, alice, "other", "other.example", 0, time.Hour, cairo)
	ssh := exposed(t, alice, "ssh", "", 20022, time.Hour, gent)
	low := exposed(t, alice, "low", "", 22, time.Hour, gent)
	c := carry(viewOf(blog, other, ssh, low), gent.ID(), "20000-20999", none)
	wants(c, []string{"blog", "ssh"}, "low "+PortNotOffered)
	if !c.nodes[home.ID()] || len(c.nodes) != 1 {
		t.Errorf("nodes %v", c.nodes)
	}
	wants(carry(viewOf(ssh), gent.ID(), "", none), nil, "ssh "+PortNotOffered)

	// Two claims to one name: the one carried before stays, whatever the other
	// says of its age.
	older := exposed(t, bob, "theft", "blog.example", 0, 10*time.Hour, gent)
	wants(carry(viewOf(blog, older), gent.ID(), "", none), []string{"theft"}, "blog "+NameTaken)
	wants(carry(viewOf(blog, older), gent.ID(), "", carry(viewOf(blog), gent.ID(), "", none)), []string{"blog"}, "theft "+NameTaken)
	port := exposed(t, bob, "port", "", 20022, 0, gent)
	wants(carry(viewOf(ssh, port), gent.ID(), "20000-20999", none), []string{"ssh"}, "port "+NameTaken)

	// Ranges count port by port; a port that is shared is nobody's alone.
	over := ranged(t, bob, "over", webgw.TCP, 20020, 20030, gent)
	wants(carry(viewOf(ssh, over), gent.ID(), "20000-20999", none), []string{"ssh"}, "over "+NameTaken)
	beyond := ranged(t, bob, "beyond", webgw.UDP, 20990, 21000, gent)
	wants(carry(viewOf(beyond), gent.ID(), "20000-20999", none), nil, "beyond "+PortNotOffered)
	wants(carry(viewOf(beyond), gent.ID(), "20000-20999,21000", none), []string{"beyond"})
	mine, theirs := ranged(t, alice, "mine", webgw.TLS, 20443, 0, gent), ranged(t, bob, "theirs", webgw.TLS, 20443, 0, gent)
	wants(carry(viewOf(mine, theirs), gent.ID(), "20000-20999", none), []string{"mine", "theirs"})
	whole := ranged(t, bob, "whole", webgw.TCP, 20440, 20450, gent)
	wants(carry(viewOf(mine, whole), gent.ID(), "20000-20999", carry(viewOf(mine), gent.ID(), "20000-20999", none)), []string{"mine"}, "whole "+NameTaken)
	wants(carry(viewOf(mine, whole), gent.ID(), "20000-20999", carry(viewOf(whole), gent.ID(), "20000-20999", none)), []string{"whole"}, "mine "+NameTaken)
}

// ranged signs an exposure of ports; by tls, with the exposure's name as host.
func ranged(t *testing.T, by ident.Key, name string, p webgw.ExposureProtocol, first, last uint16, via ...ident.Key) ident.Signed {
	t.Helper()
	s := exposed(t, by, name, "", first, 0, via...)
	r := *s.Record
	e := *r.Exposure
	if e.Protocol, e.PortEnd = p, last; p == webgw.TLS {
		e.Hosts = []string{name + ".example"}
	}
	r.Exposure = &e
	s, err := by.Sign(r)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
