package world

import (
	"context"
	"encoding/binary"
	"io"
	"iter"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/daemon"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/live"
	"webgw.dev/webgw/internal/tunnel"
)

// hostileGateway has a gateway's identity and record, and does what it likes:
// it takes sessions of nodes and asks them for anything.
type hostileGateway struct {
	*Daemon
	tunnel *tunnel.Server
}

func (w *World) hostileGateway(name string) *hostileGateway {
	w.T.Helper()
	d := &Daemon{w: w, Name: name, Host: w.Net.Host(name), Key: w.Key()}
	w.Net.Name(name+".test", d.Host.Addrs()...)
	w.hosts[name], w.daemons[name] = d.Host, d
	h := &hostileGateway{d, &tunnel.Server{Key: d.Key, Log: w.trace.log(name)}}
	l, err := d.Host.Listen(w.T.Context(), "tcp", ":443")
	if err != nil {
		w.T.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				head := make([]byte, 5) // a TLS record's header, RFC 8446 section 5.1
				if _, err := io.ReadFull(c, head); err != nil {
					c.Close()
					return
				}
				body := make([]byte, binary.BigEndian.Uint16(head[3:]))
				if _, err := io.ReadFull(c, body); err != nil {
					c.Close()
					return
				}
				head = append(head, body...)
				if strings.Contains(string(body), webgw.ALPNData) {
					h.tunnel.ServeData(ctx, c, head)
				} else {
					h.tunnel.ServeControl(ctx, c, head)
				}
			})
		}
	})
	w.T.Cleanup(func() { l.Close(); stop(); h.tunnel.Close(); conns.Wait() })

	now := time.Now()
	_, _, err = w.Client(d.Key, d.Host).Declare(w.T.Context(), webgw.Record{Version: webgw.Protocol, Kind: webgw.KindGateway, Name: name,
		Issued: now, Expires: now.Add(Lifetime), Gateway: &webgw.Gateway{Addresses: []string{d.Address(443)}, TLSPort: 443, Ports: "1-65535"}})
	if err != nil {
		w.T.Fatal(err)
	}
	return h
}

// ask opens a stream and returns the node's answer.
func (h *hostileGateway) ask(node *Daemon, kind tunnel.Kind, key webgw.Key, target string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := h.tunnel.Open(ctx, node.ID(), tunnel.Request{Kind: kind, Exposure: key, Target: target, Prompt: true})
	if err != nil {
		return err
	}
	defer s.Close()
	return s.Accepted()
}

