package registry

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/ident"
)

var (
	gent  = webgw.Key{Kind: webgw.KindGateway, Owner: key(100).ID(), Name: "gent"}
	cairo = webgw.Key{Kind: webgw.KindGateway, Owner: key(101).ID(), Name: "cairo"}
	home1 = webgw.Key{Kind: webgw.KindNode, Owner: key(200).ID(), Name: "home1"}
	blog  = webgw.Key{Kind: webgw.KindExposure, Owner: key(1).ID(), Name: "blog"}
)

func via(r webgw.Record, gateways ...int) webgw.Record {
	x := *r.Exposure
	x.Gateways = nil
	for _, g := range gateways {
		x.Gateways = append(x.Gateways, key(g).ID())
	}
	r.Exposure = &x
	return r
}

func TestWatchTellsWhatConcerns(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		g.site()
		g.declare(key(101), gateway("cairo", ""))
		atGent, atCairo := g.watch(g.as(key(100)), client.ScopeGateway, 0, ""), g.watch(g.as(key(101)), client.ScopeGateway, 0, "")
		atNode, atOwner := g.watch(g.as(key(200)), client.ScopeNode, 0, ""), g.watch(g.as(key(1)), client.ScopeOwner, 0, "")
		stranger := g.watch(g.as(key(2)), client.ScopeOwner, 0, "")
		type told struct {
			who  string
			w    *heard
			k    webgw.Key
			want bool
		}
		check := func(when string, list ...told) {
			t.Helper()
			for _, c := range list {
				if got := c.w.has(c.k) != nil; got != c.want {
					t.Errorf("%s: %s knows %s: %v, want %v", when, c.who, c.k.Name, got, c.want)
				}
			}
		}
		check("at first",
			told{"gent", atGent, gent, true}, told{"gent", atGent, cairo, false}, told{"gent", atGent, home1, false},
			told{"node", atNode, home1, true}, told{"node", atNode, gent, false},
			told{"owner", atOwner, gent, true}, told{"owner", atOwner, cairo, true}, told{"owner", atOwner, home1, true},
			told{"stranger", stranger, gent, true}, told{"stranger", stranger, home1, false})

		// An exposure makes gateway and node each other's concern.
		g.declare(key(1), web("blog", "blog.example"))
		check("exposed by gent",
			told{"gent", atGent, blog, true}, told{"gent", atGent, home1, true},
			told{"cairo", atCairo, blog, false}, told{"cairo", atCairo, home1, false},
			told{"node", atNode, blog, true}, told{"node", atNode, gent, true}, told{"node", atNode, cairo, false},
			told{"owner", atOwner, blog, true}, told{"stranger", stranger, blog, false})

		// It moves: gent, though dropped, hears of it.
		g.declare(key(1), via(web("blog", "blog.example"), 101))
		check("moved to cairo", told{"cairo", atCairo, blog, true}, told{"cairo", atCairo, home1, true}, told{"node", atNode, cairo, true})
		if r := atGent.has(blog); r.Exposure.Gateways[0] != key(101).ID() {
			t.Error("gent, which was dropped, has not heard that it was")
		}
		// And of the withdrawal.
		if _, err := g.as(key(1)).Delete(g.ctx, blog); err != nil {
			t.Fatal(err)
		}
		for _, w := range []*heard{atGent, atCairo, atNode, atOwner} {
			if r := w.has(blog); r == nil || !r.Deleted {
				t.Errorf("not told of the withdrawal: %v", r)
			}
		}
		// A gateway's change reaches the nodes that its exposures lead to.
		g.declare(key(1), web("blog", "blog.example"))
		r := gateway("gent", "gent.example")
		r.Gateway.Addresses = []string{"192.0.2.9:443"}
		g.declare(key(100), r)
		for _, w := range []*heard{atGent, atNode, atOwner, stranger} {
			if r := w.has(gent); r.Gateway.Addresses[0] != "192.0.2.9:443" {
				t.Error("not told of the gateway's new address")
			}
		}
		// A node's change reaches the gateways and owners.
		g.declare(key(200), node("home1"))
		for _, w := range []*heard{atGent, atNode, atOwner} {
			if r := w.has(home1); len(r.Node.Owners) != 0 {
				t.Error("not told that the node carries for nobody any more")
			}
		}
		for _, w := range []*heard{atGent, atCairo, atNode, atOwner, stranger} {
			w.end()
			if w.resets != 1 || !w.synced {
				t.Errorf("%d resets, synced %v", w.resets, w.synced)
			}
		}
	})
}

