package world

import (
	"testing"

	"webgw.dev/webgw"
)

func TestAnswersAreCompressed(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).HTTP(8080)
		w.Gateway("gent")
		for _, p := range []*webgw.Policy{nil, {Compress: &webgw.Compress{Types: []string{"text/*"}, MinSize: 1}}} {
			if err := w.applyWith("blog.example -> home1:8080 via gent", func(e *webgw.Exposure) { e.Policy = p }); err != nil {
				t.Fatal(err)
			}
			a := w.Get("https://blog.example/").Want(200, "hello from home1") // by a client that unpacks gzip
			if packed := a.Header.Get("Vary") == "Accept-Encoding"; packed != (p != nil) {
				t.Error(a.Header)
			}
		}
	})
}
