package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"webgw.dev/webgw"
)

func TestTargets(t *testing.T) {
	for in, want := range map[string][2]string{
		"3000": {"localhost:3000", ""}, ":3000": {"localhost:3000", ""}, "localhost:8443": {"localhost:8443", ""}, "10.0.0.7:80": {"10.0.0.7:80", ""},
		"[::1]:80": {"[::1]:80", ""}, "unix:/run/x": {"unix:/run/x", ""}, "direct:[2001:db8::1]:80": {"", "[2001:db8::1]:80"}, "direct:a.example:80": {"", "a.example:80"},
	} {
		address, direct, err := parseTarget(in, webgw.TCP)
		if err != nil || address != want[0] || direct != want[1] {
			t.Errorf("%s: %q %q %v", in, address, direct, err)
		}
	}
	for _, in := range []string{"", "0", "70000", "host", "host:0", "host:http", "unix:x", "direct:", "direct:unix:/x", "direct:80", "0.0.0.0:80", "http://localhost:80"} {
		if _, _, err := parseTarget(in, webgw.TCP); webgw.KindOf(err) != webgw.Invalid {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestRangesOfTargets(t *testing.T) {
	for in, want := range map[string]struct {
		first string
		count int
	}{
		"6000-6100": {"6000", 101}, ":6000-6001": {":6000", 2}, "10.0.0.7:80-81": {"10.0.0.7:80", 2}, "[2001:db8::1]:80-81": {"[2001:db8::1]:80", 2}, "direct:a-b.example:80-81": {"direct:a-b.example:80", 2},
		"my-host:80": {"my-host:80", 1}, "unix:/a:1-2": {"unix:/a:1-2", 1}, "6000": {"6000", 1}, "9-1": {"9-1", 1},
	} {
		first, count, err := cutRange(in, webgw.TCP)
		if err != nil || first != want.first || count != want.count {
			t.Errorf("%s: %q %d %v", in, first, count, err)
		}
	}
	if _, _, err := cutRange("1-2", webgw.TLS); webgw.KindOf(err) != webgw.Invalid {
		t.Error(err)
	}
	for _, tt := range []struct {
		ports string
		count int // of the target
		first uint16
		all   int // 0: refused
	}{{"", 5, 0, 5}, {"7000", 1, 7000, 1}, {"7000", 5, 7000, 5}, {"7000-7004", 5, 7000, 5}, {"7000-7004", 1, 7000, 5}, {"7000-7004", 4, 0, 0}, {"65535", 2, 0, 0}, {"x", 1, 0, 0}} {
		v := exposing{ports: tt.ports, count: tt.count}
		first, all, err := v.publicPorts()
		if first != tt.first || all != tt.all || (err != nil) != (tt.all == 0) {
			t.Errorf("%q for %d: %d, %d, %v", tt.ports, tt.count, first, all, err)
		}
	}
}

func TestRandomNamesAreLabels(t *testing.T) {
	for _, list := range words {
		for _, w := range list {
			if err := webgw.CheckLabel("", w); err != nil || len(w) > 8 {
				t.Errorf("%s: %v", w, err)
			}
		}
	}
	if err := webgw.CheckLabel("", randomName()); err != nil {
		t.Error(err)
	}
}

func TestLabel(t *testing.T) {
	for in, want := range map[string]string{"Blog": "blog", "büro": "xn--bro-hoa", "a-1": "a-1"} {
		if got, err := label(in); err != nil || got != want {
			t.Errorf("%s: %s %v", in, got, err)
		}
	}
	for _, in := range []string{"a.b", "-a", "a b", "xn--a", "\u200d"} {
		if got, err := label(in); err == nil {
			t.Errorf("%q gave %q", in, got)
		}
	}
}

func TestDifference(t *testing.T) {
	now := time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)
	record := func(issued time.Time, life time.Duration, hosts ...string) *webgw.Record {
		return &webgw.Record{Kind: webgw.KindExposure, Name: "a", Issued: issued, Expires: issued.Add(life), Exposure: &webgw.Exposure{Protocol: webgw.HTTP, Hosts: hosts}}
	}
	const month = 30 * 24 * time.Hour
	deleted := record(now, month, "a.b")
	deleted.Deleted = true
	for _, tt := range []struct {
		what    string
		old     *webgw.Record
		action  string
		changes string
	}{
		{"nothing", nil, actionCreate, "[{hosts[0]  a.b} {lifetime  30d} {protocol  http}]"},
		{"withdrawn", deleted, actionCreate, "[{hosts[0]  a.b} {lifetime  30d} {protocol  http}]"},
		{"expired", record(now.Add(-2*month), month, "a.b"), actionCreate, "[{hosts[0]  a.b} {lifetime  30d} {protocol  http}]"},
		{"the same", record(now.Add(-time.Hour), month, "a.b"), actionNothing, "[]"},
		{"the same, but old", record(now.Add(-20*24*time.Hour), month, "a.b"), actionRenew, "[]"},
		{"another host", record(now, month, "x.b"), actionChange, "[{hosts[0] x.b a.b}]"},
		{"one host more", record(now, month, "a.b", "x.b"), actionChange, "[{hosts[1] x.b }]"},
		{"longer", record(now, 2*month, "a.b"), actionChange, "[{lifetime 60d 30d}]"},
	} {
		action, changes, err := difference(tt.old, record(now, month, "a.b"), now)
		if got := fmt.Sprint(changes); err != nil || action != tt.action || got != tt.changes {
			t.Errorf("%s: %s %s %v", tt.what, action, got, err)
		}
	}
}

func TestWordsForPeople(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1000: "1 kB", 5123: "5.12 kB", 999_600: "1 MB", 123_456_789: "123 MB"} {
		if got := size(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{0: "<1 ms", 3 * time.Millisecond: "3 ms", 90 * time.Second: "1m30s"} {
		if got := took(d); got != want {
			t.Errorf("%s: %s, want %s", d, got, want)
		}
	}
	now := time.Now()
	for d, want := range map[time.Duration]string{-time.Second: "expired", 90 * time.Second: "90s", time.Hour: "60m", 47 * time.Hour: "47h", 365 * 24 * time.Hour: "365d"} {
		if got := until(now.Add(d), now); got != want {
			t.Errorf("%s: %s, want %s", d, got, want)
		}
	}
	if got := printable("a\x1b[31mb\nc"); got != "a�[31mb�c" {
		t.Errorf("%q", got)
	}
}

func TestKnownRegistries(t *testing.T) {
	path := filepath.Join(t.TempDir(), "below", "known_registries")
	told := 0
	k := &knownRegistries{path: path, note: func(string, ...any) { told++ }}
	a, b := webgw.ID{1, 2, 3}, webgw.ID{4, 5, 6}
	if _, err := k.only(); webgw.KindOf(err) != webgw.Invalid {
		t.Errorf("none known: %v", err)
	}
	for range 2 {
		if err := k.trust("a.example:443", a); err != nil {
			t.Fatal(err)
		}
	}
	if told != 1 {
		t.Errorf("told %d times", told)
	}
	if err := k.trust("a.example:443", b); webgw.KindOf(err) != webgw.Unauthenticated {
		t.Errorf("another identity: %v", err)
	}
	if s, err := k.only(); err != nil || s != a.String()+"@a.example:443" {
		t.Errorf("%s %v", s, err)
	}
	if err := k.trust("b.example:443", b); err != nil {
		t.Fatal(err)
	}
	if _, err := k.only(); webgw.KindOf(err) != webgw.Invalid {
		t.Errorf("two known: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
}

// Nothing that others wrote steers the terminal, or shows as something else
// than it is.
func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"plain, élan, 日本, a\tb":     "plain, élan, 日本, a\tb",
		"\x1b]0;title\x07x":         "�]0;title�x",
		"\u009b31m":                 "�31m", // CSI in one character
		"\x9b31m":                   "�31m", // and in one byte, as terminals without UTF-8 read it
		"a\r\nforged line":          "a��forged line",
		"good\u202etxt.exe":         "good�txt.exe",
		"\u2066x\u2069\u200e\u061c": "�x���",
		"two\u2028lines\u2029":      "two�lines�",
		"bl\u200bog\ufeff":          "bl�og�",
		"tag\U000e0041":             "tag�",
	} {
		if got := printable(in); got != want {
			t.Errorf("printable(%q) = %q, want %q", in, got, want)
		}
	}
}

// A cell can't pretend to be two.
func TestTableCells(t *testing.T) {
	var out strings.Builder
	a := &app{env: Env{Stdout: &out}}
	if err := a.table([][]string{{"NAME", "UP"}, {"blog\tyes", "no"}}); err != nil {
		t.Fatal(err)
	}
	if want := "NAME      UP\nblog yes  no\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}
