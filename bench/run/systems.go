//go:build linux

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// kind is a system that can be started, more than once.
type kind struct {
	name  string
	start func(context.Context) (*system, error)
}

// system is one that runs: two processes between visitors and workloads.
type system struct {
	name     string
	services map[string]Endpoint
	hops     []hop         // gateway, node
	rest     time.Duration // how long its memory may stand still before it settles further
}

// tidied is the rest of processes that run daemon.Tidy.
const tidied = 11 * time.Second

// Names of services.
const (
	passthrough = "passthrough"
	sealedTCP   = "tcp"
	plainHTTP   = "http"
	secureHTTP  = "https"
	http2       = "h2"
	udp         = "udp"
)

// hop is one of the processes; roles of our own can be asked about themselves.
type hop struct {
	*child
	role    bool
	metrics string // URL of Prometheus metrics, or ""
}

func (s *system) pids() []int {
	var out []int
	for _, h := range s.hops {
		out = append(out, h.cmd.Process.Pid)
	}
	return out
}

func (s *system) stop() {
	for _, h := range s.hops {
		h.child.stop()
	}
}

func (h hop) footprint() (footprint, error) {
	f, err := readFootprint(h.cmd.Process.Pid)
	if err != nil {
		return f, err
	}
	if h.role {
		var a inspected
		if err = h.call(inspection{}, &a); err == nil {
			f.Goroutines = float64(a.Goroutines)
		}
	} else if h.metrics != "" {
		f.Goroutines, err = goroutines(h.metrics)
	}
	return f, err
}

// profile begins CPU profiles of the hops that can be asked for them; the
// returned function ends them and adds heap profiles.
func (s *system) profile(dir string, m measure, seconds float64) (done func() error, err error) {
	done = func() error { return nil }
	if dir == "" || !s.hops[0].role {
		return done, nil
	}
	ask := func(q func(prefix string) inspection) error {
		for i, h := range s.hops {
			prefix := filepath.Join(dir, strings.NewReplacer(" ", "-", "/", "-").Replace(s.name+"."+m.name())+"."+hopNames[i])
			var a inspected
			if err := h.call(q(prefix), &a); err != nil {
				return err
			}
			if a.Error != "" {
				return errors.New(a.Error)
			}
		}
		return nil
	}
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return nil, err
	}
	if seconds > 0 {
		if err := ask(func(p string) inspection { return inspection{CPU: p + ".cpu.prof"} }); err != nil {
			return nil, err
		}
	}
	return func() error {
		return ask(func(p string) inspection {
			return inspection{Stop: seconds > 0, Heap: p + ".heap.prof", Threads: p + ".goroutine.prof"}
		})
	}, nil
}

var hopNames = [...]string{"gateway", "node"}

// kinds lists the systems that this machine can run and that are asked for.
func (r *rig) kinds(ctx context.Context) []kind {
	all := []kind{
		{nameHAProxy, func(ctx context.Context) (*system, error) { return r.haproxy(ctx, 0) }},
		{nameLarge, func(ctx context.Context) (*system, error) { return r.haproxy(ctx, 256<<10) }},
		{nameOnce, r.haproxyOnce},
		{nameSplice, r.splice},
		{nameTunnel, r.tunnel},
		{nameOurs, r.webgw},
	}
	_, noHAProxy := exec.LookPath("haproxy")
	var out []kind
	for _, k := range all {
		if !r.o.systems.MatchString(k.name) {
			continue
		}
		if strings.HasPrefix(k.name, "HAProxy") && noHAProxy != nil {
			fmt.Fprintf(os.Stderr, "%s is left out: %v\n", k.name, noHAProxy)
			continue
		}
		out = append(out, k)
	}
	return out
}

const (
	nameHAProxy = "HAProxy→HAProxy"
	nameLarge   = "HAProxy→HAProxy 256K"
	nameOnce    = "HAProxy once"
	nameSplice  = "splice twice"
	nameTunnel  = "tunnel alone"
	nameOurs    = "webgw"
)

