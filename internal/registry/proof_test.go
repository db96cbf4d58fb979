package registry

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

// resolvers are DNS servers in a bubble, which all know the same records unless
// one is told otherwise. Values: "TXT text", "CNAME name", "SERVFAIL", "SILENT".
type resolvers struct {
	mu      sync.Mutex
	records map[string][]string
	lying   map[int]map[string][]string // by resolver, instead of records
	asked   map[string]int
	addrs   []string
}

func (r *resolvers) set(name string, values ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.records[name] = values
}

func (r *resolvers) lie(n int, name string, values ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lying[n] == nil {
		r.lying[n] = map[string][]string{}
	}
	r.lying[n][name] = values
}

func (r *resolvers) answer(n int, w dns.ResponseWriter, q *dns.Msg) {
	r.mu.Lock()
	name := strings.TrimSuffix(strings.ToLower(q.Question[0].Name), ".")
	r.asked[name]++
	values, ok := r.records[name]
	if lie, lies := r.lying[n][name]; lies {
		values, ok = lie, len(lie) > 0
	}
	r.mu.Unlock()
	a := new(dns.Msg).SetReply(q)
	if !ok || len(values) == 0 {
		a.Rcode = dns.RcodeNameError
	}
	for _, v := range values {
		what, text, _ := strings.Cut(v, " ")
		head := dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60}
		switch what {
		case "TXT":
			a.Answer = append(a.Answer, &dns.TXT{Hdr: head, Txt: []string{text[:len(text)/2], text[len(text)/2:]}})
		case "CNAME": // as a resolver answers: with what the alias leads to
			head.Rrtype = dns.TypeCNAME
			target, text, _ := strings.Cut(text, " ")
			a.Answer = append(a.Answer, &dns.CNAME{Hdr: head, Target: dns.Fqdn(target)})
			a.Answer = append(a.Answer, &dns.TXT{Hdr: dns.RR_Header{Name: dns.Fqdn(target), Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60}, Txt: []string{text}})
		case "SERVFAIL":
			a.Rcode = dns.RcodeServerFailure
		case "OTHER":
			a.Question[0].Name = "other.example."
			a.Answer = append(a.Answer, &dns.TXT{Hdr: head, Txt: []string{text}})
		case "SILENT":
			return
		}
	}
	w.WriteMsg(a)
}

// proving runs f in a bubble with a registry that asks three resolvers.
func proving(t *testing.T, set func(*Server), f func(b *bench, r *resolvers)) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolvers{records: map[string][]string{}, lying: map[int]map[string][]string{}, asked: map[string]int{}}
		world := memnet.New(1)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		for n := range 3 {
			addr := netip.AddrFrom4([4]byte{10, 9, 0, byte(n + 1)})
			l, err := world.Host(fmt.Sprint("resolver", n), addr).Listen(ctx, "tcp", ":53")
			if err != nil {
				t.Fatal(err)
			}
			up := make(chan struct{})
			srv := &dns.Server{Listener: l, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) { r.answer(n, w, q) }), NotifyStartedFunc: func() { close(up) }}
			wg.Go(func() {
				if err := srv.ActivateAndServe(); err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			})
			<-up
			wg.Go(func() {
				<-ctx.Done()
				srv.Shutdown()
			})
			r.addrs = append(r.addrs, netip.AddrPortFrom(addr, 53).String())
		}
		host := world.Host("registry", netip.MustParseAddr("10.9.1.1"))
		b := newBenchOn(t, newKV(), func(s *Server) {
			s.Domains = &Domains{Resolvers: r.addrs, Net: host}
			if set != nil {
				set(s)
			}
		})
		f(b, r)
	})
}

func txt(n int) string { return "TXT " + key(n).ID().String() }

