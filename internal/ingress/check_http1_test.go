package ingress

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

func TestAuthority(t *testing.T) {
	for s, want := range map[string]bool{
		"a.example": true, "A.example:80": true, "a.example:": true, "127.0.0.1:80": true, "[2001:db8::1]": true, "[::ffff:1.2.3.4]:443": true, "a_b~c.example": true,
		"": false, ":80": false, "[]": false, "[:80": false, "a.example:x": false, "a.example:80:80": false, "a.example:-1": false, "u@a.example": false,
		"a.example/": false, "a%2eexample": false, `a"b.example`: false, "<a>": false, "a b": false, "ä.example": false, "[a.example]": false, "2001:db8::1": false, "[::1]x": false, "a.example;b": false,
	} {
		if isAuthority(s) != want {
			t.Errorf("%q: %v", s, !want)
		}
	}
	for _, host := range []string{"", "a.example:x", `a"b.example`, "[::1", "ä.example"} {
		if h := hear(strings.NewReader("GET / HTTP/1.1\r\nHost: " + host + "\r\n\r\n")); h.refused != badHost.code {
			t.Errorf("%q: %q", host, h.refused)
		}
	}
}

// workloadIn serves h on a host of a network in memory until the bubble's end.
func workloadIn(t *testing.T, n *memnet.Host, h http.HandlerFunc) (stop func()) {
	t.Helper()
	l, err := n.Listen(t.Context(), "tcp", ":8080")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(l) // ends by Close
	}()
	return func() {
		s.Close()
		<-done
	}
}

// Visitors that let the gateway wait are shown the door, each at its time, and
// are told why if there is something to say.
func TestSlowVisitors(t *testing.T) {
	limits := Limits{}.withDefaults()
	const get = "GET / HTTP/1.1\r\nHost: a.example\r\n"
	const post = "POST / HTTP/1.1\r\nHost: a.example\r\n"
	const slow = time.Second // less than any limit
	for _, tt := range []struct {
		name  string
		at    string // sent at once
		drip  string // then byte by byte, each after some time
		pause time.Duration
		after time.Duration // the connection has ended by then, and not long before
		want  string        // status of the last answer, or "" for none
	}{
		{"silent", "", "", 0, limits.Hello, ""},
		{"head byte by byte", "G", "ET / HTTP/1.1\r\nHost: a.example\r\n\r\n", slow, limits.Hello, "408"},
		{"head without an end", get, "", 0, limits.Hello, "408"},
		{"second head byte by byte", get + "\r\nG", "ET / HTTP/1.1\r\nHost: a.example\r\n\r\n", slow, limits.Hello, "408"},
		{"idle", get + "\r\n", "", 0, limits.Idle, "200"},
		{"body that stops", post + "Content-Length: 5\r\n\r\nhe", "", 0, limits.Stall, "408"},
		{"chunk size that stops", post + "Transfer-Encoding: chunked\r\n\r\n5", "", 0, limits.Stall, "408"},
		{"chunk that stops", post + "Transfer-Encoding: chunked\r\n\r\n5\r\nhe", "", 0, limits.Stall, "408"},
		{"slow body that goes on", post + "Connection: close\r\nContent-Length: 5\r\n\r\n", "hello", limits.Stall - time.Second, 5 * (limits.Stall - time.Second), "200"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				world := memnet.New(1)
				gw, home, visitor := world.Host("gw.example"), world.Host("home.example"), world.Host("visitor.example")
				stop := workloadIn(t, home, func(w http.ResponseWriter, r *http.Request) {
					if _, err := io.Copy(io.Discard, r.Body); err != nil {
						return
					}
					io.WriteString(w, "ok")
				})
				s := &Server{HTTPAddr: ":80", Net: gw, Upstream: &dialer{net: gw}}
				table, _ := Build([]Declared{expose("a", webgw.HTTP, []string{"a.example"}, "home.example:8080")})
				s.SetTable(table)
				ctx, cancel := context.WithCancel(t.Context())
				if err := s.Listen(ctx); err != nil {
					t.Fatal(err)
				}
				done := make(chan error)
				go func() { done <- s.Run(ctx) }()
				c, err := visitor.Dial(t.Context(), "tcp", "gw.example:80", nil)
				if err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				sent := make(chan struct{})
				go func() {
					defer close(sent)
					dripTo(c, tt.at, tt.drip, tt.pause)
				}()
				b, _ := io.ReadAll(c) // however it ends
				took := time.Since(began)
				c.Close()
				<-sent
				status := ""
				if i := strings.LastIndex(string(b), "HTTP/1.1 "); i >= 0 {
					status = string(b[i+9 : i+12])
				}
				if status != tt.want {
					t.Errorf("answered %q, want %s", b, tt.want)
				}
				if took < tt.after-time.Second || took > tt.after+3*time.Second {
					t.Errorf("ended after %v, want %v", took, tt.after)
				}
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
				stop()
			})
		})
	}
}

func dripTo(c net.Conn, at, drip string, pause time.Duration) {
	if _, err := io.WriteString(c, at); err != nil {
		return
	}
	for i := range drip {
		time.Sleep(pause)
		if _, err := io.WriteString(c, drip[i:i+1]); err != nil {
			return // the door
		}
	}
}
