package registry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/store"
	"webgw.dev/webgw/internal/store/memkv"
)

// Each case is what others hold, what the newcomer (owner 2) wants, and what
// comes of it. Owner 1 holds; gateway 100 has the zone gent.example.
func TestNames(t *testing.T) {
	type who struct {
		owner int
		r     webgw.Record
	}
	for _, c := range []struct {
		name string
		held []who
		want webgw.Record
		kind webgw.ErrorKind
	}{
		{"a free name in a zone", nil, web("x", "blog.gent.example"), ""},
		{"a free name anywhere", nil, web("x", "blog.example"), ""},
		{"the same name", []who{{1, web("a", "blog.gent.example")}}, web("x", "blog.gent.example"), webgw.Taken},
		{"the same name by a claim", []who{{1, web("a", "blog.gent.example")}}, claimed("blog.gent.example", false), webgw.Taken},
		{"the same name against a claim", []who{{1, claimed("blog.gent.example", false)}}, web("x", "blog.gent.example"), webgw.Taken},
		{"a name that only ends alike", []who{{1, claimed("gent2.example", true)}}, web("x", "evilgent2.example"), ""},
		{"a zone that only ends alike", nil, web("x", "admin.evilgent.example"), ""},
		{"the apex of a zone", nil, web("x", "gent.example"), webgw.Taken},
		{"below another's name in a zone", []who{{1, web("a", "blog.gent.example")}}, web("x", "login.blog.gent.example"), webgw.Taken},
		{"a wildcard below another's name in a zone", []who{{1, web("a", "blog.gent.example")}}, web("x", "*.blog.gent.example"), webgw.Taken},
		{"below one's own name in a zone", []who{{2, web("a", "blog.gent.example")}}, web("x", "login.blog.gent.example"), ""},
		{"a wildcard over a zone", nil, web("x", "*.gent.example"), webgw.Taken},
		{"a wildcard below a zone", nil, web("x", "*.me.gent.example"), ""},
		{"a subtree that is a zone's", nil, claimed("gent.example", true), webgw.Taken},
		{"a reserved label", nil, web("x", "ns1.gent.example"), webgw.Taken},
		{"below a reserved label", nil, web("x", "a.admin.gent.example"), webgw.Taken},
		{"a reserved label further down", nil, web("x", "admin.me.gent.example"), ""},
		{"below a subtree", []who{{1, claimed("one.example", true)}}, web("x", "a.one.example"), webgw.Taken},
		{"deep below a subtree", []who{{1, claimed("one.example", true)}}, web("x", "a.b.c.one.example"), webgw.Taken},
		{"a wildcard below a subtree", []who{{1, claimed("one.example", true)}}, web("x", "*.one.example"), webgw.Taken},
		{"below a claim without subtree", []who{{1, claimed("one.example", false)}}, web("x", "a.one.example"), ""},
		{"a subtree over a name", []who{{1, web("a", "a.b.one.example")}}, claimed("one.example", true), webgw.Taken},
		{"a subtree over another's wildcard", []who{{1, web("a", "*.one.example")}}, claimed("one.example", true), webgw.Taken},
		{"a subtree beside", []who{{1, web("a", "a.b.one.example")}}, claimed("two.example", true), ""},
		{"a wildcard over a name", []who{{1, web("a", "a.one.example")}}, web("x", "*.one.example"), webgw.Taken},
		{"a wildcard over two labels", []who{{1, web("a", "a.b.one.example")}}, web("x", "*.one.example"), ""},
		{"a wildcard over its own name", []who{{2, web("a", "a.one.example")}}, web("x", "*.one.example"), ""},
		{"a wildcard beside the apex", []who{{1, web("a", "one.example")}}, web("x", "*.one.example"), ""},
		{"a name under a wildcard", []who{{1, web("a", "*.one.example")}}, web("x", "a.one.example"), webgw.Taken},
		{"two labels under a wildcard", []who{{1, web("a", "*.one.example")}}, web("x", "a.b.one.example"), ""},
		{"a wildcard under a wildcard", []who{{1, web("a", "*.one.example")}}, web("x", "*.a.one.example"), ""},
		{"the same wildcard", []who{{1, web("a", "*.one.example")}}, web("x", "*.one.example"), webgw.Taken},
		{"one's own name twice", []who{{2, web("a", "a.one.example")}}, web("x", "a.one.example"), webgw.Taken},
		{"one's own name by http and tls", []who{{2, web("a", "a.one.example")}}, func() webgw.Record {
			r := web("x", "a.one.example")
			r.Exposure.Protocol = webgw.TLS
			return r
		}(), webgw.Taken},
		{"one's own claim", []who{{2, claimed("a.one.example", true)}}, web("x", "b.a.one.example"), ""},
		{"upper case", nil, web("x", "Blog.example"), webgw.Invalid},
		{"a trailing dot", nil, web("x", "blog.example."), webgw.Invalid},
		{"another zone's name for a gateway", []who{{1, claimed("one.example", false)}}, gateway("x", "one.example"), webgw.Taken},
		{"a zone with another's wildcard", []who{{1, web("a", "*.one.example")}}, gateway("x", "one.example"), webgw.Taken},
		{"a zone over others' names", []who{{1, web("a", "a.one.example")}}, gateway("x", "one.example"), ""},
		{"a gateway's name", nil, gateway("gent", ""), webgw.Taken},
		{"a gateway's name for a node", nil, node("gent"), ""},
		{"a zone that is held", nil, gateway("x", "gent.example"), webgw.Taken},
		{"a port that is free", nil, tcp("x", 2001, key(100).ID()), ""},
		{"a port that is taken", []who{{1, tcp("a", 2001, key(100).ID())}}, tcp("x", 2001, key(100).ID()), webgw.Taken},
		{"one's own port twice", []who{{2, tcp("a", 2001, key(100).ID())}}, tcp("x", 2001, key(100).ID()), webgw.Taken},
		{"a port not on offer", nil, tcp("x", 22, key(100).ID()), webgw.Invalid},
		{"an unknown gateway", nil, tcp("x", 2001, key(101).ID()), webgw.NotFound},
		{"an unknown node", nil, func() webgw.Record {
			r := web("x", "blog.example")
			r.Exposure.Targets[0].Node = key(201).ID()
			return r
		}(), webgw.NotFound},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			b.must(100, gateway("gent", "gent.example"))
			b.must(200, node("home1"))
			for _, h := range c.held {
				b.must(h.owner, h.r)
			}
			wantKind(t, b.declare(2, c.want), c.kind, "declare")
		})
	}
}

