package registry

import (
	"bytes"
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"webgw.dev/webgw"
)

// Bounds of a watch.
const (
	heartbeat    = 5 * time.Second
	maxPending   = 1024             // entries waiting for a slow client; then it is brought up to date from state
	maxLine      = 256 << 10        // bytes of a line, unless one record is larger
	lineTimeout  = 15 * time.Second // for a client to take a line
	aheadTimeout = 5 * time.Second  // for the mirror to reach a revision that another replica has told
	watchesPerID = 16               // by one identity at one replica
	watchesAtAll = 250_000          // at one replica
)

// watcher is one open watch. The mirror pushes to it, its handler drains it.
type watcher struct {
	id    webgw.ID
	scope Scope
	wake  chan struct{} // holds one token when there is something to drain
	gone  chan struct{} // closed: the watch must end

	mu      sync.Mutex
	pending []revision
	size    int
	behind  bool // pending has overflown and was dropped
	ended   bool
}

// revision is what one revision has for one watcher.
type revision struct {
	rev     int64
	entries []*entry
}

func (w *watcher) push(rev int64, es []*entry) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.behind:
	case w.size+len(es) > maxPending:
		w.pending, w.size, w.behind = nil, 0, true
	default:
		if n := len(w.pending); n == 0 || w.pending[n-1].rev != rev {
			w.pending = append(w.pending, revision{rev: rev})
		}
		last := &w.pending[len(w.pending)-1]
		for _, e := range es {
			if !slices.Contains(last.entries, e) {
				last.entries = append(last.entries, e)
				w.size++
			}
		}
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// end makes the handler leave.
func (w *watcher) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.ended {
		w.ended = true
		close(w.gone)
	}
}

// drain takes what is pending, and the revision up to which that is all.
func (m *mirror) drain(w *watcher) (pending []revision, behind bool, rev int64) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	pending, behind = w.pending, w.behind
	w.pending, w.size, w.behind = nil, 0, false
	return pending, behind, m.rev
}

func (m *mirror) join(w *watcher) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.watchers[w.id] == nil {
		m.watchers[w.id] = map[*watcher]bool{}
	}
	m.watchers[w.id][w] = true
	if w.scope == ScopeOwner {
		m.owners[w] = true
	}
}

func (m *mirror) leave(w *watcher) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.watchers[w.id], w)
	if len(m.watchers[w.id]) == 0 {
		delete(m.watchers, w.id)
	}
	delete(m.owners, w)
}

// watchCount bounds open watches.
type watchCount struct {
	mu  sync.Mutex
	n   map[webgw.ID]int
	sum int
}

func (c *watchCount) enter(id webgw.ID) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n[id] >= watchesPerID || c.sum >= watchesAtAll {
		return &webgw.Error{Kind: webgw.Exhausted, Public: "too many watches are open", Hint: "close some, or ask another replica"}
	}
	c.n[id]++
	c.sum++
	return nil
}

func (c *watchCount) leave(id webgw.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sum--
	if c.n[id]--; c.n[id] == 0 {
		delete(c.n, id)
	}
}

func (c *watchCount) total() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sum
}

