package webgw

import (
	"fmt"
	"strings"
	"time"
)

// Kind names what a record declares.
type Kind string

// The kinds of records.
const (
	KindFarm     Kind = "farm"
	KindGateway  Kind = "gateway"
	KindNode     Kind = "node"
	KindName     Kind = "name"
	KindZone     Kind = "zone"
	KindNetwork  Kind = "network"
	KindExposure Kind = "exposure"
)

// Kinds lists every kind, in the order in which they apply: what a record may
// refer to comes before it.
var Kinds = []Kind{KindFarm, KindGateway, KindNode, KindName, KindZone, KindNetwork, KindExposure}

// ParseKind reads a kind in singular or plural.
func ParseKind(s string) (Kind, error) {
	for _, k := range Kinds {
		if s == string(k) || s == string(k)+"s" {
			return k, nil
		}
	}
	return "", invalid("kind", "%q is not a kind; known are farm, gateway, node, name, zone, network, exposure", clip(s, 40))
}

// Limits of records. They bound what one signature can make others hold.
const (
	MaxEnvelope = 64 << 10 // bytes of a signed envelope
	MaxTargets  = 32       // targets of an exposure
	MaxHosts    = 32       // host names of an exposure
	MaxGateways = 64       // gateways named by an exposure
	MaxLifetime = 400 * 24 * time.Hour
	MaxSkew     = 10 * time.Minute // clock difference tolerated between two parties
	maxSeq      = 1 << 53          // numbers in canonical JSON are IEEE doubles (RFC 8785 section 3.2.2.3)
)

// Key names a record: at most one live version of it exists.
type Key struct {
	Kind  Kind   `json:"kind"`
	Owner ID     `json:"owner"`
	Name  string `json:"name"`
}

// String gives "kind/owner/name".
func (k Key) String() string { return string(k.Kind) + "/" + k.Owner.String() + "/" + k.Name }

// ParseKey reads what String gives.
func ParseKey(s string) (Key, error) {
	kind, rest, ok1 := strings.Cut(s, "/")
	owner, name, ok2 := strings.Cut(rest, "/")
	if !ok1 || !ok2 {
		return Key{}, invalid("key", "%q is not kind/owner/name", clip(s, 120))
	}
	k, err := ParseKind(kind)
	if err != nil || string(k) != kind {
		return Key{}, invalid("key", "%q is not a kind", clip(kind, 40))
	}
	id, err := ParseID(owner)
	if err != nil {
		return Key{}, in("key", err)
	}
	key := Key{k, id, name}
	return key, key.validate()
}

func (k Key) validate() error {
	if k.Owner.IsZero() {
		return invalid("owner", "missing")
	}
	if k.Kind == KindName || k.Kind == KindZone {
		_, err := checkHost("name", k.Name, false)
		return err
	}
	return CheckLabel("name", k.Name)
}

// Record is one declared statement: a header, and exactly the one body that
// the header's kind names. It is trusted only out of a verified envelope.
//
// A tombstone (Deleted) keeps the body of the version it withdraws, so that
// those who carried it are told.
type Record struct {
	Version int       `json:"v"` // oldest protocol version that understands it
	Kind    Kind      `json:"kind"`
	Owner   ID        `json:"owner"`
	Name    string    `json:"name"`
	Seq     uint64    `json:"seq"` // above every earlier version's; below 2^53
	Issued  time.Time `json:"issued"`
	Expires time.Time `json:"expires"`
	Deleted bool      `json:"deleted,omitempty"`

	Farm      *Farm      `json:"farm,omitempty"`
	Gateway   *Gateway   `json:"gateway,omitempty"`
	Node      *Node      `json:"node,omitempty"`
	NameClaim *NameClaim `json:"claim,omitempty"`
	Zone      *Zone      `json:"zone,omitempty"`
	Network   *Network   `json:"network,omitempty"`
	Exposure  *Exposure  `json:"exposure,omitempty"`
}

