//go:build linux

package e2e

import (
	"encoding/xml"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/summerwind/h2spec"
	"github.com/summerwind/h2spec/config"
)

// TestH2Spec runs all of h2spec's strict cases (RFC 9113 and RFC 7541).
func TestH2Spec(t *testing.T) {
	g := startGateway(t)
	g.startNode()
	g.expose("spec", "protocol: http\nhosts: [localhost]", site(t, os.DevNull)) // h2spec dials the host that it asks for
	g.waitHTTP("localhost")
	report := filepath.Join(t.TempDir(), "report.xml")
	// It prints every case on standard output, in which other tests' failures drown.
	stdout := os.Stdout
	quiet, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer quiet.Close()
	os.Stdout = quiet
	ok, err := h2spec.Run(&config.Config{Host: "localhost", Port: g.tlsPort, Path: "/", TLS: true, Insecure: true, Strict: true,
		Timeout: 2 * time.Second, MaxHeaderLen: 4000, JUnitReport: report})
	os.Stdout = stdout
	if err != nil {
		t.Fatal(err)
	}
	var suites struct {
		Suites []struct {
			Package string `xml:"package,attr"`
			Tests   int    `xml:"tests,attr"`
			Skipped int    `xml:"skipped,attr"`
			Cases   []struct {
				Name    string  `xml:"classname,attr"`
				Failure *string `xml:"failure"`
				Error   *string `xml:"error"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	b, err := os.ReadFile(report)
	if err == nil {
		err = xml.Unmarshal(b, &suites)
	}
	if err != nil {
		t.Fatal(err)
	}
	total := 0
	for _, s := range suites.Suites {
		total += s.Tests
		if s.Skipped > 0 {
			t.Errorf("%s: %d skipped", s.Package, s.Skipped)
		}
		for _, c := range s.Cases {
			for _, f := range []*string{c.Failure, c.Error} {
				if f != nil {
					t.Errorf("%s %s: %s", s.Package, c.Name, *f)
				}
			}
		}
	}
	if !ok || total < 146 {
		t.Errorf("h2spec ran %d cases, all passed: %v; want 146", total, ok)
	}
}

func TestH2Load(t *testing.T) {
	need(t, "h2load")
	g := startGateway(t)
	g.startNode()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Write(make([]byte, 1000)) }))
	t.Cleanup(s.Close)
	host := g.exposeHTTP("load", s.Listener.Addr().String())
	const requests = 4000
	for _, tt := range []struct {
		name string
		args []string
	}{
		{"HTTP/2", []string{"-c", "10", "-m", "20", fmt.Sprintf("https://%s:%d/", host, g.tlsPort)}},
		{"HTTP/1.1 in TLS", []string{"--h1", "-c", "20", "-m", "1", fmt.Sprintf("https://%s:%d/", host, g.tlsPort)}},
		{"HTTP/1.1 pipelined", []string{"--h1", "-c", "10", "-m", "8", fmt.Sprintf("http://%s:%d/", host, g.httpPort)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			port := g.tlsPort
			if strings.HasPrefix(tt.args[len(tt.args)-1], "http:") {
				port = g.httpPort
			}
			out := cmd(t, "h2load", append([]string{"-n", fmt.Sprint(requests), fmt.Sprintf("--connect-to=127.0.0.1:%d", port)}, tt.args...)...)
			want := fmt.Sprintf("%d total, %[1]d started, %[1]d done, %[1]d succeeded, 0 failed, 0 errored, 0 timeout", requests)
			codes := fmt.Sprintf("status codes: %d 2xx, 0 3xx, 0 4xx, 0 5xx", requests)
			if !strings.Contains(out, want) || !strings.Contains(out, codes) {
				t.Errorf("h2load:\n%s", out)
			}
			t.Log(regexp.MustCompile(`finished in .*`).FindString(out))
		})
	}
}
