package ingress

import (
	"slices"
	"testing"
	"time"

	"webgw.dev/webgw"
)

func TestRoutes(t *testing.T) {
	h := func(name string, hosts ...string) Declared { return expose(name, webgw.HTTP, hosts, "a:1") }
	s := func(name string, hosts ...string) Declared { return expose(name, webgw.TLS, hosts, "a:1") }
	port := expose("port", webgw.TCP, nil, "a:1")
	port.Exposure.Port = 2222
	all := []Declared{
		h("blog", "blog.example"), h("wild", "*.shop.example"), h("exact", "a.shop.example"),
		s("pass", "pass.example"), s("wildpass", "*.shop.example", "*.pass.example"), h("both", "pass.example"), port,
	}
	for range 2 { // whatever the order
		table, problems := Build(all)
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		for _, tt := range []struct{ host, http, tls string }{
			{"blog.example", "blog", "blog"},
			{"BLOG.Example.", "blog", "blog"},
			{"blog.example..", "", ""},
			{"x.blog.example", "", ""},
			{"b.shop.example", "wild", "wildpass"}, // tls before http
			{"a.shop.example", "exact", "exact"},   // exact before wildcard, whatever the protocol
			{"A.SHOP.EXAMPLE", "exact", "exact"},
			{"a.b.shop.example", "", ""},
			{"shop.example", "", ""},
			{".shop.example", "", ""},
			{"*.shop.example", "wild", "wildpass"},
			{"evilblog.example", "", ""},
			{"pass.example", "both", "pass"},
			{"x.pass.example", "", "wildpass"},
			{"\u212alog.example", "", ""},
			{"", "", ""}, {".", "", ""}, {"127.0.0.1", "", ""},
		} {
			name := func(r *Route) string {
				if r == nil {
					return ""
				}
				return r.Key.Name
			}
			if got := name(table.HTTP(tt.host)); got != tt.http {
				t.Errorf("HTTP %q leads to %q, want %q", tt.host, got, tt.http)
			}
			if got := name(table.TLS(tt.host)); got != tt.tls {
				t.Errorf("TLS %q leads to %q, want %q", tt.host, got, tt.tls)
			}
		}
		if table.Port(2222).Key.Name != "port" || table.Port(1) != nil || !table.Terminates("blog.example") || table.Terminates("pass.example") || table.Terminates("x.example") {
			t.Error("port or Terminates")
		}
		slices.Reverse(all)
	}
	var none *Table
	if none.HTTP("a") != nil || none.TLS("a") != nil || none.Port(1) != nil || none.Terminates("a") {
		t.Error("a nil table routes")
	}
}

func TestConflictsGoToTheLowerKey(t *testing.T) {
	port := func(name string) Declared {
		d := expose(name, webgw.TCP, nil, "a:1")
		d.Exposure.Port = 1
		return d
	}
	for _, all := range [][]Declared{
		{web1("a"), expose("b", webgw.HTTP, []string{"a.example", "b.example"}), port("c"), port("d")},
		{port("d"), expose("b", webgw.HTTP, []string{"a.example", "b.example"}), port("c"), web1("a")},
	} {
		table, problems := Build(all)
		if len(problems) != 2 || problems[0].Exposure.Name != "b" || problems[1].Exposure.Name != "d" || problems[0].Code != string(webgw.Taken) {
			t.Error(problems)
		}
		if table.HTTP("a.example").Key.Name != "a" || table.HTTP("b.example").Key.Name != "b" || table.Port(1).Key.Name != "c" {
			t.Error("not the lower key")
		}
	}
	if _, problems := Build([]Declared{expose("x", "smtp", nil, "a:1")}); len(problems) != 1 || problems[0].Code != string(webgw.Unsupported) {
		t.Error(problems)
	}
}

func TestLookupsDoNotAllocate(t *testing.T) {
	table, _ := Build([]Declared{web1("blog", "a:1"), expose("w", webgw.TLS, []string{"*.w.example"}, "a:1")})
	if n := testing.AllocsPerRun(100, func() { table.TLS("blog.example."); table.HTTP("x.w.example") }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestTurnsAndHealth(t *testing.T) {
	table, _ := Build([]Declared{web1("a", "a:1", "b:1", "c:1")})
	r := table.HTTP("a.example")
	now := time.Now()
	order := func(at time.Time) (s string) {
		turn := r.turn()
		for x := turn.pick(at); x != nil; x = turn.pick(at) {
			s += x.Address[:1]
		}
		return s
	}
	if got := order(now) + order(now) + order(now) + order(now); got != "abcbcacababc" {
		t.Error(got)
	}
	r.targets[1].failed(now)
	r.targets[1].failed(now) // of the same moment
	if got := order(now) + order(now) + order(now); got != "cab"+"cab"+"acb" {
		t.Error(got)
	}
	if got := order(now.Add(restMin)); got != "bca" {
		t.Error(got)
	}
	r.targets[1].failed(now.Add(restMin))
	if until := r.targets[1].until.Load(); until != now.Add(3*restMin).UnixNano() {
		t.Error("does not rest longer the second time")
	}
	r.targets[1].worked()

	// What is known of a target outlives the table.
	r.targets[2].failed(now)
	next, _ := Build([]Declared{web1("a", "c:1", "d:1"), web1("b", "b:1")})
	retired := next.adopt(table)
	if len(retired) != 2 || retired[0].Address != "a:1" || retired[1].Address != "b:1" {
		t.Error(retired)
	}
	if n := next.HTTP("a.example"); n.targets[0] != r.targets[2] || n.owner != r.owner || n.owner != next.HTTP("b.example").owner {
		t.Error("not handed on")
	}
	var none *Table
	if retired := none.adopt(next); len(retired) != 3 {
		t.Error(retired)
	}
}
