package ident

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gowebpki/jcs"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"pgregory.net/rapid"

	"webgw.dev/webgw"
)

var issued = time.Date(2026, 11, 22, 12, 0, 0, 123, time.FixedZone("there", 7200))

func testKey(n byte) Key { return FromSeed([32]byte{n}) }

func testRecord() webgw.Record {
	return webgw.Record{
		Version: 1, Kind: webgw.KindExposure, Name: "blog", Seq: 7, Issued: issued, Expires: issued.Add(24 * time.Hour),
		Exposure: &webgw.Exposure{
			Protocol: webgw.HTTP, Hosts: []string{"blog.example"}, Gateways: []webgw.ID{testKey(2).ID()},
			Targets: []webgw.Target{{Node: testKey(3).ID(), Address: "127.0.0.1:8080"}, {Node: testKey(3).ID(), Address: "unix:/run/<&>é.sock"}},
		},
	}
}

func mustSign(t testing.TB, k Key, r webgw.Record) Signed {
	t.Helper()
	s, err := k.Sign(r)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// seal makes an envelope as Sign does, but over whatever it is given.
func seal(k Key, payloadType string, payload []byte) dsse.Envelope {
	return dsse.Envelope{
		PayloadType: payloadType,
		Payload:     base64.StdEncoding.EncodeToString(payload),
		Signatures: []dsse.Signature{{
			KeyID: k.ID().String(),
			Sig:   base64.StdEncoding.EncodeToString(k.sign(dsse.PAE(payloadType, payload))),
		}},
	}
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func payloadOf(t testing.TB, s Signed) []byte {
	t.Helper()
	var e dsse.Envelope
	if err := json.Unmarshal(s.Envelope(), &e); err != nil {
		t.Fatal(err)
	}
	b, err := e.DecodeB64Payload()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSignVerify(t *testing.T) {
	k := testKey(1)
	in := testRecord()
	s := mustSign(t, k, in)
	got, err := Verify(s.Envelope())
	if err != nil {
		t.Fatal(err)
	}
	if a, b := marshal(t, got.Record), marshal(t, s.Record); !bytes.Equal(a, b) {
		t.Errorf("signed %s, verified %s", b, a)
	}
	if got.Record.Owner != k.ID() || got.IsZero() || !(Signed{}).IsZero() {
		t.Error("owner or IsZero")
	}
	if want := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC); got.Record.Issued != want {
		t.Errorf("issued %v, want %v", got.Record.Issued, want)
	}
	if !bytes.Equal(mustSign(t, k, in).Envelope(), s.Envelope()) {
		t.Error("the same record gives two envelopes")
	}
	// Another implementation of RFC 8032 and DSSE's PAE agrees.
	payload := payloadOf(t, s)
	pae := "DSSEv1 33 application/vnd.webgw.record+json " + strconv.Itoa(len(payload)) + " " + string(payload)
	var e dsse.Envelope
	if err := json.Unmarshal(s.Envelope(), &e); err != nil {
		t.Fatal(err)
	}
	sig, _ := base64.StdEncoding.DecodeString(e.Signatures[0].Sig)
	id := k.ID()
	if !ed25519.Verify(id[:], []byte(pae), sig) {
		t.Error("the signature is not over DSSE's pre-authentication encoding")
	}
}

// What is signed must not change when the caller goes on with its record.
func TestSignedIsTheCallersNoMore(t *testing.T) {
	r := testRecord()
	s := mustSign(t, testKey(1), r)
	r.Exposure.Hosts[0] = "evil.example"
	if s.Record.Exposure.Hosts[0] != "blog.example" {
		t.Error("the signed record changed with the caller's")
	}
	raw := bytes.Clone(s.Envelope())
	v, err := Verify(raw)
	if err != nil {
		t.Fatal(err)
	}
	raw[0] = 'x'
	if v.Envelope()[0] == 'x' {
		t.Error("the verified envelope changed with the caller's")
	}
}

func TestSignRefuses(t *testing.T) {
	r := testRecord()
	r.Name = "Not a label"
	if _, err := testKey(1).Sign(r); webgw.KindOf(err) != webgw.Invalid {
		t.Errorf("got %v", err)
	}
	r = testRecord()
	r.Kind, r.Exposure, r.Farm = webgw.KindFarm, nil, &webgw.Farm{}
	for i := range 1000 {
		r.Farm.Nodes = append(r.Farm.Nodes, FromSeed([32]byte{byte(i), byte(i >> 8)}).ID())
	}
	if _, err := testKey(1).Sign(r); webgw.KindOf(err) != webgw.Invalid || !strings.Contains(err.Error(), "64 KiB") {
		t.Errorf("got %v", err)
	}
	if _, err := (Key{}).Sign(testRecord()); err == nil {
		t.Error("the zero key signs")
	}
}

func TestEveryFlippedBitIsRefused(t *testing.T) {
	r := testRecord() // a small one
	r.Kind, r.Exposure, r.Node = webgw.KindNode, nil, &webgw.Node{}
	raw := mustSign(t, testKey(1), r).Envelope()
	for i := range raw {
		for bit := range 8 {
			bad := bytes.Clone(raw)
			bad[i] ^= 1 << bit
			if s, err := Verify(bad); err == nil {
				t.Errorf("bit %d of byte %d (%q to %q) goes unnoticed: %s", bit, i, raw[i], bad[i], s.Envelope())
			}
		}
	}
	for n := range raw {
		if _, err := Verify(raw[:n]); err == nil {
			t.Errorf("cut to %d bytes it verifies", n)
		}
	}
}

func TestFlippedBitsProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := testRecord()
		r.Seq = rapid.Uint64Range(1, 1<<53-1).Draw(t, "seq")
		r.Name = rapid.StringMatching(`[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?`).Draw(t, "name")
		s, err := FromSeed([32]byte(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "seed"))).Sign(r)
		if err != nil {
			t.Fatal(err)
		}
		if v, err := Verify(s.Envelope()); err != nil || v.Record.Seq != r.Seq || v.Record.Name != r.Name {
			t.Fatalf("%v, %v", v.Record, err)
		}
		bad := bytes.Clone(s.Envelope())
		bad[rapid.IntRange(0, len(bad)-1).Draw(t, "byte")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if _, err := Verify(bad); err == nil {
			t.Fatalf("accepted: %s", bad)
		}
	})
}

