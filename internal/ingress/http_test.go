package ingress

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func TestWebSocket(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
		if err != nil {
			t.Error(err)
			return
		}
		defer c.CloseNow()
		for {
			kind, b, err := c.Read(r.Context())
			if err != nil {
				return
			}
			if err := c.Write(r.Context(), kind, append([]byte("echo "), b...)); err != nil {
				return
			}
		}
	})
	w := start(t, nil, web1("ws", at))
	for _, url := range []string{"ws://ws.example/", "wss://ws.example/"} {
		c, _, err := websocket.Dial(t.Context(), url, &websocket.DialOptions{HTTPClient: w.client(false)})
		if err != nil {
			t.Fatal(url, err)
		}
		for i := range 20 {
			say := strings.Repeat(fmt.Sprint(i), 1+i*100)
			if err := c.Write(t.Context(), websocket.MessageText, []byte(say)); err != nil {
				t.Fatal(err)
			}
			if _, b, err := c.Read(t.Context()); err != nil || string(b) != "echo "+say {
				t.Fatalf("%q, %v", b, err)
			}
		}
		if err := c.Close(websocket.StatusNormalClosure, ""); err != nil {
			t.Error(err)
		}
	}
}

// upgradeSite switches to a protocol that echoes, if asked nicely; asked
// otherwise it does so unasked, as a hostile workload might.
func upgradeSite(t *testing.T) string {
	return site(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			io.WriteString(w, "no")
			return
		}
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		head := "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
		if r.URL.Path == "/unasked" {
			head = "HTTP/1.1 101 Switching Protocols\r\n\r\n"
		}
		io.WriteString(c, head)
		io.Copy(c, rw)
		io.WriteString(c, "bye")
	})
}

func TestUpgrade(t *testing.T) {
	w := start(t, nil, web1("up", upgradeSite(t)))
	const ask = "GET / HTTP/1.1\r\nHost: up.example\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"

	// Half-close passes in both directions.
	c := w.dial(w.http)
	io.WriteString(c, ask)
	br := bufio.NewReader(c)
	res, err := http.ReadResponse(br, nil)
	if err != nil || res.StatusCode != 101 {
		t.Fatal(res, err)
	}
	io.WriteString(c, "not HTTP\n\n\x00")
	c.CloseWrite()
	if got, err := io.ReadAll(br); string(got) != "not HTTP\n\n\x00bye" || err != nil {
		t.Errorf("%q, %v", got, err)
	}

	// Asked for and declined: HTTP goes on, and the filter with it.
	no := strings.Replace(ask, "/", "/no", 1)
	c = w.dial(w.http)
	br = bufio.NewReader(c)
	for range 3 {
		io.WriteString(c, no)
		res, err := http.ReadResponse(br, nil)
		if err != nil || res.StatusCode != 200 {
			t.Fatal(res, err)
		}
		io.Copy(io.Discard, res.Body)
	}
	io.WriteString(c, "GET / HTTP/1.1\nHost: up.example\n\n")
	if res, err := http.ReadResponse(br, nil); err != nil || res.StatusCode != 400 || res.Header.Get(ErrorHeader) != "ambiguous_request" {
		t.Error(res, err)
	}

	// A workload that switches unasked does not get the visitor's connection.
	if got := w.raw(w.http, "GET /unasked HTTP/1.1\r\nHost: up.example\r\nConnection: close\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 502") {
		t.Error(got)
	}
}

func TestEventsAreNotHeldBack(t *testing.T) {
	next := make(chan bool)
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := 0; <-next; i++ {
			fmt.Fprintf(w, "data: %d\n\n", i)
			http.NewResponseController(w).Flush()
		}
	})
	w := start(t, nil, web1("sse", at))
	for _, h2 := range []bool{false, true} {
		go func() { next <- true }()
		res, err := w.client(h2).Get("https://sse.example/")
		if err != nil {
			t.Fatal(err)
		}
		br := bufio.NewReader(res.Body)
		for i := range 3 {
			if i > 0 {
				next <- true // only after the one before has come through
			}
			if line, err := br.ReadString('\n'); err != nil || line != fmt.Sprintf("data: %d\n", i) {
				t.Fatalf("%q, %v", line, err)
			}
			br.ReadString('\n')
		}
		next <- false
		io.Copy(io.Discard, br)
		res.Body.Close()
	}
}

