package cli

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"

	"webgw.dev/webgw"
)

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

// urls tells where visitors find an exposure: each host once, with the port of
// the gateway in whose zone it lies, or of the first one.
func urls(ctx context.Context, d *directory, e *webgw.Exposure) ([]string, error) {
	var gateways []*webgw.Record
	for _, id := range e.Gateways {
		g, err := d.gateway(ctx, id)
		if err != nil {
			return nil, err
		}
		if g != nil { // else its record is withdrawn or has expired
			gateways = append(gateways, g)
		}
	}
	var out []string
	if e.Protocol.ByPort() {
		for _, g := range gateways {
			ports, _ := e.Ports()
			out = append(out, string(e.Protocol)+"://"+net.JoinHostPort(publicHost(g.Gateway), ports.String()))
		}
		return out, nil
	}
	for _, h := range e.Hosts {
		if len(gateways) > 0 {
			out = append(out, hostURL(e, h, gatewayFor(gateways, h)))
		}
	}
	return out, nil
}

// gatewayFor returns the gateway in whose zone the host lies, or the first.
func gatewayFor(gateways []*webgw.Record, host string) *webgw.Record {
	i := slices.IndexFunc(gateways, func(g *webgw.Record) bool { return webgw.Under(host, g.Gateway.Zone) })
	return gateways[max(i, 0)]
}

func hostURL(e *webgw.Exposure, host string, g *webgw.Record) string {
	port := ""
	if g.Gateway.TLSPort != 443 {
		port = fmt.Sprintf(":%d", g.Gateway.TLSPort)
	}
	if e.Protocol == webgw.TLS {
		return fmt.Sprintf("tls://%s:%d", host, cmp.Or(e.Port, g.Gateway.TLSPort))
	}
	return "https://" + host + port + "/"
}

// spread writes an address that a range of ports leads to, "localhost:6000-6100".
func spread(e *webgw.Exposure, address string) string {
	if ports, _ := e.Ports(); ports.Len() > 1 {
		i := strings.LastIndexByte(address, ':') + 1
		if first, err := webgw.ParsePortRange(address[i:]); err == nil { // validated with its record
			first.Last += uint16(ports.Len() - 1)
			return address[:i] + first.String()
		}
	}
	return address
}

// publicHost is the host at which a gateway is found by everybody, nodes included.
func publicHost(g *webgw.Gateway) string {
	host, _, err := net.SplitHostPort(g.Addresses[0]) // records are validated
	if err != nil {
		return g.Addresses[0]
	}
	return host
}
