package ingress

import (
	"context"
	"slices"
	"sync"
	"time"
)

// ending is the context of one visitor: of a connection over HTTP/1, or of a
// stream over HTTP/2. Requests and the connections to workloads that they use
// come and go under it more cheaply than under one of package context.
type ending struct {
	mu    sync.Mutex
	err   error
	done  chan struct{}
	conns []*workloadConn // to be cancelled
	funcs []*func()
}

// Deadline implements context.Context.
func (e *ending) Deadline() (time.Time, bool) { return time.Time{}, false }

// Value implements context.Context.
func (e *ending) Value(any) any { return nil }

// Err implements context.Context.
func (e *ending) Err() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.err
}

// Done implements context.Context.
func (e *ending) Done() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.done == nil {
		e.done = make(chan struct{})
		if e.err != nil {
			close(e.done)
		}
	}
	return e.done
}

// AfterFunc is what package context looks for in contexts that are not its own.
func (e *ending) AfterFunc(f func()) (stop func() bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		go f()
		return func() bool { return false }
	}
	e.funcs = append(e.funcs, &f)
	return func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		i := slices.Index(e.funcs, &f)
		if i >= 0 {
			e.funcs = slices.Delete(e.funcs, i, i+1)
		}
		return i >= 0
	}
}

// add has c cancelled at the end; now, if that was before.
func (e *ending) add(c *workloadConn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		c.cancel()
		return
	}
	e.conns = append(e.conns, c)
}

// remove undoes add; false if it is too late.
func (e *ending) remove(c *workloadConn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	i := slices.Index(e.conns, c)
	if i >= 0 {
		e.conns = slices.Delete(e.conns, i, i+1)
	}
	return i >= 0
}

// end says that the visitor is gone.
func (e *ending) end() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		return
	}
	e.err = context.Canceled
	if e.done != nil {
		close(e.done)
	}
	for _, c := range e.conns {
		c.cancel()
	}
	for _, f := range e.funcs {
		go (*f)()
	}
	e.conns, e.funcs = nil, nil
}