// metaHealth is the health service with headers and trailers of its own.
type metaHealth struct {
	*health.Server
}

func (m metaHealth) Check(ctx context.Context, r *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	grpc.SetHeader(ctx, metadata.Pairs("h", "header"))
	grpc.SetTrailer(ctx, metadata.Pairs("t", "trailer"))
	return m.Server.Check(ctx, r)
}

func TestGRPC(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	h := metaHealth{health.NewServer()}
	healthpb.RegisterHealthServer(srv, h)
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(l) })
	t.Cleanup(func() { srv.Stop(); wg.Wait() })

	w := start(t, nil, web1("grpc", l.Addr().String()))
	c, err := grpc.NewClient("passthrough:///grpc.example:443", grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: w.roots})),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", w.tls)
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	client := healthpb.NewHealthClient(c)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var header, trailer metadata.MD
	got, err := client.Check(ctx, &healthpb.HealthCheckRequest{}, grpc.Header(&header), grpc.Trailer(&trailer))
	if err != nil || got.Status != healthpb.HealthCheckResponse_SERVING || header.Get("h") == nil || trailer.Get("t") == nil {
		t.Fatalf("%v, %v, %v, %v", got, err, header, trailer)
	}
	if _, err := client.Check(ctx, &healthpb.HealthCheckRequest{Service: "none"}); status.Code(err) != codes.NotFound {
		t.Errorf("trailers only: %v", err)
	}
	for range 200 { // an answer that is one HEADERS frame must stay one
		if err := c.Invoke(ctx, "/none.None/None", &healthpb.HealthCheckRequest{}, &healthpb.HealthCheckResponse{}); status.Code(err) != codes.Unimplemented {
			t.Fatalf("trailers only, for an unknown service: %v", err)
		}
	}
	watch, err := client.Watch(ctx, &healthpb.HealthCheckRequest{Service: "live"})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []healthpb.HealthCheckResponse_ServingStatus{healthpb.HealthCheckResponse_SERVICE_UNKNOWN, healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING} {
		if m, err := watch.Recv(); err != nil || m.Status != s {
			t.Fatalf("%v, %v, want %v", m, err, s)
		}
		next := healthpb.HealthCheckResponse_SERVING
		if s == next {
			next = healthpb.HealthCheckResponse_NOT_SERVING
		}
		h.SetServingStatus("live", next)
	}
}

func TestExpectContinueAndEarlyHints(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/deny" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		w.Header().Set("Link", "</x.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		io.Copy(w, r.Body)
	})
	w := start(t, nil, web1("c", at))
	for _, h2 := range []bool{false, true} {
		var seen []int
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			seen = append(seen, code)
			return nil
		}})
		r, err := http.NewRequestWithContext(ctx, "POST", "https://c.example/", strings.NewReader("body"))
		if err != nil {
			t.Fatal(err)
		}
		res, err := w.client(h2).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(res.Body)
		res.Body.Close()
		if string(b) != "body" || err != nil || len(seen) == 0 || seen[0] != 103 {
			t.Errorf("h2 %v: %q, %v, 1xx %v", h2, b, err, seen)
		}
	}

	// The visitor is told to go on by the workload, not before.
	const post = "POST / HTTP/1.1\r\nHost: c.example\r\nExpect: 100-continue\r\nContent-Length: 4\r\nConnection: close\r\n\r\n"
	c := w.dial(w.http)
	c.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(c, post)
	br := bufio.NewReader(c)
	for {
		line, err := br.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(line, "HTTP/1.1 100") {
			break
		}
	}
	io.WriteString(c, "body")
	if b, _ := io.ReadAll(br); !bytes.Contains(b, []byte("200 OK")) || !bytes.Contains(b, []byte("body")) {
		t.Errorf("%s", b)
	}
	if got := w.raw(w.http, strings.Replace(post, "/", "/deny", 1)); strings.Contains(got, "100 Continue") || !strings.HasPrefix(got, "HTTP/1.1 403") {
		t.Errorf("%s", got)
	}
}

