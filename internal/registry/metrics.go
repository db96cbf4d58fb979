package registry

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	requests  *prometheus.CounterVec
	refusals  *prometheus.CounterVec
	writes    prometheus.Histogram
	conflicts prometheus.Counter
	damaged   prometheus.Counter
	resyncs   prometheus.Counter
	limited   *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer, s *Server) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "webgw_registry_requests_total",
			Help: "Requests answered, by route and HTTP status."}, []string{"route", "status"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "webgw_registry_refused_total",
			Help: "Requests refused, by kind of error."}, []string{"kind"}),
		writes: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "webgw_registry_write_seconds",
			Help: "Time from a record's arrival to its visibility here.", Buckets: prometheus.ExponentialBuckets(1e-3, 2, 14)}),
		conflicts: prometheus.NewCounter(prometheus.CounterOpts{Name: "webgw_registry_conflicts_total",
			Help: "Transactions tried again because something came in between."}),
		damaged: prometheus.NewCounter(prometheus.CounterOpts{Name: "webgw_registry_damaged_total",
			Help: "Stored values that could not be read or verified."}),
		resyncs: prometheus.NewCounter(prometheus.CounterOpts{Name: "webgw_registry_watch_overflows_total",
			Help: "Times that a slow watcher was brought up to date from state instead of change by change."}),
		limited: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "webgw_registry_limited_total",
			Help: "Requests refused by a limit of one identity, by limit: writes (their rate), lookups, watches, quota."}, []string{"limit"}),
	}
	if r != nil {
		r.MustRegister(m.limited, m.requests, m.refusals, m.writes, m.conflicts, m.damaged, m.resyncs,
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "webgw_registry_revision", Help: "Revision that the mirror has reached."}, func() float64 {
				rev, _, _, _ := s.mirror.at()
				return float64(rev)
			}),
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "webgw_registry_watchers", Help: "Watches open."}, func() float64 {
				return float64(s.watches.total())
			}))
	}
	return m
}
