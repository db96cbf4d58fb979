package daemon

import (
	"context"

	"webgw.dev/webgw"
)

// The wiring of the roles lands here once their engines have.
var errNotBuilt = &webgw.Error{Op: "start", Kind: webgw.Unsupported, Public: "this build has no such role"}

func runRegistry(context.Context, RegistryConfig, Env) error { return errNotBuilt }
func runGateway(context.Context, GatewayConfig, Env) error   { return errNotBuilt }
