package webgw

import (
	"encoding/base64"
	"strings"
)

// Sealed is a secret in a record that only some identities can read, as
// docs/spec/records.md says: "webgw-sealed-1." and base64 of a box for each.
type Sealed string

const (
	sealedPrefix = "webgw-sealed-1."
	maxSealed    = 24 << 10 // characters

	// SealedTo is how many bytes of an identity tell whom a box is for.
	SealedTo = 8
)

// Box is a secret for one identity.
type Box struct {
	To   [SealedTo]byte // the first bytes of the identity
	Data []byte
}

// NewSealed puts boxes together.
func NewSealed(boxes []Box) Sealed {
	var all []byte
	for _, b := range boxes {
		all = append(all, b.To[:]...)
		all = append(all, byte(len(b.Data)>>8), byte(len(b.Data)))
		all = append(all, b.Data...)
	}
	return Sealed(sealedPrefix + base64.RawURLEncoding.EncodeToString(all))
}

// Boxes takes s apart.
func (s Sealed) Boxes() (boxes []Box, err error) {
	text, ok := strings.CutPrefix(string(s), sealedPrefix)
	all, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if !ok || err != nil || len(s) > maxSealed {
		return nil, invalid("", "is no sealed secret; webgw seal prints one")
	}
	for len(all) > 0 {
		if len(all) < SealedTo+2 {
			return nil, invalid("", "is a sealed secret that was cut off")
		}
		n := int(all[SealedTo])<<8 | int(all[SealedTo+1])
		if len(all) < SealedTo+2+n {
			return nil, invalid("", "is a sealed secret that was cut off")
		}
		boxes = append(boxes, Box{[SealedTo]byte(all), all[SealedTo+2 : SealedTo+2+n]})
		all = all[SealedTo+2+n:]
	}
	if len(boxes) == 0 || len(boxes) > MaxGateways {
		return nil, invalid("", "must be sealed to 1 to %d identities", MaxGateways)
	}
	return boxes, nil
}