// bench is a registry without network: records go straight to write.
type bench struct {
	t   testing.TB
	kv  store.KV
	s   *Server
	seq uint64
	ctx context.Context
}

func newBench(t testing.TB) *bench { return newBenchOn(t, memkv.New(), nil) }

func newBenchOn(t testing.TB, k store.KV, set func(*Server)) *bench {
	ctx, cancel := context.WithCancel(context.Background())
	b := &bench{t: t, kv: k, s: &Server{Key: key(1000), Store: k, Grace: -1}, ctx: ctx}
	if set != nil {
		set(b.s)
	}
	done := make(chan struct{})
	go func() { defer close(done); b.s.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	if err := b.s.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) sign(k ident.Key, r webgw.Record) (ident.Signed, error) {
	r.Version = 1
	if r.Seq == 0 {
		b.seq++
		r.Seq = b.seq
	}
	if r.Issued.IsZero() {
		r.Issued = time.Now()
	}
	if r.Expires.IsZero() {
		r.Expires = r.Issued.Add(lifetime)
	}
	return k.Sign(r)
}

func (b *bench) write(s ident.Signed) error {
	_, err := b.s.write(b.ctx, s.Record.Owner, s.Record.Key(), s.Envelope(), s.Record.Deleted)
	return err
}

func (b *bench) declare(owner int, r webgw.Record) error {
	s, err := b.sign(key(owner), r)
	if err != nil {
		return err
	}
	return b.write(s)
}

func (b *bench) withdraw(owner int, r webgw.Record) error {
	r.Deleted = true
	return b.declare(owner, r)
}

func (b *bench) must(owner int, r webgw.Record) {
	b.t.Helper()
	if err := b.declare(owner, r); err != nil {
		b.t.Fatalf("declare %s: %v", r.Name, err)
	}
}

func TestPortErrorNamesTheGateway(t *testing.T) {
	b := newBench(t)
	b.must(100, gateway("gent", ""))
	b.must(101, gateway("cairo", ""))
	b.must(1, tcp("a", 2001, key(101).ID()))
	err := b.declare(2, tcp("x", 2001, key(100).ID(), key(101).ID()))
	e, ok := errors.AsType[*webgw.Error](err)
	if !ok || !strings.Contains(e.Public, "cairo") || strings.Contains(e.Public, "gent") {
		t.Errorf("got %v", err)
	}
	err = b.declare(2, tcp("x", 3001, key(100).ID()))
	if e, ok = errors.AsType[*webgw.Error](err); !ok || e.Field != "exposure.gateways[0]" {
		t.Errorf("got %v", err)
	}
}

func TestZoneIsSharedWithinAFarmOnly(t *testing.T) {
	b := newBench(t)
	farmer := key(300).ID()
	in := func(name string) webgw.Record {
		r := gateway(name, "grid.example")
		r.Gateway.Farmer = farmer
		return r
	}
	b.must(100, in("gent"))
	wantKind(t, b.declare(101, in("cairo")), webgw.Taken, "a gateway that only says it is the farmer's")
	b.must(300, webgw.Record{Kind: webgw.KindFarm, Name: "farm", Farm: &webgw.Farm{Gateways: []webgw.ID{key(101).ID()}}})
	wantKind(t, b.declare(101, in("cairo")), "", "a gateway that the farm lists")
	wantKind(t, b.declare(102, in("third")), webgw.Taken, "one that it does not")
	// The first one leaves; the zone stays with the other.
	wantKind(t, b.withdraw(100, in("gent")), "", "withdraw")
	wantKind(t, b.declare(102, gateway("third", "grid.example")), webgw.Taken, "a stranger")
	wantKind(t, b.declare(101, web2("apex", 101, "grid.example")), "", "the apex for a gateway of the zone")
}

func web2(name string, gw int, hosts ...string) webgw.Record {
	r := web(name, hosts...)
	r.Exposure.Gateways = []webgw.ID{key(gw).ID()}
	r.Exposure.Targets = []webgw.Target{{Direct: "198.51.100.1:80"}}
	return r
}

func TestFreedNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBenchOn(t, newKV(), func(s *Server) { s.Grace = time.Hour })
		b.must(100, gateway("gent", "gent.example"))
		x := func(name, host string) webgw.Record { return web2(name, 100, host) }
		b.must(1, x("a", "a.gent.example"))
		if err := b.withdraw(1, x("a", "a.gent.example")); err != nil {
			t.Fatal(err)
		}
		wantKind(t, b.declare(2, x("x", "a.gent.example")), webgw.Taken, "another, within the grace")
		wantKind(t, b.declare(2, x("x", "*.gent.example")), webgw.Taken, "a wildcard over it")
		b.must(1, x("b", "a.gent.example")) // its own again
		if err := b.withdraw(1, x("b", "a.gent.example")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour + 2*time.Second)
		wantKind(t, b.declare(2, x("x", "a.gent.example")), "", "another, after the grace")
		wantKind(t, b.declare(1, x("c", "a.gent.example")), webgw.Taken, "the former owner, then")

		// The same by expiry.
		b.must(1, x("d", "d.gent.example"))
		time.Sleep(lifetime + webgw.MaxSkew + time.Minute)
		b.must(100, gateway("gent", "gent.example"))
		wantKind(t, b.declare(2, x("y", "d.gent.example")), webgw.Taken, "another, within the grace after an expiry")
		time.Sleep(time.Hour)
		wantKind(t, b.declare(2, x("y", "d.gent.example")), "", "another, after it")
		wantKind(t, b.declare(1, x("d", "d.gent.example")), webgw.Taken, "a renewal that comes too late")
	})
}

