package cli

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/daemon"
)

type registryVerb struct {
	Config daemon.RegistryConfig `embed:""`
}

type gatewayVerb struct {
	Config   daemon.GatewayConfig `embed:""`
	Embedded embeddedRegistry     `embed:""`
}

// embeddedRegistry are the flags of the registry that a gateway embeds. They
// are the section registry of the settings file.
type embeddedRegistry struct {
	Admit         []string      `yaml:"admit" section:"registry" help:"Embedded registry: identities that may declare records; none, or 'open', admits everybody." placeholder:"ID"`
	Quota         int           `yaml:"quota" section:"registry" help:"Embedded registry: live records that one owner may hold; 0 is the default."`
	NameGrace     time.Duration `name:"name-grace" yaml:"name-grace" section:"registry" help:"Embedded registry: how long a freed name stays its former owner's; 0 is 24h." placeholder:"TIME"`
	GridZone      string        `name:"grid-zone" yaml:"grid-zone" section:"registry" help:"Embedded registry: DNS zone of the whole grid." placeholder:"DOMAIN"`
	Resolvers     []string      `name:"resolver" yaml:"resolvers" section:"registry" help:"Embedded registry: host:port of a DNS resolver that proofs of domains are looked up at." placeholder:"HOST:PORT"`
	DomainProof   string        `name:"domain-proof" yaml:"domain-proof" section:"registry" help:"Embedded registry: on or off; empty is on if there are resolvers or a grid-zone."`
	EtcdEndpoints []string      `name:"etcd-endpoint" yaml:"etcd-endpoints" section:"registry" help:"Embedded registry: URL of an external etcd." placeholder:"URL"`
	EtcdCA        string        `name:"etcd-ca" yaml:"etcd-ca" section:"registry" help:"Embedded registry: PEM file of etcd's authorities." placeholder:"FILE"`
	EtcdCert      string        `name:"etcd-cert" yaml:"etcd-cert" section:"registry" help:"Embedded registry: PEM file of the certificate to show to etcd." placeholder:"FILE"`
	EtcdKey       string        `name:"etcd-key" yaml:"etcd-key" section:"registry" help:"Embedded registry: PEM file of its key." placeholder:"FILE"`
}

type nodeVerb struct {
	Config daemon.NodeConfig `embed:""`
}

// The parser has validated the configurations of roles when Run is called.

func (v *registryVerb) Run(ctx context.Context, a *app) error {
	return a.serve(ctx, v.Config.Common, v.Config.Run)
}

func (v *gatewayVerb) Run(ctx context.Context, a *app) error {
	e := v.Embedded
	v.Config.Embedded = daemon.RegistryConfig{Admit: e.Admit, Quota: e.Quota, NameGrace: e.NameGrace, GridZone: e.GridZone, Resolvers: e.Resolvers, DomainProof: e.DomainProof, EtcdEndpoints: e.EtcdEndpoints, EtcdCA: e.EtcdCA, EtcdCert: e.EtcdCert, EtcdKey: e.EtcdKey}
	if err := v.Config.Validate(); err != nil {
		return a.settings.locate("registry", err)
	}
	return a.serve(ctx, v.Config.Common, v.Config.Run)
}

func (v *nodeVerb) Run(ctx context.Context, a *app) error {
	if len(v.Config.Owners) == 0 { // the local owner
		key, err := a.ownerKey("")
		if err != nil {
			return err
		}
		v.Config.Owners = []string{key.ID().String()}
	}
	return a.serve(ctx, v.Config.Common, v.Config.Run)
}

// serve runs a role until ctx ends and tells when it serves.
func (a *app) serve(ctx context.Context, c daemon.Common, run func(context.Context, daemon.Env) error) error {
	log := newLogger(a.env.Stderr, c)
	var tidy sync.WaitGroup
	defer tidy.Wait()
	serving, over := context.WithCancel(ctx)
	defer over()
	tidy.Go(func() { daemon.Tidy(serving) })
	ready := func(i daemon.Info) { a.announce(i) }
	err := run(ctx, daemon.Env{Net: a.env.Net, Log: log, Ready: ready, Release: version().Version})
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return nil
	}
	return explain(err)
}

// announce tells people how a role that now serves is reached.
func (a *app) announce(i daemon.Info) {
	var names []string
	for n := range i.Addrs {
		names = append(names, n)
	}
	sort.Strings(names)
	if a.json {
		out := struct {
			Event    string            `json:"event"`
			Role     string            `json:"role"`
			ID       webgw.ID          `json:"id"`
			Name     string            `json:"name,omitempty"`
			Addrs    map[string]string `json:"addrs,omitempty"`
			Registry string            `json:"registry,omitempty"`
			CAFile   string            `json:"caFile,omitempty"`
		}{"ready", i.Role, i.ID, i.Name, map[string]string{}, i.Registry, i.CAFile}
		for _, n := range names {
			out.Addrs[n] = i.Addrs[n].String()
		}
		if err := a.printJSON(out); err != nil {
			a.notef("webgw: standard output: %v\n", err)
		}
		return
	}
	what := i.Role
	if i.Name != "" {
		what += " " + i.Name
	}
	a.printf("%s serves as %s\n", what, i.ID)
	for _, n := range names {
		a.printf("  %-8s %s\n", n, i.Addrs[n])
	}
	if i.Registry != "" {
		a.printf("  registry %s\n", i.Registry)
	}
	if i.CAFile != "" {
		a.printf("  authority of its certificates: %s\n", i.CAFile)
	}
}

// newLogger logs as configured; the values are validated.
func newLogger(w io.Writer, c daemon.Common) *slog.Logger {
	level := map[string]slog.Level{"debug": slog.LevelDebug, "warn": slog.LevelWarn, "error": slog.LevelError}[c.LogLevel]
	options := &slog.HandlerOptions{Level: level}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// explain puts what the system refuses at a role's start into words.
func explain(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "listen" {
		at := ""
		if op.Addr != nil {
			at = " " + op.Addr.String()
		}
		switch {
		case errors.Is(err, syscall.EADDRINUSE):
			return &webgw.Error{Op: "listen", Kind: webgw.Taken, Public: "another process listens at" + at, Hint: "stop it, or choose another address; ss -ltnp shows who it is", Err: err}
		case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
			return &webgw.Error{Op: "listen", Kind: webgw.Forbidden, Public: "this user may not listen at" + at, Hint: "choose ports above 1023, or grant CAP_NET_BIND_SERVICE", Err: err}
		case errors.Is(err, syscall.EADDRNOTAVAIL):
			return &webgw.Error{Op: "listen", Kind: webgw.Invalid, Public: "this machine does not have the address" + at, Err: err}
		}
	}
	if _, ok := errors.AsType[*webgw.Error](err); ok {
		return err
	}
	if errors.Is(err, os.ErrPermission) {
		return &webgw.Error{Kind: webgw.Forbidden, Public: strings.TrimSpace(err.Error()), Hint: "choose a directory that this user may write, by --state-dir", Err: err}
	}
	return err
}
