//go:build linux

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// echo answers with the nonce of the request, in a field and all over the body;
// in some ways that make a connection hard to use again.
func echo(w http.ResponseWriter, r *http.Request) {
	nonce := r.URL.Query().Get("nonce")
	if nonce == "" {
		return
	}
	size, err := strconv.Atoi(r.URL.Query().Get("size"))
	if err != nil {
		http.Error(w, err.Error(), 400)
		return
	}
	w.Header().Set("X-Nonce", nonce)
	if r.URL.Path == "/read" {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return // given up
		}
		if !bytes.Equal(b, repeat(nonce, len(b))) {
			http.Error(w, "another's body", 500)
			return
		}
	}
	if r.URL.Path == "/unread" { // answers before the body is there, and never reads it
		w.WriteHeader(http.StatusAccepted)
	}
	w.Write(repeat(nonce, size))
}

func repeat(nonce string, size int) []byte {
	return bytes.Repeat([]byte(nonce), size/len(nonce)+1)[:size]
}

// TestNoAnswerReachesAnother has two visitors, one by HTTP/1.1 and one by
// HTTP/2, ask a lot and give up at random moments.
func TestNoAnswerReachesAnother(t *testing.T) {
	requests := 10_000
	if testing.Short() {
		requests = 1000
	}
	g := startGateway(t)
	g.startNode()
	s := httptest.NewServer(http.HandlerFunc(echo))
	t.Cleanup(s.Close)
	host := g.exposeHTTP("echo", s.Listener.Addr().String())
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var answered, aborted atomic.Int64
	var visitors sync.WaitGroup
	for v, base := range []string{fmt.Sprintf("http://127.0.0.1:%d", g.httpPort), fmt.Sprintf("https://127.0.0.1:%d", g.tlsPort)} {
		transport := &http.Transport{TLSClientConfig: insecure(host), ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 16}
		t.Cleanup(transport.CloseIdleConnections)
		client := &http.Client{Transport: transport}
		for worker := range uint64(16) {
			visitors.Go(func() {
				random := rand.New(rand.NewPCG(seed, uint64(v)<<32|worker))
				for i := range requests / 16 {
					nonce := fmt.Sprintf("<%d-%d-%d-%x>", v, worker, i, random.Uint64())
					err := ask(t.Context(), client, random, base, host, nonce)
					switch {
					case err == nil:
						answered.Add(1)
					case errors.Is(err, errGivenUp):
						aborted.Add(1)
					default:
						t.Errorf("%s: %v", nonce, err)
						return
					}
				}
			})
		}
	}
	visitors.Wait()
	t.Logf("%d answered, %d given up", answered.Load(), aborted.Load())
	if a := aborted.Load(); a < int64(requests)/20 || answered.Load() < int64(requests) {
		t.Errorf("%d answered, %d given up: too few of one", answered.Load(), a)
	}
}

var errGivenUp = errors.New("given up")

// ask asks once and checks that the answer is its own. One in five gives up: at
// some moment, or in the middle of its own body, or of the answer's.
func ask(ctx context.Context, client *http.Client, random *rand.Rand, base, host, nonce string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	path := []string{"/get", "/read", "/unread"}[random.IntN(3)]
	size := random.IntN(3000)
	if random.IntN(20) == 0 {
		size = 300_000
	}
	var body io.Reader
	method := "GET"
	way := random.IntN(15) // 0: at some moment, 1: in the request's body, 2: in the answer's
	if path != "/get" {
		method, body = "POST", bytes.NewReader(repeat(nonce, random.IntN(5000)))
		if way == 1 {
			body = io.MultiReader(body, failing{})
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("%s%s?nonce=%s&size=%d", base, path, nonce, size), body)
	if err != nil {
		return err
	}
	req.Host = host
	if way == 0 {
		timer := time.AfterFunc(time.Duration(random.IntN(3000))*time.Microsecond, cancel)
		defer timer.Stop()
	}
	res, err := client.Do(req)
	if err == nil {
		defer res.Body.Close()
		if got := res.Header.Get("X-Nonce"); got != nonce {
			return fmt.Errorf("%s: %s %s, the answer to %q", path, res.Status, res.Header.Get("Webgw-Error"), got)
		}
		read := int64(size) + 1
		if way == 2 {
			read = int64(size) / 2
		}
		var b []byte
		if b, err = io.ReadAll(io.LimitReader(res.Body, read)); !bytes.Equal(b, repeat(nonce, len(b))) {
			return fmt.Errorf("%s: the body of another", path)
		}
		if err == nil && way == 2 {
			return errGivenUp
		}
		if err == nil && (len(b) != size || res.StatusCode > 299) {
			return fmt.Errorf("%s: %s and %d bytes, want %d", path, res.Status, len(b), size)
		}
	}
	if err != nil && (way == 0 && errors.Is(err, context.Canceled) || errors.Is(err, errGivenUp)) {
		return errGivenUp
	}
	return err
}

// failing is the rest of a body that never comes.
type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errGivenUp }