func TestOldRecordsAreRefused(t *testing.T) {
	b := newBench(t)
	b.must(100, gateway("gent", "gent.example"))
	old, err := b.sign(key(1), web2("a", 100, "old.gent.example"))
	if err != nil {
		t.Fatal(err)
	}
	if err := b.write(old); err != nil {
		t.Fatal(err)
	}
	wantKind(t, b.write(old), "", "the same bytes again")
	b.must(1, web2("a", 100, "new.gent.example"))
	wantKind(t, b.write(old), webgw.Stale, "an older version")
	if err := b.withdraw(1, web2("a", 100, "new.gent.example")); err != nil {
		t.Fatal(err)
	}
	wantKind(t, b.write(old), webgw.Stale, "an older version after the withdrawal")
	e, _ := errors.AsType[*webgw.Error](b.write(old))
	if e == nil || e.Hint != fmt.Sprintf("the known sequence is %d", b.seq) {
		t.Errorf("the hint does not tell the sequence: %v", e)
	}
}

// A short-lived withdrawal must not open the door for the long-lived version
// that it withdrew.
func TestWithdrawalIsKeptAsLongAsWhatItWithdraws(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.must(100, gateway("gent", "gent.example"))
		r := web2("a", 100, "a.gent.example")
		r.Expires = time.Now().Add(30 * lifetime)
		long, err := b.sign(key(1), r)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.write(long); err != nil {
			t.Fatal(err)
		}
		if err := b.withdraw(1, web2("a", 100, "a.gent.example")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * lifetime)
		b.must(100, gateway("gent", "gent.example"))
		wantKind(t, b.write(long), webgw.Stale, "the withdrawn version")
		time.Sleep(28 * lifetime)
		rev, _, _, _ := b.s.mirror.at()
		if err := b.s.mirror.wait(b.ctx, rev); err != nil {
			t.Fatal(err)
		}
		b.s.mirror.mu.RLock()
		n := len(b.s.mirror.records)
		b.s.mirror.mu.RUnlock()
		if n != 0 {
			t.Errorf("%d records are kept after everything has expired", n)
		}
		wantKind(t, b.write(long), webgw.Expired, "the withdrawn version, expired itself")
	})
}

