//go:build linux

package e2e

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

const gigabyte = 1 << 30

// site is a workload: a file to fetch, a place to upload to.
func site(t *testing.T, file string) (addr string) {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello %s %s from %s\n", r.Proto, r.Host, r.Header.Get("X-Forwarded-For"))
	})
	mux.HandleFunc("/big", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, file) })
	mux.HandleFunc("/sum", func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		if _, err := io.CopyBuffer(struct{ io.Writer }{h}, r.Body, make([]byte, 1<<20)); err != nil {
			http.Error(w, err.Error(), 500)
			return
		}
		fmt.Fprint(w, hex.EncodeToString(h.Sum(nil)))
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func TestCurl(t *testing.T) {
	need(t, "curl")
	file, sum := bigFile(t, gigabyte)
	g := startGateway(t)
	g.startNode()
	host := g.exposeHTTP("files", site(t, file))
	curl := func(args ...string) string {
		t.Helper()
		return cmd(t, "curl", append([]string{"-sS", "--fail-with-body", "-k", "--max-time", "150",
			"--resolve", fmt.Sprintf("%s:%d:127.0.0.1", host, g.tlsPort), "--resolve", fmt.Sprintf("%s:%d:127.0.0.1", host, g.httpPort)}, args...)...)
	}
	secure := fmt.Sprintf("https://%s:%d", host, g.tlsPort)
	plain := fmt.Sprintf("http://%s:%d", host, g.httpPort)

	t.Run("http/1.1 and http/2", func(t *testing.T) {
		for _, c := range []struct{ flag, url, version string }{
			{"--http1.1", plain, "1.1"}, {"--http1.1", secure, "1.1"}, {"--http2", secure, "2"},
		} {
			out := curl(c.flag, "-w", "%{http_version} %{response_code}", c.url+"/")
			if !strings.HasPrefix(out, "hello HTTP/1.1 "+host) || !strings.HasSuffix(out, c.version+" 200") || !strings.Contains(out, "from 127.0.0.1") {
				t.Errorf("%s %s: %q", c.flag, c.url, out)
			}
		}
	})
	t.Run("1 GB down, over both versions", func(t *testing.T) {
		for _, flag := range []string{"--http1.1", "--http2"} {
			out := filepath.Join(t.TempDir(), "out")
			curl(flag, "-o", out, secure+"/big")
			if got := fileSum(t, out); got != sum {
				t.Errorf("%s: checksum %s, want %s", flag, got, sum)
			}
		}
	})
	t.Run("1 GB up, over both versions", func(t *testing.T) {
		for _, flag := range []string{"--http1.1", "--http2"} {
			if got := curl(flag, "-T", file, secure+"/sum"); got != sum {
				t.Errorf("%s: checksum %s, want %s", flag, got, sum)
			}
		}
	})
	t.Run("resume", func(t *testing.T) {
		out := filepath.Join(t.TempDir(), "out")
		curl("-o", out, "-r", "0-9999999", secure+"/big")
		if info, err := os.Stat(out); err != nil || info.Size() != 10_000_000 {
			t.Fatalf("%v %v", info, err)
		}
		curl("-o", out, "-C", "-", secure+"/big")
		if got := fileSum(t, out); got != sum {
			t.Errorf("checksum %s after a resumed download, want %s", got, sum)
		}
	})
	t.Run("keep-alive", func(t *testing.T) {
		out := curl("-w", "%{num_connects},", "-o", os.DevNull, plain+"/", "-o", os.DevNull, plain+"/", "-o", os.DevNull, plain+"/")
		if out != "1,0,0," {
			t.Errorf("connections made per request: %s, want 1,0,0", out)
		}
	})
}

// tlsWorkload is a TLS server with a key of its own. It answers HTTP.
func tlsWorkload(t *testing.T, name string, h http.Handler) (addr, ca string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "the workload's own"}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	ca = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String(), ca
}

