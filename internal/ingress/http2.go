package ingress

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"webgw.dev/webgw/internal/netx"
)

// Limits of HTTP/2.
const (
	maxStreams = 250      // of one connection at once
	maxFrame   = 16 << 10 // bytes of payload that are taken: the least that must be; and sent
	hpackTable = 4 << 10  // SETTINGS_HEADER_TABLE_SIZE, which is left at its default

	// What a visitor may send ahead of the workload, bytes.
	streamAhead = 1 << 20
	connAhead   = 1 << 20

	// Bytes to be written, from which on streams wait to add data; at twice as
	// many nothing is read that would have to be answered.
	maxPending = 256 << 10

	// Workers that wait for another stream; their stacks have grown.
	maxWorkers = 100

	// Empty frames in a row that are borne.
	maxEmpty = 100

	quietTime = 30 * time.Second // with streams open; then the visitor is asked whether it is there
	pingTime  = 15 * time.Second // for the answer to that

	// How long a connection on which nothing was asked may still ask when the
	// gateway stops.
	arrivalTime = time.Second
)

var (
	errPreface = errors.New("ingress: HTTP/2 was agreed on, and something else is spoken")
	errReset   = errors.New("ingress: the stream has ended")
	errStall   = errors.New("ingress: the visitor takes nothing")
)

// conn2 is a visitor's connection (decrypted) that speaks HTTP/2. One goroutine
// reads frames, one writes what has gathered, and each stream is served by a
// worker that goes on to the next.
type conn2 struct {
	web    *web
	c      net.Conn
	info   connInfo
	limits *Limits
	began  time.Time

	// Of the reader.
	framer  *http2.Framer
	settled bool // the visitor's first settings have come
	empty   int  // frames in a row

	mu       sync.Mutex
	deadline time.Time // of reads
	streams  map[uint32]*stream2
	last     uint32   // highest id that was begun
	reset    []uint32 // streams ended from this side lately: more of them may be on its way
	running  int      // streams being served
	workers  []chan *stream2
	idle     time.Time // since when there are no streams
	pinged   bool      // and not answered
	unacked  bool      // our settings
	draining bool
	away     bool // GOAWAY was sent: no new streams
	ended    bool // nothing is read any more, and written what there is

	out, spare []byte // to be written
	fields     *hpack.Encoder
	block      bytes.Buffer
	window     int64 // that may be sent
	ahead      int64 // that may come
	taken      int64 // of what has come, and not yet been made room for
	streamWin  int64 // of new streams, to be sent
	waiting    []*stream2
	more       sync.Cond // of the writer: there is something in out
	room       sync.Cond // of the reader: there is room in out, or a stream less is running
	written    chan struct{}
}

// serve2 serves a connection to its end.
func (w *web) serve2(c net.Conn) {
	now := time.Now()
	h := &conn2{web: w, c: c, info: connOf(c), limits: &w.s.limits, began: now, idle: now, streams: map[uint32]*stream2{},
		window: 65535, ahead: connAhead, streamWin: 65535, unacked: true, written: make(chan struct{})}
	h.more.L, h.room.L = &h.mu, &h.mu
	h.fields = hpack.NewEncoder(&h.block)
	in := bufio.NewReaderSize(readerOf(h.read), firstRead)
	h.framer = http2.NewFramer(nil, in)
	h.framer.SetMaxReadFrameSize(maxFrame)
	h.framer.SetReuseFrames()
	h.framer.ReadMetaHeaders = hpack.NewDecoder(hpackTable, nil)
	h.framer.MaxHeaderListSize = maxHead
	defer c.Close()
	if !w.add(h) {
		return
	}
	defer w.remove(h)
	go h.write()
	err := h.converse(in)
	h.mu.Lock()
	if e, ok := errors.AsType[http2.ConnectionError](err); ok {
		h.goAwayLocked(http2.ErrCode(e))
	}
	told := h.away
	h.finishLocked()
	h.mu.Unlock()
	h.end()
	<-h.written
	if told {
		h.linger()
	}
}

type readerOf func(p []byte) (int, error)

func (f readerOf) Read(p []byte) (int, error) { return f(p) }