// A valid signature of the owner does not excuse a payload that two parsers
// may read in two ways.
func TestOddPayloadsAreRefusedThoughSigned(t *testing.T) {
	k := testKey(1)
	good := string(payloadOf(t, mustSign(t, k, testRecord())))
	if _, err := Verify(marshal(t, seal(k, PayloadType, []byte(good)))); err != nil {
		t.Fatal(err)
	}
	edit := func(from, to string) string {
		t.Helper()
		if !strings.Contains(good, from) {
			t.Fatalf("%s is not in %s", from, good)
		}
		return strings.Replace(good, from, to, 1)
	}
	for _, tt := range []struct {
		name, payload string
		kind          webgw.ErrorKind
	}{
		{"duplicate key", edit(`"name":"blog"`, `"name":"blog","name":"blog"`), webgw.Invalid},
		{"duplicate key, other value first", edit(`"name":"blog"`, `"name":"alog","name":"blog"`), webgw.Invalid},
		{"duplicate key inside", edit(`"protocol":"http"`, `"protocol":"http","protocol":"http"`), webgw.Invalid},
		{"key in other case", edit(`"exposure":`, `"exposurE":`), webgw.Invalid},
		{"key in two cases", edit(`{"expires"`, `{"NAME":"other","expires"`), webgw.Invalid},
		{"key in two cases, ordered", strings.Replace(good, `"name":"blog"`, `"naMe":"alog","name":"blog"`, 1), webgw.Invalid},
		{"unknown field", edit(`"v":1`, `"v":1,"x":1`), webgw.Invalid},
		{"unknown field inside", edit(`"protocol":"http"`, `"protocol":"http","sudo":true`), webgw.Invalid},
		{"white space", edit(`"v":1`, `"v": 1`), webgw.Invalid},
		{"keys out of order", `{"v":1,` + strings.Replace(good[1:], `,"v":1`, "", 1), webgw.Invalid},
		{"number in other form", edit(`"seq":7`, `"seq":7.0`), webgw.Invalid},
		{"number with exponent", edit(`"seq":7`, `"seq":7e0`), webgw.Invalid},
		{"escape without need", edit(`"name":"blog"`, `"name":"\u0062log"`), webgw.Invalid},
		{"default value written out", edit(`"expires"`, `"deleted":false,"expires"`), webgw.Invalid},
		{"time in another zone", edit(`"issued":"2026-11-22T10:00:00Z"`, `"issued":"2026-11-22T12:00:00+02:00"`), webgw.Invalid},
		{"time with a fraction", edit(`"issued":"2026-11-22T10:00:00Z"`, `"issued":"2026-11-22T10:00:00.5Z"`), webgw.Invalid},
		{"identity in capitals", edit(k.ID().String(), strings.ToUpper(k.ID().String())), webgw.Invalid},
		{"trailing data", good + `{}`, webgw.Invalid},
		{"trailing line end", good + "\n", webgw.Invalid},
		{"byte order mark", "\ufeff" + good, webgw.Invalid},
		{"not UTF-8", edit(`"name":"blog"`, "\"name\":\"bl\xffog\""), webgw.Invalid},
		{"null", `null`, webgw.Invalid},
		{"empty", ``, webgw.Invalid},
		{"an array", `[` + good + `]`, webgw.Invalid},
		{"deeply nested", strings.Repeat(`[`, 40_000), webgw.Invalid},
		{"deeply nested and whole", strings.Repeat(`[`, 20_000) + strings.Repeat(`]`, 20_000), webgw.Invalid},
		{"invalid record", edit(`"name":"blog"`, `"name":"Blog"`), webgw.Invalid},
		{"another's record", string(payloadOf(t, mustSign(t, testKey(9), testRecord()))), webgw.Unauthenticated},
		{"newer protocol", edit(`"v":1`, `"v":2`), webgw.Unsupported},
		{"newer protocol with unknown fields", `{"kind":"thing","v":2,"x":{}}`, webgw.Unsupported},
		{"version not a number", edit(`"v":1`, `"v":"1"`), webgw.Invalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := Verify(marshal(t, seal(k, PayloadType, []byte(tt.payload))))
			if webgw.KindOf(err) != tt.kind {
				t.Errorf("got %v, %v, want %s", s.Record, err, tt.kind)
			}
		})
	}
}

