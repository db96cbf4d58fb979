package cli

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client/manifest"
	"webgw.dev/webgw/internal/daemon"
)

// parseTarget reads what is to be exposed: a port of this machine, host:port,
// unix:/path, or direct:host:port, which gateways dial themselves.
func parseTarget(s string, p webgw.ExposureProtocol) (address, direct string, err error) {
	wrong := func(err error) error {
		e, _ := errors.AsType[*webgw.Error](err)
		return invalid("target", "a target is PORT, HOST:PORT, unix:/PATH or direct:HOST:PORT", "%s", e.Sentence())
	}
	if d, ok := strings.CutPrefix(s, "direct:"); ok {
		if err := webgw.CheckTargetAddress("", d); err != nil || strings.HasPrefix(d, "unix:") {
			return "", "", wrong(cmpErr(err, d))
		}
		return "", d, nil
	}
	here := "localhost:"
	if p == webgw.UDP {
		// Nobody answers a dial: the second address of a name is never tried.
		here = "127.0.0.1:"
	}
	if n, err := strconv.ParseUint(s, 10, 16); err == nil && n > 0 {
		s = here + strconv.FormatUint(n, 10)
	}
	if port, ok := strings.CutPrefix(s, ":"); ok {
		s = here + port
	}
	if err := webgw.CheckTargetAddress("", s); err != nil {
		return "", "", wrong(err)
	}
	return s, "", nil
}

// cutRange splits a target whose port is a range into the target of the first
// port and how many there are.
func cutRange(s string, p webgw.ExposureProtocol) (first string, count int, err error) {
	head, port := s, ""
	if i := strings.LastIndexByte(s, ':'); !strings.HasPrefix(s, "unix:") {
		head, port = s[:i+1], s[i+1:]
	}
	if !strings.Contains(port, "-") {
		return s, 1, nil
	}
	r, err := webgw.ParsePortRange(port)
	switch {
	case err != nil:
		return s, 1, nil // parseTarget tells what is wrong
	case !p.ByPort():
		return "", 0, invalid("target", "", "%s is found by its name: give one port", p)
	}
	return head + strconv.Itoa(int(r.First)), r.Len(), nil
}

func cmpErr(err error, target string) error {
	if err == nil {
		err = &webgw.Error{Kind: webgw.Invalid, Public: fmt.Sprintf("%q is a socket of one machine, and can't be dialed by gateways", target)}
	}
	return err
}

// plan is what is to be exposed, worked out against what the registry knows.
type plan struct {
	name     string // of the record
	chosen   bool   // the name was made up here, and may be made up anew
	exposure webgw.Exposure
	gateways []*webgw.Record
	freePort bool   // the port was proposed, and another one will do
	count    int    // of ports
	zone     string // of the grid, if names are to be in it
}

// take makes the exposure's ports those from first on.
func (p *plan) take(first uint16) {
	p.exposure.Port, p.exposure.PortEnd = first, 0
	if first != 0 && p.count > 1 {
		p.exposure.PortEnd = first + uint16(p.count-1)
	}
}

// publicPorts reads --port against the number of the target's ports.
func (v *exposing) publicPorts() (first uint16, count int, err error) {
	if v.ports == "" {
		return 0, v.count, nil
	}
	r, err := webgw.ParsePortRange(v.ports)
	switch {
	case err != nil:
		return 0, 0, invalid("port", "", "%s", err.(*webgw.Error).Public)
	case r.Len() == 1:
		count = v.count
	case v.count == 1 || v.count == r.Len():
		count = r.Len()
	default:
		return 0, 0, invalid("port", "give the first one only", "%s are %d ports, and the target has %d", r, r.Len(), v.count)
	}
	if int(r.First)+count-1 > 65535 {
		return 0, 0, invalid("port", "", "%d ports from %d on end above 65535", count, r.First)
	}
	return r.First, count, nil
}

