package daemon

import (
	"cmp"
	"context"
	"errors"
	"net"
	"path/filepath"
	"strconv"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/gateway"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/ingress"
	"webgw.dev/webgw/internal/registry"
	"webgw.dev/webgw/internal/run"
)

func runGateway(ctx context.Context, c GatewayConfig, env Env) error {
	if err := c.Validate(); err != nil {
		return err
	}
	env, err := env.prepare(c.Common, "gateway")
	if err != nil {
		return err
	}
	record, httpAddr, tlsAddr, err := c.resolve()
	if err != nil {
		return err
	}
	name := cmp.Or(c.Name, hostLabel())
	info := Info{Role: "gateway", ID: env.Key.ID(), Name: name, Addrs: map[string]net.Addr{}}
	certificates, caFile, err := c.certificates(env, name)
	if err != nil {
		return err
	}
	info.CAFile = caFile

	g := run.New(ctx, env.Log)
	g.Drain = env.Drain + 15*time.Second
	stop := func(err error) error { return errors.Join(err, g.Stop()) }

	// The registry first, if it is ours: the gateway is its client like any
	// other. Its connections come in by the gateway's TLS port.
	handlers := map[string]ingress.Handler{}
	var own *registry.Server
	var ownConns *handed
	reg := (*client.Client)(nil)
	if c.Registry == "" {
		key, created, err := ident.LoadOrCreate(filepath.Join(c.StateDir, "registry.key"))
		if err != nil {
			return stop(err)
		}
		if created {
			env.Log.Info("made a new identity for the embedded registry; keep the file", "id", key.ID().String())
		}
		embedded := c.Embedded
		embedded.Common = c.Common
		if own, err = embedded.start(ctx, g, env, key); err != nil {
			return stop(err)
		}
		ownConns = newHanded(&net.TCPAddr{})
		handlers[webgw.ALPNRegistry] = ownConns.take
		if reg, err = env.registry(c.Common, key.ID().String()+"@"+loopbackOf(tlsAddr)); err != nil {
			return stop(err)
		}
		info.Registry = key.ID().String() + "@" + record.Addresses[0]
	} else {
		if reg, err = env.registry(c.Common, c.Registry); err != nil {
			return stop(err)
		}
		info.Registry = registryName(reg)
	}
	defer reg.Close()

	var countries *ingress.Countries
	if c.Countries != "" {
		if countries, err = ingress.OpenCountries(c.Countries, env.Log); err != nil {
			return stop(invalid("countries", "%v", err))
		}
	}
	known := newDeclared()
	gw := &gateway.Gateway{
		Key: env.Key, Ports: record.Ports, Addresses: record.Addresses, AllowDirect: c.AllowDirect, Handlers: handlers, Net: env.Net,
		Ingress: &ingress.Server{Name: name, HTTPAddr: httpAddr, TLSAddr: tlsAddr, QUIC: !c.NoQUIC, BindHost: c.Bind, Certificates: certificates, Countries: countries,
			TrustedProxies: c.TrustedProxies, PublicTLSPort: record.TLSPort, DefaultHost: c.DefaultHost, DefaultRedirect: c.DefaultURL, Limits: ingress.Limits{Connections: c.MaxConns, PerOwner: c.MaxPerOwner, PerExposure: c.MaxPerExposure,
				OwnerBandwidth: c.OwnerBandwidth, ExposureBandwidth: c.ExposureBandwidth}},
		Feed: env.feed(reg, client.ScopeGateway), Report: reg.ReportStatus, Snapshot: filepath.Join(c.StateDir, "gateway.snapshot"),
		Release: env.Release, Drain: env.Drain, Metrics: env.Metrics, Log: env.Log,
		Declare: func(ctx context.Context, issued, expires time.Time) error {
			body := record
			_, _, err := reg.Declare(ctx, webgw.Record{Kind: webgw.KindGateway, Name: name, Issued: issued, Expires: expires, Gateway: &body})
			return known.note(err)
		},
	}
	certificates.Allowed = func(name string) bool { return gw.Ingress.Table().Terminates(name) }
	if caFile == "" {
		gw.Covered = covers(certificates)
	}
	if err := env.startStatus(ctx, g, c.Common, &info, []check{{"state", followed(gw.View)}, {"record", known.check}}); err != nil {
		return stop(err)
	}
	bound := make(chan []net.Addr, 1)
	gw.Ready = func(addrs []net.Addr) { bound <- addrs }
	g.Go("certificates", certificates.Watch)
	if countries != nil {
		g.Go("countries", countries.Watch)
	}
	g.Go("gateway", gw.Run)
	if own != nil {
		// Stopped before the gateway, so that its watches are told.
		g.Go("registry api", func(ctx context.Context) error { return own.Serve(ctx, ownConns) })
	}
	g.Go("ready", func(ctx context.Context) error {
		select {
		case addrs := <-bound:
			if httpAddr != "" {
				info.Addrs["http"], addrs = addrs[0], addrs[1:]
			}
			info.Addrs["tls"] = addrs[0]
		case <-ctx.Done():
			return nil
		}
		if own != nil {
			if err := own.Ready(ctx); err != nil {
				return err
			}
		}
		if known.wait(ctx); ctx.Err() != nil {
			return nil
		}
		env.Log.Info("gateway", "gateway", info.ID.String(), "name", name, "addresses", record.Addresses, "registry", info.Registry)
		env.Ready(info)
		return nil
	})
	return g.Wait()
}

