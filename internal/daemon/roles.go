package daemon

import (
	"context"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/store"
)

// The wiring of the roles lands here once their engines have.
var errNotBuilt = &webgw.Error{Op: "start", Kind: webgw.Unsupported, Public: "this build has no such role"}

func runGateway(context.Context, GatewayConfig, Env) error { return errNotBuilt }

func openEtcd(context.Context, RegistryConfig, Env) (store.KV, error) { return nil, errNotBuilt }
