package webgw

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ProxyProtocol is a version of the PROXY protocol, by which a workload learns
// whose connection it has got.
type ProxyProtocol string

// The versions (https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt).
const (
	ProxyV1 ProxyProtocol = "v1" // a line of text
	ProxyV2 ProxyProtocol = "v2" // binary; for protocol tls with the server name and the visitor's first ALPN protocol
)

// Policy says who may use an exposure, and how much. Each gateway that carries
// it counts for itself. nil: everybody, within the gateway's own limits.
type Policy struct {
	Allow          []netip.Prefix `json:"allow,omitempty"`          // visitors who may come; none: all
	Deny           []netip.Prefix `json:"deny,omitempty"`           // visitors who may not, whatever allow says
	AllowCountries []string       `json:"allowCountries,omitempty"` // codes of ISO 3166-1; with allow: either lets in
	DenyCountries  []string       `json:"denyCountries,omitempty"`
	Concurrent     int            `json:"concurrent,omitempty"` // streams, or HTTP requests, at once; 0: no limit
	Bandwidth      *Bandwidth     `json:"bandwidth,omitempty"`
	Timeouts       *Timeouts      `json:"timeouts,omitempty"`
	ConnectionRate *RateLimit     `json:"connectionRate,omitempty"` // of new connections

	// The rest belongs to protocol http.

	RequestRate *RateLimit `json:"requestRate,omitempty"`
	MaxBody     int64      `json:"maxBody,omitempty"`     // bytes of a request's body; 0: no limit
	MaxResponse int64      `json:"maxResponse,omitempty"` // bytes of an answer's body, as the workload sends it; 0: no limit
	HTTPSOnly   bool       `json:"httpsOnly,omitempty"`   // plain HTTP is redirected; so it is whenever visitors must identify themselves
	HSTS        *HSTS      `json:"hsts,omitempty"`
	BasicAuth   *BasicAuth `json:"basicAuth,omitempty"`
	JWT         *JWT       `json:"jwt,omitempty"`      // with basicAuth: either lets in
	OIDC        *OIDC      `json:"oidc,omitempty"`     // with basicAuth and jwt: any of them lets in
	Compress    *Compress  `json:"compress,omitempty"` // answers
	ClientCA    string     `json:"clientCA,omitempty"` // PEM of the authorities that every visitor must show a certificate of
}

// Identifies reports whether visitors must identify themselves, so that plain
// HTTP, by which secrets would travel in clear, is never served.
func (p *Policy) Identifies() bool {
	return p.BasicAuth != nil || p.JWT != nil || p.OIDC != nil || p.ClientCA != ""
}

// RateLimit bounds events per time.
type RateLimit struct {
	Address *Rate `json:"address,omitempty"` // of one visitor: an IPv4 address or an IPv6 /64
	Total   *Rate `json:"total,omitempty"`   // of all together
}

// Rate is a token bucket.
type Rate struct {
	Rate  string `json:"rate"`            // "10/s", "100/m", "5/h"
	Burst int    `json:"burst,omitempty"` // how many at once; 0: as many as the rate's number
}

// PerSecond returns the rate in events per second and the burst; 0 for a rate
// that is not valid.
func (r *Rate) PerSecond() (rate float64, burst int) {
	number, unit, _ := strings.Cut(r.Rate, "/")
	n, err := strconv.Atoi(number)
	if err != nil || strconv.Itoa(n) != number || n < 1 || n > maxRate {
		return 0, 0
	}
	per := map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour}[unit]
	if per == 0 {
		return 0, 0
	}
	burst = n
	if r.Burst > 0 {
		burst = r.Burst
	}
	return float64(n) / per.Seconds(), burst
}

// HSTS makes browsers use https for the name from then on (RFC 6797).
type HSTS struct {
	MaxAge            int  `json:"maxAge"`                      // seconds; 0 makes browsers forget it
	IncludeSubdomains bool `json:"includeSubdomains,omitempty"` // names below it too
	Preload           bool `json:"preload,omitempty"`           // browsers' makers may build it in
}

// BasicAuth lets in visitors with a password (RFC 7617).
type BasicAuth struct {
	Realm string `json:"realm,omitempty"` // shown by browsers; "" is the host name
	Users []User `json:"users"`
}

// User is a visitor with a password.
type User struct {
	Name string `json:"name"`
	Hash string `json:"hash"` // of the password: bcrypt, or argon2id in its PHC form
}

