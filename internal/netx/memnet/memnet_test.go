package memnet_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/nettest"

	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/netx/memnet"
)

// pair dials from a to a listener on b and returns both ends.
func pair(t testing.TB, a, b *memnet.Host, network, listen string) (near, far *memnet.Conn) {
	t.Helper()
	l, err := b.Listen(t.Context(), network, listen)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	to := l.Addr().String()
	if network != "unix" && strings.HasPrefix(to, "[::]") {
		to = net.JoinHostPort(b.Name(), fmt.Sprint(l.Addr().(*net.TCPAddr).Port))
	}
	c, err := a.Dial(t.Context(), network, to, nil)
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	return c.(*memnet.Conn), d.(*memnet.Conn)
}

// bubble runs f on fake time with two hosts, and then wants every end closed.
func bubble(t *testing.T, f func(t *testing.T, w *memnet.World, a, b *memnet.Host)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := memnet.New(1)
		t.Cleanup(func() {
			if open := w.Open(); len(open) > 0 {
				t.Errorf("left open: %q", open)
			}
		})
		f(t, w, w.Host("a"), w.Host("b"))
	})
}

func TestConnConforms(t *testing.T) {
	for _, tt := range []struct {
		name    string
		network string
		listen  string
		link    memnet.Link
	}{
		{"tcp", "tcp", ":0", memnet.Link{}},
		{"tcp with latency", "tcp", ":0", memnet.Link{Latency: 100 * time.Microsecond}},
		{"unix", "unix", "/run/x.sock", memnet.Link{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				w := memnet.New(1)
				a := w.Host("a")
				b := a
				if tt.network != "unix" {
					b = w.Host("b")
				}
				w.SetLink(a, b, tt.link)
				near, far := pair(t, a, b, tt.network, tt.listen)
				return near, far, func() { near.Close(); far.Close() }, nil
			})
		})
	}
}

func TestLatencyTakesVirtualTime(t *testing.T) {
	bubble(t, func(t *testing.T, w *memnet.World, a, b *memnet.Host) {
		w.SetLink(a, b, memnet.Link{Latency: 50 * time.Millisecond})
		start := time.Now()
		near, far := pair(t, a, b, "tcp", ":0")
		if d := time.Since(start); d != 100*time.Millisecond {
			t.Errorf("the dial took %v, want one round trip of 100ms", d)
		}
		start = time.Now()
		const size = 1 << 20
		go func() {
			near.Write(make([]byte, size))
			near.CloseWrite()
		}()
		n, err := io.Copy(io.Discard, far)
		if n != size || err != nil {
			t.Fatal(n, err)
		}
		// Four buffers of 256 KiB, each of which waits to be read.
		if d := time.Since(start); d != 200*time.Millisecond {
			t.Errorf("1 MiB took %v, want 200ms", d)
		}
	})
}

func TestOrderIsKeptOnLossyLinks(t *testing.T) {
	bubble(t, func(t *testing.T, w *memnet.World, a, b *memnet.Host) {
		w.SetLink(a, b, memnet.Link{Latency: time.Millisecond, Loss: 0.3})
		near, far := pair(t, a, b, "tcp", ":0")
		var want bytes.Buffer
		start := time.Now()
		for i := range 200 {
			fmt.Fprintf(&want, "%d ", i)
			fmt.Fprintf(near, "%d ", i)
			time.Sleep(time.Millisecond)
		}
		near.CloseWrite()
		got, err := io.ReadAll(far)
		if err != nil || !bytes.Equal(got, want.Bytes()) {
			t.Errorf("got %q, %v", got, err)
		}
		if d := time.Since(start); d < 400*time.Millisecond {
			t.Errorf("loss cost nothing: %v", d)
		}
	})
}

func TestHalfClose(t *testing.T) {
	bubble(t, func(t *testing.T, w *memnet.World, a, b *memnet.Host) {
		near, far := pair(t, a, b, "tcp", ":0")
		near.Write([]byte("ask"))
		near.CloseWrite()
		if _, err := near.Write([]byte("more")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write after CloseWrite: %v", err)
		}
		if got, err := io.ReadAll(far); string(got) != "ask" || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
		far.Write([]byte("answer"))
		far.Close()
		if got, err := io.ReadAll(near); string(got) != "answer" || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
	})
}

