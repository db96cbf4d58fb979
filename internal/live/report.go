package live

import (
	"context"
	"log/slog"
	"time"
)

// Every calls f regularly, and soon after each change, until ctx ends. An
// error is logged when it is the first after a success: what was not told
// now is told, newer, the next time.
func Every(ctx context.Context, period, soon time.Duration, changed <-chan struct{}, f func(context.Context) error, log *slog.Logger) error {
	failing := false
	for {
		regular := time.NewTimer(period)
		select {
		case <-ctx.Done():
		case <-regular.C:
		case <-changed:
			pause := time.NewTimer(soon)
			select {
			case <-ctx.Done():
			case <-pause.C:
			}
			pause.Stop()
		}
		regular.Stop()
		if ctx.Err() != nil {
			return nil
		}
		one, cancel := context.WithTimeout(ctx, max(period, time.Second))
		err := f(one)
		cancel()
		if err != nil && ctx.Err() == nil && !failing {
			log.Debug("status not reported", "err", err)
		}
		failing = err != nil
	}
}
