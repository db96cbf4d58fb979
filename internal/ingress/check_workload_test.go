package ingress

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// rude is a workload that reads a request's head and says what it wants to.
func rude(t testing.TB, say string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				br := bufio.NewReader(c)
				for {
					line, err := br.ReadString('\n')
					if err != nil {
						return
					}
					if line == "\r\n" {
						break
					}
				}
				io.WriteString(c, say)
				// Unread bytes would turn the end into a reset, which may
				// overtake what was said.
				c.(*net.TCPConn).CloseWrite()
				io.Copy(io.Discard, br)
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

// A workload that breaks off or breaks rules harms its own visitors only, and
// none of them takes half an answer for a whole one.
func TestRudeWorkloads(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	for _, tt := range []struct {
		name, say string
		status    int
		whole     bool // the answer ends as it should
	}{
		{"says nothing", "", 502, true},
		{"no HTTP", "SSH-2.0-OpenSSH\r\n", 502, true},
		{"half a head", ok + "Content-Le", 502, true},
		{"endless head", ok + "X: " + strings.Repeat("x", 2*maxAnswerHead) + "\r\n\r\n", 502, true},
		{"two lengths", ok + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", 502, true},
		{"broken length", ok + "Content-Length: +5\r\n\r\nhello", 502, true},
		{"unknown encoding", ok + "Transfer-Encoding: gzip\r\n\r\nhello", 502, true},
		{"switches unasked", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nraw", 502, true},
		{"less than its length", ok + "Content-Length: 10\r\n\r\nhello", 200, false},
		{"half a chunk", ok + "Transfer-Encoding: chunked\r\n\r\na\r\nhello", 200, false},
		{"no last chunk", ok + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", 200, false},
		{"broken chunk", ok + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nxyz\r\n", 200, false},
		{"until the end", ok + "\r\nhello", 200, true},
		{"more than its length", ok + "Content-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", 200, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			good := site(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "good") })
			w := start(t, nil, web1("rude", rude(t, tt.say)), web1("good", good))
			for _, h2 := range []bool{false, true} {
				c := w.client(h2)
				for range 2 { // the second time over whatever was kept
					res, err := c.Get("https://rude.example/")
					if err != nil {
						t.Fatal(err)
					}
					b, err := io.ReadAll(res.Body)
					res.Body.Close()
					if res.StatusCode != tt.status || tt.whole != (err == nil) {
						t.Errorf("h2 %v: %d %q, %v", h2, res.StatusCode, b, err)
					}
					if own := res.Header.Get(ErrorHeader) != ""; own != (tt.status == 502) {
						t.Errorf("h2 %v: %v", h2, res.Header)
					}
					if tt.status == 200 && tt.whole && string(b) != "hello" {
						t.Errorf("h2 %v: %q", h2, b)
					}
				}
				if status, body, _ := get(t, c, "https://good.example/"); status != 200 || body != "good" {
					t.Errorf("the other one: %d %q", status, body)
				}
			}
		})
	}
}

// An answer that comes before the end of the request's body reaches the
// visitor, though the workload has no use for the rest.
func TestEarlyAnswers(t *testing.T) {
	const size = 32 << 20
	at := rude(t, "HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 3\r\n\r\nbig")
	polite := site(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		io.WriteString(w, "no")
	})
	w := start(t, nil, web1("rude", at), web1("polite", polite))
	for _, h2 := range []bool{false, true} {
		for host, want := range map[string]string{"rude": "413 big", "polite": "403 no"} {
			r, err := http.NewRequest("POST", "https://"+host+".example/", io.LimitReader(zeros{}, size))
			if err != nil {
				t.Fatal(err)
			}
			r.ContentLength = size
			res, err := w.client(h2).Do(r)
			if err != nil {
				t.Errorf("h2 %v, %s: %v", h2, host, err)
				continue
			}
			b, err := io.ReadAll(res.Body)
			res.Body.Close()
			if got := res.Status[:3] + " " + string(b); got != want || err != nil {
				t.Errorf("h2 %v, %s: %q, %v; want %s", h2, host, got, err, want)
			}
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
