package ingress

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"webgw.dev/webgw"
)

// Of the keys that issuers of tokens publish (OpenID Connect Discovery 1.0).
const (
	issuerFresh = time.Hour      // after which keys are fetched again, while the old ones still count
	issuerStale = 24 * time.Hour // after which they count no more
	issuerPause = time.Minute    // between two fetches, whatever keys tokens name
	issuerAgain = 10 * time.Second
	issuerTime  = 5 * time.Second // for one document
	issuerSize  = 256 << 10       // bytes of one document
	issuerKeys  = 32              // used of a set
	issuersMost = 4096            // remembered
	fetchesMost = 16              // at once
)

// IssuerUnavailable is the code of the problem that a token issuer's keys can't
// be had.
const IssuerUnavailable = "issuer_unavailable"

var errIssuer = errors.New("ingress: the issuer's keys can't be had")

// issuers are the token issuers that policies name, each known by its URL only.
type issuers struct {
	mu       sync.Mutex
	by       map[string]*issuer
	fetching chan struct{}  // capacity fetchesMost
	running  sync.WaitGroup // fetches
	client   http.Client
}

// issuer is the keys of one.
type issuer struct {
	s   *Server
	url string

	mu      sync.Mutex
	about   *issuerAbout
	keys    []jose.JSONWebKey
	fetched time.Time     // when keys came
	tried   time.Time     // when they were last asked for
	failed  error         // why that failed; nil: it did not
	arrives chan struct{} // closed at the end of the fetch under way; nil: there is none
	used    time.Time
}

func (all *issuers) init(s *Server) {
	all.by, all.fetching = map[string]*issuer{}, make(chan struct{}, fetchesMost)
	all.client = http.Client{
		Timeout:       issuerTime,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext:            s.DialIssuer,
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: s.IssuerRoots},
			DisableKeepAlives:      true, // it is asked once an hour
			MaxResponseHeaderBytes: 32 << 10,
		},
	}
}

// issuer returns the one with that URL.
func (s *Server) issuer(url string) *issuer {
	all := &s.issuers
	now := time.Now()
	all.mu.Lock()
	defer all.mu.Unlock()
	i := all.by[url]
	if i == nil {
		if len(all.by) >= issuersMost { // the one of some that was not used for longest makes room
			var oldest *issuer
			seen := 0
			for _, o := range all.by {
				if oldest == nil || o.used.Before(oldest.used) {
					oldest = o
				}
				if seen++; seen == bucketSamples {
					break
				}
			}
			delete(all.by, oldest.url)
		}
		i = &issuer{s: s, url: url}
		all.by[url] = i
	}
	i.used = now // under the lock of all
	return i
}

// trouble returns why the keys could not be had when they were last asked for.
func (i *issuer) trouble() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.failed
}

// keysFor returns the keys that may have signed a token that names kid. It
// fetches them if there are none, or kid is not among them; while they are only
// not new any more, that is left to the background.
func (i *issuer) keysFor(ctx context.Context, kid string) ([]jose.JSONWebKey, error) {
	if i.s.DialIssuer == nil {
		return nil, errIssuer
	}
	for asked := false; ; asked = true {
		i.mu.Lock()
		now := time.Now()
		valid := len(i.keys) > 0 && now.Sub(i.fetched) < issuerStale
		named := valid && hasKey(i.keys, kid)
		if named && now.Sub(i.fetched) < issuerFresh || asked {
			keys, failed := i.keys, i.failed
			i.mu.Unlock()
			if !valid || !named && failed != nil {
				return nil, errIssuer
			}
			return keys, nil
		}
		pause := issuerPause
		if !valid {
			pause = issuerAgain
		}
		if i.arrives == nil && (i.tried.IsZero() || now.Sub(i.tried) >= pause) {
			i.tried, i.arrives = now, make(chan struct{})
			i.s.issuers.running.Add(1)
			go i.fetch(i.arrives)
		}
		keys, arrives := i.keys, i.arrives
		i.mu.Unlock()
		if named {
			return keys, nil
		}
		if arrives == nil {
			continue // not again so soon
		}
		select {
		case <-arrives:
		case <-ctx.Done():
			return nil, errIssuer
		}
	}
}

func hasKey(keys []jose.JSONWebKey, kid string) bool {
	if kid == "" {
		return true
	}
	for _, k := range keys {
		if k.KeyID == "" || k.KeyID == kid {
			return true
		}
	}
	return false
}

// issuerAbout is what an issuer says of itself, as far as it matters.
type issuerAbout struct {
	Issuer    string   `json:"issuer"`
	Keys      string   `json:"jwks_uri"`
	Authorize string   `json:"authorization_endpoint"`
	Token     string   `json:"token_endpoint"`
	Methods   []string `json:"token_endpoint_auth_methods_supported"`
}

