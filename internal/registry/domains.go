package registry

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/idn"
)

// lookupRate is how fast one identity may make the registry ask resolvers.
var lookupRate = WriteRate{PerSecond: 2, Burst: 100}

// mayLookUp takes one look-up out of id's allowance.
func (s *Server) mayLookUp(id webgw.ID) error {
	if s.asked.take(id, lookupRate) {
		return nil
	}
	s.metrics.limited.WithLabelValues("lookups").Inc()
	return &webgw.Error{Kind: webgw.Exhausted, Public: fmt.Sprintf("this registry looks up %g domains a second for one identity, %d at once", lookupRate.PerSecond, lookupRate.Burst), Hint: "try again more slowly"}
}

// domain answers GET /v1/domain: how a name stands with the asker.
func (s *Server) domain(w http.ResponseWriter, r *http.Request, id webgw.ID) error {
	name := r.URL.Query().Get("name")
	if err := webgw.CheckHost("name", name, true); err != nil {
		return err
	}
	if err := idn.Check("name", name); err != nil {
		return err
	}
	now := time.Now()
	out := webgw.DomainStatus{Name: name, Want: []webgw.DNSWant{}, Seen: []webgw.DNSSeen{}}
	s.mirror.mu.RLock()
	p := newPlan(s.mirror, now, s.grace(), s.quota())
	p.owner = id
	out.Needed = p.needsProof(name)
	out.Free = !p.others("host/" + name)
	best, key := s.mirror.proofLocked(name, []webgw.ID{id}, now)
	s.mirror.mu.RUnlock()
	if best != nil {
		out.Domain, _, _ = parseProofKey(key)
		out.Lapses = s.mirror.lapses(best)
	}
	if !out.Needed {
		out.Why = "needs no proof: this registry gives names to whoever comes first"
		if s.Domains != nil {
			out.Why = "needs no proof: it lies in a zone of the grid or of a gateway"
		}
		return reply(w, http.StatusOK, out)
	}
	if err := s.mayLookUp(id); err != nil {
		return err
	}
	fs := s.lookUp(r.Context(), name, []webgw.ID{id})
	for _, f := range slices.Backward(fs) {
		record := proofLabel + "." + f.domain
		out.Want = append(out.Want, webgw.DNSWant{Name: record, Type: webgw.TypeTXT, Value: id.String()})
		for _, h := range f.heard {
			out.Seen = append(out.Seen, webgw.DNSSeen{Resolver: h.resolver, Name: record, Values: h.values, Fault: h.fault})
		}
		if f.verdict == present && !out.Proved {
			out.Proved, out.Domain = true, f.domain
		}
	}
	switch {
	case out.Proved:
		out.Why = fmt.Sprintf("proved by %s.%s", proofLabel, out.Domain)
	case best != nil:
		out.Why = fmt.Sprintf("was proved by %s.%s, which is not seen any more", proofLabel, out.Domain)
	default:
		out.Why = "is not proved; " + words(fs)
	}
	return reply(w, http.StatusOK, out)
}

// warnings tells of an exposure's names what its owner should know in time.
func (s *Server) warningsLocked(x *entry, now time.Time) (out []string) {
	if !s.mirror.proving {
		return nil
	}
	p := newPlan(s.mirror, now, s.grace(), s.quota())
	for _, h := range x.Record.Exposure.Hosts {
		if !p.needsProof(h) {
			continue
		}
		best, key := s.mirror.proofLocked(h, []webgw.ID{x.key.Owner}, now)
		switch {
		case best == nil:
			out = append(out, fmt.Sprintf("%s is not proved to be yours, and others who prove it may take it; webgw domain check %s", h, h))
		case best.Lost != 0:
			domain, _, _ := strings.Cut(key, "/")
			out = append(out, fmt.Sprintf("the record %s.%s, which proves %s, is missing since %s; the name may be lost after %s",
				proofLabel, domain, h, time.Unix(best.Lost, 0).UTC().Format(time.RFC3339), s.mirror.lapses(best).UTC().Format(time.RFC3339)))
		}
	}
	return out
}
