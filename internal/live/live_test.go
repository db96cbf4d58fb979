package live

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
)

var owner = ident.FromSeed([32]byte{1})

// record signs an exposure "name" in version seq that lives for life from now.
func record(t *testing.T, name string, seq uint64, life time.Duration, change ...func(*webgw.Record)) ident.Signed {
	t.Helper()
	r := webgw.Record{
		Version: 1, Kind: webgw.KindExposure, Name: name, Seq: seq, Issued: time.Now(), Expires: time.Now().Add(life),
		Exposure: &webgw.Exposure{Protocol: webgw.HTTP, Hosts: []string{name + ".example"}, Gateways: []webgw.ID{owner.ID()},
			Targets: []webgw.Target{{Direct: "example.org:80"}}},
	}
	for _, f := range change {
		f(&r)
	}
	s, err := owner.Sign(r)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func deleted(r *webgw.Record) { r.Deleted = true }

// fakeFeed is a registry that says what the test tells it to.
type fakeFeed struct {
	send    chan Change // a zero Change ends the watch with an error
	watched chan position
	newest  map[webgw.Key]ident.Signed
}

func newFeed() *fakeFeed {
	return &fakeFeed{make(chan Change), make(chan position, 100), map[webgw.Key]ident.Signed{}}
}

func (f *fakeFeed) Watch(ctx context.Context, since int64, epoch string) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		f.watched <- position{since, epoch}
		for {
			select {
			case c := <-f.send:
				if c.Epoch == "" && c.Rev == 0 {
					yield(Change{}, errors.New("the line is dead"))
					return
				}
				if !yield(c, nil) {
					return
				}
			case <-ctx.Done():
				yield(Change{}, ctx.Err())
				return
			}
		}
	}
}

func (f *fakeFeed) Get(ctx context.Context, key webgw.Key) (ident.Signed, error) {
	if s, ok := f.newest[key]; ok {
		return s, nil
	}
	return ident.Signed{}, &webgw.Error{Kind: webgw.NotFound}
}

// rig is a follower that runs until the test stops it.
type rig struct {
	*Follower
	feed *fakeFeed
	stop func()
}

func start(t *testing.T, path string) rig {
	t.Helper()
	feed := newFeed()
	f := &Follower{Feed: feed, Path: path}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	stopped := false
	stop := func() {
		if !stopped {
			stopped = true
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(stop)
	synctest.Wait()
	return rig{f, feed, stop}
}

func (r rig) tell(c Change) { r.feed.send <- c; time.Sleep(2 * gather) }

// names gives the records of a view as name@seq.
func names(v *View) map[string]bool {
	out := map[string]bool{}
	for k, s := range v.Records {
		out[fmt.Sprintf("%s@%d", k.Name, s.Record.Seq)] = true
	}
	return out
}

// want compares the live records, as name@seq.
func (r rig) want(t *testing.T, want ...string) {
	t.Helper()
	got := slices.Sorted(maps.Keys(names(r.View())))
	if !slices.Equal(got, want) {
		t.Errorf("in force are %q, want %q", got, want)
	}
}

func (r rig) refused(t *testing.T, reason string, want float64) {
	t.Helper()
	if got := value(t, r.m.refused.WithLabelValues(reason)); got != want {
		t.Errorf("%v refused as %s, want %v", got, reason, want)
	}
}

// value reads one metric.
func value(t *testing.T, c prometheus.Collector) float64 {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(c)
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	m := families[0].Metric[0]
	return m.GetCounter().GetValue() + m.GetGauge().GetValue()
}

func all(rev int64, records ...ident.Signed) Change {
	return Change{Rev: rev, Epoch: "e1", Records: records, Reset: true, Synced: true}
}

func some(rev int64, records ...ident.Signed) Change {
	return Change{Rev: rev, Epoch: "e1", Records: records, Synced: true}
}

func TestOnlyNewerVersionsCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "")
		a1, a2, a3 := record(t, "a", 1, time.Hour), record(t, "a", 2, time.Hour), record(t, "a", 3, time.Hour, deleted)
		r.tell(all(10, a1))
		r.want(t, "a@1")
		r.tell(some(11, a2))
		r.want(t, "a@2")
		r.tell(some(12, a1)) // replay of an older one
		r.want(t, "a@2")
		r.refused(t, "rollback", 1)
		r.tell(some(13, a2)) // told twice: nothing
		r.refused(t, "rollback", 1)
		r.tell(some(14, record(t, "a", 2, 2*time.Hour)))
		r.refused(t, "conflict", 1)
		r.tell(some(15, a3))
		r.want(t)
		r.tell(some(16, a2)) // withdrawn stays withdrawn
		r.want(t)
		r.refused(t, "rollback", 2)
		if v := r.View(); v.Rev != 16 || v.Epoch != "e1" || !v.Synced {
			t.Errorf("the view is at %d of %q, synced %v", v.Rev, v.Epoch, v.Synced)
		}
	})
}

