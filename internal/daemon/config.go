// Package daemon puts the roles together out of their engines: configuration,
// the order of start and stop, and the page that tells whether they are well.
// It is the only room that imports everything, and it must hold no behaviour
// of its own: what a role does stands in the role.
package daemon

import (
	"fmt"
	"math"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/registry"
)

// Common is what every role is told. Its zero value is usable but for StateDir.
type Common struct {
	StateDir    string `name:"state-dir" yaml:"state-dir" help:"Directory of keys, snapshots and the registry's data (mode 0700)." placeholder:"DIR"`
	LogLevel    string `name:"log-level" yaml:"log-level" help:"debug, info, warn or error; empty is info."`
	LogFormat   string `name:"log-format" yaml:"log-format" help:"text or json; empty is text."`
	MetricsAddr string `name:"metrics-addr" yaml:"metrics-addr" help:"host:port of /metrics, /healthz and /readyz; empty is off." placeholder:"HOST:PORT"`
	Proxy       string `yaml:"proxy" help:"HTTP proxy by which gateways and the registry are dialed (CONNECT), as http://[user:password@]host:port." placeholder:"URL"`
}

// RegistryConfig configures the registry role.
type RegistryConfig struct {
	Common `yaml:",inline"`

	Listen        string        `yaml:"listen" help:"host:port of the registry's API; empty is :8443." placeholder:"HOST:PORT"`
	Address       string        `yaml:"address" help:"host:port by which others reach the registry; empty is the host name and the port of listen." placeholder:"HOST:PORT"`
	EtcdEndpoints []string      `name:"etcd-endpoint" yaml:"etcd-endpoints" help:"URL of an external etcd; none embeds one in the state directory." placeholder:"URL"`
	EtcdCA        string        `name:"etcd-ca" yaml:"etcd-ca" help:"PEM file of the authorities that the external etcd's certificate must chain to." placeholder:"FILE"`
	EtcdCert      string        `name:"etcd-cert" yaml:"etcd-cert" help:"PEM file of the certificate to show to the external etcd." placeholder:"FILE"`
	EtcdKey       string        `name:"etcd-key" yaml:"etcd-key" help:"PEM file of that certificate's key." placeholder:"FILE"`
	Admit         []string      `yaml:"admit" help:"Identities that may declare records; none, or 'open', admits everybody within the quota." placeholder:"ID"`
	Quota         int           `yaml:"quota" help:"Live records that one owner may hold; 0 is the registry's default."`
	NameGrace     time.Duration `name:"name-grace" yaml:"name-grace" help:"How long a freed name stays its former owner's, such as 72h; 0 is the registry's default (24h)." placeholder:"TIME"`
	GridZone      string        `name:"grid-zone" yaml:"grid-zone" help:"DNS zone of the whole grid, for which every gateway answers." placeholder:"DOMAIN"`
	Resolvers     []string      `name:"resolver" yaml:"resolvers" help:"host:port of a DNS resolver (TCP) that proofs of domains are looked up at; name several, more than half must agree." placeholder:"HOST:PORT"`
	DomainProof   string        `name:"domain-proof" yaml:"domain-proof" help:"on: host names outside of the gateways' zones need a proof (webgw domain check); off: the first comes first, for demonstrations; empty is on if there are resolvers or a grid-zone."`
	WriteRate     float64       `name:"write-rate" yaml:"write-rate" help:"Writes a second that one identity may do over time; 0 is the registry's default." placeholder:"N"`
}

