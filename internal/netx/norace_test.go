//go:build !race

package netx_test

const raced = false
