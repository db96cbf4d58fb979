package tunnel

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
)

// Many streams of one moment are one reason to keep more connections ready, not
// many: each is a handshake.
func TestARushGrowsThePoolOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rush = 50
		p := &pool{target: poolMin, demand: func() {}}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range rush {
			wg.Go(func() { p.take(ctx) }) // all end with an error, below
		}
		synctest.Wait()
		if n := p.ask(); n != rush+2*poolMin {
			t.Errorf("%d connections are asked for, for %d streams and %d in reserve", n, rush, 2*poolMin)
		}
		cancel()
		wg.Wait()
	})
}