// endpoints returns where visitors log in.
func (i *issuer) endpoints(ctx context.Context) (*issuerAbout, error) {
	if _, err := i.keysFor(ctx, ""); err != nil {
		return nil, err
	}
	i.mu.Lock()
	about := i.about
	i.mu.Unlock()
	for _, u := range [...]string{about.Authorize, about.Token} {
		if p, err := url.Parse(u); err != nil || p.Scheme != "https" || p.Host == "" {
			return nil, errIssuer
		}
	}
	return about, nil
}

// fetch asks for the keys, and closes arrives.
func (i *issuer) fetch(arrives chan struct{}) {
	defer i.s.issuers.running.Done()
	about, keys, err := i.get(i.s.ctx)
	i.mu.Lock()
	if err == nil {
		i.about, i.keys, i.fetched = about, keys, time.Now()
	}
	changed := (err == nil) != (i.failed == nil)
	i.failed, i.arrives = err, nil
	i.mu.Unlock()
	close(arrives)
	result := "ok"
	if err != nil {
		result = "failed"
	}
	i.s.metrics.issuerFetches.WithLabelValues(result).Inc()
	if changed || err != nil {
		i.s.log.Info("asked an issuer for its keys", "issuer", i.url, "keys", len(keys), "err", err)
	}
}

// get fetches what the issuer says of itself, and then its keys.
func (i *issuer) get(ctx context.Context) (*issuerAbout, []jose.JSONWebKey, error) {
	select {
	case i.s.issuers.fetching <- struct{}{}:
		defer func() { <-i.s.issuers.fetching }()
	default:
		return nil, nil, errors.New("too many issuers are being asked")
	}
	var about issuerAbout
	if err := i.document(ctx, strings.TrimSuffix(i.url, "/")+"/.well-known/openid-configuration", &about); err != nil {
		return nil, nil, err
	}
	if about.Issuer != i.url { // section 4.3
		return nil, nil, fmt.Errorf("it calls itself %.100q", about.Issuer)
	}
	if err := webgw.CheckHTTPS("jwks_uri", about.Keys); err != nil {
		return nil, nil, fmt.Errorf("its jwks_uri %.100q is no https URL", about.Keys)
	}
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := i.document(ctx, about.Keys, &set); err != nil {
		return nil, nil, err
	}
	var keys []jose.JSONWebKey
	for _, text := range set.Keys {
		var k jose.JSONWebKey
		if json.Unmarshal(text, &k) == nil && usable(&k) && len(keys) < issuerKeys { // of others it may have for others
			keys = append(keys, k)
		}
	}
	if len(keys) == 0 {
		return nil, nil, errors.New("it publishes no key that tokens could be checked by")
	}
	return &about, keys, nil
}

func (i *issuer) document(ctx context.Context, address string, to any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	r.Header.Set("Accept", "application/json")
	res, err := i.s.issuers.client.Do(r)
	if err != nil {
		if e, ok := errors.AsType[*url.Error](err); ok {
			err = e.Err
		}
		return fmt.Errorf("%s: %w", address, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: the answer is %d", address, res.StatusCode)
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, issuerSize+1))
	if err != nil {
		return fmt.Errorf("%s: %w", address, err)
	}
	if len(b) > issuerSize {
		return fmt.Errorf("%s: the answer is longer than %d KiB", address, issuerSize>>10)
	}
	if err := json.Unmarshal(b, to); err != nil {
		return fmt.Errorf("%s: the answer is not what it should be: %w", address, err)
	}
	return nil
}

// usable reports whether k is a public key that signatures may be checked by.
func usable(k *jose.JSONWebKey) bool {
	return (k.Use == "" || k.Use == "sig") && k.Valid() && k.IsPublic() && len(algorithmsOf(k)) > 0
}

// algorithmsOf returns those that fit the key's type: the token does not choose
// how its key is used.
func algorithmsOf(k *jose.JSONWebKey) []jose.SignatureAlgorithm {
	switch key := k.Key.(type) {
	case *rsa.PublicKey:
		if n := key.N.BitLen(); n >= 2048 && n <= 8192 {
			return algorithms[:6]
		}
	case *ecdsa.PublicKey:
		switch key.Curve.Params().BitSize {
		case 256:
			return algorithms[6:7]
		case 384:
			return algorithms[7:8]
		case 521:
			return algorithms[8:9]
		}
	case ed25519.PublicKey:
		return algorithms[9:]
	}
	return nil
}