func TestDomainsNeedProof(t *testing.T) {
	for _, c := range []struct {
		name    string
		records map[string][]string
		want    webgw.Record // of owner 2
		kind    webgw.ErrorKind
	}{
		{"no proof", nil, web("x", "www.one.org"), webgw.Forbidden},
		{"a proof", map[string][]string{"_webgw.www.one.org": {txt(2)}}, web("x", "www.one.org"), ""},
		{"a proof in capitals", map[string][]string{"_webgw.www.one.org": {"TXT " + strings.ToUpper(key(2).ID().String())}}, web("x", "www.one.org"), ""},
		{"one among others", map[string][]string{"_webgw.www.one.org": {txt(1), "TXT v=spf1", txt(2)}}, web("x", "www.one.org"), ""},
		{"above", map[string][]string{"_webgw.one.org": {txt(2)}}, web("x", "a.b.c.d.e.f.www.one.org"), ""},
		{"between", map[string][]string{"_webgw.b.one.org": {txt(2)}}, web("x", "a.b.one.org"), ""},
		{"beside", map[string][]string{"_webgw.b.one.org": {txt(2)}}, web("x", "a.c.one.org"), webgw.Forbidden},
		{"below", map[string][]string{"_webgw.www.one.org": {txt(2)}}, web("x", "one.org"), webgw.Forbidden},
		{"ending alike", map[string][]string{"_webgw.one.org": {txt(2)}}, web("x", "www.evilone.org"), webgw.Forbidden},
		{"at a top-level domain", map[string][]string{"_webgw.org": {txt(2)}}, web("x", "www.one.org"), webgw.Forbidden},
		{"at a public suffix", map[string][]string{"_webgw.co.uk": {txt(2)}}, web("x", "www.one.co.uk"), webgw.Forbidden},
		{"at a host of users", map[string][]string{"_webgw.github.io": {txt(2)}}, web("x", "one.github.io"), webgw.Forbidden},
		{"another's", map[string][]string{"_webgw.one.org": {txt(1)}}, web("x", "www.one.org"), webgw.Forbidden},
		{"with something behind", map[string][]string{"_webgw.one.org": {txt(2) + "x"}}, web("x", "www.one.org"), webgw.Forbidden},
		{"by a CNAME", map[string][]string{"_webgw.one.org": {"CNAME mine.gent.example " + key(2).ID().String()}}, web("x", "www.one.org"), webgw.Forbidden},
		{"at the name itself", map[string][]string{"www.one.org": {txt(2)}}, web("x", "www.one.org"), webgw.Forbidden},
		{"an answer to something else", map[string][]string{"_webgw.www.one.org": {"OTHER " + key(2).ID().String()}}, web("x", "www.one.org"), webgw.Forbidden},
		{"a wildcard, proved below only", map[string][]string{"_webgw.a.one.org": {txt(2)}}, web("x", "*.one.org"), webgw.Forbidden},
		{"a wildcard", map[string][]string{"_webgw.one.org": {txt(2)}}, web("x", "*.one.org"), ""},
		{"two names, one proved", map[string][]string{"_webgw.one.org": {txt(2)}}, web("x", "www.one.org", "www.two.org"), webgw.Forbidden},
		{"a claim", nil, claimed("one.org", true), webgw.Forbidden},
		{"DNS records", nil, dnsZone("one.org"), webgw.Forbidden},
		{"a name in a gateway's zone", nil, web("x", "blog.gent.example"), ""},
		{"a name in the grid's zone", nil, web("x", "blog.grid.example"), ""},
		{"a gateway's zone", nil, gateway("x", "bank.org"), webgw.Forbidden},
		{"a gateway's zone, proved", map[string][]string{"_webgw.gw.one.org": {txt(2)}}, gateway("x", "gw.one.org"), ""},
		{"a gateway's zone in the grid's", nil, gateway("x", "gw.grid.example"), ""},
		{"a farmer who has not listed the gateway", map[string][]string{"_webgw.one.org": {txt(300)}}, func() webgw.Record {
			r := gateway("x", "gw.one.org")
			r.Gateway.Farmer = key(300).ID()
			return r
		}(), webgw.Forbidden},
		{"a farmer who has", map[string][]string{"_webgw.one.org": {txt(301)}}, func() webgw.Record {
			r := gateway("x", "gw.one.org")
			r.Gateway.Farmer = key(301).ID()
			return r
		}(), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			proving(t, func(s *Server) { s.Zone = "grid.example" }, func(b *bench, r *resolvers) {
				r.set("_webgw.gent.example", txt(100))
				b.must(100, gateway("gent", "gent.example"))
				b.must(200, node("home1"))
				b.must(301, webgw.Record{Kind: webgw.KindFarm, Name: "farm", Farm: &webgw.Farm{Gateways: []webgw.ID{key(2).ID()}}})
				for name, values := range c.records {
					r.set(name, values...)
				}
				wantKind(t, b.declare(2, c.want), c.kind, "declare")
			})
		})
	}
}

