//go:build linux

package e2e

import (
	"crypto/sha256"
	"crypto/tls"
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
	"testing"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// TestQUICByAnotherImplementation has ngtcp2's client fetch files over HTTP/3,
// where the gateway ends TLS and where the workload does, over loss, a change
// of its address, and windows that are often full.
func TestQUICByAnotherImplementation(t *testing.T) {
	need(t, "gtlsclient", "openssl", "unshare")
	file, sum := bigFile(t, 8<<20)
	g := startGateway(t)
	g.startNode()
	web := g.exposeHTTP("files", site(t, file))
	const vault = "vault.example.org"
	g.expose("vault", "protocol: tls\nquic: true\nhosts: ["+vault+"]", quicWorkload(t, vault, file))
	// Its client takes the server name from the address only.
	hosts := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(hosts, fmt.Appendf(nil, "127.0.0.1 %s %s\n", web, vault), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("unshare", "-rm", "mount", "--bind", hosts, "/etc/hosts").CombinedOutput(); err != nil {
		t.Skipf("no mounts of one's own here, which the client needs to find the gateway by name: %v %s", err, out)
	}
	fetch := func(t *testing.T, host, path string, flags ...string) (body string) {
		t.Helper()
		dir := t.TempDir()
		args := append([]string{"-q", "--exit-on-all-streams-close", "--timeout=20s", "--handshake-timeout=20s", "--download=" + dir}, flags...)
		args = append(args, host, fmt.Sprint(g.tlsPort), fmt.Sprintf("https://%s:%d%s", host, g.tlsPort, path))
		cmd(t, "unshare", append([]string{"-rm", "sh", "-c", `mount --bind "$0" /etc/hosts && exec gtlsclient "$@" >&2`, hosts}, args...)...)
		b, err := os.ReadFile(filepath.Join(dir, strings.TrimPrefix(path, "/")))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	g.wait("the vault", func() error { // it comes into force at gateway and node
		c, err := quic.DialAddr(t.Context(), fmt.Sprintf("127.0.0.1:%d", g.tlsPort), &tls.Config{ServerName: vault, InsecureSkipVerify: true, NextProtos: []string{"h3"}}, nil)
		if err == nil {
			err = c.CloseWithError(0, "")
		}
		return err
	})
	both := []string{web, vault}
	for name, c := range map[string]struct{ hosts, flags []string }{
		"plain":         {both, nil},
		"loss":          {both, []string{"--tx-loss=0.02", "--rx-loss=0.02"}},
		"migration":     {[]string{web}, []string{"--change-local-addr=20ms"}}, // where it is passed through, no gateway can follow
		"small windows": {both, []string{"--max-data=65536", "--max-stream-data-bidi-local=32768"}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, host := range c.hosts {
				got := sha256.Sum256([]byte(fetch(t, host, "/big", c.flags...)))
				if hex.EncodeToString(got[:]) != sum {
					t.Errorf("%s: another file", host)
				}
			}
		})
	}
	t.Run("who serves", func(t *testing.T) {
		if got := fetch(t, web, "/who"); !strings.HasPrefix(got, "hello HTTP/1.1 "+web) || !strings.Contains(got, "from 127.0.0.1") {
			t.Errorf("terminated: %q", got)
		}
		if got := fetch(t, vault, "/who"); got != "end to end HTTP/3.0" {
			t.Errorf("passed through: %q", got)
		}
	})
	t.Run("upload", func(t *testing.T) {
		if got := fetch(t, web, "/sum", "-d", file, "-m", "POST"); got != sum {
			t.Errorf("%q", got)
		}
	})
}

// quicWorkload speaks HTTP/3 with a certificate that openssl has made for name.
func quicWorkload(t *testing.T, name, file string) (addr string) {
	t.Helper()
	dir := t.TempDir()
	cmd(t, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", "/CN=the workload's own",
		"-addext", "subjectAltName=DNS:"+name, "-keyout", dir+"/key.pem", "-out", dir+"/cert.pem")
	cert, err := tls.LoadX509KeyPair(dir+"/cert.pem", dir+"/key.pem")
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/big", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, file) })
	mux.HandleFunc("/who", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "end to end "+r.Proto) })
	s := &http3.Server{Handler: mux, TLSConfig: http3.ConfigureTLSConfig(&tls.Config{Certificates: []tls.Certificate{cert}})}
	var wg sync.WaitGroup
	wg.Go(func() { s.Serve(c) })
	t.Cleanup(func() { s.Close(); c.Close(); wg.Wait() })
	return c.LocalAddr().String()
}
