package gateway

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/netx/memnet"
)

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

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestDirectTargetsArePublic(t *testing.T) {
	everything := prefixes("0.0.0.0/0", "::/0")
	for _, tt := range []struct {
		address string
		allow   []netip.Prefix
		ok      bool
	}{
		{"8.8.8.8", nil, true}, {"2606:4700::1", nil, true}, {"64:ff9b::808:808", nil, true},
		{"127.0.0.1", nil, false}, {"::1", nil, false}, {"::ffff:127.0.0.1", nil, false},
		{"169.254.169.254", nil, false}, {"fe80::1%eth0", nil, false}, {"10.0.0.1", nil, false}, {"100.64.0.1", nil, false},
		{"192.0.0.8", nil, false}, {"64:ff9b::7f00:1", nil, false}, {"64:ff9b::a00:1", nil, false}, {"2002:7f00:1::", nil, false},
		{"fd00::1", nil, false}, {"0.0.0.0", nil, false}, {"::", nil, false}, {"224.0.0.1", nil, false}, {"ff02::1", nil, false},
		{"255.255.255.255", nil, false}, {"168.63.129.16", nil, false},
		{"10.0.0.1", prefixes("10.0.0.0/24"), true}, {"10.0.1.1", prefixes("10.0.0.0/24"), false}, {"8.8.8.8", prefixes("10.0.0.0/24"), true},
		{"169.254.169.254", everything, false}, {"64:ff9b::a9fe:a9fe", everything, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := memnet.New(1)
			s := &spy{Host: w.Host("gent")}
			d := direct{s, tt.allow, func() []net.Addr { return nil }, func(uint16) bool { return false }}
			ip := netip.MustParseAddr(tt.address)
			w.Name("target.example", ip)
			for _, target := range []string{netip.AddrPortFrom(ip, 80).String(), "target.example:80"} {
				s.dialed = nil
				_, err := d.dial(t.Context(), "tcp", target)
				want := webgw.Forbidden
				if tt.ok {
					want = webgw.Unavailable // nobody is there
				}
				if webgw.KindOf(err) != want || (len(s.dialed) > 0) != tt.ok {
					t.Errorf("%s with %v: %v, dialed %q", target, tt.allow, err, s.dialed)
				}
			}
		})
	}
}

func TestDirectTargetsAreNeverTheGateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		public := netip.MustParseAddr("8.8.4.4")
		h := w.Host("gent", public, netip.MustParseAddr("2606:4700::44"))
		var own []net.Addr
		for _, at := range []string{":443", "8.8.4.4:80"} {
			l, err := h.Listen(t.Context(), "tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			own = append(own, l.Addr())
		}
		other, err := h.Listen(t.Context(), "tcp", ":9000") // another service of the machine
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		for _, tt := range []struct {
			target string
			allow  []netip.Prefix
			ok     bool
		}{
			{"8.8.4.4:443", nil, false}, {"8.8.4.4:80", nil, false}, {"gent:443", nil, false}, {"[2606:4700::44]:443", nil, false},
			{"8.8.4.4:9000", nil, false}, {"gent:9000", nil, false},
			{"8.8.4.4:9000", prefixes("8.8.4.4/32"), true}, {"8.8.4.4:443", prefixes("8.8.4.4/32"), false},
			{"127.0.0.1:443", prefixes("127.0.0.0/8"), false}, {"127.0.0.1:9000", prefixes("127.0.0.0/8"), true},
		} {
			d := direct{h, tt.allow, func() []net.Addr { return own }, func(port uint16) bool { return port == 443 || port == 80 }}
			c, err := d.dial(t.Context(), "tcp", tt.target)
			if (err == nil) != tt.ok || !tt.ok && webgw.KindOf(err) != webgw.Forbidden {
				t.Errorf("%s with %v: %v", tt.target, tt.allow, err)
			}
			if c != nil {
				c.Close()
			}
		}
	})
}

// Issuers of tokens are judged like direct targets, but may be exposed here.
func TestIssuersAreJudged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		own := netip.MustParseAddr("8.8.4.4")
		s := &spy{Host: w.Host("gent", own)}
		w.Host("id", netip.MustParseAddr("8.8.8.8"))
		d := direct{s, nil, func() []net.Addr { return nil }, func(port uint16) bool { return port == 443 }}
		w.Name("id.example", netip.MustParseAddr("10.0.0.1"))
		for _, h := range []struct {
			host *memnet.Host
			port string
		}{{s.Host, ":443"}, {s.Host, ":9090"}} {
			l, err := h.host.Listen(t.Context(), "tcp", h.port)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}
		for address, ok := range map[string]bool{"8.8.4.4:443": true, "8.8.4.4:9090": false, "id.example:443": false, "127.0.0.1:443": false, "169.254.169.254:443": false} {
			c, err := d.dialIssuer(t.Context(), "tcp", address)
			if (err == nil) != ok {
				t.Error(address, err)
			}
			if c != nil {
				c.Close()
			}
		}
	})
}
