package tunnel

import (
	"context"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// tapped is the machine's own network, whose connections can be made to hear
// nothing any more, as when the path between them dies.
type tapped struct {
	netx.Host
	mu    sync.Mutex
	conns []net.Conn
}

func (n *tapped) keep(c net.Conn, err error) (net.Conn, error) {
	if err == nil {
		n.mu.Lock()
		n.conns = append(n.conns, c)
		n.mu.Unlock()
	}
	return c, err
}

func (n *tapped) Dial(ctx context.Context, network, address string, control netx.Control) (net.Conn, error) {
	return n.keep(n.Host.Dial(ctx, network, address, control))
}

func (n *tapped) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	l, err := n.Host.Listen(ctx, network, address)
	return tappedListener{l, n}, err
}

type tappedListener struct {
	net.Listener
	n *tapped
}

func (l tappedListener) Accept() (net.Conn, error) { return l.n.keep(l.Listener.Accept()) }

// deafen makes the kernel drop whatever comes for the connections there are.
func (n *tapped) deafen() {
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.conns {
		if raw, err := c.(syscall.Conn).SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) { // an error means that it is closed
				unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop})
			})
		}
	}
}

func TestTheKernelTellsOfADeadPath(t *testing.T) {
	t.Parallel()
	n := new(tapped)
	p := newPair(t, n, "127.0.0.1:0")
	ends := make(chan net.Conn, 10)
	_, stop := p.node(n, key(2), func(context.Context, webgw.ID, Request) (net.Conn, error) {
		near, far := tcpPipe(t)
		ends <- far
		return near, nil
	})
	p.waitUp()
	var wg sync.WaitGroup
	for _, k := range []Kind{Sealed, Handoff} {
		for range 3 {
			visitor, far := tcpPipe(t)
			wg.Go(func() {
				if _, _, err := join(p.open(k, key(2)), visitor, []byte("x")); err == nil {
					t.Error("Join saw an orderly end")
				}
				visitor.Close()
			})
			ends <- far
		}
	}
	var all []net.Conn
	for range 12 {
		all = append(all, <-ends)
	}
	n.deafen()
	cut := time.Now()
	for i, c := range all {
		if i%3 == 0 {
			wg.Go(func() {
				for {
					if _, err := c.Write([]byte("x")); err != nil {
						return
					}
					time.Sleep(100 * time.Millisecond)
				}
			})
		}
		wg.Go(func() {
			_, err := io.Copy(io.Discard, c)
			took := time.Since(cut)
			if err == nil || took > 10*time.Second {
				t.Errorf("saw %v after %v", err, took)
			}
			t.Log("cut after", took)
			c.Close()
		})
	}
	wg.Wait()
	stop()
	p.stop()
}
