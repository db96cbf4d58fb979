package client

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
)

// DefaultLifetime is how long a declared record counts when Expires is zero.
const DefaultLifetime = 365 * 24 * time.Hour

type stored struct {
	Rev int64 `json:"rev"`
}

// Put declares what is already signed and returns the revision at which it
// stands. Doing it twice does no harm.
func (c *Client) Put(ctx context.Context, s Signed) (rev int64, err error) {
	if s.IsZero() {
		return 0, &webgw.Error{Op: "declare", Kind: webgw.Invalid, Public: "there is no record"}
	}
	method := "PUT"
	if s.Record.Deleted {
		method = "DELETE"
	}
	var out stored
	err = c.do(ctx, "declare "+s.Record.Key().String(), method, recordPath(s.Record.Key()), s.Envelope(), &out)
	return out.Rev, err
}

// Get returns the newest version of a record, also if it is withdrawn or has
// expired (Record.Live tells). NotFound: there is none that c.Key may see.
func (c *Client) Get(ctx context.Context, k webgw.Key) (Signed, error) {
	op := "get " + k.String()
	var raw []byte
	if err := c.do(ctx, op, "GET", recordPath(k), nil, &raw); err != nil {
		return Signed{}, err
	}
	s, err := ident.Verify(raw)
	if err != nil {
		return Signed{}, named(op, err)
	}
	if s.Record.Key() != k {
		return Signed{}, &webgw.Error{Op: op, Kind: webgw.Unsupported, Public: fmt.Sprintf("the registry answered with the record %s", s.Record.Key())}
	}
	return s, nil
}

// List returns the live records of a kind ("": every kind) and owner (zero:
// every owner) that c.Key may see, in key order.
func (c *Client) List(ctx context.Context, kind webgw.Kind, owner webgw.ID) ([]Signed, error) {
	return c.list(ctx, kind, owner, false)
}

// ListAll is List with what is withdrawn or has expired but is still stored:
// what a backup needs.
func (c *Client) ListAll(ctx context.Context, kind webgw.Kind, owner webgw.ID) ([]Signed, error) {
	return c.list(ctx, kind, owner, true)
}

func (c *Client) list(ctx context.Context, kind webgw.Kind, owner webgw.ID, withdrawn bool) (all []Signed, err error) {
	const op = "list records"
	q := url.Values{"limit": {"250"}}
	if kind != "" {
		q.Set("kind", string(kind))
	}
	if !owner.IsZero() {
		q.Set("owner", owner.String())
	}
	if withdrawn {
		q.Set("withdrawn", "true")
	}
	for {
		var page struct {
			Records []json.RawMessage `json:"records"`
			Next    string            `json:"next"`
		}
		if err := c.do(ctx, op, "GET", "/v1/records?"+q.Encode(), nil, &page); err != nil {
			return nil, err
		}
		for _, raw := range page.Records {
			s, err := ident.Verify(raw)
			if err != nil {
				return nil, named(op, err)
			}
			all = append(all, s)
		}
		if page.Next == "" {
			return all, nil
		}
		if page.Next <= q.Get("after") {
			return nil, &webgw.Error{Op: op, Kind: webgw.Unsupported, Public: "the registry's pages don't move on"}
		}
		q.Set("after", page.Next)
	}
}

// Declare signs a record by c.Key and puts it. The sequence is set above the
// known version's; Version, Issued and Expires are set where zero, the latter
// to DefaultLifetime from now. It returns what was declared.
func (c *Client) Declare(ctx context.Context, r webgw.Record) (s Signed, rev int64, err error) {
	r.Owner = c.Key.ID()
	for try := 0; ; try++ {
		old, err := c.Get(ctx, r.Key())
		if err != nil && webgw.KindOf(err) != webgw.NotFound {
			return Signed{}, 0, err
		}
		s, rev, err = c.next(ctx, r, old)
		if webgw.KindOf(err) == webgw.Stale && try == 0 {
			continue // somebody with the same key was quicker
		}
		return s, rev, err
	}
}

// Delete withdraws the record k of c.Key: it signs a withdrawal of the version
// that the registry has. A record that is withdrawn already is left so.
func (c *Client) Delete(ctx context.Context, k webgw.Key) (rev int64, err error) {
	for try := 0; ; try++ {
		old, err := c.Get(ctx, k)
		if err != nil {
			return 0, err
		}
		if old.Record.Deleted {
			return 0, nil
		}
		if k.Owner != c.Key.ID() {
			return 0, &webgw.Error{Op: "withdraw " + k.String(), Kind: webgw.Forbidden, Public: "only its owner can withdraw a record", Hint: "use the key of " + k.Owner.String()}
		}
		r := *old.Record
		r.Deleted = true
		// It must outlive the version it withdraws, which others may hold.
		r.Issued = time.Time{}
		if now := time.Now(); r.Expires.Before(now.Add(time.Hour)) {
			r.Expires = now.Add(time.Hour)
		}
		_, rev, err = c.next(ctx, r, old)
		if webgw.KindOf(err) == webgw.Stale && try == 0 {
			continue
		}
		return rev, err
	}
}

// next signs and puts the version after old.
func (c *Client) next(ctx context.Context, r webgw.Record, old Signed) (Signed, int64, error) {
	now := time.Now()
	r.Seq = uint64(now.UnixMilli())
	if !old.IsZero() && old.Record.Seq >= r.Seq {
		r.Seq = old.Record.Seq + 1
	}
	if r.Version == 0 {
		r.Version = 1 // what every peer understands
	}
	if r.Issued.IsZero() {
		r.Issued = now
	}
	if r.Expires.IsZero() {
		r.Expires = r.Issued.Add(DefaultLifetime)
	}
	s, err := c.Key.Sign(r)
	if err != nil {
		return Signed{}, 0, named("declare "+r.Key().String(), err)
	}
	rev, err := c.Put(ctx, s)
	return s, rev, err
}
