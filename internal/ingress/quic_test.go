package ingress

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/netx/memnet"
)

// udpDialer is a FlowUpstream whose flows are sockets of a host.
type udpDialer struct {
	net netx.Net
	wg  sync.WaitGroup

	mu    sync.Mutex
	from  []Origin
	to    []string
	alive int
}

type udpFlow struct {
	up   *udpDialer
	conn net.Conn
	once sync.Once
}

func (u *udpDialer) OpenFlow(ctx context.Context, r *Route, t webgw.Target, from Origin, deliver func([]byte)) (Flow, error) {
	c, err := u.net.Dial(ctx, "udp", t.Address, nil)
	if err != nil {
		return nil, &webgw.Error{Kind: webgw.Unavailable, Public: "dial", Err: err}
	}
	u.mu.Lock()
	u.from, u.to, u.alive = append(u.from, from), append(u.to, t.Address), u.alive+1
	u.mu.Unlock()
	u.wg.Go(func() {
		b := make([]byte, 2048)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			deliver(b[:n])
		}
	})
	return &udpFlow{up: u, conn: c}, nil
}

func (f *udpFlow) Send(p []byte) { f.conn.Write(p) }

func (f *udpFlow) Close() error {
	f.once.Do(func() {
		f.up.mu.Lock()
		f.up.alive--
		f.up.mu.Unlock()
	})
	return f.conn.Close()
}

func (u *udpDialer) seen() (from []Origin, to []string, alive int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.from, u.to, u.alive
}

// vault is a workload that holds its own key and speaks HTTP/3.
type vault struct {
	*quic.Transport
	cert *tls.Certificate
	seen map[string]bool // addresses that requests came from
	mu   sync.Mutex
}

// newVault starts one at port 443 of a host; it says its name.
func newVault(t *testing.T, h *memnet.Host, say string, change func(*quic.Transport)) *vault {
	t.Helper()
	c, err := h.ListenPacket(t.Context(), "udp", ":443")
	if err != nil {
		t.Fatal(err)
	}
	v := &vault{Transport: &quic.Transport{Conn: quiet{c}}, cert: certificate(t), seen: map[string]bool{}}
	if change != nil {
		change(v.Transport)
	}
	config := &tls.Config{Certificates: []tls.Certificate{*v.cert}}
	ln, err := v.ListenEarly(http3.ConfigureTLSConfig(config), &quic.Config{MaxIdleTimeout: 10 * time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	s := &http3.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		v.mu.Lock()
		v.seen[r.RemoteAddr] = true
		v.mu.Unlock()
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(rw, "%s%s", say, b)
	})}
	var wg sync.WaitGroup
	wg.Go(func() { s.ServeListener(ln) })
	t.Cleanup(func() { s.Close(); ln.Close(); v.Close(); c.Close(); wg.Wait() })
	return v
}

func passing(name string, targets ...string) Declared {
	d := expose(name, webgw.TLS, []string{name + ".example"}, targets...)
	d.Exposure.QUIC = true
	return d
}

// passBubble is a server that passes QUIC on to vaults on two hosts.
func passBubble(t *testing.T, limits Limits, change func(*quic.Transport), f func(t *testing.T, w *world, m *memnet.World, up *udpDialer, vaults [2]*vault)) {
	up := &udpDialer{}
	quicBubble(t, limits, func(s *Server) {
		up.net = s.Net
		s.Flows = up
	}, func(t *testing.T, w *world, m *memnet.World) {
		one, two := newVault(t, hostAt(m, "192.0.2.1"), "one", change), newVault(t, hostAt(m, "192.0.2.2"), "two", change)
		w.roots.AddCert(one.cert.Leaf)
		w.roots.AddCert(two.cert.Leaf)
		memSite(t, w.Net.(*memnet.Host), func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "here") })
		w.use(passing("one", "192.0.2.1:443"), passing("two", "192.0.2.2:443"), web1("here", "gateway:8080"),
			expose("tcponly", webgw.TLS, []string{"tcponly.example"}, "192.0.2.1:443"))
		f(t, w, m, up, [2]*vault{one, two})
		w.Shutdown(t.Context())
		up.wg.Wait()
		if _, _, alive := up.seen(); alive != 0 {
			t.Errorf("%d flows are left open", alive)
		}
		if w.flowDoors.all != 0 || len(w.flowDoors.by) != 0 {
			t.Errorf("%d flows are left on the books", w.flowDoors.all)
		}
		if q := w.quic; len(q.flows)+len(q.lanes)+len(q.routes) != 0 || q.sizes != [maxConnID + 1]int{} {
			t.Errorf("%d addresses, %d flows, %d ids are left, %v", len(q.flows), len(q.lanes), len(q.routes), q.sizes)
		}
	})
}

