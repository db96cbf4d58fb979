package cli

import (
	"context"

	"webgw.dev/webgw"
)

type whoamiVerb struct {
	ownerFlags
}

func (v *whoamiVerb) Run(ctx context.Context, a *app) error {
	path, err := a.ownerKeyPath(v.Key)
	if err != nil {
		return err
	}
	key, err := a.ownerKey(v.Key)
	if err != nil {
		return err
	}
	var out struct {
		ID       webgw.ID `json:"id"`
		Key      string   `json:"key"` // the file
		Registry string   `json:"registry,omitempty"`
	}
	out.ID, out.Key = key.ID(), path
	// Without a registry one still is somebody.
	if c, err := a.client(v.Registry, key, a.env.Net); err == nil {
		out.Registry = c.Endpoints[0]
		if !c.Server.IsZero() {
			out.Registry = c.Server.String() + "@" + out.Registry
		}
		c.Close()
	} else if v.Registry != "" {
		return err
	}
	if a.json {
		return a.printJSON(out)
	}
	a.printf("%s\nkey       %s\n", out.ID, out.Key)
	if out.Registry != "" {
		a.printf("registry  %s\n", out.Registry)
	}
	return nil
}
