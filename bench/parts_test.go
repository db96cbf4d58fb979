//go:build linux

// Package bench measures parts of the system on their own; bench/run measures
// the whole.
package bench

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/ingress"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/registry"
	"webgw.dev/webgw/internal/store/memkv"
	"webgw.dev/webgw/internal/tunnel"
)

func key(n byte) ident.Key { return ident.FromSeed([32]byte{n}) }

// BenchmarkStream opens a stream to a node over loopback, asks and gets an
// answer of 64 bytes, and closes it: no workload is dialed.
func BenchmarkStream(b *testing.B) {
	for _, kind := range []tunnel.Kind{tunnel.Sealed, tunnel.Handoff} {
		b.Run(kind.String(), func(b *testing.B) { benchmarkStream(b, kind) })
	}
}

func benchmarkStream(b *testing.B, kind tunnel.Kind) {
	ctx, cancel := context.WithCancel(b.Context())
	var all sync.WaitGroup
	gateway := &tunnel.Server{Key: key(1), Log: slog.New(slog.DiscardHandler)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		cancel()
		l.Close()
		gateway.Close()
		all.Wait()
	}()
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			all.Go(func() { attach(ctx, gateway, c) })
		}
	})
	up := make(chan struct{}, 1)
	node := &tunnel.Client{Key: key(2), Gateway: key(1).ID(), Net: netx.Host{}, Log: gateway.Log,
		Addresses: func() []string { return []string{l.Addr().String()} },
		Changed: func(s tunnel.State) {
			if s.Up {
				up <- struct{}{}
			}
		},
		Connect: func(context.Context, webgw.ID, tunnel.Request) (net.Conn, error) {
			near, far := net.Pipe()
			all.Go(func() { // echoes once
				defer far.Close()
				p := make([]byte, 64)
				if _, err := io.ReadFull(far, p); err == nil {
					far.Write(p) // its failure shows at the other end
				}
			})
			return near, nil
		},
	}
	all.Go(func() { node.Run(ctx) })
	<-up
	p := make([]byte, 64)
	b.ReportAllocs()
	for b.Loop() {
		s, err := gateway.Open(ctx, key(2).ID(), tunnel.Request{Kind: kind, Target: "127.0.0.1:1"})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := s.Write(p); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(s, p); err != nil {
			b.Fatal(err)
		}
		if _, err := s.Read(p); err != io.EOF {
			b.Fatal(err)
		}
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// attach takes a node's connection in, as the ingress does.
func attach(ctx context.Context, s *tunnel.Server, c net.Conn) {
	head := make([]byte, 5)
	if _, err := io.ReadFull(c, head); err != nil {
		c.Close()
		return
	}
	head = append(head, make([]byte, binary.BigEndian.Uint16(head[3:]))...)
	if _, err := io.ReadFull(c, head[5:]); err != nil {
		c.Close()
		return
	}
	if bytes.Contains(head, []byte(webgw.ALPNData)) {
		s.ServeData(ctx, c, head)
	} else {
		s.ServeControl(ctx, c, head)
	}
}

// BenchmarkRoute looks a name up among a million exposures, one that is there
// and one that only a wildcard covers.
func BenchmarkRoute(b *testing.B) {
	const n = 1_000_000
	all := make([]ingress.Declared, 0, n)
	for i := range n {
		name := fmt.Sprintf("s%d", i)
		host := name + ".bench.example"
		if i == 7 {
			host = "*.wild.example"
		}
		all = append(all, ingress.Declared{Key: webgw.Key{Kind: webgw.KindExposure, Owner: key(1).ID(), Name: name},
			Exposure: &webgw.Exposure{Protocol: webgw.TLS, Hosts: []string{host}, Targets: []webgw.Target{{Direct: "192.0.2.1:443"}}}})
	}
	t, problems := ingress.Build(all)
	if len(problems) > 0 {
		b.Fatal(problems[0])
	}
	names := make([]string, 4096) // more than the processor's cache keeps at hand
	for i := range names {
		names[i] = fmt.Sprintf("s%d.bench.example", 10+i*(n/len(names)-1))
	}
	b.Run("exact", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if t.TLS(names[i%len(names)]) == nil {
				b.Fatal("not found")
			}
		}
	})
	b.Run("wildcard", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if t.TLS("any.wild.example") == nil {
				b.Fatal("not found")
			}
		}
	})
}

// BenchmarkTable makes the table anew with one exposure more than 100,000.
func BenchmarkTable(b *testing.B) {
	var all []ingress.Declared
	for i := range 100_001 {
		name := fmt.Sprintf("s%d", i)
		all = append(all, ingress.Declared{Key: webgw.Key{Kind: webgw.KindExposure, Owner: key(1).ID(), Name: name},
			Exposure: &webgw.Exposure{Protocol: webgw.TLS, Hosts: []string{name + ".bench.example"}, Targets: []webgw.Target{{Direct: "192.0.2.1:443"}}}})
	}
	for b.Loop() {
		ingress.Build(all)
	}
}

func record(i int, host string) webgw.Record {
	now := time.Now()
	return webgw.Record{Version: 1, Kind: webgw.KindExposure, Name: fmt.Sprintf("s%d", i), Seq: 1, Issued: now, Expires: now.Add(time.Hour),
		Exposure: &webgw.Exposure{Protocol: webgw.HTTP, Hosts: []string{host}, Gateways: []webgw.ID{key(1).ID()},
			Targets: []webgw.Target{{Node: key(2).ID(), Address: "127.0.0.1:8080"}}}}
}

// BenchmarkVerify verifies the envelope of an exposure.
func BenchmarkVerify(b *testing.B) {
	s, err := key(3).Sign(record(1, "blog.bench.example"))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ident.Verify(s.Envelope()); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPut has owners put signed exposures, each with a new name, into a
// registry over its API, with its store in memory.
func BenchmarkPut(b *testing.B) {
	ctx, cancel := context.WithCancel(b.Context())
	kv := memkv.New()
	defer kv.Close()
	s := &registry.Server{Key: key(1), Store: kv, Quota: registry.Quota{Records: 1 << 30, Names: 1 << 30}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	var all sync.WaitGroup
	defer func() { cancel(); all.Wait() }()
	all.Go(func() { s.Run(ctx) })
	all.Go(func() { s.Serve(ctx, l) })
	if err := s.Ready(ctx); err != nil {
		b.Fatal(err)
	}
	by := func(k ident.Key) *client.Client {
		return &client.Client{Endpoints: []string{l.Addr().String()}, Key: k, Server: key(1).ID()}
	}
	for _, r := range []webgw.Record{
		{Kind: webgw.KindGateway, Name: "gent", Gateway: &webgw.Gateway{Addresses: []string{"192.0.2.1:443"}, TLSPort: 443}},
		{Kind: webgw.KindNode, Name: "home", Node: &webgw.Node{}},
	} {
		c := by(key(1))
		if r.Kind == webgw.KindNode {
			c = by(key(2))
		}
		_, _, err := c.Declare(ctx, r)
		c.Close()
		if err != nil {
			b.Fatal(err)
		}
	}
	c := by(key(3))
	defer c.Close()
	for i := 0; b.Loop(); i++ {
		signed, err := key(3).Sign(record(i, fmt.Sprintf("s%d.bench.example", i)))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.Put(ctx, signed); err != nil {
			b.Fatal(err)
		}
	}
}