// What has ended leaves nothing behind in the store but the epoch.
func TestSweepLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.must(100, gateway("gent", "gent.example"))
		b.must(200, node("home1"))
		b.must(1, web("a", "a.gent.example", "*.b.example"))
		b.must(1, tcp("t", 2001, key(100).ID()))
		b.must(2, claimed("c.example", true))
		if err := b.withdraw(2, claimed("c.example", true)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2*lifetime + janitorEvery)
		synctest.Wait()
		items, _, err := b.kv.List(b.ctx, "", "", 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, it := range items {
			if it.Key != keyEpoch {
				t.Errorf("%s is left", it.Key)
			}
		}
		b.s.mirror.mu.RLock()
		defer b.s.mirror.mu.RUnlock()
		if n := len(b.s.mirror.kids) + len(b.s.mirror.holdings) + len(b.s.mirror.guards); n != 0 {
			t.Errorf("the mirror keeps %d names", n)
		}
	})
}

func TestQuota(t *testing.T) {
	b := newBenchOn(t, newKV(), func(s *Server) { s.Quota = Quota{Records: 3, Names: 4} })
	b.must(100, gateway("gent", "gent.example"))
	b.must(1, web2("a", 100, "a.example", "b.example", "c.example"))
	wantKind(t, b.declare(1, web2("b", 100, "d.example", "e.example")), webgw.Exhausted, "a fifth name")
	b.must(1, web2("b", 100, "d.example"))
	b.must(1, tcp("c", 2001, key(100).ID()))
	wantKind(t, b.declare(1, tcp("d", 2002, key(100).ID())), webgw.Exhausted, "a fourth record")
	b.must(1, web2("a", 100, "a.example")) // a new version is not one more
	if err := b.withdraw(1, tcp("c", 2001, key(100).ID())); err != nil {
		t.Fatal(err)
	}
	b.must(1, tcp("d", 2002, key(100).ID()))
	b.must(2, web2("a", 100, "z.example")) // nobody else is in its way
	for i := range 2 * storedFactor * 3 {
		name := fmt.Sprint("n", i)
		if err := b.withdraw(1, tcp("d", 2002, key(100).ID())); err != nil {
			t.Fatal(err)
		}
		if err := b.declare(1, tcp(name, 2003, key(100).ID())); webgw.KindOf(err) == webgw.Exhausted {
			return
		} else if err != nil {
			t.Fatal(err)
		}
		if err := b.withdraw(1, tcp(name, 2003, key(100).ID())); err != nil {
			t.Fatal(err)
		}
	}
	t.Error("withdrawn records may be piled up without end")
}

