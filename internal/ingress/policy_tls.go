package ingress

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"time"

	"webgw.dev/webgw"
)

// clientTLS asks visitors for a certificate.
type clientTLS struct {
	config *tls.Config // nil: the policy's authorities can't be read, nobody gets in
}

// newClientTLS returns nil for a policy that asks for no certificate.
func newClientTLS(p *webgw.Policy, s *Server) (*clientTLS, error) {
	if p.ClientCA == "" {
		return nil, nil
	}
	authorities, err := webgw.ParseAuthorities("clientCA", p.ClientCA)
	if err != nil {
		return &clientTLS{}, err
	}
	pool := x509.NewCertPool()
	for _, a := range authorities {
		pool.AddCert(a)
	}
	config := s.web.tls.Clone()
	// Who shows none gets a page that says so; whoever shows a bad one gets an
	// alert.
	config.ClientAuth = tls.VerifyClientCertIfGiven
	config.ClientCAs = pool
	// A ticket could carry what was proved for one name over to another.
	config.SessionTicketsDisabled = true
	return &clientTLS{config}, nil
}

// proof is what a visitor's TLS handshake has shown.
type proof struct {
	guard *guard            // by whose authorities it was checked
	leaf  *x509.Certificate // nil: none was shown
}

// tlsFor returns the configuration by which TLS is terminated for a route, and
// the guard whose client certificates it asks for, or nil.
func (w *web) tlsFor(r *Route) (*tls.Config, *guard) {
	if r.guard == nil {
		return w.tls, nil
	}
	g := r.guard.ready(w.s)
	if g.tls == nil || g.tls.config == nil {
		return w.tls, nil
	}
	return g.tls.config, g
}

// proved notes what a handshake has shown.
func proved(g *guard, t *tls.Conn) *proof {
	if g == nil {
		return nil
	}
	state := t.ConnectionState()
	return provedBy(g, &state)
}

func provedBy(g *guard, state *tls.ConnectionState) *proof {
	if g == nil {
		return nil
	}
	p := &proof{guard: g}
	if chains := state.VerifiedChains; len(chains) > 0 {
		p.leaf = chains[0][0]
	}
	return p
}

// checkClient returns the page for a request on a connection that has not
// shown what the guard asks for.
func (g *guard) checkClient(p *proof) *page {
	switch {
	case g.tls == nil:
		return nil
	case g.tls.config == nil:
		return &certRequired
	case p == nil || p.guard != g:
		return &misdirected // made before the policy was, or for another name
	case p.leaf == nil || time.Now().After(p.leaf.NotAfter):
		return &certRequired
	}
	return nil
}

// fields tell the workload whose certificate it was.
func (p *proof) fields() [][2]string {
	sum := sha256.Sum256(p.leaf.Raw)
	return [][2]string{
		{"Client-Cert", ":" + base64.StdEncoding.EncodeToString(p.leaf.Raw) + ":"}, // RFC 9440
		{"X-Forwarded-Client-Subject", fieldText(p.leaf.Subject.String())},
		{"X-Forwarded-Client-Fingerprint", hex.EncodeToString(sum[:])},
	}
}
