package live

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	connected, live, rev, missing prometheus.Gauge
	taken, saveFailed             prometheus.Counter
	refused                       *prometheus.CounterVec
}

func (m *metrics) register(r prometheus.Registerer) {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: "webgw_live_" + name, Help: help})
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "webgw_live_" + name, Help: help})
	}
	m.connected = gauge("connected", "1 while the registry is followed.")
	m.live = gauge("records", "Live records in force.")
	m.rev = gauge("revision", "Revision of the registry that is applied.")
	m.missing = gauge("missing", "Live records that the registry's last full answer left out.")
	m.taken = counter("taken_total", "Record versions taken in.")
	m.saveFailed = counter("save_failures_total", "Snapshots that could not be written.")
	m.refused = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "webgw_live_refused_total",
		Help: "Records refused: unverified, rollback, conflict, early, full, damaged."}, []string{"reason"})
	if r != nil {
		r.MustRegister(m.connected, m.live, m.rev, m.missing, m.taken, m.saveFailed, m.refused)
	}
}
