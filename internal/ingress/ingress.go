// Package ingress is the public end of a gateway, the data corridor:
//
//	accept → sniff → route → admit → forward (bytes, or HTTP)
//
// It takes visitors' connections on the HTTP and TLS ports and on TCP ports,
// finds in an immutable table where they lead, and opens a stream there
// through an Upstream. TLS for passthrough names and TCP is joined as it is,
// on the raw socket; HTTP is made unambiguous first, and proxied.
//
// It must not know what a stream is made of, where routes come from, nor how
// certificates are got; and it must not wait for anybody but the visitor and
// the workload.
package ingress

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// Upstream opens streams to workloads: through a node's session, or direct.
type Upstream interface {
	// Open begins a stream to one target of a route, already moved to the port
	// that the visitor asked for. It returns as soon as
	// there is something to write to; that the other side refuses may show only
	// later, as a *webgw.Error of Read or Join. An error that isn't the
	// target's fault alone is a *webgw.Error too.
	Open(ctx context.Context, r *Route, t webgw.Target, from Origin) (Stream, error)
}

// Origin tells on whose behalf a stream is opened. For HTTP it is the visitor
// who caused it; the stream is used for others afterwards.
type Origin struct {
	Visitor  netip.AddrPort
	Local    netip.AddrPort // where the visitor connected to
	Host     string         // host or server name, "" for tcp
	Protocol webgw.ExposureProtocol
	Above    uint16 // how far the port lies above the exposure's first
	Prompt   bool   // Accepted is going to be called: the answer is wanted at once
}

// Stream is a connection to a workload. As a net.Conn it carries HTTP.
//
// If it also has Accepted() error, that waits until the workload is connected
// or returns the refusal.
type Stream interface {
	netx.CloseWriter

	// Join relays visitor and stream until both directions have ended, and
	// closes the stream; it may return before. head was read from the visitor
	// already and goes first. When all is over, done is called: in counts bytes to
	// the workload, out those to the visitor. A refusal is a *webgw.Error and
	// leaves the visitor open; after any other error the visitor has been reset.
	Join(visitor net.Conn, head []byte, done func(in, out int64, err error))

	// Cut ends a joined stream at once, with an error.
	Cut()

	// Progress returns how many bytes have passed to the workload and to the
	// visitor so far, while it is joined.
	Progress() (in, out int64)
}

// Certificates gives the certificates for names that are terminated here.
type Certificates interface {
	GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error)
}

// Handler takes over a connection of the TLS port whose ClientHello (in head,
// read already) offers its application protocol. It closes the connection.
type Handler func(ctx context.Context, c net.Conn, head []byte)

