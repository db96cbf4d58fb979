package registry

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"webgw.dev/webgw"
)

// ports is an exposure of ports of gateway 100; last 0 is a single one.
func ports(name string, p webgw.ExposureProtocol, first, last uint16) webgw.Record {
	r := tcp(name, first, key(100).ID())
	r.Exposure.Protocol, r.Exposure.PortEnd = p, last
	return r
}

// shared is an exposure by server name of a port of gateway 100.
func shared(name string, port uint16, hosts ...string) webgw.Record {
	r := web2(name, 100, hosts...)
	r.Exposure.Protocol, r.Exposure.Port = webgw.TLS, port
	return r
}

func TestPortRangesAndSharedPorts(t *testing.T) {
	for _, c := range []struct {
		name string
		held webgw.Record // of owner 1
		by   int
		want webgw.Record
		says string // "": it may be had
	}{
		{"beside a range", ports("a", webgw.TCP, 2001, 2004), 2, ports("x", webgw.TCP, 2005, 2009), ""},
		{"the same range", ports("a", webgw.TCP, 2001, 2004), 2, ports("x", webgw.TCP, 2001, 2004), "tcp port 2001-2004 is taken on gateway gent"},
		{"the same range of the other protocol", ports("a", webgw.TCP, 2001, 2004), 2, ports("x", webgw.UDP, 2001, 2004), ""},
		{"over the end", ports("a", webgw.TCP, 2001, 2004), 2, ports("x", webgw.TCP, 2003, 2009), "tcp port 2003-2004 is taken"},
		{"over the beginning", ports("a", webgw.UDP, 2003, 2009), 2, ports("x", webgw.UDP, 2001, 2003), "udp port 2003 is taken"},
		{"around", ports("a", webgw.TCP, 2003, 2004), 2, ports("x", webgw.TCP, 2000, 2009), "tcp port 2003-2004 is taken"},
		{"within", ports("a", webgw.TCP, 2000, 2009), 2, ports("x", webgw.TCP, 2003, 0), "tcp port 2003 is taken"},
		{"one's own", ports("a", webgw.TCP, 2000, 2009), 1, ports("x", webgw.TCP, 2003, 0), "tcp port 2003 is taken"},
		{"not all on offer", ports("a", webgw.UDP, 2000, 0), 2, ports("x", webgw.TCP, 2005, 2010), "does not offer port 2005-2010"},
		{"another name on a shared port", shared("a", 2001, "a.x.example"), 2, shared("x", 2001, "b.y.example"), ""},
		{"the same name on a shared port", shared("a", 2001, "a.x.example"), 2, shared("x", 2001, "a.x.example"), "held by another owner"},
		{"the same name on another port", shared("a", 2001, "a.x.example"), 2, shared("x", 2002, "a.x.example"), "held by another owner"},
		{"one's own name on another port", shared("a", 2001, "a.x.example"), 1, shared("x", 2002, "a.x.example"), ""},
		{"one's own name on the same port", shared("a", 2001, "a.x.example"), 1, shared("x", 2001, "a.x.example"), "in your exposure"},
		{"one's own name on the TLS port", shared("a", 2001, "a.x.example"), 1, web2("x", 100, "a.x.example"), ""},
		{"a shared port as a whole", shared("a", 2001, "a.x.example"), 2, ports("x", webgw.TCP, 2001, 0), "tcp port 2001 is taken"},
		{"a shared port in a range", shared("a", 2001, "a.x.example"), 1, ports("x", webgw.TCP, 2000, 2002), "tcp port 2001 is taken"},
		{"sharing a port that is not shared", ports("a", webgw.TCP, 2000, 2002), 2, shared("x", 2001, "b.y.example"), "tcp port 2001 is taken"},
		{"the number of a shared port by UDP", shared("a", 2001, "a.x.example"), 2, ports("x", webgw.UDP, 2001, 0), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			b.must(100, gateway("gent", ""))
			b.must(1, c.held)
			err := b.declare(c.by, c.want)
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Fatalf("declare: %v", err)
			}
			if c.says == "" {
				return
			}
			if err := b.withdraw(1, c.held); err != nil {
				t.Fatal(err)
			}
			if err := b.declare(c.by, c.want); (err == nil) == strings.Contains(c.says, "offer") {
				t.Errorf("after the other was withdrawn: %v", err)
			}
		})
	}
}

// A range that grows, shrinks and moves takes what is free and frees what it
// leaves.
func TestRangesChange(t *testing.T) {
	b := newBench(t)
	b.must(100, gateway("gent", ""))
	b.must(1, ports("a", webgw.TCP, 2003, 0))
	b.must(1, ports("a", webgw.TCP, 2002, 2005))
	wantKind(t, b.declare(2, ports("x", webgw.TCP, 2004, 0)), webgw.Taken, "within what it has grown to")
	b.must(1, ports("a", webgw.TCP, 2005, 2009))
	b.must(2, ports("x", webgw.TCP, 2000, 2004))
	wantKind(t, b.declare(1, ports("a", webgw.TCP, 2004, 2009)), webgw.Taken, "growing into another's")
	b.must(1, shared("a", 2005, "a.example"))
	b.must(2, shared("y", 2005, "b.example"))
	b.must(1, shared("a", 2005, "a.example", "c.example"))
	wantKind(t, b.declare(2, ports("y", webgw.TCP, 2005, 0)), webgw.Taken, "a shared port for oneself")
	b.must(1, shared("a", 2006, "a.example"))
	b.must(2, ports("y", webgw.TCP, 2005, 0))
}

