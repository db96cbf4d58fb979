package world

import (
	"testing"

	"webgw.dev/webgw/internal/daemon"
)

func TestDefaultSiteOfAGateway(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).HTTP(8080)
		gent := w.Gateway("gent", func(_ *Daemon, c *daemon.GatewayConfig) { c.DefaultHost = "parking.example" })
		cairo := w.Gateway("cairo", func(_ *Daemon, c *daemon.GatewayConfig) { c.DefaultURL = "https://farm.example/" })
		w.dns["nobodys.example"], w.dns["gone.example"] = []*Daemon{gent}, []*Daemon{cairo}
		w.Get("http://nobodys.example/").Want(404)
		w.Apply("parking.example -> home1:8080 via gent")
		if a := w.Get("http://nobodys.example/x").Want(200, "hello from home1", "/x"); a.Header.Get("X-Saw-Host") != "nobodys.example" {
			t.Errorf("the site is asked for %q", a.Header.Get("X-Saw-Host"))
		}
		w.Get("https://nobodys.example/").WantNothing() // there is no certificate
		if a := w.Get("http://gone.example/x").Want(302); a.Header.Get("Location") != "https://farm.example/" {
			t.Errorf("sent to %q", a.Header.Get("Location"))
		}
	})
}
