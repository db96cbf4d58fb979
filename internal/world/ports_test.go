package world

import (
	"crypto/tls"
	"net"
	"strings"
	"testing"
	"time"

	"webgw.dev/webgw"
)

func TestPortRanges(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		w.Gateway("gent")
		for port := 7000; port < 7003; port++ {
			home.Echo(port)
		}
		peers := []*UDPWorkload{home.EchoUDP("127.0.0.1:7000"), home.EchoUDP("127.0.0.1:7001"), home.EchoUDP("127.0.0.1:7002")}
		w.Apply("tcp 20100-20103 -> home1:7000 via gent")
		w.Apply("udp 20100-20102 -> home1:7000 via gent")
		for port := 20100; port < 20103; port++ {
			c, err := w.Dial("gent", port)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := Echo(c, "x"); got != "x" || err != nil {
				t.Errorf("tcp port %d: %q, %v", port, got, err)
			}
			if got := w.DialUDP("gent", port).Ask("y"); got != "y" {
				t.Errorf("udp port %d: %q", port, got)
			}
		}
		for i, p := range peers {
			if p.Peers() != 1 {
				t.Errorf("%d visitors at port %d", p.Peers(), 7000+i)
			}
		}
		// Nothing listens at the last one's target, and only visitors of that port notice.
		if c, err := w.Dial("gent", 20103); err == nil {
			if got, err := Echo(c, "x"); err == nil {
				t.Errorf("nothing listens, and yet: %q", got)
			}
		}
		if home.Metric("webgw_node_refused_total") != 0 {
			t.Error("the node takes a port of the range for a lie")
		}
		if err := w.Owner("Bob").Apply("tcp 20102-20110 -> direct 8.8.8.8:80 via gent"); webgw.KindOf(err) != webgw.Taken {
			t.Errorf("a range that overlaps another's: %v", err)
		}
		w.Withdraw("tcp 20100-20103")
		if c, err := w.Dial("gent", 20100); err == nil {
			c.Close()
			t.Error("withdrawn, and yet open")
		}
	})
}

func TestSeveralExposuresBehindOnePort(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		w.Gateway("gent")
		home.TLS(8443, "a.example")
		home.TLS(8444, "b.example")
		w.Apply("tls a.example:20443 -> home1:8443 via gent")
		w.Apply("tls b.example:20443 -> home1:8444 via gent")
		w.Apply("tls b.example -> home1:8444 via gent") // the TLS port is another one
		visit := func(host string, port int) string {
			c, err := w.Dial("gent", port)
			if err != nil {
				return err.Error()
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			s := tls.Client(c, &tls.Config{ServerName: host, RootCAs: w.roots()})
			if err := s.Handshake(); err != nil {
				return err.Error()
			}
			return askPage(s)
		}
		for _, host := range []string{"a.example", "b.example"} {
			if got := visit(host, 20443); !strings.Contains(got, "hello from home1 in TLS") {
				t.Errorf("%s: %s", host, got)
			}
		}
		if got := visit("b.example", 443); !strings.Contains(got, "hello from home1 in TLS") {
			t.Errorf("b.example at the TLS port: %s", got)
		}
		for host, port := range map[string]int{"a.example": 443, "c.example": 20443} {
			if got := visit(host, port); !strings.Contains(got, "unrecognized name") {
				t.Errorf("%s at port %d: %s", host, port, got)
			}
		}
		if err := w.Alice.Apply("tcp 20443 -> home1:22 via gent"); webgw.KindOf(err) != webgw.Taken {
			t.Errorf("the whole port for one: %v", err)
		}
	})
}

// askPage asks for / over a connection.
func askPage(c net.Conn) string {
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")); err != nil {
		return err.Error()
	}
	b := make([]byte, 4<<10)
	var got []byte
	for {
		n, err := c.Read(b)
		if got = append(got, b[:n]...); err != nil {
			return string(got)
		}
	}
}
