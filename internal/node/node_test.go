package node

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/live"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/netx/memnet"
	"webgw.dev/webgw/internal/tunnel"
)

func key(b byte) ident.Key { return ident.FromSeed([32]byte{b}) }

var (
	self, owner, stranger, gent, cairo = key(1), key(2), key(3), key(4), key(5)
)

// view holds exposures, each declared by its owner.
func view(t *testing.T, records ...ident.Signed) *live.View {
	t.Helper()
	v := &live.View{Records: map[webgw.Key]ident.Signed{}}
	for _, s := range records {
		v.Records[s.Record.Key()] = s
	}
	return v
}

func exposure(t *testing.T, by ident.Key, name string, protocol webgw.ExposureProtocol, life time.Duration, addresses ...string) ident.Signed {
	t.Helper()
	e := &webgw.Exposure{Protocol: protocol, Gateways: []webgw.ID{gent.ID()}}
	if protocol == webgw.TCP {
		e.Port = 20000
	} else {
		e.Hosts = []string{name + ".example"}
	}
	for _, a := range addresses {
		e.Targets = append(e.Targets, webgw.Target{Node: self.ID(), Address: a})
	}
	e.Targets = append(e.Targets, webgw.Target{Node: stranger.ID(), Address: "127.0.0.1:99"}, webgw.Target{Direct: "example.org:98"})
	s, err := by.Sign(webgw.Record{Version: 1, Kind: webgw.KindExposure, Name: name, Seq: 1, Issued: time.Now(), Expires: time.Now().Add(life), Exposure: e})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func rig(t *testing.T, policy Policy, records ...ident.Signed) (*Node, *spy, *memnet.World) {
	t.Helper()
	w := memnet.New(1)
	s := &spy{Host: w.Host("home")}
	policy.Owners = append(policy.Owners, owner.ID())
	n := &Node{Key: self, Policy: policy, Net: s}
	n.setup()
	n.apply(view(t, records...))
	return n, s, w
}

// spy is a host that remembers what got past the judge.
type spy struct {
	*memnet.Host
	dialed []string
}

func (s *spy) Dial(ctx context.Context, network, address string, control netx.Control) (net.Conn, error) {
	return s.Host.Dial(ctx, network, address, func(network, address string) error {
		err := control(network, address)
		if err == nil {
			s.dialed = append(s.dialed, address)
		}
		return err
	})
}

func TestRequestsAreCheckedAgainstWhatTheOwnerSigned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		site := exposure(t, owner, "site", webgw.HTTP, time.Hour, "127.0.0.1:80", "localhost:81", "unix:/run/app/s")
		pass := exposure(t, owner, "pass", webgw.TLS, time.Hour, "127.0.0.1:443")
		foreign := exposure(t, stranger, "foreign", webgw.HTTP, time.Hour, "127.0.0.1:80")
		gone := exposure(t, owner, "gone", webgw.HTTP, time.Second, "127.0.0.1:80")
		n, spy, _ := rig(t, Policy{}, site, pass, foreign, gone)
		time.Sleep(webgw.MaxSkew + 2*time.Second) // gone has expired since the view was made
		k := func(s ident.Signed) webgw.Key { return s.Record.Key() }
		for _, tt := range []struct {
			name    string
			gateway ident.Key
			r       tunnel.Request
			reason  string
		}{
			{"listed", gent, tunnel.Request{Kind: tunnel.Sealed, Exposure: k(site), Target: "127.0.0.1:80"}, ""},
			{"listed name", gent, tunnel.Request{Kind: tunnel.Sealed, Exposure: k(site), Target: "localhost:81"}, ""},
			{"passthrough", gent, tunnel.Request{Kind: tunnel.Handoff, Exposure: k(pass), Target: "127.0.0.1:443"}, ""},
			{"no exposure", gent, tunnel.Request{Kind: tunnel.Sealed, Target: "127.0.0.1:80"}, reasonExposure},
			{"foreign owner", gent, tunnel.Request{Kind: tunnel.Sealed, Exposure: k(foreign), Target: "127.0.0.1:80"}, reasonExposure},
			{"expired", gent, tunnel.Request{Kind: tunnel.Sealed, Exposure: k(gone), Target: "127.0.0.1:80"}, reasonExposure},
			{"another kind of record", gent, tunnel.Request{Kind: tunnel.Sealed, Exposure: webgw.Key{Kind: webgw.KindName, Owner: owner.ID(), Name: "site"}, Target: "127.0.0.1:80"}, reasonExposure},
			{"another gateway", cairo, tunnel.Request{Kind: tunnel.Sealed, Exposure: k(site), Target: "127.0.0.1:80"}, reasonGateway},
			{"the node as gateway", self, tunnel.Request{Kind: tunnel.Sealed, Exposure: k(site), Target: "127.0.0.1:80"}, reasonGateway},
			{"another exposure's target", gent, tunnel.Request{Kind: tunnel.Sealed, Exposure: k(site), Target: "127.0.0.1:443"}, reasonTarget},
			{"another node's target", gent, tunnel.Request{Kind: tunnel.Sealed, Exposure: k(site), Target: "127.0.0.1:99"}, reasonTarget},
			{"a direct target", gent, tunnel.Request{Kind: tunnel.Sealed, Exposure: k(site), Target: "example.org:98"}, reasonTarget},
			{"handoff of plain text", gent, tunnel.Request{Kind: tunnel.Handoff, Exposure: k(site), Target: "127.0.0.1:80"}, reasonKind},
		} {
			reason, err := n.allowed.Load().judge(self.ID(), tt.gateway.ID(), tt.r, time.Now())
			if reason != tt.reason || (err == nil) != (tt.reason == "") {
				t.Errorf("%s: %q, %v; want %q", tt.name, reason, err, tt.reason)
			}
			if err != nil && err.Kind != webgw.Forbidden {
				t.Errorf("%s: kind %s", tt.name, err.Kind)
			}
		}
		// Every other way to write a listed address, and its neighbours.
		for _, target := range []string{"", "127.0.0.1", "127.0.0.1:080", "127.0.0.1:81", "127.0.0.2:80", "[::ffff:127.0.0.1]:80", "[::1]:80",
			"2130706433:80", "0x7f.1:80", "0177.0.0.1:80", "127.1:80", "localhost:80", "LOCALHOST:81", "localhost.:81", "[fe80::1%eth0]:80",
			"169.254.169.254:80", "[64:ff9b::7f00:1]:80", "0.0.0.0:80", " 127.0.0.1:80", "127.0.0.1:80 ", "127.0.0.1:80\x00",
			"unix:/run/app/../docker.sock", "unix:/run/app/s/", "unix:run/app/s", "unix:/run/app"} {
			c, err := n.connect(t.Context(), gent.ID(), tunnel.Request{Kind: tunnel.Sealed, Exposure: k(site), Target: target})
			if err == nil {
				c.Close()
			}
			if webgw.KindOf(err) != webgw.Forbidden {
				t.Errorf("%q: %v", target, err)
			}
		}
		if len(spy.dialed) != 0 {
			t.Errorf("dialed %q", spy.dialed)
		}
	})
}

