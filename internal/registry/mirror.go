package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/store"
)

// What the store holds, below one prefix so that an etcd may be shared:
//
//	webgw/epoch                       a random word, made once
//	webgw/r/KIND/OWNER/NAME           a record: metadata, line end, envelope
//	webgw/i/host/HOST                 who holds what is one per grid: a holding
//	webgw/i/{gateway,node,farm}/NAME
//	webgw/i/port/GATEWAY/PORTS        of TCP; PORTS/udp of UDP
//	webgw/g/DOMAIN                    guard, written with every new host name in DOMAIN
//	webgw/g/port/GATEWAY/BLOCK        guard, written with every port newly taken in a block of 256; GATEWAY/udp/BLOCK of UDP
//	webgw/p/DOMAIN/ID                 proof that a domain is an identity's
//	webgw/s/ID                        last status of a live gateway or node, under a lease
const (
	prefix       = "webgw/"
	keyEpoch     = prefix + "epoch"
	prefixRecord = prefix + "r/"
	prefixIndex  = prefix + "i/"
	prefixGuard  = prefix + "g/"
	prefixProof  = prefix + "p/"
	prefixStatus = prefix + "s/"
)

// entry is one stored version of a record. It never changes once made.
type entry struct {
	ident.Signed
	key  webgw.Key
	meta meta
	mod  int64 // revision
}

// meta is what the registry keeps beside an envelope, unsigned.
type meta struct {
	// Audience holds everybody whom any version of the record has named, with
	// the time (Unix seconds) when the last version that did so expires: until
	// then they may hold that version, and must hear of a newer one.
	Audience map[webgw.ID]int64 `json:"audience,omitempty"`
	// Keep is the latest expiry of any version. Until then the newest version
	// stays stored, so that no older one can be declared again.
	Keep int64 `json:"keep"`
}

func encodeEntry(m meta, s ident.Signed) ([]byte, error) {
	head, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	return append(append(head, '\n'), s.Envelope()...), nil
}

func decodeEntry(it store.Item) (*entry, error) {
	head, raw, ok := bytes.Cut(it.Value, []byte{'\n'})
	if !ok {
		return nil, errors.New("no line end after the metadata")
	}
	e := &entry{mod: it.Mod}
	if err := json.Unmarshal(head, &e.meta); err != nil {
		return nil, err
	}
	var err error
	if e.Signed, err = ident.Verify(raw); err != nil {
		return nil, err
	}
	e.key = e.Record.Key()
	if it.Key != recordKey(e.key) {
		return nil, fmt.Errorf("it holds the record %s", e.key)
	}
	return e, nil
}

func recordKey(k webgw.Key) string { return prefixRecord + k.String() }

// mirror is the store in memory, in the shape in which it is asked for. One
// goroutine writes it (Server.follow); whoever reads holds mu for reading.
type mirror struct {
	grid       string // the grid's zone; this and what follows never changes
	proving    bool   // names outside of zones need proofs
	proofGrace time.Duration
	operator   webgw.ID // needs no proofs

	mu       sync.RWMutex
	rev      int64
	epoch    string
	loaded   bool          // once: what it holds may be served
	ready    bool          // and the watch of the store has not failed since
	moved    chan struct{} // closed and replaced whenever rev rises
	records  map[webgw.Key]*entry
	byOwner  map[webgw.ID]map[webgw.Key]*entry
	byKind   map[webgw.Kind]map[webgw.Key]*entry
	byNamed  map[webgw.ID]map[webgw.Key]*entry // by audience
	holdings map[string]*holding               // by index key without prefix
	kids     map[string]map[string]bool        // host names by the name one label above
	ports    map[space]map[string]webgw.PortRange
	proofs   map[string]*proof  // by DOMAIN/ID
	guards   map[string]int64   // revision by domain, or block of ports
	newest   map[webgw.ID]int64 // revision of the latest exposure that names it
	status   map[webgw.ID]*reported
	odd      map[string]int64 // revisions of damaged values, so that they can be replaced

	watchers map[webgw.ID]map[*watcher]bool
	owners   map[*watcher]bool // those of scope owner, who see every gateway
}

