package ingress

import "sync/atomic"

// tally is what one exposure uses, or all exposures of an owner together. The
// farmer's limits on both keep what many come for from taking all there is.
type tally struct {
	active atomic.Int64 // streams, flows and requests
	conns  atomic.Int64 // connections whose TLS ends here, idle ones too

	bandwidth atomic.Pointer[valves] // nil: made when it is first needed
}

// admit counts a stream, flow or request of the route in, or says which limit
// forbids it. Each "" needs a release.
func (r *Route) admit(limits *Limits) (reason string) {
	if r.guard != nil && !r.guard.enter() {
		return reasonBusy
	}
	exposure, owner := r.use.active.Add(1), r.owner.active.Add(1)
	switch {
	case exposure > int64(limits.PerExposure):
		reason = reasonExposure
	case owner > int64(limits.PerOwner):
		reason = reasonOwner
	default:
		return ""
	}
	r.release()
	return reason
}

func (r *Route) release() {
	r.use.active.Add(-1)
	r.owner.active.Add(-1)
	if r.guard != nil {
		r.guard.leave()
	}
}

// hold counts a connection to be terminated against its route, until it leaves,
// or says which limit forbids it.
func (v *visit) hold(r *Route) (reason string) {
	limits := &v.server.limits
	exposure, owner := r.use.conns.Add(1), r.owner.conns.Add(1)
	v.held = r
	switch {
	case exposure > int64(limits.PerExposure):
		reason = reasonExposure
	case owner > int64(limits.PerOwner):
		reason = reasonOwner
	default:
		return ""
	}
	v.unhold()
	return reason
}

func (v *visit) unhold() {
	if r := v.held; r != nil {
		v.held = nil
		r.use.conns.Add(-1)
		r.owner.conns.Add(-1)
	}
}
