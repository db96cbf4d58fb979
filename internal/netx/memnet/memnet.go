// Package memnet is a network in memory: hosts with addresses and names,
// buffered TCP-like connections and unix sockets between them, and links that
// can be slow, lossy, cut or reset while a test runs. Every wait in it is
// durable for testing/synctest, so that worlds run on fake time; it has no
// goroutines, only timers for what is in flight.
//
// It must not know what is spoken over a connection, nor who listens.
package memnet

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// World is a set of hosts that can all reach each other, unless a host is
// behind NAT, is killed, or the link between two of them is cut.
//
// Locks are taken in this order: World, then wire.
type World struct {
	seed uint64

	mu    sync.Mutex
	hosts []*Host
	names map[string][]netip.Addr // extra names, see Name
	links map[[2]*Host]*link
	ports map[netip.Addr]uint16 // last port given out per address
	wires uint64                // how many there ever were
}

// New returns an empty world. Whatever is left to chance (loss) follows seed.
func New(seed uint64) *World {
	return &World{
		seed:  seed,
		names: map[string][]netip.Addr{},
		links: map[[2]*Host]*link{},
		ports: map[netip.Addr]uint16{},
	}
}

// Host adds a host, whose name resolves to its addresses in the given order.
// With no addresses it gets one of IPv4 (198.18.0.0/15) and one of IPv6
// (2001:db8::/32). It panics when the name exists.
func (w *World) Host(name string, addrs ...netip.Addr) *Host {
	w.mu.Lock()
	defer w.mu.Unlock()
	if slices.ContainsFunc(w.hosts, func(h *Host) bool { return h.name == name }) {
		panic("memnet: two hosts named " + name)
	}
	if len(addrs) == 0 {
		n := len(w.hosts) + 1
		addrs = []netip.Addr{
			netip.AddrFrom4([4]byte{198, 18, byte(n >> 8), byte(n)}),
			netip.AddrFrom16([16]byte{0: 0x20, 1: 0x01, 2: 0x0d, 3: 0xb8, 14: byte(n >> 8), 15: byte(n)}),
		}
	}
	h := &Host{w: w, name: name, addrs: slices.Clone(addrs), listeners: map[*listener]struct{}{}, packets: map[*PacketConn]struct{}{}}
	w.hosts = append(w.hosts, h)
	return h
}

// Name makes a further name resolve to addrs, on every host; none removes it.
func (w *World) Name(name string, addrs ...netip.Addr) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.names[foldName(name)] = slices.Clone(addrs)
}

func foldName(s string) string { return strings.ToLower(strings.TrimSuffix(s, ".")) }

// Link is how the link between two hosts behaves. The zero Link is perfect.
type Link struct {
	Latency time.Duration // one way; a dial takes two of them
	Loss    float64       // chance, from 0 to below 1, that a write is held up by a retransmission; that a datagram is lost
}

// rto is the least time that a lost segment costs (Linux's TCP_RTO_MIN).
const rto = 200 * time.Millisecond

// delay is how long one write takes to arrive.
func (l Link) delay(r *rand.Rand) time.Duration {
	d := l.Latency
	for wait := rto + 2*l.Latency; l.Loss > 0 && r.Float64() < l.Loss && wait < time.Minute; wait *= 2 {
		d += wait
	}
	return d
}

// link is the state between two hosts, or of one host with itself.
type link struct {
	props atomic.Pointer[Link]

	// Under World.mu.
	cut     bool
	changed chan struct{} // closed and replaced when cut changes
	wires   map[*wire]struct{}
}

func (w *World) linkLocked(a, b *Host) *link {
	if a.name > b.name {
		a, b = b, a
	}
	l := w.links[[2]*Host{a, b}]
	if l == nil {
		l = &link{changed: make(chan struct{}), wires: map[*wire]struct{}{}}
		l.props.Store(&Link{})
		w.links[[2]*Host{a, b}] = l
	}
	return l
}

// SetLink sets how the link between a and b behaves, in both directions. What
// is in flight already arrives as it would have.
func (w *World) SetLink(a, b *Host, l Link) {
	if l.Latency < 0 || l.Loss < 0 || l.Loss >= 1 {
		panic(fmt.Sprintf("memnet: impossible link %+v", l))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.linkLocked(a, b).props.Store(&l)
}

// Cut makes the link between a and b swallow everything without telling
// anybody: writes fill their buffers, reads and dials hang. What had arrived
// stays readable.
func (w *World) Cut(a, b *Host) { w.setCut(a, b, true) }

// Repair undoes Cut. What was swallowed is sent anew, as TCP does.
func (w *World) Repair(a, b *Host) { w.setCut(a, b, false) }

func (w *World) setCut(a, b *Host, cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.linkLocked(a, b)
	if l.cut == cut {
		return
	}
	l.cut = cut
	close(l.changed)
	l.changed = make(chan struct{})
	for wr := range l.wires {
		wr.setCut(cut)
	}
}

// Isolate cuts h off from every other host that exists; Rejoin repairs that.
func (w *World) Isolate(h *Host) { w.cutOthers(h, true) }

// Rejoin repairs every link between h and another host.
func (w *World) Rejoin(h *Host) { w.cutOthers(h, false) }

func (w *World) cutOthers(h *Host, cut bool) {
	w.mu.Lock()
	hosts := slices.Clone(w.hosts)
	w.mu.Unlock()
	for _, o := range hosts {
		if o != h {
			w.setCut(h, o, cut)
		}
	}
}

// Reset kills every connection between a and b at once: both ends read and
// write ECONNRESET.
func (w *World) Reset(a, b *Host) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for wr := range w.linkLocked(a, b).wires {
		wr.reset()
	}
}

// Kill ends a host as a crash of its processes does: its listeners are closed,
// its connections reset (the other ends learn it as soon as the link lets
// them), dials to it are refused, and it can neither dial nor listen.
func (w *World) Kill(h *Host) {
	w.mu.Lock()
	defer w.mu.Unlock()
	h.dead = true
	for l := range h.listeners {
		l.closeLocked()
	}
	for c := range h.packets {
		c.closeLocked()
	}
	for key, l := range w.links {
		if key[0] != h && key[1] != h {
			continue
		}
		for wr := range l.wires {
			wr.kill(h)
		}
	}
}

// Restart undoes Kill: the host can dial and listen again.
func (w *World) Restart(h *Host) {
	w.mu.Lock()
	defer w.mu.Unlock()
	h.dead = false
}

// Open lists the listeners and the ends of connections that nobody has closed
// yet, for tests that look for leaks.
func (w *World) Open() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for _, h := range w.hosts {
		for l := range h.listeners {
			out = append(out, fmt.Sprintf("%s listens on %s", h.name, l.addr))
		}
		for c := range h.packets {
			out = append(out, fmt.Sprintf("%s has a UDP socket at %s", h.name, c.at))
		}
	}
	for _, l := range w.links {
		for wr := range l.wires {
			out = append(out, wr.open()...)
		}
	}
	slices.Sort(out)
	return out
}

// portLocked gives out ephemeral ports of addr, from 32768 on.
func (w *World) portLocked(addr netip.Addr) uint16 {
	p := w.ports[addr] + 1
	if p < 32768 {
		p = 32768
	}
	w.ports[addr] = p
	return p
}

// atLocked returns the host that answers at addr from outside: the first that
// has it and is not behind NAT.
func (w *World) atLocked(addr netip.Addr) *Host {
	for _, h := range w.hosts {
		if len(h.nat) == 0 && slices.Contains(h.addrs, addr) {
			return h
		}
	}
	return nil
}
