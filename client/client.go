// Package client is the public SDK of the registry's API: declare, read and
// watch records, report and read status. Every record that comes in is
// verified, so a registry has to be trusted with no more than what it shows.
//
// It must not know how a gateway or a node works.
package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/run"
)

// Key is an identity with its private half; see LoadKey.
type Key = ident.Key

// Signed is a record together with the envelope that proves it.
type Signed = ident.Signed

// LoadKey reads a key file; it refuses one that others may read.
func LoadKey(path string) (Key, error) { return ident.Load(path) }

// LoadOrCreateKey reads the key file at path, or makes a new identity there.
func LoadOrCreateKey(path string) (k Key, created bool, err error) { return ident.LoadOrCreate(path) }

// GenerateKey makes a new identity that lives only in memory.
func GenerateKey() (Key, error) { return ident.Generate() }

// Verify opens an envelope and returns the record in it.
func Verify(envelope []byte) (Signed, error) { return ident.Verify(envelope) }

// Client speaks to one registry by any of its replicas. Set the fields before
// the first call; all methods may be called at once.
type Client struct {
	Endpoints []string // host:port of each replica
	Key       Key      // who asks; also signs what Declare and Delete declare

	// Server is the registry's identity. If it is zero, TrustServer decides
	// for each new connection whether the identity met at addr may be
	// believed; without either, nothing is asked.
	Server      webgw.ID
	TrustServer func(addr string, id webgw.ID) error

	Net netx.Net     // nil: this machine's network
	Log *slog.Logger // nil: discard

	once      sync.Once
	transport *http.Transport
	stop      context.Context // ends with Close
	cancel    context.CancelFunc

	mu   sync.Mutex
	good int // endpoint that answered last
}

// ParseRegistry reads "ID@host:port" or "host:port"; id is zero for the latter.
func ParseRegistry(s string) (id webgw.ID, endpoint string, err error) {
	endpoint = s
	if t, rest, ok := strings.Cut(s, "@"); ok {
		if id, err = webgw.ParseID(t); err != nil {
			return webgw.ID{}, "", err
		}
		endpoint = rest
	}
	if host, _, err := webgw.SplitHostPort(endpoint); err != nil {
		return webgw.ID{}, "", err
	} else if host == "" {
		return webgw.ID{}, "", &webgw.Error{Kind: webgw.Invalid, Public: fmt.Sprintf("%q names no host", s), Hint: "write ID@host:port"}
	}
	return id, endpoint, nil
}

// Bounds of one request.
const (
	dialTimeout   = 5 * time.Second
	answerTimeout = 30 * time.Second // for the head of an answer, after the request is sent
	maxAnswer     = 64 << 20         // bytes of an answer
	rounds        = 3                // over all endpoints
)

func (c *Client) init() {
	c.once.Do(func() {
		c.stop, c.cancel = context.WithCancel(context.Background())
		c.transport = &http.Transport{
			DialTLSContext:        c.dial,
			MaxIdleConnsPerHost:   4,
			IdleConnTimeout:       60 * time.Second,
			ResponseHeaderTimeout: answerTimeout,
			DisableCompression:    true,
		}
	})
}

// Close ends watches and gives back idle connections. The client is of no use
// afterwards.
func (c *Client) Close() {
	c.init()
	c.cancel()
	c.transport.CloseIdleConnections()
}

func (c *Client) log() *slog.Logger {
	if c.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return c.Log
}

// dial connects and judges the server's identity before anything is said.
func (c *Client) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if c.Server.IsZero() && c.TrustServer == nil {
		return nil, &webgw.Error{Op: "connect", Kind: webgw.Unauthenticated, Public: "the registry's identity is not known", Hint: "give it as ID@host:port"}
	}
	config, err := c.Key.ClientTLS(c.Server, webgw.ALPNRegistry, "http/1.1")
	if err != nil {
		return nil, err
	}
	if c.Server.IsZero() {
		known := config.VerifyConnection
		config.VerifyConnection = func(cs tls.ConnectionState) error {
			if err := known(cs); err != nil {
				return err
			}
			id, err := ident.PeerID(cs)
			if err != nil {
				return err
			}
			return c.TrustServer(addr, id)
		}
	}
	nw := c.Net
	if nw == nil {
		nw = netx.Host{}
	}
	raw, err := nw.Dial(ctx, "tcp", addr, nil)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	return conn, nil
}

