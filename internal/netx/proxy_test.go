package netx

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

func TestParseProxy(t *testing.T) {
	for in, want := range map[string]string{
		"http://proxy":               "proxy:80",
		"http://proxy:3128/":         "proxy:3128",
		"http://u:p@[2001:db8::1]:8": "[2001:db8::1]:8",
		"https://proxy":              "",
		"proxy:3128":                 "",
		"http://":                    "",
		"http://proxy/path":          "",
		"http://u:secret@pro xy":     "",
	} {
		u, err := ParseProxy(in)
		switch {
		case want == "" && err == nil:
			t.Errorf("%s: accepted as %s", in, u)
		case want == "" && strings.Contains(err.Error(), "secret"):
			t.Errorf("%s: the error repeats the password", in)
		case want != "" && (err != nil || u.Host != want):
			t.Errorf("%s: %v, %v; want %s", in, u, err, want)
		}
	}
}

// The bytes after the proxy's answer are the tunnel's; a refusal is told.
func TestProxied(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			req, err := http.ReadRequest(bufio.NewReader(c))
			switch {
			case err != nil:
			case req.Host == "gent.example:443":
				io.WriteString(c, "HTTP/1.1 200 OK\r\nVia: x\r\n\r\nhello")
			case req.Host == "endless.example:443":
				io.WriteString(c, "HTTP/1.1 200 OK\r\n"+strings.Repeat("A: b\r\n", maxProxyAnswer))
			default:
				io.WriteString(c, "HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
			}
			c.Close()
		}
	}()
	u, err := ParseProxy("http://u:secret@" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	p := Proxied{Host{}, u}
	c, err := p.Dial(t.Context(), "tcp", "gent.example:443", nil)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); string(b) != "hello" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	c.Close()
	if _, err := p.Dial(t.Context(), "tcp", "cairo.example:443", nil); !errors.Is(err, ErrProxy) || !strings.Contains(err.Error(), "407") || strings.Contains(err.Error(), "secret") {
		t.Errorf("refused: %v", err)
	}
	if _, err := p.Dial(t.Context(), "tcp", "endless.example:443", nil); err == nil {
		t.Error("an endless answer was read")
	}
	if _, err := p.Dial(t.Context(), "tcp", "gent.example:443", func(string, string) error { return nil }); err == nil {
		t.Error("a dial that must be judged went through")
	}
}
