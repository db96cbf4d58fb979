// Package run is goroutine lifetimes: named tasks that have a waiter, stop in
// the reverse order of their start, and turn a panic into an error that ends
// the whole; the pause between two attempts of the same thing; and a lock that
// one process holds.
//
// It must not know what a task does.
package run

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"
)

// Group is a set of tasks that live and end together. Tasks stop one after the
// other, the last started first, so that a task may rely until its end on those
// started before it. That happens as soon as
//
//   - the context given to New ends,
//   - a task returns an error or panics, or
//   - Stop is called.
//
// A task that returns nil has just finished; the others go on. Whoever makes a
// Group calls Wait or Stop in the end.
type Group struct {
	// Drain is how long each task may take to end once its context has. Then it
	// is given up: an error names it, and the next one is stopped. 0: for ever.
	// Set it before the first Go.
	Drain time.Duration

	ctx     context.Context // carries values; never ends by itself
	log     *slog.Logger
	release func() bool
	stopped chan struct{} // closed when a stop is through

	mu       sync.Mutex
	tasks    *list.List // of *task, in order of start
	ended    sync.Cond  // a task has left tasks
	stopping bool
	err      error // the first
}

type task struct {
	name   string
	cancel context.CancelFunc
	done   chan struct{}
	at     *list.Element
	asked  bool // its context was cancelled
	gone   bool // it is no longer in tasks
}

// New returns a group without tasks. The end of ctx stops it. A nil log
// discards; else each start and end is told at debug, what goes wrong above.
func New(ctx context.Context, log *slog.Logger) *Group {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	g := &Group{ctx: context.WithoutCancel(ctx), log: log, stopped: make(chan struct{}), tasks: list.New()}
	g.ended.L = &g.mu
	g.release = context.AfterFunc(ctx, g.stop)
	return g
}

// Go starts f under a name. Its context ends when it is f's turn to stop; an
// error that only says so (context.Canceled) is none. On a group that is
// stopping Go starts nothing and returns false.
func (g *Group) Go(name string, f func(ctx context.Context) error) (started bool) {
	g.mu.Lock()
	if g.stopping {
		g.mu.Unlock()
		g.log.Debug("task not started: stopping", "task", name)
		return false
	}
	ctx, cancel := context.WithCancel(g.ctx)
	t := &task{name: name, cancel: cancel, done: make(chan struct{})}
	t.at = g.tasks.PushBack(t)
	g.mu.Unlock()

	g.log.Debug("task started", "task", name)
	go func() {
		start := time.Now()
		err := errGoexit // unless f returns or panics
		defer func() {
			if v := recover(); v != nil {
				err = &Panic{v, debug.Stack()}
			}
			cancel()
			g.finish(t, err, time.Since(start))
			close(t.done)
		}()
		err = f(ctx)
	}()
	return true
}

// Panic is the error of a task that panicked.
type Panic struct {
	Value any
	Stack []byte // of the task's goroutine
}

// Error gives the value; the stack is in the log.
func (p *Panic) Error() string { return fmt.Sprintf("panic: %v", p.Value) }

// Unwrap returns the value if it is an error, such as runtime.Error.
func (p *Panic) Unwrap() error {
	err, _ := p.Value.(error)
	return err
}

var errGoexit = errors.New("run: the task left by runtime.Goexit")

// finish records how a task ended. It tells first and leaves then, so that
// nothing is logged after Wait.
func (g *Group) finish(t *task, err error, took time.Duration) {
	g.mu.Lock()
	quiet := err == nil || t.asked && errors.Is(err, context.Canceled)
	late := t.gone
	g.mu.Unlock()

	log := g.log.With("task", t.name, "took", took)
	if p, ok := errors.AsType[*Panic](err); ok {
		log.Error("task panicked", "err", err, "stack", string(p.Stack))
	} else if !quiet {
		log.Warn("task failed", "err", err)
	} else if late {
		log.Warn("task ended late")
	} else {
		log.Debug("task ended")
	}

	g.mu.Lock()
	defer g.mu.Unlock()
	if !quiet {
		if g.err == nil {
			g.err = fmt.Errorf("%s: %w", t.name, err)
		}
		// Not here: the stop waits for this very task. Wait waits for it.
		go g.stop()
	}
	g.leaveLocked(t)
}

func (g *Group) leaveLocked(t *task) {
	if !t.gone {
		t.gone = true
		g.tasks.Remove(t.at)
		g.ended.Broadcast()
	}
}

// stop stops the tasks in order, once.
func (g *Group) stop() {
	g.mu.Lock()
	again := g.stopping
	g.stopping = true
	g.mu.Unlock()
	if again {
		return
	}
	defer close(g.stopped)
	for {
		g.mu.Lock()
		last := g.tasks.Back()
		if last == nil {
			g.mu.Unlock()
			return
		}
		t := last.Value.(*task)
		t.asked = true
		g.mu.Unlock()
		g.log.Debug("task stopping", "task", t.name)
		t.cancel()
		g.drain(t)
	}
}

// drain waits for a task whose context has ended, at most for g.Drain.
func (g *Group) drain(t *task) {
	if g.Drain <= 0 {
		<-t.done
		return
	}
	timer := time.NewTimer(g.Drain)
	defer timer.Stop()
	select {
	case <-t.done:
		return
	case <-timer.C:
	}
	err := fmt.Errorf("%s: did not end within %v", t.name, g.Drain)
	g.mu.Lock()
	defer g.mu.Unlock()
	if t.gone { // in the same instant
		return
	}
	g.leaveLocked(t)
	if g.err == nil {
		g.err = err
	}
	g.log.Error("task given up", "task", t.name, "err", err)
}

// Stop stops the group and returns what Wait returns. A task must not call it:
// it would wait for itself.
func (g *Group) Stop() error {
	g.stop()
	<-g.stopped
	g.release()
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}

// Wait waits until no task is left, because all have finished or because the
// group has stopped, and returns the first error of any, with its task's name:
// a *Panic if it crashed. A stop that was asked for is no error. The group is
// over then: Go starts nothing any more.
func (g *Group) Wait() error {
	g.mu.Lock()
	for g.tasks.Len() > 0 {
		g.ended.Wait()
	}
	g.mu.Unlock()
	return g.Stop()
}
