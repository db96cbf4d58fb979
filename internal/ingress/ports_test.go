package ingress

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pires/go-proxyproto"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

// portsBubble is a gateway on a network in memory, and a workload at each of
// ports 7000 to 7003 of a host "work", which says which port it is and what it
// gets.
func portsBubble(t *testing.T, change func(*Server), f func(t *testing.T, w *world, visitor *memnet.Host, work string), table func(work string) []Declared) {
	synctest.Test(t, func(t *testing.T) {
		m := memnet.New(1)
		gateway, visitor, back := m.Host("gateway"), m.Host("visitor"), m.Host("work")
		for port := 7000; port < 7004; port++ {
			l, err := back.Listen(t.Context(), "tcp", ":"+strconv.Itoa(port))
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					go func() {
						defer c.Close()
						fmt.Fprintf(c, "%d:", port)
						io.Copy(c, c)
					}()
				}
			}()
			t.Cleanup(func() { l.Close() })
		}
		w := start(t, func(s *Server) {
			s.Net, s.HTTPAddr, s.TLSAddr, s.BindHost = gateway, ":80", ":443", ""
			if change != nil {
				change(s)
			}
		}, table("work")...)
		f(t, w, visitor, "work")
	})
}

// say sends what to a port of the gateway, ends, and returns what comes back.
func say(t *testing.T, h *memnet.Host, port, what string) string {
	t.Helper()
	c := connect(t, h, port)
	io.WriteString(c, what)
	c.CloseWrite()
	c.SetReadDeadline(time.Now().Add(time.Minute))
	b, _ := io.ReadAll(c) // a reset is an end as well
	return string(b)
}

func TestPortRangesLeadToTheSameOffset(t *testing.T) {
	portsBubble(t, nil, func(t *testing.T, w *world, visitor *memnet.Host, work string) {
		for i := range 4 {
			if got, want := say(t, visitor, strconv.Itoa(6000+i), "x"), fmt.Sprintf("%d:x", 7000+i); got != want {
				t.Errorf("port %d: %q, want %q", 6000+i, got, want)
			}
		}
		synctest.Wait()
		logged := map[string]bool{}
		for _, a := range w.accesses() {
			logged[a.Target.Address] = true
		}
		if len(logged) != 4 || !logged[work+":7003"] {
			t.Errorf("access log: %v", logged)
		}
		for _, port := range []string{"5999", "6004"} {
			if c, err := visitor.Dial(t.Context(), "tcp", "gateway:"+port, nil); err == nil {
				c.Close()
				t.Errorf("port %s is open", port)
			}
		}
		// A range that moves opens and closes what it must.
		d := expose("range", webgw.TCP, nil, work+":7001")
		d.Exposure.Port, d.Exposure.PortEnd = 6002, 6004
		w.use(d)
		if got := say(t, visitor, "6004", "x"); got != "7003:x" {
			t.Errorf("moved: %q", got)
		}
		if n := len(w.Addrs()); n != 2+3 {
			t.Errorf("%d ports are open", n)
		}
	}, func(work string) []Declared {
		d := expose("range", webgw.TCP, nil, work+":7000")
		d.Exposure.Port, d.Exposure.PortEnd = 6000, 6003
		return []Declared{d}
	})
}

func TestUDPRangesLeadToTheSameOffset(t *testing.T) {
	udpBubble(t, Limits{}, func(g *udpGrid) {
		use := func(first, last uint16, target string) {
			d := expose("range", webgw.UDP, nil, target)
			d.Exposure.Port, d.Exposure.PortEnd = first, last
			table, _ := Build([]Declared{d})
			g.server.SetTable(table)
		}
		use(6000, 6002, "a:7000")
		c := g.visitor("203.0.113.1", "198.51.100.1:6002")
		wantAnswer(t, askUDP(g.visitor("203.0.113.2", "198.51.100.1:6000"), "x"), "a:7000 x")
		wantAnswer(t, askUDP(c, "x"), "a:7002 x")
		use(6001, 6002, "a:7000") // the flow, too, leads elsewhere now
		wantAnswer(t, askUDP(c, "x"), "a:7001 x")
	})
}