// GatewayConfig configures the gateway role.
type GatewayConfig struct {
	Common `yaml:",inline"`

	Name           string         `yaml:"name" help:"Name of the gateway's record; empty is the first label of the host name."`
	Zone           string         `yaml:"zone" help:"DNS zone in which this gateway gives out names." placeholder:"DOMAIN"`
	Bind           string         `yaml:"bind" help:"Address that public listeners bind to; empty is all." placeholder:"IP"`
	HTTPAddr       string         `name:"http-addr" yaml:"http-addr" help:"host:port for plain HTTP; empty is :80, 'off' is none." placeholder:"HOST:PORT"`
	TLSAddr        string         `name:"tls-addr" yaml:"tls-addr" help:"host:port for TLS, nodes and the embedded registry; empty is :443." placeholder:"HOST:PORT"`
	NoQUIC         bool           `name:"no-quic" yaml:"no-quic" help:"Take no UDP at the TLS port: no HTTP/3, and no QUIC for workloads."`
	Ports          webgw.PortSet  `yaml:"ports" help:"Public TCP ports on offer; empty is 20000-20999, 'off' is none." placeholder:"PORTS"`
	Addresses      []string       `name:"address" yaml:"addresses" help:"host:port where nodes reach the TLS port, best first; none derives it from the zone or the host name." placeholder:"HOST:PORT"`
	PublicHTTPPort uint16         `name:"public-http-port" yaml:"public-http-port" help:"Plain HTTP port as visitors see it; 0 is the one of http-addr."`
	PublicTLSPort  uint16         `name:"public-tls-port" yaml:"public-tls-port" help:"TLS port as visitors see it; 0 is the one of tls-addr."`
	Registry       string         `yaml:"registry" help:"The registry, as ID@host:port; empty embeds one, which answers on the TLS port." placeholder:"ID@HOST:PORT"`
	CertFiles      []string       `name:"cert" yaml:"certs" help:"Certificate chain and key, as cert.pem:key.pem; read again when changed." placeholder:"CERT:KEY"`
	DevCA          bool           `name:"dev-ca" yaml:"dev-ca" help:"Mint certificates from a private authority in the state directory; on by itself when there is no cert."`
	AllowDirect    []netip.Prefix `name:"allow-direct" yaml:"allow-direct" help:"Further addresses that direct targets may lead to; without it only public ones." placeholder:"CIDR"`
	TrustedProxies []netip.Prefix `name:"trusted-proxy" yaml:"trusted-proxies" help:"Balancers before this gateway whose PROXY headers tell the visitor's address." placeholder:"CIDR"`
	DefaultHost    string         `name:"default-host" yaml:"default-host" help:"Exposed host whose site answers for names that nobody has exposed; empty is an error page." placeholder:"HOST"`
	DefaultURL     string         `name:"default-redirect" yaml:"default-redirect" help:"URL that visitors of names are sent to that nobody has exposed." placeholder:"URL"`
	Farmer         webgw.ID       `yaml:"farmer" help:"Identity of the owner of the farm that this gateway belongs to." placeholder:"ID"`
	MaxConns       int            `name:"max-conns" yaml:"max-conns" help:"Visitors' connections at once; 0 is the default of the ingress."`
	MaxPerOwner    int            `name:"max-per-owner" yaml:"max-per-owner" help:"Streams, flows and requests of one owner at once, and as many connections; 0 is the default of the ingress."`
	Countries      string         `yaml:"countries" help:"Country database in MaxMind's format (.mmdb), read again when changed; empty is none." placeholder:"FILE"`
	MaxPerExposure int            `name:"max-per-exposure" yaml:"max-per-exposure" help:"Of them, of one exposure; 0 is max-per-owner."`

	OwnerBandwidth    int64 `name:"owner-bandwidth" yaml:"owner-bandwidth" help:"Bytes a second, each way, of one owner's exposures together; 0 is no limit."`
	ExposureBandwidth int64 `name:"exposure-bandwidth" yaml:"exposure-bandwidth" help:"Bytes a second, each way, of one exposure; 0 is no limit."`

	// Embedded configures the registry that is embedded when Registry is
	// empty: its Admit, Quota and etcd; its other fields are not used.
	Embedded RegistryConfig `kong:"-" yaml:"-"`
}

