package daemon

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
	"time"
)

// Pauses and thresholds of Tidy.
const (
	tidyEvery = 5 * time.Second
	tidyQuiet = 4 << 20  // bytes allocated since the last look that still count as quiet
	tidyWorth = 4 << 20  // bytes that must be to gain, and a quarter of what is in use
	tidyFloor = 48 << 20 // bytes of heap below which it is not collected while busy
)

// Tidy gives memory back to the machine in quiet moments, until ctx ends. After
// a burst of connections most of a process is garbage and stacks that have
// grown; left alone, the runtime collects that only when as much again has been
// allocated, or minutes later. In busy moments it lets a small heap grow, as one
// of a few megabytes would be collected many times a second; GOGC in the
// environment overrules that. It is for whole processes: one per process.
func Tidy(ctx context.Context) {
	if os.Getenv("GOGC") == "" {
		defer growFirst()()
	}
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

// growFirst makes the next collection begin at tidyFloor, or when the heap has
// doubled if that is later, until stop is called.
func growFirst() (stop func()) {
	var over atomic.Bool
	read := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/stack:bytes"}, {Name: "/gc/scan/globals:bytes"}}
	adjust := func() {
		metrics.Read(read)
		live := int(read[0].Value.Uint64())
		roots := int(read[1].Value.Uint64() + read[2].Value.Uint64())
		percent := 100 * (tidyFloor - live) / max(1, live+roots)
		const least = 4 << 20 // of heap at 100 %, in proportion otherwise (package runtime)
		debug.SetGCPercent(min(max(100, percent), 100*tidyFloor/least))
	}
	// A finalizer runs after each collection.
	type sentinel struct{ _ [16]byte }
	var again func(*sentinel)
	again = func(s *sentinel) {
		if !over.Load() {
			adjust()
			runtime.SetFinalizer(s, again)
		}
	}
	adjust()
	runtime.SetFinalizer(new(sentinel), again)
	return func() {
		over.Store(true)
		debug.SetGCPercent(100)
	}
}
