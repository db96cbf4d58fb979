package webgw

import (
	"strings"
	"testing"
)

func TestUpstreamTLS(t *testing.T) {
	const pin = "x3X5hHf+Jl8Pv1gE3Nc1q3Yk1Q3N8cWmZ0m3a1JtV5k="
	ca := authority(t, true)
	node, socket := Target{Node: testID(6), Address: "localhost:8443"}, Target{Node: testID(6), Address: "unix:/run/a"}
	for _, tt := range []struct {
		name     string
		protocol ExposureProtocol
		upstream Upstream
		tls      *UpstreamTLS
		target   Target
		field    string // "": fine
	}{
		{"nothing", HTTP, UpstreamAuto, nil, node, ""},
		{"defaults", HTTP, "", &UpstreamTLS{}, node, ""},
		{"HTTP/2", HTTP, UpstreamH2, &UpstreamTLS{}, node, ""},
		{"HTTP/2 without TLS", HTTP, UpstreamH2, nil, node, "upstream"},
		{"h2c with TLS", HTTP, UpstreamH2C, &UpstreamTLS{}, node, "upstream"},
		{"of tls", TLS, "", &UpstreamTLS{}, node, "upstreamTLS"},
		{"name", HTTP, "", &UpstreamTLS{ServerName: "web.internal"}, socket, ""},
		{"address", HTTP, "", &UpstreamTLS{ServerName: "192.0.2.1"}, node, ""},
		{"localhost", HTTP, "", &UpstreamTLS{ServerName: "localhost"}, node, ""},
		{"bad name", HTTP, "", &UpstreamTLS{ServerName: "Web.internal"}, node, "upstreamTLS.serverName"},
		{"wildcard", HTTP, "", &UpstreamTLS{ServerName: "*.internal"}, node, "upstreamTLS.serverName"},
		{"socket without a name", HTTP, "", &UpstreamTLS{CA: ca}, socket, "upstreamTLS.serverName"},
		{"socket by its key", HTTP, "", &UpstreamTLS{Pins: []string{pin}}, socket, ""},
		{"authority", HTTP, "", &UpstreamTLS{CA: ca}, node, ""},
		{"no authority", HTTP, "", &UpstreamTLS{CA: authority(t, false)}, node, "upstreamTLS.ca"},
		{"no PEM", HTTP, "", &UpstreamTLS{CA: "x"}, node, "upstreamTLS.ca"},
		{"short pin", HTTP, "", &UpstreamTLS{Pins: []string{pin, "AAAA"}}, node, "upstreamTLS.pins[1]"},
		{"hexadecimal pin", HTTP, "", &UpstreamTLS{Pins: []string{strings.Repeat("ab", 32)}}, node, "upstreamTLS.pins[0]"},
		{"pin twice", HTTP, "", &UpstreamTLS{Pins: []string{pin, pin}}, node, "upstreamTLS.pins[1]"},
		{"too many pins", HTTP, "", &UpstreamTLS{Pins: make([]string, 17)}, node, "upstreamTLS.pins"},
	} {
		e := &Exposure{Protocol: tt.protocol, Hosts: []string{"a.example"}, Gateways: []ID{testID(4)}, Targets: []Target{tt.target}, Upstream: tt.upstream, UpstreamTLS: tt.tls}
		err := e.validate()
		got := ""
		if e, ok := err.(*Error); ok {
			got = e.Field
		}
		if got != tt.field || (err == nil) != (tt.field == "") {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.field)
		}
	}
	for _, tt := range []struct {
		u    UpstreamTLS
		t    Target
		want string
	}{{UpstreamTLS{}, node, "localhost"}, {UpstreamTLS{ServerName: "a.b"}, node, "a.b"}, {UpstreamTLS{}, Target{Direct: "[2001:db8::1]:443"}, "2001:db8::1"}, {UpstreamTLS{}, socket, ""}} {
		if got := tt.u.Name(tt.t); got != tt.want {
			t.Errorf("name for %v: %q, want %q", tt.t, got, tt.want)
		}
	}
}
