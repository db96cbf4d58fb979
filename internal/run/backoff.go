package run

import (
	"context"
	"math/rand/v2"
	"time"
)

// Backoff is the pause between attempts. The n-th is a random time up to
// Min·2ⁿ⁻¹, and never above Max: full jitter, so that a thousand nodes that
// lost the same gateway don't come back at the same instant. It is for one
// goroutine.
type Backoff struct {
	Min  time.Duration // longest first pause; 0: 100 ms
	Max  time.Duration // longest pause; 0: 30 s
	Rand *rand.Rand    // nil: the process's own

	n int
}

// Next returns how long to pause now; each call counts as a failed attempt.
func (b *Backoff) Next() time.Duration {
	low, high := b.Min, b.Max
	if low <= 0 {
		low = 100 * time.Millisecond
	}
	if high <= 0 {
		high = 30 * time.Second
	}
	top := low
	for range b.n {
		if top >= high/2 {
			top = high
			break
		}
		top *= 2
	}
	top = min(top, high)
	b.n = min(b.n+1, 63)
	if b.Rand != nil {
		return 1 + time.Duration(b.Rand.Int64N(int64(top)))
	}
	return 1 + rand.N(top)
}

// Wait pauses, or returns ctx's error as soon as that has ended.
func (b *Backoff) Wait(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	t := time.NewTimer(b.Next())
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Reset begins anew, after a success.
func (b *Backoff) Reset() { b.n = 0 }
