package registry

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/store/memkv"
)

// Spellings by which one name could be had twice, or another be passed for it.
func TestSpellings(t *testing.T) {
	b := newBench(t)
	b.must(100, gateway("gent", "gent.example"))
	b.must(200, node("home1"))
	b.must(1, web("a", "blog.gent.example"))
	long := strings.Repeat("a.", 123) + "example" // 253 characters
	for host, want := range map[string]webgw.ErrorKind{
		"BLOG.gent.example":                       webgw.Invalid,
		"blog.gent.example.":                      webgw.Invalid,
		"blog.gent.example..":                     webgw.Invalid,
		"blog..gent.example":                      webgw.Invalid,
		".blog.gent.example":                      webgw.Invalid,
		"blog.gent.example\x00":                   webgw.Invalid,
		"blog\x00.gent.example":                   webgw.Invalid,
		"blog.gent.example\n":                     webgw.Invalid,
		" blog.gent.example":                      webgw.Invalid,
		"blog\\.gent.example":                     webgw.Invalid,
		"blog.gent.example:443":                   webgw.Invalid,
		"bl\u043eg.gent.example":                  webgw.Invalid, // not ASCII at all
		"xn--blg-hmc.gent.example":                webgw.Invalid, // the same as A-label: mixed scripts
		"xn--80ak6aa92e.gent.example":             webgw.Invalid, // аррӏе
		"xn--a.gent.example":                      webgw.Invalid,
		"XN--BCHER-KVA.gent.example":              webgw.Invalid,
		"xn--bcher-kva.gent.example":              "",
		"_acme-challenge.gent.example":            webgw.Invalid,
		"_webgw.gent.example":                     webgw.Invalid,
		"*.*.example":                             webgw.Invalid,
		"a*.gent.example":                         webgw.Invalid,
		"*":                                       webgw.Invalid,
		"*.example":                               webgw.Invalid, // a wildcard over one label
		"example":                                 webgw.Invalid,
		"127.0.0.1":                               webgw.Invalid,
		"1.2.3.4.0x7f":                            webgw.Invalid,
		strings.Repeat("a", 64) + ".gent.example": webgw.Invalid,
		strings.Repeat("a", 63) + ".gent.example": "",
		long:                        "",
		"a" + long:                  webgw.Invalid, // 254
		"blog.gent.example":         webgw.Taken,
		"*.blog.gent.example":       webgw.Taken,
		"x.blog.gent.example":       webgw.Taken,
		"evilgent.example":          "",
		"admin.evilgent.example":    "",
		"gent.example.evil.example": "",
	} {
		err := b.declare(2, web(fmt.Sprintf("x%x", len(host)), host))
		wantKind(t, err, want, fmt.Sprintf("%.60q", host))
		if err == nil {
			if err := b.withdraw(2, web(fmt.Sprintf("x%x", len(host)), host)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Names in the grid's zone, which no gateway holds.
func TestGridZone(t *testing.T) {
	for _, c := range []struct {
		name string
		want webgw.Record
		kind webgw.ErrorKind
	}{
		{"a free name", web("x", "wiki.grid.example"), ""},
		{"another's name", web("x", "blog.grid.example"), webgw.Taken},
		{"below another's name", web("x", "login.blog.grid.example"), webgw.Taken},
		{"the apex", web("x", "grid.example"), webgw.Taken},
		{"the apex by a claim", claimed("grid.example", true), webgw.Taken},
		{"the apex by a gateway", gateway("x", "grid.example"), webgw.Taken},
		{"a wildcard over the zone", web("x", "*.grid.example"), webgw.Taken},
		{"a wildcard over the apex", web("x", "*.example.test"), ""},
		{"a wildcard below", web("x", "*.me.grid.example"), ""},
		{"a subtree above", claimed("up.example", true), ""},
		{"a reserved label", web("x", "ns3.grid.example"), webgw.Taken},
		{"below a reserved label", web("x", "a.www.grid.example"), webgw.Taken},
		{"a reserved label further down", web("x", "www.me.grid.example"), ""},
		{"a gateway's zone in it", gateway("x", "cairo.grid.example"), ""},
		{"a gateway's zone on a name", gateway("x", "blog.grid.example"), webgw.Taken},
		{"a name that only ends alike", web("x", "ns1.evilgrid.example"), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBenchOn(t, memkv.New(), func(s *Server) { s.Zone = "grid.example" })
			b.must(100, gateway("gent", ""))
			b.must(200, node("home1"))
			b.must(1, web("a", "blog.grid.example"))
			wantKind(t, b.declare(2, c.want), c.kind, "declare")
		})
	}
	b := newBenchOn(t, memkv.New(), func(s *Server) { s.Zone = "shared.grid.example" })
	b.must(100, gateway("gent", ""))
	b.must(200, node("home1"))
	for what, r := range map[string]webgw.Record{
		"a wildcard over the apex": web("x", "*.grid.example"),
		"a subtree over it":        claimed("grid.example", true),
		"a gateway's zone over it": gateway("x", "grid.example"),
	} {
		wantKind(t, b.declare(2, r), webgw.Taken, what)
	}
	wantKind(t, b.declare(2, claimed("grid.example", false)), "", "the name above, alone")
}

func offer(host string, to int) webgw.Record {
	r := claimed(host, false)
	r.NameClaim.To = key(to).ID()
	return r
}

func TestTransfer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBenchOn(t, newKV(), func(s *Server) { s.Grace = time.Hour })
		b.must(100, gateway("gent", "gent.example"))
		const host = "blog.gent.example"
		site := func() webgw.Record { return web2("site", 100, host) }
		b.must(1, site())
		wantKind(t, b.declare(1, offer(host, 1)), webgw.Invalid, "an offer to oneself")
		b.must(1, offer(host, 2))
		wantKind(t, b.declare(2, site()), webgw.Taken, "while the old owner's exposure is there")
		if err := b.withdraw(1, site()); err != nil {
			t.Fatal(err)
		}
		wantKind(t, b.declare(3, site()), webgw.Taken, "somebody whom the offer does not name")
		wantKind(t, b.declare(3, offer(host, 2)), webgw.Taken, "an offer by somebody else")
		b.must(1, claimed(host, false))
		wantKind(t, b.declare(2, site()), webgw.Taken, "an offer taken back")
		b.must(1, offer(host, 2))
		b.must(2, site())
		wantKind(t, b.declare(1, site()), webgw.Taken, "the old owner, after it")
		wantKind(t, b.declare(1, claimed(host, false)), webgw.Taken, "the old owner's claim, after it")
		wantKind(t, b.withdraw(1, claimed(host, false)), "", "a withdrawal by the old owner")
		wantKind(t, b.declare(3, site()), webgw.Taken, "somebody else, after the withdrawal")
		b.must(2, site())
		if err := b.withdraw(2, site()); err != nil {
			t.Fatal(err)
		}
		wantKind(t, b.declare(1, site()), webgw.Taken, "the old owner, within the new one's grace")
		b.must(2, claimed(host, true))

		// An offer that has expired is none; the grace is the old owner's.
		b.must(4, offer("next.gent.example", 5))
		time.Sleep(lifetime + webgw.MaxSkew + time.Minute)
		b.must(100, gateway("gent", "gent.example"))
		wantKind(t, b.declare(5, web2("n", 100, "next.gent.example")), webgw.Taken, "an offer that has expired")
	})
}

