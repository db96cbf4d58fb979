package ingress

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"
	"golang.org/x/oauth2"

	"webgw.dev/webgw"
)

// Where visitors come back to from their issuer, and where they log out.
const (
	callbackPath = "/.webgw/callback"
	logoutPath   = "/.webgw/logout"
)

// Cookies are for the very host only, and for https (RFC 6265bis section
// 4.1.3.2). The workload does not get them.
const (
	cookiePrefix  = "__Host-webgw-"
	sessionCookie = cookiePrefix + "session"
	browserCookie = cookiePrefix + "login" // binds a login to the browser that began it
	maxCookie     = 3800                   // bytes
)

const (
	loginTime    = 10 * time.Minute // between leaving for the issuer and coming back
	maxReturn    = 1024             // bytes of the path that a visitor comes back to
	maxIDToken   = 32 << 10
	sessionBytes = 32 // of a sealed secret: the key of sessions
)

// SecretUnreadable is the code of the problem that a policy's secret is not
// sealed to the gateway.
const SecretUnreadable = "secret_unreadable"

var (
	loginFirst   = page{302, "login", "This name is for known visitors: log in first.", 0}
	loginDone    = page{303, "logged_in", "You are logged in.", 0}
	loggedOut    = page{200, "logged_out", "You are logged out here.", 0}
	loginFailed  = page{400, "login_failed", "The login was not completed, or took too long. Go back to where you began, and try again.", 0}
	loginRefused = page{403, "login_refused", "You are not among those who are let in here.", 0}
	loginBroken  = page{503, "login_unavailable", "Nobody can log in here at the moment.", 0}
	crossSite    = page{403, "cross_site", "Another site may not log you out.", 0}
)

// login lets in visitors who log in at an issuer. Nothing of it is kept at the
// gateway: what a visitor has is sealed by a key that all gateways of the
// exposure hold.
type login struct {
	policy *webgw.OIDC
	key    webgw.Key
	client string      // the client's secret
	seal   cipher.AEAD // nil: the secret can't be read
}

func newLogin(p *webgw.OIDC, key webgw.Key, open func(owner webgw.ID, s webgw.Sealed) ([]byte, error)) (*login, error) {
	if p == nil {
		return nil, nil
	}
	l := &login{policy: p, key: key}
	if open == nil {
		return l, errors.New("ingress: no secret can be read")
	}
	secret, err := open(key.Owner, p.Secret)
	if err == nil && len(secret) < sessionBytes {
		err = errors.New("ingress: the sealed secret is too short")
	}
	var derived []byte
	if err == nil {
		derived, err = hkdf.Key(sha256.New, secret[:sessionBytes], nil, "webgw login 1", 32)
	}
	var block cipher.Block
	if err == nil {
		block, err = aes.NewCipher(derived)
	}
	if err == nil {
		l.client = string(secret[sessionBytes:])
		l.seal, err = cipher.NewGCM(block)
	}
	return l, err
}

// pack seals what a visitor is to bring again: for one purpose, exposure, host,
// client and issuer.
func (l *login) pack(purpose, host string, v any) (string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	nonce := make([]byte, l.seal.NonceSize())
	rand.Read(nonce) // never fails
	return base64.RawURLEncoding.EncodeToString(l.seal.Seal(nonce, nonce, b, l.bound(purpose, host))), nil
}

func (l *login) unpack(purpose, host, text string, v any) bool {
	b, err := base64.RawURLEncoding.DecodeString(text)
	n := l.seal.NonceSize()
	if err != nil || len(b) < n {
		return false
	}
	plain, err := l.seal.Open(nil, b[:n], b[n:], l.bound(purpose, host))
	return err == nil && json.Unmarshal(plain, v) == nil
}

func (l *login) bound(purpose, host string) []byte {
	return []byte(strings.Join([]string{purpose, l.key.String(), host, l.policy.Issuer, l.policy.ClientID}, "\x00"))
}

// session is who has logged in.
type session struct {
	Subject string   `json:"s"`
	Email   string   `json:"e,omitempty"` // verified by the issuer
	Groups  []string `json:"g,omitempty"` // those that the policy names
	Until   int64    `json:"u"`           // Unix seconds
}

// attemptAt is a login under way, as it travels in OAuth's state.
type attemptAt struct {
	Return   string `json:"r"`
	Verifier string `json:"v"` // of PKCE (RFC 7636)
	Until    int64  `json:"u"`
}