// watch answers GET /v1/watch: a line of JSON for each revision that has
// something for the asker, and heartbeats.
func (s *Server) watch(w http.ResponseWriter, r *http.Request, id webgw.ID) error {
	q := r.URL.Query()
	scope := Scope(q.Get("scope"))
	switch scope {
	case ScopeGateway, ScopeNode, ScopeOwner:
	default:
		return &webgw.Error{Kind: webgw.Invalid, Field: "scope", Public: "must be gateway, node or owner"}
	}
	var since int64
	if t := q.Get("since"); t != "" {
		var err error
		if since, err = strconv.ParseInt(t, 10, 64); err != nil || since < 0 {
			return &webgw.Error{Kind: webgw.Invalid, Field: "since", Public: "must be a revision"}
		}
	}
	if err := s.watches.enter(id); err != nil {
		s.metrics.limited.WithLabelValues("watches").Inc()
		return err
	}
	defer s.watches.leave(id)

	m := s.mirror
	x := &watcher{id: id, scope: scope, wake: make(chan struct{}, 1), gone: make(chan struct{})}
	m.join(x)
	defer m.leave(x)
	ahead := time.NewTimer(aheadTimeout)
	defer ahead.Stop()
	var epoch string
	var rev int64
	for {
		m.mu.RLock()
		moved := m.moved
		rev, epoch = m.rev, m.epoch
		m.mu.RUnlock()
		if q.Get("epoch") != epoch {
			since = 0
		}
		if since <= rev {
			break
		}
		// Another replica has told a revision that has yet to come here.
		select {
		case <-moved:
			continue
		case <-ahead.C:
			since = 0
		case <-r.Context().Done():
			return nil
		}
		break
	}

	f := &feed{w: w, rc: http.NewResponseController(w), epoch: epoch}
	if err := f.start(); err != nil {
		return nil // the client is gone
	}
	stop, _ := r.Context().Value(stopKey{}).(<-chan struct{})
	m.mu.RLock()
	rev = m.rev
	first := m.concernsLocked(scope, id, since, time.Now())
	m.mu.RUnlock()
	if f.send(line{rev: rev, entries: first, reset: since == 0, synced: true}) != nil {
		return nil
	}
	tick := time.NewTicker(heartbeat)
	defer tick.Stop()
	for {
		beat := false
		select {
		case <-x.wake:
		case <-tick.C:
			beat = true
		case <-x.gone:
			return nil
		case <-stop:
			return nil
		case <-r.Context().Done():
			return nil
		}
		pending, behind, now := m.drain(x)
		if behind {
			s.metrics.resyncs.Inc()
			m.mu.RLock()
			now = m.rev
			es := m.concernsLocked(scope, id, rev, time.Now())
			m.mu.RUnlock()
			pending = []revision{{now, es}}
		}
		for _, p := range pending {
			if p.rev <= rev {
				continue // in what was sent before
			}
			if f.send(line{rev: p.rev, entries: p.entries}) != nil {
				return nil
			}
			rev = p.rev
		}
		if beat {
			rev = max(rev, now)
			if f.send(line{rev: rev}) != nil {
				return nil
			}
		}
	}
}

// line is what a revision comes to; feed cuts it up if it is long.
type line struct {
	rev     int64
	entries []*entry
	reset   bool // what follows up to synced is everything
	synced  bool
}

type feed struct {
	w     http.ResponseWriter
	rc    *http.ResponseController
	epoch string
	buf   bytes.Buffer
}

func (f *feed) start() error {
	f.w.Header().Set("Content-Type", "application/x-ndjson")
	f.w.Header().Set("Cache-Control", "no-store")
	f.w.WriteHeader(http.StatusOK)
	return f.rc.SetReadDeadline(time.Time{}) // the request's own time limit is over
}

// send writes a line, or several of which only the last carries the revision:
// a client must not resume from the middle.
func (f *feed) send(l line) error {
	if err := f.rc.SetWriteDeadline(time.Now().Add(lineTimeout)); err != nil {
		return err
	}
	es := l.entries
	for first := true; ; first = false {
		n, size := 0, 0
		for n < len(es) && (n == 0 || size+len(es[n].Envelope()) <= maxLine) {
			size += len(es[n].Envelope()) + 1
			n++
		}
		f.encode(l, es[:n], first, n == len(es))
		es = es[n:]
		if _, err := f.w.Write(f.buf.Bytes()); err != nil {
			return err
		}
		if err := f.rc.Flush(); err != nil {
			return err
		}
		if len(es) == 0 {
			break
		}
		if err := f.rc.SetWriteDeadline(time.Now().Add(lineTimeout)); err != nil {
			return err
		}
	}
	if f.buf.Cap() > 64<<10 {
		f.buf = bytes.Buffer{} // an idle watch holds little
	}
	return nil
}

func (f *feed) encode(l line, es []*entry, first, last bool) {
	b := &f.buf
	b.Reset()
	b.WriteByte('{')
	if last {
		b.WriteString(`"rev":`)
		b.Write(strconv.AppendInt(b.AvailableBuffer(), l.rev, 10))
		b.WriteByte(',')
	}
	if l.synced || len(es) > 0 {
		epoch, _ := json.Marshal(f.epoch) // a string always marshals
		b.WriteString(`"epoch":`)
		b.Write(epoch)
		b.WriteByte(',')
	}
	if first && l.reset {
		b.WriteString(`"reset":true,`)
	}
	if len(es) > 0 {
		b.WriteString(`"records":[`)
		for i, e := range es {
			if i > 0 {
				b.WriteByte(',')
			}
			b.Write(e.Envelope())
		}
		b.WriteString("],")
	}
	if last && l.synced {
		b.WriteString(`"synced":true,`)
	}
	b.Truncate(b.Len() - 1) // the last comma; there is always one
	b.WriteString("}\n")
}
