package tunnel

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	opens                   *prometheus.CounterVec
	wait                    prometheus.Histogram
	refusals                *prometheus.CounterVec
	reconnects              prometheus.Counter
	eventsDropped           prometheus.Counter
	sent, received, dropped prometheus.Counter // datagrams
}

// gauge is one value read when metrics are collected.
type gauge struct {
	name, help string
	read       func() float64
}

// newMetrics makes the metrics of one end; role is a constant label.
func newMetrics(r prometheus.Registerer, role string, gauges func() []gauge) *metrics {
	labels := prometheus.Labels{"end": role}
	m := &metrics{
		opens: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "webgw_tunnel_opens_total", ConstLabels: labels,
			Help: "Streams asked for, by kind and result."}, []string{"kind", "result"}),
		wait: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "webgw_tunnel_open_wait_seconds", ConstLabels: labels,
			Help: "Time to get a ready data connection.", Buckets: prometheus.ExponentialBuckets(1e-5, 4, 10)}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "webgw_tunnel_refused_total", ConstLabels: labels,
			Help: "Connections of would-be nodes refused, by reason."}, []string{"reason"}),
		reconnects: prometheus.NewCounter(prometheus.CounterOpts{Name: "webgw_tunnel_connects_total", ConstLabels: labels,
			Help: "Sessions begun."}),
		eventsDropped: prometheus.NewCounter(prometheus.CounterOpts{Name: "webgw_tunnel_events_dropped_total", ConstLabels: labels,
			Help: "Events dropped because the receiver was slow."}),
	}
	datagrams := func(what, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "webgw_tunnel_datagrams_" + what + "_total", ConstLabels: labels, Help: help})
	}
	m.sent = datagrams("sent", "Datagrams of flows passed to the other end of the tunnel.")
	m.received = datagrams("received", "Datagrams of flows that came from the other end of the tunnel.")
	m.dropped = datagrams("dropped", "Datagrams of flows dropped for lack of room, or because they are too large.")
	if r != nil {
		r.MustRegister(m.opens, m.wait, m.refusals, m.reconnects, m.eventsDropped, m.sent, m.received, m.dropped)
		for _, g := range gauges() {
			r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: g.name, Help: g.help, ConstLabels: labels}, g.read))
		}
	}
	return m
}

func (m *metrics) opened(k Kind, result string, start time.Time) {
	m.opens.WithLabelValues(k.String(), result).Inc()
	if result == "ok" {
		m.wait.Observe(time.Since(start).Seconds())
	}
}

func (m *metrics) refused(reason string) { m.refusals.WithLabelValues(reason).Inc() }

func (s *Server) gauges() []gauge {
	count := func(f func(Session) int) func() float64 {
		return func() (n float64) {
			for _, sess := range s.Sessions() {
				n += float64(f(sess))
			}
			return n
		}
	}
	return []gauge{
		{"webgw_tunnel_sessions", "Live sessions.", count(func(Session) int { return 1 })},
		{"webgw_tunnel_streams", "Open streams.", count(func(x Session) int { return x.Streams })},
		{"webgw_tunnel_flows", "Open flows of datagrams.", count(func(x Session) int { return x.Flows })},
		{"webgw_tunnel_idle_connections", "Ready data connections.", count(func(x Session) int { return x.Idle })},
	}
}
