package ident

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"time"

	"webgw.dev/webgw"
)

// Certificate mints the self-signed certificate by which k is known in TLS.
// Only its key counts; its dates span every clock, and its name is the
// identity's text form, for people who look at it.
func (k Key) Certificate() (tls.Certificate, error) {
	if k.IsZero() {
		return tls.Certificate{}, errors.New("ident: there is no key to show")
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: k.ID().String()},
		DNSNames:     []string{k.ID().String()},
		NotBefore:    time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280 section 4.1.2.5: no expiry
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.signer().Public(), k.signer())
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k.signer()}, nil
}

// ServerTLS returns a TLS 1.3 configuration that shows k and speaks the given
// ALPN protocols. With mutual, the client must show an identity too; read it
// with PeerID after the handshake.
func (k Key) ServerTLS(mutual bool, alpn ...string) (*tls.Config, error) {
	c, err := k.config(alpn)
	if err != nil {
		return nil, err
	}
	// A ticket would let a connection in without the key being shown again.
	c.SessionTicketsDisabled = true
	if mutual {
		c.ClientAuth = tls.RequireAnyClientCert
		c.VerifyConnection = func(cs tls.ConnectionState) error {
			_, err := PeerID(cs)
			return err
		}
	}
	return c, nil
}

// ClientTLS returns a TLS 1.3 configuration that shows k (unless k is zero)
// and accepts exactly the server whose identity is want. A zero want accepts
// any identity: the caller must then judge PeerID itself, before it says
// anything that matters.
func (k Key) ClientTLS(want webgw.ID, alpn ...string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: alpn}
	if !k.IsZero() {
		var err error
		if c, err = k.config(alpn); err != nil {
			return nil, err
		}
	}
	c.InsecureSkipVerify = true // no authority is asked: VerifyConnection compares the key itself
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		got, err := PeerID(cs)
		if err != nil {
			return err
		}
		if !want.IsZero() && got != want {
			return &webgw.Error{Op: "connect", Kind: webgw.Unauthenticated, Public: fmt.Sprintf("the server is %s, not %s", got, want)}
		}
		return nil
	}
	return c, nil
}

func (k Key) config(alpn []string) (*tls.Config, error) {
	cert, err := k.Certificate()
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert},
		MinVersion:   tls.VersionTLS13,
		NextProtos:   alpn,
	}, nil
}

// PeerID returns the identity that the other side of a finished handshake has
// proved: TLS 1.3 has it sign the transcript with that key (RFC 8446 section
// 4.4.3).
func PeerID(cs tls.ConnectionState) (webgw.ID, error) {
	if len(cs.PeerCertificates) == 0 {
		return webgw.ID{}, errors.New("ident: the peer showed no certificate")
	}
	pub, ok := cs.PeerCertificates[0].PublicKey.(ed25519.PublicKey)
	if !ok {
		return webgw.ID{}, fmt.Errorf("ident: the peer's key is a %T, not ed25519", cs.PeerCertificates[0].PublicKey)
	}
	if len(pub) != ed25519.PublicKeySize {
		return webgw.ID{}, errors.New("ident: the peer's key has a wrong length")
	}
	id := webgw.ID(pub)
	if id.IsWeak() {
		return webgw.ID{}, errors.New("ident: for the peer's key anybody can sign")
	}
	return id, nil
}
