package ingress

import (
	"bytes"
	"net/http"
	"net/netip"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
)

// Limits of a request over HTTP/1. Those of the head hold for HTTP/2 as well.
const (
	maxHead      = 64 << 10 // bytes of request line and fields
	maxFields    = 100
	maxTrailer   = 8 << 10 // bytes of all trailer fields
	maxChunkLine = 256     // bytes of a chunk's size and extensions
	maxDigits    = 15      // of a length, so that it can't overflow
)

// head is a request's head, and what it says about what follows it.
type head struct {
	req     *http.Request // filled in by parse; its Header is empty before
	values  []string      // that the fields' values are slices of
	upgrade bool          // the visitor asks for another protocol
	expects bool          // 100 (Continue) is waited for
	close   bool          // no request follows
	keep10  bool          // HTTP/1.0, and another request may follow
}

// ends returns where the head at the front of b ends; 0 means that it is not all
// there. Before from no line of it ends; next is where to go on.
func headEnds(b []byte, from int) (end, next int, refusal *page) {
	for at := from; ; {
		i := bytes.IndexByte(b[at:], '\n')
		if i < 0 {
			if len(b) > maxHead {
				return 0, 0, &headTooLarge
			}
			return 0, at, nil
		}
		lf := at + i
		switch {
		case lf == 0 || b[lf-1] != '\r':
			return 0, 0, &ambiguous // a bare LF ends a line for some
		case lf+1 > maxHead:
			return 0, 0, &headTooLarge
		case lf == at+1 && at > 0:
			return lf + 1, 0, nil
		case lf == at+1:
			// An empty line before a request is ignored (RFC 9112 section 2.2)
			// by some; it has no use today.
			return 0, 0, &badRequest
		}
		at = lf + 1
	}
}