// noise is n bytes out of a block that repeats at an odd length, so that bytes
// lost, doubled or moved change the sum.
func noise(n int64) io.Reader {
	block := make([]byte, 1<<20-3)
	mathrand.NewChaCha8([32]byte{}).Read(block)
	at := 0
	return io.LimitReader(readerFunc(func(p []byte) (int, error) {
		n := copy(p, block[at:])
		at = (at + n) % len(block)
		return n, nil
	}), n)
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func sum(t testing.TB, r io.Reader) string {
	t.Helper()
	h := sha256.New()
	n, err := io.Copy(h, r)
	if err != nil {
		t.Error(err)
	}
	return fmt.Sprintf("%d %x", n, h.Sum(nil))
}

func TestLargeBodies(t *testing.T) {
	var size int64
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/up":
			io.WriteString(w, sum(t, r.Body))
		case "/down":
			io.Copy(w, noise(size))
		case "/echo": // answers while the question is still being asked
			http.NewResponseController(w).EnableFullDuplex()
			w.WriteHeader(200)
			http.NewResponseController(w).Flush()
			io.Copy(w, r.Body)
		}
	})
	w := start(t, nil, web1("big", at))
	for _, h2 := range []bool{false, true} {
		size = 64 << 20
		if h2 {
			size = 16 << 20 // the same code, more slowly
		}
		want := sum(t, noise(size))
		c := w.client(h2)
		res, err := c.Post("https://big.example/up", "", noise(size)) // chunked over HTTP/1
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(res.Body); string(b) != want || err != nil {
			t.Errorf("up: %s, %v", b, err)
		}
		res.Body.Close()
		if res, err = c.Get("https://big.example/down"); err != nil {
			t.Fatal(err)
		}
		if got := sum(t, res.Body); got != want {
			t.Errorf("down: %s", got)
		}
		res.Body.Close()
		if res, err = c.Post("https://big.example/echo", "", noise(size/8)); err != nil {
			t.Fatal(err)
		}
		if got := sum(t, res.Body); got != sum(t, noise(size/8)) {
			t.Errorf("echo: %s", got)
		}
		res.Body.Close()
	}
}

func TestTrailers(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "Announced")
		io.Copy(io.Discard, r.Body)
		io.WriteString(w, r.Trailer.Get("Sum")+r.Trailer.Get("X-Forwarded-For"))
		w.Header().Set("Announced", "a")
		w.Header().Set(http.TrailerPrefix+"Unannounced", "u")
	})
	w := start(t, nil, web1("t", at))
	for _, h2 := range []bool{false, true} {
		r, err := http.NewRequest("POST", "https://t.example", io.MultiReader(strings.NewReader("body")))
		if err != nil {
			t.Fatal(err)
		}
		r.Trailer = http.Header{"Sum": {"42"}, "X-Forwarded-For": {"evil"}}
		res, err := w.client(h2).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(res.Body)
		res.Body.Close()
		if string(b) != "42" || err != nil || res.Trailer.Get("Announced") != "a" || res.Trailer.Get("Unannounced") != "u" {
			t.Errorf("h2 %v: %q, %v, %v", h2, b, err, res.Trailer)
		}
	}
}

func TestCancelReachesTheWorkload(t *testing.T) {
	began, ended := make(chan bool), make(chan bool)
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		began <- true
		<-r.Context().Done()
		ended <- true
	})
	w := start(t, nil, web1("c", at))
	for _, h2 := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		r, err := http.NewRequestWithContext(ctx, "GET", "https://c.example", nil)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			<-began
			cancel()
		}()
		if _, err := w.client(h2).Do(r); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		<-ended
	}
}

