package netx

import (
	"io"
	"net"
	"sync"
	"testing"
)

func pair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := Host{}.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = (Host{}).Dial(t.Context(), "tcp", l.Addr().String(), nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return a, b
}

func lot(t *testing.T) *Lot {
	t.Helper()
	l, err := NewLot()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

func TestParkedConnectionsAreResumed(t *testing.T) {
	l := lot(t)
	a, b := pair(t)
	resumed := make(chan struct{})
	park := func() *Parked {
		p := l.Park(b, func() { resumed <- struct{}{} })
		if p == nil {
			t.Fatal("not parked")
		}
		return p
	}
	read := func(want string) {
		t.Helper()
		p := make([]byte, len(want))
		if _, err := io.ReadFull(b, p); err != nil || string(p) != want {
			t.Fatalf("read %q, %v; want %q", p, err, want)
		}
	}

	park()
	a.Write([]byte("bytes that come"))
	<-resumed
	read("bytes that come")

	a.Write([]byte("bytes that are here"))
	park()
	<-resumed
	read("bytes that are here")

	p := park()
	p.Wake()
	<-resumed
	p.Wake() // again: nothing

	park()
	a.(*net.TCPConn).CloseWrite()
	<-resumed
	if _, err := b.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("%v instead of the end", err)
	}
}

// A wait whose connection is closed must not wake for the connection that gets
// its descriptor next.
func TestParkedConnectionClosed(t *testing.T) {
	l := lot(t)
	_, b := pair(t)
	resumed := make(chan string, 2)
	p := l.Park(b, func() { resumed <- "closed" })
	b.Close()
	c, d := pair(t)
	q := l.Park(d, func() { resumed <- "next" })
	if p == nil || q == nil {
		t.Fatal("not parked")
	}
	c.Write([]byte("for the next"))
	if who := <-resumed; who != "next" {
		t.Fatalf("%s was resumed", who)
	}
	p.Wake()
	if who := <-resumed; who != "closed" {
		t.Fatalf("%s was resumed", who)
	}
	if l.Park(b, func() { t.Error("resumed") }) != nil {
		t.Error("a closed connection was parked")
	}
}

func TestLotClosed(t *testing.T) {
	l, err := NewLot()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 100 {
		_, b := pair(t)
		wg.Add(1)
		if l.Park(b, wg.Done) == nil {
			t.Fatal("not parked")
		}
	}
	l.Close()
	wg.Wait()
	_, b := pair(t)
	if l.Park(b, func() { t.Error("resumed") }) != nil {
		t.Error("parked in a closed lot")
	}
}

// Many, resumed by bytes and by Wake at the same moment: each exactly once.
func TestParkedOnce(t *testing.T) {
	l := lot(t)
	var wg sync.WaitGroup
	for range 50 {
		a, b := pair(t)
		for range 20 {
			wg.Add(1) // a second Done would panic
			p := l.Park(b, wg.Done)
			go a.Write([]byte{1})
			go p.Wake()
			wg.Wait()
			if _, err := io.ReadFull(b, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
}