func TestWatchHeartbeat(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		g.site()
		w := g.watch(g.as(key(100)), client.ScopeGateway, 0, "")
		synctest.Wait()
		before := w.rev
		g.declare(key(5), claimed("else.example", false)) // nobody's concern here
		time.Sleep(heartbeat + time.Second)
		w.end()
		if w.rev <= before || w.lines != 2 {
			t.Errorf("after a heartbeat: revision %d, before %d; %d lines", w.rev, before, w.lines)
		}
	})
}

// Watches that break off again and again while somebody writes, and resume,
// also at another replica, miss nothing.
func TestWatchResumesWithoutGap(t *testing.T) {
	bubble(t, 2, nil, func(g *grid) {
		g.site()
		const n = 60
		written := make(chan struct{})
		c := g.as(key(1))
		go func() {
			defer close(written)
			for i := range n {
				if _, _, err := c.Declare(g.ctx, web(fmt.Sprintf("x%d", i%20), fmt.Sprintf("x%d.example", i%20))); err != nil {
					t.Error(err)
				}
				time.Sleep(10 * time.Millisecond)
			}
		}()
		var rev int64
		var epoch string
		newest := map[webgw.Key]uint64{}
		resets := 0
		for round := range 30 {
			w := g.watch(g.as(key(100), round%2), client.ScopeGateway, rev, epoch)
			time.Sleep(37 * time.Millisecond)
			w.end()
			rev, epoch = max(rev, w.rev), w.epoch
			resets += w.resets
			for k, r := range w.records {
				newest[k] = max(newest[k], r.Seq)
			}
		}
		<-written
		if resets != 1 {
			t.Errorf("%d resets", resets)
		}
		list, err := g.as(key(1)).List(g.ctx, webgw.KindExposure, key(1).ID())
		if err != nil || len(list) != 20 {
			t.Fatalf("%d records, %v", len(list), err)
		}
		for _, s := range list {
			if newest[s.Record.Key()] != s.Record.Seq {
				t.Errorf("%s: told of %d, newest is %d", s.Record.Name, newest[s.Record.Key()], s.Record.Seq)
			}
		}
	})
}

func TestWatchResetsInAnotherHistory(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		g.site()
		for _, c := range []struct {
			since int64
			epoch string
		}{{1, "another"}, {1 << 40, g.replicas[0].mirror.epoch}} {
			w := g.watch(g.as(key(100)), client.ScopeGateway, c.since, c.epoch)
			time.Sleep(aheadTimeout + time.Second)
			w.end()
			if w.resets != 1 || w.records[gent] == nil {
				t.Errorf("since %d of %q: %d resets", c.since, c.epoch, w.resets)
			}
		}
		// The epoch changes under a watch: it ends.
		w := g.watch(g.as(key(100)), client.ScopeGateway, 0, "")
		synctest.Wait()
		g.kv.spoil(keyEpoch, []byte("restored"))
		<-w.done
		wantKind(t, w.err, webgw.Unavailable, "a watch of the former history")
		w.cancel()
	})
}

// A replica that lost the store's history reads all anew; watchers hear what
// has changed, and nothing twice.
func TestMirrorSurvivesCompaction(t *testing.T) {
	bubble(t, 2, nil, func(g *grid) {
		g.site()
		w := g.watch(g.as(key(200), 0), client.ScopeNode, 0, "")
		synctest.Wait()
		g.kv.setFail(errors.New("away"))
		synctest.Wait()
		g.kv.mu.Lock()
		g.kv.fail = nil
		g.kv.mu.Unlock()
		b := &bench{t: t, s: &Server{}, ctx: g.ctx}
		s, err := b.sign(key(200), func() webgw.Record { r := node("home1"); r.Seq = 1 << 50; return r }())
		if err != nil {
			t.Fatal(err)
		}
		v, err := encodeEntry(meta{Keep: s.Record.Expires.Unix()}, s)
		if err != nil {
			t.Fatal(err)
		}
		g.kv.spoil(recordKey(home1), v)
		g.kv.forget()
		time.Sleep(20 * time.Second)
		if r := w.has(home1); r.Seq != 1<<50 {
			t.Error("the change that was compacted away was not told")
		}
		if w.resets != 1 {
			t.Errorf("%d resets", w.resets)
		}
		w.end()
		if _, _, err := g.as(key(1), 0).Declare(g.ctx, claimed("a.example", false)); err != nil {
			t.Error(err)
		}
	})
}

