package netx

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"
)

// Proxied is a network whose TCP connections are made by an HTTP proxy
// (CONNECT, RFC 9110 section 9.3.6): for machines that may not dial out
// themselves. Everything else is as in Net. The proxy resolves names.
type Proxied struct {
	Net
	Proxy *url.URL // see ParseProxy
}

// ParseProxy reads http://[user:password@]host[:port]; without a port it is 80.
func ParseProxy(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, errors.New("not a URL") // the error would repeat a password
	case u.Scheme != "http" || u.Hostname() == "" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("must be http://[user:password@]host[:port]")
	}
	if u.Port() == "" {
		u.Host = net.JoinHostPort(u.Hostname(), "80")
	}
	return u, nil
}

// maxProxyAnswer bounds the head of a proxy's answer, bytes.
const maxProxyAnswer = 16 << 10

// ErrProxy is the error of a proxy that does not connect.
var ErrProxy = errors.New("the HTTP proxy refuses")

// Dial implements Net. A control can't judge what the proxy will connect to:
// such dials are refused.
func (p Proxied) Dial(ctx context.Context, network, address string, control Control) (net.Conn, error) {
	if network == "unix" {
		return p.Net.Dial(ctx, network, address, control)
	}
	if control != nil {
		return nil, errors.New("netx: a dial through a proxy can't be judged")
	}
	c, err := p.Net.Dial(ctx, "tcp", p.Proxy.Host, nil)
	if err != nil {
		return nil, fmt.Errorf("HTTP proxy %s: %w", p.Proxy.Host, err)
	}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	err = p.connect(c, address)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("HTTP proxy %s: %w", p.Proxy.Host, err)
	}
	return c, nil
}

// connect asks for a tunnel. The answer is read byte by byte up to its end: what
// follows belongs to the tunnel, and c stays the bare connection that the
// kernel can splice.
func (p Proxied) connect(c net.Conn, address string) error {
	auth := ""
	if u := p.Proxy.User; u != nil {
		password, _ := u.Password()
		auth = "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(u.Username()+":"+password)) + "\r\n"
	}
	if _, err := fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", address, address, auth); err != nil {
		return err
	}
	var head []byte
	for b := make([]byte, 1); !bytes.HasSuffix(head, []byte("\r\n\r\n")); {
		if len(head) == maxProxyAnswer {
			return errors.New("the head of its answer is too large")
		}
		n, err := c.Read(b)
		if head = append(head, b[:n]...); n == 0 && err != nil {
			return err
		}
	}
	res, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(head)), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return err
	}
	if res.StatusCode/100 != 2 {
		return fmt.Errorf("%w to connect to %s: %s", ErrProxy, address, res.Status)
	}
	return nil
}
