package ingress

import (
	"cmp"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"webgw.dev/webgw"
)

// ruleset is the rules of an exposure in the order in which they are tried.
type ruleset struct {
	rules   []*rule
	rest    *Route // for requests that no rule matches; nil: nothing
	byPath  bool   // a rule looks at the path
	byRegex bool   // by a regular expression
	byQuery bool   // at the query
}

type rule struct {
	*webgw.Rule
	route             *Route // with the rule's targets; nil: a redirect
	path              string // exact, or the prefix
	exact             bool
	regex             *regexp.Regexp // of the whole path, instead; nil: none
	depth             int            // segments of the path
	folds             bool           // what differs from path in case only is refused
	headers           [][2]string    // canonical name, value; sorted
	request, response edits
}

// edits is webgw.HeaderEdits with canonical names.
type edits struct {
	set, add [][2]string
	remove   []string
}

func newEdits(e *webgw.HeaderEdits) (out edits) {
	if e == nil {
		return out
	}
	out.set, out.add = canonicalFields(e.Set), canonicalFields(e.Add)
	for _, name := range e.Remove {
		out.remove = append(out.remove, http.CanonicalHeaderKey(name))
	}
	return out
}

func canonicalFields(m map[string]string) (out [][2]string) {
	for name, value := range m {
		out = append(out, [2]string{http.CanonicalHeaderKey(name), value})
	}
	slices.SortFunc(out, func(a, b [2]string) int { return cmp.Compare(a[0], b[0]) })
	return out
}

func (e *edits) apply(h http.Header) {
	for _, name := range e.remove {
		delete(h, name)
	}
	for _, f := range e.set {
		h[f[0]] = []string{f[1]}
	}
	for _, f := range e.add {
		h[f[0]] = append(slices.Clip(h[f[0]]), f[1])
	}
}

// newRuleset returns nil for an exposure without rules. The routes in it have
// no targets until link.
func newRuleset(r *Route) *ruleset {
	e := r.Exposure
	if len(e.Rules) == 0 {
		return nil
	}
	s := &ruleset{}
	part := func() *Route { return &Route{Key: r.Key, Exposure: e} }
	if len(e.Targets) > 0 {
		s.rest = part()
	}
	for i := range e.Rules {
		u := &rule{Rule: &e.Rules[i], headers: canonicalFields(e.Rules[i].Match.Headers), request: newEdits(e.Rules[i].Request), response: newEdits(e.Rules[i].Response)}
		if u.path, u.exact = u.Match.Path, true; u.path == "" {
			u.path, u.exact = cmp.Or(u.Match.Prefix, "/"), false
		}
		if u.path != "/" {
			u.depth = strings.Count(u.path, "/")
		}
		if u.Match.Regex != "" {
			u.regex, _ = u.Match.CompileRegex() // it was checked with its record
			s.byRegex = true
		}
		s.byPath = s.byPath || u.Match.Path != "" || u.Match.Prefix != "" || u.regex != nil
		s.byQuery = s.byQuery || len(u.Match.Query) > 0
		if u.Redirect == nil {
			u.route = part()
		}
		s.rules = append(s.rules, u)
	}
	for _, u := range s.rules {
		// An owner who has rules for both spellings knows what they do.
		u.folds = !slices.ContainsFunc(s.rules, func(o *rule) bool { return o.path != u.path && strings.EqualFold(o.path, u.path) })
	}
	slices.SortStableFunc(s.rules, precedence)
	return s
}

// precedence is that of the Kubernetes Gateway API (HTTPRouteRule): exact path,
// longest regular expression, longest prefix, method, most header fields, most
// query parameters, first.
func precedence(a, b *rule) int {
	rank := func(is bool) int {
		if is {
			return 0
		}
		return 1
	}
	return cmp.Or(
		cmp.Compare(rank(a.exact), rank(b.exact)),
		cmp.Compare(rank(a.regex != nil), rank(b.regex != nil)),
		cmp.Compare(len(b.Match.Regex), len(a.Match.Regex)),
		cmp.Compare(len(b.path), len(a.path)),
		cmp.Compare(rank(a.Match.Method != ""), rank(b.Match.Method != "")),
		cmp.Compare(len(b.headers), len(a.headers)),
		cmp.Compare(len(b.Match.Query), len(a.Match.Query)),
	)
}

// link gives the parts of a route with rules what the route has: after it was
// made, and after it has taken over from an earlier table.
func (r *Route) link() {
	fill := func(part *Route, targets []webgw.Target) {
		part.owner, part.use, part.guard, part.targets = r.owner, r.use, r.guard, nil
		for _, want := range targets {
			i := slices.IndexFunc(r.targets, func(t *target) bool { return t.Target == want })
			part.targets = append(part.targets, r.targets[i])
		}
	}
	if r.rules.rest != nil {
		fill(r.rules.rest, r.Exposure.Targets)
	}
	for _, u := range r.rules.rules {
		switch {
		case u.route == nil:
		case len(u.Targets) > 0:
			fill(u.route, u.Targets)
		default:
			fill(u.route, r.Exposure.Targets)
		}
	}
}

var (
	ambiguousPath = page{400, "ambiguous_path", "The path could be read in more than one way.", 0}
	longPath      = page{414, "path_too_long", "The path is longer than this name takes.", 0}
	noRule        = page{404, "no_rule", "Nothing is exposed at this place under this name.", 0}
	redirected    = page{302, "redirect", "This is to be found elsewhere.", 0}
)

