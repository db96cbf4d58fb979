package ingress

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/bcrypt"
	"golang.org/x/time/rate"

	"webgw.dev/webgw"
)

// Limits of what strangers who claim to be somebody can cause.
const (
	maxCredential = 8 << 10 // bytes of Authorization
	maxGood       = 4096    // verdicts remembered per exposure
	maxBad        = 1024
	goodFor       = 10 * time.Minute // a token counts no longer than it says
	badFor        = time.Minute
	maxHashing    = 32              // requests of one exposure that wait for a hash
	hashingTime   = 5 * time.Second // for which they wait at most
	leeway        = time.Minute     // between the clocks of issuer and gateway
)

// failures bounds how often one address may be wrong. Who was right lately is
// not asked.
var failures = &meter{address: rate.Every(time.Second), burst: 20}

// algorithms are those by which only the holder of a private key can sign.
var algorithms = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA}

// hashing bounds the hashes worked out at once in the whole process: visitors
// whose passwords are known must not wait for those who guess.
type hashing chan struct{}

func newHashing() hashing { return make(hashing, max(1, runtime.GOMAXPROCS(0)/2)) }

// authenticator decides who a visitor is.
type authenticator struct {
	users map[string]webgw.PasswordHash // nil: no passwords
	dummy webgw.PasswordHash            // compared for unknown users
	realm string
	jwt   *webgw.JWT // nil: no tokens
	keys  jose.JSONWebKeySet

	secret [32]byte      // of the cache's keys
	turn   chan struct{} // capacity 1: one hash at a time
	queue  chan struct{} // capacity maxHashing

	mu   sync.Mutex
	good map[[32]byte]verdictOf
	bad  map[[32]byte]verdictOf
}

// verdictOf is what is remembered of a credential.
type verdictOf struct {
	who   string
	until time.Time
}

// newAuthenticator returns nil if the policy asks nobody, and one that lets
// nobody in with an error.
func newAuthenticator(p *webgw.Policy) (*authenticator, error) {
	if p.BasicAuth == nil && p.JWT == nil {
		return nil, nil
	}
	a := &authenticator{turn: make(chan struct{}, 1), queue: make(chan struct{}, maxHashing), good: map[[32]byte]verdictOf{}, bad: map[[32]byte]verdictOf{}}
	rand.Read(a.secret[:]) // never fails
	if p.JWT != nil {
		a.jwt = p.JWT
	}
	if p.JWT != nil && p.JWT.Keys != "" {
		if err := json.Unmarshal([]byte(p.JWT.Keys), &a.keys); err != nil {
			a.keys = jose.JSONWebKeySet{}
			return a, err
		}
	}
	if p.BasicAuth != nil {
		a.users, a.realm = map[string]webgw.PasswordHash{}, p.BasicAuth.Realm
		for _, u := range p.BasicAuth.Users {
			h, err := webgw.ParsePasswordHash(u.Hash)
			if err != nil {
				a.users = map[string]webgw.PasswordHash{}
				return a, err
			}
			a.users[u.Name], a.dummy = h, h
		}
	}
	return a, nil
}

// challenges are the values of WWW-Authenticate (RFC 9110 section 11.6.1).
func (a *authenticator) challenges(host string, wrong bool) (out []string) {
	if a.users != nil {
		realm := a.realm
		if realm == "" {
			realm = host
		}
		out = append(out, `Basic realm="`+realm+`", charset="UTF-8"`)
	}
	if a.jwt != nil {
		c := "Bearer"
		if wrong {
			c += ` error="invalid_token"` // RFC 6750 section 3.1
		}
		out = append(out, c)
	}
	return out
}

var (
	errNobody = errors.New("ingress: no credentials")
	errWrong  = errors.New("ingress: wrong credentials")
	errGuess  = errors.New("ingress: wrong credentials too often")
	errHashes = errors.New("ingress: too many passwords to check")
)

// identify returns who the request is from. basic reports that it was by
// password. wait is for errGuess.
func (a *authenticator) identify(s *Server, r *http.Request, from netip.Addr) (who string, basic bool, wait time.Duration, err error) {
	values := r.Header["Authorization"]
	if len(values) == 0 {
		return "", false, 0, errNobody
	}
	scheme, credential, _ := strings.Cut(values[0], " ")
	basic = a.users != nil && strings.EqualFold(scheme, "Basic")
	if len(values) > 1 || len(values[0]) > maxCredential || !basic && (a.jwt == nil || !strings.EqualFold(scheme, "Bearer")) {
		return "", false, 0, errWrong
	}
	key := a.key(scheme, credential)
	now := time.Now()
	if who, known, ok := a.recall(key, now); known {
		if !ok {
			return "", basic, 0, errWrong
		}
		return who, basic, 0, nil
	}
	if wait := s.buckets.spent(failures, from, now); wait > 0 {
		return "", basic, wait, errGuess
	}
	var until time.Time
	if basic {
		who, err = a.checkPassword(s, r, key, credential)
		until = now.Add(goodFor)
	} else {
		who, until, err = a.checkToken(s, r.Context(), credential, now)
	}
	switch err {
	case nil:
		a.remember(a.good, maxGood, key, verdictOf{who, until})
	case errWrong:
		s.buckets.take(failures, from, now)
		a.remember(a.bad, maxBad, key, verdictOf{"", now.Add(badFor)})
	}
	return who, basic, 0, err
}

