package webgw

import (
	"strings"
	"testing"
)

func portsOf(first, last uint16) PortRange { return PortRange{first, last} }

func TestPortRanges(t *testing.T) {
	for _, s := range []string{"1", "6000-6100", "65535", "1-65535"} {
		r, err := ParsePortRange(s)
		if err != nil || r.String() != s {
			t.Errorf("%q: %v, %v", s, r, err)
		}
	}
	for _, s := range []string{"", "0", "6100-6000", "1,2", "65536", "-1", "6000-", "x"} {
		if r, err := ParsePortRange(s); err == nil {
			t.Errorf("%q is read as %v", s, r)
		}
	}
	a := portsOf(10, 20)
	for r, want := range map[PortRange][2]bool{portsOf(10, 20): {true, true}, portsOf(12, 15): {true, true}, portsOf(1, 10): {false, true}, portsOf(20, 30): {false, true},
		portsOf(1, 9): {false, false}, portsOf(21, 30): {false, false}, portsOf(1, 30): {false, true}} {
		if got := [2]bool{a.Contains(r), a.Overlaps(r)}; got != want {
			t.Errorf("%v and %v: contains, overlaps %v", a, r, got)
		}
	}
	set := PortSet("100-199,200-250,300,65000-65535")
	for r, want := range map[PortRange]bool{portsOf(100, 199): true, portsOf(150, 250): true, portsOf(100, 250): true, portsOf(99, 100): false, portsOf(250, 251): false,
		portsOf(300, 300): true, portsOf(250, 300): false, portsOf(65000, 65535): true, portsOf(1, 1): false} {
		if set.Covers(r) != want {
			t.Errorf("%v covered: %v", r, !want)
		}
	}
	if PortSet("1-65535,x").Covers(portsOf(1, 1)) {
		t.Error("a malformed set covers a port")
	}
}

func TestTargetsOfARange(t *testing.T) {
	node, other := testID(1), testID(2)
	e := &Exposure{Protocol: TCP, Port: 6000, PortEnd: 6010, Targets: []Target{{Node: node, Address: "localhost:7000"}, {Direct: "[2001:db8::1]:80"}}}
	if got := e.Targets[0].At(10); got != (Target{Node: node, Address: "localhost:7010"}) {
		t.Error(got)
	}
	if got := e.Targets[1].At(1); got != (Target{Direct: "[2001:db8::1]:81"}) {
		t.Error(got)
	}
	for _, tt := range []struct {
		want Target
		ok   bool
	}{
		{Target{Node: node, Address: "localhost:7000"}, true},
		{Target{Node: node, Address: "localhost:7010"}, true},
		{Target{Node: node, Address: "localhost:7011"}, false},
		{Target{Node: node, Address: "localhost:6999"}, false},
		{Target{Node: node, Address: "127.0.0.1:7005"}, false},
		{Target{Node: other, Address: "localhost:7005"}, false},
		{Target{Node: node, Address: "localhost:07005"}, false},
		{Target{Node: node, Address: "unix:/run/a"}, false},
		{Target{Direct: "[2001:db8::1]:90"}, true},
		{Target{Direct: "[2001:db8::1]:91"}, false},
	} {
		if e.Reaches(tt.want) != tt.ok {
			t.Errorf("%v: %v", tt.want, !tt.ok)
		}
	}
	one := &Exposure{Protocol: TCP, Port: 6000, Targets: []Target{{Node: node, Address: "unix:/run/a"}}}
	if !one.Reaches(one.Targets[0]) || one.Reaches(Target{Node: node, Address: "unix:/run/b"}) {
		t.Error("without a range the target itself is reached, and nothing else")
	}
}

func TestPortsOfExposures(t *testing.T) {
	for _, tt := range []struct {
		name string
		e    Exposure
		says string // "": fine
	}{
		{"range", Exposure{Protocol: TCP, Port: 6000, PortEnd: 6999}, ""},
		{"udp range", Exposure{Protocol: UDP, Port: 6000, PortEnd: 6001}, ""},
		{"too many", Exposure{Protocol: TCP, Port: 6000, PortEnd: 7000}, "more than 1000 ports"},
		{"backwards", Exposure{Protocol: TCP, Port: 6000, PortEnd: 5000}, "must be above port"},
		{"not a range", Exposure{Protocol: TCP, Port: 6000, PortEnd: 6000}, "must be above port"},
		{"target too high", Exposure{Protocol: TCP, Port: 6000, PortEnd: 6010, Targets: []Target{{Direct: "192.0.2.1:65526"}}}, "end above 65535"},
		{"target just fits", Exposure{Protocol: TCP, Port: 6000, PortEnd: 6010, Targets: []Target{{Direct: "192.0.2.1:65525"}}}, ""},
		{"socket", Exposure{Protocol: TCP, Port: 6000, PortEnd: 6010, Targets: []Target{{Node: testID(1), Address: "unix:/run/a"}}}, "has no port"},
		{"tls on a port", Exposure{Protocol: TLS, Hosts: []string{"a.example"}, Port: 6000}, ""},
		{"tls on a range", Exposure{Protocol: TLS, Hosts: []string{"a.example"}, Port: 6000, PortEnd: 6001}, "portEnd"},
		{"tls with quic on a port", Exposure{Protocol: TLS, Hosts: []string{"a.example"}, Port: 6000, QUIC: true}, "TLS port only"},
		{"http on a port", Exposure{Protocol: HTTP, Hosts: []string{"a.example"}, Port: 6000}, "found by its host name"},
		{"end alone", Exposure{Protocol: HTTP, Hosts: []string{"a.example"}, PortEnd: 6000}, "portEnd"},
	} {
		tt.e.Gateways = []ID{testID(3)}
		if tt.e.Targets == nil {
			tt.e.Targets = []Target{{Node: testID(1), Address: "localhost:7000"}}
		}
		err := tt.e.validate()
		if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}