func TestQUICPassthrough(t *testing.T) {
	for name, change := range map[string]func(*quic.Transport){
		"plain":       nil,
		"with retry":  func(tr *quic.Transport) { tr.VerifySourceAddress = func(net.Addr) bool { return true } },
		"long ids":    func(tr *quic.Transport) { tr.ConnectionIDLength = 20 },
		"shorter ids": func(tr *quic.Transport) { tr.ConnectionIDLength = 5 },
	} {
		t.Run(name, func(t *testing.T) {
			passBubble(t, Limits{}, change, func(t *testing.T, w *world, m *memnet.World, up *udpDialer, vaults [2]*vault) {
				// One socket, three connections: names and workloads are told apart.
				tr := w.socket(hostAt(m, "203.0.113.1"))
				c := &http.Client{Transport: w.transport3(tr)}
				for range 3 {
					for _, name := range []string{"one", "two", "here"} {
						if _, body, _ := get(t, c, "https://"+name+".example/"); body != name {
							t.Errorf("%s: %q", name, body)
						}
					}
				}
				from, to, _ := up.seen()
				if len(from) != 2 || from[0].Host != "one.example" || from[0].Protocol != webgw.TLS || from[0].Visitor.Addr() != netip.MustParseAddr("203.0.113.1") ||
					from[0].Local != netip.AddrPortFrom(gwAddrs[0], 443) || to[1] != "192.0.2.2:443" {
					t.Errorf("%+v to %v", from, to)
				}
				if res, err := c.Get("https://tcponly.example/"); err == nil {
					t.Errorf("not for QUIC: %v", res.Status)
				}
			})
		})
	}
}

func TestQUICPassthroughV2(t *testing.T) {
	passBubble(t, Limits{}, nil, func(t *testing.T, w *world, m *memnet.World, up *udpDialer, vaults [2]*vault) {
		t3 := w.transport3(w.socket(hostAt(m, "203.0.113.1")))
		t3.QUICConfig = &quic.Config{Versions: []quic.Version{quic.Version2}}
		c := &http.Client{Transport: t3}
		for _, name := range []string{"one", "here"} {
			if _, body, _ := get(t, c, "https://"+name+".example/"); body != name {
				t.Errorf("%s: %q", name, body)
			}
		}
	})
}

