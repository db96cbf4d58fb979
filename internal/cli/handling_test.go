package cli

import (
	"testing"

	"webgw.dev/webgw"
)

func TestSizes(t *testing.T) {
	for in, want := range map[string]int64{"": 0, "1": 1, "500K": 500 << 10, "10M": 10 << 20, "2G": 2 << 30, "1048576": 1 << 20} {
		if got, err := parseSize("max-body", in); err != nil || got != want {
			t.Errorf("%q: %d, %v", in, got, err)
		}
	}
	for _, in := range []string{"0", "-1", "M", "10m", "1.5G", "10MB", "9999999999G", " 1"} {
		if got, err := parseSize("max-body", in); webgw.KindOf(err) != webgw.Invalid {
			t.Errorf("%q: %d, %v", in, got, err)
		}
	}
}

func TestNetworksMayBeAddresses(t *testing.T) {
	got, err := prefixes("allow", []string{"192.0.2.1", "2001:db8::/32", "2001:db8::1"})
	if err != nil || len(got) != 3 || got[0].String() != "192.0.2.1/32" || got[1].String() != "2001:db8::/32" || got[2].String() != "2001:db8::1/128" {
		t.Errorf("%v, %v", got, err)
	}
	for _, s := range []string{"", "a", "192.0.2.1/33", "fe80::1%eth0"} {
		if _, err := prefixes("allow", []string{s}); webgw.KindOf(err) != webgw.Invalid {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// No flag without effect: whatever is set stands in the exposure, and nothing
// makes a policy that says nothing.
func TestFlagsShapeTheExposure(t *testing.T) {
	e := webgw.Exposure{}
	if err := (&limitFlags{}).shape(&e); err != nil || e.Policy != nil {
		t.Error(e.Policy, err)
	}
	if err := (&httpFlags{}).shape(&e); err != nil || e.Policy != nil || e.UpstreamTLS != nil || e.Rules != nil {
		t.Error(e, err)
	}
	if err := (&limitFlags{Deny: []string{"192.0.2.1"}, ConnectionRate: "5/s"}).shape(&e); err != nil {
		t.Fatal(err)
	}
	if err := (&httpFlags{RequestRate: "10/s", UpstreamTLS: true}).shape(&e); err != nil {
		t.Fatal(err)
	}
	p := e.Policy
	if len(p.Deny) != 1 || p.ConnectionRate.Address.Rate != "5/s" || p.RequestRate.Address.Rate != "10/s" || e.UpstreamTLS == nil {
		t.Errorf("%+v", e)
	}
}
