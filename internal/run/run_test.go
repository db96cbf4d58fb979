package run_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw/internal/run"
)

// trace is a list that tasks write into.
type trace struct {
	mu    sync.Mutex
	lines []string
}

func (t *trace) add(s string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines = append(t.lines, s)
}

// until runs to the end of its context, then takes a while to end.
func (t *trace) until(name string, takes time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		<-ctx.Done()
		time.Sleep(takes)
		t.add(name)
		return ctx.Err()
	}
}

func (t *trace) want(tt *testing.T, lines ...string) {
	tt.Helper()
	t.mu.Lock()
	defer t.mu.Unlock()
	if !slices.Equal(t.lines, lines) {
		tt.Errorf("ended in the order %q, want %q", t.lines, lines)
	}
}

func TestStopsInReverse(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(g *run.Group, cancel context.CancelFunc)
		want string
	}{
		{"stop", func(*run.Group, context.CancelFunc) {}, ""},
		{"parent", func(_ *run.Group, cancel context.CancelFunc) { cancel() }, ""},
		{"error", func(g *run.Group, _ context.CancelFunc) {
			g.Go("bad", func(context.Context) error { return io.ErrUnexpectedEOF })
		}, "bad: unexpected EOF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var order trace
				g := run.New(ctx, nil)
				g.Go("store", order.until("store", 0))
				g.Go("gateway", order.until("gateway", time.Second))
				g.Go("listener", order.until("listener", time.Minute))
				g.Go("finished", func(context.Context) error { return nil })
				tt.end(g, cancel)
				var err error
				if tt.name == "stop" {
					err = g.Stop()
				} else {
					err = g.Wait()
				}
				if got := message(err); got != tt.want {
					t.Errorf("got %q, want %q", got, tt.want)
				}
				order.want(t, "listener", "gateway", "store")
				if g.Go("late", func(context.Context) error { t.Error("it ran"); return nil }) {
					t.Error("a stopped group starts tasks")
				}
			})
		})
	}
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestFinishedTasksLeaveTheOthersAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := run.New(t.Context(), nil)
		g.Go("short", func(context.Context) error { return nil })
		g.Go("long", func(ctx context.Context) error {
			time.Sleep(time.Hour)
			return ctx.Err()
		})
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
}

func TestPanicIsAnErrorWithItsStack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		var order trace
		g := run.New(t.Context(), slog.New(slog.NewTextHandler(&log, nil)))
		g.Go("other", order.until("other", 0))
		g.Go("crash", func(context.Context) error {
			var m map[string]int
			m["x"] = 1
			return nil
		})
		err := g.Wait()
		p, ok := errors.AsType[*run.Panic](err)
		if !ok || !strings.Contains(string(p.Stack), "TestPanicIsAnError") {
			t.Fatalf("got %v", err)
		}
		if _, ok := errors.AsType[runtime.Error](err); !ok {
			t.Errorf("%v hides the runtime error", err)
		}
		order.want(t, "other")
		for _, want := range []string{"level=ERROR", "task=crash", "nil map", "run_test.go"} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("the log lacks %q: %s", want, &log)
			}
		}
	})
}

func TestGoexitIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := run.New(t.Context(), nil)
		g.Go("leaver", func(context.Context) error { runtime.Goexit(); return nil })
		if err := g.Wait(); err == nil || !strings.HasPrefix(err.Error(), "leaver: ") {
			t.Errorf("got %v", err)
		}
	})
}

func TestUnaskedCancellationIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := run.New(t.Context(), nil)
		g.Go("odd", func(context.Context) error { return context.Canceled })
		if err := g.Wait(); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}

func TestDrainGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var order trace
		g := run.New(t.Context(), nil)
		g.Drain = 5 * time.Second
		g.Go("first", order.until("first", 0))
		g.Go("stuck", order.until("stuck", time.Hour))
		start := time.Now()
		err := g.Stop()
		if got := message(err); got != "stuck: did not end within 5s" {
			t.Errorf("got %q", got)
		}
		if d := time.Since(start); d != 5*time.Second {
			t.Errorf("it took %v", d)
		}
		order.want(t, "first")
		time.Sleep(2 * time.Hour) // lets it end
	})
}

func TestTasksStartTasks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var order trace
		g := run.New(t.Context(), nil)
		g.Go("accept", func(ctx context.Context) error {
			for range 3 {
				g.Go("conn", order.until("conn", 0))
			}
			<-ctx.Done()
			order.add("accept")
			return nil
		})
		synctest.Wait()
		if err := g.Stop(); err != nil {
			t.Error(err)
		}
		order.want(t, "conn", "conn", "conn", "accept")
	})
}

func TestValuesReachTasks(t *testing.T) {
	type key struct{}
	g := run.New(context.WithValue(t.Context(), key{}, "v"), nil)
	g.Go("reader", func(ctx context.Context) error {
		if ctx.Value(key{}) != "v" {
			t.Error("the value is lost")
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

func TestBackoffStaysInBounds(t *testing.T) {
	b := run.Backoff{Min: time.Second, Max: 10 * time.Second, Rand: rand.New(rand.NewPCG(1, 2))}
	for round := range 200 {
		for _, top := range []time.Duration{1, 2, 4, 8, 10, 10, 10} {
			if d := b.Next(); d <= 0 || d > top*time.Second {
				t.Fatalf("round %d: %v is not within %ds", round, d, top)
			}
		}
		b.Reset()
	}
	// It must spread: the mean of full jitter is half the bound.
	var sum time.Duration
	for range 1000 {
		sum += b.Next()
		b.Reset()
	}
	if mean := sum / 1000; mean < 450*time.Millisecond || mean > 550*time.Millisecond {
		t.Errorf("the mean is %v, want about 500ms", mean)
	}
	for range 1000 { // no overflow
		if d := b.Next(); d <= 0 || d > 10*time.Second {
			t.Fatal(d)
		}
	}
	huge := run.Backoff{Min: 1 << 62, Max: 1<<63 - 1}
	for range 10 {
		if d := huge.Next(); d <= 0 {
			t.Fatal(d)
		}
	}
}

func TestBackoffWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := run.Backoff{Rand: rand.New(rand.NewPCG(1, 2))}
		start := time.Now()
		if err := b.Wait(t.Context()); err != nil || time.Since(start) > 100*time.Millisecond || time.Since(start) == 0 {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		for range 20 {
			b.Next()
		}
		if err := b.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if err := b.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}