// converse reads frames until nothing more is to be read.
func (h *conn2) converse(in io.Reader) error {
	var preface [len(http2.ClientPreface)]byte
	for n := range preface { // byte by byte out of the buffer: what is wrong shows at once
		if _, err := io.ReadFull(in, preface[n:n+1]); err != nil {
			return err
		}
		if preface[n] != http2.ClientPreface[n] {
			return errPreface
		}
	}
	h.mu.Lock()
	h.frameLocked(http2.FrameSettings, 0, 0, 6*3)
	for _, s := range []http2.Setting{{ID: http2.SettingMaxConcurrentStreams, Val: maxStreams}, {ID: http2.SettingMaxHeaderListSize, Val: maxHead}, {ID: http2.SettingInitialWindowSize, Val: streamAhead}} {
		h.out = binary.BigEndian.AppendUint16(h.out, uint16(s.ID))
		h.out = binary.BigEndian.AppendUint32(h.out, s.Val)
	}
	h.windowLocked(0, connAhead-65535)
	h.more.Signal()
	h.mu.Unlock()
	for {
		f, err := h.framer.ReadFrame()
		if err == nil && !h.settled && (f.Header().Type != http2.FrameSettings || f.Header().Flags.Has(http2.FlagSettingsAck)) {
			err = http2.ConnectionError(http2.ErrCodeProtocol)
		}
		if err == nil {
			err = h.process(f)
		}
		if err == nil {
			continue
		}
		if errors.Is(err, http2.ErrFrameTooLarge) {
			return http2.ConnectionError(http2.ErrCodeFrameSize)
		}
		bad, ok := errors.AsType[http2.StreamError](err)
		if !ok {
			return err
		}
		h.mu.Lock()
		if bad.StreamID > h.last && bad.StreamID%2 == 1 {
			h.last = bad.StreamID // it began, and was wrong at once
		}
		h.resetLocked(bad.StreamID, bad.Code)
		h.mu.Unlock()
	}
}

// read reads what the framer gets. A silent visitor is asked whether it is
// there while it has streams, and given up otherwise.
func (h *conn2) read(p []byte) (int, error) {
	for {
		h.mu.Lock()
		for len(h.out) > 2*maxPending && !h.ended {
			h.room.Wait()
		}
		if h.ended {
			h.mu.Unlock()
			return 0, errDrained
		}
		wait := quietTime
		switch now := time.Now(); {
		case !h.settled:
			wait = h.began.Add(h.limits.Hello).Sub(now)
		case h.pinged:
			wait = pingTime
		case len(h.streams) == 0:
			wait = min(wait, h.idle.Add(h.limits.Idle).Sub(now))
		}
		var err error
		if t, stale := renew(h.deadline, wait); stale {
			h.deadline = t
			err = h.c.SetReadDeadline(t)
		}
		h.mu.Unlock()
		if err != nil {
			return 0, err
		}
		n, err := h.c.Read(p)
		if n > 0 {
			if h.pinged {
				h.mu.Lock()
				h.pinged = false
				h.mu.Unlock()
			}
			return n, nil
		}
		if err == nil {
			err = io.ErrNoProgress
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || !h.quiet() {
			return 0, err
		}
	}
}

// quiet decides what to do when nothing has come for long; false: give up.
func (h *conn2) quiet() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.ended || !h.settled || h.pinged:
		return false
	case len(h.streams) > 0:
		h.pinged = true
		h.frameLocked(http2.FramePing, 0, 0, 8)
		h.out = append(h.out, "webgw/2?"...)
		h.more.Signal()
	case time.Since(h.idle) >= h.limits.Idle:
		h.goAwayLocked(http2.ErrCodeNo)
		return false
	default:
		h.dismissLocked()
	}
	return true
}

// process takes a frame; errors are http2.StreamError, http2.ConnectionError.
func (h *conn2) process(f http2.Frame) error {
	const protocol = http2.ConnectionError(http2.ErrCodeProtocol)
	head := f.Header()
	switch head.Type {
	case http2.FrameHeaders, http2.FrameData, http2.FrameContinuation:
		if head.Length > 0 || head.Flags.Has(http2.FlagDataEndStream) {
			h.empty = 0
		} else if h.empty++; h.empty > maxEmpty {
			return http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)
		}
	}
	if f, ok := f.(*http2.MetaHeadersFrame); ok {
		return h.headers(f)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.streams[head.StreamID]
	if head.StreamID != 0 && s == nil && (head.StreamID > h.last || head.StreamID%2 == 0) && !h.away {
		switch head.Type {
		case http2.FrameData, http2.FrameRSTStream, http2.FrameWindowUpdate:
			return protocol // idle, RFC 9113 section 5.1
		}
	}
	switch f := f.(type) {
	case *http2.DataFrame:
		return h.dataLocked(s, f)
	case *http2.SettingsFrame:
		return h.settleLocked(f)
	case *http2.PingFrame:
		if f.IsAck() {
			return nil
		}
		h.frameLocked(http2.FramePing, http2.FlagPingAck, 0, 8)
		h.out = append(h.out, f.Data[:]...)
		h.more.Signal()
	case *http2.WindowUpdateFrame:
		return h.widenLocked(s, f)
	case *http2.RSTStreamFrame:
		if s != nil {
			s.overLocked(errReset)
		}
	case *http2.PriorityFrame:
		if f.StreamDep == f.StreamID {
			return http2.StreamError{StreamID: f.StreamID, Code: http2.ErrCodeProtocol}
		}
	case *http2.PushPromiseFrame:
		return protocol
	}
	return nil
}