// words make names that are easy to read out. Two of them are a name.
var words = [2][]string{
	strings.Fields("amber brave calm clever cosy crisp early eager fair fancy fleet fond fresh gentle giant glad golden green happy humble ivory jolly keen kind lively lucky lunar mellow merry mild misty modest neat noble olive polite proud quick quiet rapid red royal rustic shiny silent silver smart snowy solar steady sunny swift tidy tiny velvet vivid warm wild wise witty young zesty"),
	strings.Fields("acorn anchor apple badger beacon birch bridge brook candle canyon cedar cloud clover comet coral crane daisy delta dolphin eagle ember falcon fern finch forest fox garden glacier harbor hazel heron island ivy jasmine juniper kettle lagoon lantern lark lemon lily lynx maple meadow nectar oasis orchid otter owl pebble pine planet quartz raven reef river robin saddle sparrow spruce tulip valley willow"),
}

func randomName() string {
	return words[0][rand.IntN(len(words[0]))] + "-" + words[1][rand.IntN(len(words[1]))]
}

// plan works out the record: its name, gateways, hosts or port.
func (v *exposing) plan(ctx context.Context, d *directory) (*plan, error) {
	p := &plan{name: v.Name, exposure: webgw.Exposure{Protocol: v.protocol}}
	if err := v.limitFlags.shape(&p.exposure); err != nil {
		return nil, err
	}
	if v.more != nil {
		if err := v.more(&p.exposure); err != nil {
			return nil, err
		}
	}
	port, count, err := v.publicPorts()
	if err != nil {
		return nil, err
	}
	p.count = count
	domains := make([]string, len(v.Domains))
	if !v.protocol.ByPort() && len(domains) == 0 {
		info, err := d.c.Info(ctx)
		if err != nil {
			return nil, err
		}
		p.zone = info.Zone
	}
	for i, s := range v.Domains {
		h, err := manifest.Host("domain", s, true)
		if err != nil {
			return nil, err
		}
		domains[i] = h
	}
	if p.gateways, err = v.pick(ctx, d, len(domains) == 0 && p.zone == ""); err != nil {
		return nil, err
	}
	if len(v.Gateways) > 0 && slices.ContainsFunc(p.gateways, func(g *webgw.Record) bool { return g.Gateway.Zone != "" }) {
		p.zone = ""
	}
	for _, g := range p.gateways {
		p.exposure.Gateways = append(p.exposure.Gateways, g.Owner)
	}
	switch {
	case v.Name != "":
		if p.name, err = label(v.Name); err != nil {
			return nil, err
		}
	case len(domains) > 0:
		p.name = strings.ReplaceAll(strings.TrimPrefix(domains[0], "*."), ".", "-")
		if len(p.name) > 63 {
			p.name = strings.TrimRight(p.name[:63], "-")
		}
	default:
		p.name, p.chosen = randomName(), true
	}
	p.take(port)
	if v.protocol.ByPort() {
		p.freePort = port == 0
		return p, nil
	}
	p.exposure.Hosts = domains
	if len(domains) == 0 {
		return p, p.named()
	}
	return p, nil
}

// named gives the hosts that follow from the name: one per zone of the gateways
// that were asked for, else the one in the grid's zone, else one per zone of the
// gateways that were chosen here.
func (p *plan) named() error {
	p.exposure.Hosts = nil
	if p.zone != "" {
		p.exposure.Hosts = []string{p.name + "." + p.zone}
		return nil
	}
	for _, g := range p.gateways {
		if z := g.Gateway.Zone; z != "" && !slices.Contains(p.exposure.Hosts, p.name+"."+z) {
			p.exposure.Hosts = append(p.exposure.Hosts, p.name+"."+z)
		}
	}
	if len(p.exposure.Hosts) == 0 {
		return invalid("domain", "give --domain", "missing: gateway %s gives out no names", p.gateways[0].Name)
	}
	return nil
}

// again changes a name or port that was made up here and is taken. It reports
// whether there was one.
func (p *plan) again(err error) bool {
	e, ok := errors.AsType[*webgw.Error](err)
	switch {
	case !ok || e.Kind != webgw.Taken:
		return false
	case e.Field == "exposure.port":
		p.exposure.Port = 0
		return p.freePort
	case !p.chosen:
		return false
	}
	p.name = randomName()
	return p.exposure.Protocol.ByPort() || p.named() == nil
}