// A watcher that is too slow for the changes is brought up to date from state.
func TestSlowWatcherOverflows(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		g.site()
		w := g.watch(g.as(key(1)), client.ScopeOwner, 0, "")
		synctest.Wait()
		m := g.replicas[0].mirror
		b := &bench{t: t, s: g.replicas[0], ctx: g.ctx}
		s, err := b.sign(key(1), claimed("a.example", false))
		if err != nil {
			t.Fatal(err)
		}
		rev, _, _, _ := m.at()
		var changes []change
		for range maxPending + 5 {
			rev++
			changes = append(changes, change{key: recordKey(s.Record.Key()), mod: rev, entry: &entry{Signed: s, key: s.Record.Key(), mod: rev}})
		}
		m.apply(rev, changes)
		if w.has(s.Record.Key()) == nil || w.rev != rev {
			t.Errorf("at revision %d, want %d", w.rev, rev)
		}
		w.end()
	})
}

func TestWatchesAreBounded(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		c := g.as(key(1))
		var ws []*heard
		for range watchesPerID {
			ws = append(ws, g.watch(c, client.ScopeOwner, 0, ""))
		}
		synctest.Wait()
		w := g.watch(c, client.ScopeOwner, 0, "")
		<-w.done
		wantKind(t, w.err, webgw.Exhausted, "one too many")
		w.cancel()
		other := g.watch(g.as(key(2)), client.ScopeOwner, 0, "")
		synctest.Wait()
		if !other.synced {
			t.Error("another's watch is refused as well")
		}
		for _, w := range append(ws, other) {
			w.end()
		}
		synctest.Wait()
		if n := g.replicas[0].watches.total(); n != 0 {
			t.Errorf("%d watches are counted after all have ended", n)
		}
		m := g.replicas[0].mirror
		m.mu.RLock()
		defer m.mu.RUnlock()
		if len(m.watchers)+len(m.owners) != 0 {
			t.Error("watchers are left in the mirror")
		}
	})
}

// A connection that is cut silently counts as dead after three heartbeats.
func TestWatchNoticesSilence(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		g.site()
		c := g.as(key(100))
		w := g.watch(c, client.ScopeGateway, 0, "")
		synctest.Wait()
		g.world.Isolate(g.hosts[0])
		start := time.Now()
		<-w.done
		if took := time.Since(start); took > 16*time.Second {
			t.Errorf("noticed after %v", took)
		}
		wantKind(t, w.err, webgw.Unavailable, "a silent connection")
		w.cancel()
		g.world.Rejoin(g.hosts[0])
	})
}

// What is long is cut into lines of which only the last may be resumed from.
func TestLongLinesAreCut(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		var owners []webgw.ID
		for i := range 600 {
			owners = append(owners, key(5000+i).ID())
		}
		for i := range 7 {
			g.declare(key(400+i), node(fmt.Sprint("n", i), append([]webgw.ID{key(1).ID()}, owners...)...))
		}
		w := g.watch(g.as(key(1)), client.ScopeOwner, 0, "")
		synctest.Wait()
		w.end()
		if len(w.records) != 7 || w.lines < 2 || w.resets != 1 {
			t.Errorf("%d records in %d lines, %d resets", len(w.records), w.lines, w.resets)
		}
	})
}

func TestStopEndsWatches(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		w := g.watch(g.as(key(100)), client.ScopeGateway, 0, "")
		synctest.Wait()
		start := time.Now()
		g.stop()
		g.done.Wait()
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("the stop took %v", took)
		}
		<-w.done
		w.cancel()
	})
}

func reportOf(role webgw.Kind, rev int64, sessions ...ident.Key) webgw.Status {
	st := webgw.Status{Release: "v1", Protocol: 1, Since: time.Now(), Rev: rev}
	if role == webgw.KindGateway {
		st.Gateway = &webgw.GwStatus{}
		for _, s := range sessions {
			st.Gateway.Sessions = append(st.Gateway.Sessions, s.ID())
		}
		return st
	}
	st.Node = &webgw.NdStatus{}
	for _, s := range sessions {
		st.Node.Sessions = append(st.Node.Sessions, webgw.SessionStatus{Gateway: s.ID(), State: webgw.SessionUp, Since: time.Now()})
	}
	return st
}

