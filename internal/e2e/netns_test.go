//go:build linux

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMachinesInNamespaces runs a gateway, a node behind NAT and a visitor as
// three machines. It re-executes itself in a namespace of its own, so that no
// name, address or rule of it is seen by the host.
func TestMachinesInNamespaces(t *testing.T) {
	const inside = "WEBGW_TEST_IN_NAMESPACE"
	if os.Getenv(inside) == "" {
		if os.Getuid() != 0 {
			t.Skip("network namespaces need root")
		}
		need(t, "unshare", "ip", "nft", "curl")
		c := exec.Command("unshare", "-n", "-m", "--propagation", "private", os.Args[0], "-test.run=^TestMachinesInNamespaces$", "-test.v", "-test.timeout=5m")
		c.Env = append(os.Environ(), inside+"=1", binaryEnv+"="+binary)
		out, err := c.CombinedOutput()
		t.Logf("inside:\n%s", out)
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	// Named namespaces live in /run/netns: ours, not the host's.
	cmd(t, "mount", "-t", "tmpfs", "tmpfs", "/run")
	net := func(script string) {
		t.Helper()
		for line := range strings.SplitSeq(strings.TrimSpace(script), "\n") {
			if line = strings.TrimSpace(line); line != "" {
				f := strings.Fields(line)
				cmd(t, f[0], f[1:]...)
			}
		}
	}
	// internet: a bridge with gateway (203.0.113.1), visitor (203.0.113.2) and a
	// NAT router (203.0.113.3) in front of home (192.168.1.2).
	for _, ns := range []string{"gw", "visitor", "router", "home"} {
		net("ip netns add " + ns + "\nip -n " + ns + " link set lo up")
	}
	net(`ip link add inet type bridge
		ip link set inet up`)
	for i, ns := range []string{"gw", "visitor", "router"} {
		net(fmt.Sprintf(`ip link add %[1]s type veth peer name eth0 netns %[1]s
			ip link set %[1]s master inet up
			ip -n %[1]s addr add 203.0.113.%[2]d/24 dev eth0
			ip -n %[1]s addr add 2001:db8::%[2]d/64 dev eth0 nodad
			ip -n %[1]s link set eth0 up`, ns, i+1))
	}
	net(`ip link add lan netns router type veth peer name eth0 netns home
		ip -n router addr add 192.168.1.1/24 dev lan
		ip -n router link set lan up
		ip -n home addr add 192.168.1.2/24 dev eth0
		ip -n home link set eth0 up
		ip -n home route add default via 192.168.1.1
		ip netns exec router sysctl -qw net.ipv4.ip_forward=1
		ip netns exec router nft add table ip nat
		ip netns exec router nft add chain ip nat post { type nat hook postrouting priority 100 ; }
		ip netns exec router nft add rule ip nat post oifname eth0 masquerade
		ip netns exec router nft add chain ip nat guard { type filter hook forward priority 0 ; policy drop ; }
		ip netns exec router nft add rule ip nat guard iifname lan accept
		ip netns exec router nft add rule ip nat guard ct state established,related accept`)

	dir := t.TempDir()
	env := []string{"HOME=" + dir, "XDG_CONFIG_HOME=" + dir + "/config", "XDG_STATE_HOME=" + dir + "/state"}
	in := func(ns string, args ...string) []string { return append([]string{"netns", "exec", ns}, args...) }
	start(t, env, "ip", in("gw", binary, "gateway", "--name", "gent", "--zone", "gw.test", "--state-dir", dir+"/gateway",
		"--http-addr", ":80", "--tls-addr", ":443", "--address", "203.0.113.1:443", "--address", "[2001:db8::1]:443")...)

	// The workload: TLS with its own key, on home's loopback only.
	const host = "files.example.org"
	file, sum := bigFile(t, gigabyte)
	certs := t.TempDir()
	cmd(t, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN="+host,
		"-addext", "subjectAltName=DNS:"+host, "-keyout", certs+"/key.pem", "-out", certs+"/cert.pem")
	start(t, append(env, workloadEnv+"="+certs+":"+file), "ip", in("home", os.Args[0], "-test.run=^TestWorkloadProcess$")...)

	env = append(env, "WEBGW_REGISTRY=203.0.113.1:443")
	verb := func(stdin string, args ...string) (string, error) {
		c := exec.Command("ip", in("home", append([]string{binary}, args...)...)...)
		c.Env, c.Stdin = append(os.Environ(), env...), strings.NewReader(stdin)
		out, err := c.CombinedOutput()
		return string(out), err
	}
	must := func(what, stdin string, args ...string) {
		t.Helper()
		waitFor(t, what, func() error {
			out, err := verb(stdin, args...)
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
	must("the registry", "", "get", "gateways")
	start(t, env, "ip", in("home", binary, "node", "--name", "home1", "--state-dir", dir+"/node")...)
	must("the exposure", fmt.Sprintf("kind: exposure\nname: files\nprotocol: tls\nhosts: [%s]\ngateways: [gent]\ntargets:\n- node: home1\n  address: 127.0.0.1:8443\n", host), "apply", "-f", "-")

	visit := func(address string, args ...string) (string, error) {
		c := exec.Command("ip", in("visitor", append([]string{"curl", "-sS", "--fail", "--max-time", "120", "--cacert", certs + "/cert.pem",
			"--resolve", host + ":443:" + address}, args...)...)...)
		out, err := c.CombinedOutput()
		return string(out), err
	}
	waitFor(t, "the passthrough", func() error {
		out, err := visit("203.0.113.1", "https://"+host+"/hello")
		if err == nil && out != "hello\n" {
			err = fmt.Errorf("answered %q", out)
		}
		return err
	})
	// Home can't be dialed: not by its address, not at the router's.
	for _, address := range []string{"192.168.1.2", "203.0.113.3"} {
		if out, err := visit(address, "--connect-timeout", "2", "https://"+host+"/hello"); err == nil {
			t.Errorf("the node was reached at %s: %s", address, out)
		}
	}
	for _, address := range []string{"203.0.113.1", "[2001:db8::1]"} {
		out := filepath.Join(t.TempDir(), "out")
		begin := time.Now()
		if msg, err := visit(address, "-o", out, "https://"+host+"/big"); err != nil {
			t.Fatalf("1 GB through %s: %v %s", address, err, msg)
		}
		if got := fileSum(t, out); got != sum {
			t.Errorf("through %s: checksum %s, want %s", address, got, sum)
		}
		t.Logf("1 GB passthrough by %s: checksum right, in %v", address, time.Since(begin).Round(time.Millisecond))
	}
}

const workloadEnv = "WEBGW_TEST_WORKLOAD"

// TestWorkloadProcess is no test: it is the workload of the one above, in its
// own process.
func TestWorkloadProcess(t *testing.T) {
	certs, file, ok := strings.Cut(os.Getenv(workloadEnv), ":")
	if !ok {
		return
	}
	http.HandleFunc("/hello", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello\n") })
	http.HandleFunc("/big", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, file) })
	t.Fatal(http.ListenAndServeTLS("127.0.0.1:8443", certs+"/cert.pem", certs+"/key.pem", nil))
}
