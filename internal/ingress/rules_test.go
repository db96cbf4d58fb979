package ingress

import (
	"fmt"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"webgw.dev/webgw"
)

// ruled declares an exposure with rules.
func ruled(d Declared, rules ...webgw.Rule) Declared {
	d.Exposure.Rules = rules
	return d
}

func to(at ...string) (out []webgw.Target) {
	for _, a := range at {
		out = append(out, webgw.Target{Node: webgw.ID{9}, Address: a})
	}
	return out
}

// named answers with its name and what it was asked.
func named(t testing.TB, name string) string {
	return site(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Server", "workload")
		w.Header().Set("X-Kept", "1")
		h := r.Header
		fmt.Fprintf(w, "%s %s %s host=%s asked=%s prefix=%s edits=%s%s%s", name, r.Method, r.RequestURI, r.Host, h.Get("X-Forwarded-Host"), h.Get("X-Forwarded-Prefix"), h["X-Set"], h["X-Add"], h["X-Remove"])
	})
}

func TestRulesChooseTargets(t *testing.T) {
	rest, api, login, post, canary := named(t, "rest"), named(t, "api"), named(t, "login"), named(t, "post"), named(t, "canary")
	d := ruled(web1("a", rest),
		webgw.Rule{Match: webgw.Match{Prefix: "/api"}, Targets: to(api)},
		webgw.Rule{Match: webgw.Match{Prefix: "/api", Headers: map[string]string{"x-env": "canary", "X-Any": ""}}, Targets: to(canary)},
		webgw.Rule{Match: webgw.Match{Prefix: "/api", Method: "POST"}, Targets: to(post)},
		webgw.Rule{Match: webgw.Match{Path: "/api/login"}, Targets: to(login)},
		webgw.Rule{Match: webgw.Match{Prefix: "/api/v2"}, Rewrite: &webgw.Rewrite{Path: "/new", Host: "inner.example"}},
		webgw.Rule{Match: webgw.Match{Prefix: "/strip"}, Rewrite: &webgw.Rewrite{Path: "/"}, Targets: to(api)},
		webgw.Rule{Match: webgw.Match{Path: "/one"}, Rewrite: &webgw.Rewrite{Path: "/ü b"}},
		webgw.Rule{Match: webgw.Match{Prefix: "/caf\u00e9"}, Targets: to(api)},
		webgw.Rule{Match: webgw.Match{Prefix: "/edit"}, Request: &webgw.HeaderEdits{Set: map[string]string{"x-set": "ours"}, Add: map[string]string{"X-Add": "ours"}, Remove: []string{"x-remove"}},
			Response: &webgw.HeaderEdits{Set: map[string]string{"x-new": "1"}, Remove: []string{"Server"}}},
	)
	w := start(t, nil, d)
	only := ruled(web1("only", rest), webgw.Rule{Match: webgw.Match{Prefix: "/api"}, Targets: to(api)})
	only.Exposure.Targets = nil
	w.use(d, only)
	for _, tt := range []struct {
		method, path string
		fields       []string
		want         string
	}{
		{"GET", "/", nil, "rest GET / "},
		{"GET", "/apis", nil, "rest GET /apis "},
		{"GET", "/api", nil, "api GET /api "},
		{"GET", "/api/", nil, "api GET /api/ "},
		{"GET", "/api?x=/../y;z//", nil, "api GET /api?x=/../y;z// "},
		{"GET", "/%61pi/%7Eann", nil, "api GET /%61pi/%7Eann "},
		{"GET", "/caf%C3%A9/x", nil, "api GET /caf%C3%A9/x "},
		{"GET", "/api/login", nil, "login "},
		{"GET", "/api/login/", nil, "api "},
		{"POST", "/api/x", nil, "post "},
		{"POST", "/api/login", nil, "login "},
		{"GET", "/api/x", []string{"X-Env", "canary", "X-Any", "y"}, "canary "},
		{"GET", "/api/x", []string{"X-Env", "canary"}, "api "},
		{"GET", "/api/x", []string{"X-Env", "canary", "X-Env", "canary", "X-Any", "y"}, "api "},
		{"POST", "/api/x", []string{"X-Env", "canary", "X-Any", "y"}, "post "}, // a method before fields
		{"GET", "/api/v2/a%20b?q=%20", nil, "rest GET /new/a%20b?q=%20 host=inner.example asked=a.example prefix=/api/v2"},
		{"GET", "/api/v2", nil, "rest GET /new "},
		{"GET", "/strip", nil, "api GET / "},
		{"GET", "/strip/", nil, "api GET / "},
		{"GET", "/strip/a%2Cb", nil, "api GET /a%2Cb host=a.example asked=a.example prefix=/strip"},
		{"GET", "/one?x", nil, "rest GET /%C3%BC%20b?x host=a.example asked=a.example prefix= "},
		{"GET", "/edit", []string{"X-Set", "theirs", "X-Add", "theirs", "X-Remove", "theirs"}, "rest GET /edit host=a.example asked=a.example prefix= edits=[ours][theirs ours][]"},
		{"GET", "//only.example/none", nil, ""},
	} {
		for _, h2 := range []bool{false, true} {
			u := "https://a.example" + tt.path
			want := 200
			if tt.want == "" {
				u, want = "https:"+tt.path, 404
			}
			status, body, h := fetch(t, w.plain(h2), tt.method, u, "", tt.fields...)
			if status != want || !strings.HasPrefix(body, tt.want) {
				t.Errorf("%s %s: %d %s", tt.method, tt.path, status, body)
			}
			if edited := strings.HasPrefix(tt.path, "/edit"); edited && (h.Get("Server") != "" || h.Get("X-New") != "1" || h.Get("X-Kept") != "1") || !edited && h.Get("X-New") != "" {
				t.Error(h)
			}
		}
	}
	if got := w.raw(w.http, "OPTIONS * HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 200") {
		t.Error(got)
	}
	if got := w.raw(w.http, "GET http://a.example/api/login HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"); !strings.Contains(got, "login GET /api/login") {
		t.Error(got)
	}
	for _, a := range w.accesses() {
		if a.Path == "/api/v2" && a.Exposure != d.Key {
			t.Error(a)
		}
	}
}