// endpoints returns them in the order to try: the one that answered last
// first.
func (c *Client) endpoints() (order []int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.Endpoints {
		order = append(order, (c.good+i)%len(c.Endpoints))
	}
	return order
}

// settle notes whether endpoint i served; if not, the next one is tried first.
func (c *Client) settle(i int, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ok {
		c.good = i
	} else if c.good == i {
		c.good = (i + 1) % len(c.Endpoints)
	}
}

// ask sends one request to one endpoint. An error that is final holds for the
// others too.
func (c *Client) ask(ctx context.Context, endpoint int, method, path string, body []byte) (resp *http.Response, final bool, err error) {
	req, err := http.NewRequestWithContext(ctx, method, "https://"+c.Endpoints[endpoint]+path, bytes.NewReader(body))
	if err != nil {
		return nil, true, &webgw.Error{Kind: webgw.Invalid, Public: fmt.Sprintf("%q is not the address of a registry", c.Endpoints[endpoint]), Err: err}
	}
	if body == nil {
		req.Body = http.NoBody
	} else {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err = c.transport.RoundTrip(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, true, ctx.Err()
		}
		if e, ok := errors.AsType[*webgw.Error](err); ok { // a wrong or unknown server
			return nil, false, e
		}
		return nil, false, &webgw.Error{Op: "connect", Kind: webgw.Unavailable, Public: fmt.Sprintf("the registry at %s can't be reached", c.Endpoints[endpoint]), Err: err}
	}
	if resp.StatusCode == http.StatusOK {
		return resp, true, nil
	}
	err = refusal(resp)
	return nil, webgw.KindOf(err) != webgw.Unavailable, err
}

// refusal reads the error out of an answer.
func refusal(resp *http.Response) error {
	defer resp.Body.Close()
	var b struct {
		Error struct {
			Kind                 webgw.ErrorKind
			Field, Message, Hint string
		}
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err == nil {
		err = json.Unmarshal(data, &b)
	}
	if err != nil || b.Error.Kind == "" {
		kind := webgw.Unsupported
		if resp.StatusCode >= 500 {
			kind = webgw.Unavailable
		}
		return &webgw.Error{Kind: kind, Public: "what answered is not a registry: " + resp.Status, Err: err}
	}
	return &webgw.Error{Kind: b.Error.Kind, Field: b.Error.Field, Public: b.Error.Message, Hint: b.Error.Hint}
}

// each tries f on the endpoints in turn until one gives a final answer, with
// pauses between rounds.
func (c *Client) each(ctx context.Context, rounds int, f func(endpoint int) (final bool, err error)) error {
	c.init()
	if len(c.Endpoints) == 0 {
		return &webgw.Error{Kind: webgw.Invalid, Public: "no registry is configured"}
	}
	pause := run.Backoff{Min: 100 * time.Millisecond, Max: 2 * time.Second}
	var last error
	for round := range rounds {
		if round > 0 {
			if err := pause.Wait(ctx); err != nil {
				return err
			}
		}
		for _, i := range c.endpoints() {
			final, err := f(i)
			c.settle(i, final)
			if final {
				return err
			}
			last = err
			c.log().Debug("client: registry did not serve", "addr", c.Endpoints[i], "err", err)
		}
	}
	return last
}

// do sends a request, which must be safe to repeat, and decodes the answer
// into out unless that is nil.
func (c *Client) do(ctx context.Context, op, method, path string, body []byte, out any) error {
	err := c.each(ctx, rounds, func(i int) (bool, error) {
		resp, final, err := c.ask(ctx, i, method, path, body)
		if err != nil {
			return final, err
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
		if err != nil {
			return ctx.Err() != nil, &webgw.Error{Kind: webgw.Unavailable, Public: "the registry's answer broke off", Err: err}
		}
		if raw, ok := out.(*[]byte); ok {
			*raw = data
		} else if err := json.Unmarshal(data, out); err != nil {
			return true, &webgw.Error{Kind: webgw.Unsupported, Public: "the registry's answer can't be read", Err: err}
		}
		return true, nil
	})
	return named(op, err)
}

// named gives an error its operation, if it has none.
func named(op string, err error) error {
	e, ok := errors.AsType[*webgw.Error](err)
	if !ok || e.Op != "" {
		return err
	}
	c := *e
	c.Op = op
	return &c
}

func recordPath(k webgw.Key) string {
	return "/v1/records/" + url.PathEscape(string(k.Kind)) + "/" + k.Owner.String() + "/" + url.PathEscape(k.Name)
}