func TestNothingDisappearsByOmission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "")
		a, b, c := record(t, "a", 1, time.Hour), record(t, "b", 1, time.Hour), record(t, "c", 1, time.Hour)
		r.tell(all(10, a, b, c))
		// b moved to another gateway meanwhile: a look-up finds that.
		moved := record(t, "b", 2, time.Hour, deleted)
		r.feed.newest[b.Record.Key()] = moved
		r.tell(all(20, a))
		r.want(t, "a@1", "c@1")
		if got := value(t, r.m.missing); got != 1 {
			t.Errorf("%v missing, want 1", got)
		}
		r.tell(all(21, a, c))
		if got := value(t, r.m.missing); got != 0 {
			t.Errorf("%v missing after it came back", got)
		}
	})
}

func TestExpiryNeedsNoRegistry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "")
		r.tell(all(10, record(t, "short", 1, time.Minute), record(t, "long", 1, time.Hour)))
		r.feed.send <- Change{}
		time.Sleep(webgw.MaxSkew + 59*time.Second)
		r.want(t, "long@1", "short@1")
		time.Sleep(2 * time.Second)
		r.want(t, "long@1")
		time.Sleep(time.Hour)
		r.want(t)
	})
}

func TestReconnectsWhereItWas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "")
		watch := func(want position) {
			t.Helper()
			if got := <-r.feed.watched; got != want {
				t.Errorf("it watches from %v, want %v", got, want)
			}
		}
		watch(position{})
		r.tell(Change{Rev: 5, Epoch: "e1", Reset: true, Records: []ident.Signed{record(t, "a", 1, time.Hour)}})
		r.want(t, "a@1")
		r.feed.send <- Change{}
		watch(position{0, "e1"}) // the resync was cut short
		r.tell(all(7, record(t, "a", 1, time.Hour)))
		r.feed.send <- Change{}
		watch(position{7, "e1"})
		r.tell(some(8))
		// A restored registry that does not say Reset by itself.
		r.feed.send <- Change{Rev: 3, Epoch: "e2"}
		watch(position{0, ""})
		r.tell(Change{Rev: 3, Epoch: "e2", Reset: true, Synced: true})
		r.want(t, "a@1")
		r.feed.send <- Change{}
		watch(position{3, "e2"})
	})
}

// Heartbeats move the revision, and nothing else.
func TestHeartbeatsApplyNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, filepath.Join(t.TempDir(), "s"))
		r.tell(all(10, record(t, "a", 1, time.Hour)))
		time.Sleep(2 * saveEvery)
		synctest.Wait()
		before, err := os.ReadFile(r.Path)
		if err != nil {
			t.Fatal(err)
		}
		r.Apply = func(*View) { t.Error("applied") }
		for i := range int64(5) {
			r.tell(Change{Rev: 11 + i})
			time.Sleep(5 * time.Second)
		}
		if v := r.View(); v.Rev != 15 || v.Epoch != "e1" || !v.Synced {
			t.Errorf("the view is at %d of %q, synced %v", v.Rev, v.Epoch, v.Synced)
		}
		r.want(t, "a@1")
		if after, err := os.ReadFile(r.Path); err != nil || string(after) != string(before) {
			t.Errorf("the snapshot was written anew (%v)", err)
		}
	})
}

func TestRecordsFromTheFutureWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "")
		r.tell(all(1, record(t, "soon", 1, 2*time.Hour, func(r *webgw.Record) { r.Issued = r.Issued.Add(15 * time.Minute) })))
		r.want(t)
		r.refused(t, "early", 1)
		time.Sleep(6 * time.Minute)
		r.want(t, "soon@1")
	})
}

func TestUnverifiedRecordsAreAnAlarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "")
		c := all(1, record(t, "a", 1, time.Hour))
		c.Refused = 2
		r.tell(c)
		r.want(t, "a@1")
		r.refused(t, "unverified", 2)
	})
}

func TestTombstonesAreForgottenWhenNothingCanComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "")
		r.tell(all(1, record(t, "a", 2, time.Hour, deleted)))
		time.Sleep(webgw.MaxLifetime)
		r.stop()
		if len(r.records) != 1 {
			t.Error("the tombstone is gone too early")
		}
		r = start(t, "")
		r.tell(all(1, record(t, "a", 2, time.Hour, deleted)))
		time.Sleep(webgw.MaxLifetime + time.Hour)
		r.stop()
		if len(r.records) != 0 {
			t.Error("the tombstone is kept for ever")
		}
	})
}

func TestSnapshotOutlivesTheRegistry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "gateway.snapshot")
		r := start(t, path)
		old := record(t, "gone", 1, time.Hour)
		r.tell(all(9, record(t, "a", 1, time.Hour), record(t, "b", 4, time.Hour), old))
		r.tell(some(10, record(t, "gone", 2, time.Hour, deleted)))
		time.Sleep(saveEvery)
		if _, err := os.Stat(path); err != nil {
			t.Errorf("nothing saved after %v: %v", saveEvery, err)
		}
		r.stop()

		r = start(t, path)
		r.want(t, "a@1", "b@4")
		if got := <-r.feed.watched; got != (position{10, "e1"}) {
			t.Errorf("it resumes at %v", got)
		}
		r.tell(some(11, old)) // the tombstone was saved, too
		r.want(t, "a@1", "b@4")
		r.refused(t, "rollback", 1)
	})
}

func TestDamagedSnapshots(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"cut":     func(b []byte) []byte { return b[:len(b)-20] },
		"bit":     func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"empty":   func([]byte) []byte { return nil },
		"garbage": func([]byte) []byte { return []byte("hello\nworld\n") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "node.snapshot")
				r := start(t, path)
				r.tell(all(1, record(t, "a", 1, time.Hour)))
				time.Sleep(2 * saveEvery)
				r.tell(some(2, record(t, "b", 1, time.Hour)))
				r.stop()
				data, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, damage(data), 0o600); err != nil {
					t.Fatal(err)
				}
				r = start(t, path)
				r.want(t, "a@1") // the generation before
				r.refused(t, "damaged", 1)
				r.stop()
				if aside, _ := filepath.Glob(path + ".damaged-*"); len(aside) != 1 {
					t.Errorf("put aside: %q", aside)
				}
				if left, _ := filepath.Glob(path + ".new-*"); len(left) != 0 {
					t.Errorf("left behind: %q", left)
				}
			})
		})
	}
}

// An attacker who can write the file and the checksum can still not forge.
func TestForgedSnapshotRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "node.snapshot")
		f := &Follower{Path: path, rev: 3, epoch: "e1"}
		good, bad := record(t, "a", 1, time.Hour), record(t, "b", 1, time.Hour)
		f.records = map[webgw.Key]*entry{good.Record.Key(): {signed: good}, bad.Record.Key(): {signed: bad}}
		// The letter of the signed payload that is changed stays base64.
		raw := bad.Envelope()
		i := strings.Index(string(raw), `"payload":"`) + len(`"payload":"`) + 40
		if raw[i]++; raw[i] > 'z' {
			raw[i] = 'a'
		}
		if err := f.save(); err != nil {
			t.Fatal(err)
		}
		r := start(t, path)
		r.want(t, "a@1")
		r.refused(t, "unverified", 1)
		if got := <-r.feed.watched; got != (position{}) {
			t.Errorf("it resumes at %v, want a full resync", got)
		}
	})
}

func TestViewsNeverChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, "")
		r.tell(all(1, record(t, "a", 1, time.Hour)))
		v := r.View()
		before := fmt.Sprint(slices.Sorted(maps.Keys(names(v))))
		r.tell(some(2, record(t, "a", 2, time.Hour), record(t, "b", 1, time.Hour)))
		if after := fmt.Sprint(slices.Sorted(maps.Keys(names(v)))); after != before {
			t.Error("a view that was handed out has changed")
		}
		n := 0
		for range r.View().Of(webgw.KindExposure) {
			n++
		}
		if n != 2 {
			t.Errorf("%d exposures, want 2", n)
		}
	})
}
