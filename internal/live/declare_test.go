package live

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestDeclarerKeepsTheRecordAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now()
		fail := 3
		declared := make(chan time.Duration, 10)
		d := NewDeclarer(40*24*time.Hour, func(_ context.Context, issued, expires time.Time) error {
			if fail > 0 {
				fail--
				return errors.New("no registry in sight")
			}
			if expires.Sub(issued) != 40*24*time.Hour || !issued.Equal(time.Now()) {
				t.Errorf("from %v to %v", issued, expires)
			}
			declared <- time.Since(start)
			return nil
		}, nil)
		done := make(chan error)
		go func() { done <- d.Run(ctx) }()
		first := <-declared // after three failures
		if first > 10*time.Second {
			t.Errorf("declared after %v", first)
		}
		time.Sleep(61 * 24 * time.Hour)
		d.Poke()
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		for i, want := range []time.Duration{20, 40, 60} {
			if got := <-declared - first; got != want*24*time.Hour {
				t.Errorf("%d: declared again after %v, want %d days", i, got, want)
			}
		}
		if len(declared) != 1 {
			t.Errorf("declared %d times upon a poke", len(declared))
		}
	})
}

func TestEveryReportsRegularlyAndSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		changed := make(chan struct{}, 1)
		start := time.Now()
		var at []time.Duration
		done := make(chan error)
		go func() {
			done <- Every(ctx, 5*time.Second, 200*time.Millisecond, changed, func(context.Context) error {
				at = append(at, time.Since(start))
				return errors.New("nobody listens")
			}, slog.New(slog.DiscardHandler))
		}()
		time.Sleep(6 * time.Second)
		changed <- struct{}{}
		time.Sleep(10 * time.Second)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		want := []time.Duration{5 * time.Second, 6200 * time.Millisecond, 11200 * time.Millisecond}
		if len(at) != len(want) || at[0] != want[0] || at[1] != want[1] || at[2] != want[2] {
			t.Errorf("reported at %v, want %v", at, want)
		}
	})
}

func TestText(t *testing.T) {
	if got := Text("a\nb\x1b[31m\xff"); got != "a b [31m " {
		t.Errorf("%q", got)
	}
	if got := Text(strings.Repeat("é", 400)); len([]rune(got)) != 300 {
		t.Errorf("%d characters", len([]rune(got)))
	}
}