// label reads a name for a record, which becomes part of a host name.
func label(s string) (string, error) {
	if strings.Contains(s, ".") {
		return "", invalid("name", "give whole host names by --domain", "%q has dots; a name is one label", s)
	}
	host, err := manifest.Host("name", s+".test", false)
	if err != nil {
		if e, ok := errors.AsType[*webgw.Error](err); ok {
			c := *e
			c.Public = strings.ReplaceAll(c.Public, ".test", "")
			err = &c
		}
		return "", err
	}
	return strings.TrimSuffix(host, ".test"), nil
}

// pick chooses the gateways: those named, else the only one, else two of those
// that fit, such that are up first.
func (v *exposing) pick(ctx context.Context, d *directory, needZone bool) ([]*webgw.Record, error) {
	if len(v.Gateways) > 0 {
		var out []*webgw.Record
		for i, name := range v.Gateways {
			field := "gateway"
			if len(v.Gateways) > 1 {
				field = fmt.Sprintf("gateway[%d]", i)
			}
			id, err := manifest.Resolve(ctx, d, webgw.KindGateway, field, name)
			if err != nil {
				return nil, err
			}
			g, err := d.gateway(ctx, id)
			if err != nil {
				return nil, err
			}
			if g == nil {
				return nil, &webgw.Error{Kind: webgw.NotFound, Field: field, Public: "there is no gateway " + name, Hint: "webgw get gateways lists those that you may see"}
			}
			out = append(out, g)
		}
		return out, nil
	}
	all, err := d.list(ctx, webgw.KindGateway)
	if err != nil {
		return nil, err
	}
	overview, err := d.c.Status(ctx)
	if err != nil {
		return nil, err
	}
	up := map[webgw.ID]bool{}
	for _, p := range overview.Gateways {
		up[p.ID] = p.Up
	}
	var fit []*webgw.Record
	for _, s := range all {
		g := s.Record
		known := slices.ContainsFunc(fit, func(o *webgw.Record) bool { return o.Owner == g.Owner })
		if known || (v.protocol.ByPort() || v.ports != "") && g.Gateway.Ports == "" || !v.protocol.ByPort() && needZone && g.Gateway.Zone == "" {
			continue
		}
		fit = append(fit, g)
	}
	if len(fit) == 0 {
		missing := "gives out names"
		hint := "give --domain, or --gateway with one of webgw get gateways"
		if v.protocol.ByPort() {
			missing, hint = "offers ports", "webgw get gateways lists those that you may see"
		}
		if len(all) == 0 {
			return nil, &webgw.Error{Kind: webgw.NotFound, Field: "gateway", Public: "there is no gateway", Hint: "webgw gateway runs one"}
		}
		return nil, &webgw.Error{Kind: webgw.NotFound, Field: "gateway", Public: "there is no gateway that " + missing, Hint: hint}
	}
	slices.SortStableFunc(fit, func(a, b *webgw.Record) int {
		if up[a.Owner] != up[b.Owner] {
			if up[a.Owner] {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Name, b.Name)
	})
	return fit[:min(2, len(fit))], nil
}

// reachOf tells a node in the foreground what it may dial: this target only.
func reachOf(ctx context.Context, target string, c *daemon.NodeConfig) error {
	if path, ok := strings.CutPrefix(target, "unix:"); ok {
		c.AllowUnix = []string{filepath.Dir(path)}
		return nil
	}
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		return err
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return &webgw.Error{Op: "resolve", Kind: webgw.NotFound, Field: "target", Public: fmt.Sprintf("the host %s is not known", host), Err: err}
	}
	for _, ip := range addrs {
		ip = ip.Unmap().WithZone("")
		c.AllowTargets = append(c.AllowTargets, netip.PrefixFrom(ip, ip.BitLen()))
	}
	return nil
}
