package idn

import (
	"strings"
	"testing"

	"webgw.dev/webgw"
)

func TestHost(t *testing.T) {
	for _, c := range []struct {
		in, want string // want "": refused
	}{
		{"Blog.Example", "blog.example"},
		{"blog.example.", "blog.example"},
		{"bücher.example", "xn--bcher-kva.example"},
		{"BÜCHER.example", "xn--bcher-kva.example"},
		{"bu\u0308cher.example", "xn--bcher-kva.example"}, // decomposed
		{"*.bücher.example", "*.xn--bcher-kva.example"},
		{"xn--bcher-kva.example", "xn--bcher-kva.example"},
		{"XN--BCHER-KVA.example", "xn--bcher-kva.example"},
		{"faß.example", "xn--fa-hia.example"}, // not transitional
		{"日本語go.example", "xn--go-5t7du0ck91h.example"},
		{"россия.example", "xn--h1alffa9f.example"},
		{"blog。example", "blog.example"}, // ideographic full stop
		{"ⓑlog.example", "blog.example"}, // compatibility letters are mapped
		{"раypal.example", ""},           // Cyrillic and Latin
		{"сосо.example", ""},             // Cyrillic that looks Latin
		{"арр1е.example", ""},            // the same and a digit
		{"ορο.example", ""},              // Greek
		{"gοοgle.example", ""},           // Greek omicrons
		{"xn--80ak6aa92e.example", ""},   // аррӏе, written in ASCII
		{"xn--abc-.example", ""},         // punycode of ASCII
		{"xn--a.example", ""},
		{"xn--BCHER-KVA\x00.example", ""},
		{"a\x00b.example", ""},
		{"blog\u200d.example", ""}, // joiner out of place
		{"blog\u202egro.example", ""},
		{"☃.example.", "xn--n3h.example"},
		{"a..example", ""},
		{"blog.example..", ""},
		{".example", ""},
		{strings.Repeat("a", 63) + ".example", strings.Repeat("a", 63) + ".example"},
		{strings.Repeat("a", 64) + ".example", ""},
		{strings.Repeat("ü", 60) + ".example", ""},
		{strings.Repeat("a.", 123) + "example", strings.Repeat("a.", 123) + "example"}, // 253 bytes
		{strings.Repeat("a.", 123) + "examplee", ""},
		{strings.Repeat("ü", 100_000) + ".example", ""},
	} {
		got, err := Host("name", c.in, true)
		if c.want == "" && webgw.KindOf(err) != webgw.Invalid || c.want != "" && (err != nil || got != c.want) {
			t.Errorf("%.80q: %q, %v; want %q", c.in, got, err, c.want)
		}
	}
}

func TestBoth(t *testing.T) {
	for in, want := range map[string]string{
		"blog.example":             "blog.example",
		"xn--bcher-kva.example":    "xn--bcher-kva.example (bücher.example)",
		"*.xn--bcher-kva.example":  "*.xn--bcher-kva.example (*.bücher.example)",
		"xn--80ak6aa92e.example":   "xn--80ak6aa92e.example", // аррӏе is not shown to anybody
		"xn--not-punycode-.x.test": "xn--not-punycode-.x.test",
	} {
		if got := Both(in); got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

// Whatever is taken in is what records hold, and is taken in again unchanged.
func FuzzHost(f *testing.F) {
	for _, s := range []string{"bücher.example", "xn--bcher-kva.example", "*.a.b", "аррӏе.com", "日本。example"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		host, err := Host("", s, true)
		if err != nil {
			return
		}
		if again, err := Host("", host, true); err != nil || again != host {
			t.Errorf("%q gives %q, and that %q, %v", s, host, again, err)
		}
		if shown := Unicode(host); shown != "" {
			if back, err := Host("", shown, true); err != nil || back != host {
				t.Errorf("%q is shown as %q, which is %q, %v", host, shown, back, err)
			}
		}
	})
}
