//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"webgw.dev/webgw/internal/cli"
)

// build makes the binary once.
func (r *rig) build(ctx context.Context) error {
	if r.bin != "" {
		return nil
	}
	if r.bin = r.o.webgw; r.bin != "" {
		return nil
	}
	r.bin = filepath.Join(r.dir, "webgw")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", r.bin, "webgw.dev/webgw/cmd/webgw")
	if out, err := cmd.CombinedOutput(); err != nil {
		r.bin = ""
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	return nil
}

// command is how a role of webgw is started inside this executable.
type command struct {
	Home string
	Args []string
}

// started is what a role prints when it serves.
type started struct {
	Event    string            `json:"event"`
	Addrs    map[string]string `json:"addrs"`
	Registry string            `json:"registry"`
}

// webgw starts a gateway with its registry, and a node, as people do, and
// declares an exposure of each kind.
func (r *rig) webgw(ctx context.Context) (*system, error) {
	if err := r.build(ctx); err != nil {
		return nil, err
	}
	home, err := os.MkdirTemp(r.dir, "home")
	if err != nil {
		return nil, err
	}
	var at [3]string // plain HTTP, TLS, TCP
	for i := range at {
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		at[i] = fmt.Sprintf(loopback+":%d", port)
	}
	tcpPort := strings.TrimPrefix(at[2], loopback+":") // of UDP, too
	s := &system{name: nameOurs, rest: tidied, services: map[string]Endpoint{
		passthrough: {Addr: at[1], Hello: passHost},
		sealedTCP:   {Addr: at[2]},
		plainHTTP:   {Addr: at[0], Host: plainHost},
		secureHTTP:  {Addr: at[1], Host: secureHost, TLS: true},
		http2:       {Addr: at[1], Host: secureHost, TLS: true, H2: true},
		udp:         {Addr: at[2], UDP: true},
	}}
	err = func() error {
		gateway, err := r.role(ctx, s, home, "gateway", "--name", "gent", "--bind", r.bind(), "--http-addr", at[0], "--tls-addr", r.bind()+strings.TrimPrefix(at[1], loopback),
			"--address", r.across(at[1]), "--ports", tcpPort, "--cert", r.cert+":"+r.cert)
		if err != nil {
			return err
		}
		if _, err := r.role(ctx, s, home, "node", "--name", "home", "--registry", gateway.Registry); err != nil {
			return err
		}
		manifest := filepath.Join(home, "exposures.yaml")
		if err := os.WriteFile(manifest, []byte(fmt.Sprintf(exposures, passHost, r.ports.Raw, tcpPort, r.ports.Raw, tcpPort, r.ports.UDP, plainHost, secureHost, r.ports.HTTP)), 0o600); err != nil {
			return err
		}
		if err := r.apply(ctx, home, gateway.Registry, manifest); err != nil {
			return err
		}
		return r.await(ctx, s)
	}()
	if err != nil {
		s.stop()
		return nil, err
	}
	return s, nil
}

const exposures = `
kind: exposure
name: pass
protocol: tls
hosts: [%s]
gateways: [gent]
targets: [{node: home, address: "%s"}]
---
kind: exposure
name: port
protocol: tcp
port: %s
gateways: [gent]
targets: [{node: home, address: "%s"}]
---
kind: exposure
name: datagrams
protocol: udp
port: %s
gateways: [gent]
targets: [{node: home, address: "%s"}]
---
kind: exposure
name: site
protocol: http
hosts: [%s, %s]
gateways: [gent]
targets: [{node: home, address: "%s"}]
`

// role starts a role and adds it to the system's hops once it serves.
func (r *rig) role(ctx context.Context, s *system, home, role string, args ...string) (up started, err error) {
	port, err := freePort()
	if err != nil {
		return up, err
	}
	metrics := fmt.Sprintf("127.0.0.1:%d", port)
	args = append([]string{role, "--json", "--log-level", "error", "--state-dir", filepath.Join(home, role), "--metrics-addr", metrics}, args...)
	h := hop{metrics: "http://" + metrics + "/metrics"}
	if r.o.profile != "" {
		h.role = true
		h.child, err = startRole(ctx, "webgw", command{home, args}, &up)
	} else if h.child, err = startProcess(ctx, environment(home), r.bin, args...); err == nil {
		s.hops = append(s.hops, h)
		err = h.answer(&up)
	}
	if err != nil {
		return up, fmt.Errorf("webgw %s: %w", role, err)
	}
	if h.role {
		s.hops = append(s.hops, h)
	}
	return up, nil
}

// environment is ours, with another home and no settings of webgw.
func environment(home string) []string {
	var out []string
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "WEBGW_") && !strings.HasPrefix(v, "XDG_") && !strings.HasPrefix(v, "HOME=") {
			out = append(out, v)
		}
	}
	return append(out, "HOME="+home)
}

// patience is how long a system may take until everything answers.
const patience = 20 * time.Second

// apply declares a manifest, again until the gateway and the node that it names
// have declared themselves.
func (r *rig) apply(ctx context.Context, home, registry, manifest string) error {
	for late := time.Now().Add(patience); ; {
		apply := exec.CommandContext(ctx, r.bin, "apply", "--registry", registry, "-f", manifest)
		apply.Env = environment(home)
		out, err := apply.CombinedOutput()
		if err == nil {
			return nil
		}
		if time.Now().After(late) || ctx.Err() != nil {
			return fmt.Errorf("webgw apply: %w\n%s", err, out)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// await waits until every service answers.
func (r *rig) await(ctx context.Context, s *system) error {
	late := time.Now().Add(patience)
	for name, at := range s.services {
		if name == http2 {
			continue // the same door as https
		}
		for {
			var res result
			if err := r.load.call(job{Endpoint: at, Op: opIdle, Streams: 1}, &res); err != nil {
				return err
			}
			if err := r.load.call(job{Op: opRelease}, &result{}); err != nil {
				return err
			}
			if res.Failures == 0 {
				break
			}
			if time.Now().After(late) || ctx.Err() != nil {
				return fmt.Errorf("%s does not answer: %s", name, res.Failed)
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	return nil
}

// serveWebgw runs a verb of webgw in this process, which can then be profiled.
func serveWebgw(ctx context.Context, config json.RawMessage) (json.RawMessage, error) {
	var c command
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, err
	}
	env := map[string]string{}
	for _, v := range environment(c.Home) {
		name, value, _ := strings.Cut(v, "=")
		env[name] = value
	}
	out, in := io.Pipe()
	ended := make(chan error, 1)
	go func() { // for as long as the process
		code := cli.Main(ctx, c.Args, cli.Env{Stdin: strings.NewReader(""), Stdout: in, Stderr: os.Stderr, Getenv: func(k string) string { return env[k] }})
		ended <- fmt.Errorf("webgw ended with %d", code)
		in.CloseWithError(io.EOF)
	}()
	var ready json.RawMessage
	if err := json.NewDecoder(out).Decode(&ready); err != nil {
		return nil, errors.Join(err, <-ended)
	}
	go io.Copy(io.Discard, out)
	return ready, nil
}

// goroutines asks a role's metrics; 0 if they don't tell.
func goroutines(url string) (float64, error) {
	resp, err := http.Get(url)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		if rest, ok := bytes.CutPrefix(line, []byte("go_goroutines ")); ok {
			return strconv.ParseFloat(string(bytes.TrimSpace(rest)), 64)
		}
	}
	return 0, nil
}
