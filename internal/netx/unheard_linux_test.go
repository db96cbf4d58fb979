package netx_test

import (
	"errors"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"webgw.dev/webgw/internal/netx"
)

// deafen makes the kernel drop everything that comes for c without a word, as a
// path that has died does.
func deafen(t *testing.T, c net.Conn) {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop})
	})
	if err != nil || failed != nil {
		t.Fatal(err, failed)
	}
}

// within waits until f is true.
func within(t *testing.T, d time.Duration, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for start := time.Now(); !f(); <-tick.C {
		if time.Since(start) > d {
			t.Fatal(what, "not within", d)
		}
	}
}

func TestASilentPeerIsUnheard(t *testing.T) {
	t.Parallel()
	t.Run("that was sent something", func(t *testing.T) {
		t.Parallel()
		near, far := connect(t, netx.Host{})
		near.Write([]byte("arrives"))
		if got := netx.Unheard(near); got != 0 {
			t.Errorf("%v at once", got)
		}
		deafen(t, near)
		deafen(t, far)
		near.Write([]byte("lost"))
		within(t, 10*time.Second, "unheard", func() bool { return netx.Unheard(near) > time.Second })
		if got := netx.Unheard(far); got != 0 {
			t.Errorf("%v where nothing is waited for", got)
		}
	})
	t.Run("that was asked", func(t *testing.T) {
		t.Parallel()
		near, far := connect(t, netx.Host{})
		deafen(t, near)
		deafen(t, far)
		netx.Probe(near)
		within(t, 10*time.Second, "unheard", func() bool { return netx.Unheard(near) > time.Second })
		near.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, syscall.ETIMEDOUT) {
			t.Errorf("the machine did not end the connection: %v", err)
		}
	})
	t.Run("that is slow only", func(t *testing.T) {
		t.Parallel()
		near, far := connect(t, netx.Host{})
		defer far.Close()
		netx.Probe(near)
		near.SetWriteDeadline(time.Now().Add(2 * time.Second))
		for {
			if got := netx.Unheard(near); got != 0 {
				t.Fatalf("unheard for %v", got)
			}
			if _, err := near.Write(make([]byte, 64<<10)); err != nil {
				break
			}
		}
		if got := netx.Unheard(near); got != 0 {
			t.Errorf("unheard for %v", got)
		}
	})
}
