package cli

import (
	"testing"
	"time"

	"webgw.dev/webgw"
)

// A value that is empty is not one that is absent.
func TestEmptyValuesAreDifferences(t *testing.T) {
	now := time.Now()
	record := func(fields map[string]string) *webgw.Record {
		e := &webgw.Exposure{Protocol: webgw.HTTP, Rules: []webgw.Rule{{Match: webgw.Match{Prefix: "/a", Headers: fields}}}}
		return &webgw.Record{Kind: webgw.KindExposure, Name: "a", Seq: 1, Issued: now, Expires: now.Add(time.Hour), Exposure: e}
	}
	action, changes, err := difference(record(nil), record(map[string]string{"X-Any": ""}), now)
	if err != nil || action != actionChange || len(changes) != 1 || changes[0].Field != "rules[0].match.headers.X-Any" {
		t.Error(action, changes, err)
	}
}