func TestAHostileGatewayIsNoDoorIntoTheNode(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		blog, secret, ssh := home.HTTP(8080), home.HTTP(8081), home.Echo(22)
		lan := home.Workload(home.Host.Addrs()[0].String()+":9000", serveHTTP("a neighbour"))
		w.hostileGateway("gent") // as good as a real one here
		evil := w.hostileGateway("evil")
		w.Apply("blog.example -> home1:8080 via evil")
		w.Apply("secret.example -> home1:8081 via gent")
		w.Apply("lan.example -> home1/" + lan.At + " via evil")
		blogKey, secretKey, lanKey := w.Alice.ExposureKey("blog.example"), w.Alice.ExposureKey("secret.example"), w.Alice.ExposureKey("lan.example")

		if err := evil.ask(home, tunnel.Sealed, blogKey, "127.0.0.1:8080"); err != nil {
			t.Fatalf("what is exposed: %v", err)
		}
		synctest.Wait()
		served := blog.Accepted()
		refused := func(kind tunnel.Kind, key webgw.Key, target string) {
			t.Helper()
			if err := evil.ask(home, kind, key, target); webgw.KindOf(err) != webgw.Forbidden {
				t.Errorf("%s %s: %v, want forbidden", key.Name, target, err)
			}
		}
		// Targets that nobody exposed, in every spelling.
		for _, target := range []string{"127.0.0.1:22", "[::1]:22", "[::ffff:127.0.0.1]:22", "[::ffff:127.0.0.1]:8080", "localhost:8080", "0.0.0.0:8080", "127.1:8080",
			"2130706433:8080", "0x7f000001:8080", "0177.0.0.1:8080", "169.254.169.254:80", "[fe80::1%eth0]:80", "10.0.0.1:80", "100.64.0.1:80", "192.0.0.1:80",
			"[64:ff9b::7f00:1]:22", "[2002:7f00:1::]:22", "[fd00::1]:22", "home1.test:8080", "127.0.0.1:8081", "unix:/var/run/docker.sock", ""} {
			refused(tunnel.Sealed, blogKey, target)
		}
		refused(tunnel.Handoff, blogKey, "127.0.0.1:8080") // plain text must not leave unsealed
		refused(tunnel.Sealed, secretKey, "127.0.0.1:8081")
		refused(tunnel.Sealed, webgw.Key{Kind: webgw.KindExposure, Owner: evil.ID(), Name: "blog-example"}, "127.0.0.1:8080")
		refused(tunnel.Sealed, webgw.Key{}, "127.0.0.1:22")
		refused(tunnel.Sealed, lanKey, lan.At) // signed by Alice, but not the node's loopback

		if n := home.Metric("webgw_node_refused_total"); n < 25 {
			t.Errorf("%v refusals counted", n)
		}
		if !w.Logged("home1", "refused", evil.ID().String(), "127.0.0.1:22") {
			t.Error("the node does not tell of it")
		}

		// What was withdrawn or changed is over, whatever the gateway remembers.
		w.Apply("blog.example -> home1:8082 via evil")
		refused(tunnel.Sealed, blogKey, "127.0.0.1:8080")
		w.Apply("blog.example -> home1:8080 via evil, gent")
		w.Withdraw("blog.example")
		if err := evil.ask(home, tunnel.Sealed, blogKey, "127.0.0.1:8080"); err == nil {
			t.Error("a withdrawn exposure is served")
		}
		synctest.Wait()
		if blog.Accepted() != served || secret.Accepted()+ssh.Accepted()+lan.Accepted() != 0 {
			t.Errorf("dialed: blog %d of %d, secret %d, ssh %d, lan %d", blog.Accepted(), served, secret.Accepted(), ssh.Accepted(), lan.Accepted())
		}
	})
}

func TestAHostileNodeCanNotClaimANameNorAVisitor(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1").HTTP(8080)
		evil := w.Node("evil")
		page := evil.HTTP(8080)
		w.Gateway("gent")
		w.Apply("blog.example -> home1:8080 via gent")
		// Its identity is an owner's as good as any, but the name has one.
		thief := &Owner{w, "evil", evil.Key}
		for _, name := range []string{"blog.example", "tls blog.example"} {
			err := thief.Apply(name + " -> evil:8080 via gent")
			if webgw.KindOf(err) != webgw.Taken {
				t.Errorf("%s: %v, want taken", name, err)
			}
		}
		w.dns["blog.example"] = []*Daemon{w.Daemon("gent")}
		// An envelope with another's name in it has the wrong signature.
		forged := w.Alice.Exposure("blog.example -> evil:8080 via gent")
		s, err := evil.Key.Sign(forged) // the owner becomes who signs
		if err != nil {
			t.Fatal(err)
		}
		if err := thief.Put(s); webgw.KindOf(err) != webgw.Taken {
			t.Errorf("a forged record: %v", err)
		}
		w.Settle()
		w.Get("https://blog.example/").Want(200, "hello from home1")
		if page.Accepted() != 0 {
			t.Error("visitors were led to the hostile node")
		}
	})
}

// An owner whom the node's farmer does not know can't use the node.
func TestAStrangersExposureIsNotCarried(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		page := w.Node("home1").HTTP(8080)
		w.Gateway("gent")
		mallory := w.Owner("mallory")
		if err := mallory.Apply("mine.example -> home1:8080 via gent"); err != nil {
			t.Fatal(err)
		}
		w.Settle()
		if a := w.Get("https://mine.example/"); a.Status == 200 || page.Accepted() != 0 {
			t.Errorf("%d %q, %d connections", a.Status, a.Body, page.Accepted())
		}
	})
}

func TestReplaysAreRefusedByTheRegistry(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1").HTTP(8080)
		w.Gateway("gent")
		first, err := w.Alice.Key.Sign(w.Alice.Exposure("blog.example -> home1:8080 via gent"))
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Alice.Put(first); err != nil {
			t.Fatal(err)
		}
		w.Withdraw("blog.example")
		for _, who := range []*Owner{w.Alice, {w, "gent", w.Daemon("gent").Key}} {
			if err := who.Put(first); err == nil {
				t.Error("a withdrawn version was taken again")
			}
		}
		w.Settle()
		if a := w.Get("https://blog.example/"); a.Status == 200 {
			t.Error("a withdrawn exposure is served")
		}
	})
}

