package demo

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/coder/websocket"

	"webgw.dev/webgw/internal/netx"
)

// Result is the outcome of one trial.
type Result struct {
	Gateway string `json:"gateway,omitempty"` // "": it concerns the nodes
	What    string `json:"what"`
	OK      bool   `json:"ok"`
	Took    int64  `json:"took"` // nanoseconds
	Why     string `json:"why,omitempty"`
}

// trialTime bounds one trial.
const trialTime = 20 * time.Second

// Check tries every exposure through every gateway and tells each result.
func (g *Grid) Check(ctx context.Context, tell func(Result)) (ok bool) {
	ok = true
	try := func(gateway, what string, f func(ctx context.Context) error) {
		one, cancel := context.WithTimeout(ctx, trialTime)
		defer cancel()
		start := time.Now()
		err := f(one)
		r := Result{Gateway: gateway, What: what, OK: err == nil, Took: int64(time.Since(start))}
		if err != nil {
			r.Why, ok = err.Error(), false
		}
		tell(r)
	}
	for i, gw := range g.Gateways {
		v := &visitor{g: g, gw: gw, site: g.Exposures[0].Hosts[i], vault: g.Exposures[2].Hosts[i]}
		try(gw.Name, "http/1.1", v.plain)
		try(gw.Name, "https/1.1", v.secure(1))
		try(gw.Name, "https/2", v.secure(2))
		try(gw.Name, "download 32 MiB", v.download)
		try(gw.Name, "upload 32 MiB", v.upload)
		try(gw.Name, "websocket", v.websocket)
		try(gw.Name, "tcp echo", v.echo)
		try(gw.Name, "udp echo", v.packets)
		try(gw.Name, "tls passthrough", v.passthrough)
		try(gw.Name, "unknown name", v.unknown)
	}
	try("", "nodes listen on nothing", g.hiddenNodes)
	return ok
}

// visitor tries one gateway.
type visitor struct {
	g           *Grid
	gw          *Gateway
	site, vault string // host names
}

// client connects to the gateway whatever the host is called, and trusts only
// what it is told to.
func (v *visitor) client(version int, authority string) (*http.Client, error) {
	t := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		return netx.Host{}.Dial(ctx, network, net.JoinHostPort(v.gw.Addr.String(), port), nil)
	}, Protocols: new(http.Protocols), DisableKeepAlives: true, DisableCompression: true}
	t.Protocols.SetHTTP1(version == 1)
	t.Protocols.SetHTTP2(version == 2)
	if authority != "" {
		pool, err := roots(authority)
		if err != nil {
			return nil, err
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	return &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}, nil
}

func roots(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", file)
	}
	return pool, nil
}

func (v *visitor) do(ctx context.Context, version int, authority, method, url string, body io.Reader, f func(*http.Response) error) error {
	c, err := v.client(version, authority)
	if err != nil {
		return err
	}
	defer c.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return err
	}
	if body != nil {
		req.ContentLength = largeSize
	}
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.ProtoMajor != version {
		return fmt.Errorf("answered in %s", res.Proto)
	}
	return f(res)
}

// page checks that the site's first page came.
func page(res *http.Response) error {
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %.200s", res.Status, body)
	}
	want, err := site.ReadFile("site/index.html")
	if err == nil && string(body) != string(want) {
		err = errors.New("the page is not the site's")
	}
	return err
}

func (v *visitor) plain(ctx context.Context) error {
	return v.do(ctx, 1, "", "GET", fmt.Sprintf("http://%s:%d/", v.site, v.gw.HTTP), nil, page)
}

func (v *visitor) https(path string) string {
	return fmt.Sprintf("https://%s:%d%s", v.site, v.gw.TLS, path)
}

func (v *visitor) secure(version int) func(context.Context) error {
	return func(ctx context.Context) error {
		return v.do(ctx, version, v.gw.CAFile, "GET", v.https("/"), nil, page)
	}
}

// largeSum is the checksum of the large file.
func largeSum() (string, error) {
	h := sha256.New()
	_, err := io.Copy(h, largeBody())
	return hex.EncodeToString(h.Sum(nil)), err
}

func (v *visitor) download(ctx context.Context) error {
	return v.do(ctx, 2, v.gw.CAFile, "GET", v.https("/large.bin"), nil, func(res *http.Response) error {
		h := sha256.New()
		n, err := io.Copy(h, res.Body)
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", n, err)
		}
		want, err := largeSum()
		if got := hex.EncodeToString(h.Sum(nil)); err == nil && got != want {
			err = fmt.Errorf("%s: %d bytes with the wrong checksum", res.Status, n)
		}
		return err
	})
}

