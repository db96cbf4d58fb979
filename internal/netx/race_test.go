//go:build race

package netx_test

const raced = true // the race detector makes sync.Pool drop at random
