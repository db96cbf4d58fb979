package ingress

import (
	"encoding/binary"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/netx/memnet"
)

// countryFile makes a database in MaxMind's format, of the prefixes by country.
func countryFile(by map[string]string) []byte {
	text := func(s string) []byte { return append([]byte{2<<5 | byte(len(s))}, s...) } // shorter than 29 bytes
	number := func(kind byte, n uint32) []byte {
		b := binary.BigEndian.AppendUint32(nil, n)
		if kind > 7 { // extended
			return append([]byte{4, kind - 7}, b...)
		}
		if kind == 5 { // 16 bits
			return append([]byte{kind<<5 | 2}, b[2:]...)
		}
		return append([]byte{kind<<5 | 4}, b...)
	}
	fields := func(pairs ...[]byte) (b []byte) {
		b = []byte{7<<5 | byte(len(pairs)/2)}
		for _, p := range pairs {
			b = append(b, p...)
		}
		return b
	}
	type node [2]int // 0: nothing; >0: node; <0: data at -n-1
	nodes := []node{{}}
	var data []byte
	for prefix, code := range by {
		p := netip.MustParsePrefix(prefix)
		a, bits := p.Addr().As16(), p.Bits()
		if p.Addr().Is4() {
			four := p.Addr().As4()
			a, bits = [16]byte{}, bits+96 // where the format has them
			copy(a[12:], four[:])
		}
		at := 0
		for i := range bits {
			side := int(a[i/8]>>(7-i%8)) & 1
			if i == bits-1 {
				nodes[at][side] = -len(data) - 1
				break
			}
			if nodes[at][side] == 0 {
				nodes = append(nodes, node{})
				nodes[at][side] = len(nodes) - 1
			}
			at = nodes[at][side]
		}
		data = append(data, fields(text("country"), fields(text("iso_code"), text(code)))...)
	}
	var file []byte
	for _, n := range nodes {
		for _, to := range n {
			switch {
			case to == 0:
				to = len(nodes)
			case to < 0:
				to = len(nodes) + 16 - to - 1
			}
			file = append(file, byte(to>>16), byte(to>>8), byte(to))
		}
	}
	file = append(append(append(file, make([]byte, 16)...), data...), "\xab\xcd\xefMaxMind.com"...)
	return append(file, fields(text("binary_format_major_version"), number(5, 2), text("binary_format_minor_version"), number(5, 0),
		text("build_epoch"), append([]byte{8, 9 - 7, 0, 0, 0, 0}, binary.BigEndian.AppendUint32(nil, 1)...), text("database_type"), text("Test"), text("description"), fields(text("en"), text("Test")),
		text("ip_version"), number(5, 6), text("languages"), append([]byte{1, 11 - 7}, text("en")...), text("node_count"), number(6, uint32(len(nodes))), text("record_size"), number(5, 24))...)
}

func writeCountries(t *testing.T, path string, by map[string]string) {
	t.Helper()
	if err := os.WriteFile(path+".new", countryFile(by), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func TestCountriesAreReadAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.mmdb")
	if _, err := OpenCountries(path, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("there is no file")
	}
	synctest.Test(t, func(t *testing.T) {
		writeCountries(t, path, map[string]string{"192.0.2.0/24": "BE", "2001:db8::/32": "EG"})
		c, err := OpenCountries(path, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		is := func(addr, want string) {
			t.Helper()
			if got, err := c.Of(netip.MustParseAddr(addr)); got != want || err != nil {
				t.Errorf("%s: %q, %v", addr, got, err)
			}
		}
		is("192.0.2.7", "BE")
		is("192.0.3.7", "")
		is("2001:db8::1", "EG")
		is("2001:db9::1", "")
		go c.Watch(t.Context())
		synctest.Wait()
		if err := os.WriteFile(path, []byte("half of it"), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * countriesLook)
		is("192.0.2.7", "BE")
		writeCountries(t, path, map[string]string{"192.0.2.0/24": "FR"})
		time.Sleep(2 * countriesLook)
		synctest.Wait()
		is("192.0.2.7", "FR")
	})
}

func TestCountriesAreLetIn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.mmdb")
	writeCountries(t, path, map[string]string{"192.0.2.0/24": "BE", "100.64.7.0/24": "FR"})
	countries, err := OpenCountries(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	own := []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}
	be, fr, unknown := "192.0.2.1", "100.64.7.1", "203.0.113.1"
	for _, tt := range []struct {
		name   string
		policy webgw.Policy
		in     map[string]bool
	}{
		{"some", webgw.Policy{AllowCountries: []string{"BE"}}, map[string]bool{be: true, fr: false, unknown: false}},
		{"all but some", webgw.Policy{DenyCountries: []string{"FR"}}, map[string]bool{be: true, fr: false, unknown: true}},
		{"some, and addresses", webgw.Policy{Allow: own, AllowCountries: []string{"BE"}}, map[string]bool{be: true, fr: false, unknown: true}},
		{"addresses, and not some", webgw.Policy{Allow: own, DenyCountries: []string{"FR"}}, map[string]bool{be: false, fr: false, unknown: true}},
		{"some, but no addresses", webgw.Policy{Deny: own, DenyCountries: []string{"FR"}}, map[string]bool{be: true, fr: false, unknown: false}},
	} {
		for _, by := range []*Countries{countries, nil} {
			quicBubble(t, Limits{}, func(s *Server) { s.Countries = by }, func(t *testing.T, w *world, m *memnet.World) {
				memSite(t, w.Net.(*memnet.Host), func(rw http.ResponseWriter, r *http.Request) {})
				tcp := under(expose("tcp", webgw.TCP, nil, "gateway:8080"), tt.policy)
				tcp.Exposure.Port = 7000
				w.use(under(web1("a", "gateway:8080"), tt.policy), tcp)
				if problems := w.Problems(); (len(problems) == 2 && problems[0].Code == NoCountries) != (by == nil) {
					t.Error(tt.name, problems)
				}
				for addr, in := range tt.in {
					want, code := 200, ""
					switch {
					case !in && by == nil && addr == unknown && len(tt.policy.Deny) > 0:
						want, code = 403, "address_denied" // by address
					case by == nil:
						want, code = 503, "country_unknown"
					case !in:
						want, code = 403, "address_denied"
					}
					h := hostAt(m, addr)
					quic := &http.Client{Transport: w.transport3(w.socket(h))}
					status, _, head := get(t, quic, "https://a.example/")
					if status != want || head.Get(ErrorHeader) != code {
						t.Errorf("%s, %s: %d %s", tt.name, addr, status, head.Get(ErrorHeader))
					}
					c := connect(t, h, "7000")
					c.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
					b := make([]byte, 12)
					if n, _ := c.Read(b); (n == 12) != (want == 200) {
						t.Errorf("%s, %s over TCP: %q", tt.name, addr, b[:n])
					}
				}
			})
		}
	}
}