func (v *visitor) upload(ctx context.Context) error {
	return v.do(ctx, 1, v.gw.CAFile, "POST", v.https("/sum"), largeBody(), func(res *http.Response) error {
		body, err := io.ReadAll(io.LimitReader(res.Body, 1<<10))
		if err != nil {
			return err
		}
		sum, err := largeSum()
		if want := fmt.Sprintf("%s %d\n", sum, largeSize); err == nil && string(body) != want {
			err = fmt.Errorf("%s: the workload got %q", res.Status, body)
		}
		return err
	})
}

func (v *visitor) websocket(ctx context.Context) error {
	c, err := v.client(1, v.gw.CAFile)
	if err != nil {
		return err
	}
	defer c.CloseIdleConnections()
	ws, _, err := websocket.Dial(ctx, v.https("/ws"), &websocket.DialOptions{HTTPClient: c})
	if err != nil {
		return err
	}
	defer ws.CloseNow()
	const words = "hello through the gateway"
	for range 3 {
		if err := ws.Write(ctx, websocket.MessageText, []byte(words)); err != nil {
			return err
		}
		_, got, err := ws.Read(ctx)
		if err != nil {
			return err
		}
		if string(got) != words {
			return fmt.Errorf("came back as %q", got)
		}
	}
	return ws.Close(websocket.StatusNormalClosure, "")
}

// echo sends, ends its direction, and must get everything back after that.
func (v *visitor) echo(ctx context.Context) error {
	c, err := netx.Host{}.Dial(ctx, "tcp", v.gw.at(v.gw.TCP), nil)
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	words := strings.Repeat("hello through the gateway\n", 1000)
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(c, words)
		sent <- errors.Join(err, c.(netx.CloseWriter).CloseWrite())
	}()
	got, err := io.ReadAll(c)
	if err := errors.Join(err, <-sent); err != nil {
		return err
	}
	if string(got) != words {
		return fmt.Errorf("%d of %d bytes came back", len(got), len(words))
	}
	return nil
}

// packets sends datagrams small and large; each must come back as it was. One
// that is lost is sent again, as visitors of UDP do.
func (v *visitor) packets(ctx context.Context) error {
	c, err := netx.Host{}.Dial(ctx, "udp", v.gw.at(v.gw.TCP), nil)
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	got := make([]byte, 64<<10)
	for _, size := range []int{1, 500, 1200, 9000} {
		want := strings.Repeat("p", size)
		for again := true; again; {
			if _, err := io.WriteString(c, want); err != nil {
				return err
			}
			if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
				return err
			}
			n, err := c.Read(got)
			if again = errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() == nil; again {
				continue
			}
			if err != nil {
				return err
			}
			if string(got[:n]) != want {
				return fmt.Errorf("%d bytes came back of %d", n, size)
			}
		}
	}
	return nil
}

// passthrough trusts the workload's certificate only: who else terminates TLS
// is found out.
func (v *visitor) passthrough(ctx context.Context) error {
	return v.do(ctx, 1, v.g.TLSCert, "GET", fmt.Sprintf("https://%s:%d/", v.vault, v.gw.TLS), nil, func(res *http.Response) error {
		if res.StatusCode != http.StatusOK {
			return errors.New(res.Status)
		}
		_, err := io.Copy(io.Discard, res.Body)
		return err
	})
}

// unknown must be refused clearly, and not reach any workload.
func (v *visitor) unknown(ctx context.Context) error {
	return v.do(ctx, 1, "", "GET", fmt.Sprintf("http://nobody.%s:%d/", v.gw.Zone, v.gw.HTTP), nil, func(res *http.Response) error {
		if res.StatusCode != http.StatusNotFound && res.StatusCode != http.StatusMisdirectedRequest {
			return fmt.Errorf("answered with %s", res.Status)
		}
		return nil
	})
}

// hiddenNodes checks that no node ever asked to listen, and, where the system
// tells, that this process listens on nothing that is not a registry, gateway
// or workload.
func (g *Grid) hiddenNodes(context.Context) error {
	if n := g.refused.Load(); n > 0 {
		return fmt.Errorf("a node tried to listen, %d times", n)
	}
	open, err := listeners()
	if err != nil {
		return err
	}
	meant := map[netip.AddrPort]bool{}
	for _, a := range g.listening {
		meant[a] = true
	}
	for _, a := range open {
		if !meant[a] {
			return fmt.Errorf("this process listens on %s, which is no registry, gateway or workload", a)
		}
	}
	return nil
}
