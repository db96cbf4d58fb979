//go:build linux

package e2e

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// namedSite is a site that tells its name and what it was asked.
func namedSite(t *testing.T, name string) (addr string) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, name, r.Method, r.Host) }))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// HAProxy ends TLS and tells by its header which of the exposures behind one
// port is meant.
func TestHAProxyNamesTheExposure(t *testing.T) {
	need(t, "haproxy", "curl", "openssl")
	g := startGateway(t, "--trusted-proxy", "127.0.0.1/32")
	g.startNode()
	for _, name := range []string{"a", "b"} {
		g.expose(name, fmt.Sprintf("protocol: tls\nport: %d\nhosts: [%s.%s]", g.firstPort, name, zone), namedSite(t, name))
	}
	dir, port := t.TempDir(), freePort(t)
	cmd(t, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=balancer", "-keyout", dir+"/key", "-out", dir+"/cert")
	var both []byte
	for _, part := range []string{"cert", "key"} {
		b, err := os.ReadFile(filepath.Join(dir, part))
		if err != nil {
			t.Fatal(err)
		}
		both = append(both, b...)
	}
	config := fmt.Sprintf(`defaults
  mode tcp
  timeout client 20s
  timeout server 20s
  timeout connect 5s
listen visitors
  bind 127.0.0.1:%d ssl crt %s/both
  server gateway 127.0.0.1:%d send-proxy-v2 proxy-v2-options authority
`, port, dir, g.firstPort)
	for name, data := range map[string][]byte{"both": both, "haproxy.cfg": []byte(config)} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	start(t, nil, "haproxy", "-db", "-f", dir+"/haproxy.cfg")
	ask := func(name string) (string, error) {
		host := name + "." + zone
		out, err := exec.Command("curl", "-sSk", "--max-time", "10", "--resolve", fmt.Sprintf("%s:%d:127.0.0.1", host, port), fmt.Sprintf("https://%s:%d/", host, port)).CombinedOutput()
		return string(out), err
	}
	for _, name := range []string{"a", "b"} {
		want := fmt.Sprintf("%s GET %s.%s:%d\n", name, name, zone, port)
		g.wait(name+" behind HAProxy", func() error {
			got, err := ask(name)
			if err == nil && got != want {
				t.Fatalf("%s leads to %q", name, got)
			}
			return err
		})
	}
	if got, err := ask("c"); err == nil {
		t.Errorf("a name that nobody has: %q", got)
	}
}

// curl and nc know the gateway as a proxy that leads to one place.
func TestConnectByRealClients(t *testing.T) {
	need(t, "curl", "nc")
	g := startGateway(t)
	g.startNode()
	host := "box." + zone
	g.expose("box", "protocol: http\nconnect: true\nhosts: ["+host+"]", namedSite(t, "box"))
	g.waitHTTP(host)
	proxy := fmt.Sprintf("127.0.0.1:%d", g.httpPort)
	if got := cmd(t, "curl", "-sS", "--noproxy", "", "--proxytunnel", "-x", "http://"+proxy, "http://"+host+":8080/"); got != "box GET "+host+":8080\n" {
		t.Errorf("curl: %q", got)
	}
	c := exec.Command("nc", "-N", "-X", "connect", "-x", proxy, host, "22")
	c.Stdin = strings.NewReader("GET / HTTP/1.0\r\nHost: inside\r\n\r\n")
	if out, err := c.CombinedOutput(); err != nil || !strings.HasSuffix(string(out), "box GET inside\n") {
		t.Errorf("nc: %v\n%s", err, out)
	}
	if out, err := exec.Command("curl", "-sS", "--noproxy", "", "--proxytunnel", "-x", "http://"+proxy, "http://169.254.169.254/").CombinedOutput(); err == nil || !strings.Contains(string(out), "405") {
		t.Errorf("elsewhere: %v %s", err, out)
	}
}
