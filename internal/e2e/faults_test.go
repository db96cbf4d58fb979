//go:build linux

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/netx"
)

// startRegistry starts a registry of its own; again with the same directory
// after a kill.
func startRegistry(t *testing.T, dir string, port int) *proc {
	t.Helper()
	metrics := freePort(t)
	p := start(t, []string{"HOME=" + dir}, binary, "registry", "--state-dir", dir+"/registry", "--listen", fmt.Sprintf("127.0.0.1:%d", port),
		"--metrics-addr", fmt.Sprintf("127.0.0.1:%d", metrics))
	(&grid{t: t}).ready(metrics)
	return p
}

func TestKilledRegistryLosesNoAcknowledgedWrite(t *testing.T) {
	dir, port := t.TempDir(), freePort(t)
	registry := startRegistry(t, dir, port)
	key, err := ident.Generate()
	if err != nil {
		t.Fatal(err)
	}
	newClient := func() *client.Client {
		return &client.Client{Endpoints: []string{fmt.Sprintf("127.0.0.1:%d", port)}, Key: key, Net: netx.Host{},
			TrustServer: func(string, webgw.ID) error { return nil }}
	}
	const writes, writers = 1000, 4
	var acknowledged sync.Map
	var n atomic.Int64
	var killed sync.Once
	var wg sync.WaitGroup
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	restarted := make(chan struct{})
	for w := range writers {
		wg.Go(func() {
			c := newClient()
			defer c.Close()
			for i := w; i < writes; i += writers {
				name := fmt.Sprintf("n%d.example.org", i)
				for {
					now := time.Now()
					_, _, err := c.Declare(ctx, webgw.Record{Version: 1, Kind: webgw.KindName, Name: name, Issued: now, Expires: now.Add(time.Hour), NameClaim: &webgw.NameClaim{}})
					if err == nil {
						break
					}
					if ctx.Err() != nil || webgw.KindOf(err) == webgw.Invalid {
						t.Errorf("%s: %v", name, err)
						return
					}
					<-restarted // only the kill makes a write fail
				}
				acknowledged.Store(name, true)
				if n.Add(1) >= writes/2 {
					killed.Do(func() {
						registry.kill()
						startRegistry(t, dir, port)
						close(restarted)
					})
				}
			}
		})
	}
	wg.Wait()
	c := newClient()
	defer c.Close()
	records, err := c.ListAll(ctx, webgw.KindName, key.ID())
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for _, r := range records {
		there[r.Record.Name] = true
	}
	lost := 0
	acknowledged.Range(func(name, _ any) bool {
		if !there[name.(string)] {
			lost++
		}
		return true
	})
	if n.Load() != writes || lost > 0 {
		t.Errorf("%d writes were acknowledged, %d of them are lost", n.Load(), lost)
	}
}

func TestGatewayServesWithoutARegistryAlsoAfterItsRestart(t *testing.T) {
	dir, port := t.TempDir(), freePort(t)
	registry := startRegistry(t, dir, port)
	g := startGateway(t, "--registry", fmt.Sprintf("127.0.0.1:%d", port))
	g.env = append(g.env, fmt.Sprintf("WEBGW_REGISTRY=127.0.0.1:%d", port))
	g.startNode()
	host := g.exposeHTTP("blog", site(t, "/dev/null"))
	// What arrived last is on disk within a second: itself, the other, the exposure.
	for _, role := range []string{"gateway", "node"} {
		g.wait("the snapshot of the "+role, func() error {
			b, err := os.ReadFile(fmt.Sprintf("%s/%s/%s.snapshot", g.dir, role, role))
			if err == nil && !bytes.Contains(b, []byte(`"records":3`)) {
				err = errors.New("it does not hold all three records")
			}
			return err
		})
	}
	registry.kill()
	g.waitHTTP(host)

	g.gateway.kill()
	g.gateway = start(t, g.env, binary, g.gatewayArgs...)
	g.waitHTTP(host)

	g.node.kill()
	g.node = start(t, g.env, binary, g.nodeArgs...)
	g.waitHTTP(host)
}

