package tunnel

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"testing"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// napping is a joined stream whose both ends can be sent to sleep.
type napping struct {
	t        *testing.T
	p        *pair
	client   *Client
	stop     func()
	stream   *Stream
	visitor  net.Conn
	workload net.Conn
	ways     int // that have not ended
	joined   chan error
}

func newNapping(t *testing.T, kind Kind) *napping {
	p := newPair(t, netx.Host{}, "127.0.0.1:0")
	n := &napping{t: t, p: p, ways: 2, joined: make(chan error, 1)}
	workloads := make(chan net.Conn, 1)
	n.client, n.stop = p.node(netx.Host{}, key(2), func(context.Context, webgw.ID, Request) (net.Conn, error) {
		near, far := tcpPipe(t)
		workloads <- far
		return near, nil
	})
	p.waitUp()
	near, far := tcpPipe(t)
	n.visitor, n.stream = far, p.open(kind, key(2))
	go func() {
		_, _, err := join(n.stream, near, []byte("x"))
		near.Close()
		n.joined <- err
	}()
	n.workload = <-workloads
	n.carry(n.visitor, n.workload, []byte(""), []byte("x"))
	n.carry(n.workload, n.visitor, []byte("y"), []byte("y"))
	return n
}

func (n *napping) end() { n.stop(); n.p.stop() }

func (n *napping) carry(from, to net.Conn, send, want []byte) {
	n.t.Helper()
	go from.Write(send)
	got := make([]byte, len(want))
	to.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.ReadFull(to, got); err != nil || !bytes.Equal(got, want) {
		n.t.Fatalf("%d bytes came, %v; wanted %d", len(got), err, len(want))
	}
}

// sleep sends both directions of each end to sleep.
func (n *napping) sleep() {
	n.t.Helper()
	asleep := func(all []*dataConn) int {
		count := 0
		for _, d := range all {
			r := d.relay.Load()
			if r == nil {
				continue
			}
			for i := range r.ways {
				w := &r.ways[i]
				w.mu.Lock()
				if w.waiting != nil && !w.on {
					count++
				}
				w.mu.Unlock()
			}
		}
		return count
	}
	for start := time.Now(); asleep(n.p.server.carrying()) != n.ways || asleep(n.client.carrying()) != n.ways; runtime.Gosched() {
		for _, d := range append(n.p.server.carrying(), n.client.carrying()...) {
			d.drowse()
		}
		if time.Since(start) > 20*time.Second {
			n.t.Fatal("the stream stays awake")
		}
	}
}

func TestQuietStreamsNap(t *testing.T) {
	t.Parallel()
	for _, kind := range []Kind{Sealed, Handoff} {
		t.Run(kind.String(), func(t *testing.T) {
			n := newNapping(t, kind)
			defer n.end()
			much := make([]byte, restAfter+restAfter/2)
			rand.NewChaCha8([32]byte{1}).Read(much)
			for _, p := range [][]byte{[]byte("z"), much[:100<<10], much, []byte("after the frames"), much[:1<<20]} {
				n.sleep()
				n.carry(n.visitor, n.workload, p, p)
				n.sleep()
				n.carry(n.workload, n.visitor, p, p)
			}
			n.sleep()
			n.visitor.(*net.TCPConn).CloseWrite()
			if b, err := io.ReadAll(n.workload); err != nil || len(b) > 0 {
				t.Fatalf("the workload saw %q, %v instead of the end", b, err)
			}
			n.ways = 1
			n.sleep()
			n.carry(n.workload, n.visitor, []byte("the last"), []byte("the last"))
			n.sleep()
			n.workload.Close()
			if b, err := io.ReadAll(n.visitor); err != nil || len(b) > 0 {
				t.Fatalf("the visitor saw %q, %v instead of the end", b, err)
			}
			if err := <-n.joined; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// Whatever ends a stream, it ends at once for who is asleep.
func TestNapsEnd(t *testing.T) {
	t.Parallel()
	for _, kind := range []Kind{Sealed, Handoff} {
		for name, end := range map[string]func(n *napping){
			"visitor reset":  func(n *napping) { netx.Reset(n.visitor) },
			"workload reset": func(n *napping) { netx.Reset(n.workload) },
			"gateway closed": func(n *napping) { n.p.server.Close() },
			"node stopped":   func(n *napping) { n.stop() },
			"cut":            func(n *napping) { n.stream.Cut() },
		} {
			t.Run(kind.String()+"/"+name, func(t *testing.T) {
				n := newNapping(t, kind)
				defer n.end()
				n.sleep()
				end(n)
				if err := <-n.joined; err == nil {
					t.Error("Join saw an orderly end")
				}
				for _, c := range []net.Conn{n.visitor, n.workload} {
					c.SetReadDeadline(time.Now().Add(20 * time.Second))
					if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
						t.Errorf("%v instead of a reset", err)
					}
				}
			})
		}
	}
}
