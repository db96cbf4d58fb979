package webgw

import (
	"cmp"
	"fmt"
	"iter"
	"maps"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
	"unicode/utf8"
)

// Rule handles some of an http exposure's requests in its own way. Of the rules
// that match a request, one counts; the order in which that is decided is the
// one of the Kubernetes Gateway API: an exact path before a regular expression
// and that before a prefix, a longer one before a shorter one, one that names a
// method before one that does not, more header fields before fewer, more query
// parameters before fewer, and the earlier before the later.
// Requests that no rule matches go to the exposure's own targets; without any,
// they are answered 404.
type Rule struct {
	Match    Match        `json:"match,omitzero"`
	Targets  []Target     `json:"targets,omitempty"`  // any of them serves; none: the exposure's
	Rewrite  *Rewrite     `json:"rewrite,omitempty"`  // what the workload sees instead
	Redirect *Redirect    `json:"redirect,omitempty"` // the visitor is sent elsewhere; then nothing else but match stands in the rule
	Request  *HeaderEdits `json:"request,omitempty"`  // of the fields that the workload gets
	Response *HeaderEdits `json:"response,omitempty"` // of the fields that the visitor gets
}

// Match says which requests a rule is for: those with all that is set. Paths
// are compared percent-decoded and with regard to case.
type Match struct {
	Path    string            `json:"path,omitempty"`    // exactly
	Prefix  string            `json:"prefix,omitempty"`  // by whole segments: /a is for /a, /a/ and /a/b, not for /ab
	Regex   string            `json:"regex,omitempty"`   // regular expression (RE2) of the whole path
	Method  string            `json:"method,omitempty"`  // in capitals, as in requests
	Headers map[string]string `json:"headers,omitempty"` // value by field name; "": with any value
	Query   map[string]string `json:"query,omitempty"`   // value by parameter; "": any value. Of one that stands several times, all values
}

// Rewrite changes where a request seems to go. What is not set stays.
type Rewrite struct {
	Path string `json:"path,omitempty"` // in place of the path or prefix that was matched; with regex of the whole path
	Host string `json:"host,omitempty"` // the Host field
}

// Redirect is an answer that sends the visitor elsewhere. What is not set stays
// as it was asked for, the query always.
type Redirect struct {
	Scheme string `json:"scheme,omitempty"` // http or https
	Host   string `json:"host,omitempty"`   // with or without a port
	Path   string `json:"path,omitempty"`   // in place of the path or prefix that was matched; with regex of the whole path
	Status int    `json:"status,omitempty"` // 301, 302, 303, 307 or 308; 0 is 302
}

// HeaderEdits changes fields of a request or an answer.
type HeaderEdits struct {
	Set    map[string]string `json:"set,omitempty"`    // in place of what is there
	Add    map[string]string `json:"add,omitempty"`    // beside what is there
	Remove []string          `json:"remove,omitempty"` // names
}

// Limits of rules.
const (
	MaxRules       = 64
	maxRuleTargets = 256 // of an exposure and all its rules
	maxPathText    = 1024
	maxEdits       = 32 // of each kind
	maxFieldText   = 4096

	// What matching a path may cost, in instructions of the expressions of all
	// rules together: it is work that strangers cause.
	maxRegexText = 512
	maxRegexSize = 1000
)

// AllTargets yields every target that the exposure or one of its rules leads
// to, once, with the path of its field.
func (e *Exposure) AllTargets() iter.Seq2[string, Target] {
	return func(yield func(string, Target) bool) {
		for i, t := range e.Targets {
			if !yield(index("targets", i), t) {
				return
			}
		}
		var seen map[Target]bool
		for i, r := range e.Rules {
			for j, t := range r.Targets {
				if seen == nil {
					seen = map[Target]bool{}
					for _, t := range e.Targets {
						seen[t] = true
					}
				}
				if seen[t] {
					continue
				}
				seen[t] = true
				if !yield(index(index("rules", i)+".targets", j), t) {
					return
				}
			}
		}
	}
}

// LeadsTo reports whether f holds for any of AllTargets.
func (e *Exposure) LeadsTo(f func(Target) bool) bool {
	for _, t := range e.AllTargets() {
		if f(t) {
			return true
		}
	}
	return false
}

func (e *Exposure) validateRules() error {
	if len(e.Rules) == 0 {
		return nil
	}
	if e.Protocol != HTTP {
		return invalid("rules", "belong to protocol http only; the gateway does not look into %s", e.Protocol)
	}
	if len(e.Rules) > MaxRules {
		return invalid("rules", "holds more than %d", MaxRules)
	}
	targets, size := len(e.Targets), 0
	seen := map[string]int{}
	for i := range e.Rules {
		r := &e.Rules[i]
		if err := in(index("rules", i), r.validate(len(e.Targets) > 0)); err != nil {
			return err
		}
		k := r.Match.key()
		if first, ok := seen[k]; ok {
			return invalid(index("rules", i)+".match", "is the same as that of rules[%d], which always comes first", first)
		}
		seen[k] = i
		targets += len(r.Targets)
		if r.Match.Regex != "" {
			if size += regexSize(r.Match.Regex); size > maxRegexSize {
				return invalid(index("rules", i)+".match.regex", "is too costly, with those before it")
			}
		}
	}
	if targets > maxRuleTargets {
		return invalid("rules", "lead to more than %d targets", maxRuleTargets)
	}
	return nil
}

