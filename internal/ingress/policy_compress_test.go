package ingress

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"webgw.dev/webgw"
)

// unpacked reads a body by its content coding.
func unpacked(t *testing.T, coding string, r io.Reader) string {
	t.Helper()
	var err error
	switch coding {
	case "gzip":
		r, err = gzip.NewReader(r)
	case "zstd":
		var z *zstd.Decoder
		z, err = zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(8<<20))
		if err == nil {
			defer z.Close()
			r = z
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestAnswersAreCompressed(t *testing.T) {
	text := strings.Repeat("a text that is worth it, ", 4000)
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		h, q := w.Header(), r.URL.Query()
		h.Set("Content-Type", "text/html; charset=utf-8")
		for name := range q {
			if name != "status" && name != "size" {
				h.Set(name, q.Get(name))
			}
		}
		body := text
		if n, err := strconv.Atoi(q.Get("size")); err == nil {
			body = text[:n]
			h.Set("Content-Length", strconv.Itoa(n))
		}
		if n, err := strconv.Atoi(q.Get("status")); err == nil {
			w.WriteHeader(n)
			if n == 204 || n == 304 {
				return
			}
		}
		io.WriteString(w, body)
	})
	for _, upstream := range []webgw.Upstream{webgw.UpstreamHTTP1, webgw.UpstreamH2C} {
		packed := under(web1("a", at), webgw.Policy{Compress: &webgw.Compress{}})
		packed.Exposure.Upstream = upstream
		w := start(t, withQUIC, packed, web1("plain", at))
		clients := map[string]*http.Client{"h1": w.client(false), "h2": w.client(true), "h3": w.client3()}
		for version, c := range clients {
			for _, tt := range []struct{ name, accept, query, want, vary string }{
				{"gzip", "gzip", "", "gzip", "Accept-Encoding"},
				{"the better of two", "gzip, br, zstd", "", "zstd", "Accept-Encoding"},
				{"the one liked better", "gzip;q=0.9, zstd;q=0.5", "", "gzip", "Accept-Encoding"},
				{"any", "*", "", "zstd", "Accept-Encoding"},
				{"any but one", "*, zstd;q=0", "", "gzip", "Accept-Encoding"},
				{"none", "gzip;q=0", "", "", "Accept-Encoding"},
				{"unknown", "br", "", "", "Accept-Encoding"},
				{"nonsense", "gzip;q=NaN, zstd;q=2", "", "", "Accept-Encoding"},
				{"known length", "gzip", "size=100000", "gzip", "Accept-Encoding"},
				{"small", "gzip", "size=1023", "", ""},
				{"just large enough", "gzip", "size=1024", "gzip", "Accept-Encoding"},
				{"empty", "gzip", "size=0", "", ""},
				{"image", "gzip", "Content-Type=image/png", "", ""},
				{"no type", "gzip", "Content-Type=", "", ""},
				{"stream of events", "gzip", "Content-Type=text/event-stream", "", ""},
				{"error of the workload's", "gzip", "status=500", "gzip", "Accept-Encoding"},
				{"no content", "gzip", "status=204", "", ""},
				{"not modified", "gzip", "status=304", "", ""},
				{"part", "gzip", "status=206&Content-Range=bytes+0-99999/200000", "", ""},
				{"encoded already", "gzip", "Content-Encoding=br", "br", ""},
				{"not to be changed", "gzip", "Cache-Control=public,+no-transform", "", ""},
				{"digest", "gzip", "Repr-Digest=sha-256=:AAAA:", "", ""},
				{"varies already", "gzip", "Vary=Cookie", "gzip", "Cookie, Accept-Encoding"},
				{"varies by all", "gzip", "Vary=*", "gzip", "*"},
			} {
				r, err := http.NewRequestWithContext(t.Context(), "GET", "https://a.example/?"+tt.query, nil)
				if err != nil {
					t.Fatal(err)
				}
				r.Header.Set("Accept-Encoding", tt.accept)
				res, err := c.Do(r)
				if err != nil {
					t.Fatal(version, tt.name, err)
				}
				coding := res.Header.Get("Content-Encoding")
				if vary := strings.Join(res.Header["Vary"], ", "); coding != tt.want || vary != tt.vary {
					t.Errorf("%s, %s, %s: %q, Vary: %q", upstream, version, tt.name, coding, vary)
				}
				got := unpacked(t, coding, res.Body)
				res.Body.Close()
				if len(got) > 0 && !strings.HasPrefix(text, got) || res.StatusCode == 200 && tt.query == "" && got != text {
					t.Errorf("%s, %s: %d bytes that are not the text", version, tt.name, len(got))
				}
			}
			_, _, h := fetch(t, c, "GET", "https://a.example/?Etag=%22x%22&Accept-Ranges=bytes", "", "Accept-Encoding", "zstd")
			if h.Get("Etag") != `W/"x"` || h.Get("Accept-Ranges") != "" {
				t.Error(version, h)
			}
			if _, body, h := fetch(t, c, "HEAD", "https://a.example/", "", "Accept-Encoding", "zstd"); h.Get("Content-Encoding") != "zstd" || body != "" {
				t.Error(version, "HEAD:", h)
			}
			if _, body, h := fetch(t, c, "GET", "https://plain.example/", "", "Accept-Encoding", "gzip"); h.Get("Content-Encoding") != "" || h.Get("Vary") != "" || body != text {
				t.Error(version, "without a policy:", h)
			}
		}
		for _, a := range w.accesses() {
			if a.Exposure.Name == "a" && a.Method == "GET" && a.BytesOut > int64(len(text)) {
				t.Error("more than the text has been counted:", a.BytesOut)
			}
		}
		if n := w.compressing.Load(); n != 0 {
			t.Error("compressors that nobody gave back:", n)
		}
	}
}

