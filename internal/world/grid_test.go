package world

import (
	"crypto/tls"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/daemon"
)

func TestExposeChangeWithdraw(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		home.HTTP(8080)
		home.Workload("127.0.0.1:8081", serveHTTP("the second"))
		w.Gateway("gent")
		w.Get("https://blog.example/").WantNothing()

		w.Apply("blog.example -> home1:8080 via gent")
		w.Get("https://blog.example/a").Want(200, "hello from home1", "/a")

		w.Apply("blog.example -> home1:8081 via gent")
		w.Get("https://blog.example/").Want(200, "the second")

		w.Withdraw("blog.example")
		if a := w.Get("https://blog.example/"); a.Err == nil && a.Status == 200 {
			t.Errorf("withdrawn, and still there: %q", a.Body)
		}
	})
}

func TestEveryProtocolThroughANATedNode(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		w.Gateway("gent")
		home.HTTP(8080)
		home.Echo(7)
		home.TLS(8443, "vault.example")
		w.Apply("blog.example -> home1:8080 via gent")
		w.Apply("tcp 20007 -> home1:7 via gent")
		w.Apply("tls vault.example -> home1:8443 via gent")

		w.Get("https://blog.example/").Want(200, "hello from home1")
		w.Get("https://vault.example/").Want(200, "hello from home1 in TLS")
		c, err := w.Dial("gent", 20007)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.Repeat("all work and no play ", 20_000)
		if got, err := Echo(c, text); err != nil || got != text {
			t.Errorf("%d bytes came back of %d, %v", len(got), len(text), err)
		}
		// Plain HTTP reaches the page, or is told where it is.
		if a := w.Get("http://blog.example/"); a.Status != 200 && a.Status/100 != 3 {
			t.Errorf("plain HTTP: %d %v", a.Status, a.Err)
		}
	})
}

func TestAnotherGatewayServesWhenOneDies(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).HTTP(8080)
		w.Gateway("gent")
		w.Gateway("cairo")
		w.Apply("blog.example -> home1:8080 via gent, cairo")
		if a := w.Get("https://blog.example/").Want(200); a.By != "gent" {
			t.Errorf("answered by %s", a.By)
		}
		w.Kill("gent")
		if a := w.Get("https://blog.example/").Want(200); a.By != "cairo" {
			t.Errorf("answered by %s", a.By)
		}
		w.Restart("gent")
		time.Sleep(15 * time.Second) // the node's backoff
		if a := w.Get("https://blog.example/").Want(200); a.By != "gent" {
			t.Errorf("answered by %s", a.By)
		}
	})
}

// A silent cut is noticed, and the session is back within 5 seconds of the
// network; the other gateway serves meanwhile.
func TestCutAndReturn(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		home.HTTP(8080)
		w.Gateway("gent")
		w.Gateway("cairo")
		w.Apply("blog.example -> home1:8080 via gent, cairo")
		if got := home.Metric("webgw_node_sessions"); got != 2 {
			t.Fatalf("%v sessions", got)
		}
		w.Cut("home1", "gent")
		time.Sleep(5 * time.Second)
		if got := home.Metric("webgw_node_sessions"); got != 1 {
			t.Errorf("%v sessions 5 s after the cut", got)
		}
		w.Cut("desk", "gent") // visitors' clients move on as well
		if a := w.Get("https://blog.example/").Want(200); a.By != "cairo" {
			t.Errorf("answered by %s", a.By)
		}
		w.Repair("desk", "gent")
		w.Repair("home1", "gent")
		time.Sleep(5 * time.Second)
		if a := w.Get("https://blog.example/").Want(200); a.By != "gent" {
			t.Errorf("answered by %s", a.By)
		}
	})
}

func TestTheRegistryMayBeGone(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).HTTP(8080)
		w.Gateway("gent")
		w.Apply("blog.example -> home1:8080 via gent")
		w.Kill("registry")
		w.Get("https://blog.example/").Want(200)
		time.Sleep(2 * time.Minute)
		w.Get("https://blog.example/").Want(200)

		// Both start again from what they saved.
		w.Kill("gent")
		w.Restart("gent")
		w.Restart("home1")
		time.Sleep(15 * time.Second)
		w.Get("https://blog.example/").Want(200)

		// Changes wait, and come when the registry does.
		w.Restart("registry")
		time.Sleep(15 * time.Second)
		w.Withdraw("blog.example")
		if a := w.Get("https://blog.example/"); a.Status == 200 {
			t.Error("withdrawn, and still there")
		}
	})
}