// key is that of a credential in the cache, which thus holds no passwords.
func (a *authenticator) key(scheme, credential string) (k [32]byte) {
	h := hmac.New(sha256.New, a.secret[:])
	h.Write([]byte(strings.ToLower(scheme)))
	h.Write([]byte{0})
	h.Write([]byte(credential))
	h.Sum(k[:0])
	return k
}

func (a *authenticator) recall(k [32]byte, now time.Time) (who string, known, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if v, ok := a.good[k]; ok && now.Before(v.until) {
		return v.who, true, true
	}
	v, known := a.bad[k]
	return "", known && now.Before(v.until), false
}

// remember keeps a verdict; one of a full cache makes room. Those who are wrong
// can't push out those who are right.
func (a *authenticator) remember(cache map[[32]byte]verdictOf, most int, k [32]byte, v verdictOf) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(cache) >= most {
		for old := range cache {
			delete(cache, old)
			break
		}
	}
	cache[k] = v
}

// checkPassword compares a password with its hash, in turn.
func (a *authenticator) checkPassword(s *Server, r *http.Request, key [32]byte, credential string) (who string, err error) {
	plain, err := base64.StdEncoding.DecodeString(credential)
	name, password, ok := strings.Cut(string(plain), ":")
	if err != nil || !ok {
		return "", errWrong
	}
	select {
	case a.queue <- struct{}{}:
		defer func() { <-a.queue }()
	default:
		return "", errHashes
	}
	late := time.NewTimer(hashingTime)
	defer late.Stop()
	for _, turn := range []chan struct{}{a.turn, s.hashing} {
		select {
		case turn <- struct{}{}:
			defer func() { <-turn }()
		case <-late.C:
			return "", errHashes
		case <-r.Context().Done():
			return "", errHashes
		}
	}
	// The same browser may have asked in parallel.
	if who, known, ok := a.recall(key, time.Now()); known {
		if !ok {
			return "", errWrong
		}
		return who, nil
	}
	hash, known := a.users[name]
	if !known {
		hash = a.dummy // takes as long, so that names can't be found out
	}
	if !matches(hash, password) || !known {
		return "", errWrong
	}
	return name, nil
}

// matches compares in time that depends on the hash only.
func matches(h webgw.PasswordHash, password string) bool {
	if h.Bcrypt != "" {
		return bcrypt.CompareHashAndPassword([]byte(h.Bcrypt), []byte(password)) == nil
	}
	if len(h.Sum) == 0 {
		return false
	}
	sum := argon2.IDKey([]byte(password), h.Salt, h.Time, h.Memory, h.Threads, uint32(len(h.Sum)))
	return subtle.ConstantTimeCompare(sum, h.Sum) == 1
}

// checkToken checks a signed token, and returns its subject and until when it
// may be remembered.
func (a *authenticator) checkToken(s *Server, ctx context.Context, token string, now time.Time) (who string, until time.Time, err error) {
	t, err := jwt.ParseSigned(token, algorithms)
	if err != nil || len(t.Headers) != 1 {
		return "", until, errWrong
	}
	h := t.Headers[0]
	keys := a.keys.Keys
	if a.jwt.Keys == "" {
		var claims jwt.Claims
		// What the token says of itself is not to be believed yet, but spares asking
		// on behalf of those that can't be good.
		if t.UnsafeClaimsWithoutVerification(&claims) != nil || claims.Issuer != a.jwt.Issuer || claims.Expiry == nil || claims.Expiry.Time().Add(leeway).Before(now) {
			return "", until, errWrong
		}
		if keys, err = s.issuer(a.jwt.Issuer).keysFor(ctx, h.KeyID); err != nil {
			return "", until, err
		}
	}
	claims, found := verifyToken(t, keys, jwt.Expected{Issuer: a.jwt.Issuer, AnyAudience: a.jwt.Audiences, Time: now})
	if !found {
		return "", until, errWrong
	}
	until = now.Add(goodFor)
	if end := claims.Expiry.Time().Add(leeway); end.Before(until) {
		until = end
	}
	return claims.Subject, until, nil
}

// verifyToken checks a token by those of keys that fit it. more is filled with
// its claims as well.
func verifyToken(t *jwt.JSONWebToken, keys []jose.JSONWebKey, want jwt.Expected, more ...any) (claims jwt.Claims, ok bool) {
	h := t.Headers[0]
	for _, k := range keys {
		if h.KeyID != "" && k.KeyID != "" && k.KeyID != h.KeyID || k.Algorithm != "" && k.Algorithm != h.Algorithm || !usable(&k) || !slices.Contains(algorithmsOf(&k), jose.SignatureAlgorithm(h.Algorithm)) {
			continue
		}
		claims = jwt.Claims{}
		if t.Claims(k, append([]any{&claims}, more...)...) == nil {
			return claims, claims.Expiry != nil && claims.ValidateWithLeeway(want, leeway) == nil
		}
	}
	return claims, false
}

// fieldText makes a text fit for a field's value: what is not printable ASCII
// is written as in URLs.
func fieldText(s string) string {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return url.PathEscape(s)
		}
	}
	return strings.Trim(s, " ")
}
