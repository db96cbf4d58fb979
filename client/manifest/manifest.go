// Package manifest reads and writes declarations as people keep them: YAML
// documents, with gateways and nodes by name, that become records to be signed.
//
// It reads strictly: whatever is not understood is an error with its place.
// It must not know how records travel, nor who signs them.
package manifest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"webgw.dev/webgw"
)

// Kinds lists what a manifest may declare. Gateways and nodes declare
// themselves.
var Kinds = []webgw.Kind{webgw.KindFarm, webgw.KindName, webgw.KindZone, webgw.KindNetwork, webgw.KindExposure}

// DefaultLifetime of what a manifest declares, if it says nothing.
const DefaultLifetime = 365 * 24 * time.Hour

// Manifest is one document: what is to be declared, not yet resolved.
type Manifest struct {
	Kind     webgw.Kind
	Name     string
	Lifetime time.Duration // from when it is signed

	doc  *document
	body body
}

// Place tells where the document begins.
func (m *Manifest) Place() Place { return m.doc.place(m.doc.places[""]) }

// Directory finds gateways and nodes by the name of their record.
type Directory interface {
	// Lookup returns the identities of everything of this kind that bears the
	// name: none, or several when it is ambiguous.
	Lookup(ctx context.Context, kind webgw.Kind, name string) ([]webgw.ID, error)
}

// Parse reads a file of manifests. Errors are *Error.
func Parse(file string, data []byte) ([]*Manifest, error) {
	docs, err := split(file, data)
	if err != nil {
		return nil, err
	}
	var out []*Manifest
	type key struct {
		kind webgw.Kind
		name string
	}
	seen := map[key]*Manifest{}
	for _, d := range docs {
		m, err := parse(d)
		if err != nil {
			return nil, err
		}
		k := key{m.Kind, m.Name}
		if first := seen[k]; first != nil {
			return nil, d.errorAt(d.places["name"], "name", "%s %q stands twice, first at %s", m.Kind, m.Name, first.Place())
		}
		seen[k] = m
		out = append(out, m)
	}
	return out, nil
}

func parse(d *document) (*Manifest, error) {
	kind := webgw.Kind("")
	for _, kv := range d.root.Values {
		if kv.Key.GetToken().Value != "kind" {
			continue
		}
		text, err := d.text("kind", kv.Value, "text")
		if err != nil {
			return nil, err
		}
		kind = webgw.Kind(text)
		if !slices.Contains(Kinds, kind) {
			hint := ""
			if kind == webgw.KindGateway || kind == webgw.KindNode {
				hint = "; a " + text + " declares itself when it runs"
			}
			return nil, d.errorAt(placeOf(kv.Value.GetToken()), "kind", "%q can't be declared here; exposure, name, zone, farm and network can%s", clip(text), hint)
		}
	}
	m := &Manifest{Kind: kind, doc: d}
	var h *head
	switch kind {
	case webgw.KindExposure:
		b := &exposure{}
		m.body, h = b, &b.head
	case webgw.KindName:
		b := &name{}
		m.body, h = b, &b.head
	case webgw.KindFarm:
		b := &farm{}
		m.body, h = b, &b.head
	case webgw.KindZone:
		b := &zone{}
		m.body, h = b, &b.head
	case webgw.KindNetwork:
		b := &network{}
		m.body, h = b, &b.head
	default:
		return nil, d.errorAt(d.places[""], "kind", "missing: exposure, name, zone, farm or network")
	}
	if err := d.decode(m.body); err != nil {
		return nil, err
	}
	if h.Name == "" {
		return nil, d.errorAt(d.places[""], "name", "missing")
	}
	m.Name, m.Lifetime = h.Name, time.Duration(h.Lifetime)
	if kind == webgw.KindName || kind == webgw.KindZone {
		var err error
		if m.Name, err = Host("name", h.Name, false); err != nil {
			return nil, d.locate(err)
		}
	}
	if m.Lifetime == 0 {
		m.Lifetime = DefaultLifetime
	}
	return m, nil
}

// Record resolves names through dir and returns the checked record, of owner
// and issued at now, with sequence number 1: the caller gives it the right one.
func (m *Manifest) Record(ctx context.Context, owner webgw.ID, now time.Time, dir Directory) (webgw.Record, error) {
	r := webgw.Record{Version: webgw.Protocol, Kind: m.Kind, Owner: owner, Name: m.Name, Seq: 1, Issued: now, Expires: now.Add(m.Lifetime)}
	res := resolver{ctx, dir, m.doc, map[resolved]webgw.ID{}}
	if err := m.body.fill(&r, &res); err != nil {
		return webgw.Record{}, m.doc.locate(err)
	}
	if err := r.Validate(); err != nil {
		return webgw.Record{}, m.Locate(err)
	}
	return r, nil
}