func TestOpenSSLSeesTheWorkloadsOwnCertificate(t *testing.T) {
	need(t, "openssl", "curl")
	g := startGateway(t)
	g.startNode()
	const host = "vault.example.org"
	addr, ca := tlsWorkload(t, host, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "end to end", r.Proto) }))
	g.expose("vault", "protocol: tls\nhosts: ["+host+"]", addr)
	g.wait("passthrough", func() error {
		c, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", g.tlsPort), &tls.Config{ServerName: host, InsecureSkipVerify: true})
		if err == nil {
			c.Close()
		}
		return err
	})
	c := exec.Command("openssl", "s_client", "-connect", fmt.Sprintf("127.0.0.1:%d", g.tlsPort), "-servername", host, "-CAfile", ca, "-verify_return_error", "-verify_hostname", host, "-quiet", "-no_ign_eof")
	c.Stdin = strings.NewReader("GET / HTTP/1.0\r\nHost: " + host + "\r\n\r\n")
	out, err := c.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "CN = the workload's own") && !strings.Contains(string(out), "CN=the workload's own") {
		t.Errorf("openssl: %v\n%s", err, out)
	}
	got := cmd(t, "curl", "-sS", "--cacert", ca, "--resolve", fmt.Sprintf("%s:%d:127.0.0.1", host, g.tlsPort), fmt.Sprintf("https://%s:%d/", host, g.tlsPort))
	if got != "end to end HTTP/2.0\n" {
		t.Errorf("curl: %q", got)
	}
}

func TestSSHOverATCPPort(t *testing.T) {
	need(t, "ssh", "ssh-keygen")
	sshd, err := exec.LookPath("/usr/sbin/sshd")
	if err != nil {
		t.Skip("sshd is not installed (./check installs it when it runs as root on Debian)")
	}
	if os.Getuid() == 0 {
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // sshd wants it for privilege separation
			t.Fatal(err)
		}
	}
	g := startGateway(t)
	g.startNode()
	dir := t.TempDir()
	cmd(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", dir+"/host")
	cmd(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", dir+"/user")
	port := freePort(t)
	start(t, nil, sshd, "-D", "-e", "-f", "/dev/null", "-p", fmt.Sprint(port), "-h", dir+"/host", "-o", "ListenAddress=127.0.0.1", "-o", "UsePAM=no",
		"-o", "AuthorizedKeysFile="+dir+"/user.pub", "-o", "StrictModes=no", "-o", "PidFile=none", "-o", "PermitRootLogin=yes")
	g.expose("shell", fmt.Sprintf("protocol: tcp\nport: %d", g.firstPort), fmt.Sprintf("127.0.0.1:%d", port))
	g.wait("the SSH greeting", func() error {
		c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", g.firstPort), time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		line, err := bufio.NewReader(c).ReadString('\n')
		if err == nil && !strings.HasPrefix(line, "SSH-2.0-") {
			err = fmt.Errorf("greeting %q", line)
		}
		return err
	})
	user := cmd(t, "id", "-un")
	got := cmd(t, "ssh", "-F", "/dev/null", "-i", dir+"/user", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile="+dir+"/known",
		"-o", "LogLevel=ERROR", "-p", fmt.Sprint(g.firstPort), strings.TrimSpace(user)+"@127.0.0.1", "head -c 20000000 /dev/zero | sha256sum")
	want := sha256.Sum256(make([]byte, 20_000_000))
	if !strings.HasPrefix(got, hex.EncodeToString(want[:])) {
		t.Errorf("20 MB over ssh: %q", got)
	}
}

// insecure is a TLS configuration for the gateway's development authority.
func insecure(host string) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, ServerName: host}
}

