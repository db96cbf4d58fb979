package daemon

import (
	"runtime"
	"testing"
)

var sink []byte

// A heap of a few megabytes is left to grow, and a large one is not left to grow
// out of proportion.
func TestSmallHeapsGrowFirst(t *testing.T) {
	stop := growFirst()
	defer stop()
	next := func() uint64 {
		var m runtime.MemStats
		for range 3 { // the finalizer of one collection sets the goal of the next
			runtime.GC()
			runtime.Gosched()
		}
		runtime.ReadMemStats(&m)
		return m.NextGC
	}
	await := func(what string, ok func(goal uint64) bool) {
		t.Helper()
		var goal uint64
		for range 1000 {
			if goal = next(); ok(goal) {
				return
			}
		}
		t.Errorf("%s: the next collection is at %d MB", what, goal>>20)
	}
	await("small", func(goal uint64) bool { return goal > tidyFloor*3/4 && goal < tidyFloor*2 })
	sink = make([]byte, 2*tidyFloor)
	await("large", func(goal uint64) bool { return goal > 3*tidyFloor && goal < 5*tidyFloor })
	sink = nil
	stop()
	await("stopped", func(goal uint64) bool { return goal < tidyFloor })
}
