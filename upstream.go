package webgw

import (
	"crypto/sha256"
	"encoding/base64"
	"net/netip"
	"slices"
	"strings"
)

// Upstream is how the gateway speaks HTTP to the workload.
type Upstream string

// How HTTP reaches the workload.
const (
	UpstreamAuto  Upstream = "auto"  // HTTP/1.1, but HTTP/2 for gRPC
	UpstreamHTTP1 Upstream = "http1" // HTTP/1.1 always
	UpstreamH2C   Upstream = "h2c"   // HTTP/2 in clear text with prior knowledge (RFC 9113 section 3.3)
	UpstreamH2    Upstream = "h2"    // HTTP/2 over TLS
)

// UpstreamTLS makes the gateway speak TLS to the workload, and says whom it
// takes for the workload. The zero value: whoever has a certificate for the
// target's host by an authority that the gateway's system trusts.
type UpstreamTLS struct {
	ServerName string   `json:"serverName,omitempty"` // that the certificate must be for; "": the target's host
	CA         string   `json:"ca,omitempty"`         // PEM of the authorities that count instead of the system's
	Pins       []string `json:"pins,omitempty"`       // base64 of the SHA-256 of public keys (SubjectPublicKeyInfo), of which the workload must have one; without ca, its certificate may then be of any kind
}

// maxPins bounds the keys that a workload may have.
const maxPins = 16

// ByPinAlone reports whether a key is all that is asked for: names, dates and
// authorities do not count.
func (u *UpstreamTLS) ByPinAlone() bool { return len(u.Pins) > 0 && u.CA == "" }

// ParsePin reads the SHA-256 of a public key.
func ParsePin(s string) (pin [sha256.Size]byte, err error) {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != len(pin) || base64.StdEncoding.EncodeToString(b) != s {
		return pin, invalid("", "%q is not base64 of a SHA-256 sum", clip(s, 60))
	}
	return [sha256.Size]byte(b), nil
}

// Name returns the name that a target's certificate must be for; "" if that
// can't be told.
func (u *UpstreamTLS) Name(t Target) string {
	if u.ServerName != "" {
		return u.ServerName
	}
	host, _ := t.hostPort()
	return host
}

func (e *Exposure) validateUpstream() error {
	switch e.Upstream {
	case "", UpstreamAuto, UpstreamHTTP1, UpstreamH2C, UpstreamH2:
	default:
		return invalid("upstream", "%q is not known; auto, http1, h2c and h2 are", clip(string(e.Upstream), 20))
	}
	switch u := e.UpstreamTLS; {
	case e.Upstream != "" && e.Protocol != HTTP:
		return invalid("upstream", "belongs to protocol http only")
	case u == nil && e.Upstream == UpstreamH2:
		return invalid("upstream", "h2 is over TLS and needs upstreamTLS; h2c is in clear text")
	case u == nil:
		return nil
	case e.Protocol != HTTP:
		return invalid("upstreamTLS", "belongs to protocol http only; %s is passed through as it is", e.Protocol)
	case e.Upstream == UpstreamH2C:
		return invalid("upstream", "h2c is in clear text; over TLS it is h2")
	}
	return in("upstreamTLS", e.UpstreamTLS.validate(e))
}

func (u *UpstreamTLS) validate(e *Exposure) error {
	if u.ServerName != "" {
		if _, err := netip.ParseAddr(u.ServerName); err != nil && u.ServerName != "localhost" {
			if _, err := checkHost("serverName", u.ServerName, false); err != nil {
				return err
			}
		}
	}
	if u.CA != "" {
		if _, err := ParseAuthorities("ca", u.CA); err != nil {
			return err
		}
	}
	if len(u.Pins) > maxPins {
		return invalid("pins", "holds more than %d keys", maxPins)
	}
	for i, p := range u.Pins {
		if _, err := ParsePin(p); err != nil {
			return in(index("pins", i), err)
		}
		if slices.Contains(u.Pins[:i], p) {
			return invalid(index("pins", i), "stands twice")
		}
	}
	if u.ByPinAlone() {
		return nil
	}
	for field, t := range e.AllTargets() {
		if u.Name(t) == "" {
			return invalid("serverName", "missing: %s is a socket, and does not tell what its certificate must be for", strings.TrimSuffix(field, "."))
		}
	}
	return nil
}