// The new owner takes the name while the old one takes the offer back, and
// others try, at two replicas: it always has one owner.
func TestTransferRace(t *testing.T) {
	k := memkv.New()
	defer k.Close()
	bs := []*bench{newBenchOn(t, k, nil), newBenchOn(t, k, nil)}
	bs[0].must(100, gateway("gent", "gent.example"))
	sign := func(owner int, r webgw.Record) ident.Signed {
		s, err := bs[0].sign(key(owner), r)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for round := range 40 {
		host := fmt.Sprintf("r%d.gent.example", round)
		first := sign(1, offer(host, 2))
		if err := bs[0].write(first); err != nil {
			t.Fatal(err)
		}
		tries := []ident.Signed{sign(1, web2("back", 100, host)), sign(2, web2(fmt.Sprint("x", round), 100, host)), sign(3, web2("y", 100, host)), sign(2, claimed(host, false))}
		var wg sync.WaitGroup
		var ok [4]atomic.Bool
		for i, s := range tries {
			wg.Go(func() {
				err := bs[(i+round)%2].write(s)
				if err != nil && webgw.KindOf(err) != webgw.Taken {
					t.Errorf("try %d hears %v", i, err)
				}
				ok[i].Store(err == nil)
			})
		}
		wg.Wait()
		old, taken, stranger := ok[0].Load(), ok[1].Load() || ok[3].Load(), ok[2].Load()
		if old == taken || stranger {
			t.Errorf("round %d: the old owner has the name: %t, the new one: %t, a stranger: %t", round, old, taken, stranger)
		}
		if old {
			if err := bs[0].write(sign(1, func() webgw.Record { r := web2("back", 100, host); r.Deleted = true; return r }())); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// The grace outlives the replica that the name was freed at.
func TestGraceSurvivesReplicas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKV()
		grace := func(s *Server) { s.Grace = time.Hour }
		first := newBenchOn(t, k, grace)
		first.must(100, gateway("gent", "gent.example"))
		first.must(1, web2("a", 100, "a.gent.example"))
		if err := first.withdraw(1, web2("a", 100, "a.gent.example")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Minute)
		second := newBenchOn(t, k, grace) // as after a restart
		second.seq = 1000
		wantKind(t, second.declare(2, web2("x", 100, "a.gent.example")), webgw.Taken, "at another replica, within the grace")
		time.Sleep(30*time.Minute + 2*time.Second)
		// Two replicas give it to one of two at the end of the grace.
		won := 0
		for i, b := range []*bench{first, second} {
			err := b.declare(2+i, web2("x", 100, "a.gent.example"))
			if err == nil {
				won++
			} else {
				wantKind(t, err, webgw.Taken, "the later one")
			}
		}
		if won != 1 {
			t.Errorf("%d owners have the name", won)
		}
	})
}