func TestAddressesAreJudgedAtTheDial(t *testing.T) {
	prefixes := func(list ...string) (out []netip.Prefix) {
		for _, s := range list {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	everything := prefixes("0.0.0.0/0", "::/0")
	for _, tt := range []struct {
		address string // of the exposure's target, or what its name resolves to
		allow   []netip.Prefix
		ok      bool
	}{
		{"127.0.0.1", nil, true}, {"127.9.9.9", nil, true}, {"::1", nil, true},
		{"10.0.0.1", nil, false}, {"192.168.1.1", nil, false}, {"100.64.0.1", nil, false}, {"192.0.0.1", nil, false},
		{"169.254.169.254", nil, false}, {"fd00::1", nil, false}, {"fe80::1", nil, false},
		{"64:ff9b::7f00:1", nil, false}, {"2002:7f00:1::", nil, false}, {"8.8.8.8", nil, false},
		{"10.0.0.1", prefixes("10.0.0.0/24"), true}, {"10.0.1.1", prefixes("10.0.0.0/24"), false},
		{"127.0.0.1", prefixes("10.0.0.0/24"), false},
		{"10.0.0.1", everything, true}, {"fd00::1", everything, true}, {"8.8.8.8", everything, true},
		{"169.254.169.254", everything, false}, {"64:ff9b::a9fe:a9fe", everything, false}, {"2002:a9fe:a9fe::", everything, false},
		{"fe80::1", everything, false}, {"fd00:ec2::254", everything, false},
		{"169.254.169.254", prefixes("169.254.169.254/32"), true},
	} {
		for _, name := range []string{"", "app.internal"} {
			synctest.Test(t, func(t *testing.T) {
				ip := netip.MustParseAddr(tt.address)
				target := netip.AddrPortFrom(ip, 80).String()
				if name != "" {
					target = name + ":80"
				}
				site := exposure(t, owner, "site", webgw.HTTP, time.Hour, target)
				n, spy, w := rig(t, Policy{Targets: tt.allow}, site)
				w.Name("app.internal", ip)
				_, err := n.connect(t.Context(), gent.ID(), tunnel.Request{Kind: tunnel.Sealed, Exposure: site.Record.Key(), Target: target})
				want := webgw.Forbidden
				if tt.ok {
					want = webgw.Unavailable // allowed, but nobody is there
				}
				if got := webgw.KindOf(err); got != want || (len(spy.dialed) > 0) != tt.ok {
					t.Errorf("%s (%s) with %v: %v, dialed %q", tt.address, target, tt.allow, err, spy.dialed)
				}
			})
		}
	}
	// Forms that a record can't hold, but a resolver may come up with.
	n, _, _ := rig(t, Policy{})
	for _, a := range []string{"[::ffff:10.0.0.1]:80", "[fe80::1%eth0]:80", "0.0.0.0:80", "[::]:80", "[::ffff:0.0.0.0]:80", "224.0.0.1:80", "junk", "app:80", ""} {
		if err := n.control("tcp", a); webgw.KindOf(err) != webgw.Forbidden {
			t.Errorf("control lets %q pass: %v", a, err)
		}
	}
	if err := n.control("tcp6", "[::ffff:127.0.0.1]:80"); err != nil {
		t.Errorf("the loopback, mapped: %v", err)
	}
}

// A name that leads elsewhere at the second look-up is judged anew.
func TestNamesThatChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		site := exposure(t, owner, "site", webgw.HTTP, time.Hour, "app.internal:80")
		n, _, w := rig(t, Policy{}, site)
		l, err := n.Net.Listen(t.Context(), "tcp", "127.0.0.1:80")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		r := tunnel.Request{Kind: tunnel.Sealed, Exposure: site.Record.Key(), Target: "app.internal:80"}
		w.Name("app.internal", netip.MustParseAddr("127.0.0.1"))
		c, err := n.connect(t.Context(), gent.ID(), r)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		w.Name("app.internal", netip.MustParseAddr("169.254.169.254"))
		if _, err := n.connect(t.Context(), gent.ID(), r); webgw.KindOf(err) != webgw.Forbidden {
			t.Errorf("after the change: %v", err)
		}
		// A forbidden address first, an allowed one second: the dial may go on.
		w.Name("app.internal", netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("127.0.0.1"))
		c, err = n.connect(t.Context(), gent.ID(), r)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	})
}

