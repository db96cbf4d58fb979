//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
)

// table holds all results, by system and measure, round after round.
type table struct {
	systems []string
	results map[string]map[string][]result
	notes   map[measure]string // why there are none
}

func newTable() *table {
	return &table{results: map[string]map[string][]result{}, notes: map[measure]string{}}
}

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
	fmt.Fprintf(w, "| measure | %s | %s ÷ %s | bars |\n|---|%s---:|---|\n", strings.Join(t.systems, " | "), ours, nameHAProxy, strings.Repeat("---:|", len(t.systems)))
	met, missed := 0, 0
	for _, m := range measures() {
		for _, r := range rowsOf(m) {
			cells := []string{r.title}
			some := false
			for _, s := range t.systems {
				x := median(t.values(s, r))
				cells = append(cells, cell(r.format, x))
				some = some || !math.IsNaN(x)
			}
			if note := t.notes[m]; !some && note != "" {
				cells = append(cells, "–", note)
			} else if !some {
				continue
			} else {
				var bars []string
				for _, b := range r.bars {
					text, ok, known := t.judge(ours, r, b)
					bars = append(bars, text)
					if ok {
						met++
					} else if known {
						missed++
					}
				}
				cells = append(cells, cell("%.2f", t.ratio(ours, nameHAProxy, r)), strings.Join(bars, "; "))
			}
			fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
		}
	}
	fmt.Fprintf(w, "\nBars met: %d, missed: %d.\n", met, missed)
	t.writeDisturbance(w)
}

// ratio is the median of how many times one system's figure is another's, round
// by round: what disturbs a round disturbs both alike.
func (t *table) ratio(one, other string, r row) float64 {
	var ratios []float64
	mine, theirs := t.values(one, r), t.values(other, r)
	for i := range min(len(mine), len(theirs)) {
		ratios = append(ratios, mine[i]/theirs[i])
	}
	return median(ratios)
}

// judge compares a row with a bar, and says so in words.
func (t *table) judge(ours string, r row, b bar) (text string, ok, known bool) {
	text = fmt.Sprintf("%s %.4g", b.sign, b.x)
	x := median(t.values(ours, r))
	if b.by != "" {
		x = t.ratio(ours, b.by, r)
		text += " × " + b.by
	}
	text += " (" + b.issue + "): "
	if b.by != "" && b.by != nameHAProxy {
		text += cell("%.2f", x) + " "
	}
	known = !math.IsNaN(x)
	switch ok = b.sign == "≥" && x >= b.x || b.sign == "≤" && x <= b.x; {
	case !known:
		text += "–"
	case ok:
		text += "ok"
	default:
		text += "**miss**"
	}
	return text, ok, known
}

// writeDisturbance tells what else went on, and what failed.
func (t *table) writeDisturbance(w io.Writer) {
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control"); err == nil {
		fmt.Fprintf(w, "\nThe kernel's congestion control is %s.\n", bytes.TrimSpace(b))
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