func TestStatus(t *testing.T) {
	bubble(t, 2, nil, func(g *grid) {
		g.site()
		g.declare(key(1), web("blog", "blog.example"))
		gw, nd := g.as(key(100), 0), g.as(key(200), 1)
		ask := func(replica int) webgw.ExposureStatus {
			t.Helper()
			synctest.Wait()
			o, err := g.as(key(1), replica).Status(g.ctx)
			if err != nil || len(o.Exposures) != 1 || len(o.Gateways) != 1 || len(o.Nodes) != 1 {
				t.Fatalf("%+v, %v", o, err)
			}
			return o.Exposures[0]
		}
		report := func(c *client.Client, st webgw.Status) {
			t.Helper()
			if err := c.ReportStatus(g.ctx, st); err != nil {
				t.Fatal(err)
			}
		}
		if x := ask(0); x.Up || x.Why != "gateway gent has not reported for 15 seconds or more" {
			t.Errorf("before any report: %+v", x)
		}
		rev, _, _, _ := g.replicas[0].mirror.at()
		start := time.Now()
		full := func() webgw.Status {
			st := reportOf(webgw.KindGateway, rev, key(200))
			st.Since = start
			return st
		}
		report(gw, full())
		for i := range 2 { // told by one replica, known to both
			if x := ask(i); !x.Up || x.Why != "up at gateway gent" {
				t.Errorf("replica %d: %+v", i, x)
			}
		}
		// Reports without news don't touch the store.
		before := g.kv.at()
		for range 6 {
			time.Sleep(5 * time.Second)
			report(gw, full())
		}
		if n := g.kv.at() - before; n != 0 {
			t.Errorf("%d writes without news", n)
		}
		// A session is lost: news.
		st := reportOf(webgw.KindGateway, rev)
		report(gw, st)
		report(nd, reportOf(webgw.KindNode, rev))
		if x := ask(1); x.Up || x.Why != "node home1 has no session with gateway gent" {
			t.Errorf("without session: %+v", x)
		}
		// A new version that the gateway has yet to take in.
		time.Sleep(2 * time.Second)
		report(gw, full())
		g.declare(key(1), web("blog", "blog.example", "more.example"))
		if x := ask(1); x.Up || x.Why != "gateway gent has not taken in the latest version yet" {
			t.Errorf("behind: %+v", x)
		}
		time.Sleep(2 * time.Second)
		rev, _, _, _ = g.replicas[0].mirror.at()
		report(gw, full())
		for i := range 2 {
			if x := ask(i); !x.Up {
				t.Errorf("replica %d, taken in: %+v", i, x)
			}
		}
		// The gateway moves to the other replica; the first doesn't take it down.
		gw = g.as(key(100), 1)
		for range 5 {
			time.Sleep(5 * time.Second)
			report(gw, full())
		}
		for i := range 2 {
			if x := ask(i); !x.Up {
				t.Errorf("replica %d, after a move: %+v", i, x)
			}
		}
		// Silence.
		time.Sleep(17 * time.Second)
		for i := range 2 {
			if x := ask(i); x.Up || x.Why != "gateway gent has not reported for 15 seconds or more" {
				t.Errorf("replica %d, silence: %+v", i, x)
			}
		}
		err := g.as(key(9)).ReportStatus(g.ctx, reportOf(webgw.KindNode, 1))
		wantKind(t, err, webgw.NotFound, "the report of a stranger")
	})
}

// With its replica dies what was reported to it, unless it is reported to
// another within the lease.
func TestStatusOutlivesItsReplica(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKV()
		one, two := newBenchOn(t, k, nil), newBenchOn(t, k, nil)
		one.must(100, gateway("gent", ""))
		one.must(101, gateway("cairo", ""))
		for _, id := range []int{100, 101} {
			if err := one.s.report(one.ctx, key(id).ID(), reportOf(webgw.KindGateway, 1)); err != nil {
				t.Fatal(err)
			}
		}
		// Replica one stops: nobody keeps its lease.
		one.s.reports.mu.Lock()
		k.mu.Lock()
		k.leases[one.s.reports.lease].Reset(livenessTTL)
		k.mu.Unlock()
		one.s.reports.lease, one.s.reports.local = 0, map[webgw.ID]*report{}
		one.s.reports.mu.Unlock()
		for range 5 {
			time.Sleep(5 * time.Second)
			if err := two.s.report(two.ctx, key(100).ID(), reportOf(webgw.KindGateway, 1)); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		two.s.mirror.mu.RLock()
		defer two.s.mirror.mu.RUnlock()
		if two.s.statusOfLocked(key(100).ID()) == nil || two.s.statusOfLocked(key(101).ID()) != nil {
			t.Error("the one that moved should be up, the other down")
		}
	})
}