// A visitor whose address changes is still led to the same workload, which sees
// another address: as long as some of the connection's ids are known.
func TestQUICPassthroughAfterRebinding(t *testing.T) {
	passBubble(t, Limits{}, func(tr *quic.Transport) { tr.ConnectionIDLength = 10 }, func(t *testing.T, w *world, m *memnet.World, up *udpDialer, vaults [2]*vault) {
		var nats []*rebound
		var clients []*http.Client
		for i, name := range []string{"one", "two"} {
			nat := &rebound{on: hostAt(m, fmt.Sprintf("203.0.113.%d", i+1))}
			nat.rebind(t)
			tr := &quic.Transport{Conn: nat}
			t3 := w.transport3(tr)
			t.Cleanup(func() { tr.Close(); nat.Close() })
			nats, clients = append(nats, nat), append(clients, &http.Client{Transport: t3})
			if _, body, _ := get(t, clients[i], "https://"+name+".example/"); body != name {
				t.Errorf("%s: %q", name, body)
			}
		}
		for range 3 {
			for i, name := range []string{"one", "two"} {
				nats[i].rebind(t)
				if _, body, _ := get(t, clients[i], "https://"+name+".example/"); body != name {
					t.Errorf("%s: %q", name, body)
				}
			}
		}
		for i, v := range vaults {
			v.mu.Lock()
			if len(v.seen) < 1 {
				t.Errorf("vault %d saw %v", i, v.seen)
			}
			v.mu.Unlock()
		}
		if _, to, _ := up.seen(); len(to) != 8 {
			t.Errorf("flows to %v", to)
		}
		// What leads nowhere any more ends, also for those who come from elsewhere.
		w.use(passing("two", "192.0.2.2:443"))
		nats[0].rebind(t)
		c := *clients[0]
		c.Timeout = 5 * time.Second
		if res, err := c.Get("https://one.example/"); err == nil {
			t.Errorf("withdrawn: %v", res.Status)
		}
		if _, body, _ := get(t, clients[1], "https://two.example/"); body != "two" {
			t.Errorf("the other: %q", body)
		}
	})
}

// Datagrams that nobody has asked for are held in bounded memory, and cost
// nobody else the connection.
func TestQUICFloods(t *testing.T) {
	passBubble(t, Limits{}, nil, func(t *testing.T, w *world, m *memnet.World, up *udpDialer, vaults [2]*vault) {
		visitor := w.socket(hostAt(m, "203.0.113.1"))
		c := &http.Client{Transport: w.transport3(visitor)}
		for _, name := range []string{"one", "here"} {
			get(t, c, "https://"+name+".example/")
		}
		flows := len(w.quic.all())
		q := w.quic
		half := helloMessage(t, "one.example")[:600]
		var dcid [8]byte
		shot := func(i int, frames []byte) {
			binary.BigEndian.PutUint64(dcid[:], uint64(i))
			from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 1)
			q.take(seal(t, quicV1, dcid[:], 0, frames, minInitial), from, gwAddrs[0])
		}
		for i := range maxFresh + 500 {
			shot(i, crypto(0, half)) // never whole
		}
		check := func() {
			t.Helper()
			q.mu.Lock()
			defer q.mu.Unlock()
			sum := 0
			for _, n := range q.fresh {
				sum += n.bytes
			}
			if len(q.fresh) > maxFresh || q.held > maxFreshBytes || sum != q.held || len(q.order) > 2*maxFresh {
				t.Errorf("%d fresh, %d bytes (%d), %d in order", len(q.fresh), q.held, sum, len(q.order))
			}
		}
		check()
		for i := range maxFreshBytes/maxQUICHello + 300 { // as large as it gets
			shot(i, crypto(maxQUICHello-600, half))
		}
		check()
		if n := len(q.all()); n != flows {
			t.Errorf("%d flows, were %d", n, flows)
		}
		// In the midst of it everybody is served.
		second := hostAt(m, "203.0.113.2")
		for _, name := range []string{"one", "here"} {
			get(t, c, "https://"+name+".example/")
			other := &http.Client{Transport: w.transport3(w.socket(second))}
			get(t, other, "https://"+name+".example/")
		}
		time.Sleep(2 * freshTime)
		q.mu.Lock()
		if len(q.fresh)+q.held+len(q.order) != 0 {
			t.Errorf("after a while: %d fresh, %d bytes, %d in order", len(q.fresh), q.held, len(q.order))
		}
		q.mu.Unlock()

		// Whole ones, of made-up addresses, for a name that ends here: they are
		// limited, and no address is held to account.
		flight := firstFlight(t, &tls.Config{ServerName: "here.example", NextProtos: []string{"h3"}}, quic.Version1)
		first, _ := parseLong(flight[0])
		r, err := newInitialReader(first)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range flight {
			r.feed(d)
		}
		for i := range 2*maxUnproven + 100 {
			binary.BigEndian.PutUint64(dcid[:], 1<<40+uint64(i))
			from := netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), uint16(i+1))
			q.take(sealFrom(t, first.scid, quicV1, dcid[:], 0, crypto(0, r.data[:900]), minInitial), from, gwAddrs[0])
			q.take(sealFrom(t, first.scid, quicV1, dcid[:], 1, crypto(900, r.data[900:]), minInitial), from, gwAddrs[0])
			if i%64 == 0 {
				synctest.Wait()
			}
		}
		synctest.Wait()
		if n := q.h3.unproven.Load(); n > 2*maxUnproven || n < maxUnproven/2 {
			t.Errorf("%d handshakes", n)
		}
		if n := w.doors.total.Load(); n > 3 {
			t.Errorf("%d connections are counted", n)
		}
		// Who proves their address gets in (Retry).
		late := &http.Client{Transport: w.transport3(w.socket(hostAt(m, "203.0.113.3")))}
		if _, body, _ := get(t, late, "https://here.example/"); body != "here" {
			t.Errorf("%q", body)
		}
		time.Sleep(time.Minute)
		if n := q.h3.unproven.Load(); n != 0 {
			t.Errorf("%d handshakes after a minute", n)
		}
	})
}

