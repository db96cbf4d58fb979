package cli

import (
	"strings"
	"testing"
	"time"

	"webgw.dev/webgw"
)

// A hostile zone file is refused, and soon.
func TestParseZone(t *testing.T) {
	start := time.Now()
	for text, want := range map[string]string{
		"$GENERATE 1-65535 h$ IN A 192.0.2.1\n":                                    "more than 500 records",
		"$INCLUDE /etc/passwd\n":                                                   "can't be read",
		"www CH TXT x\n":                                                           "only class IN",
		"www IN TYPE65280 \\# 1 00\n":                                              "is not one of",
		"www.example.org.evil.test. IN A 192.0.2.1\n":                              "is not in the zone",
		"w\\000w IN A 192.0.2.1\n":                                                 "may hold only",
		"www 5 IN A 192.0.2.1\n":                                                   "ttl",
		"www IN DS 1 13 2 " + strings.Repeat("ab", 32):                             "stay unsigned",
		strings.Repeat("a", 64) + " IN A 192.0.2.1\n":                              "can't be read",
		"@ IN TXT " + strings.Repeat(`"`+strings.Repeat("x", 250)+`" `, 20) + "\n": "longer than",
	} {
		_, err := parseZone("example.org", []byte(text))
		if webgw.KindOf(err) != webgw.Invalid || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v; want %q", text, err, want)
		}
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

// What is read from a zone file is written as the same.
func FuzzParseZone(f *testing.F) {
	f.Add("@ IN MX 10 mail\nwww 60 IN TXT \"a\\\"b\" c\n")
	f.Add("$TTL 60\n$ORIGIN x.example.org.\na IN CNAME b\n_s._tcp IN SRV 1 2 3 @\n@ IN HTTPS 1 . alpn=h2\n")
	f.Fuzz(func(t *testing.T, text string) {
		rs, err := parseZone("example.org", []byte(text))
		if err != nil {
			return
		}
		var b strings.Builder
		for _, r := range rs {
			b.WriteString(r.Line("example.org") + "\n")
		}
		again, err := parseZone("example.org", []byte(b.String()))
		if err != nil || len(again) != len(rs) {
			t.Fatalf("%q is read back as %v, %v", b.String(), again, err)
		}
		for i := range rs {
			if rs[i] != again[i] {
				t.Errorf("%+v became %+v", rs[i], again[i])
			}
		}
	})
}
