package demo

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"embed"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/coder/websocket"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

//go:embed site
var site embed.FS

// largeSize is how much the large page of the site holds.
const largeSize = 32 << 20

// workloads starts the four, each on a port of the loopback that only its
// node knows, and says how they are exposed.
func (g *Grid) workloads(ctx context.Context) error {
	root := filepath.Join(g.Dir, "site")
	if err := writeSite(root); err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /", http.FileServer(http.Dir(root)))
	mux.HandleFunc("POST /sum", sum)
	mux.HandleFunc("GET /ws", echoWebSocket)
	web, err := g.listen(ctx)
	if err != nil {
		return err
	}
	g.serve("workload site", web, mux)

	echo, err := g.listen(ctx)
	if err != nil {
		return err
	}
	g.group.Go("workload echo", func(ctx context.Context) error { return echoTCP(ctx, echo) })

	packets, err := netx.Host{}.ListenPacket(ctx, "udp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	g.group.Go("workload packets", func(ctx context.Context) error { return echoUDP(ctx, packets) })

	e := func(name string, p webgw.ExposureProtocol, node string, l interface{ Addr() net.Addr }) Exposure {
		x := Exposure{Name: name, Protocol: p, Node: node, Workload: l.Addr().String()}
		if !p.ByPort() {
			for _, gw := range g.Gateways {
				x.Hosts = append(x.Hosts, name+"."+gw.Zone)
			}
		}
		return x
	}
	vault, err := g.listen(ctx)
	if err != nil {
		return err
	}
	g.Exposures = []Exposure{e("site", webgw.HTTP, "home", web), e("echo", webgw.TCP, "office", echo), e("vault", webgw.TLS, "office", vault), e("packets", webgw.UDP, "home", packetAddr{packets})}
	cert, err := g.certificate(g.Exposures[2].Hosts)
	if err != nil {
		return errors.Join(err, vault.Close())
	}
	secret := http.NewServeMux()
	secret.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "This was encrypted for you by the workload itself; %s only passed it on.\n", r.Host)
	})
	g.serve("workload vault", tls.NewListener(vault, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}), secret)
	return nil
}

func (g *Grid) listen(ctx context.Context) (net.Listener, error) {
	l, err := netx.Host{}.Listen(ctx, "tcp", "127.0.0.1:0")
	if err == nil {
		at := l.Addr().(*net.TCPAddr).AddrPort()
		g.listening = append(g.listening, netip.AddrPortFrom(at.Addr().Unmap(), at.Port()))
	}
	return l, err
}

func (g *Grid) serve(name string, l net.Listener, h http.Handler) {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	g.group.Go(name, func(ctx context.Context) error {
		closed := make(chan error, 1)
		stop := context.AfterFunc(ctx, func() { closed <- s.Close() })
		err := s.Serve(l)
		if !stop() {
			err = errors.Join(err, <-closed)
		}
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return err
	})
}

// writeSite writes the site's files, and a large one, whose bytes are the same
// each time.
func writeSite(root string) error {
	pages, err := fs.Sub(site, "site")
	if err != nil {
		return err
	}
	if err := os.CopyFS(root, pages); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(root, "large.bin"))
	if err != nil {
		return err
	}
	_, err = io.Copy(f, largeBody())
	return errors.Join(err, f.Close())
}

// largeBody is largeSize bytes that can't be compressed, the same each time.
func largeBody() io.Reader {
	return io.LimitReader(mathrand.NewChaCha8([32]byte{}), largeSize)
}

// sum answers with the checksum and length of what was sent.
func sum(w http.ResponseWriter, r *http.Request) {
	h := sha256.New()
	n, err := io.Copy(h, r.Body)
	if err != nil {
		return // the visitor is gone
	}
	fmt.Fprintf(w, "%s %d\n", hex.EncodeToString(h.Sum(nil)), n)
}

// echoWebSocket sends back each message.
func echoWebSocket(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, nil)
	if err != nil {
		return // it has answered
	}
	defer c.CloseNow()
	for {
		kind, data, err := c.Read(r.Context())
		if err != nil || c.Write(r.Context(), kind, data) != nil {
			return
		}
	}
}

// packetAddr is a UDP socket, as far as an exposure must know it.
type packetAddr struct{ net.PacketConn }

func (p packetAddr) Addr() net.Addr { return p.LocalAddr() }

// echoUDP sends back the datagrams it gets.
func echoUDP(ctx context.Context, conn net.PacketConn) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	packets, err := netx.NewPackets(conn)
	for err == nil {
		err = packets.Receive(func(p []byte, peer netip.AddrPort, local netip.Addr) {
			packets.Send(p, peer, local) // what is lost is lost
		})
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// echoTCP sends back what it gets and ends its direction when the visitor does.
func echoTCP(ctx context.Context, l net.Listener) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	stop := context.AfterFunc(ctx, func() {
		l.Close()
		mu.Lock()
		defer mu.Unlock()
		for c := range open {
			c.Close()
		}
	})
	defer stop()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		mu.Lock()
		open[c] = true
		mu.Unlock()
		if ctx.Err() != nil {
			c.Close()
		}
		conns.Go(func() {
			io.Copy(c, c) // how a visitor leaves is its own affair
			if cw, ok := c.(netx.CloseWriter); ok {
				cw.CloseWrite()
			}
			c.Close()
			mu.Lock()
			delete(open, c)
			mu.Unlock()
		})
	}
}

// certificate makes the TLS workload's own: its visitors trust it by the file
// TLSCert, and no gateway has its key.
func (g *Grid) certificate(hosts []string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	now := time.Now()
	template := &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: "webgw demo: the vault itself"}, DNSNames: hosts,
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(30 * 24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	g.TLSCert = filepath.Join(g.Dir, "vault.pem")
	err = os.WriteFile(g.TLSCert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}