// parse judges a complete head, lines ending in CRLF, the last one empty, and
// makes the request of it. What passes is unambiguous: every reader of RFC 9112
// sees the same request in it. It is stricter than the RFC where readers are
// known to differ, and much stricter than net/http. What is kept are pieces of
// text.
func (h *head) parse(text string) (refusal *page) {
	line, rest, _ := strings.Cut(text, "\r\n")
	method, target, old, refusal := parseRequestLine(line)
	if refusal != nil {
		return refusal
	}
	r := h.req
	r.Method, r.RequestURI = method, target
	r.Proto, r.ProtoMajor, r.ProtoMinor = "HTTP/1.1", 1, 1
	if old {
		r.Proto, r.ProtoMinor = "HTTP/1.0", 0
	}
	var hosts, lengths, encodings, fields int
	var host string
	var wantsUpgrade, namesUpgrade bool
	for len(rest) > len(crlf) {
		line, rest, _ = strings.Cut(rest, "\r\n")
		if fields++; fields > maxFields {
			return &headTooLarge
		}
		if line[0] == ' ' || line[0] == '\t' {
			return &ambiguous // obs-fold, RFC 9112 section 5.2
		}
		name, value, ok := splitField(line)
		if !ok {
			return &badRequest
		}
		if strings.IndexByte(name, '_') >= 0 && isFramingField(strings.ReplaceAll(name, "_", "-")) {
			return &ambiguous // the same variable in CGI, RFC 3875 section 4.1.18
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		switch name {
		case "Host":
			hosts++
			host = value
			continue
		case "Content-Length":
			lengths++
			if len(value) == 0 || len(value) > maxDigits {
				return &ambiguous
			}
			n, err := strconv.ParseUint(value, 10, 63) // takes no sign
			if err != nil {
				return &ambiguous
			}
			r.ContentLength = int64(n)
		case "Transfer-Encoding":
			encodings++
			if !is(value, "chunked") {
				return &ambiguous
			}
			continue
		case "Trailer":
			for name := range strings.SplitSeq(value, ",") {
				name = strings.Trim(name, " \t")
				if !isToken(name) || isFramingField(name) || is(name, "trailer") {
					return &badRequest
				}
				if r.Trailer == nil {
					r.Trailer = http.Header{}
				}
				r.Trailer[textproto.CanonicalMIMEHeaderKey(name)] = nil
			}
			continue
		case "Upgrade":
			wantsUpgrade = true
		case "Connection":
			namesUpgrade = namesUpgrade || hasToken(value, "upgrade")
			h.close = h.close || hasToken(value, "close")
			h.keep10 = h.keep10 || old && hasToken(value, "keep-alive")
		}
		if others, more := r.Header[name]; more {
			r.Header[name] = append(others, value)
			continue
		}
		h.values = append(h.values, value)
		r.Header[name] = h.values[len(h.values)-1 : len(h.values) : len(h.values)]
	}
	h.close = h.close || old && !h.keep10
	if encodings > 0 {
		r.ContentLength = -1
	} else {
		r.Trailer = nil
	}
	r.Host = host
	switch {
	case lengths > 1 || encodings > 1 || lengths+encodings > 1 || old && encodings > 0:
		return &ambiguous // RFC 9112 section 6.3
	case hosts > 1 || hosts == 0 && !old || hosts == 1 && !isAuthority(host):
		return &badHost // RFC 9112 section 3.2
	case method == http.MethodConnect:
		// As after a request for an upgrade, nobody knows what the bytes that
		// follow are before it is answered.
		h.upgrade = true
		if hosts == 0 { // HTTP/1.0, which some clients speak to proxies to this day
			host = target
		}
		r.Host = target
		*r.URL = url.URL{Host: target}
		return checkConnect(target, host, lengths+encodings)
	case is(method, "connect") || is(method, "trace"):
		return &badMethod
	}
	if refusal := checkTarget(method, target, host); refusal != nil {
		return refusal
	}
	h.upgrade = wantsUpgrade && namesUpgrade && !old
	if e := r.Header["Expect"]; len(e) > 0 {
		if len(e) > 1 || !is(e[0], "100-continue") {
			return &badExpectation
		}
		h.expects = !old && r.ContentLength != 0
	}
	return parseTarget(r)
}

// parseTarget sets the request's URL.
func parseTarget(r *http.Request) (refusal *page) {
	path, query, _ := strings.Cut(r.RequestURI, "?")
	if path[0] == '/' && isPlainTarget(path) {
		*r.URL = url.URL{Path: path, RawQuery: query, ForceQuery: query == "" && len(path) < len(r.RequestURI)}
		return nil
	}
	u, err := url.ParseRequestURI(r.RequestURI)
	if err != nil {
		return &badRequest
	}
	*r.URL = *u
	if u.Host != "" {
		r.Host = u.Host // RFC 9112 section 3.2.2; it is the same
	}
	return nil
}

// isPlainTarget reports whether a path means what it says: nothing in it is
// encoded, or would be.
func isPlainTarget(path string) bool {
	for i := range len(path) {
		if class[path[i]]&plainByte == 0 {
			return false
		}
	}
	return true
}

var crlf = []byte("\r\n")

// parseRequestLine splits method SP target SP version (RFC 9112 section 3);
// old is HTTP/1.0.
func parseRequestLine(line string) (method, target string, old bool, refusal *page) {
	method, rest, ok1 := strings.Cut(line, " ")
	target, version, ok2 := strings.Cut(rest, " ")
	if !ok1 || !ok2 || !isToken(method) || len(method) > 32 || !isTarget(target) {
		return "", "", false, &badRequest
	}
	switch version {
	case "HTTP/1.1":
	case "HTTP/1.0":
		old = true
	default:
		if len(version) == 8 && version[:5] == "HTTP/" && len(strings.Trim(version[5:], ".0123456789")) == 0 {
			return "", "", false, &badVersion
		}
		return "", "", false, &badRequest
	}
	return method, target, old, nil
}

// isTarget reports whether s may stand between the spaces of a request line.
func isTarget(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] == 0x7f {
			return false
		}
	}
	return len(s) > 0
}

