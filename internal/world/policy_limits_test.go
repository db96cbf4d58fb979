package world

import (
	"io"
	"net"
	"testing"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/daemon"
	"webgw.dev/webgw/internal/netx"
)

func TestAnswersAreCompressed(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).HTTP(8080)
		w.Gateway("gent")
		for _, p := range []*webgw.Policy{nil, {Compress: &webgw.Compress{Types: []string{"text/*"}, MinSize: 1}}} {
			if err := w.applyWith("blog.example -> home1:8080 via gent", func(e *webgw.Exposure) { e.Policy = p }); err != nil {
				t.Fatal(err)
			}
			a := w.Get("https://blog.example/").Want(200, "hello from home1") // by a client that unpacks gzip
			if packed := a.Header.Get("Vary") == "Accept-Encoding"; packed != (p != nil) {
				t.Error(a.Header)
			}
		}
	})
}

// What one exposure uses up leaves room for the others.
func TestGatewaysShareOut(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		home.HTTP(8080)
		home.Workload("127.0.0.1:7", func(c net.Conn) { io.Copy(c, c) })
		w.Gateway("gent", func(_ *Daemon, c *daemon.GatewayConfig) { c.MaxPerExposure = 3 })
		w.Apply("tcp 20001 -> home1:7 via gent")
		w.Apply("blog.example -> home1:8080 via gent")
		echoes := func() bool {
			c, err := w.Dial("gent", 20001)
			if err != nil {
				return false
			}
			t.Cleanup(func() { c.Close() })
			b := make([]byte, 1)
			_, err = c.Write(b)
			if err == nil {
				_, err = io.ReadFull(c, b)
			}
			return err == nil
		}
		for i := range 6 {
			if ok := echoes(); ok != (i < 3) {
				t.Errorf("stream %d: %t", i, ok)
			}
		}
		w.Get("https://blog.example/").Want(200)
	})
}

// A gateway that can't tell countries lets nobody in, and says why.
func TestCountriesNeedADatabase(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).HTTP(8080)
		w.Gateway("gent")
		if err := w.applyWith("blog.example -> home1:8080 via gent", func(e *webgw.Exposure) { e.Policy = &webgw.Policy{DenyCountries: []string{"XX"}} }); err != nil {
			t.Fatal(err)
		}
		if a := w.Get("https://blog.example/").Want(503); a.Header.Get("Webgw-Error") != "country_unknown" {
			t.Error(a.Header)
		}
	})
}

// Streams through a node's session end when the policy says so.
func TestStreamsHaveTheirTime(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).Workload("127.0.0.1:7", func(c net.Conn) { io.Copy(c, c) })
		w.Gateway("gent")
		if err := w.applyWith("tcp 20001 -> home1:7 via gent", func(e *webgw.Exposure) { e.Policy = &webgw.Policy{Timeouts: &webgw.Timeouts{Idle: "40s"}} }); err != nil {
			t.Fatal(err)
		}
		c, err := w.Dial("gent", 20001)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		b := make([]byte, 1)
		for range 5 {
			if _, err := c.Write(b); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, b); err != nil {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Second)
		}
		start := time.Now()
		if _, err := c.Read(b); err == nil || time.Since(start) > 31*time.Second {
			t.Error(time.Since(start), err)
		}
	})
}

// Streams through a node's session keep to the owner's limit in one direction
// and to the farmer's in the other.
func TestStreamsKeepToTheirBandwidth(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		came := make(chan int64, 1)
		w.Node("home1", BehindNAT).Workload("127.0.0.1:7", func(c net.Conn) {
			n, _ := io.Copy(io.Discard, c) // until the visitor's end
			came <- n
			io.CopyN(c, zeros{}, 1_000_000)
		})
		w.Gateway("gent", func(_ *Daemon, c *daemon.GatewayConfig) { c.OwnerBandwidth = 500_000 })
		if err := w.applyWith("tcp 20001 -> home1:7 via gent", func(e *webgw.Exposure) {
			e.Policy = &webgw.Policy{Bandwidth: &webgw.Bandwidth{Total: &webgw.Throughput{Out: 250_000}}}
		}); err != nil {
			t.Fatal(err)
		}
		c, err := w.Dial("gent", 20001)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		within := func(what string, start time.Time, want time.Duration) {
			t.Helper()
			if took := time.Since(start); took < want*9/10 || took > want*11/10 {
				t.Error(what, took)
			}
		}
		start := time.Now()
		if _, err := io.CopyN(c, zeros{}, 1_000_000); err != nil {
			t.Fatal(err)
		}
		if err := c.(netx.CloseWriter).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if n := <-came; n != 1_000_000 {
			t.Error(n, "bytes came")
		}
		within("in", start, 2*time.Second)
		start = time.Now()
		if n, err := io.Copy(io.Discard, c); n != 1_000_000 || err != nil {
			t.Error(n, err)
		}
		within("out", start, 4*time.Second)
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
