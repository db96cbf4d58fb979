//go:build linux

package main

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Endpoint is where and how visitors ask for a workload.
type Endpoint struct {
	Addr  string
	Hello string // server name of a ClientHello to send first; then raw bytes
	Host  string // HTTP with this host; "" is the raw protocol
	TLS   bool   // HTTP inside TLS
	H2    bool   // HTTP/2 inside TLS
	UDP   bool   // datagrams
}

// op is what visitors do.
type op string

const (
	opDown    op = "down"    // receive as much as they can
	opUp      op = "up"      // send as much as they can
	opKept    op = "kept"    // ask small questions on kept connections
	opNew     op = "new"     // the same on a new connection each
	opH2      op = "streams" // the same on streams of one HTTP/2 connection
	opBeside  op = "beside"  // ask beside streams that receive as much as they can
	opFair    op = "fair"    // the same of another exposure than those streams, and before them alone
	opEcho    op = "echo"    // send datagrams and get them back
	opFirst   op = "first"   // as new, over a long link
	opLossy   op = "lossy"   // as down, over a long link that loses packets
	opPart    op = "part"    // nothing: a benchmark of Go
	opIdle    op = "idle"    // ask once, and hold the connection
	opRelease op = "release" // let go what idle holds
)

// job is one measure of one system.
type job struct {
	Endpoint
	Op      op
	Streams int      // or the bytes of a datagram
	Bulk    Endpoint // of the streams beside which to ask
	Warm    float64  // seconds before the measure begins
	Seconds float64
	PIDs    []int // whose processor time to read
	Own     []int // further processes that belong to the measure
}

// result is what came of it.
type result struct {
	Seconds  float64
	Bytes    int64
	Count    int64     // questions answered
	CPU      []float64 // seconds, per PID
	P50, P99 float64   // seconds
	Alone    float64   // seconds: P99 before there were others beside
	Sent     int64     // datagrams, at half the rate that Count and Seconds tell
	Lost     int64     // of those
	Others   float64   // processors that went to others meanwhile, other machines of the hypervisor included
	Failures int64
	Failed   string      `json:",omitempty"` // the first failure
	Idle     []footprint `json:",omitempty"` // per stream and process; filled in by the runner
}

// load is the process that plays the visitors.
type load struct {
	hello map[string][]byte
	held  []*visitor
}

func newLoad() *load {
	return &load{hello: map[string][]byte{}}
}

func (l *load) handle(raw json.RawMessage) any {
	var j job
	res, err := result{}, json.Unmarshal(raw, &j)
	if err == nil {
		res, err = l.do(j)
	}
	if err != nil {
		res.Failures, res.Failed = res.Failures+1, err.Error()
	}
	return res
}

func (l *load) do(j job) (res result, err error) {
	for _, name := range []string{j.Hello, j.Bulk.Hello} {
		if name != "" && l.hello[name] == nil {
			if l.hello[name], err = clientHello(name); err != nil {
				return res, err
			}
		}
	}
	switch {
	case j.UDP && j.Op == opEcho:
		return l.echo(j)
	case j.UDP:
		return res, l.reach(j)
	case j.Op == opIdle:
		return l.hold(j)
	case j.Op == opRelease:
		for _, v := range l.held {
			v.Close()
		}
		l.held = nil
		return res, nil
	case j.Op == opFair:
		alone := j
		alone.Op, alone.Streams = opKept, 1
		if res, err = l.do(alone); err != nil || res.Failures > 0 {
			return res, err
		}
		p99 := res.P99
		j.Op = opBeside
		res, err = l.do(j)
		res.Alone = p99
		return res, err
	}
	m := &meter{}
	var wg sync.WaitGroup
	switch j.Op {
	case opH2: // all on one connection
		wg.Go(func() { l.visit(j, m) })
	case opBeside:
		ask, bulk := j, j
		ask.Op, bulk.Op, bulk.Endpoint = opKept, opDown, j.Bulk
		wg.Go(func() { l.visit(ask, m) })
		for range j.Streams {
			wg.Go(func() { l.visit(bulk, m) })
		}
	default:
		for range j.Streams {
			wg.Go(func() { l.visit(j, m) })
		}
	}
	time.Sleep(seconds(j.Warm))
	res, err = m.measure(j)
	m.stop()
	wg.Wait()
	if f := m.failed.Load(); f != nil {
		res.Failed = *f
	}
	res.Failures = m.failures.Load()
	slices.Sort(m.times)
	if n := len(m.times); n > 0 {
		res.P50, res.P99 = m.times[n/2].Seconds(), m.times[n*99/100].Seconds()
	}
	return res, err
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// meter adds up what all visitors of a job do.
type meter struct {
	bytes, count atomic.Int64
	failures     atomic.Int64
	failed       atomic.Pointer[string]
	counting     atomic.Bool

	mu    sync.Mutex
	over  bool
	open  map[*visitor]struct{}
	times []time.Duration // taken while counting
}

func (m *meter) add(n int) { m.bytes.Add(int64(n)) }

// measure reads the counters at both ends of the job's time.
func (m *meter) measure(j job) (res result, err error) {
	read := func() (at time.Time, bytes, count int64, cpu []float64, others float64) {
		for _, pid := range j.PIDs {
			s, e := cpuSeconds(pid)
			cpu, err, others = append(cpu, s), errors.Join(err, e), others-s
		}
		for _, pid := range append(j.Own, os.Getpid()) {
			s, e := cpuSeconds(pid)
			err, others = errors.Join(err, e), others-s
		}
		all, e := machineSeconds()
		err = errors.Join(err, e)
		return time.Now(), m.bytes.Load(), m.count.Load(), cpu, others + all
	}
	m.counting.Store(true)
	t0, b0, c0, cpu0, others0 := read()
	time.Sleep(seconds(j.Seconds))
	t1, b1, c1, cpu1, others1 := read()
	m.counting.Store(false)
	for i := range cpu1 {
		cpu1[i] -= cpu0[i]
	}
	took := t1.Sub(t0).Seconds()
	return result{Seconds: took, Bytes: b1 - b0, Count: c1 - c0, CPU: cpu1, Others: (others1 - others0) / took}, err
}

// took keeps how long something took, while that is measured.
func (m *meter) took(long time.Duration) {
	if m.counting.Load() {
		m.mu.Lock()
		m.times = append(m.times, long)
		m.mu.Unlock()
	}
}

// stop ends all visits.
func (m *meter) stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.over = true
	for v := range m.open {
		v.Close()
	}
}

