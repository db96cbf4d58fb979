package webgw

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestCheckHost(t *testing.T) {
	long := strings.Repeat("a", 63)
	for _, tt := range []struct {
		host     string
		wildcard bool
		rule     string // "": accepted
	}{
		{"blog.example", false, ""},
		{"a.b.c.example.org", false, ""},
		{"localhost", false, ""},
		{"xn--bcher-kva.example", false, ""},
		{"1.example", false, ""},
		{"0x7f.example", false, ""},
		{long + ".example", false, ""},
		{"*.example.org", true, ""},

		{"", false, "missing"},
		{"example", false, "at least two labels"},
		{"blog.example.", false, "ends in a dot"},
		{".blog.example", false, "empty label"},
		{"blog..example", false, "empty label"},
		{"Blog.example", false, `write "blog"`},
		{"blog.EXAMPLE", false, "upper-case"},
		{"-blog.example", false, "inner hyphens"},
		{"blog-.example", false, "inner hyphens"},
		{"_acme-challenge.example", false, "inner hyphens"},
		{"blog example.org", false, "inner hyphens"},
		{"blog.example\n", false, "inner hyphens"},
		{"blog.example:80", false, "inner hyphens"},
		{"user@blog.example", false, "inner hyphens"},
		{"blog%2eexample.org", false, "inner hyphens"},
		{"a" + long + ".example", false, "longer than 63"},
		{strings.Repeat(long+".", 4) + "example", false, "longer than 253"},

		// Look-alikes: Cyrillic а, fullwidth stop, ideographic stop, Kelvin sign.
		{"p\u0430ypal.example", false, "not ASCII"},
		{"blog\uff0eexample", false, "not ASCII"},
		{"blog\u3002example", false, "not ASCII"},
		{"\u212aiosk.example", false, "not ASCII"},

		{"*.example.org", false, "wildcard is not allowed"},
		{"*.example", true, "at least two labels"},
		{"*", true, "inner hyphens"},
		{"*.*.example.org", true, "inner hyphens"},
		{"a.*.example.org", true, "inner hyphens"},
		{"a*.example.org", true, "inner hyphens"},
		{"*.localhost", true, "at least two labels"},

		// Addresses, and what some resolver reads as one.
		{"127.0.0.1", false, "is an address"},
		{"::1", false, "is an address"},
		{"[::1]", false, "is an address"},
		{"127.1", false, "ends in a number"},
		{"0x7f.1", false, "ends in a number"},
		{"127.0x1", false, "ends in a number"},
		{"127.0.0.0x1", false, "ends in a number"},
		{"127.0x", false, "ends in a number"},
		{"0177.0.0.1", false, "ends in a number"},
		{"1.2.3.4.5", false, "ends in a number"},
		{"example.123", false, "ends in a number"},
		{"2130706433", false, "at least two labels"},
	} {
		t.Run(clip(tt.host, 40), func(t *testing.T) { wantRule(t, CheckHost("hosts[3]", tt.host, tt.wildcard), "hosts[3]", tt.rule) })
	}
}

// wantRule checks that err names the field and the rule; rule "" is no error.
func wantRule(t *testing.T, err error, field, rule string) {
	t.Helper()
	if rule == "" {
		if err != nil {
			t.Errorf("refused: %v", err)
		}
		return
	}
	e, ok := err.(*Error)
	if !ok || e.Kind != Invalid || e.Field != field || !strings.Contains(e.Public, rule) {
		t.Errorf("got %#v, want field %q, rule %q", err, field, rule)
	}
}

func TestCheckTargetAddress(t *testing.T) {
	for _, tt := range []struct{ address, rule string }{
		{"127.0.0.1:8080", ""},
		{"[2001:db8::1]:443", ""},
		{"[fe80::1]:443", ""},
		{"localhost:1", ""},
		{"db.internal.example:65535", ""},
		{"unix:/run/app.sock", ""},
		{"unix:/run/..app.sock", ""},

		{"", "missing"},
		{":80", "missing"},
		{"127.0.0.1", "not host:port"},
		{"2001:db8::1:443", "not host:port"},
		{"127.0.0.1:", "number from 1 to 65535"},
		{"127.0.0.1:0", "number from 1 to 65535"},
		{"127.0.0.1:65536", "number from 1 to 65535"},
		{"127.0.0.1:080", "number from 1 to 65535"},
		{"127.0.0.1:+80", "number from 1 to 65535"},
		{"127.0.0.1:http", "number from 1 to 65535"},
		{"127.0.0.1:80 ", "number from 1 to 65535"},

		// One way to write each address.
		{"[127.0.0.1]:80", "write 127.0.0.1:80"},
		{"[localhost]:80", "write localhost:80"},
		{"[::ffff:127.0.0.1]:80", "write the IPv4 address 127.0.0.1"},
		{"[::ffff:7f00:1]:80", "write the IPv4 address 127.0.0.1"},
		{"[fe80::1%eth0]:80", "zone"},
		{"[fe80::1%25eth0]:80", "zone"},
		{"[2001:DB8::1]:80", "write the address as 2001:db8::1"},
		{"[2001:db8:0::1]:80", "write the address as 2001:db8::1"},
		{"[::127.0.0.1]:80", "write the address as ::7f00:1"},
		{"2130706433:80", "at least two labels"},
		{"0x7f000001:80", "at least two labels"},
		{"0x7f.1:80", "ends in a number"},
		{"127.0x1:80", "ends in a number"},
		{"127.1:80", "ends in a number"},
		{"0177.0.0.1:80", "ends in a number"},
		{"127.0.0.01:80", "ends in a number"},
		{"0.0.0.0:80", "can't be dialed"},
		{"[::]:80", "can't be dialed"},
		{"224.0.0.1:80", "can't be dialed"},
		{"255.255.255.255:80", "can't be dialed"},
		{"LOCALHOST:80", "upper-case"},
		{"db.Example:80", "upper-case"},
		{"db.example.:80", "ends in a dot"},
		{"localhost.:80", "ends in a dot"},
		{"*.example.org:80", "wildcard"},
		{"\uff11\uff12\uff17.0.0.1:80", "not ASCII"},
		{"127\u30020.0.1:80", "not ASCII"},

		{"unix:", "absolute path"},
		{"unix:run/app.sock", "absolute path"},
		{"unix:@abstract", "absolute path"},
		{"unix:/run/../etc/x", "absolute path"},
		{"unix:/run/..", "absolute path"},
		{"unix:/a\x00b", "absolute path"},
		{"unix:/a\nb", "absolute path"},
		{"unix:/a\xffb", "absolute path"},
		{"unix:/" + strings.Repeat("a", 107), "absolute path"},
		{"UNIX:/run/x", "number from 1 to 65535"},
	} {
		t.Run(clip(tt.address, 40), func(t *testing.T) { wantRule(t, CheckTargetAddress("address", tt.address), "address", tt.rule) })
	}
}

