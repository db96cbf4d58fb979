package ingress

import (
	"errors"
	"io"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"
)

var (
	denied       = page{403, "address_denied", "Visitors from this address are not let in here.", 0}
	noCountry    = page{503, "country_unknown", "This gateway can't tell where visitors are from, and this name is for some countries only.", 0}
	certRequired = page{403, "certificate_required", "This name is for visitors with a certificate of its owner's choice only.", 0}
	unknownUser  = page{401, "unauthorized", "This name is for known visitors only.", 0}
	tooOften     = page{429, "too_many_requests", "Too many requests have come from here, or to this name, in a short time.", 0}
	guessing     = page{429, "too_many_attempts", "Too many wrong passwords or tokens have come from here.", 0}
	hashesBusy   = page{503, "auth_busy", "Too many visitors are identifying themselves at once.", 2}
	issuerAway   = page{503, "issuer_unavailable", "It can't be found out now who visitors are.", 10}
	bodyTooLarge = page{413, "body_too_large", "The body of the request is larger than this name takes.", 0}
	answerLarge  = page{502, "answer_too_large", "The answer of the workload is larger than this name gives.", 0}
	exposureBusy = page{503, "concurrency_limit", "Too many requests are under way to this name.", 1}
	outOfTime    = page{504, "request_time", "The request took longer than this name allows.", 0}
	useHTTPS     = page{308, "https_only", "This name is served over https only.", 0}
)

// ruling is what policy and rules have to say of one request. nil: nothing.
type ruling struct {
	guard  *guard       // nil: no policy
	rule   *rule        // nil: none matched
	asked  string       // the visitor's Host, if the workload sees another
	fields [][2]string  // what the workload is told besides
	answer http.Header  // fields of the gateway's own answer
	body   *limitedBody // nil: no limit
}

// enter counts the request in at its route, or returns the page that refuses it.
func (x *exchange) enter(route *Route) *page {
	x.route = route
	s := x.web.s
	connect := x.isConnect()
	if connect {
		x.credentials()
	}
	if route.guard != nil {
		if p, reason := x.govern(route.guard.ready(s)); p != nil {
			if reason != "" {
				s.metrics.refused(reason)
			}
			return p
		}
	}
	if connect && route.rules != nil {
		x.route = route.rules.rest // rules are about requests
	} else if route.rules != nil {
		if p := x.choose(route.rules); p != nil {
			if p == &ambiguousPath {
				s.metrics.refused(reasonPath)
			}
			return p
		}
	}
	reason := x.route.admit(&s.limits)
	if reason == "" {
		return nil
	}
	s.metrics.refused(reason)
	switch reason {
	case reasonBusy:
		return &exposureBusy
	case reasonExposure:
		return &exposureFull
	}
	return &ownerBusy
}

// govern applies the policy: first what is cheap to find out.
func (x *exchange) govern(g *guard) (refusal *page, reason string) {
	s, c, policy := x.web.s, x.conn.c, g.policy
	from := c.v.visitor.Addr()
	x.ruled = &ruling{guard: g, answer: http.Header{}}
	switch reason := g.lets(from); reason {
	case "":
	case reasonNoCountry:
		return &noCountry, reason
	default:
		return &denied, reason
	}
	now := time.Now()
	if !x.conn.tls && c.met != g {
		if wait := s.buckets.take(g.connections, from, now); wait > 0 {
			return x.later(&tooOften, wait), reasonRate
		}
		c.met = g // with TLS, it was counted before the handshake
	}
	if wait := s.buckets.take(g.requests, from, now); wait > 0 {
		return x.later(&tooOften, wait), reasonRate
	}
	if !x.conn.tls && (policy.HTTPSOnly || policy.Identifies()) {
		x.ruled.answer.Set("Location", "https://"+x.host+s.httpsPort()+x.in.URL.RequestURI())
		return &useHTTPS, ""
	}
	if p := g.checkClient(c.proof); p != nil {
		return p, reasonClient
	}
	if c.proof != nil && g.tls != nil {
		x.ruled.fields = append(x.ruled.fields, c.proof.fields()...)
	}
	known := false
	if g.login != nil {
		who, p, reason := x.logIn(g.login, from)
		if p != nil {
			return p, reason
		}
		if who != nil {
			known = true
			x.ruled.fields = append(x.ruled.fields, who.fields()...)
		} else if g.auth == nil {
			return &unknownUser, reasonAuth
		}
	}
	if g.auth != nil && !known {
		who, basic, wait, err := g.auth.identify(s, x.in, from)
		switch err {
		case nil:
		case errGuess:
			return x.later(&guessing, wait), reasonAuth
		case errHashes:
			return &hashesBusy, reasonAuth
		case errIssuer:
			return &issuerAway, reasonIssuer
		default:
			x.ruled.answer["Www-Authenticate"] = g.auth.challenges(x.host, err == errWrong)
			return &unknownUser, reasonAuth
		}
		if basic {
			x.in.Header.Del("Authorization") // the password is the gateway's affair
		}
		x.ruled.fields = append(x.ruled.fields, [2]string{"X-Forwarded-User", fieldText(who)})
	}
	if policy.MaxBody > 0 && x.in.Body != nil && x.in.Body != http.NoBody {
		if x.in.ContentLength > policy.MaxBody {
			return &bodyTooLarge, reasonBody
		}
		x.ruled.body = &limitedBody{ReadCloser: x.in.Body, left: policy.MaxBody}
		x.in.Body = x.ruled.body
	}
	return nil, ""
}