func TestBackPressureAndDeadline(t *testing.T) {
	bubble(t, func(t *testing.T, w *memnet.World, a, b *memnet.Host) {
		near, far := pair(t, a, b, "tcp", ":0")
		near.SetWriteDeadline(time.Now().Add(time.Second))
		start := time.Now()
		n, err := near.Write(make([]byte, 1<<20))
		if n != 256<<10 || !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Second {
			t.Errorf("wrote %d, %v after %v", n, err, time.Since(start))
		}
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%v is no timeout", err)
		}
		near.SetWriteDeadline(time.Time{})
		done := make(chan error)
		go func() { _, err := near.Write(make([]byte, 10)); done <- err }()
		synctest.Wait()
		if _, err := io.ReadFull(far, make([]byte, 10)); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestWritesNeverMix(t *testing.T) {
	bubble(t, func(t *testing.T, w *memnet.World, a, b *memnet.Host) {
		near, far := pair(t, a, b, "tcp", ":0")
		const size = 300 << 10
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() { near.Write(bytes.Repeat([]byte{byte('a' + i)}, size)) })
		}
		for range 3 {
			p := make([]byte, size)
			if _, err := io.ReadFull(far, p); err != nil {
				t.Fatal(err)
			}
			if bytes.Count(p, p[:1]) != size {
				t.Error("two writes are mixed")
			}
		}
		wg.Wait()
	})
}

func TestResets(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(w *memnet.World, a, b *memnet.Host, near *memnet.Conn)
	}{
		{"abort", func(_ *memnet.World, _, _ *memnet.Host, near *memnet.Conn) { near.Abort() }},
		{"close with unread data", func(_ *memnet.World, _, _ *memnet.Host, near *memnet.Conn) { near.Close() }},
		{"reset of the link", func(w *memnet.World, a, b *memnet.Host, _ *memnet.Conn) { w.Reset(b, a) }},
		{"kill", func(w *memnet.World, a, _ *memnet.Host, _ *memnet.Conn) { w.Kill(a) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *memnet.World, a, b *memnet.Host) {
				near, far := pair(t, a, b, "tcp", ":0")
				far.Write([]byte("nobody reads this"))
				near.Write([]byte("kept"))
				blocked := make(chan error)
				go func() { _, err := far.Write(make([]byte, 1<<20)); blocked <- err }()
				synctest.Wait()
				tt.do(w, a, b, near)
				if err := <-blocked; !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("write: %v", err)
				}
				if got, err := io.ReadAll(far); string(got) != "kept" || !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("read %q, %v", got, err)
				}
			})
		})
	}
}

func TestWriteToAClosedEndIsReset(t *testing.T) {
	bubble(t, func(t *testing.T, w *memnet.World, a, b *memnet.Host) {
		w.SetLink(a, b, memnet.Link{Latency: time.Second})
		near, far := pair(t, a, b, "tcp", ":0")
		far.Close()
		start := time.Now()
		if _, err := near.Write([]byte("x")); err != nil {
			t.Errorf("the first write can't know: %v", err)
		}
		if _, err := near.Read(make([]byte, 1)); err != io.EOF || time.Since(start) != time.Second {
			t.Errorf("read %v after %v", err, time.Since(start))
		}
		time.Sleep(1500 * time.Millisecond)
		if _, err := near.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write: %v", err)
		}
	})
}

func TestCutIsSilentUntilRepair(t *testing.T) {
	bubble(t, func(t *testing.T, w *memnet.World, a, b *memnet.Host) {
		w.SetLink(a, b, memnet.Link{Latency: 10 * time.Millisecond})
		near, far := pair(t, a, b, "tcp", ":0")
		near.Write([]byte("in flight,"))
		w.Cut(a, b)
		near.Write([]byte("written into the cut"))
		far.SetReadDeadline(time.Now().Add(time.Hour))
		if n, err := far.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read %d, %v through a cut", n, err)
		}
		far.SetReadDeadline(time.Time{})

		// A dial into the cut hangs until its context ends.
		l, _ := b.Listen(t.Context(), "tcp", ":80")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		if _, err := a.Dial(ctx, "tcp", "b:80", nil); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Minute {
			t.Errorf("dial: %v after %v", err, time.Since(start))
		}
		dialed := make(chan net.Conn)
		go func() {
			c, err := a.Dial(t.Context(), "tcp", "b:80", nil)
			if err != nil {
				t.Error(err)
			}
			dialed <- c
		}()
		synctest.Wait()

		w.Repair(a, b)
		start = time.Now()
		near.CloseWrite()
		got, err := io.ReadAll(far)
		if string(got) != "in flight,written into the cut" || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
		if d := time.Since(start); d != 10*time.Millisecond {
			t.Errorf("it took %v after the repair", d)
		}
		(<-dialed).Close()
		l.Close()
	})
}