func TestOddEnvelopesAreRefused(t *testing.T) {
	k := testKey(1)
	payload := payloadOf(t, mustSign(t, k, testRecord()))
	good := string(marshal(t, seal(k, PayloadType, payload)))
	with := func(f func(e *dsse.Envelope)) string {
		e := seal(k, PayloadType, payload)
		f(&e)
		return string(marshal(t, e))
	}
	for _, tt := range []struct {
		name, raw string
		kind      webgw.ErrorKind // "": accepted
	}{
		{"as signed", good, ""},
		{"with white space", strings.ReplaceAll(good, `,"`, ",\n \""), ""},
		{"other payload type, signed so", string(marshal(t, seal(k, "application/vnd.in-toto+json", payload))), webgw.Invalid},
		{"payload type changed", with(func(e *dsse.Envelope) { e.PayloadType = "text/plain" }), webgw.Invalid},
		{"signed as another type", with(func(e *dsse.Envelope) { e.Signatures = seal(k, "text/plain", payload).Signatures }), webgw.Unauthenticated},
		{"no signature", with(func(e *dsse.Envelope) { e.Signatures = nil }), webgw.Invalid},
		{"two signatures", with(func(e *dsse.Envelope) { e.Signatures = append(e.Signatures, e.Signatures[0]) }), webgw.Invalid},
		{"empty signature", with(func(e *dsse.Envelope) { e.Signatures[0].Sig = "" }), webgw.Unauthenticated},
		{"long signature", with(func(e *dsse.Envelope) { e.Signatures[0].Sig = "AAAA" + e.Signatures[0].Sig }), webgw.Unauthenticated},
		{"another's keyid", with(func(e *dsse.Envelope) { e.Signatures[0].KeyID = testKey(2).ID().String() }), webgw.Unauthenticated},
		{"no keyid", with(func(e *dsse.Envelope) { e.Signatures[0].KeyID = "" }), webgw.Invalid},
		{"keyid of line ends", with(func(e *dsse.Envelope) { e.Signatures[0].KeyID = "webgw1" + strings.Repeat("\n", 56) }), webgw.Invalid},
		{"keyid in capitals", with(func(e *dsse.Envelope) { e.Signatures[0].KeyID = strings.ToUpper(e.Signatures[0].KeyID) }), webgw.Invalid},
		{"line end in base64", with(func(e *dsse.Envelope) { e.Payload = e.Payload[:8] + "\n" + e.Payload[8:] }), webgw.Invalid},
		{"line end in the signature", with(func(e *dsse.Envelope) { e.Signatures[0].Sig += "\n" }), webgw.Invalid},
		{"base64 for URLs", with(func(e *dsse.Envelope) { e.Payload = base64.URLEncoding.EncodeToString([]byte("{\"\xff\xfe\xfd")) }), webgw.Invalid},
		{"unknown field", strings.Replace(good, `{"payloadType"`, `{"x":1,"payloadType"`, 1), webgw.Invalid},
		{"unknown field in the signature", strings.Replace(good, `{"keyid"`, `{"cert":"","keyid"`, 1), webgw.Invalid},
		{"duplicate payload", strings.Replace(good, `{"payloadType"`, `{"payload":"e30=","payloadType"`, 1), webgw.Invalid},
		{"key in other case", strings.Replace(good, `"payload":`, `"Payload":`, 1), webgw.Invalid},
		{"trailing data", good + "{}", webgw.Invalid},
		{"trailing garbage", good + "x", webgw.Invalid},
		{"null", "null", webgw.Invalid},
		{"empty", "", webgw.Invalid},
		{"too large", good + strings.Repeat(" ", webgw.MaxEnvelope), webgw.Invalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := Verify([]byte(tt.raw))
			if webgw.KindOf(err) != tt.kind {
				t.Errorf("got %v, %v, want %q", s.Record, err, tt.kind)
			}
			if err == nil && string(s.Envelope()) != tt.raw {
				t.Error("the envelope is not kept as it was")
			}
		})
	}
}