// A workload can't draw to itself what is meant for others.
func TestQUICIdsAreNotTakenOver(t *testing.T) {
	p := &quicPort{routes: map[connID]*lane{}, lanes: map[*visitFlow]*lane{}, flows: map[flowKey][]*visitFlow{}}
	ids, err := newOwnIDs()
	if err != nil {
		t.Fatal(err)
	}
	p.h3 = &h3Server{ids: ids}
	mine, other := &lane{target: &target{}}, &lane{target: &target{}}
	id := connIDOf([]byte("abcdefgh"))
	p.learnLocked(mine, id)
	p.learnLocked(other, id)
	own, _ := ids.GenerateConnectionID()
	p.learnLocked(other, connIDOf(own.Bytes()))
	for i := range 256 {
		p.learnLocked(other, connIDOf([]byte{byte(i)}))
	}
	if p.laneTo([]byte("abcdefgh and more")) != mine || p.laneTo(own.Bytes()) != nil || p.laneTo([]byte("zzzzzzzzzz")) != nil {
		t.Error("an id leads to the wrong connection")
	}
	for i := range 100 {
		p.learnLocked(other, connIDOf(fmt.Appendf(nil, "%08d", i)))
	}
	if len(other.ids) != maxLaneIDs || len(p.routes) != maxLaneIDs+1 || p.sizes[8] != maxLaneIDs+1 {
		t.Errorf("%d ids, %d routes, %v", len(other.ids), len(p.routes), p.sizes)
	}
}

func TestQUICVersionsAreNegotiated(t *testing.T) {
	passBubble(t, Limits{}, nil, func(t *testing.T, w *world, m *memnet.World, up *udpDialer, vaults [2]*vault) {
		c, err := hostAt(m, "203.0.113.1").Dial(t.Context(), "udp", "198.51.100.1:443", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		p := seal(t, quicV1, []byte("12345678"), 0, nil, minInitial)
		binary.BigEndian.PutUint32(p[1:], 0x1a2a3a4a)
		c.Write(p)
		c.SetReadDeadline(time.Now().Add(time.Second))
		b := make([]byte, 2048)
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		if h, ok := parseLong(b[:n]); !ok || h.version != 0 || string(h.dcid) != "\x09\x09\x09\x09" || string(h.scid) != "12345678" {
			t.Errorf("%x", b[:n])
		}
		// Too small, or nothing that is known: no answer.
		for _, p := range [][]byte{p[:1100], seal(t, quicV1, []byte("12345678"), 0, crypto(0, helloMessage(t, "here.example")[:500]), 800), {0x40, 1, 2, 3}, {0x80}, {0}, make([]byte, 1200)} {
			c.Write(p)
		}
		c.SetReadDeadline(time.Now().Add(3 * time.Second))
		if n, err := c.Read(b); err == nil {
			t.Errorf("an answer: %x", b[:n])
		}
	})
}
