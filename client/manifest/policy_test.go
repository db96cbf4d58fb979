package manifest

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"webgw.dev/webgw"
)

const guarded = `kind: exposure
name: guarded
protocol: http
hosts: [guarded.example]
gateways: [gent]
targets: [{node: home, address: "localhost:3000"}]
policy:
  allow: [10.0.0.0/8, "2001:db8::/32"]
  deny: [10.1.0.0/16]
  allowCountries: [BE, EG]
  denyCountries: [XX]
  concurrent: 50
  bandwidth: {connection: {in: 500000, out: 1000000}, total: {in: 5000000, out: 10000000}}
  timeouts: {request: 90s, idle: 5m, connection: 2h}
  connectionRate: {total: {rate: 100/s}}
  requestRate:
    address: {rate: 10/s, burst: 20}
    total: {rate: 5000/m}
  maxBody: 1048576
  maxResponse: 10485760
  httpsOnly: true
  compress: {types: [text/html, "image/*"], minSize: 500}
  hsts: {maxAge: 63072000, includeSubdomains: true, preload: true}
  basicAuth:
    realm: Staff
    users:
    - name: ann
      hash: $argon2id$v=19$m=8192,t=1,p=1$c2FsdHNhbHQ$MDEyMzQ1Njc4OWFiY2RlZg
  jwt:
    issuer: https://id.example
    audiences: [me]
    keys: |
      {"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}
  oidc:
    issuer: https://id.example
    clientID: wiki
    secret: webgw-sealed-1.AAAAAAAAAAAAAQA
    scopes: [email, groups]
    emails: [ann@example.org]
    domains: [example.com]
    groups: [staff]
    groupsClaim: roles
    session: 12h
  clientCA: |
CA
---
kind: exposure
name: told
protocol: tcp
port: 20000
gateways: [gent]
targets: [{node: home, address: "localhost:3000"}]
proxyProtocol: v2
policy: {deny: [10.0.0.0/8]}
`

const routed = `kind: exposure
name: routed
protocol: http
hosts: [routed.example]
gateways: [gent]
rules:
- match: {prefix: /api, method: GET, headers: {X-Env: canary, X-Any: ""}}
  targets: [{node: home, address: "localhost:3001"}]
  rewrite: {path: /, host: inner.example}
  request:
    set: {X-A: "1"}
    add: {X-B: "2"}
    remove: [X-C]
  response:
    remove: [Server]
- match:
    path: /old
  redirect: {scheme: https, host: new.example, path: /new, status: 301}
- targets:
  - direct: "192.0.2.1:80"
`

func TestRulesAreReadAndWritten(t *testing.T) {
	rs, err := records("f", routed)
	if err != nil {
		t.Fatal(err)
	}
	e := rs[0].Exposure
	if u := e.Rules[0]; u.Match.Headers["X-Env"] != "canary" || len(u.Match.Headers) != 2 || u.Targets[0].Node != testID(3) || u.Rewrite.Host != "inner.example" || u.Request.Set["X-A"] != "1" || u.Response.Remove[0] != "Server" {
		t.Errorf("%+v", u)
	}
	if len(e.Targets) != 0 || e.Rules[1].Redirect.Status != 301 || e.Rules[2].Targets[0].Direct == "" {
		t.Errorf("%+v", e)
	}
	readBack(t, rs)
}

// withCA puts a certificate in.
func withCA(text string) string {
	return strings.Replace(text, "CA\n---", "    "+strings.ReplaceAll(strings.TrimSpace(testCA), "\n", "\n    ")+"\n---", 1)
}

func TestPolicyIsReadAndWritten(t *testing.T) {
	rs, err := records("f", withCA(guarded))
	if err != nil {
		t.Fatal(err)
	}
	p := rs[0].Exposure.Policy
	if p.RequestRate.Address.Burst != 20 || p.HSTS.MaxAge != 63072000 || !p.HSTS.Preload || p.BasicAuth.Users[0].Name != "ann" || !strings.HasPrefix(p.JWT.Keys, `{"keys"`) || p.MaxBody != 1<<20 || len(p.Allow) != 2 {
		t.Errorf("%+v", p)
	}
	if rs[1].Exposure.ProxyProtocol != webgw.ProxyV2 {
		t.Error(rs[1].Exposure)
	}
	everyFieldSet(t, "policy", reflect.ValueOf(*p))
	readBack(t, rs)
}

