package webgw

import (
	"net/netip"
	"time"
)

// Access tells the owner of a workload, through its node, of one HTTP request
// that a gateway has answered. It is information only: nothing is decided by
// it, and events may be lost.
type Access struct {
	Time     time.Time     `json:"time"` // when the request's head had been read
	Gateway  ID            `json:"gateway,omitzero"`
	Exposure Key           `json:"exposure"`
	Visitor  netip.Addr    `json:"visitor,omitzero"`
	Method   string        `json:"method"`
	Host     string        `json:"host"`
	Path     string        `json:"path"` // without the query, which may hold secrets
	Proto    string        `json:"proto,omitempty"`
	Status   int           `json:"status"`
	BytesIn  int64         `json:"bytesIn"`
	BytesOut int64         `json:"bytesOut"`
	Took     time.Duration `json:"took"`         // nanoseconds
	ID       string        `json:"id,omitempty"` // request id, as shown on error pages
}