// isAuthority reports whether s is a host with or without a port, as Host
// holds it (RFC 9110 section 7.2): a name, or an address, IPv6 in brackets.
// Of what RFC 3986 allows in names beyond that, readers make different things.
func isAuthority(s string) bool {
	if i := strings.LastIndexByte(s, ':'); i >= 0 && s[len(s)-1] != ']' {
		if len(strings.Trim(s[i+1:], "0123456789")) > 0 {
			return false
		}
		s = s[:i]
	}
	if len(s) > 2 && s[0] == '[' && s[len(s)-1] == ']' {
		a, err := netip.ParseAddr(s[1 : len(s)-1])
		return err == nil && a.Is6() && a.Zone() == ""
	}
	for i := range len(s) {
		if class[s[i]]&nameByte == 0 {
			return false
		}
	}
	return len(s) > 0
}

// checkTarget allows origin form, asterisk form for OPTIONS, and an absolute
// form that says the same as Host (RFC 9112 section 3.2): of two names, others
// might choose the other.
func checkTarget(method, target, host string) *page {
	if target[0] == '/' || target == "*" && method == "OPTIONS" {
		return nil
	}
	scheme, rest, ok := strings.Cut(target, "://")
	if !ok || !is(scheme, "http") && !is(scheme, "https") {
		return &badRequest
	}
	authority := rest
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		authority = rest[:i]
	}
	if len(authority) == 0 || !is(authority, host) {
		return &badHost
	}
	return nil
}

// checkConnect allows the authority form that says the same as Host, with a port
// (RFC 9112 section 3.2.3), and no content, which has no meaning there and is
// read differently (RFC 9110 section 9.3.6).
func checkConnect(target, host string, framed int) *page {
	i := strings.LastIndexByte(target, ':')
	switch {
	case framed > 0:
		return &ambiguous
	case i < 0 || i == len(target)-1 || !isAuthority(target) || target[len(target)-1] == ']':
		return &badRequest
	case !is(target, host):
		return &badHost
	}
	return nil
}

// splitField splits a field line and trims the value (RFC 9112 section 5).
func splitField(line string) (name, value string, ok bool) {
	name, value, ok = strings.Cut(line, ":")
	if !ok || !isToken(name) {
		return "", "", false
	}
	for i := range len(value) {
		if !isFieldByte(value[i]) {
			return "", "", false
		}
	}
	return name, strings.Trim(value, " \t"), true
}

// isFieldByte reports whether c may stand in a field value (RFC 9110 section 5.5).
func isFieldByte(c byte) bool { return c >= ' ' && c != 0x7f || c == '\t' }

// class tells what bytes may be part of.
var class = func() (t [256]uint8) {
	mark := func(bytes string, as uint8) {
		for i := range len(bytes) {
			t[bytes[i]] |= as
		}
	}
	mark("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", tokenByte|nameByte|plainByte)
	mark("!#$%&'*+-.^_`|~", tokenByte) // RFC 9110 section 5.6.2
	mark("-._~", nameByte|plainByte)   // unreserved, RFC 3986 section 2.3
	mark("/", plainByte)
	return t
}()

const (
	tokenByte = 1 << iota
	nameByte  // of a host's name
	plainByte // of a path in which nothing is encoded
)

// isToken reports whether s is a token (RFC 9110 section 5.6.2).
func isToken(s string) bool {
	for i := range len(s) {
		if class[s[i]]&tokenByte == 0 {
			return false
		}
	}
	return len(s) > 0
}

// is compares without regard to case, for ASCII.
func is(a, b string) bool { return len(a) == len(b) && strings.EqualFold(a, b) }

// isFramingField reports whether a field decides where a message ends or who it
// is for: as a trailer, or misspelt, it is an attempt.
func isFramingField(name string) bool {
	return is(name, "content-length") || is(name, "transfer-encoding") || is(name, "host")
}

// hasToken reports whether a comma-separated list holds the token.
func hasToken(list, token string) bool {
	for t := range strings.SplitSeq(list, ",") {
		if strings.EqualFold(strings.Trim(t, " \t"), token) {
			return true
		}
	}
	return false
}
