package registry

import (
	"fmt"
	"strings"

	"webgw.dev/webgw"
)

// This file is every sentence by which a status tells why something is up or
// not. It turns facts into words and looks nothing up.

// wayFacts is what is known of an exposure at one gateway.
type wayFacts struct {
	name     string // of the gateway
	declared bool   // it has a live record
	reports  bool   // within the last 15 seconds
	behind   bool   // it has not taken in the latest version
	problem  string // what it says is wrong, or ""
	targets  []targetFacts
}

// targetFacts is what is known of a target as seen from one gateway.
type targetFacts struct {
	name     string // of the node, or the direct address
	direct   bool   // dialed by the gateway
	declared bool
	reports  bool
	session  bool   // between the node and the gateway
	failure  string // why the node has no session, in its words
	problem  string // why the node refuses the target, in its words
}

// partyWords says whether a gateway or node is up.
func partyWords(kind webgw.Kind, name string, st *webgw.Status) (up bool, why string) {
	if st == nil {
		return false, fmt.Sprintf("%s %s has not reported for 15 seconds or more", kind, name)
	}
	if st.Gateway != nil {
		return true, "reports " + count(len(st.Gateway.Sessions), "session")
	}
	n := 0
	for _, x := range st.Node.Sessions {
		if x.State == webgw.SessionUp {
			n++
		}
	}
	if n == 0 && len(st.Node.Sessions) > 0 {
		why = fmt.Sprintf("node %s runs but has no session with any gateway", name)
		if e := st.Node.Sessions[0].Error; e != "" {
			why += ": " + e
		}
		return false, why
	}
	return true, "reports " + count(n, "session")
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// wayWords says whether visitors get through to an exposure by one gateway.
func wayWords(f wayFacts) (up bool, why string) {
	gw := "gateway " + f.name
	switch {
	case !f.declared:
		return false, gw + " has been withdrawn or has expired"
	case !f.reports:
		return false, gw + " has not reported for 15 seconds or more"
	case f.problem != "":
		return false, gw + ": " + f.problem
	case f.behind:
		return false, gw + " has not taken in the latest version yet"
	}
	var reasons []string
	for _, t := range f.targets {
		ok, reason := targetWords(t, gw)
		up = up || ok
		if !ok {
			reasons = append(reasons, reason)
		}
	}
	switch {
	case !up && len(reasons) == 0:
		return false, "there is no target"
	case !up:
		return false, strings.Join(reasons, "; ")
	case len(reasons) > 0:
		return true, fmt.Sprintf("served by %d of %d targets: %s", len(f.targets)-len(reasons), len(f.targets), strings.Join(reasons, "; "))
	}
	return true, "served by " + gw
}

func targetWords(t targetFacts, gw string) (ok bool, reason string) {
	node := "node " + t.name
	switch {
	case t.direct:
		return true, ""
	case !t.declared:
		return false, node + " has been withdrawn or has expired"
	case t.problem != "":
		return false, node + ": " + t.problem
	case t.session:
		return true, ""
	case !t.reports:
		return false, node + " has not reported for 15 seconds or more"
	case t.failure != "":
		return false, fmt.Sprintf("%s has no session with %s: %s", node, gw, t.failure)
	}
	return false, fmt.Sprintf("%s has no session with %s", node, gw)
}

// exposureWords sums up the ways to an exposure.
func exposureWords(ways []webgw.WayStatus) (up bool, why string) {
	var good, bad []string
	for _, w := range ways {
		if w.Up {
			good = append(good, w.Name)
		} else {
			bad = append(bad, w.Why)
		}
	}
	switch {
	case len(good) == 0:
		return false, strings.Join(bad, "; ")
	case len(bad) > 0:
		return true, fmt.Sprintf("up at %d of %d gateways; %s", len(good), len(ways), strings.Join(bad, "; "))
	case len(good) == 1:
		return true, "up at gateway " + good[0]
	}
	return true, fmt.Sprintf("up at all %d gateways", len(good))
}
