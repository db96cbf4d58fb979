package cli

import "context"

type demoVerb struct {
	Check bool `help:"Try every exposure through every gateway, print a line for each, and exit."`
}

func (v *demoVerb) Run(ctx context.Context, a *app) error { return nil }