func TestWebSocketClient(t *testing.T) {
	g := startGateway(t)
	g.startNode()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			return
		}
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer c.CloseNow()
		c.SetReadLimit(1 << 22)
		for {
			kind, p, err := c.Read(r.Context())
			if err != nil {
				return
			}
			if err := c.Write(r.Context(), kind, p); err != nil {
				return
			}
		}
	}))
	t.Cleanup(s.Close)
	host := g.exposeHTTP("chat", s.Listener.Addr().String())
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: insecure(host), DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, fmt.Sprintf("127.0.0.1:%d", g.tlsPort))
	}}}
	c, _, err := websocket.Dial(ctx, fmt.Sprintf("wss://%s:%d/", host, g.tlsPort), &websocket.DialOptions{HTTPClient: client})
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	c.SetReadLimit(1 << 22)
	for _, size := range []int{0, 1, 125, 126, 65535, 65536, 1 << 20} {
		want := make([]byte, size)
		newNoise(int64(size)).Read(want)
		if err := c.Write(ctx, websocket.MessageBinary, want); err != nil {
			t.Fatal(err)
		}
		_, got, err := c.Read(ctx)
		if err != nil || string(got) != string(want) {
			t.Fatalf("a message of %d bytes came back as %d: %v", size, len(got), err)
		}
	}
	if err := c.Close(websocket.StatusNormalClosure, "done"); err != nil {
		t.Error(err)
	}
}

func TestGRPCClient(t *testing.T) {
	g := startGateway(t)
	g.startNode()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	workload := grpc.NewServer()
	status := health.NewServer()
	status.SetServingStatus("blog", healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(workload, status)
	go workload.Serve(l)
	t.Cleanup(workload.Stop)
	host := "rpc." + zone
	g.expose("rpc", "protocol: http\nhosts: ["+host+"]", l.Addr().String())
	conn, err := grpc.NewClient(fmt.Sprintf("passthrough:///127.0.0.1:%d", g.tlsPort), grpc.WithTransportCredentials(credentials.NewTLS(insecure(host))), grpc.WithAuthority(host))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := healthpb.NewHealthClient(conn)
	g.wait("the gRPC service", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := client.Check(ctx, &healthpb.HealthCheckRequest{Service: "blog"})
		return err
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	// A unary error travels in trailers.
	if _, err := client.Check(ctx, &healthpb.HealthCheckRequest{Service: "nobody"}); err == nil || !strings.Contains(err.Error(), "NotFound") {
		t.Errorf("an unknown service: %v, want NotFound", err)
	}
	// Server streaming: a change shows at once.
	watch, err := client.Watch(ctx, &healthpb.HealthCheckRequest{Service: "blog"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []healthpb.HealthCheckResponse_ServingStatus{healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING} {
		got, err := watch.Recv()
		if err != nil || got.Status != want {
			t.Fatalf("watch: %v %v, want %v", got, err, want)
		}
		status.SetServingStatus("blog", healthpb.HealthCheckResponse_NOT_SERVING)
	}
}

func TestBrowserLoadsTheSite(t *testing.T) {
	need(t, "chromium")
	g := startGateway(t)
	g.startNode()
	dir := t.TempDir()
	page := `<!doctype html><title>hidden</title><link rel=stylesheet href=/style.css><p id=p>waiting</p><script src=/app.js></script>`
	for name, text := range map[string]string{"index.html": page, "style.css": "p { color: rgb(1, 2, 3) }",
		"app.js": `fetch("/data.json").then(r => r.json()).then(d => p.textContent = d.text + " " + getComputedStyle(p).color + " " + location.protocol)`, "data.json": `{"text":"from behind NAT"}`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := httptest.NewServer(http.FileServer(http.Dir(dir)))
	t.Cleanup(s.Close)
	host := g.exposeHTTP("site", s.Listener.Addr().String())
	out := cmd(t, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--user-data-dir="+t.TempDir(), "--ignore-certificate-errors",
		"--host-resolver-rules=MAP "+host+" 127.0.0.1", "--virtual-time-budget=10000", "--dump-dom", fmt.Sprintf("https://%s:%d/", host, g.tlsPort))
	if want := "from behind NAT rgb(1, 2, 3) https:"; !strings.Contains(out, want) {
		t.Errorf("the page does not say %q:\n%s", want, out)
	}
}
