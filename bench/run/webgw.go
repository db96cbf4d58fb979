//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
)

func (r *rig) webgw(ctx context.Context) (*system, error) { return nil, errors.New("later") }
func serveDaemon(ctx context.Context, role string, config json.RawMessage) (any, error) {
	return nil, errors.New("later")
}
func goroutines(url string) (float64, error) { return 0, nil }
