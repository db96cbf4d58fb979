//go:build linux

package main

import (
	"fmt"
	"math"
	"strings"
)

// measure is one thing that is measured of every system.
type measure struct {
	service string
	op      op
	n       int // streams, or bytes of a datagram
}

func (m measure) name() string { return fmt.Sprintf("%s/%s/%d", m.service, m.op, m.n) }

// where is how a measure is taken.
type where int

const (
	here  where = iota // in turn with other systems, on loopback
	far                // the same, with an emulated link between the two hops
	alone              // of each system in fresh processes
	parts              // by the benchmarks of Go
)

func (m measure) where() where {
	switch m.op {
	case opFirst, opLossy:
		return far
	case opIdle:
		return alone
	case opPart:
		return parts
	}
	return here
}

// measures lists all, in the order of the table.
func measures() (out []measure) {
	for _, s := range []string{passthrough, sealedTCP} {
		out = append(out, measure{s, opDown, 1}, measure{s, opDown, 8}, measure{s, opDown, 64}, measure{s, opUp, 1})
	}
	for _, s := range []string{plainHTTP, secureHTTP} {
		out = append(out, measure{s, opDown, 1}, measure{s, opDown, 8})
	}
	for _, s := range []string{passthrough, sealedTCP, plainHTTP, secureHTTP} {
		if s == passthrough || s == sealedTCP {
			out = append(out, measure{s, opKept, 1})
		}
		out = append(out, measure{s, opKept, 4}, measure{s, opKept, 50}, measure{s, opNew, 50})
	}
	out = append(out, measure{http2, opH2, 100},
		measure{passthrough, opBeside, 8}, measure{sealedTCP, opBeside, 8},
		measure{sealedTCP, opFair, 8}, measure{plainHTTP, opFair, 8},
		measure{udp, opEcho, 200}, measure{udp, opEcho, 1200})
	for _, s := range []string{passthrough, sealedTCP, secureHTTP} {
		out = append(out, measure{s, opFirst, 1})
	}
	out = append(out, measure{passthrough, opLossy, 1}, measure{sealedTCP, opLossy, 1})
	for _, s := range []string{passthrough, sealedTCP, plainHTTP} {
		out = append(out, measure{s, opIdle, 1000})
	}
	for _, p := range partNames {
		out = append(out, measure{p, opPart, 1})
	}
	return out
}

// isFor leaves out what would cost time and tell nothing new.
func (m measure) isFor(system string) bool {
	bulk := m.op == opDown || m.op == opUp
	switch system {
	case nameLarge:
		return bulk && (m.service == passthrough || m.service == sealedTCP)
	case nameTunnel:
		return bulk || m.op == opKept && m.n == 50 || m.op == opNew
	case nameOnce:
		return m.op == opH2 || m.op == opKept && m.n == 50
	case nameSplice:
		return m.where() != far
	}
	return true
}

// times are how long a measure warms up and takes, in seconds.
func (m measure) times(wanted float64) (warm, long float64) {
	switch m.op {
	case opFirst: // ten in a second
		return 1, max(2*wanted, 1)
	case opLossy: // until congestion control has found the link's rate
		return max(2, min(4*wanted, 5)), max(4*wanted, 2)
	}
	return max(0.5, wanted/4), wanted // until there are as many data connections as it takes
}

// blaster is the service whose streams use all there is, beside questions of
// another.
const blaster = passthrough

// row is one line of the table: a figure drawn from the results of a measure.
type row struct {
	measure
	title  string
	figure func(result) float64
	format string
	bars   []bar
}

// bar is what a figure is held to.
type bar struct {
	issue string  // that asks for it
	sign  string  // ≥ or ≤
	x     float64 // times the figure of by, or the figure itself
	by    string  // system, or ""
}

const (
	corridor = "corridor" // "The corridor"
	limit    = "limit"    // "The data plane at the limit"
)