func TestCompressionIsBounded(t *testing.T) {
	text := strings.Repeat("text", 1000)
	at := site(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, text) })
	w := start(t, nil, under(web1("a", at), webgw.Policy{Compress: &webgw.Compress{Types: []string{"text/*"}, MinSize: 10}}))
	w.compressing.Store(maxCompressing)
	if _, body, h := fetch(t, w.client(false), "GET", "https://a.example/", "", "Accept-Encoding", "gzip"); h.Get("Content-Encoding") != "" || body != text || h.Get("Vary") != "Accept-Encoding" {
		t.Error(h)
	}
	w.compressing.Store(0)
	var all sync.WaitGroup
	for range 20 { // encoders go from one to the other
		all.Go(func() {
			r, err := http.NewRequestWithContext(t.Context(), "GET", "https://a.example/", nil)
			if err != nil {
				t.Error(err)
				return
			}
			r.Header.Set("Accept-Encoding", "zstd")
			res, err := w.client(true).Do(r)
			if err != nil {
				t.Error(err)
				return
			}
			defer res.Body.Close()
			z, err := zstd.NewReader(res.Body)
			if err != nil {
				t.Error(err)
				return
			}
			defer z.Close()
			if b, err := io.ReadAll(z); string(b) != text {
				t.Errorf("%d bytes, %v", len(b), err)
			}
		})
	}
	all.Wait()
}

// What a workload flushes arrives at once, compressed or not; a body that is cut
// is never made to look whole.
func TestCompressedStreamsAreFlushed(t *testing.T) {
	next := make(chan bool)
	at := site(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := 0; <-next; i++ {
			fmt.Fprintf(w, "data: %d\n\n", i)
			http.NewResponseController(w).Flush()
		}
		panic(http.ErrAbortHandler)
	})
	w := start(t, withQUIC, under(web1("a", at), webgw.Policy{Compress: &webgw.Compress{Types: []string{"text/event-stream"}}}))
	for version, c := range map[string]*http.Client{"h1": w.client(false), "h2": w.client(true), "h3": w.client3()} {
		go func() { next <- true }()
		r, err := http.NewRequestWithContext(t.Context(), "GET", "https://a.example/", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Accept-Encoding", "gzip")
		res, err := c.Do(r)
		if err != nil {
			t.Fatal(version, err)
		}
		z, err := gzip.NewReader(res.Body)
		if err != nil {
			t.Fatal(version, err)
		}
		br := bufio.NewReader(z)
		for i := range 3 {
			if i > 0 {
				next <- true
			}
			if line, err := br.ReadString('\n'); err != nil || line != fmt.Sprintf("data: %d\n", i) {
				t.Fatalf("%s: %q, %v", version, line, err)
			}
			br.ReadString('\n')
		}
		next <- false
		if _, err := io.Copy(io.Discard, br); err == nil {
			t.Error(version, "the cut body looks whole")
		}
		res.Body.Close()
	}
}