// enter remembers v, so that stop ends it; false after stop.
func (m *meter) enter(v *visitor) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over {
		v.Close()
		return false
	}
	if m.open == nil {
		m.open = map[*visitor]struct{}{}
	}
	m.open[v] = struct{}{}
	return true
}

func (m *meter) leave(v *visitor) {
	m.mu.Lock()
	delete(m.open, v)
	m.mu.Unlock()
	v.Close()
}

func (m *meter) isOver() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.over
}

// fail counts a failure, unless it comes from being stopped.
func (m *meter) fail(err error) {
	if err == nil || m.isOver() {
		return
	}
	m.failures.Add(1)
	s := err.Error()
	m.failed.CompareAndSwap(nil, &s)
}

// visit is one visitor, until the meter stops.
func (l *load) visit(j job, m *meter) {
	const giveUp = 100
	for !m.isOver() && m.failures.Load() < giveUp {
		start := time.Now()
		v, err := l.connect(j.Endpoint)
		if err != nil {
			m.fail(err)
			continue
		}
		if !m.enter(v) {
			return
		}
		switch j.Op {
		case opDown, opLossy:
			err = v.down(m)
		case opUp:
			err = v.up(m)
		case opKept:
			err = v.questions(m)
		case opNew, opFirst:
			var answered time.Time
			if answered, err = v.once(); err == nil {
				m.count.Add(1)
				m.took(answered.Sub(start))
			}
		case opH2:
			err = v.multiplex(m, j.Streams)
		}
		m.fail(err)
		m.leave(v)
	}
}

func (l *load) hold(j job) (res result, err error) {
	// Slowly: how a gateway keeps up with a rush is another measure.
	const together, every = 20, 2 * time.Millisecond
	pace := time.NewTicker(every)
	defer pace.Stop()
	var mu sync.Mutex
	var wg sync.WaitGroup
	slots := make(chan struct{}, together)
	for i := range j.Streams {
		slots <- struct{}{}
		<-pace.C
		wg.Go(func() {
			defer func() { <-slots }()
			v, err := l.connectFrom(j.Endpoint, &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i%visitorAddresses))})
			if err == nil {
				err = v.ask(askPing)
			}
			mu.Lock()
			defer mu.Unlock()
			if v != nil {
				l.held = append(l.held, v)
			}
			if err != nil {
				res.Failures, res.Failed = res.Failures+1, err.Error()
			}
		})
	}
	wg.Wait()
	return res, nil
}

// visitor is one connection.
type visitor struct {
	net.Conn
	at     Endpoint
	tcp    *net.TCPConn  // the bytes as they are; nil inside TLS
	r      *bufio.Reader // made when first needed
	prefix []byte        // goes out with what is asked first
	buf    [question + 1]byte
}

// visitorAddresses is over how many addresses those who hold connections are
// spread: gateways limit how many one address may have.
const visitorAddresses = 50

func (l *load) connect(at Endpoint) (*visitor, error) { return l.connectFrom(at, nil) }

// connectFrom connects from an address of this machine, nil for any.
func (l *load) connectFrom(at Endpoint, from *net.TCPAddr) (*visitor, error) {
	d := net.Dialer{Timeout: 10 * time.Second}
	if from != nil {
		d.LocalAddr = from
	}
	c, err := d.Dial("tcp", at.Addr)
	if err != nil {
		return nil, err
	}
	v := &visitor{Conn: c, at: at, tcp: c.(*net.TCPConn), prefix: l.hello[at.Hello]}
	if at.TLS {
		// Whose certificate it is does not matter here; that it is verified
		// would only add work for the load generator.
		protocol := "http/1.1"
		if at.H2 {
			protocol = "h2"
		}
		t := tls.Client(c, &tls.Config{ServerName: at.Host, InsecureSkipVerify: true, NextProtos: []string{protocol}})
		if err := t.Handshake(); err != nil {
			c.Close()
			return nil, err
		}
		v.Conn, v.tcp = t, nil
	}
	return v, nil
}

