package daemon

import (
	"math"
	"net/netip"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"webgw.dev/webgw"
)

const someID = "webgw1iuandw7ivoqo7sflkdyi3zedf5gskmxicimkx5p6ma6eon7vflfx32yy"

func TestConfigurationReadsFromYAML(t *testing.T) {
	var g GatewayConfig
	err := yaml.UnmarshalWithOptions([]byte("state-dir: /var/lib/webgw\nzone: gent.example\nports: 2222,20000-20999\naddresses: [gent.example:443]\nallow-direct: [10.0.0.0/8]\nfarmer: "+someID+"\ncerts: [a.pem:b.pem]\n"), &g, yaml.Strict())
	if err != nil {
		t.Fatal(err)
	}
	if g.StateDir != "/var/lib/webgw" || g.AllowDirect[0] != netip.MustParsePrefix("10.0.0.0/8") || g.Farmer.String() != someID || g.Ports != "2222,20000-20999" {
		t.Errorf("%+v", g)
	}
	if err := g.Validate(); err != nil {
		t.Error(err)
	}
	var n NodeConfig
	err = yaml.UnmarshalWithOptions([]byte("state-dir: /x\nregistri: y\n"), &n, yaml.Strict())
	if err == nil || !strings.Contains(err.Error(), "registri") || !strings.Contains(err.Error(), "[2:1]") {
		t.Errorf("an unknown field: %v", err)
	}
}