func TestQuotaOfPorts(t *testing.T) {
	b := newBenchOn(t, newKV(), func(s *Server) { s.Quota = Quota{Ports: 6} })
	b.must(100, gateway("gent", ""))
	b.must(1, ports("a", webgw.TCP, 2000, 2003))
	wantKind(t, b.declare(1, ports("b", webgw.UDP, 2000, 2002)), webgw.Exhausted, "a seventh port")
	b.must(1, ports("b", webgw.UDP, 2000, 2001))
	wantKind(t, b.declare(1, shared("c", 2009, "a.example")), webgw.Exhausted, "a seventh, shared")
	b.must(1, ports("a", webgw.TCP, 2000, 2001))
	b.must(1, ports("b", webgw.UDP, 2000, 2003))
	b.must(2, ports("c", webgw.TCP, 2004, 2009)) // nobody else is in its way
}

func TestFreePortsInARow(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		g.declare(key(100), gateway("gent", "")) // 2000-2009
		g.declare(key(1), ports("a", webgw.TCP, 2002, 2004))
		first, err := g.as(key(1)).FreePorts(g.ctx, webgw.TCP, 5, key(100).ID())
		if err != nil || first != 2005 {
			t.Errorf("got %d, %v; five in a row are free from 2005 only", first, err)
		}
		first, err = g.as(key(1)).FreePorts(g.ctx, webgw.TCP, 4, key(100).ID())
		if err != nil || first != 2005 && first != 2006 {
			t.Errorf("got %d, %v", first, err)
		}
		_, err = g.as(key(1)).FreePorts(g.ctx, webgw.TCP, 6, key(100).ID())
		wantKind(t, err, webgw.Exhausted, "six in a row")
		first, err = g.as(key(1)).FreePorts(g.ctx, webgw.UDP, 10, key(100).ID())
		if err != nil || first != 2000 {
			t.Errorf("of UDP: got %d, %v", first, err)
		}
		for _, n := range []int{0, -1, 1001} {
			_, err = g.as(key(1)).FreePorts(g.ctx, webgw.UDP, n, key(100).ID())
			wantKind(t, err, webgw.Invalid, fmt.Sprint(n, " ports"))
		}
	})
}

// No sequence of declarations and withdrawals at two replicas leads to two live
// exposures on one port, unless both share it.
func TestOneExposurePerPort(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		synctest.Test(t, func(t *testing.T) {
			k := newKV()
			bs := []*bench{newBenchOn(t, k, nil), newBenchOn(t, k, nil)}
			bs[0].must(100, gateway("gw", ""))
			for range rapid.IntRange(3, 12).Draw(rt, "steps") {
				b := bs[rapid.IntRange(0, 1).Draw(rt, "replica")]
				owner := rapid.IntRange(1, 3).Draw(rt, "owner")
				name := rapid.SampledFrom([]string{"p", "q"}).Draw(rt, "exposure")
				first := uint16(rapid.IntRange(2000, 2006).Draw(rt, "first"))
				var r webgw.Record
				if rapid.IntRange(0, 2).Draw(rt, "shared") == 0 {
					r = shared(name, first, fmt.Sprintf("%s.o%d.example", name, owner))
				} else if r = ports(name, webgw.TCP, first, first+uint16(rapid.IntRange(0, 3).Draw(rt, "more"))); r.Exposure.PortEnd == first {
					r.Exposure.PortEnd = 0
				}
				r.Expires = time.Now().Add(time.Duration(rapid.IntRange(1, 3).Draw(rt, "life")) * time.Hour)
				r.Seq = uint64(time.Now().UnixMilli())*1000 + bs[0].seq
				bs[0].seq++
				var err error
				switch rapid.IntRange(0, 5).Draw(rt, "act") {
				case 0:
					err = b.withdraw(owner, r)
				case 1:
					time.Sleep(time.Duration(rapid.IntRange(1, 90).Draw(rt, "minutes")) * time.Minute)
				default:
					err = b.declare(owner, r)
				}
				switch webgw.KindOf(err) {
				case "", webgw.Taken, webgw.NotFound, webgw.Stale, webgw.Expired:
				default:
					rt.Fatalf("declare: %v", err)
				}
				for _, b := range bs {
					if err := b.s.mirror.wait(b.ctx, k.at()); err != nil {
						rt.Fatal(err)
					}
				}
				var live []*webgw.Record
				m := bs[0].s.mirror
				m.mu.RLock() // it sweeps and follows meanwhile
				for _, e := range m.byKind[webgw.KindExposure] {
					if e.Record.Live(time.Now()) {
						live = append(live, e.Record)
					}
				}
				m.mu.RUnlock()
				for i, x := range live {
					for _, y := range live[i+1:] {
						a, _ := x.Exposure.Ports()
						b, _ := y.Exposure.Ports()
						if a.Overlaps(b) && !(x.Exposure.SharesPort() && y.Exposure.SharesPort()) {
							rt.Fatalf("%s has %s, %s has %s", x.Key(), a, y.Key(), b)
						}
					}
				}
			}
		})
	})
}
