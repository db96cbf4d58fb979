//go:build linux

package main

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/ipv4"
)

const (
	datagramBuffer   = 2 << 20                // of sockets
	datagramWindow   = 16                     // datagrams of one visitor that may be on the way
	datagramPatience = 300 * time.Millisecond // what takes longer is lost
)

func listenUDP() (*net.UDPConn, error) {
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err == nil {
		c.SetReadBuffer(datagramBuffer) // a wish
	}
	return c, err
}

func messages(n, size int) []ipv4.Message {
	m := make([]ipv4.Message, n)
	for i := range m {
		m[i].Buffers = [][]byte{make([]byte, size)}
	}
	return m
}

// echoSink sends every datagram back, many by one system call.
func echoSink(c *net.UDPConn) {
	p, in := ipv4.NewPacketConn(c), messages(64, 2048)
	for {
		n, err := p.ReadBatch(in, 0)
		if err != nil {
			panic(err) // no measure is worth anything then
		}
		out := slices.Clone(in[:n])
		for i := range out {
			out[i].Buffers = [][]byte{in[i].Buffers[0][:in[i].N]}
		}
		for len(out) > 0 {
			sent, err := p.WriteBatch(out, 0)
			if err != nil {
				sent = 1 // lost is lost
			}
			out = out[sent:]
		}
	}
}

// flow is a visitor who sends datagrams.
type flow struct {
	*net.UDPConn
	p       *ipv4.PacketConn
	in, out []ipv4.Message
}

// openFlow sends until the first answer: what is between learns the way.
func openFlow(addr string, size int) (*flow, error) {
	c, err := net.Dial("udp", addr)
	if err != nil {
		return nil, err
	}
	f := &flow{c.(*net.UDPConn), ipv4.NewPacketConn(c.(*net.UDPConn)), messages(datagramWindow, size), messages(datagramWindow, size)}
	f.SetReadBuffer(datagramBuffer) // a wish
	for range 10 {
		if f.send(1); f.receive() > 0 {
			return f, nil
		}
	}
	f.Close()
	return nil, fmt.Errorf("no answer from %s", addr)
}

// send sends n datagrams, at most the window.
func (f *flow) send(n int) {
	for done := 0; done < n; {
		k, err := f.p.WriteBatch(f.out[done:n], 0)
		if err != nil {
			k = 1 // lost is lost
		}
		done += k
	}
}

// receive waits for answers and returns how many came, or 0 if none came in
// time.
func (f *flow) receive() int {
	for {
		f.SetReadDeadline(time.Now().Add(datagramPatience))
		n, err := f.p.ReadBatch(f.in, 0)
		switch {
		case err == nil:
			return n
		case !errors.Is(err, syscall.ECONNREFUSED): // nobody listens there yet
			return 0
		}
	}
}

// echo measures datagrams there and back twice: how many with full windows, and
// how many are lost at half that rate.
func (l *load) echo(j job) (res result, err error) {
	flows := make([]*flow, echoVisitors)
	for i := range flows {
		if flows[i], err = openFlow(j.Addr, j.Streams); err != nil {
			return res, err
		}
		defer flows[i].Close()
	}
	m := &meter{}
	var all sync.WaitGroup
	for _, f := range flows {
		all.Go(func() { f.fill(m) })
	}
	time.Sleep(seconds(j.Warm))
	res, err = m.measure(j)
	m.stop()
	all.Wait()
	if err != nil {
		return res, err
	}
	var sent, got atomic.Int64
	each := float64(res.Count) / res.Seconds / 2 / echoVisitors
	for _, f := range flows {
		all.Go(func() {
			s, g := f.pace(each, seconds(j.Seconds))
			sent.Add(int64(s))
			got.Add(int64(g))
		})
	}
	all.Wait()
	res.Sent, res.Lost = sent.Load(), max(0, sent.Load()-got.Load())
	return res, nil
}

const echoVisitors = 8

// fill keeps the window full until the meter stops, and waits for the last.
func (f *flow) fill(m *meter) {
	f.send(datagramWindow)
	for {
		n := f.receive()
		if m.isOver() {
			if n == 0 {
				return
			}
			continue
		}
		m.count.Add(int64(n))
		if n == 0 { // the whole window is lost
			n = datagramWindow
		}
		f.send(n)
	}
}

// pace sends so many datagrams a second and counts the answers.
func (f *flow) pace(rate float64, long time.Duration) (sent, got int) {
	received := make(chan int)
	go func() {
		n := 0
		for {
			k := f.receive()
			if n += k; k == 0 {
				received <- n
				return
			}
		}
	}()
	start := time.Now()
	for tick := time.NewTicker(time.Millisecond); time.Since(start) < long; <-tick.C {
		due := int(rate * min(time.Since(start), long).Seconds())
		for sent < due {
			n := min(due-sent, datagramWindow)
			f.send(n)
			sent += n
		}
	}
	return sent, <-received
}

// reach sees whether datagrams come back.
func (l *load) reach(j job) error {
	f, err := openFlow(j.Addr, 64)
	if err != nil {
		return err
	}
	return f.Close()
}