// One resolver of three proves nothing, whatever it says, nor hinders.
func TestResolversMustAgree(t *testing.T) {
	proving(t, nil, func(b *bench, r *resolvers) {
		b.must(100, gateway("gent", ""))
		b.must(200, node("home1"))
		r.lie(0, "_webgw.one.org", txt(2))
		wantKind(t, b.declare(2, web("x", "www.one.org")), webgw.Forbidden, "one resolver of three lies")
		r.set("_webgw.two.org", txt(2))
		for i, fault := range []string{"SERVFAIL", "SILENT", "TXT something else"} {
			r.lie(1, "_webgw.two.org", fault)
			wantKind(t, b.declare(2, web(fmt.Sprint("x", i), fmt.Sprintf("www%d.two.org", i))), "", "one resolver says "+fault)
		}
		r.lie(2, "_webgw.three.org", txt(2))
		r.set("_webgw.three.org", "SILENT")
		start := time.Now()
		wantKind(t, b.declare(2, web("y", "www.three.org")), webgw.Forbidden, "two resolvers are silent")
		if took := time.Since(start); took > 2*lookupTimeout {
			t.Errorf("silent resolvers took %v", took)
		}
	})
}

// A lost proof is told in time, counts on within the grace, and then whoever
// has a proof takes the name; a proof that comes back is as before.
func TestLostProof(t *testing.T) {
	proving(t, func(s *Server) {
		s.Domains.Every, s.Domains.Grace = time.Hour, 3*time.Hour
	}, func(b *bench, r *resolvers) {
		b.must(100, gateway("gent", ""))
		b.must(200, node("home1"))
		r.set("_webgw.one.org", txt(1))
		b.must(1, web("a", "www.one.org"))
		warnings := func() []string {
			synctest.Wait()
			return b.s.overview(key(1).ID(), time.Now()).Exposures[0].Warnings
		}
		time.Sleep(90 * time.Minute)
		if w := warnings(); w != nil {
			t.Errorf("warned of a proof that is there: %q", w)
		}
		// Resolvers that fail take nothing from anybody.
		r.set("_webgw.one.org", "SERVFAIL")
		time.Sleep(10 * time.Hour)
		if w := warnings(); w != nil {
			t.Errorf("warned by resolvers that fail: %q", w)
		}
		b.must(1, web("a", "www.one.org"))

		// Sold: another's proof is there now.
		r.set("_webgw.one.org", txt(2))
		time.Sleep(70 * time.Minute)
		w := warnings()
		if len(w) != 1 || !strings.Contains(w[0], "_webgw.one.org, which proves www.one.org, is missing since") {
			t.Errorf("the owner is not warned: %q", w)
		}
		b.must(1, web("a", "www.one.org"))
		wantKind(t, b.declare(2, web("b", "www.one.org")), webgw.Taken, "the new owner, within the grace")
		// Back in time.
		r.set("_webgw.one.org", txt(1), txt(2))
		time.Sleep(15 * time.Minute)
		if w := warnings(); w != nil {
			t.Errorf("warned of a proof that is back: %q", w)
		}
		time.Sleep(4 * time.Hour)
		wantKind(t, b.declare(2, web("b", "www.one.org")), webgw.Taken, "two proofs, and the name is held")
		// Gone for good.
		r.set("_webgw.one.org", txt(2))
		time.Sleep(4*time.Hour + 20*time.Minute)
		if w := warnings(); len(w) != 1 || !strings.Contains(w[0], "not proved") {
			t.Errorf("after the grace: %q", w)
		}
		wantKind(t, b.declare(3, web("c", "www.one.org")), webgw.Forbidden, "a stranger without proof, after the grace")
		wantKind(t, b.declare(1, web("a", "www.one.org")), webgw.Forbidden, "a renewal without proof, after the grace")
		wantKind(t, b.declare(2, web("b", "www.one.org")), "", "the new owner, after the grace")
		r.set("_webgw.one.org", txt(1), txt(2))
		wantKind(t, b.declare(1, web("a", "www.one.org")), webgw.Taken, "the former owner with a proof, too late")
	})
}