// NodeConfig configures the node role.
type NodeConfig struct {
	Common `yaml:",inline"`

	Name         string         `yaml:"name" help:"Name of the node's record; empty is the first label of the host name."`
	Registry     string         `yaml:"registry" help:"The registry, as ID@host:port." placeholder:"ID@HOST:PORT"`
	Owners       []string       `name:"owner" yaml:"owners" help:"Identities whose exposures this node carries; none is the local owner." placeholder:"ID"`
	AllowTargets []netip.Prefix `name:"allow-target" yaml:"allow-targets" help:"Addresses that workloads may be dialed at; none is this machine's loopback." placeholder:"CIDR"`
	AllowUnix    []string       `name:"allow-unix" yaml:"allow-unix" help:"Directories whose unix sockets may be dialed; none is no unix socket." placeholder:"DIR"`
	Farmer       webgw.ID       `yaml:"farmer" help:"Identity of the owner of the farm that this node belongs to." placeholder:"ID"`

	// Only, if not empty, are the only targets that this node leads to, as
	// exposures write them: for a node that serves one exposure.
	Only []string `kong:"-" yaml:"-"`
}

// Defaults of the fields whose zero value stands for one.
const (
	DefaultRegistryListen = ":8443"
	DefaultHTTPAddr       = ":80"
	DefaultTLSAddr        = ":443"
	DefaultPorts          = webgw.PortSet("20000-20999")
	off                   = "off"

	minBandwidth = 1_000 // bytes a second
)

func invalid(field, format string, args ...any) error {
	return &webgw.Error{Op: "read configuration", Kind: webgw.Invalid, Field: field, Public: fmt.Sprintf(format, args...)}
}

// Validate checks the fields on their own; the error names the field as the
// configuration file writes it.
func (c Common) Validate() error {
	if c.StateDir == "" {
		return invalid("state-dir", "missing")
	}
	switch c.LogLevel {
	case "", "debug", "info", "warn", "error":
	default:
		return invalid("log-level", "%q is not debug, info, warn or error", c.LogLevel)
	}
	switch c.LogFormat {
	case "", "text", "json":
	default:
		return invalid("log-format", "%q is not text or json", c.LogFormat)
	}
	if c.MetricsAddr != "" {
		if err := checkListen("metrics-addr", c.MetricsAddr); err != nil {
			return err
		}
	}
	_, err := Outward(c.Proxy, nil)
	return err
}

// Outward returns the network by which other machines of the grid are dialed:
// nw, or the proxy in it if there is one.
func Outward(proxy string, nw netx.Net) (netx.Net, error) {
	if proxy == "" {
		return nw, nil
	}
	u, err := netx.ParseProxy(proxy)
	if err != nil {
		return nil, invalid("proxy", "%v", err) // without the value, which may hold a password
	}
	if nw == nil {
		nw = netx.Host{}
	}
	return netx.Proxied{Net: nw, Proxy: u}, nil
}

// checkListen checks an address to listen on; port 0 chooses one.
func checkListen(field, s string) error {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return invalid(field, "%q is not host:port", s)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return invalid(field, "%q: the port must be a number up to 65535", s)
	}
	if host == "" || host == "localhost" {
		return nil
	}
	if _, err := netip.ParseAddr(host); err != nil {
		return invalid(field, "%q: listen on an IP address, not on a name", s)
	}
	return nil
}

// Validate checks the fields; the error names the field.
func (c RegistryConfig) Validate() error {
	if err := c.Common.Validate(); err != nil {
		return err
	}
	if c.Listen != "" {
		if err := checkListen("listen", c.Listen); err != nil {
			return err
		}
	}
	if c.Address != "" {
		if _, _, err := webgw.SplitHostPort(c.Address); err != nil {
			return invalid("address", "%s", publicOf(err))
		}
	}
	return c.validateEmbedded()
}