func (v *visitor) reader() *bufio.Reader {
	if v.r == nil {
		v.r = bufio.NewReaderSize(v.Conn, 4096)
	}
	return v.r
}

// send sends what is asked, after the ClientHello if there is one.
func (v *visitor) send(p []byte) error {
	if v.prefix != nil {
		p = slices.Concat(v.prefix, p)
		v.prefix = nil
	}
	_, err := v.Write(p)
	return err
}

func (v *visitor) down(m *meter) error {
	if v.at.Host == "" {
		if err := v.send([]byte{askDown}); err != nil {
			return err
		}
		return discard(v.tcp, -1, m.add)
	}
	for {
		if _, err := fmt.Fprintf(v, "GET /large HTTP/1.1\r\nHost: %s\r\n\r\n", v.at.Host); err != nil {
			return err
		}
		n, err := v.head()
		if err != nil {
			return err
		}
		here := min(n, v.r.Buffered())
		if _, err := v.r.Discard(here); err != nil {
			return err
		}
		m.add(here)
		if err := v.drop(n-here, m); err != nil {
			return err
		}
	}
}

// drop receives n bytes of no interest.
func (v *visitor) drop(n int, m *meter) error {
	if v.tcp != nil {
		return discard(v.tcp, n, m.add)
	}
	b := make([]byte, 64<<10)
	for n > 0 {
		k, err := v.Read(b[:min(n, len(b))])
		n -= k
		m.add(k)
		if err != nil {
			return err
		}
	}
	return nil
}

// head reads the head of an answer and returns the length of its body.
func (v *visitor) head() (int, error) {
	first, n, _, err := readHead(v.reader())
	if err == nil && !strings.Contains(first, " 200 ") {
		err = fmt.Errorf("answer %q", first)
	}
	return n, err
}

func (v *visitor) up(m *meter) error {
	if v.at.Host == "" {
		if err := v.send([]byte{askUp}); err != nil {
			return err
		}
		return send(v.Conn, -1, m.add)
	}
	for {
		if _, err := fmt.Fprintf(v, "PUT /up HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n", v.at.Host, largeBody); err != nil {
			return err
		}
		if err := send(v.Conn, largeBody, m.add); err != nil {
			return err
		}
		if err := v.answer(); err != nil {
			return err
		}
	}
}

// answer reads a small answer whole.
func (v *visitor) answer() error {
	n := reply
	if v.at.Host != "" {
		var err error
		if n, err = v.head(); err != nil {
			return err
		}
	}
	_, err := v.reader().Discard(n)
	return err
}

// ask asks one small question and waits for the answer.
func (v *visitor) ask(how byte) (err error) {
	switch {
	case v.at.Host == "":
		v.buf[0] = how
		err = v.send(v.buf[:])
	case how == askOnce:
		_, err = fmt.Fprintf(v, "GET /small HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", v.at.Host)
	default:
		_, err = fmt.Fprintf(v, "GET /small HTTP/1.1\r\nHost: %s\r\n\r\n", v.at.Host)
	}
	if err != nil {
		return err
	}
	return v.answer()
}

// once asks on a fresh connection and waits for the other side to end it.
func (v *visitor) once() (answered time.Time, err error) {
	if err := v.ask(askOnce); err != nil {
		return answered, err
	}
	answered = time.Now()
	if _, err := v.r.ReadByte(); err != io.EOF {
		return answered, fmt.Errorf("after the answer: %v", err)
	}
	return answered, nil
}

func (v *visitor) questions(m *meter) error {
	times := make([]time.Duration, 0, 4096)
	defer func() {
		m.mu.Lock()
		m.times = append(m.times, times...)
		m.mu.Unlock()
	}()
	first := true
	for {
		start := time.Now()
		var err error
		if first || v.at.Host != "" {
			first, err = false, v.ask(askPing)
		} else if _, err = v.Write(v.buf[1:]); err == nil {
			err = v.answer()
		}
		if err != nil {
			return err
		}
		m.count.Add(1)
		if m.counting.Load() {
			times = append(times, time.Since(start))
		}
	}
}

// clientHello returns the ClientHello that this machine's TLS would send for
// name: of the size of today's, with a post-quantum key share.
func clientHello(name string) ([]byte, error) {
	near, far := net.Pipe()
	defer far.Close()
	go func() {
		// It fails, as nobody answers, once it is closed.
		tls.Client(near, &tls.Config{ServerName: name}).Handshake()
	}()
	defer near.Close()
	far.SetDeadline(time.Now().Add(5 * time.Second))
	r := bufio.NewReaderSize(far, 16<<10)
	h, err := r.Peek(5)
	if err != nil {
		return nil, err
	}
	hello := make([]byte, 5+int(h[3])<<8+int(h[4]))
	_, err = io.ReadFull(r, hello)
	return hello, err
}