func TestOneOfTwoClaimantsWins(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		mallory := w.Owner("mallory")
		w.Node("home1").HTTP(8080)
		w.Node("evil", func(d *Daemon, c *daemon.NodeConfig) { c.Owners = []string{mallory.ID().String()} }).HTTP(8080)
		w.Gateway("gent")
		w.Apply("blog.example -> home1:8080 via gent")
		for _, name := range []string{"blog.example", "tls blog.example"} {
			if err := mallory.Apply(name + " -> evil:8080 via gent"); webgw.KindOf(err) != webgw.Taken {
				t.Errorf("%s: %v, want taken", name, err)
			}
		}
		w.Settle()
		w.Get("https://blog.example/").Want(200, "hello from home1")
	})
}

// A gateway that stops lets open connections finish, and takes no new ones.
func TestDrain(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).Echo(7)
		gent := w.Gateway("gent")
		w.Apply("tcp 20007 -> home1:7 via gent")
		c, err := w.Dial("gent", 20007)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, "before "); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 7)
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { gent.Stop(); close(ended) }()
		time.Sleep(time.Second)
		if late, err := w.Dial("gent", 20007); err == nil {
			late.Close()
			t.Error("a new connection is taken while draining")
		}
		if got, err := Echo(c, "after"); err != nil || got != "after" {
			t.Errorf("the open connection: %q, %v", got, err)
		}
		start := time.Now()
		<-ended
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("it ended %v after its last connection", took)
		}
	})
}

// Draining has an end: a connection that never ends is cut.
func TestDrainIsBounded(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		home.Workload("127.0.0.1:7", func(c net.Conn) { io.Copy(io.Discard, c) })
		gent := w.Gateway("gent")
		w.Apply("tcp 20007 -> home1:7 via gent")
		c, err := w.Dial("gent", 20007)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "x"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
		start := time.Now()
		gent.Stop()
		if took := time.Since(start); took < 9*time.Second || took > 20*time.Second {
			t.Errorf("it took %v", took)
		}
		if _, err := io.ReadAll(c); err == nil {
			t.Error("the cut looks like an orderly end")
		}
	})
}

// A node that stops lets open connections finish as well.
func TestNodeDrain(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		home.Echo(7)
		w.Gateway("gent")
		w.Apply("tcp 20007 -> home1:7 via gent")
		c, err := w.Dial("gent", 20007)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, "x"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { home.Stop(); close(ended) }()
		time.Sleep(time.Second)
		if got, err := Echo(c, "after"); err != nil || got != "after" {
			t.Errorf("the open connection: %q, %v", got, err)
		}
		<-ended
	})
}

// Two processes of one identity: the newest session has the streams.
func TestTheNewestSessionWins(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		first := w.Node("home1", BehindNAT)
		first.Workload("127.0.0.1:8080", serveHTTP("the first"))
		w.Gateway("gent")
		w.Apply("blog.example -> home1:8080 via gent")
		w.Get("https://blog.example/").Want(200, "the first")

		second := w.Node("home2", func(d *Daemon, _ *daemon.NodeConfig) { d.Key = first.Key })
		second.Workload("127.0.0.1:8080", serveHTTP("the second"))
		w.Settle()
		w.Get("https://blog.example/").Want(200, "the second")
		time.Sleep(20 * time.Second) // the first must not fight for it
		w.Get("https://blog.example/").Want(200, "the second")
		second.Stop()
		time.Sleep(time.Minute) // now it may come back
		w.Get("https://blog.example/").Want(200, "the first")
	})
}

// Visitors whose name nobody exposed learn nothing and reach nobody.
func TestStrangersReachNothing(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		page := w.Node("home1", BehindNAT).HTTP(8080)
		w.Gateway("gent")
		w.Apply("blog.example -> home1:8080 via gent")
		w.dns["other.example"] = w.dns["blog.example"]
		if a := w.Get("http://other.example/"); a.Status == 200 {
			t.Errorf("%d %q", a.Status, a.Body)
		}
		c, err := w.Dial("gent", 443)
		if err != nil {
			t.Fatal(err)
		}
		if err := tls.Client(c, &tls.Config{ServerName: "other.example", RootCAs: w.roots()}).Handshake(); err == nil {
			t.Error("a certificate for a name that nobody exposed")
		}
		c.Close()
		if _, err := w.Dial("gent", 20001); err == nil {
			t.Error("a port that nobody exposed is open")
		}
		if page.Accepted() != 0 {
			t.Error("the workload was reached")
		}
	})
}
