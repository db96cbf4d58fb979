//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A long link between gateway and node is emulated in a network namespace by a
// TUN device: what is sent to farSide comes back, late, with its addresses
// exchanged, so that it arrives as if farSide had sent it to us. So every process
// may stay where it is, the kernel's own TCP is at both ends, and nothing but
// the way to the address of the next hop tells that it is far.
const (
	loopback = "127.0.0.1"
	nearSide = "10.99.0.1"
	farSide  = "10.99.0.2"
)

// bind is where a hop listens so that the one before can reach it.
func (r *rig) bind() string {
	if r.link == nil {
		return loopback
	}
	return "0.0.0.0"
}

// across is the address by which the other hop reaches a local one.
func (r *rig) across(addr string) string {
	if r.link == nil {
		return addr
	}
	return farSide + strings.TrimPrefix(addr, loopback)
}

// linkSettings are one link's, in each direction.
type linkSettings struct {
	Delay float64 // one way, seconds
	Loss  float64 // share of packets
	Rate  float64 // bit/s; 0: as fast as can be
}

var (
	link      = linkSettings{Delay: 0.05}
	lossyLink = linkSettings{Delay: 0.05, Loss: 0.01, Rate: 100e6}
)

func (m measure) link() linkSettings {
	if m.op == opLossy {
		return lossyLink
	}
	return link
}

// farAnswer is what a bench/run inside a namespace prints.
type farAnswer struct {
	Unavailable string // why there is no link
	Systems     []string
	Results     map[string]map[string][]result
}

// overLink has a bench/run in a network namespace take the measures that need
// the link.
func (r *rig) overLink(ctx context.Context, t *table) error {
	wanted := r.o.wanted(far)
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control"); err != nil || !slices.Contains(strings.Fields(string(b)), "bbr") {
		wanted = slices.DeleteFunc(wanted, func(m measure) bool {
			if m.op == opLossy {
				t.notes[m] = "not to be had here: this kernel has no BBR"
			}
			return m.op == opLossy
		})
	}
	if len(wanted) == 0 {
		return nil
	}
	unavailable := func(why string) {
		for _, m := range wanted {
			t.notes[m] = "not to be had here: " + why
		}
	}
	if err := r.build(ctx); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// More rounds would tell little: delays do not vary as throughput does.
	cmd := exec.CommandContext(ctx, self, "-far", "-rounds", strconv.Itoa(min(r.o.rounds, 3)), "-seconds", fmt.Sprint(r.o.seconds),
		"-tries", "1", "-only", r.o.only.String(), "-systems", r.o.systems.String(), "-webgw", r.bin)
	cmd.Stderr, cmd.Stdout = os.Stderr, new(bytes.Buffer)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if uid := os.Geteuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	if err := cmd.Start(); err != nil {
		unavailable(fmt.Sprintf("no network namespace: %v", err))
		return nil
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("measures over a link: %w", err)
	}
	var a farAnswer
	if err := json.Unmarshal(cmd.Stdout.(*bytes.Buffer).Bytes(), &a); err != nil {
		return err
	}
	if a.Unavailable != "" {
		unavailable(a.Unavailable)
		return nil
	}
	for _, m := range wanted {
		for _, s := range a.Systems {
			for _, res := range a.Results[s][m.name()] {
				t.add(s, m, res)
			}
		}
	}
	return nil
}

// serveLink makes the link, or tells why there can't be one, and lets it be set.
func serveLink() (handle func(json.RawMessage) any, why string) {
	tun, err := makeLink()
	if err != nil {
		return nil, strings.Join(strings.Fields(err.Error()), " ")
	}
	var set atomic.Pointer[linkSettings]
	set.Store(&link)
	go carry(tun, &set)
	return func(raw json.RawMessage) any {
		s := new(linkSettings)
		if err := json.Unmarshal(raw, s); err != nil {
			panic(err) // the runner is at fault
		}
		set.Store(s)
		return s
	}, ""
}

// makeLink makes the device and, in a namespace that is new, the loopback.
func makeLink() (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq("far0")
	if err != nil {
		return nil, err
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return nil, fmt.Errorf("TUN device: %w", err)
	}
	for _, args := range []string{"link set lo up", "addr add " + nearSide + "/30 dev far0", "link set far0 up mtu 1500 txqueuelen 10000"} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("ip %s: %w %s", args, err, out)
		}
	}
	return os.NewFile(uintptr(fd), "far0"), nil
}

// packet is one on its way.
type packet struct {
	due time.Time
	p   []byte
}

// carry takes packets to the other side, which is where they come from.
func carry(tun *os.File, set *atomic.Pointer[linkSettings]) {
	const queue = 0.1 // seconds that a packet may wait for its turn
	var ways [2]struct {
		free time.Time // when the last one has left
		out  chan packet
	}
	for i := range ways {
		ways[i].out = make(chan packet, 1<<16)
		go deliver(tun, ways[i].out)
	}
	b := make([]byte, 1<<16)
	for {
		n, err := tun.Read(b)
		if err != nil {
			panic(err) // no measure is worth anything then
		}
		if n < 24 || b[0]>>4 != 4 {
			continue // IPv6 looks for neighbours
		}
		p := bytes.Clone(b[:n])
		// Exchanging addresses leaves every checksum as it is.
		copy(p[12:16], b[16:20])
		copy(p[16:20], b[12:16])
		head := int(p[0]&15) * 4
		w := &ways[0]
		if binary.BigEndian.Uint16(p[head:]) < binary.BigEndian.Uint16(p[head+2:]) { // both ways of a connection differ in this
			w = &ways[1]
		}
		s, now := set.Load(), time.Now()
		if w.free.Before(now) {
			w.free = now
		}
		if s.Rate > 0 {
			if w.free.Sub(now) > seconds(queue) {
				continue
			}
			w.free = w.free.Add(seconds(float64(8*n) / s.Rate))
		}
		if rand.Float64() < s.Loss {
			continue
		}
		select {
		case w.out <- packet{w.free.Add(seconds(s.Delay)), p}:
		default: // the queue of a link that is too fast
		}
	}
}

func deliver(tun *os.File, out <-chan packet) {
	for p := range out {
		time.Sleep(time.Until(p.due))
		if _, err := tun.Write(p.p); err != nil && !errors.Is(err, syscall.EINVAL) {
			panic(err)
		}
	}
}