// choose finds the rule that counts and applies what it says of the request.
func (x *exchange) choose(s *ruleset) *page {
	r := x.in
	raw := r.URL.EscapedPath() // what is passed on, if nothing is rewritten
	path := raw
	if s.byPath && strings.HasPrefix(raw, "/") { // "*" is no path
		var ok bool
		if path, ok = plainPath(raw); !ok || s.misspelt(path) {
			return &ambiguousPath
		}
		if s.byRegex && len(path) > maxRegexPath {
			return &longPath
		}
	}
	var query url.Values
	if s.byQuery {
		query = r.URL.Query() // what is not well-formed is in no rule
	}
	i := slices.IndexFunc(s.rules, func(u *rule) bool { return u.matches(r, path, query) })
	if i < 0 {
		if s.rest == nil {
			return &noRule
		}
		x.route = s.rest
		return nil
	}
	u := s.rules[i]
	if x.ruled == nil {
		x.ruled = &ruling{answer: http.Header{}}
	}
	if u.Redirect != nil {
		p := redirected
		p.status = cmp.Or(u.Redirect.Status, p.status)
		x.ruled.answer.Set("Location", x.elsewhere(u, raw))
		return &p
	}
	x.route, x.ruled.rule = u.route, u
	if w := u.Rewrite; w != nil {
		if w.Host != "" {
			x.ruled.asked, r.Host = r.Host, w.Host
		}
		if w.Path != "" {
			if !u.exact && u.regex == nil && u.path != "/" {
				x.ruled.fields = append(x.ruled.fields, [2]string{"X-Forwarded-Prefix", (&url.URL{Path: u.path}).EscapedPath()})
			}
			to := u.replaced(raw, w.Path)
			r.URL.RawPath = to
			r.URL.Path, _ = url.PathUnescape(to) // plainPath has done the same
		}
	}
	u.request.apply(r.Header)
	return nil
}

// maxRegexPath bounds the work of regular expressions, bytes.
const maxRegexPath = 2 << 10

// plainPath is a path as rules see it: percent-decoded. It is false for paths
// that workloads are known to read in different ways, so that no rule can be
// got round: empty segments, "." and "..", ";", "\", encoded slashes, bytes
// that are no text, and what may be decoded twice (RFC 3986 section 6).
func plainPath(raw string) (path string, ok bool) {
	path, err := url.PathUnescape(raw)
	if err != nil || !utf8.ValidString(path) || strings.Count(path, "/") != strings.Count(raw, "/") {
		return "", false
	}
	for i := range len(path) {
		switch c := path[i]; {
		case c < ' ' || c == 0x7f || c == ';' || c == '\\':
			return "", false
		case c == '%' && i+2 < len(path):
			_, first := hexDigit(path[i+1])
			if _, second := hexDigit(path[i+2]); first && second {
				return "", false
			}
		}
	}
	for rest := path[1:]; ; {
		part, more, found := strings.Cut(rest, "/")
		if part == "." || part == ".." || part == "" && found {
			return "", false
		}
		if !found {
			return path, true
		}
		rest = more
	}
}

// misspelt reports whether the path is one of a rule but for its case: some
// workloads take both for the same.
func (s *ruleset) misspelt(path string) bool {
	return slices.ContainsFunc(s.rules, func(u *rule) bool {
		head := path
		if !u.exact {
			head = path[:len(path)-len(after(path, u.depth))]
		}
		return u.folds && u.depth > 0 && head != u.path && strings.EqualFold(head, u.path)
	})
}

// after returns what follows the first n segments of a path: "" or "/…".
func after(path string, n int) string {
	for i := range len(path) {
		if path[i] == '/' {
			if n == 0 {
				return path[i:]
			}
			n--
		}
	}
	return ""
}

func (u *rule) matches(r *http.Request, path string, query url.Values) bool {
	switch {
	case u.regex != nil && !u.regex.MatchString(path),
		u.exact && path != u.path,
		!u.exact && u.path != "/" && (!strings.HasPrefix(path, u.path) || len(path) > len(u.path) && path[len(u.path)] != '/'),
		u.Match.Method != "" && u.Match.Method != r.Method:
		return false
	}
	for name, want := range u.Match.Query {
		values := query[name]
		if len(values) == 0 || want != "" && slices.ContainsFunc(values, func(v string) bool { return v != want }) {
			return false
		}
	}
	for _, f := range u.headers {
		values := r.Header[f[0]]
		if f[0] == "Host" {
			values = []string{r.Host}
		}
		if len(values) == 0 || f[1] != "" && strings.Join(values, ", ") != f[1] {
			return false
		}
	}
	return true
}

// replaced puts with in place of what the rule has matched of a raw path.
func (u *rule) replaced(raw, with string) string {
	with = (&url.URL{Path: with}).EscapedPath()
	if u.exact || u.regex != nil {
		return with
	}
	rest := after(raw, u.depth)
	if rest == "" {
		return with
	}
	return strings.TrimSuffix(with, "/") + rest
}

// elsewhere is where a redirect leads.
func (x *exchange) elsewhere(u *rule, raw string) string {
	d := u.Redirect
	to := raw
	if raw[0] != '/' { // "*"
		to = "/"
	}
	if d.Path != "" {
		to = u.replaced(raw, d.Path)
	}
	if x.in.URL.RawQuery != "" {
		to += "?" + x.in.URL.RawQuery
	}
	if d.Scheme == "" && d.Host == "" {
		return to // with a path of the owner's in front: it begins with one slash
	}
	now := "http"
	if x.conn.tls {
		now = "https"
	}
	scheme, host := cmp.Or(d.Scheme, now), d.Host
	if host == "" {
		host = x.in.Host
		if scheme != now { // the port is another one, too
			host = x.host
			if scheme == "https" {
				host += x.web.s.httpsPort()
			}
		}
	}
	return scheme + "://" + host + to
}
