package daemon

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// Pauses and thresholds of Tidy.
const (
	tidyEvery = 5 * time.Second
	tidyQuiet = 4 << 20 // bytes allocated since the last look that still count as quiet
	tidyWorth = 4 << 20 // bytes that must be to gain, and a quarter of what is in use
)

// Tidy gives memory back to the machine in quiet moments, until ctx ends. After
// a burst of connections most of a process is garbage and stacks that have
// grown; left alone, the runtime collects that only when as much again has been
// allocated, or minutes later. It is for whole processes: one per process.
func Tidy(ctx context.Context) {
	tick := time.NewTicker(tidyEvery)
	defer tick.Stop()
	read := []metrics.Sample{
		{Name: "/gc/heap/allocs:bytes"},
		{Name: "/gc/heap/live:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
		{Name: "/memory/classes/heap/stacks:bytes"},
		{Name: "/sched/goroutines:goroutines"},
	}
	var before, most uint64
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		metrics.Read(read)
		allocated, live, objects, free, stacks, goroutines := read[0].Value.Uint64(), read[1].Value.Uint64(), read[2].Value.Uint64(), read[3].Value.Uint64(), read[4].Value.Uint64(), read[5].Value.Uint64()
		quiet := allocated-before < tidyQuiet
		before, most = allocated, max(most, goroutines)
		garbage := objects+free > live+max(tidyWorth, live/4)
		ended := stacks > tidyWorth && goroutines < most-most/4 // their stacks are kept until a collection
		if quiet && (garbage || ended) {
			most = goroutines
			debug.FreeOSMemory()
		}
	}
}