func TestUnder(t *testing.T) {
	for _, tt := range []struct {
		host, zone string
		want       bool
	}{
		{"a.gent.example", "gent.example", true},
		{"a.b.gent.example", "gent.example", true},
		{"gent.example", "gent.example", false},
		{"evilgent.example", "gent.example", false},
		{"a.evilgent.example", "gent.example", false},
		{".gent.example", "gent.example", false},
		{"gent.example.evil.example", "gent.example", false},
		{"gent.example", "a.gent.example", false},
		{"a.GENT.example", "gent.example", false}, // callers normalise first
		{"a.gent.example.", "gent.example", false},
		{"a.example", "", false},
		{"a.", "", false},
		{"", "", false},
		{"", "gent.example", false},
	} {
		if got := Under(tt.host, tt.zone); got != tt.want {
			t.Errorf("Under(%q, %q) = %v", tt.host, tt.zone, got)
		}
	}
}

func TestNormalizeHost(t *testing.T) {
	for in, want := range map[string]string{
		"Blog.Example.":       "blog.example",
		"blog.example":        "blog.example",
		"":                    "",
		"\u212aiosk.example":  "\u212aiosk.example", // not to be taken for kiosk.example
		"B\u00dcCHER.example": "b\u00dccher.example",
	} {
		if got := NormalizeHost(in); got != want {
			t.Errorf("NormalizeHost(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestPortSet(t *testing.T) {
	for _, tt := range []struct {
		set  PortSet
		want []PortRange
		rule string
	}{
		{"", nil, ""},
		{"2222", []PortRange{{2222, 2222}}, ""},
		{"20000-20999,2222", []PortRange{{2222, 2222}, {20000, 20999}}, ""},
		{"1-65535", []PortRange{{1, 65535}}, ""},
		{"80, 443", []PortRange{{80, 80}, {443, 443}}, ""},
		{"0", nil, "not a port or a range"},
		{"65536", nil, "not a port or a range"},
		{"5-4", nil, "not a port or a range"},
		{"-5", nil, "not a port or a range"},
		{"5-", nil, "not a port or a range"},
		{"1-2-3", nil, "not a port or a range"},
		{",", nil, "not a port or a range"},
		{"80,", nil, "not a port or a range"},
		{"+80", nil, "not a port or a range"},
		{"http", nil, "not a port or a range"},
		{"80,80", nil, "port 80 stands twice"},
		{"1-10,10-20", nil, "port 10 stands twice"},
		{"1-100,50", nil, "port 50 stands twice"},
		{PortSet(strings.Repeat("1,", 501)), nil, "longer than 1000"},
	} {
		got, err := tt.set.Ranges()
		wantRule(t, err, "", tt.rule)
		if !slices.Equal(got, tt.want) {
			t.Errorf("%q: got %v, want %v", tt.set, got, tt.want)
		}
	}
	s := PortSet("2222,20000-20999")
	for port, want := range map[uint16]bool{0: false, 2221: false, 2222: true, 2223: false, 19999: false, 20000: true, 20999: true, 21000: false, 65535: false} {
		if s.Contains(port) != want {
			t.Errorf("Contains(%d) is %v", port, !want)
		}
	}
	if PortSet("1-65535,x").Contains(80) {
		t.Error("a malformed set holds a port")
	}
}

func TestErrorText(t *testing.T) {
	e := &Error{Op: "declare", Kind: Taken, Field: "hosts[0]", Public: "is held by somebody else", Err: fmt.Errorf("cause")}
	if e.Error() != "declare: hosts[0]: is held by somebody else (cause)" || e.Sentence() != "hosts[0]: is held by somebody else" {
		t.Errorf("%q, %q", e.Error(), e.Sentence())
	}
	if KindOf(nil) != "" || KindOf(fmt.Errorf("x")) != Internal || KindOf(fmt.Errorf("x: %w", e)) != Taken {
		t.Error("KindOf")
	}
	for _, tt := range []struct{ field, want string }{{"", "p"}, {"[1]", "p[1]"}, {"x", "p.x"}} {
		if got := in("p", invalid(tt.field, "")).(*Error).Field; got != tt.want {
			t.Errorf("in: %q, want %q", got, tt.want)
		}
	}
}
