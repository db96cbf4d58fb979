package ingress

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"webgw.dev/webgw/internal/netx/memnet"
)

// visitor2 speaks HTTP/2 frame by frame, in clear text, to a gateway in a bubble.
type visitor2 struct {
	t     testing.TB
	c     net.Conn
	f     *http2.Framer
	block bytes.Buffer
	enc   *hpack.Encoder
	ended chan struct{} // the gateway is through with the connection
	web   *web
}

// visit2 connects a visitor in front of a workload.
func visit2(t *testing.T, h http.HandlerFunc) (v *visitor2, stop func()) {
	n := memnet.New(1)
	gw, home := n.Host("gw.example"), n.Host("home.example")
	end := workloadIn(t, home, h)
	s := &Server{Net: gw, Upstream: &dialer{net: gw}}
	table, problems := Build([]Declared{web1("a", "home.example:8080")})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	s.SetTable(table)
	v = speak2(t, s)
	return v, func() {
		v.c.Close()
		<-v.ended
		for _, r := range table.routes {
			for _, target := range r.targets {
				target.closeIdle()
			}
		}
		end()
	}
}

// speak2 connects a visitor, who has said the preface and an empty SETTINGS.
func speak2(t testing.TB, s *Server) *visitor2 {
	s.setup()
	near, far := net.Pipe()
	v := &visitor2{t: t, c: near, f: http2.NewFramer(near, near), ended: make(chan struct{}), web: s.web}
	v.f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	v.enc = hpack.NewEncoder(&v.block)
	inside := &visit{server: s}
	inside.gone.Store(true)
	go func() {
		defer close(v.ended)
		s.web.serve2(&visitConn{Conn: far, v: inside})
	}()
	return v
}

func (v *visitor2) begin(settings ...http2.Setting) {
	if _, err := io.WriteString(v.c, http2.ClientPreface); err != nil {
		v.t.Fatal(err)
	}
	v.must(v.f.WriteSettings(settings...))
}

func (v *visitor2) must(err error) {
	v.t.Helper()
	if err != nil {
		v.t.Fatal(err)
	}
}

// ask begins a stream.
func (v *visitor2) ask(id uint32, path string, end bool) {
	v.t.Helper()
	v.block.Reset()
	for _, f := range [][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", "a.example"}, {":path", path}} {
		v.must(v.enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}))
	}
	v.must(v.f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: v.block.Bytes(), EndHeaders: true, EndStream: end}))
}

// until reads until a frame is what is looked for, or the connection's end.
func (v *visitor2) until(is func(http2.Frame) bool) error {
	for {
		f, err := v.f.ReadFrame()
		if err != nil {
			return err
		}
		if is(f) {
			return nil
		}
	}
}

func isGoAway(code http2.ErrCode) func(http2.Frame) bool {
	return func(f http2.Frame) bool {
		g, ok := f.(*http2.GoAwayFrame)
		return ok && g.ErrCode == code
	}
}

func isPing(f http2.Frame) bool {
	p, ok := f.(*http2.PingFrame)
	return ok && !p.IsAck()
}

// A silent visitor is let go after a while; one with an open stream is asked
// first whether it is there.
func TestHTTP2Silence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan bool)
		v, stop := visit2(t, func(w http.ResponseWriter, r *http.Request) { <-release })
		defer stop()
		began := time.Now()
		go v.begin()
		v.must(v.until(isGoAway(http2.ErrCodeNo)))
		if took := time.Since(began); took < v.web.s.limits.Idle || took > v.web.s.limits.Idle+2*time.Second {
			t.Error("idle for", took)
		}
		close(release)
	})
	synctest.Test(t, func(t *testing.T) {
		gone := make(chan bool)
		v, stop := visit2(t, func(w http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			close(gone)
		})
		defer stop()
		go func() {
			v.begin()
			v.ask(1, "/", true)
		}()
		for range 5 { // it is there
			v.must(v.until(isPing))
			v.must(v.f.WritePing(true, [8]byte{}))
		}
		v.must(v.until(isPing)) // and now it is not
		asked := time.Now()
		for {
			if _, err := v.f.ReadFrame(); err != nil {
				break
			}
		}
		<-gone // the workload learns of it
		if took := time.Since(asked); took < pingTime || took > pingTime+5*time.Second {
			t.Error("given up after", took)
		}
	})
}

// A stream that is not read is ended after a time, and holds up no other.
func TestHTTP2SlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, stop := visit2(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/large" {
				io.Copy(w, noise(1<<20))
			}
		})
		defer stop()
		began := time.Now()
		go func() {
			v.begin(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
			v.ask(1, "/large", true)
			v.ask(3, "/small", true)
		}()
		v.must(v.until(func(f http2.Frame) bool {
			return f.Header().StreamID == 3 && f.Header().Flags.Has(http2.FlagHeadersEndStream)
		}))
		if took := time.Since(began); took > time.Second {
			t.Error("the other one took", took)
		}
		v.must(v.until(func(f http2.Frame) bool {
			if p, ok := f.(*http2.PingFrame); ok && !p.IsAck() {
				v.must(v.f.WritePing(true, p.Data))
			}
			r, ok := f.(*http2.RSTStreamFrame)
			return ok && r.StreamID == 1 && r.ErrCode == http2.ErrCodeCancel
		}))
		if took, stall := time.Since(began), v.web.s.limits.Stall; took < stall || took > stall+2*time.Second {
			t.Error("ended after", took)
		}
	})
}