// Proofs that nothing needs any more are forgotten, the others looked at
// seldom; a proof survives a restart of the registry without a question.
func TestProofsAreKept(t *testing.T) {
	proving(t, nil, func(b *bench, r *resolvers) {
		b.must(100, gateway("gent", ""))
		b.must(200, node("home1"))
		r.set("_webgw.one.org", txt(1))
		b.must(1, web("a", "www.one.org"))
		for i := range 20 {
			b.must(1, web(fmt.Sprint("b", i), fmt.Sprintf("n%d.one.org", i)))
		}
		if n := r.asked["_webgw.one.org"]; n != 3 {
			t.Errorf("the resolvers were asked %d times for 21 names", n)
		}
		again := newBenchOn(b.t, b.kv, func(s *Server) { s.Domains = b.s.Domains })
		again.seq = 1000
		again.must(1, web("c", "c.one.org"))
		if n := r.asked["_webgw.one.org"]; n != 3 {
			t.Errorf("asked %d times after a restart", n)
		}
		for _, name := range append([]string{"a", "c"}, func() (l []string) {
			for i := range 20 {
				l = append(l, fmt.Sprint("b", i))
			}
			return l
		}()...) {
			x := web(name, "one.org")
			x.Deleted = true
			if err := again.declare(1, x); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(DefaultProofEvery + time.Hour)
		synctest.Wait()
		b.s.mirror.mu.RLock()
		defer b.s.mirror.mu.RUnlock()
		if len(b.s.mirror.proofs) != 0 {
			t.Errorf("%d proofs are kept for nothing", len(b.s.mirror.proofs))
		}
	})
}

// Two with proofs want one name at two replicas: one gets it.
func TestProofRace(t *testing.T) {
	proving(t, nil, func(b *bench, r *resolvers) {
		other := newBenchOn(b.t, b.kv, func(s *Server) { s.Domains = b.s.Domains })
		other.seq = 1 << 20
		b.must(100, gateway("gent", ""))
		b.must(200, node("home1"))
		synctest.Wait()
		for i := range 20 {
			host := fmt.Sprintf("n%d.one.org", i)
			r.set("_webgw.one.org", txt(1), txt(2))
			var wg sync.WaitGroup
			errs := make([]error, 2)
			wg.Go(func() { errs[0] = b.declare(1, web(fmt.Sprint("x", i), host)) })
			wg.Go(func() { errs[1] = other.declare(2, web(fmt.Sprint("x", i), host)) })
			wg.Wait()
			if n := slices.Index(errs, nil); n < 0 || webgw.KindOf(errs[1-n]) != webgw.Taken {
				t.Fatalf("round %d: %v", i, errs)
			}
		}
	})
}

func TestLookupsAreLimited(t *testing.T) {
	proving(t, nil, func(b *bench, r *resolvers) {
		b.must(100, gateway("gent", ""))
		b.must(200, node("home1"))
		for i := range 10 * lookupRate.Burst {
			err := b.declare(2, web("x", fmt.Sprintf("n%d.one.org", i)))
			if webgw.KindOf(err) == webgw.Exhausted {
				r.set("_webgw.one.org", txt(1))
				wantKind(t, b.declare(1, web("x", "www.one.org")), "", "another owner")
				return
			}
			wantKind(t, err, webgw.Forbidden, "without proof")
		}
		t.Error("one identity makes the registry ask without end")
	})
}

func TestProofDomains(t *testing.T) {
	for host, want := range map[string]string{
		"one.org":                 "one.org",
		"*.one.org":               "one.org",
		"www.one.org":             "www.one.org one.org",
		"a.b.one.co.uk":           "a.b.one.co.uk b.one.co.uk one.co.uk",
		"co.uk":                   "co.uk",
		"me.github.io":            "me.github.io",
		"a.b.c.d.e.f.g.h.one.org": "a.b.c.d.e.f.g.h.one.org f.g.h.one.org g.h.one.org h.one.org one.org",
		"blog.example.test":       "blog.example.test example.test",
	} {
		if got := strings.Join(proofDomains(host), " "); got != want {
			t.Errorf("%s: %q, want %q", host, got, want)
		}
	}
}

// The gateway that embeds the registry is its operator's.
func TestOperatorNeedsNoProof(t *testing.T) {
	proving(t, func(s *Server) { s.Operator = key(100).ID() }, func(b *bench, _ *resolvers) {
		b.must(100, gateway("gent", "gent.example"))
		wantKind(t, b.declare(2, web2("x", 100, "blog.gent.example")), "", "a name in its zone")
		wantKind(t, b.declare(2, gateway("x", "gent.example")), webgw.Forbidden, "its zone for a stranger")
	})
}
