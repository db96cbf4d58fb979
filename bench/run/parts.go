//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
)

// partNames are the benchmarks of ./bench whose figures belong into the table.
var partNames = []string{"Route/exact", "Route/wildcard", "AddExposure", "ColdStart"}

// timePerOp is a line of go test's output.
var timePerOp = regexp.MustCompile(`^Benchmark(\S+?)(?:-\d+)?\s+\d+\s+([0-9.]+) ns/op`)

// goBenchmarks runs them once, as their preparations take most of the time; one
// that does not exist stays empty.
func (r *rig) goBenchmarks(ctx context.Context, t *table) error {
	wanted := map[string]measure{}
	top := map[string]bool{}
	for _, m := range r.o.wanted(parts) {
		wanted[m.service] = m
		name, _, _ := strings.Cut(m.service, "/")
		top[name] = true
		t.notes[m] = "no benchmark of this name in ./bench"
	}
	if len(wanted) == 0 || !r.o.systems.MatchString(nameOurs) {
		return nil
	}
	var names []string
	for name := range top {
		names = append(names, name)
	}
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "-", "-bench", "^Benchmark("+strings.Join(names, "|")+")$",
		"-benchtime", fmt.Sprintf("%.3gs", min(r.o.seconds, 1)), "webgw.dev/webgw/bench")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("go test -bench: %w\n%s", err, out)
	}
	for line := range bytes.Lines(out) {
		found := timePerOp.FindSubmatch(line)
		if found == nil {
			continue
		}
		if m, ok := wanted[string(found[1])]; ok {
			ns, err := strconv.ParseFloat(string(found[2]), 64)
			if err != nil {
				return err
			}
			t.add(nameOurs, m, result{P50: ns / 1e9})
		}
	}
	return nil
}
