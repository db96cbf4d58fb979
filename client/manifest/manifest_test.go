package manifest

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"webgw.dev/webgw"
)

// testID makes an identity whose text form is valid; nobody has its key.
func testID(n byte) webgw.ID { return webgw.ID{n, 7, 7, 7} }

// people is a Directory for tests.
type people map[string][]webgw.ID

func (p people) Lookup(_ context.Context, kind webgw.Kind, name string) ([]webgw.ID, error) {
	return p[string(kind)+" "+name], nil
}

var grid = people{
	"gateway gent":  {testID(1)},
	"gateway cairo": {testID(2)},
	"node home":     {testID(3)},
	"node twins":    {testID(4), testID(5)},
}

var now = time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)

func records(file, text string) ([]webgw.Record, error) {
	ms, err := Parse(file, []byte(text))
	if err != nil {
		return nil, err
	}
	var out []webgw.Record
	for _, m := range ms {
		r, err := m.Record(context.Background(), testID(9), now, grid)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

const good = `# what is public
kind: exposure
name: blog
lifetime: 30d
protocol: http
hosts: [blog.gent.example, "*.blog.gent.example", bücher.example]
gateways: [gent, cairo]
targets:
- node: home
  address: localhost:3000
- direct: "[2001:db8::1]:80"
---
kind: name
name: Blog.Example.
subtree: true
---
kind: zone
name: Bücher.example
gateways: [gent]
records:
- {name: "@", type: mx, value: 10 Mail.example.org.}
- {name: WWW.xn--bcher-kva.example., type: AAAA, ttl: 60, value: "2001:DB8::1"}
---
kind: farm
name: attic
description: Two machines
nodes:
  - home
gateways:
  - gent
---
kind: network
name: lan
ranges: [10.7.0.0/24]
members:
- {id: home, wireguard: "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", addresses: [10.7.0.1]}
- {peer: phone, wireguard: "BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", addresses: [10.7.0.2]}
---
`

func TestParse(t *testing.T) {
	rs, err := records("good.yaml", good)
	if err != nil {
		t.Fatal(err)
	}
	if len(rs) != 5 {
		t.Fatalf("%d records, want 5", len(rs))
	}
	want := &webgw.Exposure{Protocol: webgw.HTTP, Hosts: []string{"blog.gent.example", "*.blog.gent.example", "xn--bcher-kva.example"},
		Gateways: []webgw.ID{testID(1), testID(2)},
		Targets:  []webgw.Target{{Node: testID(3), Address: "localhost:3000"}, {Direct: "[2001:db8::1]:80"}}}
	if !reflect.DeepEqual(rs[0].Exposure, want) {
		t.Errorf("exposure %+v, want %+v", rs[0].Exposure, want)
	}
	if d := rs[0].Expires.Sub(rs[0].Issued); d != 30*24*time.Hour {
		t.Errorf("lifetime %v", d)
	}
	if rs[1].Name != "blog.example" || !rs[1].NameClaim.Subtree {
		t.Errorf("name %+v", rs[1])
	}
	wantZone := &webgw.Zone{Gateways: []webgw.ID{testID(1)}, Records: []webgw.DNSRecord{
		{Name: "@", Type: webgw.TypeMX, Value: "10 mail.example.org"}, {Name: "www", Type: webgw.TypeAAAA, TTL: 60, Value: "2001:db8::1"}}}
	if rs[2].Name != "xn--bcher-kva.example" || !reflect.DeepEqual(rs[2].Zone, wantZone) {
		t.Errorf("zone %+v, want %+v", rs[2].Zone, wantZone)
	}
	if d := rs[3].Expires.Sub(rs[3].Issued); d != DefaultLifetime {
		t.Errorf("default lifetime %v", d)
	}
	if got := rs[4].Network.Members[0].ID; got != testID(3) {
		t.Errorf("member %v", got)
	}
}

func TestFormatIsReadBack(t *testing.T) {
	rs, err := records("good.yaml", good)
	if err != nil {
		t.Fatal(err)
	}
	label := func(kind webgw.Kind, id webgw.ID) string {
		for name, ids := range grid {
			if len(ids) == 1 && ids[0] == id && strings.HasPrefix(name, string(kind)+" ") {
				return strings.TrimPrefix(name, string(kind)+" ")
			}
		}
		return ""
	}
	for _, labels := range []func(webgw.Kind, webgw.ID) string{nil, label} {
		for _, r := range rs {
			text, err := Format(&r, labels)
			if err != nil {
				t.Fatal(err)
			}
			back, err := records("back.yaml", string(text))
			if err != nil {
				t.Fatalf("%v in\n%s", err, text)
			}
			if !reflect.DeepEqual(back[0], r) {
				t.Errorf("came back as %+v, was %+v, by\n%s", back[0], r, text)
			}
		}
	}
}

func TestFormatQuotes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := webgw.Record{Version: 1, Kind: webgw.KindFarm, Owner: testID(9), Name: "f", Seq: 1, Issued: now, Expires: now.Add(time.Hour),
			Farm: &webgw.Farm{Description: rapid.String().Draw(t, "description"), Contact: rapid.StringMatching(`[ -~]{0,20}`).Draw(t, "contact")}}
		if r.Validate() != nil {
			t.Skip("not a record")
		}
		text, err := Format(&r, nil)
		if err != nil {
			t.Fatal(err)
		}
		back, err := records("back.yaml", string(text))
		if err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		if b := back[0].Farm; b.Description != r.Farm.Description || b.Contact != r.Farm.Contact {
			t.Fatalf("came back as %+v by\n%s", back[0].Farm, text)
		}
	})
}

