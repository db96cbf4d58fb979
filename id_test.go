package webgw

import (
	"encoding/hex"
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"
)

// testID returns the n-th of a fixed series of identities. They need not be
// points of the curve: this package never computes with them.
func testID(n uint64) ID {
	r := rand.New(rand.NewPCG(n, 7))
	var id ID
	for i := range id {
		id[i] = byte(r.Uint32())
	}
	return id
}

func TestIDRoundTrip(t *testing.T) {
	for n := range uint64(200) {
		id := testID(n)
		for _, s := range []string{id.String(), strings.ToUpper(id.String())} {
			if got, err := ParseID(s); err != nil || got != id {
				t.Fatalf("%s: got %v, %v", s, got, err)
			}
		}
		if s := id.String(); len(s) != 62 || !LooksLikeID(s) || CheckLabel("", s) != nil || !strings.HasPrefix(s, id.Short()) {
			t.Errorf("%q is not 62 characters that fit a DNS label", s)
		}
		text, err := json.Marshal(id)
		var back ID
		if err != nil || json.Unmarshal(text, &back) != nil || back != id {
			t.Errorf("JSON: %s, %v", text, err)
		}
	}
	var zero ID
	if zero.String() != "" || zero.Short() != "" || !zero.IsZero() {
		t.Error("the zero ID has a text")
	}
	back := testID(1)
	if err := back.UnmarshalText(nil); err != nil || !back.IsZero() {
		t.Errorf("the empty text: %v, %v", back, err)
	}
}

// A 24-bit checksum lets one mistake in 16 million pass; of these, none.
func TestIDMistakesAreRefused(t *testing.T) {
	const alphabet = "abcdefghijklmnopqrstuvwxyz0123456789-. "
	for n := range uint64(8) {
		s := testID(n).String()
		for i := range s {
			for _, c := range alphabet {
				if byte(c) == s[i] {
					continue
				}
				if got, err := ParseID(s[:i] + string(c) + s[i+1:]); err == nil {
					t.Errorf("%s with %q at %d is taken for %s", s, c, i, got)
				}
			}
			if _, err := ParseID(s[:i] + s[i+1:]); err == nil {
				t.Errorf("%s without character %d is accepted", s, i)
			}
			if i > 0 && s[i] != s[i-1] {
				if _, err := ParseID(s[:i-1] + s[i:i+1] + s[i-1:i] + s[i+1:]); err == nil {
					t.Errorf("%s with %d and %d swapped is accepted", s, i-1, i)
				}
			}
		}
	}
}

func TestParseIDRefuses(t *testing.T) {
	good := testID(1).String()
	for _, tt := range []struct{ name, in, rule string }{
		{"empty", "", "does not start with webgw1"},
		{"other prefix", "webgw2" + good[6:], "does not start with webgw1"},
		{"short", good[:61], "61 characters"},
		{"long", good + "a", "63 characters"},
		{"space before", " " + good, "does not start"},
		{"space after", good + " ", "63 characters"},
		// The base32 decoder skips line ends, and would return too few bytes.
		{"line end inside", good[:30] + "\n" + good[31:], "outside a–z and 2–7"},
		{"line ends only", "webgw1" + strings.Repeat("\r\n", 28), "outside a–z and 2–7"},
		// U+212A KELVIN SIGN is a k in lower case.
		{"look-alike", "webgw1" + "\u212a" + good[7:], "64 characters"},
		{"look-alike of right length", "webgw1" + "\u212a" + good[9:], "outside a–z and 2–7"},
		{"padding", good[:61] + "=", "outside a–z and 2–7"},
		{"zero key", encodeID(ID{}), "zero key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseID(tt.in)
			if err == nil || !strings.Contains(err.Error(), tt.rule) || KindOf(err) != Invalid {
				t.Errorf("got %v, want %q", err, tt.rule)
			}
			if strings.ContainsAny(err.Error(), "\r\n") {
				t.Errorf("the error carries line ends: %q", err)
			}
		})
	}
}

// encodeID is String also for the zero ID.
func encodeID(id ID) string {
	sum := idChecksum(id[:])
	return idPrefix + idEncoding.EncodeToString(append(id[:len(id):len(id)], sum[:]...))
}

// For keys of small order anybody can make signatures that verify.
func TestWeakKeysAreNoIdentities(t *testing.T) {
	for _, s := range []string{
		"0100000000000000000000000000000000000000000000000000000000000000",
		"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
		"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
		"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	} {
		raw, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		for _, sign := range []byte{0, 0x80} {
			id := ID(raw)
			id[31] |= sign
			if _, err := ParseID(id.String()); err == nil || !id.IsWeak() {
				t.Errorf("%x is accepted", id)
			}
		}
	}
	if testID(1).IsWeak() {
		t.Error("an ordinary key is called weak")
	}
}

func FuzzParseID(f *testing.F) {
	f.Add(testID(1).String())
	f.Add("webgw1" + strings.Repeat("\n", 56))
	f.Add("webgw1\u212a")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		if err == nil && id.String() != strings.ToLower(s) {
			t.Errorf("%q reads as %s", s, id)
		}
	})
}
