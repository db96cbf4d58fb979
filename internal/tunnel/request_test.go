package tunnel

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"webgw.dev/webgw"
)

func TestRequestOnTheWire(t *testing.T) {
	for name, r := range map[string]Request{
		"zero": {},
		"all":  {Exposure: exposure, Target: "unix:/run/x", Visitor: netip.MustParseAddrPort("192.0.2.1:4711"), Local: netip.MustParseAddrPort("[2001:db8::1]:443"), Host: "blog.example", Prompt: true},
		"long": {Exposure: exposure, Target: strings.Repeat("x", 0xffff), Host: strings.Repeat("y", 0xffff)},
	} {
		b, err := appendRequest([]byte("head"), &r)
		if err != nil {
			t.Fatal(err)
		}
		var got Request
		if err := parseRequest(append(b[4:len(b):len(b)], "later"...), &got); err != nil || got != r {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, r)
		}
		for n := range len(b[4:]) {
			if n > 300 && name == "long" {
				break
			}
			if err := parseRequest(b[4:4+n], &got); !errors.Is(err, errRequest) {
				t.Fatalf("%s: %d of %d bytes: %v", name, n, len(b)-4, err)
			}
		}
	}
	if _, err := appendRequest(nil, &Request{Exposure: webgw.Key{Name: strings.Repeat("x", 256)}}); err == nil {
		t.Error("a name of 256 bytes was written")
	}
}

func FuzzRequest(f *testing.F) {
	b, err := appendRequest(nil, &Request{Exposure: exposure, Target: "127.0.0.1:80", Visitor: netip.MustParseAddrPort("192.0.2.1:4711"), Host: "blog.example"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var r Request
		if parseRequest(b, &r) != nil {
			return
		}
		again, err := appendRequest(nil, &r)
		if err != nil {
			t.Fatal(err)
		}
		var same Request
		if err := parseRequest(again, &same); err != nil || same != r || len(again) > len(b) {
			t.Errorf("%+v, %v; want %+v", same, err, r)
		}
	})
}