func TestWords(t *testing.T) {
	fine := targetFacts{name: "home1", declared: true, reports: true, session: true}
	lost := targetFacts{name: "home2", declared: true, reports: true}
	with := func(f targetFacts, set func(*targetFacts)) targetFacts { set(&f); return f }
	way := func(ts ...targetFacts) wayFacts {
		return wayFacts{name: "gent", declared: true, reports: true, targets: ts}
	}
	for _, c := range []struct {
		f   wayFacts
		up  bool
		why string
	}{
		{wayFacts{name: "gent"}, false, "gateway gent has been withdrawn or has expired"},
		{wayFacts{name: "gent", declared: true}, false, "gateway gent has not reported for 15 seconds or more"},
		{wayFacts{name: "gent", declared: true, reports: true, behind: true}, false, "gateway gent has not taken in the latest version yet"},
		{wayFacts{name: "gent", declared: true, reports: true, behind: true, problem: "the port is in use"}, false, "gateway gent: the port is in use"},
		{way(fine), true, "served by gateway gent"},
		{way(targetFacts{direct: true}), true, "served by gateway gent"},
		{way(lost), false, "node home2 has no session with gateway gent"},
		{way(with(lost, func(f *targetFacts) { f.failure = "connection refused" })), false, "node home2 has no session with gateway gent: connection refused"},
		{way(with(lost, func(f *targetFacts) { f.reports = false })), false, "node home2 has not reported for 15 seconds or more"},
		{way(with(fine, func(f *targetFacts) { f.reports = false })), true, "served by gateway gent"},
		{way(with(fine, func(f *targetFacts) { f.problem = "its policy does not allow you" })), false, "node home1: its policy does not allow you"},
		{way(with(fine, func(f *targetFacts) { f.declared = false })), false, "node home1 has been withdrawn or has expired"},
		{way(fine, lost), true, "served by 1 of 2 targets: node home2 has no session with gateway gent"},
	} {
		if up, why := wayWords(c.f); up != c.up || why != c.why {
			t.Errorf("got %v, %q, want %v, %q", up, why, c.up, c.why)
		}
	}
	a, b := webgw.WayStatus{Name: "gent", Up: true}, webgw.WayStatus{Name: "cairo", Up: true}
	down := webgw.WayStatus{Name: "lima", Why: "gateway lima is away"}
	for _, c := range []struct {
		ways []webgw.WayStatus
		up   bool
		why  string
	}{
		{[]webgw.WayStatus{a}, true, "up at gateway gent"},
		{[]webgw.WayStatus{a, b}, true, "up at all 2 gateways"},
		{[]webgw.WayStatus{a, down}, true, "up at 1 of 2 gateways; gateway lima is away"},
		{[]webgw.WayStatus{down}, false, "gateway lima is away"},
	} {
		if up, why := exposureWords(c.ways); up != c.up || why != c.why {
			t.Errorf("got %v, %q, want %v, %q", up, why, c.up, c.why)
		}
	}
	gw, nd := reportOf(webgw.KindGateway, 1, key(1)), reportOf(webgw.KindNode, 1)
	nd.Node.Sessions = []webgw.SessionStatus{{Gateway: key(100).ID(), State: webgw.SessionConnecting, Error: "no route"}}
	for _, c := range []struct {
		st  *webgw.Status
		up  bool
		why string
	}{
		{nil, false, "node home1 has not reported for 15 seconds or more"},
		{&gw, true, "reports 1 session"},
		{&nd, false, "node home1 runs but has no session with any gateway: no route"},
	} {
		if up, why := partyWords(webgw.KindNode, "home1", c.st); up != c.up || why != c.why {
			t.Errorf("got %v, %q, want %v, %q", up, why, c.up, c.why)
		}
	}
}
