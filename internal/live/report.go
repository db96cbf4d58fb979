package live

import (
	"context"
	"log/slog"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
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

// Text makes one printable line of at most 300 characters of what may be an
// error of anybody's: what the registry accepts in a status.
func Text(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
	if r := []rune(s); len(r) > 300 {
		s = string(r[:299]) + "…"
	}
	return s
}
