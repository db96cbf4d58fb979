package webgw

import (
	"slices"
	"strings"
	"testing"
)

func TestRules(t *testing.T) {
	target := Target{Node: ID{3}, Address: "localhost:2"}
	rule := func(m Match) Rule { return Rule{Match: m, Targets: []Target{target}} }
	edit := func(h HeaderEdits) Rule { return Rule{Request: &h} }
	redirect := func(m Match, d Redirect) Rule { return Rule{Match: m, Redirect: &d} }
	for _, tt := range []struct {
		name, field string // "" is valid
		rules       []Rule
	}{
		{"all", "", []Rule{
			{Match: Match{Prefix: "/a", Method: "GET", Headers: map[string]string{"X-A": "1", "x-b": ""}}, Targets: []Target{target}, Rewrite: &Rewrite{Path: "/", Host: "inner.example:80"},
				Request: &HeaderEdits{Set: map[string]string{"A": ""}, Add: map[string]string{"B": "1"}, Remove: []string{"C"}}, Response: &HeaderEdits{Remove: []string{"Server"}}},
			redirect(Match{Path: "/b/"}, Redirect{Scheme: "https", Host: "[2001:db8::1]:8443", Path: "/c", Status: 308})}},
		{"any request", "", []Rule{rule(Match{})}},
		{"letters", "", []Rule{rule(Match{Path: "/é~!$&'()*+,=:@-._"})}},
		{"too many", "rules", make([]Rule, 65)},
		{"path and prefix", "rules[0].match.prefix", []Rule{rule(Match{Path: "/a", Prefix: "/a"})}},
		{"regular expression", "", []Rule{rule(Match{Regex: `/v[0-9]+/(a|b)\.html`}), rule(Match{Regex: "(?i)/x.*"})}},
		{"query", "", []Rule{rule(Match{Query: map[string]string{"env": "a b", "debug": ""}})}},
		{"regex and prefix", "rules[0].match.regex", []Rule{rule(Match{Regex: "/a", Prefix: "/a"})}},
		{"bad regex", "rules[0].match.regex", []Rule{rule(Match{Regex: "/a("})}},
		{"two halves of a regex", "rules[0].match.regex", []Rule{rule(Match{Regex: "a)(b"})}},
		{"backreference", "rules[0].match.regex", []Rule{rule(Match{Regex: `(a)\1`})}},
		{"long regex", "rules[0].match.regex", []Rule{rule(Match{Regex: "/" + strings.Repeat("a", 512)})}},
		{"costly regex", "rules[0].match.regex", []Rule{rule(Match{Regex: "/[a-z]{900}[0-9]{200}"})}},
		{"costly together", "rules[1].match.regex", []Rule{rule(Match{Regex: "/[a-z]{700}"}), rule(Match{Regex: "/[0-9]{700}"})}},
		{"nameless query", "rules[0].match.query", []Rule{rule(Match{Query: map[string]string{"": "a"}})}},
		{"control in query", "rules[0].match.query", []Rule{rule(Match{Query: map[string]string{"a": "\n"}})}},
		{"same query", "rules[1].match", []Rule{rule(Match{Query: map[string]string{"a": "1", "b": "2"}}), rule(Match{Query: map[string]string{"b": "2", "a": "1"}})}},
		{"no slash", "rules[0].match.path", []Rule{rule(Match{Path: "a"})}},
		{"slash behind", "rules[0].match.prefix", []Rule{rule(Match{Prefix: "/a/"})}},
		{"encoded", "rules[0].match.path", []Rule{rule(Match{Path: "/%61"})}},
		{"query", "rules[0].match.path", []Rule{rule(Match{Path: "/a?b"})}},
		{"semicolon", "rules[0].match.prefix", []Rule{rule(Match{Prefix: "/a;b"})}},
		{"double slash", "rules[0].match.prefix", []Rule{rule(Match{Prefix: "//a"})}},
		{"dots", "rules[0].match.path", []Rule{rule(Match{Path: "/a/../b"})}},
		{"control", "rules[0].match.path", []Rule{rule(Match{Path: "/a\n"})}},
		{"lower-case method", "rules[0].match.method", []Rule{rule(Match{Method: "get"})}},
		{"CONNECT", "rules[0].match.method", []Rule{rule(Match{Method: "CONNECT"})}},
		{"no field", "rules[0].match.headers", []Rule{rule(Match{Headers: map[string]string{"a b": ""}})}},
		{"field twice", "rules[0].match.headers", []Rule{rule(Match{Headers: map[string]string{"A": "", "a": ""}})}},
		{"line break", "rules[0].match.headers", []Rule{rule(Match{Headers: map[string]string{"A": "b\r\nC: d"}})}},
		{"same", "rules[1].match", []Rule{rule(Match{Headers: map[string]string{"A": "1"}}), rule(Match{Prefix: "/", Headers: map[string]string{"a": "1"}})}},
		{"bad target", "rules[0].targets[0].address", []Rule{{Targets: []Target{{Node: ID{1}, Address: "x"}}}}},
		{"target twice", "rules[0].targets[1]", []Rule{{Targets: []Target{target, target}}}},
		{"redirect with targets", "rules[0].redirect", []Rule{{Targets: []Target{target}, Redirect: &Redirect{Host: "a.example"}}}},
		{"redirect nowhere", "rules[0].redirect", []Rule{redirect(Match{}, Redirect{Status: 301})}},
		{"redirect path of nothing", "rules[0].redirect.path", []Rule{redirect(Match{Method: "GET"}, Redirect{Path: "/a"})}},
		{"redirect to another host by path", "rules[0].redirect.path", []Rule{redirect(Match{Path: "/a"}, Redirect{Path: "//evil.example"})}},
		{"redirect 200", "rules[0].redirect.status", []Rule{redirect(Match{Path: "/a"}, Redirect{Path: "/", Status: 200})}},
		{"redirect ftp", "rules[0].redirect.scheme", []Rule{redirect(Match{Path: "/a"}, Redirect{Scheme: "ftp"})}},
		{"redirect to a path as host", "rules[0].redirect.host", []Rule{redirect(Match{Path: "/a"}, Redirect{Host: "a.example/b"})}},
		{"empty rewrite", "rules[0].rewrite", []Rule{{Rewrite: &Rewrite{}}}},
		{"rewrite of nothing", "rules[0].rewrite.path", []Rule{{Rewrite: &Rewrite{Path: "/a"}}}},
		{"rewrite host", "rules[0].rewrite.host", []Rule{{Rewrite: &Rewrite{Host: "a b"}}}},
		{"no edits", "rules[0].request", []Rule{edit(HeaderEdits{})}},
		{"edit in two ways", "rules[0].request.add", []Rule{edit(HeaderEdits{Set: map[string]string{"A": ""}, Add: map[string]string{"a": ""}})}},
		{"injection", "rules[0].request.set", []Rule{edit(HeaderEdits{Set: map[string]string{"A": "b\r\nC: d"}})}},
		{"framing", "rules[0].request.set", []Rule{edit(HeaderEdits{Set: map[string]string{"Content-length": "0"}})}},
		{"host", "rules[0].request.set", []Rule{edit(HeaderEdits{Set: map[string]string{"Host": "a"}})}},
		{"visitor's address", "rules[0].request.remove[0]", []Rule{edit(HeaderEdits{Remove: []string{"x_forwarded_for"}})}},
		{"error code", "rules[0].response.add", []Rule{{Response: &HeaderEdits{Add: map[string]string{"Webgw-Error": "x"}}}}},
	} {
		e := Exposure{Protocol: HTTP, Hosts: []string{"a.example"}, Gateways: []ID{{1}}, Targets: []Target{{Node: ID{2}, Address: "localhost:1"}}, Rules: tt.rules}
		wantField(t, tt.name, e.validate(), tt.field)
	}
	e := Exposure{Protocol: HTTP, Hosts: []string{"a.example"}, Gateways: []ID{{1}}, Rules: []Rule{rule(Match{Prefix: "/a"}), {Match: Match{Path: "/b"}}}}
	wantField(t, "rule without a target", e.validate(), "rules[1].targets")
	e.Rules = e.Rules[:1]
	wantField(t, "exposure without targets of its own", e.validate(), "")
	e.Protocol = TLS
	wantField(t, "rules of TLS", e.validate(), "rules")
}

func TestAllTargets(t *testing.T) {
	a, b, c := Target{Node: ID{1}, Address: "a:1"}, Target{Node: ID{2}, Address: "b:1"}, Target{Direct: "c.example:1"}
	e := Exposure{Targets: []Target{a, b}, Rules: []Rule{{Targets: []Target{b, c}}, {}, {Targets: []Target{c, a}}}}
	var fields []string
	var targets []Target
	for f, t := range e.AllTargets() {
		fields, targets = append(fields, f), append(targets, t)
	}
	if !slices.Equal(targets, []Target{a, b, c}) || strings.Join(fields, " ") != "targets[0] targets[1] rules[0].targets[1]" {
		t.Error(fields, targets)
	}
	if !e.LeadsTo(func(t Target) bool { return t == c }) || e.LeadsTo(func(t Target) bool { return t.Address == "x" }) {
		t.Error("leads elsewhere")
	}
	for range e.AllTargets() {
		break
	}
}