// resolve works out what the zero values stand for: the record, and where to
// listen.
func (c GatewayConfig) resolve() (record webgw.Gateway, httpAddr, tlsAddr string, err error) {
	at := func(addr, otherwise string) (string, uint16, error) {
		host, port, err := net.SplitHostPort(cmp.Or(addr, otherwise))
		if err != nil {
			return "", 0, err
		}
		n, err := strconv.ParseUint(port, 10, 16)
		return net.JoinHostPort(cmp.Or(host, c.Bind), port), uint16(n), err
	}
	var httpPort, tlsPort uint16
	if c.HTTPAddr != off {
		if httpAddr, httpPort, err = at(c.HTTPAddr, DefaultHTTPAddr); err != nil {
			return record, "", "", err
		}
	}
	if tlsAddr, tlsPort, err = at(c.TLSAddr, DefaultTLSAddr); err != nil {
		return record, "", "", err
	}
	record = webgw.Gateway{Farmer: c.Farmer, Zone: c.Zone, Addresses: c.Addresses,
		HTTPPort: cmp.Or(c.PublicHTTPPort, httpPort), TLSPort: cmp.Or(c.PublicTLSPort, tlsPort)}
	if httpAddr == "" {
		record.HTTPPort = 0
	}
	if record.TLSPort == 0 {
		return record, "", "", invalid("public-tls-port", "missing: the port of tls-addr is chosen by the system")
	}
	if c.Ports != off {
		record.Ports = cmp.Or(c.Ports, DefaultPorts)
	}
	if len(record.Addresses) == 0 {
		host := cmp.Or(c.Zone, c.Bind, hostName())
		record.Addresses = []string{net.JoinHostPort(host, strconv.Itoa(int(record.TLSPort)))}
		if err := webgw.CheckTargetAddress("addresses", record.Addresses[0]); err != nil {
			return record, "", "", &webgw.Error{Op: "read configuration", Kind: webgw.Invalid, Field: "addresses",
				Public: "missing, and the host name " + strconv.Quote(host) + " can't stand for it", Hint: "give the host:port by which nodes reach this gateway", Err: err}
		}
	}
	return record, httpAddr, tlsAddr, nil
}

// loopbackOf is where this machine itself reaches an address that it listens on.
func loopbackOf(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	return net.JoinHostPort(host, port)
}
