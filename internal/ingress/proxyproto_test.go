package ingress

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pires/go-proxyproto"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

// header writes a PROXY header as a balancer would.
func proxyHeader(t testing.TB, version byte, from, to string, tlvs ...proxyproto.TLV) []byte {
	t.Helper()
	h := proxyproto.HeaderProxyFromAddrs(version, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(from)), net.TCPAddrFromAddrPort(netip.MustParseAddrPort(to)))
	if err := h.SetTLVs(tlvs); err != nil {
		t.Fatal(err)
	}
	b, err := h.Format()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func withSum(b []byte) []byte {
	copy(b[len(b)-4:], "\x00\x00\x00\x00")
	binary.BigEndian.PutUint32(b[len(b)-4:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

var sumTLV = proxyproto.TLV{Type: proxyproto.PP2_TYPE_CRC32C, Value: make([]byte, 4)}

func TestProxyHeaders(t *testing.T) {
	const v6 = "[2001:db8::1]:5"
	summed := withSum(proxyHeader(t, 2, "192.0.2.1:5", "192.0.2.2:443", proxyproto.TLV{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte("a.example")}, sumTLV))
	broken := bytes.Clone(summed)
	broken[18]++
	long := proxyHeader(t, 2, "192.0.2.1:5", "192.0.2.2:443", proxyproto.TLV{Type: proxyproto.PP2_TYPE_NOOP, Value: make([]byte, maxProxyV2)})
	overrun := proxyHeader(t, 2, "192.0.2.1:5", "192.0.2.2:443", proxyproto.TLV{Type: proxyproto.PP2_TYPE_NOOP, Value: make([]byte, 8)})
	overrun[16+12+2] = 200
	udp := proxyHeader(t, 2, "192.0.2.1:5", "192.0.2.2:443")
	udp[13] = 0x12
	local := append(bytes.Clone(proxyV2), 0x20, 0, 0, 0)
	for _, tt := range []struct {
		name, head, visitor string
		bad                 bool
	}{
		{"v1", string(proxyHeader(t, 1, "192.0.2.1:5", "192.0.2.2:443")), "192.0.2.1:5", false},
		{"v1 IPv6", string(proxyHeader(t, 1, v6, "[2001:db8::2]:443")), v6, false},
		{"v1 unknown", "PROXY UNKNOWN\r\n", "", false},
		{"v2", string(proxyHeader(t, 2, "192.0.2.1:5", "192.0.2.2:443")), "192.0.2.1:5", false},
		{"v2 IPv6", string(proxyHeader(t, 2, v6, "[2001:db8::2]:443")), v6, false},
		{"v2 summed", string(summed), "192.0.2.1:5", false},
		{"v2 local", string(local), "", false},
		{"v1 without an end", "PROXY TCP4 " + strings.Repeat("1", 200), "", true},
		{"v1 by LF", "PROXY TCP4 192.0.2.1 192.0.2.2 5 443\n" + strings.Repeat("x", 107), "", true},
		{"v1 port", "PROXY TCP4 192.0.2.1 192.0.2.2 70000 443\r\n", "", true},
		{"v1 family", "PROXY TCP6 192.0.2.1 192.0.2.2 5 443\r\n", "", true},
		{"v1 multicast", "PROXY TCP4 224.0.0.1 192.0.2.2 5 443\r\n", "", true},
		{"v1 nowhere", "PROXY TCP4 0.0.0.0 192.0.2.2 5 443\r\n", "", true},
		{"v2 wrong sum", string(broken), "", true},
		{"v2 too long", string(long), "", true},
		{"v2 TLV overruns", string(overrun), "", true},
		{"v2 short", string(proxyV2) + "\x21\x11\x00\x02\x00\x00", "", true},
		{"v2 version", string(proxyV2) + "\x31\x11\x00\x00", "", true},
		{"v2 datagrams", string(udp), "", true},
	} {
		s, n, done, err := cutProxy([]byte(tt.head + "data"))
		if tt.bad {
			if !done || err == nil || n != 0 {
				t.Errorf("%s: taken: %v", tt.name, s)
			}
			continue
		}
		if !done || err != nil || n != len(tt.head) || tt.visitor != "" && s.visitor.String() != tt.visitor || (tt.visitor == "") == s.visitor.IsValid() {
			t.Errorf("%s: %v, %d of %d, %v, %v", tt.name, s, n, len(tt.head), done, err)
		}
		for i := range len(tt.head) {
			if _, n, done, err := cutProxy([]byte(tt.head[:i])); done || n != 0 || err != nil {
				t.Fatalf("%s: decided after %d bytes", tt.name, i)
			}
		}
	}
	for _, data := range []string{"GET / HTTP/1.1", "PROXZ", "PROXY\r\n", "\x16\x03\x01", "\r\n\r\n\x00\r\nX", "\x00"} {
		if _, n, done, err := cutProxy([]byte(data)); !done || n != 0 || err != nil {
			t.Errorf("%q is no header", data)
		}
	}
}

func FuzzProxyHeader(f *testing.F) {
	f.Add([]byte("PROXY TCP4 192.0.2.1 192.0.2.2 5 443\r\nGET"))
	f.Add([]byte("PROXY UNKNOWN\r\n"))
	f.Add(proxyHeader(f, 2, "192.0.2.1:5", "192.0.2.2:443"))
	f.Add(withSum(proxyHeader(f, 2, "[2001:db8::1]:5", "[2001:db8::2]:443", sumTLV)))
	f.Add(append(bytes.Clone(proxyV2), 0x20, 0, 0, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, n, done, err := cutProxy(b)
		if n < 0 || n > len(b) || n > maxProxyV2 || err != nil && (n != 0 || !done) || n == 0 && s != (stated{}) {
			t.Fatal(s, n, done, err)
		}
		if s.visitor.IsValid() != s.local.IsValid() || s.visitor.Addr().Is4In6() {
			t.Fatal(s)
		}
		if !done && len(b) > maxProxyV2 {
			t.Fatal("waits for more than the limit")
		}
		// The same, however the bytes come.
		for i := range len(b) {
			if s2, n2, done2, err2 := cutProxy(b[:i]); done2 && (s2 != s || n2 != n || err2 != err || !done) {
				t.Fatalf("after %d bytes %v %d %v, after all %v %d %v %v", i, s2, n2, err2, s, n, done, err)
			}
		}
		if done && n > 0 {
			if again, m, _, _ := cutProxy(b[:n]); again != s || m != n {
				t.Fatal("depends on what follows")
			}
		}
	})
}

// headerSite is a workload that reads a PROXY header and tells it, then echoes.
func headerSite(t *testing.T) (at string, headers chan *proxyproto.Header) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	headers = make(chan *proxyproto.Header, 10)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r := bufio.NewReader(c)
			h, err := proxyproto.Read(r)
			if err != nil {
				t.Error(err)
			}
			headers <- h
			io.Copy(c, r)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String(), headers
}

func TestWorkloadsAreToldByProxyHeaders(t *testing.T) {
	at, headers := headerSite(t)
	for _, version := range []webgw.ProxyProtocol{webgw.ProxyV1, webgw.ProxyV2} {
		tcp := expose("tcp", webgw.TCP, nil, at)
		tcp.Exposure.Port, tcp.Exposure.ProxyProtocol = freePort(t), version
		pass := expose("pass", webgw.TLS, []string{"pass.example"}, at)
		pass.Exposure.ProxyProtocol = version
		w := start(t, nil, tcp, pass)

		c := w.dial(w.Addrs()[2].String())
		h := <-headers // before the visitor has said anything
		if h.SourceAddr.String() != c.LocalAddr().String() || h.DestinationAddr.String() != c.RemoteAddr().String() || fmt.Sprint("v", h.Version) != string(version) {
			t.Errorf("%s: %+v", version, h)
		}
		io.WriteString(c, "hello")
		c.CloseWrite()
		if b, err := io.ReadAll(c); string(b) != "hello" || err != nil {
			t.Errorf("%s: %q, %v", version, b, err)
		}

		c = w.dial(w.tls)
		hello := helloBytes(t, &tls.Config{ServerName: "Pass.example", NextProtos: []string{"h2", "http/1.1"}})
		c.Write(hello)
		c.CloseWrite()
		h = <-headers
		if b, err := io.ReadAll(c); !bytes.Equal(b, hello) || err != nil {
			t.Errorf("%s: %q, %v", version, b, err)
		}
		tlvs, err := h.TLVs()
		if err != nil {
			t.Fatal(err)
		}
		said := map[proxyproto.PP2Type]string{}
		for _, v := range tlvs {
			said[v.Type] = string(v.Value)
		}
		if version == webgw.ProxyV2 && (said[proxyproto.PP2_TYPE_AUTHORITY] != "pass.example" || said[proxyproto.PP2_TYPE_ALPN] != "h2") {
			t.Error(said)
		}
		if h.SourceAddr.String() != c.LocalAddr().String() {
			t.Error(h.SourceAddr)
		}
	}
}

func TestProxyHeadersOfTrustedBalancers(t *testing.T) {
	back := site(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header["X-Forwarded-For"], r.Header["X-Forwarded-Port"], r.Header["Forwarded"])
	})
	tcp := expose("tcp", webgw.TCP, nil, echo(t, ""))
	tcp.Exposure.Port = freePort(t)
	const request = "GET / HTTP/1.1\r\nHost: a.example\r\nX-Forwarded-For: 10.0.0.1\r\nConnection: close\r\n\r\n"
	v1 := string(proxyHeader(t, 1, "192.0.2.7:5", "192.0.2.2:4430"))
	v2 := string(proxyHeader(t, 2, "[2001:db8::7]:5", "[2001:db8::2]:80"))

	var raw []bool
	trusting := start(t, func(s *Server) {
		s.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
		s.Handlers = map[string]Handler{webgw.ALPNTunnel: func(_ context.Context, c net.Conn, head []byte) {
			_, ok := c.(*net.TCPConn)
			raw = append(raw, ok)
			c.Write(head[:1])
			c.Close()
		}}
	}, web1("a", back), tcp)
	port := trusting.Addrs()[2].String()
	for _, tt := range []struct{ name, addr, say, want string }{
		{"v1", trusting.http, v1 + request, "[192.0.2.7] [4430] [for=192.0.2.7;host=a.example;proto=http]"},
		{"v2", trusting.http, v2 + request, `[2001:db8::7] [80] [for="[2001:db8::7]";host=a.example;proto=http]`},
		{"none", trusting.http, request, "[127.0.0.1]"},
		{"v1 on TCP", port, v1 + "hello", "hello"},
		{"none on TCP", port, "hello", "hello"},
		{"malformed", trusting.http, "PROXY nonsense\r\n" + request, ""},
		{"v1 on TLS", trusting.tls, v1 + string(helloBytes(t, &tls.Config{ServerName: "x", NextProtos: []string{webgw.ALPNTunnel}})), "\x16"},
	} {
		c := trusting.dial(tt.addr)
		io.WriteString(c, tt.say)
		if tt.addr == port {
			c.CloseWrite()
		}
		if got, _ := io.ReadAll(c); !strings.Contains(string(got), tt.want) || tt.want == "" && len(got) > 0 {
			t.Errorf("%s: %q", tt.name, got)
		}
	}
	if len(raw) != 1 || !raw[0] {
		t.Error("the connection is wrapped")
	}
	// Byte by byte, beyond one packet.
	c := trusting.dial(trusting.http)
	for _, b := range []byte(v2) {
		c.Write([]byte{b})
	}
	io.WriteString(c, request)
	if got, _ := io.ReadAll(c); !strings.Contains(string(got), "[2001:db8::7]") {
		t.Errorf("%q", got)
	}

	tcp = expose("tcp", webgw.TCP, nil, echo(t, ""))
	tcp.Exposure.Port = freePort(t)
	wary := start(t, nil, web1("a", back), tcp)
	if got := wary.raw(wary.http, v1+request); !strings.HasPrefix(got, "HTTP/1.1 400") {
		t.Errorf("believed: %q", got)
	}
	c = wary.dial(wary.Addrs()[2].String())
	io.WriteString(c, v1)
	c.CloseWrite()
	if got, _ := io.ReadAll(c); string(got) != v1+"bye" {
		t.Errorf("not passed on: %q", got)
	}
}