func TestErrorsHaveAPlace(t *testing.T) {
	const head = "kind: exposure\nname: a\nprotocol: http\n"
	const rest = "gateways: [gent]\ntargets: [{node: home, address: 'localhost:1'}]\n"
	for _, c := range []struct{ name, text, want string }{
		{"unknown field", "kind: exposure\nname: a\nprotcol: http\n", "f:3:1: protcol: there is no such field"},
		{"unknown nested field", head + "hosts: [a.b]\ngateways: [gent]\ntargets:\n- node: home\n  adress: x\n", "f:8:3: targets[0].adress: there is no such field"},
		{"number for text", "kind: exposure\nname: 12\n", "f:2:7: name: must be text, not a number"},
		{"text for list", head + "hosts: a.b\n", "f:4:8: hosts: must be a list, not text"},
		{"text for number", "kind: exposure\nname: a\nport: x\n", `f:3:7: port: "x" is not a port or a range such as 6000-6100`},
		{"too large a number", "kind: exposure\nname: a\nport: 70000\n", "f:3:7: port: \"70000\" is not a port or a range such as 6000-6100"},
		{"a DNS value", "kind: zone\nname: a.b\ngateways: [gent]\nrecords:\n- {name: www, type: A, value: 1.2.3}\n", "f:5:24: records[0].value: \"1.2.3\" is not an IPv4 address"},
		{"a DNS name elsewhere", "kind: zone\nname: a.b\ngateways: [gent]\nrecords:\n- {name: www.evila.b., type: A, value: 192.0.2.1}\n", "f:5:4: records[0].name: \"www.evila.b.\" is not in the zone a.b"},
		{"text for truth", "kind: name\nname: a.b\nsubtree: sure\n", "f:3:10: subtree: must be true or false, not text"},
		{"nothing for text", "kind: exposure\nname:\n", "name: must be text, not nothing"},
		{"no kind", "name: a\n", "f:1:1: kind: missing"},
		{"no name", "kind: farm\n", "f:1:1: name: missing"},
		{"gateway", "kind: gateway\nname: a\n", "f:1:7: kind: \"gateway\" can't be declared here"},
		{"scalar", "hello\n", "f:1:1: a document must hold fields"},
		{"list", "- a\n", "a document must hold fields"},
		{"twice", "kind: farm\nname: a\nname: b\n", "f:3:1"},
		{"same name", "kind: farm\nname: a\n---\nkind: farm\nname: a\n", "f:5:1: name: farm \"a\" stands twice, first at f:1:1"},
		{"bad host", head + "hosts: [ok.example, _x.example]\n" + rest, "f:4:21: hosts[1]: \"_x\" may hold only"},
		{"bad IDNA", head + "hosts: [\"a\u200db.example\"]\n" + rest, "f:4:9: hosts[0]: "},
		{"unknown node", head + "hosts: [a.b]\ngateways: [gent]\ntargets:\n- {node: nobody, address: 'localhost:1'}\n", "f:7:10: targets[0].node: there is no node \"nobody\""},
		{"unknown gateway", head + "hosts: [a.b]\ngateways: [paris]\n", "f:5:12: gateways[0]: there is no gateway \"paris\""},
		{"ambiguous node", head + "hosts: [a.b]\ngateways: [gent]\ntargets: [{node: twins, address: 'localhost:1'}]\n", "targets[0].node: 2 nodes are called \"twins\""},
		{"rule of the record", head + "hosts: [a.b]\nport: 3\n" + rest, "f:5:1: port: belongs to protocols tcp, udp and tls"},
		{"no target", head + "hosts: [a.b]\ngateways: [gent]\n", "f:1:1: targets: must hold 1 to 32 targets"},
		{"anchor", "kind: &x farm\nname: *x\n", "anchors and aliases are not read here"},
		{"tag", "kind: !!str farm\n", "tags (!…) are not read here"},
		{"flow depth", "kind: farm\nnodes: " + strings.Repeat("[", 1000) + "\n", "nested deeper"},
		{"entry depth", "a: \n" + strings.Repeat("- ", 1000) + "\n", "nested deeper"},
		{"not YAML", "kind: [\n", "f:1:"},
		{"lifetime", "kind: farm\nname: a\nlifetime: 500d\n", "f:3:11: lifetime: \"500d\" is not between"},
		{"too large", strings.Repeat("#", MaxSize+1), "f: the file is larger than 1024 KiB"},
		{"too many", strings.Repeat("---\nkind: farm\nname: a\n", MaxDocuments+1), "the file holds more than 1000 documents"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := records("f", c.text)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			if _, ok := errors.AsType[*webgw.Error](err); !ok {
				t.Errorf("%T is no *webgw.Error", err)
			}
		})
	}
}