// JWT lets in visitors with a signed token (RFC 7519) in Authorization: Bearer.
// It must be signed by one of the keys, asymmetrically, and must expire. Without
// keys, gateways ask the issuer for them (OpenID Connect Discovery 1.0).
type JWT struct {
	Issuer    string   `json:"issuer"`              // the token's iss; an https URL where keys are missing
	Audiences []string `json:"audiences,omitempty"` // one of them must stand in the token's aud; none: not looked at, which needs keys
	Keys      string   `json:"keys,omitempty"`      // JSON Web Key Set (RFC 7517) of public keys
}

// Limits of policies.
const (
	maxPrefixes  = 1_000
	maxRate      = 1_000_000
	maxUsers     = 200
	maxAudiences = 16
	maxKeys      = 16       // of a JWK set, or certificates of a client CA
	maxKeyText   = 32 << 10 // bytes of either
	maxBody      = 1 << 50
	maxHSTS      = 2 * 366 * 24 * 60 * 60 // seconds
	yearHSTS     = 365 * 24 * 60 * 60     // at least so for preload lists
)

// validateHandling checks what is said beyond where the exposure leads.
func (e *Exposure) validateHandling() error {
	switch e.ProxyProtocol {
	case "":
	case ProxyV1, ProxyV2:
		if e.Protocol != TCP && e.Protocol != TLS {
			return invalid("proxyProtocol", "belongs to protocols tcp and tls; http tells the visitor's address in Forwarded")
		}
	default:
		return invalid("proxyProtocol", "%q is not known; v1 and v2 are", clip(string(e.ProxyProtocol), 20))
	}
	switch {
	case !e.Connect:
	case e.Protocol != HTTP:
		return invalid("connect", "belongs to protocol http only")
	case e.UpstreamTLS != nil:
		return invalid("connect", "passes bytes on as they are, and does not go with upstreamTLS")
	case len(e.Targets) == 0:
		return invalid("connect", "leads to the exposure's own targets, of which there are none")
	}
	if e.Policy != nil {
		if err := in("policy", e.Policy.validate(e.Protocol)); err != nil {
			return err
		}
	}
	return e.validateRules()
}

func (p *Policy) validate(protocol ExposureProtocol) error {
	if err := checkPrefixes("allow", p.Allow); err != nil {
		return err
	}
	if err := checkPrefixes("deny", p.Deny); err != nil {
		return err
	}
	if err := checkCountries("allowCountries", p.AllowCountries); err != nil {
		return err
	}
	if err := checkCountries("denyCountries", p.DenyCountries); err != nil {
		return err
	}
	if p.Concurrent < 0 || p.Concurrent > maxRate {
		return invalid("concurrent", "must be from 1 to %d", maxRate)
	}
	if err := in("bandwidth", p.Bandwidth.validate()); err != nil {
		return err
	}
	if err := in("timeouts", p.Timeouts.validate(protocol)); err != nil {
		return err
	}
	if err := in("connectionRate", p.ConnectionRate.validate()); err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		set  bool
	}{{"requestRate", p.RequestRate != nil}, {"maxBody", p.MaxBody != 0}, {"maxResponse", p.MaxResponse != 0}, {"httpsOnly", p.HTTPSOnly}, {"hsts", p.HSTS != nil},
		{"compress", p.Compress != nil}, {"basicAuth", p.BasicAuth != nil}, {"jwt", p.JWT != nil}, {"oidc", p.OIDC != nil}, {"clientCA", p.ClientCA != ""}} {
		if f.set && protocol != HTTP {
			return invalid(f.name, "belongs to protocol http only; the gateway does not look into %s", protocol)
		}
	}
	if err := in("requestRate", p.RequestRate.validate()); err != nil {
		return err
	}
	if p.MaxBody < 0 || p.MaxBody > maxBody {
		return invalid("maxBody", "must be a number of bytes up to 2^50")
	}
	if p.MaxResponse < 0 || p.MaxResponse > maxBody {
		return invalid("maxResponse", "must be a number of bytes up to 2^50")
	}
	if err := in("hsts", p.HSTS.validate()); err != nil {
		return err
	}
	if err := in("compress", p.Compress.validate()); err != nil {
		return err
	}
	if err := in("basicAuth", p.BasicAuth.validate()); err != nil {
		return err
	}
	if err := in("jwt", p.JWT.validate()); err != nil {
		return err
	}
	if err := in("oidc", p.OIDC.validate()); err != nil {
		return err
	}
	if p.ClientCA == "" {
		return nil
	}
	_, err := ParseAuthorities("clientCA", p.ClientCA)
	return err
}

func checkPrefixes(field string, list []netip.Prefix) error {
	if len(list) > maxPrefixes {
		return invalid(field, "holds more than %d ranges", maxPrefixes)
	}
	for i, p := range list {
		if !p.IsValid() || p.Masked() != p || p.Addr().Is4In6() {
			return invalid(index(field, i), "must be a network prefix with no host bits set, IPv4 not written as IPv6")
		}
		if slices.Contains(list[:i], p) {
			return invalid(index(field, i), "stands twice")
		}
	}
	return nil
}