func TestAdmission(t *testing.T) {
	allowed := map[webgw.ID]bool{key(1).ID(): true, key(3).ID(): true}
	b := newBenchOn(t, newKV(), func(s *Server) {
		s.Admit = func(id webgw.ID) error {
			if !allowed[id] {
				return errors.New("not on the list")
			}
			return nil
		}
	})
	b.must(1, claimed("a.example", false))
	wantKind(t, b.declare(2, claimed("b.example", false)), webgw.Forbidden, "an owner who is not admitted")
	s, err := b.sign(key(1), claimed("c.example", false))
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.s.write(b.ctx, key(2).ID(), s.Record.Key(), s.Envelope(), false)
	wantKind(t, err, webgw.Forbidden, "a bearer who is not admitted")
	_, err = b.s.write(b.ctx, key(3).ID(), s.Record.Key(), s.Envelope(), false)
	wantKind(t, err, "", "a bearer who is")
	delete(allowed, key(1).ID())
	wantKind(t, b.declare(1, claimed("a.example", true)), webgw.Forbidden, "an owner no longer admitted")
	wantKind(t, b.withdraw(1, claimed("a.example", false)), "", "a withdrawal by the same")
}

// A hundred owners want one name, at two replicas: one gets it.
func TestRaceHasOneWinner(t *testing.T) {
	k := memkv.New()
	defer k.Close()
	bs := []*bench{newBenchOn(t, k, nil), newBenchOn(t, k, nil)}
	bs[0].must(100, gateway("gent", "gent.example"))
	rev, _, _, _ := bs[0].s.mirror.at()
	if err := bs[1].s.mirror.wait(bs[1].ctx, rev); err != nil {
		t.Fatal(err)
	}
	want := []string{"a.gent.example", "*.one.example", "x.one.example"}
	var wins [3]atomic.Int32
	var wg sync.WaitGroup
	for i := range 100 {
		// Whoever wants the wildcard is in the way of whoever wants the name.
		s, err := bs[0].sign(key(i+1), web2("x", 100, want[i%3]))
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			err := bs[i%2].write(s)
			if err == nil {
				wins[i%3].Add(1)
			} else if webgw.KindOf(err) != webgw.Taken {
				t.Errorf("a loser hears %v", err)
			}
		})
	}
	wg.Wait()
	if a, wild, below := wins[0].Load(), wins[1].Load(), wins[2].Load(); a != 1 || wild+below != 1 {
		t.Errorf("%d owners have the name, %d the wildcard, %d the name below it", a, wild, below)
	}
}

