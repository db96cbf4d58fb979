//go:build linux

// Package e2e tests the built binary from outside: real clients on loopback
// (tier 4) and machines in network namespaces (tier 5). What is missing here is
// skipped, with the reason printed.
package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var binary string

// binaryEnv names a binary that is built already.
const binaryEnv = "WEBGW_TEST_BINARY"

func TestMain(m *testing.M) {
	if binary = os.Getenv(binaryEnv); binary != "" || os.Getenv(workloadEnv) != "" {
		os.Exit(m.Run())
	}
	dir, err := os.MkdirTemp("", "webgw-e2e-")
	if err == nil {
		binary = filepath.Join(dir, "webgw")
		var out []byte
		if out, err = exec.Command("go", "build", "-o", binary, "webgw.dev/webgw/cmd/webgw").CombinedOutput(); err != nil {
			err = fmt.Errorf("%w\n%s", err, out)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e: build:", err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// need skips unless the programs are installed.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed (./check installs it when it runs as root on Debian)", p)
		}
	}
}

// freePort returns a TCP port that was free a moment ago.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// proc is a process of ours.
type proc struct {
	t    *testing.T
	cmd  *exec.Cmd
	out  *lines
	done chan struct{}
}

// lines keeps what a process printed.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start starts a process in its own group; it is killed when the test ends.
func start(t *testing.T, env []string, name string, args ...string) *proc {
	t.Helper()
	return startAs(t, nil, "", env, name, args...)
}

// startAs starts it as somebody else, and in another folder.
func startAs(t *testing.T, as *syscall.Credential, dir string, env []string, name string, args ...string) *proc {
	t.Helper()
	p := &proc{t: t, cmd: exec.Command(name, args...), out: &lines{}, done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	p.cmd.Dir = dir
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Credential: as}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.cmd.Wait(); close(p.done) }()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("%s %s printed:\n%s", filepath.Base(name), strings.Join(args, " "), tail(p.out.String(), 4000))
		}
	})
	return p
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// kill is kill -9, and waits.
func (p *proc) kill() {
	syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	<-p.done
}

// grid is a gateway with its embedded registry, and a node, on loopback.
type grid struct {
	t                     *testing.T
	dir                   string
	httpPort, tlsPort     int
	firstPort             int // of the public TCP ports on offer, ten of them
	registry              string
	env                   []string
	gatewayArgs, nodeArgs []string
	gateway, node         *proc
}

const zone = "gw.localhost"

// startGateway starts the gateway "gent" and waits until it is ready.
func startGateway(t *testing.T, more ...string) *grid {
	t.Helper()
	g := &grid{t: t, dir: t.TempDir(), httpPort: freePort(t), tlsPort: freePort(t), firstPort: freePort(t)}
	metrics := freePort(t)
	g.env = []string{"HOME=" + g.dir, "XDG_CONFIG_HOME=" + g.dir + "/config", "XDG_STATE_HOME=" + g.dir + "/state"}
	g.gatewayArgs = append([]string{"gateway", "--name", "gent", "--zone", zone, "--state-dir", g.dir + "/gateway",
		"--http-addr", fmt.Sprintf("127.0.0.1:%d", g.httpPort), "--tls-addr", fmt.Sprintf("127.0.0.1:%d", g.tlsPort), "--bind", "127.0.0.1",
		"--address", fmt.Sprintf("127.0.0.1:%d", g.tlsPort), "--ports", fmt.Sprintf("%d-%d", g.firstPort, g.firstPort+9),
		"--metrics-addr", fmt.Sprintf("127.0.0.1:%d", metrics)}, more...)
	g.gateway = start(t, g.env, binary, g.gatewayArgs...)
	g.ready(metrics)
	g.registry = fmt.Sprintf("127.0.0.1:%d", g.tlsPort)
	g.env = append(g.env, "WEBGW_REGISTRY="+g.registry)
	return g
}

// startNode starts the node "home1".
func (g *grid) startNode() {
	g.t.Helper()
	g.run("", "whoami") // the owner's key exists from here on
	metrics := freePort(g.t)
	g.nodeArgs = []string{"node", "--name", "home1", "--state-dir", g.dir + "/node", "--metrics-addr", fmt.Sprintf("127.0.0.1:%d", metrics)}
	g.node = start(g.t, g.env, binary, g.nodeArgs...)
	g.ready(metrics)
}

func (g *grid) ready(metrics int) {
	g.t.Helper()
	url := fmt.Sprintf("http://127.0.0.1:%d/readyz", metrics)
	g.wait(url, func() error {
		resp, err := http.Get(url)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != 200 {
			b, _ := io.ReadAll(resp.Body)
			return fmt.Errorf("%s: %s", resp.Status, b)
		}
		return nil
	})
}

// wait polls until f succeeds: what it waits for is another process.
func (g *grid) wait(what string, f func() error) { g.t.Helper(); waitFor(g.t, what, f) }

func waitFor(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// run runs a verb that must succeed and returns what it printed.
func (g *grid) run(stdin string, args ...string) string {
	g.t.Helper()
	out, err := g.try(stdin, args...)
	if err != nil {
		g.t.Fatalf("webgw %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (g *grid) try(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env = append(os.Environ(), g.env...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// expose declares an exposure of the node and waits until the gateway serves
// it.
func (g *grid) expose(name, body, address string) {
	g.t.Helper()
	g.run(fmt.Sprintf("kind: exposure\nname: %s\n%s\ngateways: [gent]\ntargets:\n- node: home1\n  address: %s\n", name, body, address), "apply", "-f", "-")
}

func (g *grid) exposeHTTP(name, address string) (host string) {
	g.t.Helper()
	host = name + "." + zone
	g.expose(name, "protocol: http\nhosts: ["+host+"]", address)
	g.waitHTTP(host)
	return host
}

// waitHTTP waits until the workload, not the gateway, answers for host.
func (g *grid) waitHTTP(host string) {
	g.t.Helper()
	g.wait(host, func() error {
		req, _ := http.NewRequest("GET", fmt.Sprintf("http://127.0.0.1:%d/", g.httpPort), nil)
		req.Host = host
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if e := resp.Header.Get("Webgw-Error"); e != "" {
			return fmt.Errorf("%s: %s", resp.Status, e)
		}
		return nil
	})
}

// cmd runs a client that must succeed and returns its standard output.
func cmd(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, name, args...)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s\n%s", name, strings.Join(args, " "), err, tail(string(out), 1000), tail(stderr.String(), 2000))
	}
	return string(out)
}

// noise is n bytes that look random and are the same every time.
type noise struct {
	left int64
	x    uint64
}

func newNoise(n int64) *noise { return &noise{n, 0x9e3779b97f4a7c15} }

func (z *noise) Read(p []byte) (int, error) {
	if z.left == 0 {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), z.left))
	for i := 0; i < n; i += 8 {
		z.x ^= z.x << 13
		z.x ^= z.x >> 7
		z.x ^= z.x << 17
		for j := i; j < min(n, i+8); j++ {
			p[j] = byte(z.x >> (8 * (j - i)))
		}
	}
	z.left -= int64(n)
	return n, nil
}

// bigFile writes n bytes of noise and returns its path and SHA-256.
func bigFile(t *testing.T, n int64) (path, sum string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "big")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(f, h)}, newNoise(n), make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	return path, hex.EncodeToString(h.Sum(nil))
}

func fileSum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}
