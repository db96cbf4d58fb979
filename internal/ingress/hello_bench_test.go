package ingress

import (
	"crypto/tls"
	"testing"
)

// BenchmarkHello finds the server name in a ClientHello of today's size.
func BenchmarkHello(b *testing.B) {
	raw := helloBytes(b, &tls.Config{ServerName: "blog.example"})
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	for b.Loop() {
		var r helloReader
		if h, done, err := r.feed(raw); err != nil || !done || h.ServerName == "" {
			b.Fatal(h, done, err)
		}
	}
}
