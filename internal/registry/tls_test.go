package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"testing"

	"webgw.dev/webgw/internal/netx"
)

// dialTLS is the dial function of a transport over n.
func dialTLS(n netx.Net, config *tls.Config) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := n.Dial(ctx, network, addr, nil)
		if err != nil {
			return nil, err
		}
		return tls.Client(c, config), nil
	}
}

// stateOf is what a server sees of a client that shows the first certificate
// of config.
func stateOf(t *testing.T, config *tls.Config) *tls.ConnectionState {
	leaf, err := x509.ParseCertificate(config.Certificates[0].Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return &tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}
}
