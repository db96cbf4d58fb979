package webgw

import (
	"bytes"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"slices"
	"strings"
)

// ID is an identity: the 32 bytes of an ed25519 public key (RFC 8032). Every
// owner, node, gateway and registry is one.
//
// Its text form is "webgw1" followed by 56 lower-case base32 characters (RFC
// 4648, no padding) of the key and a 24-bit checksum, so that a typing mistake
// is told from a stranger. 62 characters: it also fits a DNS label.
type ID [32]byte

const (
	idPrefix = "webgw1"
	idLen    = len(idPrefix) + 56
)

var idEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

func idChecksum(key []byte) [3]byte {
	sum := sha256.Sum256(append([]byte("webgw identity 1:"), key...))
	return [3]byte(sum[:3])
}

// String returns the checksummed text form, or "" for the zero ID.
func (id ID) String() string {
	if id.IsZero() {
		return ""
	}
	sum := idChecksum(id[:])
	return idPrefix + idEncoding.EncodeToString(append(id[:len(id):len(id)], sum[:]...))
}

// Short returns the first characters of the text form: enough for people to
// tell identities apart in a list, never enough to trust one.
func (id ID) Short() string {
	if id.IsZero() {
		return ""
	}
	return id.String()[:len(idPrefix)+8]
}

// IsZero reports whether id is the zero value, which is no identity.
func (id ID) IsZero() bool { return id == ID{} }

// IsWeak reports whether id is a point of small order on the curve (RFC 7748
// section 7): for such a key anybody can make signatures that verify, so it is
// nobody's identity. The zero ID is one of them.
func (id ID) IsWeak() bool {
	id[31] &= 0x7f // the sign of x
	return slices.Contains(smallOrder[:], string(id[:]))
}

// smallOrder holds every encoding of y of the eight points whose order divides
// the cofactor, non-canonical ones included.
var smallOrder = [...]string{
	strings.Repeat("\x00", 32),                   // order 4
	"\x01" + strings.Repeat("\x00", 31),          // order 1
	"\xec" + strings.Repeat("\xff", 30) + "\x7f", // order 2: p-1
	"\xed" + strings.Repeat("\xff", 30) + "\x7f", // p, that is 0
	"\xee" + strings.Repeat("\xff", 30) + "\x7f", // p+1, that is 1
	"\x26\xe8\x95\x8f\xc2\xb2\x27\xb0\x45\xc3\xf4\x89\xf2\xef\x98\xf0\xd5\xdf\xac\x05\xd3\xc6\x33\x39\xb1\x38\x02\x88\x6d\x53\xfc\x05", // order 8
	"\xc7\x17\x6a\x70\x3d\x4d\xd8\x4f\xba\x3c\x0b\x76\x0d\x10\x67\x0f\x2a\x20\x53\xfa\x2c\x39\xcc\xc6\x4e\xc7\xfd\x77\x92\xac\x03\x7a", // order 8
}

// Compare orders identities by their key bytes.
func (id ID) Compare(other ID) int { return bytes.Compare(id[:], other[:]) }

// ParseID reads the text form. Upper-case letters are accepted; everything
// else that is not exactly the text form is refused with the rule it breaks.
func ParseID(s string) (ID, error) {
	bad := func(rule string) (ID, error) {
		return ID{}, &Error{Op: "parse identity", Kind: Invalid, Public: fmt.Sprintf("%q is not an identity: %s", clip(s, 80), rule)}
	}
	t := lower(s)
	if !strings.HasPrefix(t, idPrefix) {
		return bad("it does not start with " + idPrefix)
	}
	if len(t) != idLen {
		return bad(fmt.Sprintf("it has %d characters, not %d", len(t), idLen))
	}
	raw, err := idEncoding.DecodeString(t[len(idPrefix):])
	if err != nil || len(raw) != 35 { // the decoder skips line ends
		return bad("it holds a character outside a–z and 2–7")
	}
	id := ID(raw[:32])
	if idChecksum(id[:]) != [3]byte(raw[32:]) {
		return bad("its checksum is wrong (mistyped or cut?)")
	}
	if id.IsZero() {
		return bad("it is the zero key")
	}
	if id.IsWeak() {
		return bad("it is a key for which anybody can sign")
	}
	return id, nil
}

// LooksLikeID reports whether s has the prefix and length of an identity, so
// that callers which accept "a name or an identity" know which error to give.
func LooksLikeID(s string) bool {
	return len(s) == idLen && strings.HasPrefix(lower(s), idPrefix)
}

// MarshalText gives the text form; the zero ID becomes the empty text.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads the text form; the empty text becomes the zero ID.
func (id *ID) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*id = ID{}
		return nil
	}
	v, err := ParseID(string(text))
	if err != nil {
		return err
	}
	*id = v
	return nil
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n] + "…"
}