func newMirror() *mirror {
	return &mirror{
		moved:    make(chan struct{}),
		records:  map[webgw.Key]*entry{},
		byOwner:  map[webgw.ID]map[webgw.Key]*entry{},
		byKind:   map[webgw.Kind]map[webgw.Key]*entry{},
		byNamed:  map[webgw.ID]map[webgw.Key]*entry{},
		holdings: map[string]*holding{},
		kids:     map[string]map[string]bool{},
		ports:    map[space]map[string]webgw.PortRange{},
		proofs:   map[string]*proof{},
		guards:   map[string]int64{},
		newest:   map[webgw.ID]int64{},
		status:   map[webgw.ID]*reported{},
		odd:      map[string]int64{},
		watchers: map[webgw.ID]map[*watcher]bool{},
		owners:   map[*watcher]bool{},
	}
}

// change is one decoded event; exactly what the mirror takes in.
type change struct {
	key     string
	mod     int64
	deleted bool
	damaged bool
	entry   *entry
	holding *holding
	status  *reported
	proof   *proof
	epoch   string
}

// decode reads an event. It needs no lock: signatures take time.
func decode(ev store.Event) (change, error) {
	c := change{key: ev.Key, mod: ev.Mod, deleted: ev.Deleted}
	if ev.Deleted {
		return c, nil
	}
	var err error
	switch {
	case strings.HasPrefix(ev.Key, prefixRecord):
		c.entry, err = decodeEntry(ev.Item)
	case strings.HasPrefix(ev.Key, prefixIndex):
		c.holding = &holding{mod: ev.Mod}
		err = json.Unmarshal(ev.Value, c.holding)
	case strings.HasPrefix(ev.Key, prefixProof):
		c.proof = &proof{mod: ev.Mod}
		err = json.Unmarshal(ev.Value, c.proof)
	case strings.HasPrefix(ev.Key, prefixStatus):
		c.status = &reported{mod: ev.Mod, lease: ev.Lease}
		err = json.Unmarshal(ev.Value, &c.status.Status)
	case ev.Key == keyEpoch:
		c.epoch = string(ev.Value)
	}
	return c, err
}

// apply takes in the changes of one revision and hands them to the watchers.
func (m *mirror) apply(rev int64, changes []change) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range changes {
		m.applyLocked(c)
	}
	for _, c := range changes {
		if c.entry != nil {
			m.publishLocked(c.entry)
		}
	}
	m.loaded = true
	if rev > m.rev {
		m.rev = rev
		close(m.moved)
		m.moved = make(chan struct{})
	}
}

func (m *mirror) applyLocked(c change) {
	if c.damaged {
		m.odd[c.key] = c.mod
		return
	}
	delete(m.odd, c.key)
	switch {
	case strings.HasPrefix(c.key, prefixRecord):
		k, err := webgw.ParseKey(strings.TrimPrefix(c.key, prefixRecord))
		if err != nil {
			return // nothing was taken in under such a key
		}
		if old := m.records[k]; old != nil {
			delete(m.records, k)
			drop(m.byOwner, k.Owner, k)
			drop(m.byKind, k.Kind, k)
			for id := range old.meta.Audience {
				drop(m.byNamed, id, k)
			}
		}
		if e := c.entry; e != nil {
			m.records[k] = e
			put(m.byOwner, k.Owner, k, e)
			put(m.byKind, k.Kind, k, e)
			for id := range e.meta.Audience {
				put(m.byNamed, id, k, e)
				if k.Kind == webgw.KindExposure {
					m.newest[id] = max(m.newest[id], e.mod)
				}
			}
		}
	case strings.HasPrefix(c.key, prefixIndex):
		key := strings.TrimPrefix(c.key, prefixIndex)
		host, isHost := strings.CutPrefix(key, "host/")
		if c.deleted {
			delete(m.holdings, key)
			if isHost {
				m.unlinkLocked(host)
			} else {
				m.unlinkPortsLocked(key)
			}
			return
		}
		m.holdings[key] = c.holding
		if isHost {
			m.linkLocked(host)
		} else {
			m.linkPortsLocked(key)
		}
	case strings.HasPrefix(c.key, prefixGuard):
		domain := strings.TrimPrefix(c.key, prefixGuard)
		if c.deleted {
			delete(m.guards, domain)
		} else {
			m.guards[domain] = c.mod
		}
	case strings.HasPrefix(c.key, prefixProof):
		key := strings.TrimPrefix(c.key, prefixProof)
		if c.deleted {
			delete(m.proofs, key)
		} else {
			m.proofs[key] = c.proof
		}
	case strings.HasPrefix(c.key, prefixStatus):
		id, err := webgw.ParseID(strings.TrimPrefix(c.key, prefixStatus))
		if err != nil {
			return
		}
		if c.deleted {
			delete(m.status, id)
		} else {
			m.status[id] = c.status
		}
	case c.key == keyEpoch:
		if m.epoch != "" && m.epoch != c.epoch {
			// Another history, whose revisions mean other things: whoever
			// watches must begin anew.
			m.rev = 0
			for _, ws := range m.watchers {
				for w := range ws {
					w.end()
				}
			}
		}
		m.epoch = c.epoch
	}
}

