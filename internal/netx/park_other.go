//go:build !linux

package netx

import (
	"errors"
	"net"
)

// Lot is where connections wait for bytes without a goroutine; here they can't.
type Lot struct{}

// Parked is one wait.
type Parked struct{}

// NewLot fails: nothing can wait here.
func NewLot() (*Lot, error) { return nil, errors.ErrUnsupported }

// Park returns nil: c can't wait here.
func (*Lot) Park(net.Conn, func()) *Parked { return nil }

// Close does nothing.
func (*Lot) Close() {}

// Wake does nothing.
func (*Parked) Wake() {}