// later sets Retry-After, rounded up to seconds.
func (x *exchange) later(p *page, wait time.Duration) *page {
	x.ruled.answer.Set("Retry-After", strconv.Itoa(int((wait+time.Second-1)/time.Second)))
	return p
}

// httpsPort is what stands behind a host name in an https URL of this gateway.
func (s *Server) httpsPort() string {
	if s.PublicTLSPort == 0 || s.PublicTLSPort == 443 {
		return ""
	}
	return ":" + strconv.Itoa(int(s.PublicTLSPort))
}

// askedHost is the Host that the visitor has asked for.
func (x *exchange) askedHost() string {
	if x.ruled == nil || x.ruled.asked == "" {
		return x.in.Host
	}
	return x.ruled.asked
}

// extra are fields for the workload besides those that it always gets.
func (u *ruling) extra() [][2]string {
	if u == nil {
		return nil
	}
	return u.fields
}

// tooLarge reports that the request's body went over its limit.
func (u *ruling) tooLarge() bool { return u != nil && u.body != nil && u.body.over.Load() }

// finish completes the head of an answer before it goes to the visitor.
func (x *exchange) finish() {
	u := x.ruled
	if u == nil {
		return
	}
	h := x.Header()
	if h.Get(ErrorHeader) != "" {
		for name, values := range u.answer {
			h[name] = values
		}
	} else if u.rule != nil {
		u.rule.response.apply(h)
	}
	if u.guard != nil && u.guard.policy.HSTS != nil && x.conn.tls {
		hsts := u.guard.policy.HSTS
		v := "max-age=" + strconv.Itoa(hsts.MaxAge)
		if hsts.IncludeSubdomains {
			v += "; includeSubDomains"
		}
		if hsts.Preload {
			v += "; preload"
		}
		h.Set("Strict-Transport-Security", v)
	}
}

var errBodyTooLarge = errors.New("ingress: the request's body is larger than the policy allows")

// limitedBody ends in an error when more comes than is allowed.
type limitedBody struct {
	io.ReadCloser
	left int64
	over atomic.Bool
}

func (b *limitedBody) Read(p []byte) (int, error) {
	if b.over.Load() {
		return 0, errBodyTooLarge
	}
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	if int64(n) > b.left {
		b.over.Store(true)
		return int(b.left), errBodyTooLarge
	}
	b.left -= int64(n)
	return n, err
}

var errAnswerTooLarge = errors.New("ingress: the body of the workload's answer is larger than the policy allows")

// limitAnswer bounds the answer's body. It returns an error for one that is
// known to be too large before any of it has been sent.
func (x *exchange) limitAnswer(res *http.Response) error {
	if x.ruled == nil || x.ruled.guard == nil || x.ruled.guard.policy.MaxResponse == 0 || res.Body == http.NoBody || x.in.Method == http.MethodHead {
		return nil
	}
	most := x.ruled.guard.policy.MaxResponse
	if res.ContentLength > most {
		return errAnswerTooLarge
	}
	res.Body = &limitedAnswer{res.Body, most, x.web.s.metrics}
	return nil
}

// limitedAnswer ends in an error when more comes than is allowed, so that the
// answer is cut.
type limitedAnswer struct {
	io.ReadCloser
	left    int64
	metrics *metrics
}

func (b *limitedAnswer) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, errAnswerTooLarge
	}
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	if b.left -= int64(n); b.left < 0 {
		b.metrics.refused(reasonAnswer)
		return n - 1, errAnswerTooLarge
	}
	return n, err
}
