package webgw

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// authority mints a certificate in PEM.
func authority(t *testing.T, isCA bool) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: isCA, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

const (
	goodBcrypt = "$2y$10$abcdefghijklmnopqrstuuu3Z7bGzB5bGz1rXoTnGVsV1tHhXqk2e"
	goodArgon  = "$argon2id$v=19$m=8192,t=1,p=1$c2FsdHNhbHQ$MDEyMzQ1Njc4OWFiY2RlZg"
	goodKeys   = `{"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}`
)

func TestPolicies(t *testing.T) {
	ca := authority(t, true)
	prefix := netip.MustParsePrefix
	rate := func(s string, burst int) *RateLimit { return &RateLimit{Total: &Rate{Rate: s, Burst: burst}} }
	users := func(u ...User) *BasicAuth { return &BasicAuth{Users: u} }
	for _, tt := range []struct {
		name, field string // "" is valid
		protocol    ExposureProtocol
		policy      Policy
	}{
		{"empty", "", TCP, Policy{}},
		{"all of TCP", "", TCP, Policy{Allow: []netip.Prefix{prefix("10.0.0.0/8"), prefix("2001:db8::/32")}, Deny: []netip.Prefix{prefix("10.1.0.0/16")}, Concurrent: 5, ConnectionRate: rate("5/m", 0)}},
		{"all of HTTP", "", HTTP, Policy{RequestRate: &RateLimit{Address: &Rate{Rate: "10/s", Burst: 20}}, MaxBody: 1, MaxResponse: 1, HTTPSOnly: true, HSTS: &HSTS{MaxAge: yearHSTS, IncludeSubdomains: true, Preload: true},
			BasicAuth: users(User{"a", goodBcrypt}, User{"b", goodArgon}), JWT: &JWT{Issuer: "https://id.example", Audiences: []string{"me"}, Keys: goodKeys}, ClientCA: ca + ca}},
		{"host bits", "policy.allow[0]", TCP, Policy{Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")}}},
		{"mapped", "policy.deny[1]", TCP, Policy{Deny: []netip.Prefix{prefix("10.0.0.0/8"), prefix("::ffff:0:0/96")}}},
		{"twice", "policy.deny[1]", TCP, Policy{Deny: []netip.Prefix{prefix("10.0.0.0/8"), prefix("10.0.0.0/8")}}},
		{"too many", "policy.deny", TCP, Policy{Deny: make([]netip.Prefix, 1001)}},
		{"negative", "policy.concurrent", TCP, Policy{Concurrent: -1}},
		{"no rate", "policy.connectionRate", TCP, Policy{ConnectionRate: &RateLimit{}}},
		{"rate per day", "policy.connectionRate.total.rate", TCP, Policy{ConnectionRate: rate("5/d", 0)}},
		{"rate of none", "policy.connectionRate.total.rate", TCP, Policy{ConnectionRate: rate("0/s", 0)}},
		{"rate in another spelling", "policy.connectionRate.total.rate", TCP, Policy{ConnectionRate: rate("+5/s", 0)}},
		{"burst", "policy.connectionRate.total.burst", TCP, Policy{ConnectionRate: rate("5/s", -1)}},
		{"requests of TCP", "policy.requestRate", TCP, Policy{RequestRate: rate("5/s", 0)}},
		{"body of TLS", "policy.maxBody", TLS, Policy{MaxBody: 5}},
		{"https of TLS", "policy.httpsOnly", TLS, Policy{HTTPSOnly: true}},
		{"HSTS of TLS", "policy.hsts", TLS, Policy{HSTS: &HSTS{}}},
		{"password of TCP", "policy.basicAuth", TCP, Policy{BasicAuth: users()}},
		{"token of TCP", "policy.jwt", TCP, Policy{JWT: &JWT{}}},
		{"certificate of TLS", "policy.clientCA", TLS, Policy{ClientCA: ca}},
		{"countries", "", TLS, Policy{AllowCountries: []string{"BE", "EG"}, DenyCountries: []string{"XX"}}},
		{"country in small letters", "policy.denyCountries[0]", TCP, Policy{DenyCountries: []string{"be"}}},
		{"country by name", "policy.allowCountries[0]", TCP, Policy{AllowCountries: []string{"Belgium"}}},
		{"country twice", "policy.allowCountries[1]", TCP, Policy{AllowCountries: []string{"BE", "BE"}}},
		{"times", "", HTTP, Policy{Timeouts: &Timeouts{Request: "90s", Idle: "5m", Connection: "720h"}}},
		{"no times", "policy.timeouts", HTTP, Policy{Timeouts: &Timeouts{}}},
		{"time of requests of TCP", "policy.timeouts.request", TCP, Policy{Timeouts: &Timeouts{Request: "5s"}}},
		{"too short", "policy.timeouts.idle", TCP, Policy{Timeouts: &Timeouts{Idle: "999ms"}}},
		{"too long", "policy.timeouts.connection", TCP, Policy{Timeouts: &Timeouts{Connection: "721h"}}},
		{"no unit", "policy.timeouts.connection", TCP, Policy{Timeouts: &Timeouts{Connection: "90"}}},
		{"compressed", "", HTTP, Policy{Compress: &Compress{Types: []string{"text/*", "application/ld+json"}, MinSize: 1}}},
		{"compressed TCP", "policy.compress", TCP, Policy{Compress: &Compress{}}},
		{"no type", "policy.compress.types[0]", HTTP, Policy{Compress: &Compress{Types: []string{"text"}}}},
		{"type in capitals", "policy.compress.types[0]", HTTP, Policy{Compress: &Compress{Types: []string{"Text/html"}}}},
		{"any type", "policy.compress.types[0]", HTTP, Policy{Compress: &Compress{Types: []string{"*/*"}}}},
		{"parameters", "policy.compress.types[0]", HTTP, Policy{Compress: &Compress{Types: []string{"text/html; charset=utf-8"}}}},
		{"type twice", "policy.compress.types[1]", HTTP, Policy{Compress: &Compress{Types: []string{"text/css", "text/css"}}}},
		{"size", "policy.compress.minSize", HTTP, Policy{Compress: &Compress{MinSize: -1}}},
		{"body", "policy.maxBody", HTTP, Policy{MaxBody: -1}},
		{"answer", "policy.maxResponse", HTTP, Policy{MaxResponse: -1}},
		{"answer of TCP", "policy.maxResponse", TCP, Policy{MaxResponse: 1}},
		{"age", "policy.hsts.maxAge", HTTP, Policy{HSTS: &HSTS{MaxAge: -1}}},
		{"preload", "policy.hsts.preload", HTTP, Policy{HSTS: &HSTS{MaxAge: yearHSTS, Preload: true}}},
		{"nobody", "policy.basicAuth.users", HTTP, Policy{BasicAuth: users()}},
		{"no name", "policy.basicAuth.users[0].name", HTTP, Policy{BasicAuth: users(User{"", goodArgon})}},
		{"colon", "policy.basicAuth.users[0].name", HTTP, Policy{BasicAuth: users(User{"a:b", goodArgon})}},
		{"same name", "policy.basicAuth.users[1].name", HTTP, Policy{BasicAuth: users(User{"a", goodArgon}, User{"a", goodArgon})}},
		{"realm", "policy.basicAuth.realm", HTTP, Policy{BasicAuth: &BasicAuth{Realm: `"`}}},
		{"plain password", "policy.basicAuth.users[0].hash", HTTP, Policy{BasicAuth: users(User{"a", "secret"})}},
		{"cheap bcrypt", "policy.basicAuth.users[0].hash", HTTP, Policy{BasicAuth: users(User{"a", strings.Replace(goodBcrypt, "$10$", "$05$", 1)})}},
		{"dear bcrypt", "policy.basicAuth.users[0].hash", HTTP, Policy{BasicAuth: users(User{"a", strings.Replace(goodBcrypt, "$10$", "$31$", 1)})}},
		{"short bcrypt", "policy.basicAuth.users[0].hash", HTTP, Policy{BasicAuth: users(User{"a", goodBcrypt[:59]})}},
		{"dear argon2", "policy.basicAuth.users[0].hash", HTTP, Policy{BasicAuth: users(User{"a", strings.Replace(goodArgon, "m=8192", "m=1048576", 1)})}},
		{"argon2i", "policy.basicAuth.users[0].hash", HTTP, Policy{BasicAuth: users(User{"a", strings.Replace(goodArgon, "2id", "2i", 1)})}},
		{"argon2 without salt", "policy.basicAuth.users[0].hash", HTTP, Policy{BasicAuth: users(User{"a", strings.Replace(goodArgon, "c2FsdHNhbHQ", "", 1)})}},
		{"no issuer", "policy.jwt.issuer", HTTP, Policy{JWT: &JWT{Keys: goodKeys}}},
		{"empty audience", "policy.jwt.audiences[0]", HTTP, Policy{JWT: &JWT{Issuer: "i", Audiences: []string{""}, Keys: goodKeys}}},
		{"no keys", "policy.jwt.keys", HTTP, Policy{JWT: &JWT{Issuer: "i", Keys: `{"keys": []}`}}},
		{"keys by the issuer", "", HTTP, Policy{JWT: &JWT{Issuer: "https://id.example/realm", Audiences: []string{"me"}}}},
		{"issuer without https", "policy.jwt.issuer", HTTP, Policy{JWT: &JWT{Issuer: "http://id.example", Audiences: []string{"me"}}}},
		{"issuer with a query", "policy.jwt.issuer", HTTP, Policy{JWT: &JWT{Issuer: "https://id.example/?a", Audiences: []string{"me"}}}},
		{"issuer with a password", "policy.jwt.issuer", HTTP, Policy{JWT: &JWT{Issuer: "https://a:b@id.example", Audiences: []string{"me"}}}},
		{"no audience", "policy.jwt.audiences", HTTP, Policy{JWT: &JWT{Issuer: "https://id.example"}}},
		{"symmetric key", "policy.jwt.keys", HTTP, Policy{JWT: &JWT{Issuer: "i", Keys: `{"keys": [{"kty": "oct", "k": "AAAA"}]}`}}},
		{"private key", "policy.jwt.keys", HTTP, Policy{JWT: &JWT{Issuer: "i", Keys: strings.Replace(goodKeys, `"x"`, `"d": "AAAA", "x"`, 1)}}},
		{"weak key", "policy.jwt.keys", HTTP, Policy{JWT: &JWT{Issuer: "i", Keys: `{"keys": [{"kty": "RSA", "n": "AAAA", "e": "AQAB"}]}`}}},
		{"no PEM", "policy.clientCA", HTTP, Policy{ClientCA: "hello"}},
		{"text behind PEM", "policy.clientCA", HTTP, Policy{ClientCA: ca + "hello"}},
		{"no authority", "policy.clientCA", HTTP, Policy{ClientCA: authority(t, false)}},
	} {
		e := Exposure{Protocol: tt.protocol, Gateways: []ID{{1}}, Targets: []Target{{Node: ID{2}, Address: "localhost:1"}}, Policy: &tt.policy}
		if tt.protocol == TCP {
			e.Port = 1
		} else {
			e.Hosts = []string{"a.example"}
		}
		wantField(t, tt.name, e.validate(), tt.field)
	}
}

func wantField(t *testing.T, name string, err error, field string) {
	t.Helper()
	e, ok := errors.AsType[*Error](err)
	switch {
	case field == "" && err != nil, field != "" && err == nil:
		t.Errorf("%s: %v", name, err)
	case ok && (e.Field != field || e.Kind != Invalid || e.Public == ""):
		t.Errorf("%s: %s: %v, want %s", name, e.Field, err, field)
	}
}

func TestProxyProtocol(t *testing.T) {
	for _, tt := range []struct {
		protocol ExposureProtocol
		version  ProxyProtocol
		field    string
	}{{TCP, "", ""}, {TCP, ProxyV1, ""}, {TLS, ProxyV2, ""}, {HTTP, ProxyV1, "proxyProtocol"}, {TCP, "v3", "proxyProtocol"}} {
		e := Exposure{Protocol: tt.protocol, ProxyProtocol: tt.version}
		wantField(t, string(tt.protocol+"/")+string(tt.version), e.validateHandling(), tt.field)
	}
}

func TestRates(t *testing.T) {
	for s, want := range map[string]float64{"10/s": 10, "30/m": 0.5, "36/h": 0.01, "1/d": 0, "x": 0, "1": 0, "-1/s": 0} {
		if got, burst := (&Rate{Rate: s}).PerSecond(); got != want || (burst == 0) != (want == 0) {
			t.Errorf("%s: %v, %d", s, got, burst)
		}
	}
}

func TestBandwidths(t *testing.T) {
	for _, tt := range []struct {
		b     Bandwidth
		field string
	}{
		{Bandwidth{Total: &Throughput{In: 1_000, Out: 1 << 40}}, ""},
		{Bandwidth{}, "bandwidth"},
		{Bandwidth{Connection: &Throughput{}}, "bandwidth.connection"},
		{Bandwidth{Connection: &Throughput{In: 999}}, "bandwidth.connection.in"},
		{Bandwidth{Connection: &Throughput{In: 1_000}, Total: &Throughput{Out: 1<<40 + 1}}, "bandwidth.total.out"},
		{Bandwidth{Total: &Throughput{Out: -1_000}}, "bandwidth.total.out"},
	} {
		p := Policy{Bandwidth: &tt.b}
		for _, protocol := range []ExposureProtocol{HTTP, TCP, TLS, UDP} {
			wantField(t, string(protocol), p.validate(protocol), tt.field)
		}
	}
}

func TestOIDCPolicies(t *testing.T) {
	sealed := NewSealed([]Box{{Data: []byte("x")}})
	good := OIDC{Issuer: "https://id.example", ClientID: "wiki", Secret: sealed, Emails: []string{"ann@example.org"}, Domains: []string{"example.org"}, Groups: []string{"staff"}, Session: "720h"}
	for _, tt := range []struct {
		field  string
		change func(o *OIDC)
	}{
		{"", func(o *OIDC) {}},
		{"", func(o *OIDC) { o.Anyone, o.Emails, o.Domains, o.Groups = true, nil, nil, nil }},
		{"oidc", func(o *OIDC) { o.Emails, o.Domains, o.Groups = nil, nil, nil }},
		{"oidc", func(o *OIDC) { o.Anyone = true }},
		{"oidc.issuer", func(o *OIDC) { o.Issuer = "http://id.example" }},
		{"oidc.clientID", func(o *OIDC) { o.ClientID = "" }},
		{"oidc.secret", func(o *OIDC) { o.Secret = "secret" }},
		{"oidc.secret", func(o *OIDC) { o.Secret = "" }},
		{"oidc.emails[0]", func(o *OIDC) { o.Emails = []string{"Ann@example.org"} }},
		{"oidc.emails[0]", func(o *OIDC) { o.Emails = []string{"example.org"} }},
		{"oidc.domains[1]", func(o *OIDC) { o.Domains = []string{"example.org", "@example.com"} }},
		{"oidc.groups[1]", func(o *OIDC) { o.Groups = []string{"a", "a"} }},
		{"oidc.groups[0]", func(o *OIDC) { o.Groups = []string{"a,b"} }},
		{"oidc.scopes[0]", func(o *OIDC) { o.Scopes = []string{"email groups"} }},
		{"oidc.session", func(o *OIDC) { o.Session = "721h" }},
		{"oidc.session", func(o *OIDC) { o.Session = "1s" }},
	} {
		o := good
		tt.change(&o)
		p := Policy{OIDC: &o}
		wantField(t, tt.field, p.validate(HTTP), tt.field)
		if p.validate(TCP) == nil {
			t.Error("of TCP")
		}
	}
}

func TestConnect(t *testing.T) {
	target := Target{Node: ID{3}, Address: "localhost:22"}
	for _, tt := range []struct {
		name, field string
		e           Exposure
	}{
		{"http", "", Exposure{Protocol: HTTP, Targets: []Target{target}}},
		{"tls", "connect", Exposure{Protocol: TLS, Targets: []Target{target}}},
		{"over TLS", "connect", Exposure{Protocol: HTTP, Targets: []Target{target}, UpstreamTLS: &UpstreamTLS{}}},
		{"with rules' targets only", "connect", Exposure{Protocol: HTTP, Rules: []Rule{{Targets: []Target{target}}}}},
	} {
		tt.e.Hosts, tt.e.Gateways, tt.e.Connect = []string{"a.example"}, []ID{{1}}, true
		wantField(t, tt.name, tt.e.validate(), tt.field)
	}
}
