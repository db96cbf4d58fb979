package ingress

import (
	"io"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// A visitor who stops sending a body is given up on, as over HTTP/1; one who is
// slow, or whose answer has begun, is not.
func TestHTTP2SilentBodies(t *testing.T) {
	var stall time.Duration
	for _, tt := range []struct {
		name  string
		early bool            // the workload answers before the body has come
		waits []time.Duration // before each byte; the last before the end
		want  string
	}{
		{"stops", false, []time.Duration{0, 10}, "408"},
		{"never begins", false, []time.Duration{10}, "408"},
		{"slow", false, []time.Duration{0, 1, 1, 1}, "200"},
		{"both ways", true, []time.Duration{0, 10, 10}, "200"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				got := make(chan int64, 1)
				v, stop := visit2(t, func(w http.ResponseWriter, r *http.Request) {
					rc := http.NewResponseController(w)
					rc.EnableFullDuplex()
					if tt.early {
						rc.Flush()
					}
					n, err := io.Copy(io.Discard, r.Body)
					if err == nil {
						got <- n
					}
				})
				defer stop()
				stall = v.web.s.limits.Stall
				unit := func(d time.Duration) time.Duration { return d * (stall - time.Second) }
				began := time.Now()
				sent := make(chan struct{})
				pinged := make(chan [8]byte, 100)
				go func() {
					defer close(sent)
					v.begin()
					v.ask(1, "/", false)
					for i, d := range tt.waits {
						timer := time.NewTimer(unit(d))
						for waiting := true; waiting; {
							select {
							case p := <-pinged:
								v.f.WritePing(true, p)
							case <-timer.C:
								waiting = false
							}
						}
						last := i == len(tt.waits)-1
						data := []byte("x")
						if last {
							data = nil
						}
						v.f.WriteData(1, last, data)
					}
				}()
				status := ""
				for status == "" {
					f, err := v.f.ReadFrame()
					if err != nil {
						t.Fatal(err)
					}
					switch f := f.(type) {
					case *http2.PingFrame:
						if !f.IsAck() {
							pinged <- f.Data
						}
					case *http2.MetaHeadersFrame:
						status = f.PseudoValue("status")
					}
				}
				if status != tt.want {
					t.Fatalf("answered %s, want %s", status, tt.want)
				}
				if took := time.Since(began); status == "408" && (took < stall || took > stall+2*time.Second) {
					t.Error("given up after", took)
				}
				go func() { // what else comes
					for {
						f, err := v.f.ReadFrame()
						if err != nil {
							return
						}
						if p, ok := f.(*http2.PingFrame); ok && !p.IsAck() {
							select {
							case pinged <- p.Data:
							default:
							}
						}
					}
				}()
				<-sent
				if status == "200" {
					if n := <-got; n != int64(len(tt.waits)-1) {
						t.Errorf("%d bytes came", n)
					}
				}
			})
		})
	}
}

// The same over HTTP/3.
func TestHTTP3SilentBody(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })
	w := start(t, func(s *Server) {
		withQUIC(s)
		s.Limits.Stall = 300 * time.Millisecond
	}, web1("a", at))
	body, more := io.Pipe()
	defer more.Close()
	go more.Write([]byte("he"))
	res, err := w.client3().Post("https://a.example/", "text/plain", body)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusRequestTimeout {
		t.Errorf("answered %d", res.StatusCode)
	}
}