func rowsOf(m measure) []row {
	title := func(format string, args ...any) string { return m.service + ", " + fmt.Sprintf(format, args...) }
	micros := func(f func(result) float64) func(result) float64 {
		return func(r result) float64 { return number(f(r)) * 1e6 }
	}
	p50 := micros(func(r result) float64 { return r.P50 })
	p99 := micros(func(r result) float64 { return r.P99 })
	switch m.op {
	case opDown, opUp:
		return bulkRows(m)
	case opKept:
		connections := "1 kept connection"
		if m.n > 1 {
			connections = fmt.Sprintf("%d kept connections", m.n)
		}
		if m.n < 50 {
			rows := []row{{m, title("%s, p50 µs", connections), p50, "%.0f", nil}, {m, title("%s, p99 µs", connections), p99, "%.0f", nil}}
			if m.service == passthrough {
				rows[0].bars = []bar{{limit, "≤", 1.1, nameHAProxy}}
			}
			return rows
		}
		rows := []row{{m, title("%s, requests/s", connections), rate, "%.0f", nil}}
		switch m.service {
		case passthrough, sealedTCP:
			rows[0].bars = []bar{{limit, "≥", 0.8, nameHAProxy}}
		case secureHTTP:
			rows[0].bars = []bar{{limit, "≥", 0.6, nameOnce}}
			rows = append(rows, row{m, title("%s, p99 µs", connections), p99, "%.0f", []bar{{limit, "≤", 2, nameOnce}}})
		}
		return rows
	case opNew:
		bars := []bar{{corridor, "≥", 0.6, nameHAProxy}}
		if m.service == passthrough || m.service == sealedTCP {
			bars = append(bars, bar{limit, "≥", 0.8, nameHAProxy})
		}
		return []row{{m, title("a new connection each, requests/s"), rate, "%.0f", bars}}
	case opH2:
		return []row{{m, title("%d streams of one connection, requests/s", m.n), rate, "%.0f",
			[]bar{{limit, "≥", 0.6, nameOnce}, {limit, "≥", 0.6, nameHAProxy}}}}
	case opBeside:
		return []row{
			{m, title("1 kept connection beside %d streams down, p50 µs", m.n), p50, "%.0f", nil},
			{m, title("1 kept connection beside %d streams down, p99 µs", m.n), p99, "%.0f", []bar{{limit, "≤", 1.5, nameHAProxy}}},
		}
	case opFair:
		return []row{{m, title("p99 beside %d streams of %s, times that alone", m.n, blaster),
			func(r result) float64 { return number(r.P99) / r.Alone }, "%.2f", []bar{{limit, "≤", 2, ""}}}}
	case opEcho:
		return []row{
			{m, title("%d B there and back, per second", m.n), rate, "%.0f", []bar{{limit, "≥", 0.7, nameSplice}}},
			{m, title("%d B at half that rate, lost %%", m.n), func(r result) float64 { return 100 * float64(r.Lost) / float64(r.Sent) }, "%.3f", []bar{{limit, "≤", 0, ""}}},
		}
	case opFirst:
		return []row{{m, title("first byte of a new connection, %.0f ms there and back, ms", 2e3*link.Delay),
			func(r result) float64 { return number(r.P50) * 1e3 }, "%.0f", []bar{{limit, "≤", 2e3 * link.Delay * 1.1, ""}}}}
	case opLossy:
		return []row{{m, title("1 stream down, %.0f %% lost, %.0f ms there and back, %% of %.0f Mbit/s", 100*lossyLink.Loss, 2e3*lossyLink.Delay, lossyLink.Rate/1e6),
			func(r result) float64 { return 100 * float64(r.Bytes) * 8 / r.Seconds / lossyLink.Rate }, "%.0f", []bar{{limit, "≥", 85, ""}}}}
	case opIdle:
		return idleRows(m)
	case opPart:
		unit, times := "ms", 1e3
		if strings.HasPrefix(m.service, "Route") {
			unit, times = "ns", 1e9
		}
		return []row{{m, m.service + ", " + unit, func(r result) float64 { return r.P50 * times }, "%.3g", nil}}
	}
	return nil
}

func bulkRows(m measure) []row {
	many := fmt.Sprintf("%s, %d streams %s", m.service, m.n, m.op)
	if m.n == 1 {
		many = fmt.Sprintf("%s, 1 stream %s", m.service, m.op)
	}
	var bars []bar
	switch m.service {
	case passthrough:
		bars = append(bars, bar{corridor, "≥", 1.3, nameHAProxy})
		if m.op == opDown {
			bars = append(bars, bar{limit, "≥", map[int]float64{1: 1.6, 8: 1.6, 64: 1.5}[m.n], nameHAProxy})
		}
		bars = append(bars, bar{limit, "≥", 0.9, nameLarge}, bar{limit, "≥", 0.95, nameSplice})
	case sealedTCP:
		bars = append(bars, bar{corridor, "≥", 0.7, nameHAProxy})
		if m.op == opDown && m.n == 8 {
			bars = append(bars, bar{limit, "≥", 0.9, nameHAProxy})
		}
	}
	rows := []row{{m, many + ", Gbit/s", func(r result) float64 { return float64(r.Bytes) * 8 / r.Seconds / 1e9 }, "%.2f", bars}}
	if m.n != 8 {
		return rows
	}
	cost := func(r result, hop int) float64 {
		if hop >= len(r.CPU) {
			return math.NaN()
		}
		return r.CPU[hop] / (float64(r.Bytes) / 1e9)
	}
	for i, h := range hopNames {
		rows = append(rows, row{m, many + ", CPU s/GB, " + h, func(r result) float64 { return cost(r, i) }, "%.2f", nil})
	}
	both := row{m, many + ", CPU s/GB, both", func(r result) float64 { return cost(r, 0) + cost(r, 1) }, "%.2f", nil}
	if m.service == passthrough {
		both.bars = []bar{{limit, "≤", 0.65, nameHAProxy}}
	}
	return append(rows, both)
}

func idleRows(m measure) (rows []row) {
	for i, h := range hopNames {
		add := func(what, format string, f func(footprint) float64, bars ...bar) {
			rows = append(rows, row{m, fmt.Sprintf("%s, idle stream, %s, %s", m.service, h, what), func(r result) float64 {
				if i >= len(r.Idle) {
					return math.NaN()
				}
				return f(r.Idle[i])
			}, format, bars})
		}
		var memory, descriptors []bar
		switch m.service {
		case passthrough:
			memory = []bar{{corridor, "≤", 12, ""}, {limit, "≤", 8, ""}}
		case sealedTCP:
			memory = []bar{{corridor, "≤", 40, ""}, {limit, "≤", 24, ""}}
		}
		if memory != nil {
			descriptors = []bar{{limit, "≤", 2, ""}}
		}
		add("KB", "%.1f", func(f footprint) float64 { return f.KB }, memory...)
		add("descriptors", "%.2f", func(f footprint) float64 { return math.Round(100*f.Descriptors) / 100 }, descriptors...)
		add("goroutines", "%.2f", func(f footprint) float64 { return number(f.Goroutines) })
	}
	return rows
}

func rate(r result) float64 { return float64(r.Count) / r.Seconds }

// number is x, or NaN if there was nothing to measure.
func number(x float64) float64 {
	if x == 0 {
		return math.NaN()
	}
	return x
}
