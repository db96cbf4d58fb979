package tunnel

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

// A path that swallows everything is noticed by both ends of a stream, whoever
// of the visitor and the workload speaks.
func TestStreamsOnADeadPathAreCutWithinSeconds(t *testing.T) {
	for who, speaks := range map[string][2]bool{"visitor": {true, false}, "workload": {false, true}, "both": {true, true}, "nobody": {}} {
		t.Run(who, func(t *testing.T) {
			kinds(t, func(t *testing.T, k Kind) {
				var workload net.Conn
				connect := func(*memnet.World) Connect {
					return func(context.Context, webgw.ID, Request) (near net.Conn, err error) {
						near, workload = memPipe(t)
						return near, nil
					}
				}
				bubble(t, connect, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
					visitor, far := memPipe(t)
					s := p.open(k, key(2))
					var wg sync.WaitGroup
					wg.Go(func() {
						if _, _, err := join(s, visitor, []byte("x")); err == nil {
							t.Error("Join saw an orderly end")
						}
						visitor.Close()
					})
					time.Sleep(3 * time.Second)
					synctest.Wait()
					cut := time.Now().Add(time.Minute)
					for i, c := range []net.Conn{far, workload} {
						if speaks[i] {
							wg.Go(func() {
								for {
									if _, err := c.Write([]byte("x")); err != nil {
										return
									}
									time.Sleep(50 * time.Millisecond)
								}
							})
						}
						wg.Go(func() {
							_, err := io.Copy(io.Discard, c)
							if took := time.Since(cut); err == nil || took > 5*time.Second+watchEvery {
								t.Errorf("end %d saw %v after %v", i, err, took)
							}
							c.Close()
						})
					}
					time.Sleep(time.Until(cut))
					w.Cut(gw, home)
					wg.Wait()
					if took := time.Since(cut); took > 6*time.Second {
						t.Errorf("all over after %v", took)
					}
					w.Repair(gw, home)
				})
			})
		})
	}
}

// The end of a session alone, as when another process of the identity takes
// over, harms no stream: neither one that waits nor one whose receiver is slow.
func TestStreamsOutliveTheirSession(t *testing.T) {
	kinds(t, func(t *testing.T, k Kind) {
		bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
			old := p.open(k, key(2))
			say(t, old, "hello")
			visitor, far := memPipe(t)
			slow := p.open(k, key(2))
			joined := make(chan error, 1)
			go func() {
				_, _, err := join(slow, visitor, nil)
				joined <- err
			}()
			sent := make(chan error, 1)
			const size = 4 << 20
			go func() {
				_, err := far.Write(make([]byte, size)) // more than all buffers hold
				far.(interface{ CloseWrite() error }).CloseWrite()
				sent <- err
			}()
			time.Sleep(time.Second)
			p.server.mu.Lock()
			sess := p.server.sessions[key(2).ID()]
			p.server.mu.Unlock()
			sess.end(errSuperseded)
			time.Sleep(2 * time.Minute)
			say(t, old, "still here")
			if n, err := io.Copy(io.Discard, far); n != size || err != nil {
				t.Errorf("%d bytes came back, %v", n, err)
			}
			if err := <-sent; err != nil {
				t.Error(err)
			}
			if err := <-joined; err != nil {
				t.Error(err)
			}
			old.Close()
			far.Close()
			time.Sleep(time.Minute)
			p.server.smu.Lock()
			if p.server.watching {
				t.Error("the watch goes on over nothing")
			}
			p.server.smu.Unlock()
		})
	})
}

// A request that is under way when the session ends is served.
func TestARequestUnderWayOutlivesTheSession(t *testing.T) {
	kinds(t, func(t *testing.T, k Kind) {
		bubble(t, echo, func(t *testing.T, p *pair, w *memnet.World, gw, home *memnet.Host) {
			time.Sleep(3 * time.Second)
			s := p.open(k, key(2))
			p.server.mu.Lock()
			sess := p.server.sessions[key(2).ID()]
			p.server.mu.Unlock()
			sess.end(errSuperseded)
			time.Sleep(10 * time.Millisecond) // the node hears of it after 20
			say(t, s, "under way")
			s.Close()
			time.Sleep(10 * time.Second)
			if n := len(w.Open()); n > 10 {
				t.Errorf("connections of the old session are left: %q", w.Open())
			}
		})
	})
}
