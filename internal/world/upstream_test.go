package world

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/pem"
	"strings"
	"testing"
	"time"

	"webgw.dev/webgw"
)

func TestWorkloadsOverTLS(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		home := w.Node("home1", BehindNAT)
		w.Gateway("gent")
		home.TLS(8443, "back.internal")
		home.TLS(8444, "front.internal")
		back, front := w.trusted[0], w.trusted[1]
		sum := sha256.Sum256(back.RawSubjectPublicKeyInfo)
		pin := base64.StdEncoding.EncodeToString(sum[:])
		ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: back.Raw}))
		const line = "blog.example -> home1:8443 via gent"
		for _, u := range []webgw.UpstreamTLS{{ServerName: "back.internal", CA: ca}, {Pins: []string{pin}}, {ServerName: "back.internal", CA: ca, Pins: []string{pin}}} {
			if err := w.applyWith(line, func(e *webgw.Exposure) { e.UpstreamTLS = &u }); err != nil {
				t.Fatal(err)
			}
			w.Get("https://blog.example/").Want(200, "hello from home1 in TLS")
		}

		// Another workload in its place is not spoken to, and the owner is told why.
		if err := w.applyWith("blog.example -> home1:8444 via gent", func(e *webgw.Exposure) {
			e.UpstreamTLS = &webgw.UpstreamTLS{Pins: []string{pin}}
		}); err != nil {
			t.Fatal(err)
		}
		w.Get("https://blog.example/").Want(502)
		time.Sleep(10 * time.Second) // a report
		o, err := w.Client(w.Alice.Key, w.desk).Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		sum = sha256.Sum256(front.RawSubjectPublicKeyInfo)
		if len(o.Exposures) != 1 || !strings.Contains(o.Exposures[0].Why, "its key is "+base64.StdEncoding.EncodeToString(sum[:])) {
			t.Errorf("status: %+v", o.Exposures)
		}
		// In clear text, nothing is understood.
		w.Apply("blog.example -> home1:8444 via gent")
		if a := w.Get("https://blog.example/"); a.Status == 200 {
			t.Errorf("in clear text: %d %s", a.Status, a.Body)
		}
	})
}