func TestValidateNamesTheField(t *testing.T) {
	common := Common{StateDir: "/x"}
	prefix := []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")}
	for _, tt := range []struct {
		config interface{ Validate() error }
		field  string // "": it is valid
	}{
		{GatewayConfig{Common: common}, ""},
		{RegistryConfig{Common: common}, ""},
		{NodeConfig{Common: common, Registry: someID + "@gent.example:443"}, ""},
		{NodeConfig{Common: common, Registry: "gent.example:443"}, ""},
		{GatewayConfig{}, "state-dir"},
		{GatewayConfig{Common: Common{StateDir: "/x", LogLevel: "loud"}}, "log-level"},
		{GatewayConfig{Common: Common{StateDir: "/x", LogFormat: "xml"}}, "log-format"},
		{GatewayConfig{Common: Common{StateDir: "/x", MetricsAddr: "9100"}}, "metrics-addr"},
		{GatewayConfig{Common: common, Name: "Gent"}, "name"},
		{GatewayConfig{Common: common, Zone: "gent"}, "zone"},
		{GatewayConfig{Common: common, Bind: "eth0"}, "bind"},
		{GatewayConfig{Common: common, HTTPAddr: "off"}, ""},
		{GatewayConfig{Common: common, HTTPAddr: "80"}, "http-addr"},
		{GatewayConfig{Common: common, TLSAddr: "gent.example:443"}, "tls-addr"},
		{GatewayConfig{Common: common, TLSAddr: "[::1]:443"}, ""},
		{GatewayConfig{Common: common, Ports: "off"}, ""},
		{GatewayConfig{Common: common, Ports: "9-1"}, "ports"},
		{GatewayConfig{Common: common, Addresses: []string{"gent.example"}}, "addresses[0]"},
		{GatewayConfig{Common: common, Addresses: []string{"gent.example:443", "0.0.0.0:443"}}, "addresses[1]"},
		{GatewayConfig{Common: common, Registry: "nobody@gent.example:443"}, "registry"},
		{GatewayConfig{Common: common, CertFiles: []string{"cert.pem"}}, "certs[0]"},
		{GatewayConfig{Common: common, AllowDirect: prefix}, "allow-direct[0]"},
		{GatewayConfig{Common: common, MaxConns: -1}, "max-conns"},
		{GatewayConfig{Common: common, MaxPerOwner: -1}, "max-per-owner"},
		{GatewayConfig{Common: common, MaxPerExposure: -1}, "max-per-exposure"},
		{GatewayConfig{Common: common, OwnerBandwidth: -1}, "owner-bandwidth"},
		{GatewayConfig{Common: common, ExposureBandwidth: 999}, "exposure-bandwidth"},
		{GatewayConfig{Common: common, DefaultHost: "parking.example"}, ""},
		{GatewayConfig{Common: common, DefaultHost: "https://parking.example"}, "default-host"},
		{GatewayConfig{Common: common, DefaultURL: "https://parking.example/a?b"}, ""},
		{GatewayConfig{Common: common, DefaultURL: "parking.example"}, "default-redirect"},
		{GatewayConfig{Common: common, DefaultURL: "javascript:alert(1)"}, "default-redirect"},
		{GatewayConfig{Common: common, DefaultURL: "https://a.example/\r\nSet-Cookie: a=b"}, "default-redirect"},
		{GatewayConfig{Common: common, DefaultURL: "https://a.example/", DefaultHost: "a.example"}, "default-redirect"},
		{GatewayConfig{Common: common, TrustedProxies: prefix}, "trusted-proxies[0]"},
		{GatewayConfig{Common: common, TrustedProxies: []netip.Prefix{netip.MustParsePrefix("::/0")}}, "trusted-proxies[0]"},
		{GatewayConfig{Common: common, Embedded: RegistryConfig{Admit: []string{"me"}}}, "admit[0]"},
		{RegistryConfig{Common: common, Listen: "x"}, "listen"},
		{RegistryConfig{Common: common, Address: "registry.example"}, "address"},
		{RegistryConfig{Common: common, Admit: []string{"open"}}, ""},
		{RegistryConfig{Common: common, Quota: -1}, "quota"},
		{RegistryConfig{Common: common, NameGrace: -1}, "name-grace"},
		{RegistryConfig{Common: common, GridZone: "Grid.example.", Resolvers: []string{"192.0.2.1:53"}}, "grid-zone"},
		{RegistryConfig{Common: common, GridZone: "grid.example"}, "resolvers"},
		{RegistryConfig{Common: common, DomainProof: "on"}, "resolvers"},
		{RegistryConfig{Common: common, DomainProof: "maybe"}, "domain-proof"},
		{RegistryConfig{Common: common, Resolvers: []string{"192.0.2.1"}}, "resolvers[0]"},
		{RegistryConfig{Common: common, Resolvers: []string{"192.0.2.1:53", "192.0.2.1:53"}}, "resolvers[1]"},
		{RegistryConfig{Common: common, WriteRate: -1}, "write-rate"},
		{RegistryConfig{Common: common, WriteRate: math.NaN()}, "write-rate"},
		{RegistryConfig{Common: common, EtcdCert: "a"}, "etcd-cert"},
		{RegistryConfig{Common: common, EtcdCA: "a"}, "etcd-endpoints"},
		{NodeConfig{Common: common}, "registry"},
		{NodeConfig{Common: common, Registry: "gent.example:443", Owners: []string{"me"}}, "owners[0]"},
		{NodeConfig{Common: common, Registry: "gent.example:443", AllowTargets: prefix}, "allow-targets[0]"},
		{NodeConfig{Common: common, Registry: "gent.example:443", AllowUnix: []string{"run"}}, "allow-unix[0]"},
	} {
		err := tt.config.Validate()
		if tt.field == "" && err == nil {
			continue
		}
		if e, ok := err.(*webgw.Error); !ok || e.Field != tt.field || e.Kind != webgw.Invalid {
			t.Errorf("%+v: %v, want field %q", tt.config, err, tt.field)
		}
	}
}

func TestGatewayDefaults(t *testing.T) {
	c := GatewayConfig{Common: Common{StateDir: "/x"}, Zone: "gent.example"}
	r, http, tls, err := c.resolve()
	if err != nil || http != ":80" || tls != ":443" || r.HTTPPort != 80 || r.TLSPort != 443 || r.Ports != DefaultPorts || r.Addresses[0] != "gent.example:443" {
		t.Errorf("%+v at %q and %q: %v", r, http, tls, err)
	}
	c = GatewayConfig{Bind: "10.0.0.1", HTTPAddr: "off", TLSAddr: ":8443", PublicTLSPort: 443, Ports: "off"}
	r, http, tls, err = c.resolve()
	if err != nil || http != "" || tls != "10.0.0.1:8443" || r.HTTPPort != 0 || r.TLSPort != 443 || r.Ports != "" || r.Addresses[0] != "10.0.0.1:443" {
		t.Errorf("%+v at %q and %q: %v", r, http, tls, err)
	}
	for in, want := range map[string]string{":443": "localhost:443", "0.0.0.0:1": "localhost:1", "[::]:1": "localhost:1", "10.0.0.1:2": "10.0.0.1:2", "[::1]:3": "[::1]:3"} {
		if got := loopbackOf(in); got != want {
			t.Errorf("%s is reached at %s, want %s", in, got, want)
		}
	}
}