func TestUnixSocketsNeedPermission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		site := exposure(t, owner, "site", webgw.HTTP, time.Hour, "unix:/run/app/s", "unix:/run/app2/s", "unix:/var/run/docker.sock")
		for _, tt := range []struct {
			dirs   []string
			target string
			ok     bool
		}{
			{nil, "unix:/run/app/s", false},
			{[]string{"/run/app"}, "unix:/run/app/s", true},
			{[]string{"/run/app/"}, "unix:/run/app/s", true},
			{[]string{"/run/app"}, "unix:/run/app2/s", false},
			{[]string{"/run/app"}, "unix:/var/run/docker.sock", false},
			{[]string{"/"}, "unix:/var/run/docker.sock", true},
		} {
			n, spy, _ := rig(t, Policy{Unix: tt.dirs}, site)
			l, err := n.Net.Listen(t.Context(), "unix", strings.TrimPrefix(tt.target, "unix:"))
			if err != nil {
				t.Fatal(err)
			}
			c, err := n.connect(t.Context(), gent.ID(), tunnel.Request{Kind: tunnel.Sealed, Exposure: site.Record.Key(), Target: tt.target})
			if (err == nil) != tt.ok || (len(spy.dialed) > 0) != tt.ok {
				t.Errorf("%v %s: %v", tt.dirs, tt.target, err)
			}
			if c != nil {
				c.Close()
			}
			l.Close()
		}
	})
}

// A node for one target leads nowhere else, whatever its owner has signed.
func TestOnlyTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		site := exposure(t, owner, "site", webgw.HTTP, time.Hour, "127.0.0.1:80", "127.0.0.1:81")
		n, spy, _ := rig(t, Policy{Only: []string{"127.0.0.1:80"}}, site)
		for target, want := range map[string]webgw.ErrorKind{"127.0.0.1:80": webgw.Unavailable, "127.0.0.1:81": webgw.Forbidden} {
			_, err := n.connect(t.Context(), gent.ID(), tunnel.Request{Kind: tunnel.Sealed, Exposure: site.Record.Key(), Target: target})
			if webgw.KindOf(err) != want {
				t.Errorf("%s: %v, want %s", target, err, want)
			}
		}
		if len(spy.dialed) != 1 {
			t.Errorf("dialed %q", spy.dialed)
		}
	})
}

// A request that is a moment ahead of the node's own view waits for it.
func TestRequestsMayBeAMomentEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		site := exposure(t, owner, "site", webgw.HTTP, time.Hour, "127.0.0.1:80")
		n, _, _ := rig(t, Policy{})
		l, err := n.Net.Listen(t.Context(), "tcp", "127.0.0.1:80")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			time.Sleep(100 * time.Millisecond)
			n.apply(view(t))
			time.Sleep(100 * time.Millisecond)
			n.apply(view(t, site))
		}()
		r := tunnel.Request{Kind: tunnel.Sealed, Exposure: site.Record.Key(), Target: "127.0.0.1:80"}
		start := time.Now()
		c, err := n.connect(t.Context(), gent.ID(), r)
		if err != nil || time.Since(start) != 200*time.Millisecond {
			t.Fatalf("%v after %v", err, time.Since(start))
		}
		c.Close()
		start = time.Now()
		r.Target = "127.0.0.1:81"
		if _, err := n.connect(t.Context(), gent.ID(), r); webgw.KindOf(err) != webgw.Forbidden || time.Since(start) != settle {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}