func TestHint(t *testing.T) {
	for got, want := range map[string]string{
		"protcol": "did you mean protocol?", "host": "did you mean hosts?", "tragets": "did you mean targets?",
		"Hosts": "did you mean hosts?", "what": "known here: protocol, hosts, targets",
	} {
		if s := suggest(got, []string{"protocol", "hosts", "targets"}); s != want {
			t.Errorf("%s: %q, want %q", got, s, want)
		}
	}
}

func TestHost(t *testing.T) {
	for in, want := range map[string]string{
		"Blog.Example.": "blog.example", "bücher.example": "xn--bcher-kva.example", "*.BÜCHER.example": "*.xn--bcher-kva.example",
		"faß.example": "xn--fa-hia.example", "xn--bcher-kva.example": "xn--bcher-kva.example",
	} {
		if got, err := Host("", in, true); err != nil || got != want {
			t.Errorf("%s: %s, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "xn--a.example", "xn--ÿ.example", "a..b", "a b.example", "1.2.3.4", "-é.example", strings.Repeat("é", 2000) + ".example"} {
		if got, err := Host("", in, true); err == nil {
			t.Errorf("%q gave %q", clip(in), got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(good)
	f.Add("kind: &a [*a]\n")
	f.Add("a: !!binary |\n  x\n? - b\n: {c: d}\n")
	f.Fuzz(func(t *testing.T, text string) {
		rs, err := records("f", text)
		if err != nil {
			return
		}
		for _, r := range rs {
			out, err := Format(&r, nil)
			if err != nil {
				t.Fatal(err)
			}
			back, err := records("f", string(out))
			if err != nil {
				t.Fatalf("%v in\n%s", err, out)
			}
			if len(back) != 1 || !reflect.DeepEqual(back[0], r) {
				t.Fatalf("came back as %+v, was %+v, by\n%s", back, r, out)
			}
		}
	})
}