// What comes in between a decision and its transaction, at another replica,
// counts: the second of two claims that bear on each other loses, whichever
// two keys they are under.
func TestWhatComesInBetweenCounts(t *testing.T) {
	for _, c := range []struct {
		name          string
		first, second webgw.Record // by owners 1 and 2
	}{
		{"the same name", web2("a", 100, "a.x.example"), web2("b", 100, "a.x.example")},
		{"a wildcard, then a name", web2("a", 100, "*.x.example"), web2("b", 100, "a.x.example")},
		{"a name, then a wildcard", web2("a", 100, "a.x.example"), web2("b", 100, "*.x.example")},
		{"a subtree, then a name", claimed("x.example", true), web2("b", 100, "a.b.c.x.example")},
		{"a name, then a subtree", web2("a", 100, "a.b.c.x.example"), claimed("x.example", true)},
		{"a zone, then a wildcard", gateway("g", "x.example"), web2("b", 100, "*.x.example")},
		{"a zone, then a reserved label", gateway("g", "x.example"), web2("b", 100, "ns.x.example")},
		{"a wildcard, then a zone", web2("a", 100, "*.x.example"), gateway("g", "x.example")},
		{"a gateway's name", gateway("g", ""), gateway("g", "")},
		{"a port", tcp("a", 2001, key(100).ID()), tcp("b", 2001, key(100).ID())},
		{"a range, then a port in it", ports("a", webgw.TCP, 2001, 2005), ports("b", webgw.TCP, 2003, 0)},
		{"a port, then a range over it", ports("a", webgw.UDP, 2003, 0), ports("b", webgw.UDP, 2001, 2005)},
		{"a range, then one that overlaps", ports("a", webgw.TCP, 2001, 2005), ports("b", webgw.TCP, 2005, 2009)},
		{"a shared port, then the whole port", shared("a", 2001, "a.x.example"), ports("b", webgw.TCP, 2001, 0)},
		{"a port, then a shared one", ports("a", webgw.TCP, 2000, 2001), shared("b", 2001, "b.x.example")},
		{"a name on a shared port", shared("a", 2001, "a.x.example"), shared("b", 2001, "a.x.example")},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := newKV()
			one, two := newBenchOn(t, k, nil), newBenchOn(t, k, nil)
			one.must(100, gateway("gent", ""))
			if err := two.s.mirror.wait(two.ctx, k.at()); err != nil {
				t.Fatal(err)
			}
			first, err := one.sign(key(1), c.first)
			if err != nil {
				t.Fatal(err)
			}
			k.mu.Lock()
			k.before = func() {
				if err := one.write(first); err != nil {
					t.Error(err)
				}
			}
			k.mu.Unlock()
			wantKind(t, two.declare(2, c.second), webgw.Taken, "the second")
		})
	}
}

// No sequence of declarations, withdrawals and waiting, at two replicas, leads
// to two owners whose live names bear on each other.
func TestOneOwnerPerName(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		synctest.Test(t, func(t *testing.T) {
			k := newKV()
			grace := rapid.SampledFrom([]time.Duration{-1, time.Hour}).Draw(rt, "grace")
			set := func(s *Server) { s.Grace = grace }
			bs := []*bench{newBenchOn(t, k, set), newBenchOn(t, k, set)}
			bs[0].must(100, gateway("gw", ""))
			labels := []string{"a", "b", "*"}
			for range rapid.IntRange(3, 9).Draw(rt, "steps") {
				b := bs[rapid.IntRange(0, 1).Draw(rt, "replica")]
				owner := rapid.IntRange(1, 3).Draw(rt, "owner")
				host := "x.example"
				for range rapid.IntRange(0, 2).Draw(rt, "depth") {
					if host[0] != '*' {
						host = rapid.SampledFrom(labels).Draw(rt, "label") + "." + host
					}
				}
				var r webgw.Record
				if host[0] != '*' && rapid.Bool().Draw(rt, "claim") {
					r = claimed(host, rapid.Bool().Draw(rt, "subtree"))
				} else {
					r = web2(rapid.SampledFrom([]string{"p", "q"}).Draw(rt, "exposure"), 100, host)
				}
				// Lives differ, so that some are past while others count.
				r.Expires = time.Now().Add(time.Duration(rapid.IntRange(1, 5).Draw(rt, "life")) * time.Hour)
				r.Seq = uint64(time.Now().UnixMilli())*1000 + bs[0].seq
				bs[0].seq++
				var err error
				switch rapid.IntRange(0, 4).Draw(rt, "act") {
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
					if msg := clash(b.s.mirror, time.Now()); msg != "" {
						rt.Fatal(msg)
					}
				}
			}
		})
	})
}

