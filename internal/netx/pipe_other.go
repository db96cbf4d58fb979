//go:build !linux

package netx

import "syscall"

// Parcel is a number of bytes of a connection on their way inside the kernel;
// here there are none.
type Parcel struct{ N int }

// NextParcel tells to use Next.
func (s *Source) NextParcel(int) (Parcel, bool, error) { return Parcel{}, false, nil }

// Send has nothing to send.
func (Parcel) Send(syscall.RawConn, []byte) error { return nil }