// Two visitors, many requests with aborts in between: each gets its own answer.
func TestAnswersAreNeverMixed(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		n := r.URL.Query().Get("n")
		if len(b) > 0 && string(b) != strings.Repeat(n, 100) {
			t.Errorf("the workload got %q for %s", b, n)
		}
		io.WriteString(w, strings.Repeat(n+"\n", 300))
	})
	w := start(t, nil, web1("n", at))
	var wg sync.WaitGroup
	for visitor := range 4 {
		client := w.client(visitor%2 == 0)
		scheme := []string{"https", "http", "https", "https"}[visitor]
		wg.Go(func() {
			for i := range 250 {
				n := fmt.Sprintf("%d-%d", visitor, i)
				ctx, cancel := context.WithCancel(t.Context())
				var body io.Reader
				if i%3 == 0 {
					body = strings.NewReader(strings.Repeat(n, 100))
				}
				r, err := http.NewRequestWithContext(ctx, []string{"POST", "GET", "GET"}[i%3], scheme+"://n.example/?n="+n, body)
				if err != nil {
					t.Error(err)
					cancel()
					return
				}
				if i%5 == 0 {
					go cancel() // at any moment
				}
				res, err := client.Do(r)
				if err == nil {
					if i%7 == 0 {
						io.ReadFull(res.Body, make([]byte, 10)) // and leaves
					} else if b, err := io.ReadAll(res.Body); err == nil && string(b) != strings.Repeat(n+"\n", 300) {
						t.Errorf("%s got %.60q", n, b)
					} else if err != nil && i%5 != 0 {
						t.Errorf("%s: %v", n, err)
					}
					res.Body.Close()
				} else if i%5 != 0 {
					t.Errorf("%s: %v", n, err)
				}
				cancel()
			}
		})
	}
	wg.Wait()
}

// A visitor who resets streams as fast as it can is cut off or slowed down;
// others are served meanwhile.
func TestRapidReset(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok") })
	w := start(t, nil, web1("r", at))
	c, err := tls.Dial("tcp", w.tls, &tls.Config{ServerName: "r.example", RootCAs: w.roots, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var wg sync.WaitGroup
	wg.Go(func() { io.Copy(io.Discard, c) })
	stop := make(chan struct{})
	wg.Go(func() {
		io.WriteString(c, http2.ClientPreface)
		f := http2.NewFramer(c, nil)
		f.WriteSettings()
		var block bytes.Buffer
		enc := hpack.NewEncoder(&block)
		for _, kv := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", "r.example"}, {":path", "/"}} {
			enc.WriteField(hpack.HeaderField{Name: kv[0], Value: kv[1]})
		}
		first := bytes.Clone(block.Bytes())
		for id := uint32(1); ; id += 2 {
			select {
			case <-stop:
				return
			default:
			}
			if f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: first, EndStream: true, EndHeaders: true}) != nil || f.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
				return // cut off
			}
		}
	})
	other := w.client(true)
	for range 50 {
		if status, body, _ := get(t, other, "https://r.example/"); status != 200 || body != "ok" {
			t.Fatal(status, body)
		}
	}
	close(stop)
	c.Close()
	wg.Wait()
}

func TestRefusedOverHTTP(t *testing.T) {
	at := site(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	w := start(t, nil, web1("a", at))
	for _, tt := range []struct{ name, in, want string }{
		{"smuggling", "POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "HTTP/1.1 400"},
		{"CONNECT", "CONNECT a.example:80 HTTP/1.1\r\nHost: a.example:80\r\n\r\n", "HTTP/1.1 405"},
		{"TRACE", "TRACE / HTTP/1.1\r\nHost: a.example\r\n\r\n", "HTTP/1.1 405"},
		{"large", "GET / HTTP/1.1\r\nHost: a.example\r\nX: " + strings.Repeat("x", maxHead) + "\r\n\r\n", "HTTP/1.1 431"},
		{"bad chunk", "POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "HTTP/1.1 400"},
		{"TLS port", "", ""},
	} {
		if tt.in == "" {
			if got := w.raw(w.tls, "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 400") || !strings.Contains(got, "plain_http") {
				t.Errorf("%s: %q", tt.name, got)
			}
			continue
		}
		if got := w.raw(w.http, tt.in); !strings.HasPrefix(got, tt.want) || strings.Count(got, "HTTP/1.1 ") != 1 {
			t.Errorf("%s: %q", tt.name, got)
		}
	}
}
