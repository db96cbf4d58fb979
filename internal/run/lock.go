package run

import "errors"

// ErrLocked tells that another process holds a lock.
var ErrLocked = errors.New("run: another process holds the lock")
