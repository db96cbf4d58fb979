//go:build linux

package main

import (
	"strings"
	"testing"
)

// A bar against a column that is left out in its row would never be judged.
func TestBarsAreJudged(t *testing.T) {
	seen := map[string]bool{}
	for _, m := range measures() {
		if seen[m.name()] {
			t.Errorf("%s is there twice", m.name())
		}
		seen[m.name()] = true
		rows := rowsOf(m)
		if len(rows) == 0 {
			t.Errorf("%s has no rows", m.name())
		}
		for _, r := range rows {
			for _, b := range r.bars {
				if b.x == 0 && b.by != "" || b.sign != "≥" && b.sign != "≤" || !m.isFor(nameOurs) || b.by != "" && !m.isFor(b.by) {
					t.Errorf("%s: the bar %+v can't be judged", r.title, b)
				}
			}
		}
	}
}

func TestTableJudges(t *testing.T) {
	m := measure{sealedTCP, opDown, 8}
	tab := newTable()
	for _, bytes := range []int64{1e9, 2e9, 4e9} { // whose rounds differ, but not their ratio
		tab.add(nameHAProxy, m, result{Seconds: 1, Bytes: bytes, CPU: []float64{1, 1}})
		tab.add(nameOurs, m, result{Seconds: 1, Bytes: bytes * 8 / 10, CPU: []float64{1, 1}})
	}
	lost := measure{sealedTCP, opLossy, 1}
	tab.notes[lost] = "not to be had here: why"
	var out strings.Builder
	tab.writeMarkdown(&out)
	for _, want := range []string{
		"| tcp, 8 streams down, Gbit/s | 16.00 | 12.80 | 0.80 | ≥ 0.7 × HAProxy→HAProxy (corridor): ok; ≥ 0.9 × HAProxy→HAProxy (limit): **miss** |\n",
		"| – | – | – | not to be had here: why |\n",
		"Bars met: 1, missed: 1.\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, out.String())
		}
	}
}

func TestTimePerOp(t *testing.T) {
	for line, want := range map[string]string{
		"BenchmarkRoute/exact-2         \t   85956\t       131.6 ns/op\t       0 B/op": "Route/exact 131.6",
		"BenchmarkColdStart \t 1\t 1203456789 ns/op\n":                                 "ColdStart 1203456789",
		"ok  \twebgw.dev/webgw/bench\t30.257s":                                         "",
	} {
		got := ""
		if f := timePerOp.FindStringSubmatch(line); f != nil {
			got = f[1] + " " + f[2]
		}
		if got != want {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}