// dataLocked takes a part of a request's body.
func (h *conn2) dataLocked(s *stream2, f *http2.DataFrame) error {
	size := int64(f.Length)
	if h.ahead -= size; h.ahead < 0 {
		return http2.ConnectionError(http2.ErrCodeFlowControl)
	}
	if s == nil || s.whole || s.err != nil {
		h.tookLocked(size)
		if s == nil && (slices.Contains(h.reset, f.StreamID) || f.StreamID > h.last) || s != nil && s.err != nil {
			return nil // it did not know yet
		}
		return http2.StreamError{StreamID: f.StreamID, Code: http2.ErrCodeStreamClosed}
	}
	if s.ahead -= size; s.ahead < 0 {
		h.tookLocked(size)
		return http2.StreamError{StreamID: f.StreamID, Code: http2.ErrCodeFlowControl}
	}
	data := f.Data()
	h.tookLocked(size - int64(len(data))) // padding
	s.taken += size - int64(len(data))
	s.came += int64(len(data))
	end := f.StreamEnded()
	if p := s.req.ContentLength; p >= 0 && (s.came > p || end && s.came < p) {
		h.tookLocked(int64(len(data)))
		return http2.StreamError{StreamID: f.StreamID, Code: http2.ErrCodeProtocol}
	}
	s.takeLocked(data)
	if end {
		s.wholeLocked()
	}
	return nil
}

// tookLocked makes room for as much of what has come as is used.
func (h *conn2) tookLocked(n int64) {
	if h.taken += n; h.taken >= connAhead/4 {
		h.ahead += h.taken
		h.windowLocked(0, h.taken)
		h.taken = 0
		h.more.Signal()
	}
}

// settleLocked applies the visitor's settings (RFC 9113 section 6.5): of one that is
// stated twice, the later counts.
func (h *conn2) settleLocked(f *http2.SettingsFrame) error {
	if f.IsAck() {
		h.unacked = false
		return nil
	}
	h.settled = true
	if err := f.ForeachSetting(func(s http2.Setting) error {
		if err := s.Valid(); err != nil {
			return err
		}
		switch s.ID {
		case http2.SettingHeaderTableSize:
			h.fields.SetMaxDynamicTableSize(min(s.Val, hpackTable))
		case http2.SettingInitialWindowSize:
			more := int64(s.Val) - h.streamWin
			h.streamWin = int64(s.Val)
			for _, s := range h.streams {
				if s.window += more; s.window > 1<<31-1 {
					return http2.ConnectionError(http2.ErrCodeFlowControl)
				}
			}
			h.wakeLocked()
		}
		return nil
	}); err != nil {
		return err
	}
	h.frameLocked(http2.FrameSettings, http2.FlagSettingsAck, 0, 0)
	h.more.Signal()
	return nil
}

// widenLocked lets more be sent.
func (h *conn2) widenLocked(s *stream2, f *http2.WindowUpdateFrame) error {
	switch {
	case f.StreamID == 0:
		if h.window += int64(f.Increment); h.window > 1<<31-1 {
			return http2.ConnectionError(http2.ErrCodeFlowControl)
		}
	case s != nil:
		if s.window += int64(f.Increment); s.window > 1<<31-1 {
			return http2.StreamError{StreamID: f.StreamID, Code: http2.ErrCodeFlowControl}
		}
	}
	h.wakeLocked()
	return nil
}

// wakeLocked lets those go on who wait for windows or room, the first one first.
func (h *conn2) wakeLocked() {
	for _, s := range h.waiting {
		s.cond.Broadcast()
	}
	h.waiting = h.waiting[:0]
}

// frameLocked begins a frame whose payload follows.
func (h *conn2) frameLocked(kind http2.FrameType, flags http2.Flags, id uint32, size int) {
	h.out = append(h.out, byte(size>>16), byte(size>>8), byte(size), byte(kind), byte(flags))
	h.out = binary.BigEndian.AppendUint32(h.out, id)
}

