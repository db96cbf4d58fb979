//go:build unix

package netx

import "syscall"

// descriptors tells that a socket is a descriptor which reads without waiting.
const descriptors = true

func writeDescriptor(fd uintptr, p []byte) (int, error) { return syscall.Write(int(fd), p) }

func readDescriptor(fd uintptr, p []byte) (int, error) { return syscall.Read(int(fd), p) }
