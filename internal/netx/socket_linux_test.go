package netx

import (
	"context"
	"net"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func congestionControl(t *testing.T, c net.Conn) (cc string) {
	t.Helper()
	err := Raw(c).Control(func(fd uintptr) {
		var err error
		if cc, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return cc
}

// Where the machine sends by a clock, near paths must not.
func TestNearPathsAreNotPaced(t *testing.T) {
	pace := func(_, _ string, raw syscall.RawConn) (err error) {
		raw.Control(func(fd uintptr) {
			err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, paced)
		})
		return err
	}
	lc := net.ListenConfig{Control: pace}
	inner, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Skipf("this kernel has no %s: %v", paced, err)
	}
	l := listener{inner}
	defer l.Close()

	d := net.Dialer{Control: pace}
	c, err := d.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if cc := congestionControl(t, c); cc != paced {
		t.Fatalf("the test's own connection uses %s", cc)
	}
	unpace(c)
	if cc := congestionControl(t, c); cc == paced {
		t.Error("a connection over loopback is still paced")
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	if cc := congestionControl(t, accepted); cc == paced {
		t.Error("an accepted connection over loopback is still paced")
	}

	dialed, err := Host{}.Dial(context.Background(), "tcp", l.Addr().String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dialed.Close()
	if cc := congestionControl(t, dialed); cc == paced {
		t.Error("a dialed connection over loopback is still paced")
	}
}