func TestResetWaitsForTheRepair(t *testing.T) {
	bubble(t, func(t *testing.T, w *memnet.World, a, b *memnet.Host) {
		near, far := pair(t, a, b, "tcp", ":0")
		w.Isolate(a)
		near.Abort()
		far.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read: %v", err)
		}
		far.SetReadDeadline(time.Time{})
		w.Rejoin(a)
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v", err)
		}
	})
}

func TestKillAndRestart(t *testing.T) {
	bubble(t, func(t *testing.T, w *memnet.World, a, b *memnet.Host) {
		l, err := b.Listen(t.Context(), "tcp", ":443")
		if err != nil {
			t.Fatal(err)
		}
		waiting, err := a.Dial(t.Context(), "tcp", "b:443", nil) // not accepted before the kill
		if err != nil {
			t.Fatal(err)
		}
		defer waiting.Close()
		w.Kill(b)
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("accept: %v", err)
		}
		if _, err := waiting.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v", err)
		}
		if _, err := a.Dial(t.Context(), "tcp", "b:443", nil); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial: %v", err)
		}
		if _, err := b.Dial(t.Context(), "tcp", "a:443", nil); !errors.Is(err, syscall.ENETDOWN) {
			t.Errorf("dial from the killed: %v", err)
		}
		if _, err := b.Listen(t.Context(), "tcp", ":443"); !errors.Is(err, syscall.ENETDOWN) {
			t.Errorf("listen on the killed: %v", err)
		}
		w.Restart(b)
		pair(t, a, b, "tcp", ":443")
	})
}

