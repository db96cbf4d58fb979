package client

import (
	"testing"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
)

func TestParseRegistry(t *testing.T) {
	id := ident.FromSeed([32]byte{1}).ID()
	for _, c := range []struct {
		in       string
		id       webgw.ID
		endpoint string
		ok       bool
	}{
		{id.String() + "@gent.example:443", id, "gent.example:443", true},
		{"gent.example:443", webgw.ID{}, "gent.example:443", true},
		{id.String() + "@[2001:db8::1]:443", id, "[2001:db8::1]:443", true},
		{"gent.example", webgw.ID{}, "", false},
		{":443", webgw.ID{}, "", false},
		{"me@gent.example:443", webgw.ID{}, "", false},
		{"@gent.example:443", webgw.ID{}, "", false},
		{id.String() + "@gent.example:0", webgw.ID{}, "", false},
	} {
		got, endpoint, err := ParseRegistry(c.in)
		if got != c.id || endpoint != c.endpoint || (err == nil) != c.ok {
			t.Errorf("%q: %s, %q, %v", c.in, got, endpoint, err)
		}
	}
}

// A record that does not verify is told of and left out; the rest of the line
// counts.
func TestBadRecordsAreLeftOut(t *testing.T) {
	k := ident.FromSeed([32]byte{1})
	s, err := k.Sign(webgw.Record{Version: 1, Kind: webgw.KindName, Name: "a.example", Seq: 1, NameClaim: &webgw.NameClaim{},
		Issued: day(1), Expires: day(2)})
	if err != nil {
		t.Fatal(err)
	}
	ch, bad, err := parseLine([]byte(`{"rev":7,"epoch":"e","reset":true,"records":[{"payload":"forged"},` + string(s.Envelope()) + `]}`))
	if err != nil || len(bad) != 1 || len(ch.Records) != 1 || ch.Rev != 7 || !ch.Reset || ch.Synced {
		t.Errorf("%+v, %v, %v", ch, bad, err)
	}
	if _, _, err := parseLine([]byte("<html>")); webgw.KindOf(err) != webgw.Unsupported {
		t.Errorf("what is no JSON: %v", err)
	}
}

func day(n int) time.Time { return time.Date(2026, 1, n, 0, 0, 0, 0, time.UTC) }
