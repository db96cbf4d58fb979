package netx_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/netx/memnet"
)

// both runs f on the machine's own loopback and on memnet, which must not
// differ in anything that the rest of the tree relies on.
func both(t *testing.T, f func(t *testing.T, n netx.Net)) {
	t.Helper()
	t.Run("host", func(t *testing.T) { f(t, netx.Host{}) })
	t.Run("memnet", func(t *testing.T) {
		w := memnet.New(1)
		f(t, w.Host("h", netip.MustParseAddr("192.0.2.1")))
		if open := w.Open(); len(open) > 0 {
			t.Errorf("left open: %q", open)
		}
	})
}

// connect returns both ends of a connection over loopback.
func connect(t *testing.T, n netx.Net) (near, far net.Conn) {
	t.Helper()
	l, err := n.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err = n.Dial(t.Context(), "tcp", l.Addr().String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	far, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{near, far} {
		c.SetDeadline(time.Now().Add(10 * time.Second))
	}
	return near, far
}

func TestDialAndListen(t *testing.T) {
	both(t, func(t *testing.T, n netx.Net) {
		l, err := n.Listen(t.Context(), "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().String()
		if _, err := n.Listen(t.Context(), "tcp", addr); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("listen twice: %v", err)
		}

		// control sees the address, not the name, and its error ends the dial.
		no := errors.New("not there")
		var saw []string
		_, port, _ := net.SplitHostPort(addr)
		_, err = n.Dial(t.Context(), "tcp4", "localhost:"+port, func(network, address string) error {
			saw = append(saw, network+" "+address)
			return no
		})
		var op *net.OpError
		if !errors.Is(err, no) || !errors.As(err, &op) || op.Op != "dial" || strings.Join(saw, ",") != "tcp4 127.0.0.1:"+port {
			t.Errorf("got %v after %q", err, saw)
		}

		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := n.Dial(ctx, "tcp", addr, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("dial after cancel: %v", err)
		}

		done := make(chan error)
		go func() { _, err := l.Accept(); done <- err }()
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("accept: %v", err)
		}
		if _, err := n.Dial(t.Context(), "tcp", addr, nil); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial to nobody: %v", err)
		}
		if _, err := n.Dial(t.Context(), "tcp", "192.0.2.99", nil); err == nil {
			t.Error("dial without a port")
		}
	})
}

func TestUnixSockets(t *testing.T) {
	both(t, func(t *testing.T, n netx.Net) {
		path := filepath.Join(t.TempDir(), "s")
		if _, err := n.Dial(t.Context(), "unix", path, nil); !errors.Is(err, syscall.ENOENT) {
			t.Errorf("dial to nobody: %v", err)
		}
		l, err := n.Listen(t.Context(), "unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		var saw string
		c, err := n.Dial(t.Context(), "unix", path, func(network, address string) error { saw = network + " " + address; return nil })
		if err != nil || saw != "unix "+path {
			t.Fatalf("%v, control saw %q", err, saw)
		}
		defer c.Close()
		d, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if c.RemoteAddr().String() != path || c.RemoteAddr().Network() != "unix" {
			t.Errorf("remote address %v", c.RemoteAddr())
		}
	})
}

func TestEndings(t *testing.T) {
	both(t, func(t *testing.T, n netx.Net) {
		for _, tt := range []struct {
			name string
			end  func(near net.Conn) error
			read error // what the other side reads after "kept"; nil: EOF
		}{
			{"half-close", func(c net.Conn) error { return netx.CloseWrite(c) }, nil},
			{"close", func(c net.Conn) error { return c.Close() }, nil},
			{"reset", func(c net.Conn) error { netx.Reset(c); return nil }, syscall.ECONNRESET},
		} {
			near, far := connect(t, n)
			near.Write([]byte("kept"))
			got := make([]byte, 4)
			if _, err := io.ReadFull(far, got); err != nil {
				t.Fatal(err)
			}
			if err := tt.end(near); err != nil {
				t.Error(err)
			}
			if rest, err := io.ReadAll(far); len(rest) > 0 || !errors.Is(err, tt.read) {
				t.Errorf("%s: the other side reads %q, %v", tt.name, rest, err)
			}
			if _, err := near.Write([]byte("x")); err == nil {
				t.Errorf("%s: writing goes on", tt.name)
			}
			near.Close()
			far.Close()
		}

		near, far := connect(t, n)
		far.Write([]byte("never read"))
		if _, err := io.ReadFull(near, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		near.Close()
		if _, err := io.ReadAll(far); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("closed with unread data: %v", err)
		}
		far.Close()

		near, far = connect(t, n)
		near.SetReadDeadline(time.Now().Add(time.Millisecond))
		_, err := near.Read(make([]byte, 1))
		var timeout net.Error
		if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("deadline: %v", err)
		}
		near.Close()
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after close: %v", err)
		}
		if err := near.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed twice: %v", err)
		}
		far.Close()
	})
}

// relay joins two connections and returns their outer ends.
func relay(t *testing.T, n netx.Net, head string) (visitor, workload net.Conn, result <-chan error) {
	t.Helper()
	visitor, a := connect(t, n)
	b, workload := connect(t, n)
	done := make(chan error, 1)
	go func() {
		_, _, err := netx.Join(a, b, []byte(head))
		a.Close()
		b.Close()
		done <- err
	}()
	return visitor, workload, done
}

func TestJoinPassesBytesAndEnds(t *testing.T) {
	both(t, func(t *testing.T, n netx.Net) {
		visitor, workload, done := relay(t, n, "head ")
		ask := bytes.Repeat([]byte("question "), 300_000)
		go func() {
			visitor.Write(ask)
			netx.CloseWrite(visitor)
		}()
		got, err := io.ReadAll(workload) // ends though the other direction is open
		if err != nil || sha256.Sum256(got) != sha256.Sum256(append([]byte("head "), ask...)) {
			t.Errorf("the workload got %d bytes, %v", len(got), err)
		}
		workload.Write([]byte("answer"))
		workload.Close()
		if got, err := io.ReadAll(visitor); string(got) != "answer" || err != nil {
			t.Errorf("the visitor got %q, %v", got, err)
		}
		visitor.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestJoinPassesResets(t *testing.T) {
	both(t, func(t *testing.T, n netx.Net) {
		visitor, workload, done := relay(t, n, "")
		visitor.Write([]byte("x"))
		if _, err := io.ReadFull(workload, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		netx.Reset(workload)
		if _, err := io.ReadAll(visitor); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the visitor sees %v, not a reset", err)
		}
		visitor.Close()
		if err := <-done; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Join returns %v", err)
		}
	})
}
