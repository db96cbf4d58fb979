package netx

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// behave makes bulk work keep to the lanes until the test ends.
func behave(t *testing.T) {
	road.polite.Store(int64(time.Since(roadBegan) + time.Hour))
	t.Cleanup(func() { road.polite.Store(0) })
}

func TestLanesLeaveAProcessorFree(t *testing.T) {
	behave(t)
	var now, most atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				lane := EnterLane()
				n := now.Add(1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				runtime.Gosched()
				now.Add(-1)
				lane.Leave()
			}
		})
	}
	wg.Wait()
	if free := max(1, runtime.GOMAXPROCS(0)-1); most.Load() > int64(free) {
		t.Errorf("%d pieces of bulk work at once, of %d", most.Load(), free)
	}
	if len(road.lanes) != 0 {
		t.Error("a lane is still taken")
	}
}

// Bulk work keeps to the lanes only while there are short exchanges beside it.
func TestShortExchangesMakeBulkPolite(t *testing.T) {
	road.polite.Store(0)
	defer road.polite.Store(0)
	a, b := loopback(t)
	src := NewSource(b)
	ask := func() {
		if _, err := a.Write([]byte("question")); err != nil {
			t.Fatal(err)
		}
		got, err := src.Next()
		if err != nil {
			t.Fatal(err)
		}
		got.Return()
	}
	ask() // the first may be after others' bulk work
	road.polite.Store(0)
	ask()
	if polite() {
		t.Fatal("polite without bulk work")
	}
	if l := EnterLane(); l.taken {
		t.Fatal("a lane was taken")
	}
	ask()
	if !polite() {
		t.Fatal("not polite beside a short exchange")
	}
	l := EnterLane()
	if !l.taken {
		t.Error("no lane was taken")
	}
	l.Leave()
}

// A receiver that has stopped to read keeps nobody else out of the lanes, and
// all bytes come whole.
func TestLanesAreLeftWhileWaiting(t *testing.T) {
	behave(t)
	data := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{1}).Read(data)
	relayed := func(copied func(dst, src net.Conn) error) (in, out net.Conn) {
		in, src := loopback(t)
		dst, out := loopback(t)
		go func() {
			copied(dst, src)
			dst.Close()
		}()
		go func() {
			in.Write(data) // what is missing shows at the other end
			in.(*net.TCPConn).CloseWrite()
		}()
		return in, out
	}
	ways := []func(dst, src net.Conn) error{
		func(dst, src net.Conn) error { var n atomic.Int64; return Copy(dst, src, nil, &n) },
		func(dst, src net.Conn) error {
			b, err := io.ReadAll(src)
			if err == nil {
				_, err = WriteBulk(dst, b)
			}
			return err
		},
	}
	for range 2 * runtime.GOMAXPROCS(0) {
		for _, way := range ways {
			_, stalled := relayed(way)
			defer stalled.Close()
		}
	}
	for _, way := range ways {
		_, out := relayed(way)
		out.SetReadDeadline(time.Now().Add(30 * time.Second))
		if got, err := io.ReadAll(out); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("%d bytes of %d, %v", len(got), len(data), err)
		}
	}
}

func loopback(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}