// liar stands between a role and the registry and tells what it likes.
type liar struct {
	live.Feed
	mu     sync.Mutex
	seen   []ident.Signed
	tell   []live.Change // instead of anything true, once told to lie
	lying  bool
	starve chan struct{} // closed: true watches end
}

func (l *liar) Watch(ctx context.Context, since int64, epoch string) iter.Seq2[live.Change, error] {
	return func(yield func(live.Change, error) bool) {
		l.mu.Lock()
		lying, tell := l.lying, l.tell
		l.mu.Unlock()
		if lying {
			for _, c := range tell {
				if !yield(c, nil) {
					return
				}
			}
			<-ctx.Done()
			yield(live.Change{}, ctx.Err())
			return
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stop := make(chan struct{})
		defer close(stop)
		go func() {
			select {
			case <-l.starve:
			case <-stop:
			}
			cancel()
		}()
		for c, err := range l.Feed.Watch(ctx, since, epoch) {
			l.mu.Lock()
			l.seen = append(l.seen, c.Records...)
			l.mu.Unlock()
			if !yield(c, err) {
				return
			}
		}
	}
}

// lie makes the registry tell the changes from now on, and nothing else.
func (l *liar) lie(tell ...live.Change) {
	l.mu.Lock()
	l.lying, l.tell = true, tell
	l.mu.Unlock()
	close(l.starve)
}

func (l *liar) Get(context.Context, webgw.Key) (ident.Signed, error) {
	return ident.Signed{}, &webgw.Error{Kind: webgw.NotFound, Public: "never heard of it"}
}

func TestAHostileRegistryTakesNothingAndBringsNothingBack(t *testing.T) {
	for name, lies := range map[string]func(seen []ident.Signed) []live.Change{
		"forgets everything": func([]ident.Signed) []live.Change {
			return []live.Change{{Rev: 1000, Epoch: "new", Reset: true, Synced: true}}
		},
		"rolls back": func(seen []ident.Signed) []live.Change {
			return []live.Change{{Rev: 3, Epoch: "new", Reset: true, Synced: true, Records: seen}}
		},
		"reorders and replays": func(seen []ident.Signed) []live.Change {
			out := []live.Change{{Rev: 1, Epoch: "new", Reset: true, Synced: true}}
			for round := range 3 {
				for i := len(seen) - 1; i >= 0; i-- {
					out = append(out, live.Change{Rev: int64(2 + round), Records: seen[i : i+1]})
				}
			}
			return out
		},
		"forges": func([]ident.Signed) []live.Change {
			return []live.Change{{Rev: 1, Epoch: "new", Reset: true, Synced: true, Refused: 7}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			Test(t, func(t *testing.T, w *World) {
				liars := map[string]*liar{}
				between := func(d *Daemon) {
					d.Env = func(e *daemon.Env) {
						e.Feed = func(f live.Feed) live.Feed {
							liars[d.Name] = &liar{Feed: f, starve: make(chan struct{})}
							return liars[d.Name]
						}
					}
				}
				home := w.Node("home1", func(d *Daemon, _ *daemon.NodeConfig) { between(d) })
				home.HTTP(8080)
				w.Gateway("gent", func(d *Daemon, _ *daemon.GatewayConfig) { between(d) })
				w.Apply("blog.example -> home1:8080 via gent")
				w.Apply("gone.example -> home1:8080 via gent")
				w.Apply("moved.example -> home1:8081 via gent")
				w.Apply("moved.example -> home1:8080 via gent")
				w.Withdraw("gone.example")
				w.Get("https://blog.example/").Want(200)

				for _, l := range liars {
					l.lie(lies(l.seen)...)
				}
				time.Sleep(30 * time.Second)
				w.Get("https://blog.example/").Want(200, "hello from home1")
				w.Get("https://moved.example/").Want(200, "hello from home1")
				if a := w.Get("https://gone.example/"); a.Status == 200 {
					t.Error("a withdrawn exposure is served")
				}
				for _, who := range []string{"gent", "home1"} {
					d := w.Daemon(who)
					if d.Metric("webgw_live_missing")+d.Metric("webgw_live_refused_total") == 0 {
						t.Errorf("%s raises no alarm", who)
					}
				}
			})
		})
	}
}
