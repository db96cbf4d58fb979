package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
)

// Scope is what a watch is for.
type Scope string

// The scopes of a watch.
const (
	// ScopeGateway: exposures that the gateway carries or has carried, its own
	// record, and the nodes that they lead to.
	ScopeGateway Scope = "gateway"
	// ScopeNode: exposures that lead to the node or have led there, its own
	// record, and the gateways that carry them.
	ScopeNode Scope = "node"
	// ScopeOwner: the owner's records, every gateway, and the nodes that the
	// owner may see.
	ScopeOwner Scope = "owner"
)

// Change is news from a watch. A watch begins either with everything (Reset)
// or with what was missed; Synced marks the end of that. Records may come
// again: only a higher Seq is news.
type Change struct {
	Rev     int64  // resume from here; 0: not yet, more of the same revision follows
	Epoch   string // pass it on with Rev when resuming
	Records []Signed
	Reset   bool // what comes from here to Synced is everything there is
	Synced  bool
}

// silence is how long a watch may be silent before its connection counts as
// dead: three heartbeats of the registry.
const silence = 15 * time.Second

const maxLine = 1 << 20 // bytes of a line; the registry keeps well below

// Watch yields what concerns c.Key in a scope, from revision since of epoch on
// (0: everything), by one connection. A record that fails verification is left
// out and told of by an error element; the watch goes on. The last element is
// always an error: ctx's, the registry's refusal, or Unavailable after a lost
// connection, upon which the caller watches again from the last Rev.
func (c *Client) Watch(ctx context.Context, scope Scope, since int64, epoch string) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		c.init()
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		release := context.AfterFunc(c.stop, func() { cancel(errClosed) })
		defer release()

		q := url.Values{"scope": {string(scope)}, "since": {strconv.FormatInt(since, 10)}, "epoch": {epoch}}
		var resp *http.Response
		err := c.each(ctx, 1, func(i int) (final bool, err error) {
			resp, final, err = c.ask(ctx, i, "GET", "/v1/watch?"+q.Encode(), nil)
			return final, err
		})
		if err != nil {
			yield(Change{}, named("watch", because(ctx, err)))
			return
		}
		defer resp.Body.Close()
		dead := time.AfterFunc(silence, func() { cancel(errSilent) })
		defer dead.Stop()
		lines := bufio.NewScanner(resp.Body)
		lines.Buffer(make([]byte, 0, 4096), maxLine)
		for lines.Scan() {
			dead.Stop() // what the consumer takes is no silence of the registry's
			ch, bad, err := parseLine(lines.Bytes())
			if err != nil {
				yield(Change{}, named("watch", err))
				return
			}
			for _, err := range bad {
				if !yield(Change{}, named("watch", err)) {
					return
				}
			}
			if !yield(ch, nil) {
				return
			}
			dead.Reset(silence)
		}
		if err = lines.Err(); err == nil {
			err = io.ErrUnexpectedEOF
		}
		if err = because(ctx, err); errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			yield(Change{}, err)
			return
		}
		yield(Change{}, &webgw.Error{Op: "watch", Kind: webgw.Unavailable, Public: "the connection to the registry was lost", Err: err})
	}
}

var (
	errSilent = errors.New("client: no heartbeat for 15 seconds")
	errClosed = errors.New("client: closed")
)

func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// parseLine verifies every record of a line; bad are those that fail.
func parseLine(data []byte) (ch Change, bad []error, err error) {
	var l struct {
		Rev     int64             `json:"rev"`
		Epoch   string            `json:"epoch"`
		Records []json.RawMessage `json:"records"`
		Reset   bool              `json:"reset"`
		Synced  bool              `json:"synced"`
	}
	if err := json.Unmarshal(data, &l); err != nil {
		return Change{}, nil, &webgw.Error{Kind: webgw.Unsupported, Public: "a line of the watch can't be read", Err: err}
	}
	ch = Change{Rev: l.Rev, Epoch: l.Epoch, Reset: l.Reset, Synced: l.Synced}
	for _, raw := range l.Records {
		s, err := ident.Verify(raw)
		if err != nil {
			bad = append(bad, err)
			continue
		}
		ch.Records = append(ch.Records, s)
	}
	return ch, bad, nil
}
