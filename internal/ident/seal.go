package ident

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/sha512"
	"errors"
	"math/big"
	"slices"

	"webgw.dev/webgw"
)

// Secrets are sealed by HPKE (RFC 9180) in its base mode: DHKEM(X25519,
// HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305. The X25519 key is that of the
// ed25519 identity, by the map between their curves (RFC 7748 section 4.1).
const sealInfo = "webgw sealed secret 1:"

// Seal makes a secret that each of to can read, out of a record of owner only:
// whoever copies it into a record of their own gets nothing.
func Seal(secret []byte, owner webgw.ID, to ...webgw.ID) (webgw.Sealed, error) {
	var boxes []webgw.Box
	for _, id := range to {
		public, err := hpke.DHKEM(ecdh.X25519()).NewPublicKey(montgomery(id))
		if err != nil {
			return "", err
		}
		data, err := hpke.Seal(public, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), infoOf(owner, id), secret)
		if err != nil {
			return "", err
		}
		boxes = append(boxes, webgw.Box{To: [webgw.SealedTo]byte(id[:webgw.SealedTo]), Data: data})
	}
	s := webgw.NewSealed(boxes)
	_, err := s.Boxes()
	return s, err
}

// ErrNotForUs is Open's error for a secret that is sealed to others only.
var ErrNotForUs = errors.New("ident: the secret is not sealed to this identity")

// Open reads a secret that a record of owner holds.
func (k Key) Open(s webgw.Sealed, owner webgw.ID) ([]byte, error) {
	boxes, err := s.Boxes()
	if err != nil {
		return nil, err
	}
	id := k.ID()
	sum := sha512.Sum512(k.signer().Seed()) // RFC 8032 section 5.1.5; X25519 clamps it
	private, err := hpke.DHKEM(ecdh.X25519()).NewPrivateKey(sum[:32])
	if err != nil {
		return nil, err
	}
	err = ErrNotForUs
	for _, b := range boxes {
		if !bytes.Equal(b.To[:], id[:webgw.SealedTo]) {
			continue
		}
		var secret []byte
		if secret, err = hpke.Open(private, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), infoOf(owner, id), b.Data); err == nil {
			return secret, nil
		}
	}
	return nil, err
}

func infoOf(owner, to webgw.ID) []byte { return slices.Concat([]byte(sealInfo), owner[:], to[:]) }

var p25519 = new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 255), big.NewInt(19))

// montgomery maps the public key of an identity to X25519's: u = (1+y)/(1-y).
// Nothing of it is secret, so that it may take the time it takes.
func montgomery(id webgw.ID) []byte {
	y := slices.Clone(id[:])
	y[31] &= 0x7f // the sign of x
	slices.Reverse(y)
	n := new(big.Int).SetBytes(y)
	one := big.NewInt(1)
	below := new(big.Int).Mod(new(big.Int).Sub(one, n), p25519)
	if below.Sign() == 0 {
		return make([]byte, 32) // no identity that anybody holds; HPKE refuses it
	}
	u := new(big.Int).Add(one, n)
	u.Mul(u, below.ModInverse(below, p25519)).Mod(u, p25519)
	out := u.FillBytes(make([]byte, 32))
	slices.Reverse(out)
	return out
}
