package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/live"
)

// feed is the registry's watch as package live wants it.
type feed struct {
	client *client.Client
	scope  client.Scope
	log    *slog.Logger
}

// Watch implements live.Feed. The client tells a record that does not verify
// as an error after which the watch goes on; only the last error ends it.
func (f feed) Watch(ctx context.Context, since int64, epoch string) iter.Seq2[live.Change, error] {
	return func(yield func(live.Change, error) bool) {
		var last error
		refused := 0
		for c, err := range f.client.Watch(ctx, f.scope, since, epoch) {
			if last != nil {
				refused++
				f.log.Debug("a record does not verify", "err", last)
			}
			if last = err; err != nil {
				continue
			}
			if !yield(live.Change{Rev: c.Rev, Epoch: c.Epoch, Records: c.Records, Refused: refused, Reset: c.Reset, Synced: c.Synced}, nil) {
				return
			}
			refused = 0
		}
		if last != nil {
			yield(live.Change{}, last)
		}
	}
}

// Get implements live.Feed.
func (f feed) Get(ctx context.Context, key webgw.Key) (ident.Signed, error) {
	return f.client.Get(ctx, key)
}

// registries remembers, in a file, which identity answered at which address,
// for those who configured an address only: the first one met is believed, and
// from then on no other. It can withhold records then, but forge none.
type registries struct {
	path string
	log  *slog.Logger
	mu   sync.Mutex
}

// trust is a client's TrustServer.
func (r *registries) trust(addr string, id webgw.ID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	data, err := os.ReadFile(r.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for lines := bufio.NewScanner(strings.NewReader(string(data))); lines.Scan(); {
		known, at, _ := strings.Cut(lines.Text(), "@")
		if at != addr {
			continue
		}
		if known == id.String() {
			return nil
		}
		return &webgw.Error{Op: "connect", Kind: webgw.Unauthenticated, Public: fmt.Sprintf("the registry at %s is %s, and was %s before", addr, id, known),
			Hint: "if it was replaced on purpose, give it as ID@host:port"}
	}
	if err := os.MkdirAll(filepath.Dir(r.path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(r.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%s@%s\n", id, addr)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	r.log.Warn("met this registry for the first time and will trust no other at this address", "registry", id.String()+"@"+addr)
	return nil
}
