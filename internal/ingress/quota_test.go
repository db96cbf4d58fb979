package ingress

import (
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
	"webgw.dev/webgw/internal/netx/memnet"
)

// An exposure that many visitors come for leaves room for the others of its
// owner, and an owner for other owners.
func TestOneExposureDoesNotStarveOthers(t *testing.T) {
	limits := Limits{PerOwner: 16, PerExposure: 10}
	quicBubble(t, limits, nil, func(t *testing.T, w *world, m *memnet.World) {
		done := make(chan struct{})
		memSite(t, w.Net.(*memnet.Host), func(rw http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/wait" {
				<-done
			}
			io.WriteString(rw, "answer")
		})
		tcp := expose("tcp", webgw.TCP, nil, "gateway:8080")
		tcp.Exposure.Port = 7000
		other := web1("other", "gateway:8080")
		other.Key.Owner = webgw.ID{2}
		w.use(web1("a", "gateway:8080"), web1("b", "gateway:8080"), tcp, other)

		var flood sync.WaitGroup
		var mu sync.Mutex
		answers := map[string]int{}
		ask := func(c *http.Client, url string, n int) {
			for range n {
				flood.Go(func() {
					status, _, h := get(t, c, url)
					mu.Lock()
					defer mu.Unlock()
					answers[fmt.Sprint(status, h.Get(ErrorHeader), h.Get("Retry-After"))]++
				})
			}
			synctest.Wait()
		}
		count := func(what string) int {
			mu.Lock()
			defer mu.Unlock()
			return answers[what]
		}
		clients := []*http.Client{w.client(true), w.client3()}
		for _, c := range clients {
			ask(c, "https://a.example/wait", 10)
		}
		if n := count("503exposure_limit5"); n != 10 {
			t.Error(n, "were refused of 20:", answers)
		}
		for _, c := range clients {
			for _, host := range []string{"b", "other"} {
				if status, _, _ := get(t, c, "https://"+host+".example/"); status != 200 {
					t.Error(host, "is starved:", status)
				}
			}
		}
		// The owner's other exposures have what is left of the owner's share.
		ask(clients[0], "https://b.example/wait", 8)
		if n := count("503owner_limit5"); n != 2 {
			t.Error(n, "were refused of 8:", answers)
		}
		c := connect(t, hostAt(m, "203.0.113.1"), "7000")
		if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Error("a stream beyond the owner's share:", err)
		}
		if status, _, _ := get(t, clients[1], "https://other.example/"); status != 200 {
			t.Error("another owner is starved:", status)
		}
		if e, o := value(t, w.metrics.refusals.WithLabelValues(reasonExposure)), value(t, w.metrics.refusals.WithLabelValues(reasonOwner)); e != 10 || o != 3 {
			t.Error(e, o)
		}
		w.use(web1("a", "gateway:8080"), web1("b", "gateway:8080"), tcp, other) // keeps count
		if status, _, _ := get(t, clients[0], "https://a.example/"); status != 503 {
			t.Error("a new table lets more in:", status)
		}
		close(done)
		flood.Wait()
		synctest.Wait()
		if status, _, _ := get(t, clients[0], "https://a.example/"); status != 200 {
			t.Error("what has ended still counts:", status)
		}
	})
}

// Idle connections count, too: they are as many as strangers please.
func TestConnectionsToOneExposureAreLimited(t *testing.T) {
	quicBubble(t, Limits{PerOwner: 6, PerExposure: 4}, nil, func(t *testing.T, w *world, m *memnet.World) {
		memSite(t, w.Net.(*memnet.Host), func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "answer") })
		other := web1("other", "gateway:8080")
		other.Key.Owner = webgw.ID{2}
		w.use(web1("a", "gateway:8080"), web1("b", "gateway:8080"), other)
		works := func(c *http.Client, host string) bool {
			res, err := c.Get("https://" + host + ".example/")
			if err != nil {
				return false
			}
			defer res.Body.Close()
			_, err = io.Copy(io.Discard, res.Body)
			return err == nil && res.StatusCode == 200
		}
		var held []*http.Client
		connections := func(host string, n int) (in int) {
			for i := range n {
				c := w.client(i%2 == 0)
				if i%3 == 0 {
					c = &http.Client{Transport: w.transport3(w.socket(netx.Net(hostAt(m, fmt.Sprintf("203.0.113.%d", len(held)+1)))))}
				}
				held = append(held, c)
				if works(c, host) {
					in++
				}
			}
			return in
		}
		if in := connections("a", 8); in != 4 {
			t.Error(in, "connections to one exposure")
		}
		if in := connections("b", 4); in != 2 {
			t.Error(in, "connections to the owner's other exposure")
		}
		if in := connections("other", 2); in != 2 {
			t.Error(in, "connections to another owner's")
		}
		time.Sleep(5 * time.Minute) // idle ones end
		synctest.Wait()
		if in := connections("a", 2); in != 2 {
			t.Error("what has ended still counts")
		}
	})
}
