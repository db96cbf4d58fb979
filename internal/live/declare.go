package live

import (
	"context"
	"log/slog"
	"time"

	"webgw.dev/webgw/internal/run"
)

// Declarer keeps a role's own record in the registry: declared at start, again
// at half its life, and when poked. Nothing that the role does waits for it.
type Declarer struct {
	Life    time.Duration                                              // how long each version counts
	Declare func(ctx context.Context, issued, expires time.Time) error // signs and sends the record
	Log     *slog.Logger                                               // nil: discards

	poke chan struct{}
}

// NewDeclarer returns a Declarer for Run.
func NewDeclarer(life time.Duration, declare func(ctx context.Context, issued, expires time.Time) error, log *slog.Logger) *Declarer {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Declarer{life, declare, log, make(chan struct{}, 1)}
}

// Poke has the record declared anew, because its contents have changed or the
// registry may have lost it. It never waits.
func (d *Declarer) Poke() {
	select {
	case d.poke <- struct{}{}:
	default:
	}
}

const declareTime = 15 * time.Second // for one attempt

// Run declares until ctx ends.
func (d *Declarer) Run(ctx context.Context) error {
	b := run.Backoff{Min: 500 * time.Millisecond, Max: time.Minute}
	failing := false
	for {
		now := time.Now()
		one, cancel := context.WithTimeout(ctx, declareTime)
		err := d.Declare(one, now, now.Add(d.Life))
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		wait := d.Life / 2
		if err != nil {
			if !failing {
				d.Log.Warn("own record not declared; trying again", "err", err)
			}
			wait = b.Next()
		} else {
			if failing {
				d.Log.Info("own record declared")
			}
			b.Reset()
		}
		failing = err != nil
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-d.poke:
		case <-ctx.Done():
		}
		t.Stop()
		if ctx.Err() != nil {
			return nil
		}
	}
}
