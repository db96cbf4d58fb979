package run

import (
	"errors"
	"path/filepath"
	"testing"
)

func TestLockIsOneHoldersUntilClosed(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	first, err := Lock(name)
	if err != nil {
		t.Fatal(err)
	}
	if f, err := Lock(name); !errors.Is(err, ErrLocked) {
		t.Errorf("a second lock: %v, %v", f, err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Lock(name)
	if err != nil {
		t.Fatalf("after it was closed: %v", err)
	}
	again.Close()
	if _, err := Lock(filepath.Join(t.TempDir(), "no", "lock")); err == nil || errors.Is(err, ErrLocked) {
		t.Errorf("in a directory that does not exist: %v", err)
	}
}
