package registry

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/publicsuffix"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx"
)

// Domains is how the registry sees to whom a domain belongs: by what several
// resolvers say, of whom more than half must agree.
type Domains struct {
	Resolvers []string // host:port; asked over TCP, which nobody forges from afar
	Net       netx.Net // nil: the machine's own

	// Every is how often a proof is looked at again, Grace how long it may be
	// missing before it counts no more. 0: DefaultProofEvery, DefaultProofGrace.
	Every, Grace time.Duration
}

// Defaults of the fields of Domains, and bounds.
const (
	DefaultProofEvery = 12 * time.Hour
	DefaultProofGrace = 7 * 24 * time.Hour
	MaxResolvers      = 16

	lookupTimeout = 5 * time.Second
	maxLookups    = 64 // at once
	maxSeen       = 16 // values that are told of one answer
)

// proofLabel stands before a domain whose owner is told there.
const proofLabel = "_webgw"

func (d *Domains) every() time.Duration {
	if d.Every == 0 {
		return DefaultProofEvery
	}
	return d.Every
}

func (d *Domains) grace() time.Duration {
	if d.Grace == 0 {
		return DefaultProofGrace
	}
	return d.Grace
}

// proofDomains lists the domains by which a host may be proved, nearest first:
// itself, and those above it down from the registrable one (a name directly
// below a public suffix). Who may register below a suffix proves nothing by it.
func proofDomains(host string) []string {
	host = strings.TrimPrefix(host, "*.")
	domains := []string{host}
	base, err := publicsuffix.EffectiveTLDPlusOne(host)
	if err != nil || base == host { // host is a suffix itself
		return domains
	}
	var up []string
	for a := above(host); webgw.Under(a, base) || a == base; a = above(a) {
		up = append(up, a)
	}
	// A name of a hundred labels must not be a hundred questions.
	return append(domains, up[max(0, len(up)-4):]...)
}

// heardOf is what one resolver says of one question.
type heardOf struct {
	resolver string
	values   []string
	fault    string // why there are none: "no such name", "not reached"…
	gone     bool   // the fault is an answer: there is no such record
}

// texts asks every resolver for the TXT records of a name.
func (s *Server) texts(ctx context.Context, name string) []heardOf {
	out := make([]heardOf, len(s.Domains.Resolvers))
	var wg sync.WaitGroup
	for i, r := range s.Domains.Resolvers {
		wg.Go(func() {
			out[i] = heardOf{resolver: r}
			msg, err := s.exchange(ctx, r, name, dns.TypeTXT)
			if err != nil {
				out[i].fault = "can't be asked"
				s.log().Debug("registry: resolver not reached", "resolver", r, "err", err)
				return
			}
			out[i].read(msg, dns.Fqdn(name))
		})
	}
	wg.Wait()
	return out
}

// read takes the TXT records of exactly this name out of an answer. A CNAME is
// not followed: with a wildcard CNAME, which is how names are often pointed at a
// gateway, whoever is pointed at could prove every name below it.
func (h *heardOf) read(msg *dns.Msg, name string) {
	alias := ""
	for _, rr := range msg.Answer {
		if !strings.EqualFold(rr.Header().Name, name) {
			continue
		}
		switch rr := rr.(type) {
		case *dns.TXT:
			if len(h.values) < maxSeen {
				h.values = append(h.values, strings.Join(rr.Txt, ""))
			}
		case *dns.CNAME:
			alias = strings.TrimSuffix(rr.Target, ".")
		}
	}
	switch {
	case len(h.values) > 0:
	case alias != "":
		h.fault, h.gone = "is a CNAME to "+alias+", which is not followed", true
	case msg.Rcode == dns.RcodeNameError:
		h.fault, h.gone = "no such name", true
	case msg.Rcode == dns.RcodeSuccess:
		h.fault, h.gone = "no TXT record", true
	default:
		h.fault = "answers " + dns.RcodeToString[msg.Rcode]
	}
}

// exchange asks one resolver one question over TCP.
func (s *Server) exchange(ctx context.Context, resolver, name string, qtype uint16) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	select {
	case s.lookups <- struct{}{}:
		defer func() { <-s.lookups }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	nw := s.Domains.Net
	if nw == nil {
		nw = netx.Host{}
	}
	conn, err := nw.Dial(ctx, "tcp", resolver, nil)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	q := new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype)
	q.Id = uint16(rand.Uint32())
	q.SetEdns0(4096, false)
	c := &dns.Conn{Conn: conn}
	if err := c.WriteMsg(q); err != nil {
		return nil, err
	}
	a, err := c.ReadMsg()
	switch {
	case err != nil:
		return nil, err
	case a.Id != q.Id || !a.Response || len(a.Question) != 1 || a.Question[0].Qtype != qtype || !strings.EqualFold(a.Question[0].Name, q.Question[0].Name):
		return nil, errors.New("the answer is to another question")
	}
	return a, nil
}

// verdict is what resolvers agree on.
type verdict int

const (
	unknown verdict = iota // too few answers
	absent                 // more than half say that the proof is not there
	present                // more than half show it
)

// judge counts who shows one of the identities.
func judge(heard []heardOf, ids []webgw.ID) verdict {
	yes, no := 0, 0
	for _, h := range heard {
		switch {
		case slices.ContainsFunc(h.values, func(v string) bool { return isProof(v, ids) }):
			yes++
		case h.gone || len(h.values) > 0:
			no++
		}
	}
	switch half := len(heard) / 2; {
	case yes > half:
		return present
	case no > half:
		return absent
	}
	return unknown
}

// isProof reports whether a text holds one of the identities, and nothing else.
func isProof(text string, ids []webgw.ID) bool {
	id, err := webgw.ParseID(strings.TrimSpace(text))
	return err == nil && slices.Contains(ids, id)
}

// found is what was looked up of one domain.
type found struct {
	domain  string
	heard   []heardOf
	verdict verdict
}

// lookUp looks for a proof of host by one of ids, at all domains that would do.
func (s *Server) lookUp(ctx context.Context, host string, ids []webgw.ID) []found {
	domains := proofDomains(host)
	out := make([]found, len(domains))
	var wg sync.WaitGroup
	for i, d := range domains {
		wg.Go(func() {
			heard := s.texts(ctx, proofLabel+"."+d)
			out[i] = found{d, heard, judge(heard, ids)}
		})
	}
	wg.Wait()
	return out
}

// words sums up in a sentence what was seen instead of a proof.
func words(fs []found) string {
	f := fs[0]
	for _, g := range fs {
		for _, h := range g.heard {
			if len(h.values) > 0 {
				f = g
			}
		}
	}
	n := map[string]int{}
	for _, h := range f.heard {
		switch {
		case len(h.values) > 0:
			n["other text"]++
		default:
			n[h.fault]++
		}
	}
	var parts []string
	for what, k := range n {
		parts = append(parts, fmt.Sprintf("%d of %d resolvers: %s", k, len(f.heard), what))
	}
	slices.Sort(parts)
	return fmt.Sprintf("%s.%s TXT: %s", proofLabel, f.domain, strings.Join(parts, ", "))
}