// Locate gives an error about the record, of a check or of the registry, the
// place of the field that it names, or of the document.
func (m *Manifest) Locate(err error) error {
	e, ok := errors.AsType[*webgw.Error](err)
	if !ok {
		return err
	}
	c := *e
	if c.Field == "expires" {
		c.Field = "lifetime"
	}
	if c.Field == "exposure.portEnd" {
		c.Field = "exposure.port"
	}
	// The manifest has the body's fields beside the header's.
	for _, prefix := range []string{"exposure.", "claim.", "zone.", "farm.", "network."} {
		c.Field = strings.TrimPrefix(c.Field, prefix)
	}
	return m.doc.locate(&c)
}

// Format writes a record as a manifest that Parse reads back. label gives the
// name to write for a gateway or node, "" or nil: its identity.
func Format(r *webgw.Record, label func(kind webgw.Kind, id webgw.ID) string) ([]byte, error) {
	if label == nil {
		label = func(webgw.Kind, webgw.ID) string { return "" }
	}
	ref := func(kind webgw.Kind, id webgw.ID) Ref {
		if n := label(kind, id); n != "" {
			return Ref{Text: n}
		}
		return Ref{Text: id.String()}
	}
	h := head{Kind: string(r.Kind), Name: r.Name, Lifetime: Lifetime(r.Expires.Sub(r.Issued))}
	var b any
	switch {
	case r.Exposure != nil:
		e := exposure{head: h, Protocol: string(r.Exposure.Protocol), Hosts: r.Exposure.Hosts, Upstream: string(r.Exposure.Upstream), UpstreamTLS: r.Exposure.UpstreamTLS,
			QUIC: r.Exposure.QUIC, Connect: r.Exposure.Connect, ProxyProtocol: string(r.Exposure.ProxyProtocol), Policy: r.Exposure.Policy}
		for _, g := range r.Exposure.Gateways {
			e.Gateways = append(e.Gateways, ref(webgw.KindGateway, g))
		}
		e.Targets = formatTargets(r.Exposure.Targets, ref)
		for _, u := range r.Exposure.Rules {
			e.Rules = append(e.Rules, rule{Match: u.Match, Targets: formatTargets(u.Targets, ref), Rewrite: u.Rewrite, Redirect: u.Redirect, Request: u.Request, Response: u.Response})
		}
		if p, ok := r.Exposure.Ports(); ok {
			e.Port = ports(p)
		}
		b = e
	case r.NameClaim != nil:
		b = name{head: h, Subtree: r.NameClaim.Subtree, To: r.NameClaim.To.String()}
	case r.Zone != nil:
		z := zone{head: h, Records: r.Zone.Records}
		for _, g := range r.Zone.Gateways {
			z.Gateways = append(z.Gateways, ref(webgw.KindGateway, g))
		}
		b = z
	case r.Farm != nil:
		f := farm{head: h, Description: r.Farm.Description, Contact: r.Farm.Contact}
		for _, n := range r.Farm.Nodes {
			f.Nodes = append(f.Nodes, ref(webgw.KindNode, n))
		}
		for _, g := range r.Farm.Gateways {
			f.Gateways = append(f.Gateways, ref(webgw.KindGateway, g))
		}
		b = f
	case r.Network != nil:
		n := network{head: h, Ranges: r.Network.Ranges}
		for _, m := range r.Network.Members {
			x := member{Peer: m.Peer, WireGuard: m.WireGuard, Addresses: m.Addresses}
			if !m.ID.IsZero() {
				x.ID = Ref{Text: m.ID.String()}
			}
			n.Members = append(n.Members, x)
		}
		b = n
	default:
		return nil, &webgw.Error{Op: "write manifest", Kind: webgw.Invalid, Field: "kind", Public: "a " + string(r.Kind) + " declares itself and is not written as a manifest"}
	}
	var out bytes.Buffer
	err := yaml.NewEncoder(&out, yaml.IndentSequence(false)).Encode(b)
	return out.Bytes(), err
}

