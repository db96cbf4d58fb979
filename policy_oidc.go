package webgw

import (
	"slices"
	"strings"
	"time"
)

// OIDC lets in visitors who log in at an issuer (OpenID Connect Core 1.0, by
// the authorization code flow with PKCE). Any one of anyone, emails, domains
// and groups lets in.
type OIDC struct {
	Issuer   string `json:"issuer"` // https URL
	ClientID string `json:"clientID"`

	// Secret is the client's at the issuer, and the key of visitors' sessions,
	// sealed to the exposure's gateways by webgw seal.
	Secret Sealed `json:"secret"`

	Scopes      []string `json:"scopes,omitempty"`      // besides openid; none: email
	Anyone      bool     `json:"anyone,omitempty"`      // whoever the issuer knows
	Emails      []string `json:"emails,omitempty"`      // addresses that the issuer has verified, in lower case
	Domains     []string `json:"domains,omitempty"`     // of such addresses
	Groups      []string `json:"groups,omitempty"`      // of which the visitor must be in one
	GroupsClaim string   `json:"groupsClaim,omitempty"` // the token's claim that holds them; "": groups
	Session     string   `json:"session,omitempty"`     // how long a login counts, such as 8h; "": 8h
}

const (
	maxOIDCList = 100
	maxGroups   = 20
	maxSession  = 30 * 24 * time.Hour
	minSession  = time.Minute
	sessionTime = 8 * time.Hour
)

// Lasts returns how long a login counts.
func (o *OIDC) Lasts() time.Duration {
	if d, err := time.ParseDuration(o.Session); err == nil && d >= minSession && d <= maxSession {
		return d
	}
	return sessionTime
}

func (o *OIDC) validate() error {
	if o == nil {
		return nil
	}
	if err := CheckHTTPS("issuer", o.Issuer); err != nil {
		return err
	}
	if o.ClientID == "" {
		return invalid("clientID", "missing")
	}
	if err := checkText("clientID", o.ClientID, 300); err != nil {
		return err
	}
	if _, err := o.Secret.Boxes(); err != nil {
		return in("secret", err)
	}
	lists := [...]struct {
		name string
		list []string
		most int
	}{{"scopes", o.Scopes, maxGroups}, {"emails", o.Emails, maxOIDCList}, {"domains", o.Domains, maxOIDCList}, {"groups", o.Groups, maxGroups}}
	for _, l := range lists {
		if len(l.list) > l.most {
			return invalid(l.name, "holds more than %d", l.most)
		}
		for i, s := range l.list {
			f := index(l.name, i)
			if s == "" || slices.Contains(l.list[:i], s) {
				return invalid(f, "is empty or stands twice")
			}
			if err := checkText(f, s, 100); err != nil {
				return err
			}
			switch {
			case l.name == "scopes" && strings.ContainsAny(s, ` "\`):
				return invalid(f, "must be one scope")
			case l.name == "groups" && strings.Contains(s, ","):
				return invalid(f, "must not hold a comma")
			case l.name == "emails" && (!strings.Contains(s, "@") || s != strings.ToLower(s)):
				return invalid(f, "%q is not an address in lower case", clip(s, 60))
			case l.name == "domains" && (strings.Contains(s, "@") || s != strings.ToLower(s)):
				return invalid(f, "%q is not a domain in lower case, such as example.org", clip(s, 60))
			}
		}
	}
	if o.Anyone == (len(o.Emails)+len(o.Domains)+len(o.Groups) > 0) {
		return invalid("", "must hold either emails, domains or groups, or anyone: true")
	}
	if err := checkText("groupsClaim", o.GroupsClaim, 100); err != nil {
		return err
	}
	if d, err := time.ParseDuration(o.Session); o.Session != "" && (err != nil || d < minSession || d > maxSession) {
		return invalid("session", "%q is not a time from 1m to 720h, such as 8h", clip(o.Session, 40))
	}
	return nil
}
