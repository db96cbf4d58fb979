//go:build unix

package run

import (
	"os"
	"syscall"
)

// Lock opens the file name, which is made if need be, and takes it for this
// process until it is closed. It does not wait.
func Lock(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return f, nil
	}
	f.Close()
	if err == syscall.EWOULDBLOCK {
		return nil, ErrLocked
	}
	return nil, os.NewSyscallError("flock", err)
}
