//go:build linux

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
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
		{nameHAProxy + " 256K", func(ctx context.Context) (*system, error) { return r.haproxy(ctx, 256<<10) }},
		{"splice twice", r.splice},
		{nameTunnel, r.tunnel},
		{nameOurs, r.webgw},
	}
	_, noHAProxy := exec.LookPath("haproxy")
	var out []kind
	for _, k := range all {
		if !r.o.systems.MatchString(k.name) {
			continue
		}
		if strings.HasPrefix(k.name, nameHAProxy) && noHAProxy != nil {
			fmt.Fprintf(os.Stderr, "%s is left out: %v\n", k.name, noHAProxy)
			continue
		}
		out = append(out, k)
	}
	return out
}

const (
	nameHAProxy = "HAProxy→HAProxy"
	nameTunnel  = "tunnel alone"
	nameOurs    = "webgw"
)

// haproxy starts two HAProxies in a row, with the given size of buffers or its
// default.
func (r *rig) haproxy(ctx context.Context, buffer int) (*system, error) {
	s := &system{name: nameHAProxy}
	if buffer > 0 {
		s.name += fmt.Sprintf(" %dK", buffer>>10)
	}
	to := map[string]string{sealedTCP: r.ports.Raw, plainHTTP: r.ports.HTTP, secureHTTP: r.ports.HTTP}
	var starts []hop
	for _, name := range []string{"node", "gateway"} { // the last hop first, for those who dial it
		var b strings.Builder
		fmt.Fprintf(&b, "global\n  maxconn 6000\n")
		if buffer > 0 {
			fmt.Fprintf(&b, "  tune.bufsize %d\n", buffer)
		}
		fmt.Fprintf(&b, "defaults\n  timeout connect 10s\n  timeout client 1h\n  timeout server 1h\n  http-reuse always\n")
		at := map[string]string{}
		for _, service := range []string{sealedTCP, plainHTTP, secureHTTP} {
			port, err := freePort()
			if err != nil {
				return nil, err
			}
			at[service] = fmt.Sprintf("127.0.0.1:%d", port)
			mode, secure := "http", ""
			if service == sealedTCP {
				mode = "tcp"
			}
			if service == secureHTTP && name == "gateway" {
				secure = " ssl crt " + r.cert
			}
			fmt.Fprintf(&b, "listen %s\n  mode %s\n  bind %s%s\n  server next %s\n", service, mode, at[service], secure, to[service])
		}
		file := filepath.Join(r.dir, fmt.Sprintf("haproxy-%d-%s.cfg", buffer, name))
		if err := os.WriteFile(file, []byte(b.String()), 0o600); err != nil {
			return nil, err
		}
		p, err := startProcess(ctx, nil, "haproxy", "-db", "-q", "-f", file)
		if err != nil {
			return nil, err
		}
		starts = append(starts, hop{child: p})
		if err := waitPort(ctx, at[sealedTCP]); err != nil {
			s.hops = starts
			s.stop()
			return nil, err
		}
		to = at
	}
	s.hops = []hop{starts[1], starts[0]}
	s.services = map[string]Endpoint{
		passthrough: {Addr: to[sealedTCP], Hello: passHost},
		sealedTCP:   {Addr: to[sealedTCP]},
		plainHTTP:   {Addr: to[plainHTTP], Host: plainHost},
		secureHTTP:  {Addr: to[secureHTTP], Host: secureHost, TLS: true},
	}
	return s, nil
}

// splice starts two relays that only copy, which Go does by splice(2).
func (r *rig) splice(ctx context.Context) (*system, error) {
	var first, second string
	node, err := startRole(ctx, "relay", r.ports.Raw, &second)
	if err != nil {
		return nil, err
	}
	gateway, err := startRole(ctx, "relay", second, &first)
	if err != nil {
		node.stop()
		return nil, err
	}
	return &system{name: "splice twice", hops: []hop{{child: gateway, role: true}, {child: node, role: true}},
		services: map[string]Endpoint{passthrough: {Addr: first, Hello: passHost}, sealedTCP: {Addr: first}}}, nil
}

// serveRelay copies between its port and an address.
func serveRelay(config json.RawMessage) (addr string, err error) {
	var to string
	if err := json.Unmarshal(config, &to); err != nil {
		return "", err
	}
	return listen(func(a *net.TCPConn) {
		defer a.Close()
		c, err := net.Dial("tcp", to)
		if err != nil {
			return
		}
		b := c.(*net.TCPConn)
		defer b.Close()
		done := make(chan struct{})
		go func() { defer close(done); io.Copy(a, b); a.CloseWrite() }()
		io.Copy(b, a)
		b.CloseWrite()
		<-done
	})
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
