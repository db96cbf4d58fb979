package ident

import (
	"bytes"
	"crypto/ecdh"
	"crypto/sha512"
	"testing"

	"webgw.dev/webgw"
)

func TestSealedSecrets(t *testing.T) {
	owner := webgw.ID{1}
	for n := range 50 {
		a, b, c := FromSeed([32]byte{byte(n), 1}), FromSeed([32]byte{byte(n), 2}), FromSeed([32]byte{byte(n), 3})
		// Both halves must map to the same X25519 key.
		sum := sha512.Sum512(a.signer().Seed())
		private, err := ecdh.X25519().NewPrivateKey(sum[:32])
		if err != nil {
			t.Fatal(err)
		}
		if id := a.ID(); !bytes.Equal(private.PublicKey().Bytes(), montgomery(id)) {
			t.Fatal(n, "another key")
		}
		s, err := Seal([]byte("secret"), owner, a.ID(), b.ID())
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range []Key{a, b} {
			if got, err := k.Open(s, owner); string(got) != "secret" || err != nil {
				t.Error(string(got), err)
			}
			if got, err := k.Open(s, webgw.ID{2}); err == nil {
				t.Error("out of another owner's record:", string(got))
			}
		}
		if got, err := c.Open(s, owner); err != ErrNotForUs {
			t.Error(string(got), err)
		}
		boxes, err := s.Boxes()
		if err != nil {
			t.Fatal(err)
		}
		boxes[0].Data[len(boxes[0].Data)-1] ^= 1
		if got, err := a.Open(webgw.NewSealed(boxes), owner); err == nil {
			t.Error("changed:", string(got))
		}
	}
	for _, s := range []webgw.Sealed{"", "secret", "webgw-sealed-1.", "webgw-sealed-1.AAAA", "webgw-sealed-1.AAAAAAAAAAAAEA", "webgw-sealed-1.====", webgw.NewSealed(make([]webgw.Box, 1000))} {
		if _, err := FromSeed([32]byte{1}).Open(s, owner); err == nil || err == ErrNotForUs {
			t.Errorf("%.40s: %v", s, err)
		}
	}
	if _, err := Seal(nil, owner, webgw.ID{1}); err == nil { // y = 1: the neutral element
		t.Error("sealed to nobody")
	}
}