// validateEmbedded checks what counts for an embedded registry, too.
func (c RegistryConfig) validateEmbedded() error {
	if _, err := c.admitted(); err != nil {
		return err
	}
	if (c.EtcdCert == "") != (c.EtcdKey == "") {
		return invalid("etcd-cert", "goes together with etcd-key")
	}
	if len(c.EtcdEndpoints) == 0 && c.EtcdCA+c.EtcdCert != "" {
		return invalid("etcd-endpoints", "missing: the etcd TLS files are for an external etcd")
	}
	if c.NameGrace < 0 || c.NameGrace > webgw.MaxLifetime {
		return invalid("name-grace", "must be from 0 to %d hours", int(webgw.MaxLifetime.Hours()))
	}
	if err := c.validateProof(); err != nil {
		return err
	}
	if c.GridZone != "" {
		if err := webgw.CheckHost("grid-zone", c.GridZone, false); err != nil {
			return err
		}
	}
	if c.Quota < 0 {
		return invalid("quota", "must not be negative")
	}
	if !(c.WriteRate >= 0) || math.IsInf(c.WriteRate, 0) { // NaN is not, either
		return invalid("write-rate", "must be a number of 0 or more")
	}
	return nil
}

// proves reports whether host names outside of zones need a proof.
func (c RegistryConfig) proves() bool {
	return c.DomainProof == "on" || c.DomainProof == "" && (len(c.Resolvers) > 0 || c.GridZone != "")
}

func (c RegistryConfig) validateProof() error {
	switch c.DomainProof {
	case "", "on", off:
	default:
		return invalid("domain-proof", "%q is not on or off", c.DomainProof)
	}
	if len(c.Resolvers) > registry.MaxResolvers {
		return invalid("resolvers", "holds more than %d", registry.MaxResolvers)
	}
	for i, r := range c.Resolvers {
		field := fmt.Sprintf("resolvers[%d]", i)
		if _, _, err := webgw.SplitHostPort(r); err != nil {
			return invalid(field, "%s", publicOf(err))
		}
		if err := webgw.CheckTargetAddress(field, r); err != nil {
			return err
		}
		if slices.Contains(c.Resolvers[:i], r) {
			return invalid(field, "%q stands twice", r)
		}
	}
	if c.proves() && len(c.Resolvers) == 0 {
		return invalid("resolvers", "missing: proofs of domains are looked up at resolvers; name some, or set domain-proof to off")
	}
	return nil
}

// admitted returns the identities that may declare; nil: everybody.
func (c RegistryConfig) admitted() ([]webgw.ID, error) {
	if len(c.Admit) == 1 && c.Admit[0] == "open" {
		return nil, nil
	}
	return parseIDs("admit", c.Admit)
}

func parseIDs(field string, list []string) ([]webgw.ID, error) {
	var out []webgw.ID
	for i, s := range list {
		id, err := webgw.ParseID(s)
		if err != nil {
			return nil, invalid(fmt.Sprintf("%s[%d]", field, i), "%q is not an identity", s)
		}
		out = append(out, id)
	}
	return out, nil
}