// Garbage on each port is answered clearly, and disturbs nothing else.
func TestGarbageOnEachPort(t *testing.T) {
	g := startGateway(t)
	g.startNode()
	host := g.exposeHTTP("blog", site(t, "/dev/null"))
	tlsAddr, httpAddr := fmt.Sprintf("127.0.0.1:%d", g.tlsPort), fmt.Sprintf("127.0.0.1:%d", g.httpPort)

	// A kept connection that must live through all of it.
	kept, err := tls.Dial("tcp", tlsAddr, insecure(host))
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	reader := bufio.NewReader(kept)
	ask := func() {
		t.Helper()
		fmt.Fprintf(kept, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
		resp, err := http.ReadResponse(reader, nil)
		if err != nil {
			t.Fatal("the kept connection:", err)
		}
		io.Copy(io.Discard, resp.Body)
		if resp.StatusCode != 200 {
			t.Fatal("the kept connection:", resp.Status)
		}
	}
	ask()

	random := make([]byte, 4096)
	rand.Read(random)
	random[0] = 0x80 // neither TLS nor a letter
	var hello bytes.Buffer
	tls.Client(recorder{w: &hello}, insecure(host)).Handshake() // fails: only the ClientHello is wanted
	for _, c := range []struct {
		name, addr string
		send       []byte
		answer     string // its beginning; "" is none
	}{
		{"random bytes on the TLS port", tlsAddr, random, ""},
		{"random bytes on the HTTP port", httpAddr, random, ""},
		{"HTTP on the TLS port", tlsAddr, []byte("GET / HTTP/1.1\r\nHost: " + host + "\r\n\r\n"), "HTTP/1.1 400"},
		{"TLS on the HTTP port", httpAddr, hello.Bytes(), ""},
		{"an unknown server name", tlsAddr, bytes.ReplaceAll(hello.Bytes(), []byte("blog"), []byte("glob")), "\x15\x03"},
		{"a ClientHello with a wrong length inside", tlsAddr, append([]byte{22, 3, 1, 0, 8, 1, 0, 0, 4}, 1, 2, 3, 4), "\x15\x03"},
		{"an unknown host", httpAddr, []byte("GET / HTTP/1.1\r\nHost: nobody.example\r\n\r\n"), "HTTP/1.1 404"},
		{"CONNECT", httpAddr, []byte("CONNECT " + host + ":443 HTTP/1.1\r\nHost: " + host + ":443\r\n\r\n"), "HTTP/1.1 405"},
		{"Content-Length and Transfer-Encoding", httpAddr, []byte("POST / HTTP/1.1\r\nHost: " + host + "\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), "HTTP/1.1 400"},
		{"obs-fold", httpAddr, []byte("GET / HTTP/1.1\r\nHost: " + host + "\r\nA: b\r\n c\r\n\r\n"), "HTTP/1.1 400"},
		{"bare LF", httpAddr, []byte("GET / HTTP/1.1\nHost: " + host + "\n\n"), "HTTP/1.1 400"},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, err := net.Dial("tcp", c.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(15 * time.Second))
			conn.Write(c.send)
			answer := make([]byte, len("HTTP/1.1 400"))
			n, err := io.ReadFull(conn, answer)
			if c.answer == "" && n > 0 && answer[0] != 0x15 {
				t.Errorf("answered %q", answer[:n])
			}
			if !strings.HasPrefix(string(answer[:n]), c.answer) {
				t.Errorf("answered %q (%v), want %q", answer[:n], err, c.answer)
			}
			if e, ok := err.(net.Error); ok && e.Timeout() {
				t.Error("not answered within 15 s")
			}
			ask()
		})
	}
	t.Run("a silent client", func(t *testing.T) {
		var conns []net.Conn
		for range 50 {
			for _, addr := range []string{tlsAddr, httpAddr} {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				conns = append(conns, c)
			}
		}
		ask()
		for _, c := range conns {
			c.SetDeadline(time.Now().Add(20 * time.Second))
			if _, err := io.Copy(io.Discard, c); err != nil {
				if e, ok := err.(net.Error); ok && e.Timeout() {
					t.Fatal("a silent client is kept for more than 20 s")
				}
			}
		}
		ask()
	})
}

// recorder is a connection that keeps what is written and has nothing to read.
type recorder struct {
	net.Conn
	w io.Writer
}

func (r recorder) Write(p []byte) (int, error)     { return r.w.Write(p) }
func (r recorder) Read([]byte) (int, error)        { return 0, io.EOF }
func (r recorder) SetDeadline(time.Time) error     { return nil }
func (r recorder) SetReadDeadline(time.Time) error { return nil }
func (r recorder) Close() error                    { return nil }
