package netx

import (
	"net/netip"
	"testing"
)

func TestClassify(t *testing.T) {
	for in, want := range map[string]Class{
		"1.1.1.1": Public, "2606:4700::1111": Public, "::ffff:1.1.1.1": Public, "64:ff9b::101:101": Public, "2002:101:101::1": Public,
		"127.0.0.1": Loopback, "127.255.255.254": Loopback, "::1": Loopback, "::ffff:127.0.0.1": Loopback,
		"64:ff9b::7f00:1": Loopback, "2002:7f00:1::": Loopback, "::ffff:7f00:1": Loopback,
		"169.254.169.254": Metadata, "::ffff:169.254.169.254": Metadata, "64:ff9b::a9fe:a9fe": Metadata, "100.100.100.200": Metadata,
		"fd00:ec2::254": Metadata, "168.63.129.16": Metadata, "192.0.0.192": Metadata,
		"169.254.1.1": LinkLocal, "fe80::1": LinkLocal, "fe80::1%eth0": LinkLocal, "febf::1": LinkLocal,
		"10.0.0.1": Private, "172.31.255.255": Private, "192.168.1.1": Private, "100.64.0.1": Private, "fd00::": Private,
		"64:ff9b::a00:1": Private, "2002:a00:1::": Private, "64:ff9b:1::1": Private, "fec0::1": Private,
		"192.0.0.1": Reserved, "192.0.2.1": Reserved, "198.18.0.1": Reserved, "203.0.113.9": Reserved, "240.0.0.1": Reserved,
		"255.255.255.255": Reserved, "0.1.2.3": Reserved, "2001:db8::1": Reserved, "2001::1": Reserved, "::7f00:1": Reserved,
		"100::1": Reserved, "4000::1": Reserved,
		"224.0.0.1": Multicast, "ff02::1": Multicast, "ff02::1%lo": Multicast,
		"0.0.0.0": Unspecified, "::": Unspecified, "::ffff:0.0.0.0": Unspecified, "64:ff9b::": Unspecified,
	} {
		if got := Classify(netip.MustParseAddr(in)); got != want {
			t.Errorf("%s is %s, want %s", in, got, want)
		}
	}
	if got := Classify(netip.Addr{}); got != Reserved {
		t.Errorf("no address is %s", got)
	}
}

func TestJudge(t *testing.T) {
	p := func(list ...string) (out []netip.Prefix) {
		for _, s := range list {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	everything := p("0.0.0.0/0", "::/0")
	for _, tt := range []struct {
		addr  string
		allow []netip.Prefix
		class Class
		ok    bool
	}{
		{"127.0.0.1", nil, Loopback, true},
		{"127.0.0.1", nil, Public, false},
		{"10.1.2.3", p("10.1.0.0/16"), Loopback, true},
		{"10.2.2.3", p("10.1.0.0/16"), Loopback, false},
		{"::ffff:10.1.2.3", p("10.1.0.0/16"), Loopback, true},
		{"64:ff9b::a01:203", p("10.1.0.0/16"), Loopback, false}, // NAT64 goes through someone else
		{"127.0.0.1", everything, Public, true},
		{"169.254.169.254", everything, Public, false},
		{"::ffff:169.254.169.254", everything, Public, false},
		{"64:ff9b::a9fe:a9fe", everything, Public, false},
		{"169.254.169.254", p("169.254.0.0/16"), Public, false}, // the whole link is not the metadata service
		{"169.254.169.254", p("169.254.169.254/32"), Public, true},
		{"169.254.3.3", p("169.254.0.0/16"), Public, true},
		{"fe80::1%eth0", everything, Public, false},
		{"fe80::1%eth0", p("fe80::/10"), Public, true},
		{"0.0.0.0", everything, Loopback, false},
		{"0.0.0.0", p("0.0.0.0/32"), Loopback, false},
		{"ff02::1", p("ff00::/8"), Loopback, false},
		{"203.0.113.7", everything, Public, false},
		{"203.0.113.7", p("203.0.113.0/24"), Public, true},
	} {
		err := Judge(netip.MustParseAddr(tt.addr), tt.allow, tt.class)
		if (err == nil) != tt.ok {
			t.Errorf("%s with %v and class %s: %v, want ok %v", tt.addr, tt.allow, tt.class, err, tt.ok)
		}
	}
}