// Limits by address hold for the visitors behind a balancer, not for itself.
func TestLimitsBehindABalancer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memnet.New(1)
		gateway, balancer := m.Host("gateway"), m.Host("balancer")
		w := start(t, func(s *Server) {
			s.Net, s.Limits = gateway, Limits{PerAddress: 2}
			s.HTTPAddr, s.TLSAddr, s.BindHost = ":80", ":443", ""
			s.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
		})
		for i := range 9 {
			c := connect(t, balancer, "443")
			fmt.Fprintf(c, "PROXY TCP4 192.0.2.%d 192.0.2.200 5 443\r\n", i/3)
			c.SetReadDeadline(time.Now().Add(time.Second))
			_, err := c.Read(make([]byte, 1))
			timeout, ok := err.(net.Error)
			if open := ok && timeout.Timeout(); open != (i%3 < 2) {
				t.Errorf("connection %d: %v", i, err)
			}
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := w.doors.total.Load(); n != 0 {
			t.Errorf("%d are still counted", n)
		}
		for i := range w.doors.shards {
			if s := &w.doors.shards[i]; len(s.by) > 0 || len(s.visits) > 0 {
				t.Error(s.by, s.visits)
			}
		}
		// Whoever begins a header has as long as for a hello.
		c := connect(t, balancer, "443")
		io.WriteString(c, "PROXY TCP4")
		began := time.Now()
		io.ReadAll(c)
		if took := time.Since(began); took > 11*time.Second {
			t.Error(took)
		}
	})
}
