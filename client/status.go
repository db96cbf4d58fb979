package client

import (
	"context"
	"encoding/json"
	"net/url"
	"strconv"

	"webgw.dev/webgw"
)

// Info tells which registry this is and where it stands.
type Info struct {
	ID       webgw.ID `json:"id"`
	Protocol int      `json:"protocol"`
	Epoch    string   `json:"epoch"` // of this history; changes with a restore
	Rev      int64    `json:"rev"`
	Zone     string   `json:"zone,omitempty"` // of the whole grid, for which every gateway answers; "": there is none
}

// Info asks the registry who it is.
func (c *Client) Info(ctx context.Context) (out Info, err error) {
	err = c.do(ctx, "ask the registry", "GET", "/v1/info", nil, &out)
	return out, err
}

// ReportStatus tells how the gateway or node c.Key is. Do it every 5 seconds:
// whoever is silent for 15 counts as down.
func (c *Client) ReportStatus(ctx context.Context, s webgw.Status) error {
	if err := s.Validate(); err != nil {
		return named("report status", err)
	}
	body, err := json.Marshal(s)
	if err != nil {
		return err
	}
	var out stored
	return c.do(ctx, "report status", "PUT", "/v1/status", body, &out)
}

// Status returns how everything is that c.Key may see.
func (c *Client) Status(ctx context.Context) (out webgw.Overview, err error) {
	err = c.do(ctx, "get status", "GET", "/v1/status", nil, &out)
	return out, err
}

// FreePort proposes a public port for webgw.TCP or webgw.UDP that all gateways offer and nobody holds
// now. It is taken only by an exposure that is declared with it.
func (c *Client) FreePort(ctx context.Context, protocol webgw.ExposureProtocol, gateways ...webgw.ID) (uint16, error) {
	return c.FreePorts(ctx, protocol, 1, gateways...)
}

// FreePorts proposes the first of count such ports in a row.
func (c *Client) FreePorts(ctx context.Context, protocol webgw.ExposureProtocol, count int, gateways ...webgw.ID) (first uint16, err error) {
	q := url.Values{"protocol": {string(protocol)}}
	if count != 1 {
		q.Set("count", strconv.Itoa(count))
	}
	for _, g := range gateways {
		q.Add("gateway", g.String())
	}
	var out struct {
		Port uint16 `json:"port"`
	}
	err = c.do(ctx, "find a free port", "GET", "/v1/ports?"+q.Encode(), nil, &out)
	return out.Port, err
}

// Domain tells how a host name stands with c.Key: whether it is proved to be
// theirs, what would prove it, and what the registry's resolvers see now.
func (c *Client) Domain(ctx context.Context, host string) (out webgw.DomainStatus, err error) {
	err = c.do(ctx, "check domain", "GET", "/v1/domain?"+url.Values{"name": {host}}.Encode(), nil, &out)
	return out, err
}
