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
	}
	var before uint64
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		metrics.Read(read)
		allocated, live, objects, free := read[0].Value.Uint64(), read[1].Value.Uint64(), read[2].Value.Uint64(), read[3].Value.Uint64()
		quiet := allocated-before < tidyQuiet
		before = allocated
		if quiet && objects+free > live+max(tidyWorth, live/4) {
			debug.FreeOSMemory()
		}
	}
}