func TestAddresses(t *testing.T) {
	w := memnet.New(1)
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	site := netip.MustParseAddr("192.168.1.2")
	public := netip.MustParseAddr("203.0.113.9")
	gw := w.Host("gw", v6, v4)
	hidden := w.Host("hidden", site).BehindNAT(public)
	other := w.Host("other", site).BehindNAT(public) // the same private address in another site
	six := w.Host("six", netip.MustParseAddr("2001:db8::6"))
	w.Name("Blog.Example.", v4)

	listen := func(h *memnet.Host, network, addr string) net.Listener {
		t.Helper()
		l, err := h.Listen(t.Context(), network, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	l := listen(gw, "tcp", ":443")
	listen(gw, "tcp", "127.0.0.1:9000")
	listen(gw, "tcp4", "192.0.2.1:80")
	listen(hidden, "tcp", ":22")

	for _, tt := range []struct {
		from              *memnet.Host
		network, address  string
		controls          string // what control sees
		peerSees          string // source address without port, if it connects
		errno             error
		wantDNS, wantAddr bool
	}{
		{from: hidden, network: "tcp", address: "gw:443", controls: "tcp6 [2001:db8::1]:443, tcp4 192.0.2.1:443", peerSees: "203.0.113.9"},
		{from: other, network: "tcp4", address: "gw:443", controls: "tcp4 192.0.2.1:443", peerSees: "203.0.113.9"},
		{from: hidden, network: "tcp6", address: "gw:443", controls: "tcp6 [2001:db8::1]:443", errno: syscall.ENETUNREACH},
		{from: six, network: "tcp", address: "gw:443", controls: "tcp6 [2001:db8::1]:443", peerSees: "2001:db8::6"},
		{from: six, network: "tcp", address: "blog.example:443", controls: "tcp4 192.0.2.1:443", errno: syscall.ENETUNREACH},
		{from: gw, network: "tcp", address: "localhost:443", controls: "tcp4 127.0.0.1:443", peerSees: "127.0.0.1"},
		{from: gw, network: "tcp", address: "[::1]:443", controls: "tcp6 [::1]:443", peerSees: "::1"},
		{from: gw, network: "tcp", address: "[::]:443", controls: "tcp6 [::1]:443", peerSees: "::1"},
		{from: gw, network: "tcp", address: "127.0.0.1:9000", controls: "tcp4 127.0.0.1:9000", peerSees: "-"},
		{from: gw, network: "tcp", address: "192.0.2.1:9000", controls: "tcp4 192.0.2.1:9000", errno: syscall.ECONNREFUSED},
		{from: gw, network: "tcp", address: "[::ffff:192.0.2.1]:80", controls: "tcp4 192.0.2.1:80", peerSees: "-"},
		{from: gw, network: "tcp", address: "203.0.113.9:22", controls: "tcp4 203.0.113.9:22", errno: syscall.ECONNREFUSED},
		{from: gw, network: "tcp", address: "192.168.1.2:22", controls: "tcp4 192.168.1.2:22", errno: syscall.ECONNREFUSED},
		{from: hidden, network: "tcp", address: "hidden:22", controls: "tcp4 192.168.1.2:22", peerSees: "-"},
		{from: gw, network: "tcp", address: "nobody:22", wantDNS: true},
		{from: gw, network: "tcp6", address: "127.0.0.1:22", wantAddr: true},
		{from: gw, network: "tcp", address: "gw:99999", wantAddr: true},
	} {
		t.Run(tt.from.Name()+" to "+tt.address, func(t *testing.T) {
			var seen []string
			c, err := tt.from.Dial(t.Context(), tt.network, tt.address, func(network, address string) error {
				seen = append(seen, network+" "+address)
				return nil
			})
			if got := strings.Join(seen, ", "); got != tt.controls {
				t.Errorf("control saw %q, want %q", got, tt.controls)
			}
			var dns *net.DNSError
			var addr *net.AddrError
			if errors.As(err, &dns) != tt.wantDNS || errors.As(err, &addr) != tt.wantAddr || tt.errno != nil && !errors.Is(err, tt.errno) {
				t.Errorf("error %v", err)
			}
			if (tt.peerSees != "") != (err == nil) {
				t.Fatalf("dial: %v", err)
			}
			if err != nil {
				return
			}
			defer c.Close()
			if tt.peerSees == "-" {
				return
			}
			d, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			if got := d.RemoteAddr().(*net.TCPAddr).IP.String(); got != tt.peerSees {
				t.Errorf("the peer sees %s, want %s", got, tt.peerSees)
			}
			if d.LocalAddr().String() != c.RemoteAddr().String() {
				t.Errorf("accepted on %s, dialed %s", d.LocalAddr(), c.RemoteAddr())
			}
		})
	}
}

func TestControlRefuses(t *testing.T) {
	w := memnet.New(1)
	a := w.Host("a")
	no := errors.New("no")
	l, err := a.Listen(t.Context(), "tcp", ":1")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var n netx.Net = a
	if _, err := n.Dial(t.Context(), "tcp", "a:1", func(string, string) error { return no }); !errors.Is(err, no) {
		t.Errorf("dial: %v", err)
	}
	if _, err := n.Dial(t.Context(), "unix", "/x", func(string, string) error { return no }); !errors.Is(err, no) {
		t.Errorf("dial: %v", err)
	}
}

func TestListenConflicts(t *testing.T) {
	w := memnet.New(1)
	a := w.Host("a", netip.MustParseAddr("192.0.2.1"))
	for _, tt := range []struct {
		network, first, second string
		want                   error
	}{
		{"tcp", ":80", "192.0.2.1:80", syscall.EADDRINUSE},
		{"tcp", "127.0.0.1:80", "192.0.2.1:80", nil},
		{"tcp", "127.0.0.1:80", ":80", syscall.EADDRINUSE},
		{"tcp6", ":80", "[::1]:81", nil},
		{"tcp", ":0", ":0", nil},
		{"tcp", ":80", "192.0.2.2:81", syscall.EADDRNOTAVAIL},
		{"unix", "/a", "/a", syscall.EADDRINUSE},
		{"unix", "/a", "/b", nil},
	} {
		l, err := a.Listen(t.Context(), tt.network, tt.first)
		if err != nil {
			t.Fatal(err)
		}
		m, err := a.Listen(t.Context(), tt.network, tt.second)
		if !errors.Is(err, tt.want) {
			t.Errorf("%s then %s: %v", tt.first, tt.second, err)
		}
		if err == nil {
			m.Close()
		}
		l.Close()
	}
	if open := w.Open(); len(open) > 0 {
		t.Errorf("left open: %q", open)
	}
}

func TestFullBacklogDelaysTheDial(t *testing.T) {
	bubble(t, func(t *testing.T, w *memnet.World, a, b *memnet.Host) {
		l, _ := b.Listen(t.Context(), "tcp", ":80")
		defer l.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		for i := 0; ; i++ {
			c, err := a.Dial(ctx, "tcp", "b:80", nil)
			if errors.Is(err, context.DeadlineExceeded) && i == 512 {
				break
			} else if err != nil {
				t.Fatal(i, err)
			}
			defer c.Close()
		}
	})
}