func (r *Rule) validate(fallback bool) error {
	if err := in("match", r.Match.validate()); err != nil {
		return err
	}
	if len(r.Targets) > MaxTargets {
		return invalid("targets", "must hold up to %d targets", MaxTargets)
	}
	for i, t := range r.Targets {
		if err := in(index("targets", i), t.validate()); err != nil {
			return err
		}
		if slices.Contains(r.Targets[:i], t) {
			return invalid(index("targets", i), "stands twice")
		}
	}
	if r.Redirect != nil {
		if len(r.Targets) > 0 || r.Rewrite != nil || r.Request != nil || r.Response != nil {
			return invalid("redirect", "stands alone: the workload does not see what is redirected")
		}
		return in("redirect", r.Redirect.validate(r.Match))
	}
	if len(r.Targets) == 0 && !fallback {
		return invalid("targets", "missing: neither the rule nor the exposure has any")
	}
	if r.Rewrite != nil {
		if err := in("rewrite", r.Rewrite.validate(r.Match)); err != nil {
			return err
		}
	}
	if err := in("request", r.Request.validate()); err != nil {
		return err
	}
	return in("response", r.Response.validate())
}

func (m Match) validate() error {
	switch {
	case m.Path != "" && m.Prefix != "":
		return invalid("prefix", "can't stand beside path")
	case m.Regex != "" && m.Path+m.Prefix != "":
		return invalid("regex", "can't stand beside path or prefix")
	case m.Prefix != "/" && strings.HasSuffix(m.Prefix, "/"):
		return invalid("prefix", "%q: leave the last / out; a prefix is of whole segments", clip(m.Prefix, 80))
	}
	if err := checkPath("path", m.Path); err != nil {
		return err
	}
	if err := checkPath("prefix", m.Prefix); err != nil {
		return err
	}
	if m.Regex != "" {
		if err := checkText("regex", m.Regex, maxRegexText); err != nil {
			return err
		}
		if _, err := m.CompileRegex(); err != nil {
			return invalid("regex", "%q is not a regular expression of RE2: %s", clip(m.Regex, 80), strings.TrimPrefix(err.Error(), "error parsing regexp: "))
		}
	}
	if m.Method != "" && (!isToken(m.Method) || len(m.Method) > 32 || strings.ToUpper(m.Method) != m.Method || m.Method == "CONNECT" || m.Method == "TRACE") {
		return invalid("method", "%q is not a method that is passed on, in capitals", clip(m.Method, 40))
	}
	if len(m.Headers) > maxEdits {
		return invalid("headers", "holds more than %d fields", maxEdits)
	}
	seen := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(m.Headers)) {
		if err := checkField("headers", name, m.Headers[name], seen); err != nil {
			return err
		}
	}
	if len(m.Query) > maxEdits {
		return invalid("query", "holds more than %d parameters", maxEdits)
	}
	for _, name := range slices.Sorted(maps.Keys(m.Query)) {
		if name == "" {
			return invalid("query", "holds a parameter without a name")
		}
		if err := checkText("query", name, 100); err != nil {
			return err
		}
		if err := checkText("query", m.Query[name], maxFieldText); err != nil {
			return err
		}
	}
	return nil
}

// CompileRegex returns the regular expression, which holds for whole paths.
func (m Match) CompileRegex() (*regexp.Regexp, error) {
	if _, err := regexp.Compile(m.Regex); err != nil { // by itself: "a)(b" is none
		return nil, err
	}
	return regexp.Compile(`\A(?:` + m.Regex + `)\z`)
}

// regexSize is the number of instructions of a valid expression.
func regexSize(s string) int {
	re, err := syntax.Parse(s, syntax.Perl)
	if err != nil {
		return 0
	}
	prog, err := syntax.Compile(re.Simplify())
	if err != nil {
		return 0
	}
	return len(prog.Inst)
}

// key is the same for matches of the same requests.
func (m Match) key() string {
	var fields []string
	for name, value := range m.Headers {
		fields = append(fields, fmt.Sprintf("%q=%q", strings.ToLower(name), value))
	}
	slices.Sort(fields)
	return fmt.Sprintf("%q %q %q %q %q %q", m.Path, cmp.Or(m.Prefix, "/"), m.Regex, m.Method, fields, m.Query) // maps are printed in order
}

func (m Match) hasPath() bool { return m.Path != "" || m.Prefix != "" || m.Regex != "" }