// nonce binds the token to the attempt.
func (a *attemptAt) nonce() string {
	sum := sha256.Sum256([]byte("webgw nonce " + a.Verifier))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// lets reports whether the policy lets the session's visitor in.
func (l *login) lets(s *session) bool {
	p := l.policy
	_, domain, _ := strings.Cut(s.Email, "@")
	return p.Anyone || s.Email != "" && (slices.Contains(p.Emails, s.Email) || slices.Contains(p.Domains, domain)) ||
		slices.ContainsFunc(s.Groups, func(g string) bool { return slices.Contains(p.Groups, g) })
}

// logIn lets a request in by its session, or begins or ends one. Without a page
// and a session, the visitor may still identify themselves in another way.
func (x *exchange) logIn(l *login, from netip.Addr) (who *session, refusal *page, reason string) {
	cookies := x.takeCookies()
	if l.seal == nil {
		return nil, &loginBroken, reasonAuth
	}
	switch x.in.URL.Path {
	case callbackPath:
		refusal, reason = x.comeBack(l, cookies[browserCookie], from)
		return nil, refusal, reason
	case logoutPath:
		if x.in.Header.Get("Sec-Fetch-Site") == "cross-site" {
			return nil, &crossSite, reasonAuth
		}
		x.setCookie(sessionCookie, "", 0)
		return nil, &loggedOut, ""
	}
	var s session
	if text := cookies[sessionCookie]; text != "" && l.unpack("session", x.host, text, &s) && time.Now().Unix() < s.Until {
		if !l.lets(&s) { // any more: another login may do better
			x.setCookie(sessionCookie, "", 0)
			return nil, &loginRefused, reasonAuth
		}
		return &s, nil, ""
	}
	if len(x.in.Header["Authorization"]) > 0 || !x.navigates() {
		return nil, nil, ""
	}
	refusal, reason = x.sendAway(l, cookies[browserCookie])
	return nil, refusal, reason
}

// fields are what the workload is told of the visitor.
func (s *session) fields() (out [][2]string) {
	out = append(out, [2]string{"X-Forwarded-User", fieldText(s.Subject)})
	if s.Email != "" {
		out = append(out, [2]string{"X-Forwarded-Email", fieldText(s.Email)})
	}
	if len(s.Groups) > 0 {
		var groups []string
		for _, g := range s.Groups {
			groups = append(groups, fieldText(g))
		}
		out = append(out, [2]string{"X-Forwarded-Groups", strings.Join(groups, ",")})
	}
	return out
}

// navigates reports whether a person looks at what the request brings: scripts
// and pictures are not led through a login.
func (x *exchange) navigates() bool {
	if x.in.Method != http.MethodGet {
		return false
	}
	if mode := x.in.Header.Get("Sec-Fetch-Mode"); mode != "" {
		return mode == "navigate"
	}
	return strings.Contains(x.in.Header.Get("Accept"), "text/html")
}

// origin is the host as the visitor sees it.
func (x *exchange) origin() string { return "https://" + x.host + x.web.s.httpsPort() }

func (l *login) oauth(x *exchange, about *issuerAbout) *oauth2.Config {
	style := oauth2.AuthStyleInHeader // client_secret_basic, the default
	if l.client == "" || len(about.Methods) > 0 && !slices.Contains(about.Methods, "client_secret_basic") {
		style = oauth2.AuthStyleInParams
	}
	scopes := l.policy.Scopes
	if len(scopes) == 0 {
		scopes = []string{"email"}
	}
	return &oauth2.Config{ClientID: l.policy.ClientID, ClientSecret: l.client, RedirectURL: x.origin() + callbackPath, Scopes: append([]string{"openid"}, scopes...),
		Endpoint: oauth2.Endpoint{AuthURL: about.Authorize, TokenURL: about.Token, AuthStyle: style}}
}

// sendAway sends the visitor to the issuer.
func (x *exchange) sendAway(l *login, browser string) (refusal *page, reason string) {
	about, err := x.web.s.issuer(l.policy.Issuer).endpoints(x.ctx)
	if err != nil {
		return &issuerAway, reasonIssuer
	}
	if b, err := base64.RawURLEncoding.DecodeString(browser); err != nil || len(b) != 32 {
		b = make([]byte, 32)
		rand.Read(b) // never fails
		browser = base64.RawURLEncoding.EncodeToString(b)
	}
	a := attemptAt{Return: x.in.URL.RequestURI(), Verifier: oauth2.GenerateVerifier(), Until: time.Now().Add(loginTime).Unix()}
	if len(a.Return) > maxReturn {
		a.Return = "/"
	}
	state, err := l.pack("state "+browser, x.host, &a)
	if err != nil {
		return &loginBroken, reasonAuth
	}
	x.setCookie(browserCookie, browser, loginTime)
	x.ruled.answer.Set("Location", l.oauth(x, about).AuthCodeURL(state, oauth2.S256ChallengeOption(a.Verifier), oauth2.SetAuthURLParam("nonce", a.nonce())))
	return &loginFirst, ""
}

// comeBack completes a login, if it began in this browser.
func (x *exchange) comeBack(l *login, browser string, from netip.Addr) (refusal *page, reason string) {
	x.ruled.answer.Set("Referrer-Policy", "no-referrer") // the address holds the code
	s, q := x.web.s, x.in.URL.Query()
	now := time.Now()
	var a attemptAt
	if x.in.Method != http.MethodGet || browser == "" || !l.unpack("state "+browser, x.host, q.Get("state"), &a) || now.Unix() >= a.Until {
		return &loginFailed, reasonAuth
	}
	if iss := q.Get("iss"); iss != "" && iss != l.policy.Issuer { // RFC 9207
		return &loginFailed, reasonAuth
	}
	if q.Get("error") != "" || q.Get("code") == "" {
		return &loginRefused, reasonAuth
	}
	if wait := s.buckets.spent(failures, from, now); wait > 0 {
		return x.later(&guessing, wait), reasonAuth
	}
	who, err := x.redeem(l, &a, q.Get("code"))
	if err == errIssuer {
		return &issuerAway, reasonIssuer
	}
	if err != nil {
		s.buckets.take(failures, from, now)
		s.log.Info("a login failed", "exposure", l.key.String(), "request", x.id, "err", err)
		return &loginFailed, reasonAuth
	}
	if !l.lets(who) {
		return &loginRefused, reasonAuth
	}
	text, err := l.pack("session", x.host, who)
	if err != nil || len(text) > maxCookie {
		return &loginBroken, reasonAuth
	}
	x.setCookie(sessionCookie, text, l.policy.Lasts())
	x.ruled.answer.Set("Location", x.origin()+a.Return) // what begins with the origin leads nowhere else
	return &loginDone, ""
}

// redeem gets the visitor's token for the code, and checks it.
func (x *exchange) redeem(l *login, a *attemptAt, code string) (*session, error) {
	s := x.web.s
	keys := s.issuer(l.policy.Issuer)
	about, err := keys.endpoints(x.ctx)
	if err != nil {
		return nil, err
	}
	select {
	case s.issuers.fetching <- struct{}{}:
		defer func() { <-s.issuers.fetching }()
	case <-x.ctx.Done():
		return nil, errIssuer
	}
	ctx := context.WithValue(x.ctx, oauth2.HTTPClient, &s.issuers.client)
	answer, err := l.oauth(x, about).Exchange(ctx, code, oauth2.VerifierOption(a.Verifier))
	if err != nil {
		if e, ok := errors.AsType[*oauth2.RetrieveError](err); ok { // without its body
			return nil, errors.New("the issuer refuses the code: " + e.Response.Status + " " + fieldText(e.ErrorCode))
		}
		return nil, errors.New("the issuer can't be asked for a token")
	}
	text, _ := answer.Extra("id_token").(string)
	if text == "" || len(text) > maxIDToken {
		return nil, errors.New("the issuer has sent no token")
	}
	token, err := jwt.ParseSigned(text, algorithms)
	if err != nil || len(token.Headers) != 1 {
		return nil, errors.New("the issuer's token can't be read")
	}
	set, err := keys.keysFor(ctx, token.Headers[0].KeyID)
	if err != nil {
		return nil, err
	}
	all := map[string]any{}
	now := time.Now()
	claims, ok := verifyToken(token, set, jwt.Expected{Issuer: l.policy.Issuer, AnyAudience: []string{l.policy.ClientID}, Time: now}, &all)
	azp, _ := all["azp"].(string)
	nonce, _ := all["nonce"].(string)
	switch {
	case !ok || claims.Subject == "":
		return nil, errors.New("the issuer's token is not for this")
	case nonce != a.nonce():
		return nil, errors.New("the issuer's token is of another login")
	case len(claims.Audience) > 1 && azp == "" || azp != "" && azp != l.policy.ClientID: // OpenID Connect Core 1.0 section 3.1.3.7
		return nil, errors.New("the issuer's token was made for another client")
	}
	who := &session{Subject: claims.Subject, Until: now.Add(l.policy.Lasts()).Unix()}
	if v := all["email_verified"]; v == true || v == "true" {
		email, _ := all["email"].(string)
		if strings.Count(email, "@") == 1 {
			who.Email = strings.ToLower(email)
		}
	}
	claim := l.policy.GroupsClaim
	if claim == "" {
		claim = "groups"
	}
	list, _ := all[claim].([]any)
	if one, ok := all[claim].(string); ok {
		list = []any{one}
	}
	for _, g := range list {
		if g, ok := g.(string); ok && slices.Contains(l.policy.Groups, g) && !slices.Contains(who.Groups, g) {
			who.Groups = append(who.Groups, g)
		}
	}
	return who, nil
}

// setCookie sets a cookie with the gateway's own answer; none lives 0.
func (x *exchange) setCookie(name, value string, lives time.Duration) {
	age := int(lives / time.Second)
	if age == 0 {
		age = -1 // deletes it
	}
	c := http.Cookie{Name: name, Value: value, Path: "/", MaxAge: age, Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode}
	x.ruled.answer.Add("Set-Cookie", c.String())
}

// takeCookies takes the gateway's own cookies out of the request.
func (x *exchange) takeCookies() map[string]string {
	own := map[string]string{}
	var rest []string
	for _, line := range x.in.Header["Cookie"] {
		for part := range strings.SplitSeq(line, ";") {
			part = strings.TrimSpace(part)
			name, value, _ := strings.Cut(part, "=")
			switch {
			case strings.HasPrefix(name, cookiePrefix):
				own[name] = value
			case part != "":
				rest = append(rest, part)
			}
		}
	}
	switch {
	case len(own) == 0:
	case len(rest) == 0:
		delete(x.in.Header, "Cookie")
	default:
		x.in.Header["Cookie"] = []string{strings.Join(rest, "; ")}
	}
	return own
}
