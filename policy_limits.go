package webgw

import (
	"slices"
	"strings"
	"time"
)

// Compress lets the gateway compress answers that the workload has not.
type Compress struct {
	Types   []string `json:"types,omitempty"`   // content types, "text/*" too; none: the usual ones of texts
	MinSize int64    `json:"minSize,omitempty"` // bytes, of answers that tell their length; 0: 1024
}

const (
	maxTypes   = 64
	maxMinSize = 1 << 30
)

func (c *Compress) validate() error {
	if c == nil {
		return nil
	}
	if len(c.Types) > maxTypes {
		return invalid("types", "holds more than %d", maxTypes)
	}
	for i, t := range c.Types {
		kind, sub, ok := strings.Cut(t, "/")
		if !ok || !isTypeName(kind) || sub != "*" && !isTypeName(sub) {
			return invalid(index("types", i), "%q is not a content type in lower case without parameters, such as text/html or text/*", clip(t, 60))
		}
		if slices.Contains(c.Types[:i], t) {
			return invalid(index("types", i), "stands twice")
		}
	}
	if c.MinSize < 0 || c.MinSize > maxMinSize {
		return invalid("minSize", "must be a number of bytes up to 2^30")
	}
	return nil
}

// isTypeName reports whether s is a half of a content type (RFC 6838 section
// 4.2), in lower case.
func isTypeName(s string) bool {
	return s != "" && len(s) <= 127 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789!#$&-^_.+") == ""
}

func checkCountries(field string, list []string) error {
	for i, c := range list {
		if len(c) != 2 || strings.Trim(c, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") != "" {
			return invalid(index(field, i), "%q is not a country's code of two capitals, such as BE", clip(c, 20))
		}
		if slices.Contains(list[:i], c) {
			return invalid(index(field, i), "stands twice")
		}
	}
	return nil // two letters, each once: there can't be many
}

// Timeouts bound how long visitors may take; times such as "90s", "5m" or "2h".
type Timeouts struct {
	Request    string `json:"request,omitempty"`    // a whole HTTP request with its answer; not what is upgraded
	Idle       string `json:"idle,omitempty"`       // of a stream, upgraded connection or flow on which nothing passes
	Connection string `json:"connection,omitempty"` // of such a one as a whole
}

const (
	minTimeout = time.Second
	maxTimeout = 30 * 24 * time.Hour
)

// Duration reads one of the times; 0 if it is missing or not valid.
func (t *Timeouts) Duration(s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil || d < minTimeout || d > maxTimeout {
		return 0
	}
	return d
}

func (t *Timeouts) validate(protocol ExposureProtocol) error {
	if t == nil {
		return nil
	}
	if t.Request != "" && protocol != HTTP {
		return invalid("request", "belongs to protocol http only; %s has idle and connection", protocol)
	}
	if t.Request+t.Idle+t.Connection == "" {
		return invalid("", "must hold request, idle or connection")
	}
	for _, f := range [...][2]string{{"request", t.Request}, {"idle", t.Idle}, {"connection", t.Connection}} {
		if f[1] != "" && t.Duration(f[1]) == 0 {
			return invalid(f[0], "%q is not a time from 1s to 720h, such as 90s, 5m or 2h", clip(f[1], 40))
		}
	}
	return nil
}

// Bandwidth bounds how fast bytes pass. What comes faster waits; datagrams are
// dropped.
type Bandwidth struct {
	Connection *Throughput `json:"connection,omitempty"` // of one connection or flow of a visitor
	Total      *Throughput `json:"total,omitempty"`      // of all together
}

// Throughput is how many bytes of payload may pass in a second; of HTTP, those
// of bodies and of what is upgraded.
type Throughput struct {
	In  int64 `json:"in,omitempty"`  // to the workload; 0: no limit
	Out int64 `json:"out,omitempty"` // to visitors; 0: no limit
}

const (
	minThroughput = 1_000
	maxThroughput = 1 << 40
)

func (b *Bandwidth) validate() error {
	if b == nil {
		return nil
	}
	if b.Connection == nil && b.Total == nil {
		return invalid("", "must hold connection, total or both")
	}
	if err := in("connection", b.Connection.validate()); err != nil {
		return err
	}
	return in("total", b.Total.validate())
}

func (t *Throughput) validate() error {
	if t == nil {
		return nil
	}
	if t.In == 0 && t.Out == 0 {
		return invalid("", "must hold in, out or both")
	}
	for _, f := range [...]struct {
		name string
		n    int64
	}{{"in", t.In}, {"out", t.Out}} {
		if f.n != 0 && (f.n < minThroughput || f.n > maxThroughput) {
			return invalid(f.name, "must be from %d to 2^40 bytes a second", minThroughput)
		}
	}
	return nil
}
