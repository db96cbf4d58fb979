package ingress

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"webgw.dev/webgw"
)

// How a stream ended: values of a label.
const (
	resultOK        = "ok"
	resultBroken    = "broken"    // begun, and cut off by one side
	resultUnreached = "unreached" // no target could be had
)

type metrics struct {
	accepted         *prometheus.CounterVec
	acceptErrors     prometheus.Counter
	refusals         *prometheus.CounterVec
	panics           prometheus.Counter
	datagramsDropped prometheus.Counter
	streams          *prometheus.GaugeVec
	results          *prometheus.CounterVec
	bytes            *prometheus.CounterVec
	open             *prometheus.HistogramVec
	openErrors       *prometheus.CounterVec
	join             *prometheus.HistogramVec
	requests         *prometheus.CounterVec
	took             *prometheus.HistogramVec
	issuerFetches    *prometheus.CounterVec

	paced [2]pacedMetrics // in and out
	http  httpMetrics
}

// pacedMetrics tell what limits on bandwidth do in one direction.
type pacedMetrics struct{ waited, dropped prometheus.Counter }

// httpMetrics are the children that every request needs, looked up once.
type httpMetrics struct {
	active   prometheus.Gauge
	in, out  prometheus.Counter
	answered [4][len(statusClasses)]prometheus.Counter // by major version
	took     [4]prometheus.Observer
}

var statusClasses = [...]string{"none", "1xx", "2xx", "3xx", "4xx", "5xx"} // none: given up, mostly by the visitor

// statusClass is an index of statusClasses.
func statusClass(status int) int {
	if status < 100 || status > 599 {
		return 0
	}
	return status / 100
}

func (m *metrics) childrenOfHTTP() (h httpMetrics) {
	h.active = m.streams.WithLabelValues(string(webgw.HTTP))
	h.in, h.out = m.bytes.WithLabelValues(string(webgw.HTTP), "in"), m.bytes.WithLabelValues(string(webgw.HTTP), "out")
	for major := 1; major < len(h.took); major++ {
		version := "http/" + strconv.Itoa(major)
		h.took[major] = m.took.WithLabelValues(version)
		for i, class := range statusClasses {
			h.answered[major][i] = m.requests.WithLabelValues(version, class)
		}
	}
	return h
}

func newMetrics(r prometheus.Registerer, s *Server) *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "webgw_ingress_" + name, Help: help}, labels)
	}
	histogram := func(name, help string, first float64, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "webgw_ingress_" + name, Help: help,
			Buckets: prometheus.ExponentialBuckets(first, 4, 10)}, labels)
	}
	m := &metrics{
		accepted:         counter("accepted_total", "Connections accepted, by what the port speaks.", "port"),
		acceptErrors:     prometheus.NewCounter(prometheus.CounterOpts{Name: "webgw_ingress_accept_errors_total", Help: "Accepts that failed, as for lack of descriptors."}),
		refusals:         counter("refused_total", "Connections turned away before they were routed or by a limit, by reason.", "reason"),
		panics:           prometheus.NewCounter(prometheus.CounterOpts{Name: "webgw_ingress_panics_total", Help: "Connections and requests that ended by a bug."}),
		datagramsDropped: prometheus.NewCounter(prometheus.CounterOpts{Name: "webgw_ingress_datagrams_dropped_total", Help: "Datagrams dropped for lack of room or of a workload."}),
		streams:          prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "webgw_ingress_active", Help: "Streams and requests under way, by protocol."}, []string{"protocol"}),
		results:          counter("streams_total", "Streams that have ended, by protocol and result.", "protocol", "result"),
		bytes:            counter("bytes_total", "Bytes of payload carried; in: from visitors to workloads.", "protocol", "direction"),
		open:             histogram("open_seconds", "Time to open a stream to a target.", 5e-5, "protocol"),
		openErrors:       counter("open_errors_total", "Targets that could not be opened, by kind of error.", "kind"),
		join:             histogram("join_seconds", "How long streams lasted.", 1e-2, "protocol"),
		requests:         counter("requests_total", "HTTP requests answered, by version and class of status.", "version", "status"),
		took:             histogram("request_seconds", "How long HTTP requests took.", 1e-4, "version"),
	}
	m.issuerFetches = counter("issuer_fetches_total", "Times that token issuers were asked for their keys, by result.", "result")
	m.http = m.childrenOfHTTP()
	waited := counter("bandwidth_wait_seconds_total", "Time that bytes have waited for limits on bandwidth, of all streams and requests together.", "direction")
	dropped := counter("bandwidth_dropped_total", "Datagrams dropped by limits on bandwidth.", "direction")
	for i, direction := range [...]string{"in", "out"} {
		m.paced[i] = pacedMetrics{waited.WithLabelValues(direction), dropped.WithLabelValues(direction)}
	}
	if r != nil {
		r.MustRegister(m.accepted, m.acceptErrors, m.refusals, m.panics, m.datagramsDropped, m.streams, m.results, m.bytes, m.open, m.openErrors, m.join, m.requests, m.took, waited, dropped, m.issuerFetches,
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "webgw_ingress_connections", Help: "Open connections of visitors."},
				func() float64 { return float64(s.doors.total.Load()) }))
	}
	return m
}

func (m *metrics) refused(reason string) { m.refusals.WithLabelValues(reason).Inc() }

func (m *metrics) result(protocol, result string) { m.results.WithLabelValues(protocol, result).Inc() }

func (m *metrics) carried(protocol string, in, out int64) {
	m.bytes.WithLabelValues(protocol, "in").Add(float64(in))
	m.bytes.WithLabelValues(protocol, "out").Add(float64(out))
}