func (l *RateLimit) validate() error {
	if l == nil {
		return nil
	}
	if l.Address == nil && l.Total == nil {
		return invalid("", "must hold address, total or both")
	}
	if err := in("address", l.Address.validate()); err != nil {
		return err
	}
	return in("total", l.Total.validate())
}

func (r *Rate) validate() error {
	if r == nil {
		return nil
	}
	if r.Burst < 0 || r.Burst > maxRate {
		return invalid("burst", "must be from 1 to %d", maxRate)
	}
	if perSecond, _ := r.PerSecond(); perSecond == 0 {
		return invalid("rate", "%q is not a number up to %d and a time, such as 10/s, 100/m or 5/h", clip(r.Rate, 40), maxRate)
	}
	return nil
}

func (h *HSTS) validate() error {
	switch {
	case h == nil:
	case h.MaxAge < 0 || h.MaxAge > maxHSTS:
		return invalid("maxAge", "must be from 0 to %d seconds", maxHSTS)
	case h.Preload && (!h.IncludeSubdomains || h.MaxAge < yearHSTS):
		return invalid("preload", "needs includeSubdomains and a maxAge of at least %d", yearHSTS)
	}
	return nil
}

func (b *BasicAuth) validate() error {
	if b == nil {
		return nil
	}
	if err := checkText("realm", b.Realm, 100); err != nil {
		return err
	}
	if strings.ContainsAny(b.Realm, `"\`) {
		return invalid("realm", "must not hold quotes or backslashes")
	}
	if len(b.Users) == 0 || len(b.Users) > maxUsers {
		return invalid("users", "must hold 1 to %d users", maxUsers)
	}
	seen := map[string]bool{}
	for i, u := range b.Users {
		f := index("users", i)
		switch {
		case u.Name == "":
			return invalid(f+".name", "missing")
		case strings.Contains(u.Name, ":"):
			return invalid(f+".name", "must not hold a colon (RFC 7617 section 2)")
		case seen[u.Name]:
			return invalid(f+".name", "%q stands twice", clip(u.Name, 60))
		}
		if err := checkText(f+".name", u.Name, 100); err != nil {
			return err
		}
		if _, err := ParsePasswordHash(u.Hash); err != nil {
			return in(f+".hash", err)
		}
		seen[u.Name] = true
	}
	return nil
}

// PasswordHash is a password's hash taken apart.
type PasswordHash struct {
	Bcrypt  string // whole, if it is bcrypt
	Memory  uint32 // KiB; argon2id from here on
	Time    uint32
	Threads uint8
	Salt    []byte
	Sum     []byte
}

// The cost of a hash is bounded on both sides: cheap ones are guessed once a
// record is seen, dear ones are work that strangers can cause.
const (
	minBcrypt, maxBcrypt     = 10, 12
	minArgonKiB, maxArgonKiB = 7 << 10, 64 << 10
	maxArgonTime             = 5
	maxArgonThreads          = 4
)

// ParsePasswordHash reads "$2b$10$…" (bcrypt, cost 10 to 12) or
// "$argon2id$v=19$m=19456,t=2,p=1$salt$hash" (RFC 9106; 7 to 64 MiB, up to 5
// passes and 4 threads).
func ParsePasswordHash(s string) (h PasswordHash, err error) {
	part := strings.Split(s, "$")
	switch {
	case len(part) == 4 && (part[1] == "2a" || part[1] == "2b" || part[1] == "2y"):
		cost, err := strconv.Atoi(part[2])
		if err != nil || len(s) != 60 || len(part[2]) != 2 || strings.Trim(part[3], "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz") != "" {
			return h, invalid("", "is not a bcrypt hash of 60 characters")
		}
		if cost < minBcrypt || cost > maxBcrypt {
			return h, invalid("", "has cost %d; it must be from %d to %d (htpasswd -nB -C %d NAME)", cost, minBcrypt, maxBcrypt, minBcrypt)
		}
		return PasswordHash{Bcrypt: s}, nil
	case len(part) == 6 && part[0] == "" && part[1] == "argon2id" && part[2] == "v=19":
		numbers := strings.Split(part[3], ",")
		if len(numbers) != 3 {
			break
		}
		var n [3]uint64
		for i, name := range []string{"m=", "t=", "p="} {
			digits, ok := strings.CutPrefix(numbers[i], name)
			if n[i], err = strconv.ParseUint(digits, 10, 32); !ok || err != nil {
				return h, invalid("", "must have parameters such as m=19456,t=2,p=1")
			}
		}
		if n[0] < minArgonKiB || n[0] > maxArgonKiB || n[1] < 1 || n[1] > maxArgonTime || n[2] < 1 || n[2] > maxArgonThreads {
			return h, invalid("", "must have m from %d to %d, t from 1 to %d, p from 1 to %d", minArgonKiB, maxArgonKiB, maxArgonTime, maxArgonThreads)
		}
		h = PasswordHash{Memory: uint32(n[0]), Time: uint32(n[1]), Threads: uint8(n[2])}
		var err1, err2 error
		h.Salt, err1 = base64.RawStdEncoding.Strict().DecodeString(part[4])
		h.Sum, err2 = base64.RawStdEncoding.Strict().DecodeString(part[5])
		if err1 != nil || err2 != nil || len(h.Salt) < 8 || len(h.Salt) > 64 || len(h.Sum) < 16 || len(h.Sum) > 64 {
			return h, invalid("", "must end in base64 of a salt of 8 to 64 and a hash of 16 to 64 bytes")
		}
		return h, nil
	}
	return h, invalid("", "must be a bcrypt ($2b$…) or argon2id ($argon2id$v=19$…) hash, never a password")
}

func (j *JWT) validate() error {
	if j == nil {
		return nil
	}
	if j.Issuer == "" {
		return invalid("issuer", "missing")
	}
	if err := checkText("issuer", j.Issuer, 500); err != nil {
		return err
	}
	if len(j.Audiences) > maxAudiences {
		return invalid("audiences", "holds more than %d", maxAudiences)
	}
	for i, a := range j.Audiences {
		if a == "" || slices.Contains(j.Audiences[:i], a) {
			return invalid(index("audiences", i), "is empty or stands twice")
		}
		if err := checkText(index("audiences", i), a, 500); err != nil {
			return err
		}
	}
	if j.Keys == "" {
		if err := CheckHTTPS("issuer", j.Issuer); err != nil {
			return err
		}
		if len(j.Audiences) == 0 {
			return invalid("audiences", "missing: many others get tokens of the same issuer")
		}
		return nil
	}
	if len(j.Keys) > maxKeyText {
		return invalid("keys", "is longer than %d KiB", maxKeyText>>10)
	}
	var set struct {
		Keys []map[string]any `json:"keys"`
	}
	if err := json.Unmarshal([]byte(j.Keys), &set); err != nil || len(set.Keys) == 0 || len(set.Keys) > maxKeys {
		return invalid("keys", `must be a JSON Web Key Set of 1 to %d keys: {"keys": [{"kty": …}]}`, maxKeys)
	}
	for _, k := range set.Keys {
		// Whether a key is a point on its curve shows when it is used: then
		// nobody gets in.
		switch k["kty"] {
		case "RSA", "EC", "OKP":
		case "oct":
			return invalid("keys", "holds a symmetric key, which everybody who sees the record could sign with")
		default:
			return invalid("keys", "holds a key of unknown type; RSA, EC and OKP are known")
		}
		// Checking a signature by a huge key would be work that strangers cause.
		if n, _ := k["n"].(string); k["kty"] == "RSA" && (len(n) < 342 || len(n) > 1366) {
			return invalid("keys", "holds an RSA key of less than 2048 or more than 8192 bits")
		}
		for _, private := range []string{"d", "p", "q", "dp", "dq", "qi", "oth"} {
			if k[private] != nil {
				return invalid("keys", "holds a private key; make a new one, and give its public half only")
			}
		}
	}
	return nil
}

// CheckHTTPS checks a URL that gateways fetch things by: https, with a host
// name, and without user, query and fragment.
func CheckHTTPS(field, s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '#' }) {
		return invalid(field, "%q is not a URL such as https://id.example.org", clip(s, 100))
	}
	return nil
}

// ParseAuthorities reads certificates of authorities in PEM.
func ParseAuthorities(field, text string) ([]*x509.Certificate, error) {
	if len(text) > maxKeyText {
		return nil, invalid(field, "is longer than %d KiB", maxKeyText>>10)
	}
	var out []*x509.Certificate
	for rest := []byte(text); ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			if strings.TrimSpace(string(rest)) != "" || len(out) == 0 {
				return nil, invalid(field, "must be one or more certificates in PEM and nothing else")
			}
			return out, nil
		}
		if strings.Contains(b.Type, "PRIVATE KEY") {
			return nil, invalid(field, "holds a private key; make a new one, and give certificates only")
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err == nil && (b.Type != "CERTIFICATE" || !c.IsCA) {
			err = errors.New("no authority")
		}
		if err != nil || len(out) == maxKeys {
			return nil, invalid(field, "must be 1 to %d certificates of authorities (CA:TRUE) in PEM", maxKeys)
		}
		out = append(out, c)
	}
}