func formatTargets(targets []webgw.Target, ref func(webgw.Kind, webgw.ID) Ref) (out []target) {
	for _, t := range targets {
		x := target{Address: t.Address, Direct: t.Direct}
		if !t.Node.IsZero() {
			x.Node = ref(webgw.KindNode, t.Node)
		}
		out = append(out, x)
	}
	return out
}

// Lifetime is how long a record counts from its signing: Go's notation, and
// days, as in 90d.
type Lifetime time.Duration

// UnmarshalText reads "90d", "36h", "15m".
func (l *Lifetime) UnmarshalText(text []byte) error {
	d, err := ParseLifetime(string(text))
	*l = Lifetime(d)
	return err
}

// MarshalText writes whole days as days.
func (l Lifetime) MarshalText() ([]byte, error) {
	const day = 24 * time.Hour
	if d := time.Duration(l); d%day != 0 {
		return []byte(d.String()), nil
	}
	return fmt.Appendf(nil, "%dd", time.Duration(l)/day), nil
}

// ParseLifetime reads a duration of a second to webgw.MaxLifetime.
func ParseLifetime(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n int
		if n, err = strconv.Atoi(days); err == nil && n > 0 && n <= 1000 {
			d = time.Duration(n) * 24 * time.Hour
		}
	}
	if err != nil {
		return 0, &webgw.Error{Kind: webgw.Invalid, Public: fmt.Sprintf("%q is not a length of time such as 90d or 36h", clip(s))}
	}
	if d < time.Second || d > webgw.MaxLifetime {
		return 0, &webgw.Error{Kind: webgw.Invalid, Public: fmt.Sprintf("%q is not between 1s and %dd", clip(s), int(webgw.MaxLifetime.Hours()/24))}
	}
	return d, nil
}

// ports are one public port, or a range of them.
type ports webgw.PortRange

// UnmarshalText reads "6000" or "6000-6100".
func (p *ports) UnmarshalText(text []byte) error {
	r, err := webgw.ParsePortRange(string(text))
	*p = ports(r)
	return err
}

// MarshalYAML writes a single port as a number.
func (p ports) MarshalYAML() (any, error) {
	if p.First == p.Last {
		return p.First, nil
	}
	return webgw.PortRange(p).String(), nil
}

// IsZero reports whether there is none.
func (p ports) IsZero() bool { return p == ports{} }

// The documents, field by field as the records' JSON has them.

type head struct {
	Kind     string   `yaml:"kind"`
	Name     string   `yaml:"name"`
	Lifetime Lifetime `yaml:"lifetime,omitempty"`
}

type exposure struct {
	head        `yaml:",inline"`
	Protocol    string             `yaml:"protocol"`
	Hosts       []string           `yaml:"hosts,omitempty"`
	Port        ports              `yaml:"port,omitempty"`
	Gateways    []Ref              `yaml:"gateways"`
	Targets     []target           `yaml:"targets,omitempty"`
	Upstream    string             `yaml:"upstream,omitempty"`
	UpstreamTLS *webgw.UpstreamTLS `yaml:"upstreamTLS,omitempty"`
	QUIC        bool               `yaml:"quic,omitempty"`

	Connect       bool          `yaml:"connect,omitempty"`
	ProxyProtocol string        `yaml:"proxyProtocol,omitempty"`
	Policy        *webgw.Policy `yaml:"policy,omitempty"`
	Rules         []rule        `yaml:"rules,omitempty"`
}

type rule struct {
	Match    webgw.Match        `yaml:"match,omitempty"`
	Targets  []target           `yaml:"targets,omitempty"`
	Rewrite  *webgw.Rewrite     `yaml:"rewrite,omitempty"`
	Redirect *webgw.Redirect    `yaml:"redirect,omitempty"`
	Request  *webgw.HeaderEdits `yaml:"request,omitempty"`
	Response *webgw.HeaderEdits `yaml:"response,omitempty"`
}

type target struct {
	Node    Ref    `yaml:"node,omitempty"`
	Address string `yaml:"address,omitempty"`
	Direct  string `yaml:"direct,omitempty"`
}

type name struct {
	head    `yaml:",inline"`
	Subtree bool   `yaml:"subtree,omitempty"`
	To      string `yaml:"to,omitempty"` // an identity
}

type zone struct {
	head     `yaml:",inline"`
	Gateways []Ref             `yaml:"gateways"`
	Records  []webgw.DNSRecord `yaml:"records,omitempty"`
}

