//go:build !unix

package netx

import "errors"

// descriptors tells that a socket is a descriptor which reads without waiting;
// here reads are begun and completed later, so that each holds its buffer.
const descriptors = false

func writeDescriptor(uintptr, []byte) (int, error) { return 0, errors.ErrUnsupported }

func readDescriptor(uintptr, []byte) (int, error) { return 0, errors.ErrUnsupported }