func TestRulesByQueryAndRegularExpression(t *testing.T) {
	rest, one, two, three := named(t, "rest"), named(t, "one"), named(t, "two"), named(t, "three")
	q := func(kv ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	w := start(t, nil, ruled(web1("a", rest),
		webgw.Rule{Match: webgw.Match{Query: q("env", "a b")}, Targets: to(one)},
		webgw.Rule{Match: webgw.Match{Query: q("env", "a b", "debug", "")}, Targets: to(two)},
		webgw.Rule{Match: webgw.Match{Regex: `/v[0-9]+/[^/]*\.html`}, Targets: to(two)},
		webgw.Rule{Match: webgw.Match{Regex: `/v[0-9]+/.*`}, Targets: to(three)},
		webgw.Rule{Match: webgw.Match{Prefix: "/v1/much/longer/than/the/others"}, Targets: to(rest)},
		webgw.Rule{Match: webgw.Match{Path: "/v1/exact.html"}, Targets: to(rest)},
		webgw.Rule{Match: webgw.Match{Regex: "/user/(?:ann|bob)"}, Rewrite: &webgw.Rewrite{Path: "/u"}, Targets: to(one)},
		webgw.Rule{Match: webgw.Match{Regex: "/a|/b"}, Targets: to(one)},
	))
	for path, want := range map[string]string{
		"/?env=a+b":                       "one ",
		"/?x&env=a%20b":                   "one ",
		"/?%65nv=a+b":                     "one ",
		"/?env=a":                         "rest ",
		"/?env=a+b&env=c":                 "rest ", // whichever the workload takes
		"/?env=a+b&env=a%20b":             "one ",
		"/?env=a+b&debug":                 "two ", // more parameters
		"/?env=a+b;debug=1":               "rest ",
		"/v1/x?env=a+b":                   "three ", // a path before a query
		"/v1/x.html":                      "two ",   // the longer expression
		"/v1/%78.html":                    "two ",
		"/v22/x/y.html":                   "three ",
		"/v1/much/longer/than/the/others": "three ", // an expression before a prefix
		"/v1/exact.html":                  "rest ",
		"/v/x":                            "rest ",
		"/x/v1/x":                         "rest ", // the whole path
		"/user/ann?q":                     "one GET /u?q ",
		"/user/anna":                      "rest ",
		"/b":                              "one ",
		"/bb":                             "rest ", // of both alternatives
	} {
		if status, body, _ := fetch(t, w.plain(false), "GET", "https://a.example"+path, ""); status != 200 || !strings.HasPrefix(body, want) {
			t.Errorf("%s: %d %s, want %s", path, status, body, want)
		}
	}
	for path, want := range map[string]int{"/v1/../x": 400, "/v1/%2e%2e/x": 400, "/v1//x": 400, "/v1/" + strings.Repeat("x", 2<<10): 414} {
		if got := w.raw(w.http, "GET "+path+" HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"); !strings.HasPrefix(got, fmt.Sprintf("HTTP/1.1 %d ", want)) {
			t.Errorf("%.40s: %.100s, want %d", path, got, want)
		}
	}
}

func TestRulesRedirect(t *testing.T) {
	at := named(t, "rest")
	rule := func(m webgw.Match, r webgw.Redirect) webgw.Rule { return webgw.Rule{Match: m, Redirect: &r} }
	w := start(t, func(s *Server) { s.PublicTLSPort = 8443 }, ruled(web1("a", at),
		rule(webgw.Match{Prefix: "/old"}, webgw.Redirect{Path: "/new", Status: 301}),
		rule(webgw.Match{Prefix: "/top"}, webgw.Redirect{Path: "/"}),
		rule(webgw.Match{Path: "/away"}, webgw.Redirect{Host: "b.example:8080", Path: "/here", Status: 307}),
		rule(webgw.Match{Prefix: "/safe"}, webgw.Redirect{Scheme: "https"}),
		rule(webgw.Match{Method: "DELETE"}, webgw.Redirect{Host: "b.example"}),
	))
	for _, tt := range []struct {
		method, url string
		status      int
		want        string
	}{
		{"GET", "http://a.example/old/x%20y?q=1&r", 301, "/new/x%20y?q=1&r"},
		{"GET", "http://a.example/old", 301, "/new"},
		{"GET", "http://a.example/top/x", 302, "/x"},
		{"GET", "http://a.example/top", 302, "/"},
		{"POST", "http://a.example/away?q", 307, "http://b.example:8080/here?q"},
		{"GET", "http://a.example/safe/x", 302, "https://a.example:8443/safe/x"},
		{"DELETE", "https://a.example/x", 302, "https://b.example/x"},
		{"GET", "http://a.example/olden", 200, ""},
	} {
		status, _, h := fetch(t, w.plain(false), tt.method, tt.url, "")
		if status != tt.status || h.Get("Location") != tt.want {
			t.Errorf("%s: %d %q", tt.url, status, h.Get("Location"))
		}
	}
}

func TestAmbiguousPathsAreRefused(t *testing.T) {
	rest, admin := named(t, "rest"), named(t, "admin")
	rules := []webgw.Rule{{Match: webgw.Match{Prefix: "/admin"}, Targets: to(admin)}, {Match: webgw.Match{Path: "/Both"}, Targets: to(admin)}, {Match: webgw.Match{Prefix: "/both"}, Targets: to(admin)}}
	w := start(t, nil, ruled(web1("a", rest), rules...), web1("none", rest), ruled(web1("fields", rest), webgw.Rule{Match: webgw.Match{Method: "PUT"}, Targets: to(admin)}))
	refused := []string{"//admin", "/x//admin", "/./admin", "/x/../admin", "/x/..", "/%2e/admin", "/x/%2E%2e/admin", "/x/.%2e/admin", "/admin;x", "/;/admin", "/admin%3bx", "/x%2fadmin", "/x%2F..%2Fadmin",
		"/x%5c..%5cadmin", `/x\admin`, "/%252e%252e/admin", "/%25%32%65/admin", "/x%00", "/x%0a", "/%c0%ae/admin", "/%c0%af", "/%ff", "/Admin", "/ADMIN/x", "/%41dmin"}
	passed := []string{"/x/", "/admin/", "/x/.well-known", "/.../x", "/x..y", "/100%25", "/both", "/Both", "/bOTH", "/x/Admin", "/administrator", "/Administrator", "/x=%3d&"}
	for _, p := range refused {
		got := w.raw(w.http, "GET "+p+" HTTP/1.1\r\nHost: a.example\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 400") {
			t.Errorf("%s: %.80s", p, got)
		}
		if strings.ContainsAny(p, "\\") {
			continue
		}
		for _, host := range []string{"none", "fields"} { // nothing looks at paths there
			got := w.raw(w.http, "GET "+p+" HTTP/1.1\r\nHost: "+host+".example\r\nConnection: close\r\n\r\n")
			if !strings.HasPrefix(got, "HTTP/1.1 200") || !strings.Contains(got, "rest GET "+p+" ") {
				t.Errorf("%s: %s: %s", host, p, got)
			}
		}
	}
	for _, p := range passed {
		got := w.raw(w.http, "GET "+p+" HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 200") || !strings.Contains(got, "GET "+p+" ") {
			t.Errorf("%s: %s", p, got)
		}
	}
	if n := refusals1(t, w, reasonPath); n < 20 {
		t.Error(n)
	}
}

// Whatever a workload does to a path that was let through, it comes to the same.
func TestPlainPathsMeanOneThing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		raw := "/" + strings.Join(rapid.SliceOfN(rapid.SampledFrom([]string{"a", "A", "/", ".", "..", "%2e", "%2f", "%5c", "%25", "2e", "%41", ";", "%3b", "\\", "%00", "é", "%c3%a9", "%c0%ae", "%", "~", " "}), 0, 8).Draw(t, "parts"), "")
		plain, ok := plainPath(raw)
		if !ok {
			return
		}
		once, err := url.PathUnescape(raw)
		if err != nil || once != plain {
			t.Fatalf("%q: %q", raw, plain)
		}
		if twice, err := url.PathUnescape(once); err == nil && twice != once {
			t.Fatalf("%q: decoded twice it is %q", raw, twice)
		}
		clean := path.Clean(plain)
		if strings.HasSuffix(plain, "/") && clean != "/" {
			clean += "/"
		}
		if clean != plain || strings.ContainsAny(plain, ";\\") {
			t.Fatalf("%q: %q, cleaned %q", raw, plain, clean)
		}
		if after(raw, 1) != "" {
			if u, err := url.PathUnescape(after(raw, 1)); err != nil || u != after(plain, 1) {
				t.Fatalf("%q: segments of raw and plain differ", raw)
			}
		}
	})
}

