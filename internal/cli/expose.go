package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/client/manifest"
)

type exposeVerb struct {
	HTTP exposeHTTP `cmd:"" name:"http" help:"Expose a web server by host name; the gateway terminates TLS."`
	TCP  exposeTCP  `cmd:"" name:"tcp" help:"Expose any TCP server by port."`
	UDP  exposeUDP  `cmd:"" name:"udp" help:"Expose any UDP server by port."`
	TLS  exposeTLS  `cmd:"" name:"tls" help:"Expose a TLS server by host name; only it can decrypt."`
}

type exposeHTTP struct {
	exposing
	httpFlags
}

type exposeTCP struct {
	exposing
	proxyFlag
	Port string `help:"Public port or range; none takes what is free." placeholder:"PORT[-PORT]"`
}

type exposeUDP struct {
	exposing
	Port string `help:"Public port or range; none takes what is free." placeholder:"PORT[-PORT]"`
}

type exposeTLS struct {
	exposing
	proxyFlag
	Port string `help:"Public port, which others may share by their host names; none is the gateways' TLS port." placeholder:"PORT"`
	QUIC bool   `name:"quic" help:"The server takes QUIC, too, at the same address by UDP."`
}

// exposing is what the verbs below expose have in common.
type exposing struct {
	Target   string   `arg:"" help:"PORT, HOST:PORT, unix:/PATH, or direct:HOST:PORT, which gateways dial themselves. For tcp and udp, PORT may be a range: 6000-6100."`
	Name     string   `help:"Name; becomes NAME.ZONE at each gateway that has a zone. None makes one up."`
	Domains  []string `name:"domain" help:"Host name of your own, instead of one in the gateways' zones." placeholder:"HOST"`
	Gateways []string `name:"gateway" help:"Gateway, by name or identity; none takes the only one, or two." placeholder:"NAME"`
	Node     string   `help:"Node that the target is on; none runs one here, until Ctrl-C." placeholder:"NAME"`
	Lifetime string   `help:"How long the exposure counts with --node or a direct target." default:"365d"`
	Verbose  bool     `short:"v" help:"Log what the node does."`
	DryRun   bool     `name:"dry-run" help:"Expose nothing; print a manifest for webgw apply."`
	limitFlags
	ownerFlags

	protocol webgw.ExposureProtocol
	ports    string                      // public ones, as given
	count    int                         // of ports
	more     func(*webgw.Exposure) error // what flags of the protocol say; nil: nothing
}

func (v *exposeHTTP) Run(ctx context.Context, a *app) error {
	v.protocol, v.more = webgw.HTTP, v.httpFlags.shape
	return v.run(ctx, a)
}

func (v *exposeTCP) Run(ctx context.Context, a *app) error {
	v.more = func(e *webgw.Exposure) error {
		e.ProxyProtocol = webgw.ProxyProtocol(v.ProxyProtocol)
		return nil
	}
	return v.byPort(ctx, a, webgw.TCP, v.Port)
}

func (v *exposeUDP) Run(ctx context.Context, a *app) error {
	return v.byPort(ctx, a, webgw.UDP, v.Port)
}

// byPort exposes a server that is found by a public port.
func (v *exposing) byPort(ctx context.Context, a *app, protocol webgw.ExposureProtocol, ports string) error {
	v.protocol, v.ports = protocol, ports
	if len(v.Domains) > 0 {
		return invalid("domain", "", "a %s port is found by its number, not by a name", strings.ToUpper(string(protocol)))
	}
	return v.run(ctx, a)
}

func (v *exposeTLS) Run(ctx context.Context, a *app) error {
	v.protocol, v.ports = webgw.TLS, v.Port
	v.more = func(e *webgw.Exposure) error {
		e.QUIC, e.ProxyProtocol = v.QUIC, webgw.ProxyProtocol(v.ProxyProtocol)
		return nil
	}
	return v.run(ctx, a)
}

func (v *exposing) run(ctx context.Context, a *app) error {
	var address, direct string
	one, count, err := cutRange(v.Target, v.protocol)
	if err == nil {
		address, direct, err = parseTarget(one, v.protocol)
	}
	if err != nil {
		return err
	}
	v.count = count
	lifetime, err := manifest.ParseLifetime(v.Lifetime)
	if err != nil {
		return invalid("lifetime", "", "%s", err.(*webgw.Error).Public)
	}
	if direct != "" && v.Node != "" {
		return invalid("node", "", "a direct target is dialed by the gateways, and is on no node")
	}
	c, err := a.connect(v.ownerFlags)
	if err != nil {
		return err
	}
	defer c.Close()
	d := newDirectory(c)
	p, err := v.plan(ctx, d)
	if err != nil {
		return err
	}
	target := webgw.Target{Direct: direct, Address: address}
	if v.Node != "" {
		if target.Node, err = manifest.Resolve(ctx, d, webgw.KindNode, "node", v.Node); err != nil {
			return err
		}
	}
	if v.DryRun {
		return v.manifest(ctx, a, d, p, target, lifetime)
	}
	if direct == "" && v.Node == "" {
		return v.foreground(ctx, a, d, p, target)
	}
	p.exposure.Targets = []webgw.Target{target}
	if _, err := p.declare(ctx, c, lifetime); err != nil {
		return err
	}
	public, err := urls(ctx, d, &p.exposure)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(exposedJSON{"exposed", p.name, public, target.Node})
	}
	for _, u := range public {
		a.printf("%s\n", u)
	}
	a.notef("exposure %s is declared for %s; webgw status tells when it is up\n", p.name, v.Lifetime)
	return nil
}

type exposedJSON struct {
	Event string   `json:"event"`
	Name  string   `json:"name"`
	URLs  []string `json:"urls"`
	Node  webgw.ID `json:"node,omitzero"`
}

// declareTries bounds how often a made-up name or port is made up anew.
const declareTries = 8

// declare puts the exposure, with a free port or another name where those are
// ours to choose. It refuses to change an exposure that leads elsewhere.
func (p *plan) declare(ctx context.Context, c *client.Client, lifetime time.Duration) (client.Signed, error) {
	for try := 1; ; try++ {
		if p.freePort && p.exposure.Port == 0 {
			port, err := c.FreePorts(ctx, p.exposure.Protocol, p.count, p.exposure.Gateways...)
			if err != nil {
				return client.Signed{}, err
			}
			p.take(port)
		}
		s, err := p.put(ctx, c, lifetime)
		if err == nil || try == declareTries || !p.again(err) {
			return s, err
		}
	}
}

func (p *plan) put(ctx context.Context, c *client.Client, lifetime time.Duration) (client.Signed, error) {
	key := webgw.Key{Kind: webgw.KindExposure, Owner: c.Key.ID(), Name: p.name}
	old, err := c.Get(ctx, key)
	if err != nil && webgw.KindOf(err) != webgw.NotFound {
		return client.Signed{}, err
	}
	if err == nil && old.Record.Live(time.Now()) && !slices.Equal(old.Record.Exposure.Targets, p.exposure.Targets) {
		return client.Signed{}, &webgw.Error{Op: "expose", Kind: webgw.Taken, Field: "name", Public: fmt.Sprintf("you have an exposure %s already, which leads elsewhere", p.name),
			Hint: "choose another --name, or withdraw it: webgw delete exposure " + p.name}
	}
	s, _, err := c.Declare(ctx, webgw.Record{Kind: webgw.KindExposure, Name: p.name, Expires: time.Now().Add(lifetime), Exposure: &p.exposure})
	return s, err
}