type farm struct {
	head        `yaml:",inline"`
	Description string `yaml:"description,omitempty"`
	Contact     string `yaml:"contact,omitempty"`
	Nodes       []Ref  `yaml:"nodes,omitempty"`
	Gateways    []Ref  `yaml:"gateways,omitempty"`
}

type network struct {
	head    `yaml:",inline"`
	Ranges  []netip.Prefix `yaml:"ranges"`
	Members []member       `yaml:"members,omitempty"`
}

type member struct {
	ID        Ref          `yaml:"id,omitempty"`
	Peer      string       `yaml:"peer,omitempty"`
	WireGuard string       `yaml:"wireguard"`
	Addresses []netip.Addr `yaml:"addresses"`
}

type body interface {
	fill(r *webgw.Record, res *resolver) error
}

func (e *exposure) fill(r *webgw.Record, res *resolver) error {
	x := &webgw.Exposure{Protocol: webgw.ExposureProtocol(e.Protocol), Port: e.Port.First, Upstream: webgw.Upstream(e.Upstream), UpstreamTLS: e.UpstreamTLS, QUIC: e.QUIC, Connect: e.Connect, ProxyProtocol: webgw.ProxyProtocol(e.ProxyProtocol), Policy: e.Policy}
	if e.Port.Last > e.Port.First {
		x.PortEnd = e.Port.Last
	}
	for i, h := range e.Hosts {
		host, err := Host(fmt.Sprintf("hosts[%d]", i), h, true)
		if err != nil {
			return err
		}
		x.Hosts = append(x.Hosts, host)
	}
	var err error
	if x.Gateways, err = res.all(webgw.KindGateway, e.Gateways); err != nil {
		return err
	}
	if x.Targets, err = res.targets(e.Targets); err != nil {
		return err
	}
	for _, u := range e.Rules {
		y := webgw.Rule{Match: u.Match, Rewrite: u.Rewrite, Redirect: u.Redirect, Request: u.Request, Response: u.Response}
		if y.Targets, err = res.targets(u.Targets); err != nil {
			return err
		}
		x.Rules = append(x.Rules, y)
	}
	r.Exposure = x
	return nil
}

func (n *name) fill(r *webgw.Record, _ *resolver) error {
	r.NameClaim = &webgw.NameClaim{Subtree: n.Subtree}
	if n.To == "" {
		return nil
	}
	to, err := webgw.ParseID(n.To)
	if e, ok := errors.AsType[*webgw.Error](err); ok {
		return &webgw.Error{Op: "read identity", Kind: webgw.Invalid, Field: "to", Public: e.Public}
	}
	r.NameClaim.To = to
	return err
}

func (z *zone) fill(r *webgw.Record, res *resolver) (err error) {
	x := &webgw.Zone{}
	if x.Gateways, err = res.all(webgw.KindGateway, z.Gateways); err != nil {
		return err
	}
	for i, d := range z.Records {
		if d, err = webgw.NormalizeDNS(r.Name, d); err != nil {
			return inField(fmt.Sprintf("records[%d]", i), err)
		}
		x.Records = append(x.Records, d)
	}
	r.Zone = x
	return nil
}

// inField names the field of an error as one of parent's.
func inField(parent string, err error) error {
	e, ok := errors.AsType[*webgw.Error](err)
	if !ok {
		return err
	}
	c := *e
	c.Field = strings.TrimSuffix(parent+"."+c.Field, ".")
	return &c
}

func (f *farm) fill(r *webgw.Record, res *resolver) (err error) {
	x := &webgw.Farm{Description: f.Description, Contact: f.Contact}
	if x.Nodes, err = res.all(webgw.KindNode, f.Nodes); err != nil {
		return err
	}
	x.Gateways, err = res.all(webgw.KindGateway, f.Gateways)
	r.Farm = x
	return err
}

func (n *network) fill(r *webgw.Record, res *resolver) error {
	x := &webgw.Network{Ranges: n.Ranges}
	for _, m := range n.Members {
		y := webgw.Member{Peer: m.Peer, WireGuard: m.WireGuard, Addresses: m.Addresses}
		if m.ID.Text != "" {
			var err error
			// A member may be either.
			if y.ID, err = res.one(webgw.KindNode, m.ID); webgw.KindOf(err) == webgw.NotFound {
				y.ID, err = res.one(webgw.KindGateway, m.ID)
			}
			if err != nil {
				return err
			}
		}
		x.Members = append(x.Members, y)
	}
	r.Network = x
	return nil
}
