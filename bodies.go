package webgw

import (
	"encoding/base64"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Farm is a set of nodes and gateways under one owner, the farmer. A node or
// gateway belongs to it only when its own record names the farmer as well.
type Farm struct {
	Description string `json:"description,omitempty"` // up to 200 characters
	Contact     string `json:"contact,omitempty"`     // where abuse is reported: mail address or URL
	Nodes       []ID   `json:"nodes,omitempty"`
	Gateways    []ID   `json:"gateways,omitempty"`
}

func (f *Farm) validate() error {
	if err := checkText("description", f.Description, 200); err != nil {
		return err
	}
	if err := checkText("contact", f.Contact, 200); err != nil {
		return err
	}
	if err := checkIDs("nodes", f.Nodes, 10_000); err != nil {
		return err
	}
	return checkIDs("gateways", f.Gateways, 1_000)
}

// Gateway is what a gateway says of itself, signed by its own identity.
type Gateway struct {
	Farmer    ID       `json:"farmer,omitzero"`    // owner of the farm it belongs to
	Addresses []string `json:"addresses"`          // host:port where nodes dial its TLS port, best first
	Zone      string   `json:"zone,omitempty"`     // DNS zone in which it gives out names
	HTTPPort  uint16   `json:"httpPort,omitempty"` // as visitors see it; 0: no plain HTTP
	TLSPort   uint16   `json:"tlsPort"`            // as visitors see it
	Ports     PortSet  `json:"ports,omitempty"`    // public ports on offer, each for TCP and for UDP, "20000-20999,2222"
}

func (g *Gateway) validate() error {
	if len(g.Addresses) == 0 || len(g.Addresses) > 16 {
		return invalid("addresses", "must hold 1 to 16 of host:port")
	}
	for i, a := range g.Addresses {
		if err := checkHostPort(index("addresses", i), a); err != nil {
			return err
		}
	}
	if g.Zone != "" {
		if _, err := checkHost("zone", g.Zone, false); err != nil {
			return err
		}
	}
	if g.TLSPort == 0 {
		return invalid("tlsPort", "missing")
	}
	_, err := g.Ports.Ranges()
	return in("ports", err)
}

// Node is what a node says of itself, signed by its own identity.
type Node struct {
	Farmer ID   `json:"farmer,omitzero"`  // owner of the farm it belongs to
	Owners []ID `json:"owners,omitempty"` // whose exposures it carries; the node's own policy decides, this only tells
}

func (n *Node) validate() error { return checkIDs("owners", n.Owners, 10_000) }

// NameClaim holds a host name (the record's name) for its owner, whether or
// not anything is exposed there.
type NameClaim struct {
	Subtree bool `json:"subtree,omitempty"` // also every name below it
	To      ID   `json:"to,omitzero"`       // who may take the name over, as soon as its owner has nothing else there
}

func (*NameClaim) validate() error { return nil }

// Network is an owner's private overlay network.
type Network struct {
	Ranges  []netip.Prefix `json:"ranges"` // inner addresses, at most one per family
	Members []Member       `json:"members,omitempty"`
}

// Member is one member of a network: a node or gateway by identity, or a plain
// WireGuard peer by name.
type Member struct {
	ID        ID           `json:"id,omitzero"`
	Peer      string       `json:"peer,omitempty"`
	WireGuard string       `json:"wireguard"` // base64 of the member's Curve25519 public key
	Addresses []netip.Addr `json:"addresses"`
}

func (n *Network) validate() error {
	if len(n.Ranges) == 0 || len(n.Ranges) > 2 {
		return invalid("ranges", "must hold one range, or one of IPv4 and one of IPv6")
	}
	for i, p := range n.Ranges {
		if !p.IsValid() || p.Masked() != p || p.Addr().Is4In6() {
			return invalid(index("ranges", i), "must be a network prefix with no host bits set, IPv4 not written as IPv6")
		}
		if i == 1 && p.Addr().Is4() == n.Ranges[0].Addr().Is4() {
			return invalid(index("ranges", i), "must be of the other address family than ranges[0]")
		}
	}
	if len(n.Members) > 4_096 {
		return invalid("members", "more than 4096")
	}
	seen := map[netip.Addr]bool{}
	members := map[[2]string]bool{}
	keys := map[string]bool{}
	for i, m := range n.Members {
		f := index("members", i)
		if m.ID.IsZero() == (m.Peer == "") {
			return invalid(f, "must name either id or peer")
		}
		if m.Peer != "" {
			if err := CheckLabel(f+".peer", m.Peer); err != nil {
				return err
			}
		}
		who := [2]string{m.ID.String(), m.Peer}
		if members[who] {
			return invalid(f, "stands twice")
		}
		members[who] = true
		key, err := base64.StdEncoding.Strict().DecodeString(m.WireGuard)
		if err != nil || len(key) != 32 || base64.StdEncoding.EncodeToString(key) != m.WireGuard {
			return invalid(f+".wireguard", "must be a public key: base64 of 32 bytes, as wg pubkey prints it")
		}
		if keys[m.WireGuard] {
			return invalid(f+".wireguard", "stands twice")
		}
		keys[m.WireGuard] = true
		if len(m.Addresses) == 0 {
			return invalid(f+".addresses", "missing")
		}
		for j, a := range m.Addresses {
			if !slices.ContainsFunc(n.Ranges, func(p netip.Prefix) bool { return p.Contains(a) }) {
				return invalid(index(f+".addresses", j), "lies outside the network's ranges")
			}
			if seen[a] {
				return invalid(index(f+".addresses", j), "is used twice")
			}
			seen[a] = true
		}
	}
	return nil
}

// Protocol of an exposure, as the visitor speaks it.
type ExposureProtocol string

// What an exposure may speak.
const (
	HTTP ExposureProtocol = "http" // by host name, on the HTTP and TLS ports
	TLS  ExposureProtocol = "tls"  // by server name, on the TLS port or a port that several may share, ciphertext passed through
	TCP  ExposureProtocol = "tcp"  // by port, or a range of them
	UDP  ExposureProtocol = "udp"  // by port, or a range of them; ports of TCP and of UDP have nothing to do with each other
)

// ByPort reports whether visitors find an exposure by a port of its own rather
// than by a host name.
func (p ExposureProtocol) ByPort() bool { return p == TCP || p == UDP }

// Exposure is the owner's statement: this public name or port leads to these
// targets, by these gateways.
type Exposure struct {
	Protocol    ExposureProtocol `json:"protocol"`
	Hosts       []string         `json:"hosts,omitempty"`       // http, tls: host names; "*.example.org" covers one label
	Port        uint16           `json:"port,omitempty"`        // tcp, udp: the public port, the same on every gateway; tls: 0 is the gateway's TLS port
	PortEnd     uint16           `json:"portEnd,omitempty"`     // tcp, udp: the last of a range that begins at Port; each leads as far above the target's port. 0: one port
	Gateways    []ID             `json:"gateways"`              // placement: which gateways carry it
	Targets     []Target         `json:"targets,omitempty"`     // where it leads, any of them serves; may be missing if there are rules
	Upstream    Upstream         `json:"upstream,omitempty"`    // http: how the workload is spoken to; "" is auto
	UpstreamTLS *UpstreamTLS     `json:"upstreamTLS,omitempty"` // http: the workload is spoken to over TLS; nil: in clear text
	QUIC        bool             `json:"quic,omitempty"`        // tls: QUIC for these hosts is passed through, too, as UDP to the same targets

	Connect       bool          `json:"connect,omitempty"`       // http: visitors may CONNECT, and then speak to the targets whatever those speak
	ProxyProtocol ProxyProtocol `json:"proxyProtocol,omitempty"` // tcp, tls: the workload is told the visitor's address so; "": not
	Policy        *Policy       `json:"policy,omitempty"`        // who may use it, and how much; nil: no limits of its own
	Rules         []Rule        `json:"rules,omitempty"`         // http: requests that are handled in another way
}

// Target is the address of a workload: on a node through its session, or
// direct, dialed by the gateway itself.
type Target struct {
	Node    ID     `json:"node,omitzero"`     // with Address
	Address string `json:"address,omitempty"` // host:port as seen from the node, or unix:/path
	Direct  string `json:"direct,omitempty"`  // host:port as seen from the gateway
}

// String gives "node address" or "direct address" for logs and people.
func (t Target) String() string {
	if t.Direct != "" {
		return "direct " + t.Direct
	}
	return t.Node.Short() + " " + t.Address
}

func (t Target) validate() error {
	switch {
	case t.Direct != "" && (!t.Node.IsZero() || t.Address != ""):
		return invalid("direct", "stands alone: a target is either direct, or node with address")
	case t.Direct != "":
		return checkHostPort("direct", t.Direct)
	case t.Node.IsZero():
		return invalid("node", "missing: a target is either direct, or node with address")
	default:
		return CheckTargetAddress("address", t.Address)
	}
}

func (e *Exposure) validate() error {
	switch e.Protocol {
	case HTTP, TLS:
		if len(e.Hosts) == 0 || len(e.Hosts) > MaxHosts {
			return invalid("hosts", "must hold 1 to %d host names for protocol %s", MaxHosts, e.Protocol)
		}
	case TCP, UDP:
		if e.Port == 0 {
			return invalid("port", "missing: protocol %s needs a public port", e.Protocol)
		}
		if len(e.Hosts) != 0 {
			return invalid("hosts", "belong to http and tls only; %s is found by its port", e.Protocol)
		}
	case "":
		return invalid("protocol", "missing: http, tls, tcp or udp")
	default:
		return invalid("protocol", "%q is not known; http, tls, tcp and udp are", clip(string(e.Protocol), 20))
	}
	for i, h := range e.Hosts {
		if _, err := checkHost(index("hosts", i), h, true); err != nil {
			return err
		}
		if slices.Contains(e.Hosts[:i], h) {
			return invalid(index("hosts", i), "%q stands twice", h)
		}
	}
	if err := e.validateUpstream(); err != nil {
		return err
	}
	if e.QUIC && e.Protocol != TLS {
		return invalid("quic", "belongs to protocol tls only; for http gateways speak HTTP/3 themselves")
	}
	if e.QUIC && e.Port != 0 {
		return invalid("quic", "is found on the gateways' TLS port only; leave port out")
	}
	if len(e.Gateways) == 0 {
		return invalid("gateways", "must name at least one gateway")
	}
	if err := checkIDs("gateways", e.Gateways, MaxGateways); err != nil {
		return err
	}
	if len(e.Targets) == 0 && len(e.Rules) == 0 || len(e.Targets) > MaxTargets {
		return invalid("targets", "must hold 1 to %d targets", MaxTargets)
	}
	for i, t := range e.Targets {
		if err := in(index("targets", i), t.validate()); err != nil {
			return err
		}
		if (e.Protocol == UDP || e.QUIC) && strings.HasPrefix(t.Address, "unix:") {
			return invalid(index("targets", i)+".address", "a socket of the file system takes no datagrams")
		}
		if slices.Contains(e.Targets[:i], t) {
			return invalid(index("targets", i), "stands twice")
		}
	}
	if err := e.validatePorts(); err != nil {
		return err
	}
	return e.validateHandling()
}

// Receipt states what was carried for an exposure in a period, signed by both
// the gateway and the node.
type Receipt struct {
	Exposure    Key       `json:"exposure"`
	Gateway     ID        `json:"gateway"`
	Node        ID        `json:"node"`
	From        time.Time `json:"from"`
	To          time.Time `json:"to"`
	Connections uint64    `json:"connections"`
	BytesIn     uint64    `json:"bytesIn"`  // visitor to workload
	BytesOut    uint64    `json:"bytesOut"` // workload to visitor
}