// haproxy starts two HAProxies in a row, with the given size of buffers or its
// default.
func (r *rig) haproxy(ctx context.Context, buffer int) (*system, error) {
	s := &system{name: nameHAProxy}
	if buffer > 0 {
		s.name = nameLarge
	}
	to := map[string]string{sealedTCP: r.ports.Raw, plainHTTP: r.ports.HTTP, secureHTTP: r.ports.HTTP}
	node, at, err := r.haproxyHop(ctx, buffer, "", to)
	if err != nil {
		return nil, err
	}
	for service, addr := range at {
		to[service] = r.across(addr)
	}
	gateway, at, err := r.haproxyHop(ctx, buffer, " ssl alpn h2,http/1.1 crt "+r.cert, to)
	if err != nil {
		node.stop()
		return nil, err
	}
	s.hops = []hop{{child: gateway}, {child: node}}
	s.services = map[string]Endpoint{
		passthrough: {Addr: at[sealedTCP], Hello: passHost},
		sealedTCP:   {Addr: at[sealedTCP]},
		plainHTTP:   {Addr: at[plainHTTP], Host: plainHost},
		secureHTTP:  {Addr: at[secureHTTP], Host: secureHost, TLS: true},
		http2:       {Addr: at[secureHTTP], Host: secureHost, TLS: true, H2: true},
	}
	return s, nil
}

// haproxyOnce starts one HAProxy that ends TLS and asks the workload itself:
// what TLS and HTTP cost without a second hop.
func (r *rig) haproxyOnce(ctx context.Context) (*system, error) {
	gateway, at, err := r.haproxyHop(ctx, 0, " ssl alpn h2,http/1.1 crt "+r.cert, map[string]string{secureHTTP: r.ports.HTTP})
	if err != nil {
		return nil, err
	}
	return &system{name: nameOnce, hops: []hop{{child: gateway}}, services: map[string]Endpoint{
		secureHTTP: {Addr: at[secureHTTP], Host: secureHost, TLS: true},
		http2:      {Addr: at[secureHTTP], Host: secureHost, TLS: true, H2: true},
	}}, nil
}

// haproxyHop starts a HAProxy that passes each service on to an address, and
// returns where it listens for each. It ends TLS of secureHTTP with the options
// given, or takes it for plain HTTP if there are none.
func (r *rig) haproxyHop(ctx context.Context, buffer int, secure string, to map[string]string) (p *child, at map[string]string, err error) {
	var b strings.Builder
	fmt.Fprintf(&b, "global\n  maxconn 6000\n")
	if buffer > 0 {
		fmt.Fprintf(&b, "  tune.bufsize %d\n", buffer)
	}
	fmt.Fprintf(&b, "defaults\n  timeout connect 10s\n  timeout client 1h\n  timeout server 1h\n  http-reuse always\n")
	at = map[string]string{}
	for service, next := range to {
		port, err := freePort()
		if err != nil {
			return nil, nil, err
		}
		at[service] = fmt.Sprintf("127.0.0.1:%d", port)
		mode, options := "http", ""
		if service == sealedTCP {
			mode = "tcp"
		}
		if service == secureHTTP {
			options = secure
		}
		fmt.Fprintf(&b, "listen %s\n  mode %s\n  bind %s:%d%s\n  server next %s\n", service, mode, r.bind(), port, options, next)
	}
	file, err := os.CreateTemp(r.dir, "haproxy")
	if err != nil {
		return nil, nil, err
	}
	if _, err := file.WriteString(b.String()); err != nil {
		return nil, nil, err
	}
	if err := file.Close(); err != nil {
		return nil, nil, err
	}
	if p, err = startProcess(ctx, nil, "haproxy", "-db", "-q", "-f", file.Name()); err != nil {
		return nil, nil, err
	}
	for _, addr := range at {
		if err := waitPort(ctx, addr); err != nil {
			p.stop()
			return nil, nil, err
		}
	}
	return p, at, nil
}

// writeCertificate writes a self-signed certificate and its key for secureHost
// into one file.
func writeCertificate(dir string) (file string, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{secureHost},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return "", err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", err
	}
	file = filepath.Join(dir, "cert.pem")
	b := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...)
	return file, os.WriteFile(file, b, 0o600)
}