// Server is the public end of one gateway. Set the fields, then SetTable, then
// Run.
type Server struct {
	HTTPAddr string // of the HTTP port, host:port; "": none
	TLSAddr  string // of the TLS port; "": none
	BindHost string // where TCP ports are opened; "": on all addresses
	QUIC     bool   // UDP is taken at the TLS port's address, too: HTTP/3, and QUIC for workloads
	Name     string // of the gateway, for error pages and Via; "": "webgw"

	Net          netx.Net           // nil: the machine's own
	Upstream     Upstream           // required
	Flows        FlowUpstream       // nil: exposures of UDP ports are not served
	Certificates Certificates       // nil: TLS is not terminated, such names get an alert
	Handlers     map[string]Handler // by ALPN name; such connections don't count against the limits
	Limits       Limits
	Countries    *Countries // nil: exposures by countries let nobody in

	// DialIssuer connects to the issuers of tokens that policies name: owners
	// choose where it leads, so that it must judge addresses. nil: policies that
	// need it let nobody in.
	DialIssuer  func(ctx context.Context, network, address string) (net.Conn, error)
	IssuerRoots *x509.CertPool // authorities for their certificates; nil: the system's

	// OpenSecret reads a secret in a record of that owner. nil: policies that hold
	// one let nobody in by it.
	OpenSecret func(owner webgw.ID, s webgw.Sealed) ([]byte, error)

	// TrustedProxies are the balancers whose PROXY headers are believed; from
	// anywhere else such a header is data like any other. A connection from one
	// of them must begin with the header or with the visitor's own bytes: one
	// that stays silent ends after Limits.Hello.
	TrustedProxies []netip.Prefix

	PublicTLSPort uint16 // the TLS port as visitors see it, for redirects; 0: 443

	// What visitors get who ask by HTTP for a name that nobody has exposed, over
	// TLS only if there is a certificate for it: what the exposure of DefaultHost
	// has for them, or a redirect to the URL DefaultRedirect. Both "": a page
	// that says so.
	DefaultHost     string
	DefaultRedirect string

	Log       *slog.Logger          // nil: discards
	AccessLog func(Access)          // told of each request and stream when it ends, must not wait; may be nil
	Metrics   prometheus.Registerer // nil: counted but not registered

	table       atomic.Pointer[Table]
	doors       doors
	flowDoors   flowDoors
	buckets     buckets      // of policies' rates
	issuers     issuers      // of policies' tokens
	hashing     hashing      // of policies' passwords
	compressing atomic.Int64 // answers under way
	quic        *quicPort    // nil: none
	altSvc      string       // tells visitors of HTTP/3; "": there is none

	once    sync.Once
	limits  Limits // with defaults
	log     *slog.Logger
	metrics *metrics
	web     *web

	mu        sync.Mutex
	bound     bool
	fixed     []*listener          // the HTTP and TLS ports
	ports     map[uint16]*listener // TCP ports
	failed    map[uint16]bool      // those that could not be opened
	udp       map[uint16]*udpPort
	failedUDP map[uint16]bool
	ctx       context.Context // of all connections, ends when they are cut
	cut       context.CancelFunc
	stopping  bool
	stopped   chan struct{}  // closed when a shutdown is through
	listeners sync.WaitGroup // accept loops
	visits    sync.WaitGroup // connections; only accept loops add to it
}

// Limits bound what strangers can make the gateway hold. 0 means the default.
type Limits struct {
	Connections int // open at once; 20,000
	PerAddress  int // of them, per IPv4 address or IPv6 /64; 1,000
	PerOwner    int // streams, flows and requests at once per owner, and connections whose TLS ends here; 10,000, or half of Connections if that is more
	PerExposure int // of them, per exposure; PerOwner

	OwnerBandwidth    int64 // bytes a second of one owner's exposures, in each direction; no limit
	ExposureBandwidth int64 // of one exposure; no limit

	Flows           int           // of datagrams, at once; 50,000
	FlowsPerAddress int           // of them, per IPv4 address or IPv6 /64; 1,000
	FlowIdle        time.Duration // without a datagram; 60 s, a quarter of it until the visitor has sent again after an answer

	Hello  time.Duration // from accept to the end of the TLS handshake, or of a request's head; 10 s
	Open   time.Duration // for one target to open; 5 s
	Idle   time.Duration // of a keep-alive connection between requests; 120 s
	Stall  time.Duration // without one byte of a body passing to or from a visitor; 120 s
	Answer time.Duration // until a workload begins its HTTP response; 10 min
	Drain  time.Duration // for open streams and requests, when Run's context ends; 0: none
}

func (l Limits) withDefaults() Limits {
	number := func(n *int, d int) {
		if *n == 0 {
			*n = d
		}
	}
	duration := func(t *time.Duration, d time.Duration) {
		if *t == 0 {
			*t = d
		}
	}
	number(&l.Connections, 20_000)
	number(&l.PerAddress, 1_000)
	number(&l.PerOwner, max(10_000, l.Connections/2))
	number(&l.PerExposure, l.PerOwner)
	number(&l.Flows, 50_000)
	number(&l.FlowsPerAddress, 1_000)
	duration(&l.FlowIdle, time.Minute)
	duration(&l.Hello, 10*time.Second)
	duration(&l.Open, 5*time.Second)
	duration(&l.Idle, 120*time.Second)
	duration(&l.Stall, 120*time.Second)
	duration(&l.Answer, 10*time.Minute)
	return l
}

