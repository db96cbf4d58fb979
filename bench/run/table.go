//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"runtime"
	"slices"
	"strings"
)

// measure is one thing that is measured of every system.
type measure struct {
	service string
	op      op
	streams int
}

func (m measure) name() string { return fmt.Sprintf("%s/%s/%d", m.service, m.op, m.streams) }

// measures lists all, in the order of the table.
func measures() (out []measure) {
	services := []string{passthrough, sealedTCP, plainHTTP, secureHTTP}
	for _, s := range services {
		for _, n := range []int{1, 8, 64} {
			out = append(out, measure{s, opDown, n})
		}
		if s != secureHTTP {
			out = append(out, measure{s, opUp, 1})
		}
	}
	for _, s := range services {
		out = append(out, measure{s, opKept, 50}, measure{s, opKept, 4}, measure{s, opNew, 50})
	}
	for _, s := range services[:3] {
		out = append(out, measure{s, opIdle, 1000})
	}
	return out
}

// row is one line of the table: a figure drawn from the results of a measure.
type row struct {
	measure
	title  string
	figure func(result) float64
	format string

	times float64 // bar: ours at least so many times HAProxy's; 0: none
	most  float64 // bar: ours at most this; 0: none
}

func rowsOf(m measure) []row {
	s := fmt.Sprintf
	many := s("%d streams", m.streams)
	if m.streams == 1 {
		many = "1 stream"
	}
	hop := func(i int, f func(footprint) float64) func(result) float64 {
		return func(r result) float64 {
			if i >= len(r.Idle) {
				return math.NaN()
			}
			return f(r.Idle[i])
		}
	}
	switch m.op {
	case opDown, opUp:
		bar := map[string]float64{passthrough: 1.3, sealedTCP: 0.7}[m.service]
		rows := []row{{m, s("%s, %s %s, Gbit/s", m.service, many, m.op), func(r result) float64 { return float64(r.Bytes) * 8 / r.Seconds / 1e9 }, "%.2f", bar, 0}}
		if m.streams == 8 {
			for i, h := range hopNames {
				rows = append(rows, row{m, s("%s, %s %s, CPU s/GB, %s", m.service, many, m.op, h), func(r result) float64 { return r.CPU[i] / (float64(r.Bytes) / 1e9) }, "%.2f", 0, 0})
			}
		}
		return rows
	case opKept:
		if m.streams < 50 {
			return []row{
				{m, s("%s, %d kept connections, p50 µs", m.service, m.streams), func(r result) float64 { return r.P50 * 1e6 }, "%.0f", 0, 0},
				{m, s("%s, %d kept connections, p99 µs", m.service, m.streams), func(r result) float64 { return r.P99 * 1e6 }, "%.0f", 0, 0},
			}
		}
		return []row{{m, s("%s, %d kept connections, requests/s", m.service, m.streams), rate, "%.0f", 0, 0}}
	case opNew:
		return []row{{m, s("%s, a new connection each, requests/s", m.service), rate, "%.0f", 0.6, 0}}
	case opIdle:
		most := map[string]float64{passthrough: 12, sealedTCP: 40}[m.service]
		var rows []row
		for i, h := range hopNames {
			rows = append(rows,
				row{m, s("%s, idle stream, %s, KB", m.service, h), hop(i, func(f footprint) float64 { return f.KB }), "%.1f", 0, most},
				row{m, s("%s, idle stream, %s, descriptors", m.service, h), hop(i, func(f footprint) float64 { return f.Descriptors }), "%.2f", 0, 0},
				row{m, s("%s, idle stream, %s, goroutines", m.service, h), hop(i, func(f footprint) float64 { return f.Goroutines }), "%.2f", 0, 0})
		}
		return rows
	}
	return nil
}

func rate(r result) float64 { return float64(r.Count) / r.Seconds }

// table holds all results, by system and measure, round after round.
type table struct {
	systems []string
	results map[string]map[string][]result
}

func newTable() *table { return &table{results: map[string]map[string][]result{}} }

func (t *table) add(system string, m measure, r result) {
	of := t.results[system]
	if of == nil {
		of = map[string][]result{}
		t.results[system] = of
		t.systems = append(t.systems, system)
	}
	of[m.name()] = append(of[m.name()], r)
}

func (t *table) writeJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", " ")
	return e.Encode(t.results)
}

// values are a row's figures of one system, by round.
func (t *table) values(system string, r row) []float64 {
	var out []float64
	for _, x := range t.results[system][r.name()] {
		out = append(out, r.figure(x))
	}
	return out
}

// median of what is a number; NaN if there is none.
func median(v []float64) float64 {
	v = slices.DeleteFunc(slices.Clone(v), math.IsNaN)
	slices.Sort(v)
	if len(v) == 0 {
		return math.NaN()
	}
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// ours is the system that the bars are about.
func (t *table) ours() string {
	if slices.Contains(t.systems, nameOurs) {
		return nameOurs
	}
	return nameTunnel
}

// writeMarkdown writes the medians, one column per system, with the bars.
func (t *table) writeMarkdown(w io.Writer) {
	ours := t.ours()
	fmt.Fprintf(w, "| measure | %s | %s ÷ %s | bar | |\n|---|%s---:|---:|---|\n", strings.Join(t.systems, " | "), ours, nameHAProxy, strings.Repeat("---:|", len(t.systems)))
	for _, m := range measures() {
		for _, r := range rowsOf(m) {
			cells := []string{r.title}
			some := false
			for _, s := range t.systems {
				x := median(t.values(s, r))
				cells = append(cells, cell(r.format, x))
				some = some || !math.IsNaN(x)
			}
			if !some {
				continue
			}
			// Rounds are compared with themselves: what disturbs one round
			// disturbs both systems alike.
			var ratios []float64
			mine, theirs := t.values(ours, r), t.values(nameHAProxy, r)
			for i := range min(len(mine), len(theirs)) {
				ratios = append(ratios, mine[i]/theirs[i])
			}
			ratio := median(ratios)
			cells = append(cells, cell("%.2f", ratio))
			switch {
			case r.times > 0:
				cells = append(cells, fmt.Sprintf("≥ %.1f ×", r.times), verdict(ratio, ratio >= r.times))
			case r.most > 0:
				x := median(mine)
				cells = append(cells, fmt.Sprintf("≤ %.0f", r.most), verdict(x, x <= r.most))
			default:
				cells = append(cells, "", "")
			}
			fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
		}
	}
	var others []float64
	for _, of := range t.results {
		for _, rounds := range of {
			for _, r := range rounds {
				others = append(others, r.Others)
			}
		}
	}
	if len(others) > 0 {
		slices.Sort(others)
		fmt.Fprintf(w, "\nOf %d processors, others took %.2f in the median measure and %.2f in the most disturbed one.\n",
			runtime.NumCPU(), median(others), others[len(others)-1])
	}
	for _, s := range t.systems {
		for _, name := range slices.Sorted(maps.Keys(t.results[s])) {
			failures := int64(0)
			for _, r := range t.results[s][name] {
				failures += r.Failures
			}
			if failures > 0 {
				fmt.Fprintf(w, "\n%s of %s: %d connections failed.\n", name, s, failures)
			}
		}
	}
}

func cell(format string, x float64) string {
	if math.IsNaN(x) || math.IsInf(x, 0) {
		return "–"
	}
	return fmt.Sprintf(format, x)
}

func verdict(x float64, ok bool) string {
	switch {
	case math.IsNaN(x):
		return "–"
	case ok:
		return "ok"
	}
	return "**miss**"
}
