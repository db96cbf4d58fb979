package cli

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client/manifest"
	"webgw.dev/webgw/internal/ident"
)

// maxSecret bounds a client's secret, bytes.
const maxSecret = 1 << 10

// sealVerb prints a secret so that it can stand in a file: only the gateways
// named can read it, and only out of the owner's records.
type sealVerb struct {
	Gateways []string `name:"gateway" required:"" help:"Gateway that may read the secret: each of the exposure's." placeholder:"NAME"`
	ownerFlags
}

func (v *sealVerb) Run(ctx context.Context, a *app) error {
	c, err := a.connect(v.ownerFlags)
	if err != nil {
		return err
	}
	defer c.Close()
	d := newDirectory(c)
	var to []webgw.ID
	for _, name := range v.Gateways {
		id, err := manifest.Resolve(ctx, d, webgw.KindGateway, "gateway", name)
		if err != nil {
			return err
		}
		to = append(to, id)
	}
	secret, err := io.ReadAll(io.LimitReader(a.env.Stdin, maxSecret+1))
	if err != nil || len(secret) > maxSecret {
		return invalid("secret", "", "standard input can't be read, or holds more than %d bytes", maxSecret)
	}
	key := make([]byte, 32) // of visitors' sessions: one for all gateways
	rand.Read(key)          // never fails
	sealed, err := ident.Seal(append(key, bytes.TrimRight(secret, "\r\n")...), c.Key.ID(), to...)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(struct {
			Sealed webgw.Sealed `json:"sealed"`
		}{sealed})
	}
	a.printf("%s\n", sealed)
	for _, id := range to { // the registry has said whose names they are
		a.notef("sealed to %s\n", id)
	}
	return nil
}
