//go:build unix

package ident

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"webgw.dev/webgw"
)

func TestAPipeInPlaceOfAKeyDoesNotHang(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Load(path)
	if webgw.KindOf(err) != webgw.Invalid || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("Load: %v", err)
	}
	if _, created, err := LoadOrCreate(path); err == nil || created {
		t.Errorf("LoadOrCreate makes a new key in its place: %v", err)
	}
}