// checkPath allows "", and paths in the one form in which they are compared.
func checkPath(field, s string) error {
	if s == "" {
		return nil
	}
	if s[0] != '/' {
		return invalid(field, "%q must begin with /", clip(s, 80))
	}
	if len(s) > maxPathText || !utf8.ValidString(s) {
		return invalid(field, "must be UTF-8 of at most %d bytes", maxPathText)
	}
	if err := checkText(field, s, maxPathText); err != nil {
		return err
	}
	if i := strings.IndexAny(s, `%;\?#`); i >= 0 {
		return invalid(field, "%q: %q can't stand in a path here; paths are compared decoded", clip(s, 80), s[i:i+1])
	}
	for i, part := range strings.Split(s[1:], "/") {
		if part == "." || part == ".." || part == "" && i < strings.Count(s, "/")-1 {
			return invalid(field, "%q must hold no empty segment, . or ..", clip(s, 80))
		}
	}
	return nil
}

func (w *Rewrite) validate(m Match) error {
	if w.Path == "" && w.Host == "" {
		return invalid("", "must hold path, host or both")
	}
	if w.Path != "" && !m.hasPath() {
		return invalid("path", "needs a path, prefix or regex in match, which it replaces")
	}
	if err := checkPath("path", w.Path); err != nil {
		return err
	}
	return checkAuthority("host", w.Host)
}

func (d *Redirect) validate(m Match) error {
	switch d.Status {
	case 0, 301, 302, 303, 307, 308:
	default:
		return invalid("status", "%d is not 301, 302, 303, 307 or 308", d.Status)
	}
	switch d.Scheme {
	case "", "http", "https":
	default:
		return invalid("scheme", "%q is not http or https", clip(d.Scheme, 20))
	}
	if d.Scheme == "" && d.Host == "" && d.Path == "" {
		return invalid("", "must hold scheme, host or path")
	}
	if d.Path != "" && !m.hasPath() {
		return invalid("path", "needs a path, prefix or regex in match, which it replaces")
	}
	if err := checkPath("path", d.Path); err != nil {
		return err
	}
	return checkAuthority("host", d.Host)
}

// checkAuthority allows "", a host name or address, and either with a port.
func checkAuthority(field, s string) error {
	if s == "" {
		return nil
	}
	if _, _, err := SplitHostPort(s); err != nil {
		return checkHostPort(field, s+":80")
	}
	return checkHostPort(field, s)
}

func (h *HeaderEdits) validate() error {
	if h == nil {
		return nil
	}
	if len(h.Set)+len(h.Add)+len(h.Remove) == 0 {
		return invalid("", "must hold set, add or remove")
	}
	if len(h.Set) > maxEdits || len(h.Add) > maxEdits || len(h.Remove) > maxEdits {
		return invalid("", "holds more than %d fields", maxEdits)
	}
	seen := map[string]bool{}
	for _, kind := range []struct {
		name   string
		fields map[string]string
	}{{"set", h.Set}, {"add", h.Add}} {
		for _, name := range slices.Sorted(maps.Keys(kind.fields)) {
			if err := checkEdit(kind.name, name, kind.fields[name], seen); err != nil {
				return err
			}
		}
	}
	for i, name := range h.Remove {
		if err := checkEdit(index("remove", i), name, "", seen); err != nil {
			return err
		}
	}
	return nil
}

// gatewayFields are those that the gateway alone writes: they say where a
// message ends, belong to one connection, or tell who the visitor is.
var gatewayFields = []string{"connection", "proxy-connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade",
	"content-length", "host", "expect", "proxy", "http2-settings", "forwarded", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip", "x-request-id", "x-original-url", "x-rewrite-url",
	"client-cert", "client-cert-chain"}

func checkEdit(field, name, value string, seen map[string]bool) error {
	if err := checkField(field, name, value, seen); err != nil {
		return err
	}
	low := strings.ReplaceAll(strings.ToLower(name), "_", "-")
	if slices.Contains(gatewayFields, low) || strings.HasPrefix(low, "x-forwarded-") || strings.HasPrefix(low, "webgw-") {
		return invalid(field, "%s is the gateway's to write", name)
	}
	return nil
}

func checkField(field, name, value string, seen map[string]bool) error {
	if !isToken(name) || len(name) > 100 {
		return invalid(field, "%q is not a field's name", clip(name, 60))
	}
	if low := strings.ToLower(name); seen[low] {
		return invalid(field, "%s stands twice", name)
	} else {
		seen[low] = true
	}
	if err := checkText(field, value, maxFieldText); err != nil {
		return err
	}
	if strings.TrimSpace(value) != value {
		return invalid(field, "the value of %s must not begin or end with spaces", name)
	}
	return nil
}

// isToken reports whether s is a token (RFC 9110 section 5.6.2).
func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0:
		default:
			return false
		}
	}
	return s != ""
}