// Key returns the record's key.
func (r *Record) Key() Key { return Key{r.Kind, r.Owner, r.Name} }

// Supersedes reports whether r replaces old (nil: nothing known yet): the
// higher sequence wins; a replay or a rollback does not.
func (r *Record) Supersedes(old *Record) bool { return old == nil || r.Seq > old.Seq }

// ExpiredAt reports whether the record no longer counts at t. The skew is
// granted, so that a clock a little ahead takes nothing down.
func (r *Record) ExpiredAt(t time.Time) bool { return t.After(r.Expires.Add(MaxSkew)) }

// Live reports whether the record counts at t: neither withdrawn nor expired.
func (r *Record) Live(t time.Time) bool { return !r.Deleted && !r.ExpiredAt(t) }

// body returns the body named by the kind, and how many bodies are set.
func (r *Record) body() (b interface{ validate() error }, set int) {
	if r.Farm != nil {
		set++
		if r.Kind == KindFarm {
			b = r.Farm
		}
	}
	if r.Gateway != nil {
		set++
		if r.Kind == KindGateway {
			b = r.Gateway
		}
	}
	if r.Node != nil {
		set++
		if r.Kind == KindNode {
			b = r.Node
		}
	}
	if r.NameClaim != nil {
		set++
		if r.Kind == KindName {
			b = r.NameClaim
		}
	}
	if r.Zone != nil {
		set++
		if r.Kind == KindZone {
			b = zoneOf{r.Name, r.Zone}
		}
	}
	if r.Network != nil {
		set++
		if r.Kind == KindNetwork {
			b = r.Network
		}
	}
	if r.Exposure != nil {
		set++
		if r.Kind == KindExposure {
			b = r.Exposure
		}
	}
	return b, set
}

// Validate checks every rule that can be checked without knowing other
// records. The error names the field.
func (r *Record) Validate() error {
	if r.Version < MinProtocol {
		return invalid("v", "%d is not a protocol version", r.Version)
	}
	if r.Version > Protocol {
		return &Error{Kind: Unsupported, Field: "v", Public: fmt.Sprintf("the record needs protocol %d, this release speaks up to %d", r.Version, Protocol), Hint: "upgrade webgw here"}
	}
	if k, err := ParseKind(string(r.Kind)); err != nil {
		return err
	} else if k != r.Kind { // its plural
		return invalid("kind", "write %q", k)
	}
	if err := r.Key().validate(); err != nil {
		return err
	}
	if r.Seq == 0 || r.Seq >= maxSeq {
		return invalid("seq", "must be from 1 to 2^53-1")
	}
	if r.Issued.IsZero() {
		return invalid("issued", "missing")
	}
	if !r.Expires.After(r.Issued) {
		return invalid("expires", "must be after issued")
	}
	if r.Expires.Sub(r.Issued) > MaxLifetime {
		return invalid("expires", "more than %d days after issued", int(MaxLifetime.Hours()/24))
	}
	b, set := r.body()
	if set != 1 || b == nil {
		return invalid(bodyField(r.Kind), "a record of kind %s must hold exactly this body", r.Kind)
	}
	if r.NameClaim != nil && r.NameClaim.To == r.Owner {
		return invalid("claim.to", "is the owner, who holds the name already")
	}
	return in(bodyField(r.Kind), b.validate())
}

func bodyField(k Kind) string {
	if k == KindName {
		return "claim"
	}
	return string(k)
}

// CheckAt validates the record's times against the clock of whoever takes it
// in: not expired, and not issued further in the future than MaxSkew.
func (r *Record) CheckAt(now time.Time) error {
	if r.ExpiredAt(now) {
		return &Error{Kind: Expired, Field: "expires", Public: "the record expired at " + r.Expires.UTC().Format(time.RFC3339), Hint: "sign it anew"}
	}
	if r.Issued.After(now.Add(MaxSkew)) {
		return invalid("issued", "%s lies in the future here; is a clock wrong?", r.Issued.UTC().Format(time.RFC3339))
	}
	return nil
}
