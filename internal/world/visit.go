package world

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// patience is how long a visitor's client tries one address before the next.
const patience = 2 * time.Second

// Answer is what a visitor got.
type Answer struct {
	Status int // 0: no answer
	Body   string
	Header http.Header
	By     string // the gateway that answered, or was asked last
	Err    error

	w   *World
	url string
}

// Get fetches a page as a browser does: it knows all addresses of the name and
// tries the next one when one does not connect.
func (w *World) Get(rawURL string) *Answer {
	w.T.Helper()
	a := &Answer{w: w, url: rawURL}
	u, err := url.Parse(rawURL)
	if err != nil {
		w.T.Fatal(err)
	}
	port := "80"
	if u.Scheme == "https" {
		port = "443"
	}
	transport := &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: w.roots()},
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, by, err := w.reach(ctx, u.Hostname(), port)
			a.By = by
			return c, err
		},
	}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(w.T.Context(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", rawURL, nil)
	if err != nil {
		w.T.Fatal(err)
	}
	client := http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	res, err := client.Do(req)
	if err == nil {
		var body []byte
		body, err = io.ReadAll(res.Body)
		res.Body.Close()
		a.Status, a.Header, a.Body = res.StatusCode, res.Header, string(body)
	}
	a.Err = err
	w.trace.add("visitor", fmt.Sprintf("GET %s by %s: %d %q %v", rawURL, a.By, a.Status, a.Body, err))
	return a
}

// Want checks the status and that the page holds the words.
func (a *Answer) Want(status int, words ...string) *Answer {
	a.w.T.Helper()
	if a.Err != nil {
		a.w.T.Errorf("GET %s by %s: %v, want %d", a.url, a.By, a.Err, status)
		return a
	}
	if a.Status != status {
		a.w.T.Errorf("GET %s by %s: %d %q, want %d", a.url, a.By, a.Status, a.Body, status)
	}
	for _, word := range words {
		if !strings.Contains(a.Body, word) {
			a.w.T.Errorf("GET %s by %s: %q lacks %q", a.url, a.By, a.Body, word)
		}
	}
	return a
}

// WantNothing checks that no answer came.
func (a *Answer) WantNothing() {
	a.w.T.Helper()
	if a.Err == nil {
		a.w.T.Errorf("GET %s by %s: %d %q, want no answer", a.url, a.By, a.Status, a.Body)
	}
}

// reach connects to the first gateway of a name that answers.
func (w *World) reach(ctx context.Context, host, port string) (net.Conn, string, error) {
	carriers := w.dns[host]
	err := fmt.Errorf("nobody carries %s", host)
	by := ""
	for _, g := range carriers {
		by = g.Name
		one, cancel := context.WithTimeout(ctx, patience)
		var c net.Conn
		c, err = w.desk.Dial(one, "tcp", g.Name+".test:"+port, nil)
		cancel()
		if err == nil {
			return c, by, nil
		}
	}
	return nil, by, err
}

// Dial connects to a port of a gateway, as a visitor.
func (w *World) Dial(gateway string, port int) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(w.T.Context(), patience)
	defer cancel()
	return w.desk.Dial(ctx, "tcp", w.Daemon(gateway).Address(port), nil)
}

// roots are what visitors trust: the gateways' development authorities and
// the certificates of TLS workloads.
func (w *World) roots() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range w.trusted {
		pool.AddCert(c)
	}
	for _, d := range w.order {
		if d.info.CAFile == "" {
			continue
		}
		pem, err := os.ReadFile(d.info.CAFile)
		if err != nil {
			w.T.Fatal(err)
		}
		if !pool.AppendCertsFromPEM(pem) {
			w.T.Fatalf("%s holds no certificate", d.info.CAFile)
		}
	}
	return pool
}

// Echo sends what to a connection to an echo workload, ends its direction and
// returns what comes back until the other end.
func Echo(c net.Conn, what string) (string, error) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, what); err != nil {
		return "", err
	}
	if cw, ok := c.(interface{ CloseWrite() error }); ok {
		if err := cw.CloseWrite(); err != nil {
			return "", err
		}
	}
	b, err := io.ReadAll(c)
	return string(b), err
}