// linkLocked makes host findable from every name above it.
func (m *mirror) linkLocked(host string) {
	for parent := above(host); parent != ""; host, parent = parent, above(parent) {
		if m.kids[parent][host] {
			return
		}
		if m.kids[parent] == nil {
			m.kids[parent] = map[string]bool{}
		}
		m.kids[parent][host] = true
	}
}

func (m *mirror) unlinkLocked(host string) {
	for m.holdings["host/"+host] == nil && len(m.kids[host]) == 0 {
		parent := above(host)
		if parent == "" {
			return
		}
		delete(m.kids[parent], host)
		if len(m.kids[parent]) == 0 {
			delete(m.kids, parent)
		}
		host = parent
	}
}

func put[I comparable](index map[I]map[webgw.Key]*entry, i I, k webgw.Key, e *entry) {
	if index[i] == nil {
		index[i] = map[webgw.Key]*entry{}
	}
	index[i][k] = e
}

func drop[I comparable](index map[I]map[webgw.Key]*entry, i I, k webgw.Key) {
	delete(index[i], k)
	if len(index[i]) == 0 {
		delete(index, i)
	}
}

// wait returns as soon as the mirror has reached rev, or ctx's error.
func (m *mirror) wait(ctx context.Context, rev int64) error {
	for {
		m.mu.RLock()
		at, moved := m.rev, m.moved
		m.mu.RUnlock()
		if at >= rev {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (m *mirror) setReady(ready bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ready = ready
}

// at returns what the mirror stands at.
func (m *mirror) at() (rev int64, epoch string, loaded, ready bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.rev, m.epoch, m.loaded, m.ready
}

// gatewayLocked returns the live record by which a gateway is known: the
// newest, should it have declared itself under several names.
func (m *mirror) gatewayLocked(id webgw.ID, now time.Time) *entry {
	return m.selfLocked(webgw.KindGateway, id, now)
}

func (m *mirror) nodeLocked(id webgw.ID, now time.Time) *entry {
	return m.selfLocked(webgw.KindNode, id, now)
}

func (m *mirror) selfLocked(kind webgw.Kind, id webgw.ID, now time.Time) (found *entry) {
	for k, e := range m.byOwner[id] {
		if k.Kind == kind && e.Record.Live(now) && (found == nil || e.Record.Seq > found.Record.Seq) {
			found = e
		}
	}
	return found
}

// follow keeps the mirror up to date until ctx ends: it reads everything once
// and then each change. Where the store forgets faster than that, it reads
// everything again.
func (s *Server) follow(ctx context.Context) error {
	pause := s.backoff()
	for {
		err := s.load(ctx)
		for err == nil {
			pause.Reset()
			err = s.tail(ctx, pause.Reset)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, store.ErrCompacted) {
				s.log().Info("registry: the store's history is gone, reading anew")
				break
			}
			s.mirror.setReady(false)
			s.log().Warn("registry: watch of the store failed", "err", err)
			err = pause.Wait(ctx)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil && !errors.Is(err, store.ErrCompacted) {
			s.mirror.setReady(false)
			s.log().Warn("registry: can't read the store", "err", err)
			if err := pause.Wait(ctx); err != nil {
				return err
			}
		}
	}
}

// load brings the mirror to what the store holds now, whatever it held before.
func (s *Server) load(ctx context.Context) error {
	const page = 1000
	start := time.Now()
	if err := s.ensureEpoch(ctx); err != nil {
		return err
	}
	m := s.mirror
	seen := map[string]bool{}
	var rev int64
	var fresh []change
	for after := ""; ; {
		items, at, err := s.Store.List(ctx, prefix, after, page, rev)
		if err != nil {
			return err
		}
		rev = at
		changes, err := s.decodeAll(items)
		if err != nil {
			return err
		}
		for _, it := range items {
			seen[it.Key] = true
			after = it.Key
		}
		fresh = append(fresh, changes...)
		if len(items) < page {
			break
		}
	}
	m.mu.RLock()
	kept := fresh[:0]
	for _, c := range fresh { // told already: don't tell the watchers again
		if c.entry != nil {
			if old := m.records[c.entry.key]; old != nil && old.mod == c.mod && bytes.Equal(old.Envelope(), c.entry.Envelope()) {
				continue
			}
		}
		kept = append(kept, c)
	}
	for _, key := range m.keysLocked() {
		if !seen[key] {
			kept = append(kept, change{key: key, mod: rev, deleted: true})
		}
	}
	n := len(seen)
	m.mu.RUnlock()
	m.apply(rev, kept)
	m.setReady(true)
	s.log().Info("registry: mirror loaded", "keys", n, "rev", rev, "took", time.Since(start))
	return nil
}

// keysLocked lists the store keys of everything in the mirror but the epoch.
func (m *mirror) keysLocked() []string {
	var keys []string
	for k := range m.records {
		keys = append(keys, recordKey(k))
	}
	for k := range m.holdings {
		keys = append(keys, prefixIndex+k)
	}
	for k := range m.odd {
		keys = append(keys, k)
	}
	for d := range m.guards {
		keys = append(keys, prefixGuard+d)
	}
	for k := range m.proofs {
		keys = append(keys, prefixProof+k)
	}
	for id := range m.status {
		keys = append(keys, prefixStatus+id.String())
	}
	return keys
}

// decodeAll decodes a page on all processors: a signature costs far more than
// a read. What is damaged is told of and left out; the last good version, if
// the mirror has one, stays.
func (s *Server) decodeAll(items []store.Item) ([]change, error) {
	out := make([]change, len(items))
	var g errgroup.Group
	workers := runtime.GOMAXPROCS(0)
	for w := range workers {
		g.Go(func() error {
			for i := w; i < len(items); i += workers {
				out[i] = s.decode(store.Event{Item: items[i]})
			}
			return nil
		})
	}
	return out, g.Wait()
}

// tail follows the store from the mirror's revision on, until it can't.
func (s *Server) tail(ctx context.Context, well func()) error {
	rev, _, _, _ := s.mirror.at()
	s.mirror.setReady(true)
	for b, err := range s.Store.Watch(ctx, prefix, rev+1) {
		if err != nil {
			return err
		}
		well()
		changes := make([]change, 0, len(b.Events))
		for _, ev := range b.Events {
			changes = append(changes, s.decode(ev))
		}
		s.mirror.apply(b.Rev, changes)
	}
	return errors.New("registry: the store's watch ended without an error")
}

// decode is decode, which tells of damage.
func (s *Server) decode(ev store.Event) change {
	c, err := decode(ev)
	if err != nil {
		s.metrics.damaged.Inc()
		s.log().Error("registry: a stored value is damaged, the last good one stays", "key", ev.Key, "rev", ev.Mod, "err", err)
		return change{key: ev.Key, mod: ev.Mod, damaged: true}
	}
	return c
}