// What costs the visitor little costs the gateway little.
func TestHTTP2Floods(t *testing.T) {
	for name, flood := range map[string]func(v *visitor2) error{
		"ping":     func(v *visitor2) error { return v.f.WritePing(false, [8]byte{}) },
		"settings": func(v *visitor2) error { return v.f.WriteSettings() },
		"reset": func(v *visitor2) error {
			return v.f.WriteRawFrame(http2.FrameWindowUpdate, 0, 1, []byte{0, 0, 0, 0}) // a stream error each
		},
	} {
		t.Run(name, func(t *testing.T) { // whoever does not read the answers is not read either
			synctest.Test(t, func(t *testing.T) {
				v, stop := visit2(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })
				defer stop()
				v.begin()
				v.ask(1, "/", false)
				v.must(v.c.SetWriteDeadline(time.Now().Add(time.Second)))
				n := 0
				for ; n < 1_000_000; n++ {
					if err := flood(v); err != nil {
						break
					}
				}
				if n*9 > 8*maxPending {
					t.Errorf("%d frames were taken", n)
				}
			})
		})
	}
	t.Run("empty frames", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			v, stop := visit2(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })
			defer stop()
			go func() {
				v.begin()
				v.ask(1, "/", false)
				for v.f.WriteData(1, false, nil) == nil {
				}
			}()
			v.must(v.until(isGoAway(http2.ErrCodeEnhanceYourCalm)))
		})
	})
	t.Run("fields without end", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			v, stop := visit2(t, func(w http.ResponseWriter, r *http.Request) { t.Error("asked") })
			defer stop()
			count := make(chan int)
			go func() {
				sent := 0
				defer func() { count <- sent }()
				v.begin()
				v.enc.WriteField(hpack.HeaderField{Name: ":method", Value: "GET"})
				v.f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: v.block.Bytes()})
				for ; sent < 1000; sent++ {
					v.block.Reset()
					v.enc.WriteField(hpack.HeaderField{Name: "x", Value: strings.Repeat("y", 10_000), Sensitive: true})
					if v.f.WriteContinuation(1, false, v.block.Bytes()) != nil {
						return
					}
				}
			}()
			if err := v.until(func(f http2.Frame) bool { _, ok := f.(*http2.GoAwayFrame); return ok }); err != nil && !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			v.c.Close()
			if sent := <-count; sent > 100 {
				t.Error(sent, "frames of fields were taken")
			}
		})
	})
}

// A setting may be stated twice (RFC 9113 section 6.5.3): the later counts.
func TestHTTP2SettingTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, stop := visit2(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, strings.Repeat("x", 1000)) })
		defer stop()
		go func() {
			v.begin(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 700})
			v.ask(1, "/", true)
		}()
		v.must(v.until(func(f http2.Frame) bool {
			d, ok := f.(*http2.DataFrame)
			if ok && d.Length != 700 {
				t.Errorf("%d bytes", d.Length)
			}
			return ok
		}))
	})
}

// At the end, requests under way are answered, and no others.
func TestHTTP2Drain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan bool)
		v, stop := visit2(t, func(w http.ResponseWriter, r *http.Request) {
			<-release
			io.WriteString(w, "done")
		})
		defer stop()
		go func() {
			v.begin()
			v.ask(1, "/", true)
			synctest.Wait()
			go v.web.drain()
		}()
		v.must(v.until(func(f http2.Frame) bool {
			g, ok := f.(*http2.GoAwayFrame)
			return ok && g.LastStreamID == 1 && g.ErrCode == http2.ErrCodeNo
		}))
		v.ask(3, "/", true)
		close(release)
		answered := false
		if err := v.until(func(f http2.Frame) bool {
			d, ok := f.(*http2.DataFrame)
			answered = answered || ok && d.StreamID == 1 && string(d.Data()) == "done"
			return f.Header().StreamID == 3
		}); !answered || err != io.EOF {
			t.Error(answered, err)
		}
	})
}

// Whatever a visitor says, what it hears is well-formed, and no stream is
// answered twice.
func FuzzHTTP2(f *testing.F) {
	f.Add(written(f, func(f *http2.Framer, block func(...string) []byte) {
		f.WriteSettings(http2.Setting{ID: 4, Val: 1}, http2.Setting{ID: 4, Val: 2})
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block(":method", "POST", ":scheme", "http", ":path", "/", ":authority", "a.example"), EndHeaders: true, PadLength: 3})
		f.WriteData(1, false, []byte("x"))
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block("x-sum", "1"), EndHeaders: true, EndStream: true})
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: block(":method", "GET", ":scheme", "http", ":path", "/?x", ":authority", "b.example"), EndHeaders: true, EndStream: true})
		f.WriteWindowUpdate(3, 1000)
		f.WriteRSTStream(3, 8)
		f.WritePing(false, [8]byte{1})
	})[len(http2.ClientPreface):])
	f.Fuzz(func(t *testing.T, in []byte) {
		v := speak2(t, &Server{})
		go func() {
			defer v.c.Close()
			if _, err := io.WriteString(v.c, http2.ClientPreface); err == nil {
				v.c.Write(in) // it may be cut off
			}
		}()
		final := map[uint32]bool{}
		for {
			f, err := v.f.ReadFrame()
			if err != nil {
				var stream http2.StreamError
				var conn http2.ConnectionError
				if errors.As(err, &stream) || errors.As(err, &conn) {
					t.Fatal(err)
				}
				break
			}
			if m, ok := f.(*http2.MetaHeadersFrame); ok && len(m.PseudoFields()) > 0 && m.PseudoValue("status") >= "200" {
				if final[m.StreamID] {
					t.Fatal("two answers to stream", m.StreamID)
				}
				final[m.StreamID] = true
			}
		}
		<-v.ended
	})
}