// For the neutral point as key, the neutral point and 0 sign everything.
func TestWeakKeysSignNothing(t *testing.T) {
	weak := webgw.ID{0: 1}
	r := testRecord()
	r.Owner = weak
	r.Issued, r.Expires = r.Issued.UTC().Truncate(time.Second), r.Expires.UTC().Truncate(time.Second)
	payload, err := jcs.Transform(marshal(t, &r))
	if err != nil {
		t.Fatal(err)
	}
	sig := make([]byte, 64)
	sig[0] = 1
	if !ed25519.Verify(weak[:], dsse.PAE(PayloadType, payload), sig) {
		t.Fatal("the forgery is no longer one: this test proves nothing")
	}
	e := seal(testKey(1), PayloadType, payload)
	e.Signatures[0] = dsse.Signature{KeyID: weak.String(), Sig: base64.StdEncoding.EncodeToString(sig)}
	if _, err := Verify(marshal(t, e)); webgw.KindOf(err) != webgw.Invalid {
		t.Errorf("got %v", err)
	}
}

// FuzzVerify feeds bytes as an envelope, and as a payload that its owner has
// signed: whatever verifies must be the one spelling of a valid record.
func FuzzVerify(f *testing.F) {
	k := testKey(1)
	s := mustSign(f, k, testRecord())
	f.Add(s.Envelope())
	f.Add(payloadOf(f, s))
	f.Add([]byte(`{"payloadType":"","payload":"","signatures":[{"keyid":"webgw1","sig":""}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, raw := range [][]byte{b, marshal(t, seal(k, PayloadType, b))} {
			v, err := Verify(raw)
			if err != nil {
				continue
			}
			if err := v.Record.Validate(); err != nil {
				t.Errorf("verified, but %v", err)
			}
			again, err := k.Sign(*v.Record)
			if err != nil {
				t.Fatal(err)
			}
			if v.Record.Owner == k.ID() && !bytes.Equal(payloadOf(t, v), payloadOf(t, again)) {
				t.Errorf("%s is signed anew as %s", payloadOf(t, v), payloadOf(t, again))
			}
		}
	})
}
