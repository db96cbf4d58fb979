// Package idn reads and shows host names with letters beyond ASCII (IDNA,
// RFC 5890, by the rules of UTS #46), and refuses those that can be taken for
// another name.
//
// Records hold A-labels (xn--…) only. It must not know who holds a name, nor
// where it leads.
package idn

import (
	"fmt"
	"maps"
	"strings"
	"unicode"

	"golang.org/x/net/idna"

	"webgw.dev/webgw"
)

// profile is that of browsers, not transitional: what is looked up is what is
// written, and a letter that lookup would map to others is mapped here, once.
var profile = idna.New(
	idna.MapForLookup(), idna.BidiRule(), idna.CheckHyphens(true), idna.CheckJoiners(true),
	idna.StrictDomainName(true), idna.Transitional(false), idna.VerifyDNSLength(false),
)

const acePrefix = "xn--"

// Host brings a host name as people write it into the form that records hold:
// lower case, no trailing dot, letters beyond ASCII as A-labels. With
// wildcard, the first label may be "*".
func Host(field, s string, wildcard bool) (string, error) {
	host := webgw.NormalizeHost(s)
	rest, isWild := strings.CutPrefix(host, "*.")
	if len(s) <= 1000 && (!isASCII(rest) || strings.Contains(rest, acePrefix)) {
		ascii, err := profile.ToASCII(rest)
		if err != nil {
			return "", &webgw.Error{Op: "read host name", Kind: webgw.Invalid, Field: field, Public: fmt.Sprintf("%q is not an international host name (IDNA)", clip(s)), Hint: strings.TrimPrefix(err.Error(), "idna: ")}
		}
		host = ascii
		if isWild {
			host = "*." + ascii
		}
	}
	if err := webgw.CheckHost(field, host, wildcard); err != nil {
		return "", err
	}
	return host, Check(field, host)
}

// Check judges the A-labels of a host name that is otherwise in the form that
// records hold: each must be the one spelling of letters that IDNA allows, all
// of one script, and not look like Latin letters throughout.
func Check(field, host string) error {
	if !strings.Contains(host, acePrefix) {
		return nil
	}
	for label := range strings.SplitSeq(host, ".") {
		if !strings.HasPrefix(label, acePrefix) {
			continue
		}
		shown, err := profile.ToUnicode(label)
		if err == nil {
			var back string
			if back, err = profile.ToASCII(shown); err == nil && (back != label || isASCII(shown)) {
				err = fmt.Errorf("it is another spelling of %s", back)
			}
		}
		if err != nil {
			return &webgw.Error{Kind: webgw.Invalid, Field: field, Public: fmt.Sprintf("%q is not a label of an international host name (IDNA)", clip(label)), Hint: strings.TrimPrefix(err.Error(), "idna: ")}
		}
		if why := deceptive(shown); why != "" {
			return &webgw.Error{Kind: webgw.Invalid, Field: field, Public: fmt.Sprintf("%q (%s) %s", clip(shown), label, why), Hint: "write it in letters of one script"}
		}
	}
	return nil
}

// Unicode returns a host name as people read it, or "" if that is how it
// stands already or if reading it so could deceive.
func Unicode(host string) string {
	if !strings.Contains(host, acePrefix) || Check("", host) != nil {
		return ""
	}
	rest, isWild := strings.CutPrefix(host, "*.")
	shown, err := profile.ToUnicode(rest)
	if err != nil {
		return ""
	}
	if isWild {
		shown = "*." + shown
	}
	return shown
}

// Both returns a host name as records hold it, and behind it as people read
// it where that differs.
func Both(host string) string {
	if shown := Unicode(host); shown != "" {
		return host + " (" + shown + ")"
	}
	return host
}

// together are the scripts that languages write in one word (UTS #39 section
// 5.2, "highly restrictive").
var together = []map[string]bool{
	{"Latin": true, "Han": true, "Hiragana": true, "Katakana": true},
	{"Latin": true, "Han": true, "Bopomofo": true},
	{"Latin": true, "Han": true, "Hangul": true},
}

// lookalikes are the letters of other scripts that are drawn like Latin ones.
// A label of nothing else could be any Latin word.
var lookalikes = map[string]string{
	"Cyrillic": "асԁеһіјӏорԛѕԝхуъьҽпгѵѡ",
	"Greek":    "αικνορυωχγ",
	"Armenian": "ագզլհոսցօ",
	"Cherokee": "ꭰꭱꭲꭺꮃꮇꮋꮐꮓꮖꮢꮤꮩꮪꮯꮲ",
}

// deceptive says why a label in letters could be taken for another one, or "".
func deceptive(label string) string {
	scripts := map[string]bool{}
	for _, r := range label {
		if s := scriptOf(r); s != "Common" && s != "Inherited" {
			scripts[s] = true
		}
	}
	if len(scripts) > 1 {
		ok := false
		for _, set := range together {
			all := true
			for s := range scripts {
				all = all && set[s]
			}
			ok = ok || all
		}
		if !ok {
			return "mixes letters of several scripts, and could be taken for another name"
		}
		return ""
	}
	for s := range maps.Keys(scripts) {
		like := lookalikes[s]
		if like != "" && strings.Trim(label, like+"0123456789-") == "" {
			return "looks like Latin letters, and could be taken for another name"
		}
	}
	return ""
}

// scriptOf names the script of a letter; what has none is its own, so that it
// stands beside nothing.
func scriptOf(r rune) string {
	if r < 0x80 && !(r >= 'a' && r <= 'z') {
		return "Common"
	}
	for name, table := range unicode.Scripts {
		if unicode.Is(table, r) {
			return name
		}
	}
	return "unknown"
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}

func clip(s string) string {
	if r := []rune(s); len(r) > 80 {
		return string(r[:80]) + "…"
	}
	return s
}