func TestOnePortSharedByServerName(t *testing.T) {
	balancers := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	portsBubble(t, func(s *Server) { s.TrustedProxies = balancers }, func(t *testing.T, w *world, visitor *memnet.Host, _ string) {
		hello := func(name string) string { return string(helloBytes(t, &tls.Config{ServerName: name})) }
		named := func(name string) string {
			return string(proxyHeader(t, 2, "192.0.2.7:5", "192.0.2.2:8443", proxyproto.TLV{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte(name)}))
		}
		unnamed := string(proxyHeader(t, 2, "192.0.2.7:5", "192.0.2.2:8443"))
		for _, tt := range []struct{ name, say, want string }{
			{"one name", hello("a.example"), "7000:" + hello("a.example")[:5]},
			{"another", hello("B.example"), "7001:"},
			{"by a wildcard", hello("x.w.example"), "7001:"},
			{"a name of the TLS port", hello("main.example"), "\x15\x03"},
			{"nobody's", hello("nobody.example"), "\x15\x03"},
			{"no TLS", "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", "HTTP/1.1 400"},
			{"named by the balancer", named("b.example") + "plain", "7001:plain"},
			{"named by the balancer, not by the hello", named("b.example") + hello("a.example"), "7001:"},
			{"named by the balancer, unknown", named("nobody.example") + "plain", ""},
			{"named nonsense, so by the hello", named("no name!") + hello("a.example"), "7000:"},
			{"behind a header without a name", unnamed + hello("b.example"), "7001:"},
		} {
			if got := say(t, visitor, "8443", tt.say); !strings.HasPrefix(got, tt.want) || tt.want == "" && got != "" {
				t.Errorf("%s: %q", tt.name, got)
			}
		}
		if got := say(t, visitor, "443", hello("a.example")); !strings.HasPrefix(got, "\x15\x03") {
			t.Errorf("a name of the port at the TLS port: %q", got)
		}
		w.use()
		if c, err := visitor.Dial(t.Context(), "tcp", "gateway:8443", nil); err == nil {
			c.Close()
			t.Error("the port stays open")
		}
	}, func(work string) []Declared {
		a := expose("a", webgw.TLS, []string{"a.example"}, work+":7000")
		b := expose("b", webgw.TLS, []string{"b.example", "*.w.example"}, work+":7001")
		a.Exposure.Port, b.Exposure.Port = 8443, 8443
		return []Declared{a, b, expose("main", webgw.TLS, []string{"main.example"}, work+":7002")}
	})
}

// Without trust, a PROXY header names nobody.
func TestAStrangersHeaderNamesNobody(t *testing.T) {
	portsBubble(t, nil, func(t *testing.T, _ *world, visitor *memnet.Host, _ string) {
		header := proxyHeader(t, 2, "192.0.2.7:5", "192.0.2.2:8443", proxyproto.TLV{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte("a.example")})
		if got := say(t, visitor, "8443", string(header)+"plain"); strings.HasPrefix(got, "7000") {
			t.Errorf("believed: %q", got)
		}
	}, func(work string) []Declared {
		a := expose("a", webgw.TLS, []string{"a.example"}, work+":7000")
		a.Exposure.Port = 8443
		return []Declared{a}
	})
}

func TestPortsAreOneExposuresUnlessShared(t *testing.T) {
	on := func(name string, p webgw.ExposureProtocol, first, last uint16) Declared {
		var hosts []string
		if p == webgw.TLS {
			hosts = []string{name + ".example"}
		}
		d := expose(name, p, hosts, "a:1")
		d.Exposure.Port, d.Exposure.PortEnd = first, last
		return d
	}
	table, problems := Build([]Declared{on("a", webgw.TCP, 10, 20), on("b", webgw.TCP, 20, 30), on("c", webgw.UDP, 20, 30), on("d", webgw.TLS, 15, 0),
		on("e", webgw.TLS, 40, 0), on("f", webgw.TLS, 40, 0), on("g", webgw.TCP, 40, 0), on("h", webgw.TCP, 21, 0), on("i", webgw.TCP, 35, 45)})
	var lost []string
	for _, p := range problems {
		lost = append(lost, p.Exposure.Name)
	}
	if got := strings.Join(lost, " "); got != "b d g i" {
		t.Errorf("not in force: %s", got)
	}
	if r, shared := table.Shared(40, "F.example."); !shared || r == nil || r.Key.Name != "f" {
		t.Error("not found by its name")
	}
	if table.Port(20).Key.Name != "a" || table.Port(21).Key.Name != "h" || table.UDP(20).Key.Name != "c" || table.Port(40) != nil || table.TLS("f.example") != nil {
		t.Error("ports lead elsewhere")
	}
}

func TestProblemsNameThePortsOfARange(t *testing.T) {
	portsBubble(t, nil, func(t *testing.T, w *world, _ *memnet.Host, work string) {
		for _, port := range []string{":6001", ":6002", ":6004"} {
			l, err := w.Net.Listen(t.Context(), "tcp", port)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		}
		d := expose("range", webgw.TCP, nil, work+":7000")
		d.Exposure.Port, d.Exposure.PortEnd = 6000, 6005
		w.use(d)
		if p := w.Problems(); len(p) != 1 || p[0].Text != "port 6001-6002,6004 can't be opened on this gateway" {
			t.Errorf("%v", p)
		}
	}, func(string) []Declared { return nil })
}
