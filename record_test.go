package webgw

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

var testIssued = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

const testWireGuard = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="

// testRecord returns a valid record of each kind, with every field set.
func testRecord(k Kind) *Record {
	r := &Record{Version: 1, Kind: k, Owner: testID(1), Name: "thing", Seq: 1, Issued: testIssued, Expires: testIssued.Add(24 * time.Hour)}
	switch k {
	case KindFarm:
		r.Farm = &Farm{Description: "Ghent, by the canal", Contact: "abuse@farm.example", Nodes: []ID{testID(2), testID(3)}, Gateways: []ID{testID(4)}}
	case KindGateway:
		r.Gateway = &Gateway{Farmer: testID(2), Addresses: []string{"192.0.2.1:443", "[2001:db8::1]:443", "gent.example:443"}, Zone: "gent.example", HTTPPort: 80, TLSPort: 443, Ports: "20000-20999"}
	case KindNode:
		r.Node = &Node{Farmer: testID(2), Owners: []ID{testID(3)}}
	case KindZone:
		r.Name = "zone.example"
		r.Zone = &Zone{Gateways: []ID{testID(4)}, Records: []DNSRecord{{Name: "@", Type: TypeMX, TTL: 60, Value: "10 mail.zone.example"}, {Name: "www", Type: TypeA, Value: "192.0.2.1"}}}
	case KindName:
		r.Name, r.NameClaim = "blog.example", &NameClaim{Subtree: true}
	case KindNetwork:
		r.Network = &Network{
			Ranges: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00:1::/64")},
			Members: []Member{
				{ID: testID(2), WireGuard: testWireGuard, Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.1")}},
				{Peer: "laptop", WireGuard: "TrMvSoP4jYQlY6RIzBgbssQqY3vxI2Pi+y71lOWWXX0=", Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00:1::2")}},
			},
		}
	case KindExposure:
		r.Exposure = &Exposure{
			Protocol: HTTP, Hosts: []string{"blog.example", "*.blog.example"}, Gateways: []ID{testID(4), testID(5)}, Upstream: UpstreamH2C,
			Targets: []Target{{Node: testID(6), Address: "127.0.0.1:8080"}, {Node: testID(6), Address: "unix:/run/app.sock"}, {Direct: "[2001:db8::9]:80"}},
		}
	}
	return r
}

func TestRecordsOfEveryKind(t *testing.T) {
	for _, k := range Kinds {
		r := testRecord(k)
		if err := r.Validate(); err != nil {
			t.Errorf("%s: %v", k, err)
		}
		if err := r.CheckAt(testIssued); err != nil {
			t.Errorf("%s: %v", k, err)
		}
		if key, err := ParseKey(r.Key().String()); err != nil || key != r.Key() {
			t.Errorf("%s: key %v, %v", k, key, err)
		}
		for _, s := range []string{string(k), string(k) + "s"} {
			if got, err := ParseKind(s); err != nil || got != k {
				t.Errorf("ParseKind(%q): %v, %v", s, got, err)
			}
		}
	}
}

func TestRecordValidation(t *testing.T) {
	many := func(n int) (ids []ID) {
		for i := range n {
			ids = append(ids, testID(uint64(100+i)))
		}
		return ids
	}
	for _, tt := range []struct {
		kind  Kind
		name  string
		edit  func(r *Record)
		field string
	}{
		{KindNode, "version 0", func(r *Record) { r.Version = 0 }, "v"},
		{KindNode, "negative version", func(r *Record) { r.Version = -1 }, "v"},
		{KindNode, "no kind", func(r *Record) { r.Kind = "" }, "kind"},
		{KindNode, "unknown kind", func(r *Record) { r.Kind = "thing" }, "kind"},
		{KindNode, "plural kind", func(r *Record) { r.Kind = "nodes" }, "kind"},
		{KindNode, "no owner", func(r *Record) { r.Owner = ID{} }, "owner"},
		{KindNode, "no name", func(r *Record) { r.Name = "" }, "name"},
		{KindNode, "name of two labels", func(r *Record) { r.Name = "a.b" }, "name"},
		{KindNode, "name with slash", func(r *Record) { r.Name = "a/b" }, "name"},
		{KindNode, "seq 0", func(r *Record) { r.Seq = 0 }, "seq"},
		{KindNode, "seq 2^53", func(r *Record) { r.Seq = 1 << 53 }, "seq"},
		{KindNode, "not issued", func(r *Record) { r.Issued = time.Time{} }, "issued"},
		{KindNode, "expires when issued", func(r *Record) { r.Expires = r.Issued }, "expires"},
		{KindNode, "never expires", func(r *Record) { r.Expires = time.Time{} }, "expires"},
		{KindNode, "lives too long", func(r *Record) { r.Expires = r.Issued.Add(MaxLifetime + 1) }, "expires"},
		{KindNode, "expires in the year 9999", func(r *Record) { r.Expires = time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC) }, "expires"},
		{KindNode, "no body", func(r *Record) { r.Node = nil }, "node"},
		{KindNode, "two bodies", func(r *Record) { r.Farm = &Farm{} }, "node"},
		{KindNode, "other body", func(r *Record) { r.Node, r.Farm = nil, &Farm{} }, "node"},
		{KindNode, "owner twice", func(r *Record) { r.Node.Owners = []ID{testID(1), testID(1)} }, "node.owners[1]"},
		{KindNode, "owner zero", func(r *Record) { r.Node.Owners = []ID{{}} }, "node.owners[0]"},

		{KindName, "name of one label", func(r *Record) { r.Name = "blog" }, "name"},
		{KindName, "wildcard name", func(r *Record) { r.Name = "*.blog.example" }, "name"},
		{KindName, "upper case", func(r *Record) { r.Name = "Blog.example" }, "name"},
		{KindName, "trailing dot", func(r *Record) { r.Name = "blog.example." }, "name"},
		{KindName, "no body", func(r *Record) { r.NameClaim = nil }, "claim"},

		{KindFarm, "long description", func(r *Record) { r.Farm.Description = strings.Repeat("é", 201) }, "farm.description"},
		{KindFarm, "escape sequence", func(r *Record) { r.Farm.Description = "\x1b[31m" }, "farm.description"},
		{KindFarm, "bidi override", func(r *Record) { r.Farm.Contact = "a\u202eb" }, "farm.contact"},
		{KindFarm, "not UTF-8", func(r *Record) { r.Farm.Contact = "a\xff" }, "farm.contact"},
		{KindFarm, "node twice", func(r *Record) { r.Farm.Nodes[1] = r.Farm.Nodes[0] }, "farm.nodes[1]"},
		{KindFarm, "gateways", func(r *Record) { r.Farm.Gateways = many(1001) }, "farm.gateways"},

		{KindGateway, "no addresses", func(r *Record) { r.Gateway.Addresses = nil }, "gateway.addresses"},
		{KindGateway, "17 addresses", func(r *Record) { r.Gateway.Addresses = make([]string, 17) }, "gateway.addresses"},
		{KindGateway, "bad address", func(r *Record) { r.Gateway.Addresses[1] = "127.1:443" }, "gateway.addresses[1]"},
		{KindGateway, "no port", func(r *Record) { r.Gateway.Addresses[0] = "192.0.2.1" }, "gateway.addresses[0]"},
		{KindGateway, "zone", func(r *Record) { r.Gateway.Zone = "gent" }, "gateway.zone"},
		{KindGateway, "wildcard zone", func(r *Record) { r.Gateway.Zone = "*.gent.example" }, "gateway.zone"},
		{KindGateway, "no TLS port", func(r *Record) { r.Gateway.TLSPort = 0 }, "gateway.tlsPort"},
		{KindGateway, "ports", func(r *Record) { r.Gateway.Ports = "9-1" }, "gateway.ports"},

		{KindNetwork, "no ranges", func(r *Record) { r.Network.Ranges = nil }, "network.ranges"},
		{KindNetwork, "host bits", func(r *Record) { r.Network.Ranges[0] = netip.MustParsePrefix("10.1.0.1/16") }, "network.ranges[0]"},
		{KindNetwork, "zero range", func(r *Record) { r.Network.Ranges[0] = netip.Prefix{} }, "network.ranges[0]"},
		{KindNetwork, "mapped range", func(r *Record) { r.Network.Ranges[1] = netip.MustParsePrefix("::ffff:10.0.0.0/104") }, "network.ranges[1]"},
		{KindNetwork, "two of a family", func(r *Record) { r.Network.Ranges[1] = netip.MustParsePrefix("10.2.0.0/16") }, "network.ranges[1]"},
		{KindNetwork, "member neither", func(r *Record) { r.Network.Members[0].ID = ID{} }, "network.members[0]"},
		{KindNetwork, "member both", func(r *Record) { r.Network.Members[0].Peer = "x" }, "network.members[0]"},
		{KindNetwork, "member twice", func(r *Record) { r.Network.Members[1].Peer, r.Network.Members[1].ID = "", testID(2) }, "network.members[1]"},
		{KindNetwork, "peer name", func(r *Record) { r.Network.Members[1].Peer = "My Laptop" }, "network.members[1].peer"},
		{KindNetwork, "no key", func(r *Record) { r.Network.Members[1].WireGuard = "" }, "network.members[1].wireguard"},
		{KindNetwork, "key with line end", func(r *Record) { r.Network.Members[1].WireGuard += "\n" }, "network.members[1].wireguard"},
		{KindNetwork, "short key", func(r *Record) { r.Network.Members[1].WireGuard = "AAAA" }, "network.members[1].wireguard"},
		{KindNetwork, "key twice", func(r *Record) { r.Network.Members[1].WireGuard = testWireGuard }, "network.members[1].wireguard"},
		{KindNetwork, "no addresses", func(r *Record) { r.Network.Members[1].Addresses = nil }, "network.members[1].addresses"},
		{KindNetwork, "outside", func(r *Record) { r.Network.Members[1].Addresses[1] = netip.MustParseAddr("fd00:2::1") }, "network.members[1].addresses[1]"},
		{KindNetwork, "mapped address", func(r *Record) { r.Network.Members[1].Addresses[0] = netip.MustParseAddr("::ffff:10.1.0.2") }, "network.members[1].addresses[0]"},
		{KindNetwork, "used twice", func(r *Record) { r.Network.Members[1].Addresses[0] = netip.MustParseAddr("10.1.0.1") }, "network.members[1].addresses[0]"},

		{KindExposure, "no protocol", func(r *Record) { r.Exposure.Protocol = "" }, "exposure.protocol"},
		{KindExposure, "other protocol", func(r *Record) { r.Exposure.Protocol = "HTTP" }, "exposure.protocol"},
		{KindExposure, "no hosts", func(r *Record) { r.Exposure.Hosts = nil }, "exposure.hosts"},
		{KindExposure, "33 hosts", func(r *Record) { r.Exposure.Hosts = make([]string, 33) }, "exposure.hosts"},
		{KindExposure, "bad host", func(r *Record) { r.Exposure.Hosts[1] = "Blog.example" }, "exposure.hosts[1]"},
		{KindExposure, "host twice", func(r *Record) { r.Exposure.Hosts[1] = "blog.example" }, "exposure.hosts[1]"},
		{KindExposure, "port with http", func(r *Record) { r.Exposure.Port = 80 }, "exposure.port"},
		{KindExposure, "tcp without port", func(r *Record) { r.Exposure.Protocol = TCP }, "exposure.port"},
		{KindExposure, "udp without port", func(r *Record) { r.Exposure.Protocol, r.Exposure.Hosts = UDP, nil }, "exposure.port"},
		{KindExposure, "udp to a unix socket", func(r *Record) {
			r.Exposure.Protocol, r.Exposure.Hosts, r.Exposure.Port, r.Exposure.Upstream, r.Exposure.Targets[0].Address = UDP, nil, 53, "", "unix:/run/a"
		}, "exposure.targets[0].address"},
		{KindExposure, "tcp with hosts", func(r *Record) { r.Exposure.Protocol, r.Exposure.Port = TCP, 22 }, "exposure.hosts"},
		{KindExposure, "upstream", func(r *Record) { r.Exposure.Upstream = "h3" }, "exposure.upstream"},
		{KindExposure, "upstream with tls", func(r *Record) { r.Exposure.Protocol = TLS }, "exposure.upstream"},
		{KindExposure, "no gateways", func(r *Record) { r.Exposure.Gateways = nil }, "exposure.gateways"},
		{KindExposure, "65 gateways", func(r *Record) { r.Exposure.Gateways = many(65) }, "exposure.gateways"},
		{KindExposure, "gateway twice", func(r *Record) { r.Exposure.Gateways[1] = r.Exposure.Gateways[0] }, "exposure.gateways[1]"},
		{KindExposure, "no targets", func(r *Record) { r.Exposure.Targets = nil }, "exposure.targets"},
		{KindExposure, "33 targets", func(r *Record) { r.Exposure.Targets = make([]Target, 33) }, "exposure.targets"},
		{KindExposure, "empty target", func(r *Record) { r.Exposure.Targets[1] = Target{} }, "exposure.targets[1].node"},
		{KindExposure, "no address", func(r *Record) { r.Exposure.Targets[0].Address = "" }, "exposure.targets[0].address"},
		{KindExposure, "bad address", func(r *Record) { r.Exposure.Targets[0].Address = "0x7f.1:80" }, "exposure.targets[0].address"},
		{KindExposure, "direct and node", func(r *Record) { r.Exposure.Targets[0].Direct = "192.0.2.1:80" }, "exposure.targets[0].direct"},
		{KindExposure, "direct unix", func(r *Record) { r.Exposure.Targets[2].Direct = "unix:/run/docker.sock" }, "exposure.targets[2].direct"},
		{KindExposure, "direct mapped", func(r *Record) { r.Exposure.Targets[2].Direct = "[::ffff:127.0.0.1]:80" }, "exposure.targets[2].direct"},
		{KindExposure, "target twice", func(r *Record) { r.Exposure.Targets[1] = r.Exposure.Targets[0] }, "exposure.targets[1]"},
	} {
		t.Run(fmt.Sprintf("%s/%s", tt.kind, tt.name), func(t *testing.T) {
			r := testRecord(tt.kind)
			tt.edit(r)
			err := r.Validate()
			e, ok := err.(*Error)
			if !ok || e.Kind != Invalid || e.Field != tt.field || e.Public == "" {
				t.Errorf("got %v, want field %q", err, tt.field)
			}
		})
	}
}

func TestNewerProtocolIsUnsupported(t *testing.T) {
	r := testRecord(KindNode)
	r.Version = Protocol + 1
	if err := r.Validate(); KindOf(err) != Unsupported {
		t.Errorf("got %v", err)
	}
}

func TestRecordTimes(t *testing.T) {
	r := testRecord(KindNode)
	for _, tt := range []struct {
		name string
		at   time.Time
		kind ErrorKind
		live bool
	}{
		{"when issued", r.Issued, "", true},
		{"clock behind, tolerated", r.Issued.Add(-MaxSkew), "", true},
		{"clock behind, not tolerated", r.Issued.Add(-MaxSkew - 1), Invalid, true},
		{"at its end", r.Expires, "", true},
		{"clock ahead, tolerated", r.Expires.Add(MaxSkew), "", true},
		{"expired", r.Expires.Add(MaxSkew + 1), Expired, false},
	} {
		if err := r.CheckAt(tt.at); KindOf(err) != tt.kind {
			t.Errorf("%s: %v", tt.name, err)
		}
		if r.Live(tt.at) != tt.live {
			t.Errorf("%s: live is %v", tt.name, !tt.live)
		}
	}
	r.Deleted = true
	if r.Live(r.Issued) {
		t.Error("a tombstone is live")
	}
}

func TestSupersedes(t *testing.T) {
	old, same, next := testRecord(KindNode), testRecord(KindNode), testRecord(KindNode)
	next.Seq++
	if !old.Supersedes(nil) || !next.Supersedes(old) || same.Supersedes(old) || old.Supersedes(next) {
		t.Error("the sequence does not decide")
	}
}

func TestParseKeyRefuses(t *testing.T) {
	id := testID(1).String()
	for _, s := range []string{"", "node", "node/" + id, "nodes/" + id + "/x", "thing/" + id + "/x", "node/" + id[:61] + "/x", "node//x", "node/" + id + "/", "node/" + id + "/a/b", "name/" + id + "/one"} {
		if k, err := ParseKey(s); KindOf(err) != Invalid {
			t.Errorf("%q: %v, %v", s, k, err)
		}
	}
}

// What validates must read back as the same record.
func FuzzRecordJSON(f *testing.F) {
	for _, k := range Kinds {
		b, err := json.Marshal(testRecord(k))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var r Record
		if json.Unmarshal(b, &r) != nil || r.Validate() != nil {
			return
		}
		once, err := json.Marshal(&r)
		if err != nil {
			t.Fatalf("a valid record can't be written: %v", err)
		}
		var again Record
		if err := json.Unmarshal(once, &again); err != nil {
			t.Fatal(err)
		}
		if err := again.Validate(); err != nil {
			t.Errorf("valid, written, read, and then %v", err)
		}
		if twice, err := json.Marshal(&again); err != nil || string(twice) != string(once) {
			t.Errorf("%s\nbecomes\n%s (%v)", once, twice, err)
		}
	})
}