// TestSlowVisitors has 500 visitors that are as slow as they can be, and sees
// that nobody else waits.
func TestSlowVisitors(t *testing.T) {
	g := startGateway(t)
	g.startNode()
	var sent atomic.Int64 // of the answers that nobody reads
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/large" {
			b := make([]byte, 1<<16)
			for n, err := w.Write(b); err == nil; n, err = w.Write(b) {
				sent.Add(int64(n))
			}
			return
		}
		io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, "hello")
	}))
	t.Cleanup(s.Close)
	host := g.exposeHTTP("slow", s.Listener.Addr().String())
	plain, secure := fmt.Sprintf("127.0.0.1:%d", g.httpPort), fmt.Sprintf("127.0.0.1:%d", g.tlsPort)
	manners := []struct {
		name, address string
		tls           bool
		at            string // sent at once
		rest          string // sent byte by byte
	}{
		{"silent", plain, false, "", ""},
		{"silent before TLS", secure, false, "", ""},
		{"a slow ClientHello", secure, false, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "0123456789012345678901234567890123456789"},
		{"silent in TLS", secure, true, "", ""},
		{"a slow head", plain, false, "GET / HTTP/1.1\r\nHost: " + host + "\r\n", "X-A: b\r\nX-C: d\r\nX-E: f\r\nX-G: h\r\nX-I: j\r\nX-K: l\r\n"},
		{"a slow head in TLS", secure, true, "GET / HTTP/1.1\r\nHost: " + host + "\r\n", "X-A: b\r\nX-C: d\r\nX-E: f\r\nX-G: h\r\nX-I: j\r\nX-K: l\r\n"},
		{"a slow body", plain, false, "POST / HTTP/1.1\r\nHost: " + host + "\r\nContent-Length: 1000\r\n\r\n", "0123456789012345678901234567890123456789"},
		{"slow chunks", secure, true, "POST / HTTP/1.1\r\nHost: " + host + "\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\na\r\n1\r\na\r\n1\r\na\r\n1\r\na\r\n1\r\na\r\n"},
		{"slow to read", plain, false, "GET /large HTTP/1.1\r\nHost: " + host + "\r\n\r\n", ""},
		{"slow to read in TLS", secure, true, "GET /large HTTP/1.1\r\nHost: " + host + "\r\n\r\n", ""},
	}
	ctx, cancel := context.WithCancel(t.Context())
	var slow sync.WaitGroup
	defer slow.Wait()
	defer cancel()
	const visitors = 500
	there := make(chan error, visitors)
	for i := range visitors {
		m := manners[i%len(manners)]
		slow.Go(func() {
			c, err := net.Dial("tcp", m.address)
			if err != nil {
				there <- fmt.Errorf("%s: %w", m.name, err)
				return
			}
			defer c.Close()
			err = c.(*net.TCPConn).SetReadBuffer(4 << 10)
			if m.tls && err == nil {
				t := tls.Client(c, insecure(host))
				err, c = t.HandshakeContext(ctx), t
			}
			if err == nil {
				_, err = io.WriteString(c, m.at)
			}
			there <- err
			for tick := time.NewTicker(100 * time.Millisecond); ; {
				select {
				case <-ctx.Done():
					tick.Stop()
					return
				case <-tick.C:
				}
				if m.rest != "" && err == nil { // the gateway may end it
					_, err = io.WriteString(c, m.rest[:1])
					m.rest = m.rest[1:]
				}
			}
		})
	}
	for range visitors {
		if err := <-there; err != nil {
			t.Fatal(err)
		}
	}
	// First the kernels' buffers fill, as fast as they can: that is load, not
	// slowness.
	last := int64(-1)
	g.wait("full buffers", func() error {
		before := last
		if last = sent.Load(); last != before {
			time.Sleep(200 * time.Millisecond)
			return fmt.Errorf("%d bytes were sent, %d before", last, before)
		}
		return nil
	})
	t.Logf("%d MB stand in buffers", last>>20)
	var worst time.Duration
	for i := range 40 {
		for _, base := range []string{"http://" + plain, "https://" + secure} {
			began := time.Now()
			transport := &http.Transport{TLSClientConfig: insecure(host), ForceAttemptHTTP2: i%2 == 0} // a new connection
			req, err := http.NewRequestWithContext(ctx, "POST", base+"/", bytes.NewReader(make([]byte, 1000)))
			if err != nil {
				t.Fatal(err)
			}
			req.Host = host
			res, err := transport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(res.Body)
			if err != nil || string(b) != "hello" {
				t.Fatalf("%s: %s %q, %v", base, res.Status, b, err)
			}
			transport.CloseIdleConnections()
			worst = max(worst, time.Since(began))
		}
		time.Sleep(50 * time.Millisecond) // over some time of the slow ones' dripping
	}
	t.Logf("the slowest of 80 requests took %v", worst)
	if worst > time.Second {
		t.Errorf("a request beside slow visitors took %v, want less than 1 s", worst)
	}
}