// Rules are tried as the Gateway API says, whatever their order in the record.
func TestPrecedence(t *testing.T) {
	want := []webgw.Match{
		{Path: "/a/b"}, {Path: "/a"}, {Prefix: "/a/b", Method: "GET"}, {Prefix: "/a/b"},
		{Prefix: "/a", Method: "GET", Headers: map[string]string{"A": "1"}}, {Prefix: "/a", Method: "GET"}, {Prefix: "/a", Headers: map[string]string{"A": "1", "B": "2"}}, {Prefix: "/a", Headers: map[string]string{"A": "1"}}, {Prefix: "/a"},
		{Method: "GET"}, {Headers: map[string]string{"A": "1"}}, {},
	}
	rapid.Check(t, func(t *rapid.T) {
		var rules []webgw.Rule
		for _, m := range rapid.Permutation(want).Draw(t, "order") {
			rules = append(rules, webgw.Rule{Match: m, Targets: to("x:1")})
		}
		s := newRuleset(&Route{Exposure: &webgw.Exposure{Rules: rules}})
		for i, u := range s.rules {
			if fmt.Sprint(u.Match) != fmt.Sprint(want[i]) {
				t.Fatalf("%d is %+v", i, u.Match)
			}
		}
	})
}

// Targets of rules live on from table to table like others.
func TestRulesKeepTheirTargets(t *testing.T) {
	rest, api := named(t, "rest"), named(t, "api")
	d := func() Declared {
		return ruled(web1("a", rest), webgw.Rule{Match: webgw.Match{Prefix: "/api"}, Targets: to(api)}, webgw.Rule{Match: webgw.Match{Prefix: "/both"}, Targets: to(api, rest)})
	}
	w := start(t, nil, d())
	c := w.client(false)
	get(t, c, "https://a.example/api")
	before := w.Table().HTTP("a.example")
	w.use(under(d(), webgw.Policy{}), web1("b", rest))
	r := w.Table().HTTP("a.example")
	if r == before || len(r.targets) != 2 || !slices.Equal(r.targets, before.targets) {
		t.Fatal("targets are not those of before")
	}
	for _, u := range r.rules.rules {
		if u.route.owner != r.owner || u.route.guard != r.guard || r.guard == nil {
			t.Error("parts are not of the whole")
		}
		for _, own := range u.route.targets {
			if !slices.Contains(r.targets, own) {
				t.Error("a target of its own")
			}
		}
	}
	opens := w.up.opens.Load()
	if _, body, _ := get(t, c, "https://a.example/api"); !strings.HasPrefix(body, "api") {
		t.Error(body)
	}
	if w.up.opens.Load() != opens {
		t.Error("the kept connection was not used")
	}
	w.DropIdle(webgw.ID{9})
	get(t, c, "https://a.example/api")
	if w.up.opens.Load() == opens {
		t.Error("the connection was kept though its node is gone")
	}
	if status, _, _ := get(t, c, "https://a.example/both"); status != 200 {
		t.Error(status)
	}
	if r.owner.active.Load() > 1 || r.guard.active.Load() > 1 {
		t.Error("not counted out")
	}
}

// BenchmarkRules is what 16 rules cost a request.
func BenchmarkRules(b *testing.B) {
	var rules []webgw.Rule
	for i := range 16 {
		rules = append(rules, webgw.Rule{Match: webgw.Match{Prefix: fmt.Sprintf("/service-%d", i)}, Targets: to("x:1")})
	}
	s := newRuleset(&Route{Exposure: &webgw.Exposure{Rules: rules, Targets: to("y:1")}})
	r, err := http.NewRequest("GET", "http://a.example/service-0/some/where", nil)
	if err != nil {
		b.Fatal(err)
	}
	x := &exchange{in: r}
	b.ReportAllocs()
	for b.Loop() {
		x.ruled = nil
		if p := x.choose(s); p != nil {
			b.Fatal(p)
		}
	}
}
