package webgw

import "time"

// Status is what a gateway or a node reports of itself every few seconds. It
// is not signed: it is believed as far as the identity that reports it, and
// nothing is decided by it but what people are shown.
type Status struct {
	Release  string    `json:"release"`           // of the software, for people
	Protocol int       `json:"protocol"`          // highest it speaks
	Since    time.Time `json:"since"`             // start of the process
	Rev      int64     `json:"rev"`               // revision of the registry that it has applied; 0: none yet
	Gateway  *GwStatus `json:"gateway,omitempty"` // exactly one of these two
	Node     *NdStatus `json:"node,omitempty"`
}

// GwStatus is a gateway's part of its status.
type GwStatus struct {
	Addresses []string  `json:"addresses,omitempty"` // where it listens for nodes and visitors
	Sessions  []ID      `json:"sessions,omitempty"`  // nodes with a live session
	Problems  []Problem `json:"problems,omitempty"`  // exposures that it does not serve as declared; none: all is well
}

// NdStatus is a node's part of its status.
type NdStatus struct {
	Sessions []SessionStatus `json:"sessions,omitempty"` // one per gateway that it has to do with
	Problems []Problem       `json:"problems,omitempty"` // targets that it refuses or can't reach
}

// Problem is one thing about an exposure that is not as its owner declared.
type Problem struct {
	Exposure Key    `json:"exposure"`
	Code     string `json:"code"`           // an error kind, or a word of the reporter's
	Text     string `json:"text,omitempty"` // one sentence for the owner
}

// SessionStatus is how a node stands with one gateway.
type SessionStatus struct {
	Gateway ID        `json:"gateway"`
	State   string    `json:"state"` // one of the Session… words
	Since   time.Time `json:"since"`
	Error   string    `json:"error,omitempty"` // why it is not up, for people
}

// States of a session.
const (
	SessionUp         = "up"
	SessionConnecting = "connecting"
	SessionDraining   = "draining"
)

// Limits of a status.
const (
	MaxStatus   = 512 << 10 // bytes of JSON
	maxSessions = 10_000
	maxProblems = 1_000
)

// Validate checks a status; the error names the field.
func (s *Status) Validate() error {
	if err := checkText("release", s.Release, 100); err != nil {
		return err
	}
	if s.Protocol < 1 {
		return invalid("protocol", "missing")
	}
	if s.Rev < 0 {
		return invalid("rev", "must not be negative")
	}
	if (s.Gateway == nil) == (s.Node == nil) {
		return invalid("", "a status is either a gateway's or a node's")
	}
	if g := s.Gateway; g != nil {
		if len(g.Addresses) > 64 {
			return invalid("gateway.addresses", "more than 64")
		}
		for i, a := range g.Addresses {
			if err := checkText(index("gateway.addresses", i), a, 300); err != nil {
				return err
			}
		}
		if err := checkIDs("gateway.sessions", g.Sessions, maxSessions); err != nil {
			return err
		}
		return checkProblems("gateway.problems", g.Problems)
	}
	if len(s.Node.Sessions) > maxSessions {
		return invalid("node.sessions", "more than %d", maxSessions)
	}
	for i, x := range s.Node.Sessions {
		f := index("node.sessions", i)
		if x.Gateway.IsZero() {
			return invalid(f+".gateway", "missing")
		}
		switch x.State {
		case SessionUp, SessionConnecting, SessionDraining:
		default:
			return invalid(f+".state", "%q is not up, connecting or draining", clip(x.State, 20))
		}
		if err := checkText(f+".error", x.Error, 300); err != nil {
			return err
		}
	}
	return checkProblems("node.problems", s.Node.Problems)
}

func checkProblems(field string, ps []Problem) error {
	if len(ps) > maxProblems {
		return invalid(field, "more than %d", maxProblems)
	}
	for i, p := range ps {
		f := index(field, i)
		if err := in(f+".exposure", p.Exposure.validate()); err != nil {
			return err
		}
		if p.Exposure.Kind != KindExposure {
			return invalid(f+".exposure", "is not an exposure")
		}
		if p.Code == "" {
			return invalid(f+".code", "missing")
		}
		if err := checkText(f+".code", p.Code, 40); err != nil {
			return err
		}
		if err := checkText(f+".text", p.Text, 300); err != nil {
			return err
		}
	}
	return nil
}

// Overview is the answer to "how is it?": what the asker may see, each up or
// not, and why, in words.
type Overview struct {
	Rev       int64            `json:"rev"` // of the registry, when it was asked
	Gateways  []PartyStatus    `json:"gateways"`
	Nodes     []PartyStatus    `json:"nodes"`
	Exposures []ExposureStatus `json:"exposures"`
}

// PartyStatus is how a gateway or a node is.
type PartyStatus struct {
	ID       ID        `json:"id"`
	Name     string    `json:"name"`
	Up       bool      `json:"up"`
	Why      string    `json:"why"` // one sentence
	Release  string    `json:"release,omitempty"`
	Since    time.Time `json:"since,omitzero"`
	Rev      int64     `json:"rev,omitempty"` // that it has applied
	Sessions int       `json:"sessions"`      // that are up
}

// ExposureStatus is how an exposure is: up if a visitor of any of its gateways
// should get through.
type ExposureStatus struct {
	Key      Key         `json:"exposure"`
	Up       bool        `json:"up"`
	Why      string      `json:"why"`
	Warnings []string    `json:"warnings,omitempty"` // what will go wrong if nobody does anything, a sentence each
	Gateways []WayStatus `json:"gateways"`
}

// WayStatus is how an exposure is at one gateway.
type WayStatus struct {
	ID   ID     `json:"id"`
	Name string `json:"name,omitempty"`
	Up   bool   `json:"up"`
	Why  string `json:"why"`
}

// DomainStatus is how a host name stands with whoever asks: whether they have
// proved it to be theirs, what would prove it, and what is seen now.
type DomainStatus struct {
	Name   string    `json:"name"`
	Needed bool      `json:"needed"`           // false: nobody has to prove it here
	Proved bool      `json:"proved"`           // it is seen now
	Free   bool      `json:"free"`             // no other owner holds exactly this name
	Domain string    `json:"domain,omitempty"` // by which it is, or was, proved
	Lapses time.Time `json:"lapses,omitzero"`  // when a proof that is missing counts no more
	Why    string    `json:"why"`
	Want   []DNSWant `json:"want"` // any one of these proves it
	Seen   []DNSSeen `json:"seen"`
}

// DNSWant is a record that would prove a domain.
type DNSWant struct {
	Name  string  `json:"name"`
	Type  DNSType `json:"type"`
	Value string  `json:"value"`
}

// DNSSeen is what one resolver says of such a record.
type DNSSeen struct {
	Resolver string   `json:"resolver"`
	Name     string   `json:"name"`
	Values   []string `json:"values,omitempty"`
	Fault    string   `json:"fault,omitempty"` // why there are none
}