func (h *conn2) windowLocked(id uint32, more int64) {
	h.frameLocked(http2.FrameWindowUpdate, 0, id, 4)
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(more))
}

// resetLocked ends a stream from this side.
func (h *conn2) resetLocked(id uint32, code http2.ErrCode) {
	h.frameLocked(http2.FrameRSTStream, 0, id, 4)
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(code))
	h.more.Signal()
	if len(h.reset) >= 2*maxStreams {
		h.reset = append(h.reset[:0], h.reset[maxStreams:]...)
	}
	h.reset = append(h.reset, id)
	if s := h.streams[id]; s != nil {
		s.overLocked(errReset)
	}
}

// goAwayLocked tells the visitor that no new streams are served.
func (h *conn2) goAwayLocked(code http2.ErrCode) {
	if h.away && code == http2.ErrCodeNo {
		return
	}
	h.away = true
	h.frameLocked(http2.FrameGoAway, 0, 0, 8)
	h.out = binary.BigEndian.AppendUint32(h.out, h.last)
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(code))
	h.more.Signal()
	if len(h.streams) == 0 {
		h.finishLocked()
	}
}

// finishLocked ends reading; what is left is written.
func (h *conn2) finishLocked() {
	if h.ended {
		return
	}
	h.ended = true
	h.c.SetReadDeadline(time.Unix(1, 0)) // an error means that it is closed, which wakes as well
	h.dismissLocked()
	h.more.Broadcast()
	h.room.Broadcast()
}

// drain has the connection end after the requests under way.
func (h *conn2) drain() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.draining {
		return
	}
	h.draining = true
	if h.last > 0 {
		h.goAwayLocked(http2.ErrCodeNo)
		return
	}
	// It has come to ask something.
	time.AfterFunc(arrivalTime, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.goAwayLocked(http2.ErrCodeNo)
	})
}

// end ends all requests.
func (h *conn2) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.streams {
		s.overLocked(errReset)
	}
	h.wakeLocked()
}

// linger waits a moment for the visitor to see why the connection ends.
func (h *conn2) linger() {
	if err := errors.Join(h.c.SetReadDeadline(time.Now().Add(partingTime)), netx.CloseWrite(h.c)); err != nil {
		return
	}
	var rest [firstRead]byte
	for n := 0; n < partingBytes; {
		m, err := h.c.Read(rest[:])
		if err != nil {
			return
		}
		n += m
	}
}

// write writes what has gathered: one system call for all that was ready.
func (h *conn2) write() {
	defer close(h.written)
	h.mu.Lock()
	defer h.mu.Unlock()
	var limit time.Time
	for {
		for len(h.out) == 0 && !h.ended {
			h.more.Wait()
		}
		if len(h.out) == 0 {
			return
		}
		h.mu.Unlock()
		runtime.Gosched() // who is about to finish as well
		h.mu.Lock()
		b := h.out
		h.out = h.spare[:0]
		h.mu.Unlock()
		var err error
		if t, stale := renew(limit, h.limits.Stall); stale {
			limit = t
			err = h.c.SetWriteDeadline(t)
		}
		if err == nil {
			_, err = h.c.Write(b)
		}
		h.mu.Lock()
		if h.spare = b; cap(b) > maxFrame && len(h.streams) == 0 {
			h.spare = nil
		}
		if err != nil {
			h.out = nil
			h.finishLocked()
			for _, s := range h.streams {
				s.overLocked(err)
			}
		}
		h.wakeLocked()
		h.room.Signal()
	}
}

// startLocked has a stream served.
func (h *conn2) startLocked(s *stream2) {
	h.running++
	if n := len(h.workers); n > 0 {
		w := h.workers[n-1]
		h.workers = h.workers[:n-1]
		w <- s // has room for one
		return
	}
	go h.work(s)
}

// work serves streams, one after the other.
func (h *conn2) work(s *stream2) {
	next := make(chan *stream2, 1)
	for s != nil {
		s.serve()
		h.mu.Lock()
		h.running--
		h.room.Signal()
		if h.ended || len(h.workers) >= maxWorkers {
			h.mu.Unlock()
			return
		}
		h.workers = append(h.workers, next)
		h.mu.Unlock()
		s = <-next
	}
}

// dismissLocked lets go of workers that have nothing to do.
func (h *conn2) dismissLocked() {
	for _, w := range h.workers {
		w <- nil
	}
	h.workers = nil
}