// setup fills in what the zero values stand for.
func (s *Server) setup() {
	s.once.Do(func() {
		if s.Net == nil {
			s.Net = netx.Host{}
		}
		if s.Name == "" {
			s.Name = "webgw"
		}
		s.log = s.Log
		if s.log == nil {
			s.log = slog.New(slog.DiscardHandler)
		}
		s.limits = s.Limits.withDefaults()
		s.ports = map[uint16]*listener{}
		s.failed, s.failedUDP = map[uint16]bool{}, map[uint16]bool{}
		s.udp = map[uint16]*udpPort{}
		s.ctx, s.cut = context.WithCancel(context.Background())
		s.stopped = make(chan struct{})
		s.metrics = newMetrics(s.Metrics, s)
		s.web = newWeb(s)
		s.hashing = newHashing()
		s.issuers.init(s)
	})
}

// SetTable replaces the routing table at once. Connections and requests that
// have begun keep the route they began with. A table belongs to one server.
func (s *Server) SetTable(t *Table) {
	s.setup()
	s.mu.Lock()
	old := s.table.Load()
	if t == old {
		s.mu.Unlock()
		return
	}
	retired := t.adopt(old)
	s.table.Store(t)
	if s.bound && !s.stopping {
		s.syncPortsLocked()
	}
	s.mu.Unlock()
	for _, target := range retired {
		target.closeIdle()
	}
}

// Table returns the table in use, or nil.
func (s *Server) Table() *Table { return s.table.Load() }

// Run opens the ports (unless Listen has) and serves until ctx ends or
// Shutdown is called. When ctx ends, what is open may finish within
// Limits.Drain.
func (s *Server) Run(ctx context.Context) error {
	if err := s.Listen(ctx); err != nil {
		return err
	}
	retry := time.NewTicker(portRetry)
	defer retry.Stop()
	for {
		select {
		case <-s.stopped:
			return nil
		case <-retry.C:
			s.mu.Lock()
			if !s.stopping && len(s.failed)+len(s.failedUDP) > 0 {
				s.syncPortsLocked()
			}
			s.mu.Unlock()
		case <-ctx.Done():
			drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.limits.Drain)
			defer cancel()
			s.Shutdown(drain)
			return nil
		}
	}
}

// Shutdown stops taking in connections and requests, and waits for those that
// are open. When ctx ends first, it cuts them. It returns when all are gone.
func (s *Server) Shutdown(ctx context.Context) {
	s.setup()
	s.mu.Lock()
	again := s.stopping
	s.stopping = true
	if !again {
		if s.quic != nil {
			s.quic.drain(s.ctx)
		}
		for _, l := range s.fixed {
			l.Close()
		}
		for port := range s.ports {
			s.closePortLocked(port)
		}
		for port := range s.udp {
			s.closeUDPLocked(port)
		}
	}
	s.mu.Unlock()
	if again {
		select {
		case <-s.stopped:
		case <-ctx.Done():
			s.cutAll()
			<-s.stopped
		}
		return
	}
	s.listeners.Wait()
	stop := context.AfterFunc(ctx, s.cutAll)
	s.web.drain()
	s.visits.Wait()
	stop()
	s.cut()
	if s.quic != nil {
		s.quic.end()
	}
	s.web.close()
	s.issuers.running.Wait()
	if t := s.table.Load(); t != nil {
		for _, r := range t.routes {
			for _, target := range r.targets {
				target.closeIdle()
			}
		}
	}
	close(s.stopped)
}

// cutAll ends everything at once.
func (s *Server) cutAll() {
	s.cut()
	s.web.cut()
	s.doors.each((*visit).cut)
}

var _ http.Handler = (*web)(nil)