// readBack writes records as manifests and as JSON, and reads both again.
func readBack(t *testing.T, rs []webgw.Record) {
	t.Helper()
	for _, r := range rs {
		text, err := Format(&r, nil)
		if err != nil {
			t.Fatal(err)
		}
		back, err := records("back", string(text))
		if err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		if !reflect.DeepEqual(back[0], r) {
			t.Errorf("came back as %+v by\n%s", back[0].Exposure, text)
		}
		// What a signer signs is what a verifier reads.
		signed, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var again webgw.Record
		d := json.NewDecoder(bytes.NewReader(signed))
		d.DisallowUnknownFields()
		if err := d.Decode(&again); err != nil || !reflect.DeepEqual(again, r) {
			t.Errorf("%v: %s", err, signed)
		}
	}
}

// everyFieldSet makes sure that a test covers what is added later.
func everyFieldSet(t *testing.T, path string, v reflect.Value) {
	t.Helper()
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			t.Errorf("%s is not set in the test", path)
			return
		}
		everyFieldSet(t, path, v.Elem())
	case reflect.Struct:
		if v.Type().PkgPath() != "webgw.dev/webgw" {
			return
		}
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.IsExported() && f.Type.Kind() != reflect.Pointer && v.Field(i).IsZero() && f.Name != "Address" && f.Name != "Burst" && f.Name != "Anyone" {
				t.Errorf("%s.%s is not set in the test", path, f.Name)
			} else if f.IsExported() && !(f.Type.Kind() == reflect.Pointer && v.Type() == reflect.TypeFor[webgw.RateLimit]()) {
				everyFieldSet(t, path+"."+f.Name, v.Field(i))
			}
		}
	case reflect.Slice:
		for i := range v.Len() {
			everyFieldSet(t, path, v.Index(i))
		}
	}
}

func TestErrorsInPoliciesHaveAPlace(t *testing.T) {
	const head = "kind: exposure\nname: a\nprotocol: http\nhosts: [a.b]\ngateways: [gent]\ntargets: [{node: home, address: 'localhost:1'}]\n"
	for _, c := range []struct{ text, want string }{
		{"policy: strict\n", "f:7:9: policy: must be a group of fields, not text"},
		{"policy: {alow: []}\n", "f:7:10: policy.alow: there is no such field"},
		{"policy:\n  allow: [10.0.0.1/8]\n", "f:8:11: policy.allow[0]: must be a network prefix"},
		{"policy:\n  allow: [ten]\n", `f:8:11: policy.allow[0]: "ten" can't be read`},
		{"policy:\n  requestRate:\n    address: {rate: often}\n", "f:9:15: policy.requestRate.address.rate: \"often\" is not a number"},
		{"policy:\n  basicAuth:\n    users:\n    - name: ann\n      hash: secret\n", "f:11:7: policy.basicAuth.users[0].hash: must be a bcrypt"},
		{"rules:\n- match: {prefix: /api/}\n", "f:8:11: rules[0].match.prefix: \"/api/\": leave the last / out"},
		{"rules:\n- match: {path: [a]}\n", "f:8:17: rules[0].match.path: must be text, not a list"},
		{"rules:\n- request:\n    set: {X-A: 1}\n", "rules[0].request.set.X-A: must be text, not a number"},
		{"rules:\n- request:\n    set:\n      Host: a\n", "f:9:5: rules[0].request.set: Host is the gateway's to write"},
		{"rules:\n- targets: [{node: nobody, address: 'a:1'}]\n", "f:8:20: rules[0].targets[0].node: there is no node"},
		{"proxyProtocol: v1\n", "f:7:1: proxyProtocol: belongs to protocols tcp and tls"},
	} {
		_, err := records("f", head+c.text)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want %q", err, c.want)
		}
	}
}

const testCA = `-----BEGIN CERTIFICATE-----
MIIBdTCCARugAwIBAgIUERztvJjoRk8gmHHdodAVki38u8gwCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjMwMzQzNTZaGA8yMTI2MTAzMDAzNDM1
NlowDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABN7O
TnpDQ6J0A5hpnTl+is3NN00Vc0reWmGdXlWcoqDO7EsiCq48KM42vH3evVkVeHMx
s0ev2L+mWvv8NwAg/1ijUzBRMB0GA1UdDgQWBBTijnrQXhCRmnzyWtpgbT8dVlbt
4zAfBgNVHSMEGDAWgBTijnrQXhCRmnzyWtpgbT8dVlbt4zAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0gAMEUCIQC1PsGfaYDxMFHmpJnZiKyEaGcbGwHz7QwS
bbkAnexPcwIgIP1qsQIl/LKSjOojweskAStogQ9a3p++3vPw5cnimyo=
-----END CERTIFICATE-----
`