// clash looks at the live records themselves, not at the index, for two owners
// whose names bear on each other.
func clash(m *mirror, now time.Time) string {
	m.mu.RLock()
	defer m.mu.RUnlock()
	type held struct {
		owner   webgw.ID
		host    string
		subtree bool
		on      uint16
		by      webgw.Key
	}
	var all []held
	for k, e := range m.records {
		if e.Record.Live(now) {
			for _, c := range claims(e.Record) {
				if c.host != "" {
					all = append(all, held{k.Owner, c.host, c.subtree, c.on, k})
				}
			}
		}
	}
	for i, a := range all {
		for _, b := range all[i+1:] {
			if a.owner == b.owner {
				if a.host == b.host && a.on == b.on && a.by.Kind == webgw.KindExposure && b.by.Kind == webgw.KindExposure {
					return fmt.Sprintf("%s and %s hold %s", a.by, b.by, a.host)
				}
				continue
			}
			for _, p := range [][2]held{{a, b}, {b, a}} {
				x, y := p[0], p[1]
				covers := x.host == y.host || x.subtree && webgw.Under(y.host, x.host) ||
					x.host[0] == '*' && y.host[0] != '*' && above(y.host) == x.host[2:]
				if covers {
					return fmt.Sprintf("%s holds %s and %s holds %s", x.by, x.host, y.by, y.host)
				}
			}
		}
	}
	return ""
}

func TestDomain(t *testing.T) {
	for host, want := range map[string]string{
		"localhost": "localhost", "gent.example": "gent.example", "a.gent.example": "gent.example", "*.a.gent.example": "gent.example",
	} {
		if got := domain(host); got != want {
			t.Errorf("domain(%q) = %q, want %q", host, got, want)
		}
	}
	if got := labelBelow("a.ns1.gent.example", "gent.example"); got != "ns1" {
		t.Errorf("got %q", got)
	}
	for _, l := range []string{"ns", "ns0", "ns9", "ns10", "mx", "mx1", "admin", "webgw", "www", "acme-challenge", key(1).ID().String()} {
		if !reserved(l) {
			t.Errorf("%s is not reserved", l)
		}
	}
	for _, l := range []string{"nsa", "www2", "n", "", "mxa"} {
		if reserved(l) {
			t.Errorf("%s is reserved", l)
		}
	}
}

// Whoever was named once hears of every later version until what it may hold
// has expired.
func TestAudience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.must(100, gateway("gent", ""))
		b.must(101, gateway("cairo", ""))
		named := func() (ids []int) {
			b.s.mirror.mu.RLock()
			defer b.s.mirror.mu.RUnlock()
			for id := range b.s.mirror.records[webgw.Key{Kind: webgw.KindExposure, Owner: key(1).ID(), Name: "x"}].meta.Audience {
				for n := range 200 {
					if key(n).ID() == id {
						ids = append(ids, n)
					}
				}
			}
			slices.Sort(ids)
			return ids
		}
		b.must(1, web2("x", 100, "x.example"))
		b.must(1, web2("x", 101, "x.example"))
		if got := named(); !slices.Equal(got, []int{100, 101}) {
			t.Errorf("after a move: %v", got)
		}
		time.Sleep(lifetime / 2)
		b.must(100, gateway("gent", ""))
		b.must(101, gateway("cairo", ""))
		b.must(1, web2("x", 101, "x.example"))
		time.Sleep(lifetime/2 + webgw.MaxSkew + time.Minute)
		b.must(1, web2("x", 101, "x.example"))
		if got := named(); !slices.Equal(got, []int{101}) {
			t.Errorf("after what gateway 100 had has expired: %v", got)
		}
	})
}