// Validate checks the fields; the error names the field.
func (c GatewayConfig) Validate() error {
	if err := c.Common.Validate(); err != nil {
		return err
	}
	if c.Name != "" {
		if err := webgw.CheckLabel("name", c.Name); err != nil {
			return err
		}
	}
	if c.Zone != "" {
		if err := webgw.CheckHost("zone", c.Zone, false); err != nil {
			return err
		}
	}
	if c.Bind != "" {
		if _, err := netip.ParseAddr(c.Bind); err != nil {
			return invalid("bind", "%q is not an IP address", c.Bind)
		}
	}
	if c.HTTPAddr != "" && c.HTTPAddr != off {
		if err := checkListen("http-addr", c.HTTPAddr); err != nil {
			return err
		}
	}
	if c.TLSAddr != "" {
		if err := checkListen("tls-addr", c.TLSAddr); err != nil {
			return err
		}
	}
	if c.Ports != off {
		if _, err := c.Ports.Ranges(); err != nil {
			return invalid("ports", "%s", publicOf(err))
		}
	}
	if len(c.Addresses) > 16 {
		return invalid("addresses", "holds more than 16")
	}
	for i, a := range c.Addresses {
		field := fmt.Sprintf("addresses[%d]", i)
		if _, _, err := webgw.SplitHostPort(a); err != nil {
			return invalid(field, "%s", publicOf(err))
		}
		if err := webgw.CheckTargetAddress(field, a); err != nil {
			return err
		}
	}
	for i, p := range c.CertFiles {
		if cert, key, ok := strings.Cut(p, ":"); !ok || cert == "" || key == "" {
			return invalid(fmt.Sprintf("certs[%d]", i), "%q is not cert.pem:key.pem", p)
		}
	}
	if c.DefaultHost != "" {
		if err := webgw.CheckHost("default-host", c.DefaultHost, false); err != nil {
			return err
		}
	}
	if c.DefaultURL != "" {
		u, err := url.Parse(c.DefaultURL)
		switch {
		case c.DefaultHost != "":
			return invalid("default-redirect", "can't stand beside default-host")
		case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || strings.ContainsFunc(c.DefaultURL, func(r rune) bool { return r <= ' ' || r > '~' }):
			return invalid("default-redirect", "%q is not a URL such as https://example.org/", c.DefaultURL)
		}
	}
	if c.MaxConns < 0 {
		return invalid("max-conns", "must not be negative")
	}
	if c.MaxPerOwner < 0 {
		return invalid("max-per-owner", "must not be negative")
	}
	if c.MaxPerExposure < 0 {
		return invalid("max-per-exposure", "must not be negative")
	}
	for _, f := range [...]struct {
		name string
		n    int64
	}{{"owner-bandwidth", c.OwnerBandwidth}, {"exposure-bandwidth", c.ExposureBandwidth}} {
		if f.n != 0 && f.n < minBandwidth {
			return invalid(f.name, "must be 0, or at least %d bytes a second", minBandwidth)
		}
	}
	if err := checkPrefixes("allow-direct", c.AllowDirect); err != nil {
		return err
	}
	if err := checkPrefixes("trusted-proxies", c.TrustedProxies); err != nil {
		return err
	}
	for i, p := range c.TrustedProxies {
		if p.Bits() == 0 {
			return invalid(fmt.Sprintf("trusted-proxies[%d]", i), "%s would let every visitor choose their address", p)
		}
	}
	if c.Registry == "" {
		return c.Embedded.validateEmbedded()
	}
	return checkRegistry(c.Registry)
}

// Validate checks the fields; the error names the field.
func (c NodeConfig) Validate() error {
	if err := c.Common.Validate(); err != nil {
		return err
	}
	if c.Name != "" {
		if err := webgw.CheckLabel("name", c.Name); err != nil {
			return err
		}
	}
	if c.Registry == "" {
		return invalid("registry", "missing: give it as ID@host:port")
	}
	if err := checkRegistry(c.Registry); err != nil {
		return err
	}
	if _, err := parseIDs("owners", c.Owners); err != nil {
		return err
	}
	if err := checkPrefixes("allow-targets", c.AllowTargets); err != nil {
		return err
	}
	for i, p := range c.AllowUnix {
		if !strings.HasPrefix(p, "/") {
			return invalid(fmt.Sprintf("allow-unix[%d]", i), "%q is not an absolute path", p)
		}
	}
	return nil
}

func checkPrefixes(field string, list []netip.Prefix) error {
	for i, p := range list {
		if !p.IsValid() || p.Masked() != p || p.Addr().Is4In6() {
			return invalid(fmt.Sprintf("%s[%d]", field, i), "%q is not a network prefix without host bits", p)
		}
	}
	return nil
}

// checkRegistry checks the form ID@host:port, or host:port for a registry
// that was met before.
func checkRegistry(s string) error {
	addr := s
	if id, rest, ok := strings.Cut(s, "@"); ok {
		if _, err := webgw.ParseID(id); err != nil {
			return invalid("registry", "%s", publicOf(err))
		}
		addr = rest
	}
	if _, _, err := webgw.SplitHostPort(addr); err != nil {
		return invalid("registry", "%s", publicOf(err))
	}
	return nil
}

func publicOf(err error) string {
	if e, ok := err.(*webgw.Error); ok {
		return e.Public
	}
	return err.Error()
}
