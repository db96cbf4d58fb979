package world

import (
	"net/netip"
	"testing"

	"webgw.dev/webgw"
)

// applyWith declares an exposure of Alice's after change has added to it.
func (w *World) applyWith(line string, change func(*webgw.Exposure)) error {
	w.T.Helper()
	r := w.Alice.Exposure(line)
	change(r.Exposure)
	s, err := w.Alice.Key.Sign(r)
	if err == nil {
		err = w.Alice.Put(s)
	}
	w.Settle()
	return err
}

// Rules lead to nodes of their own, which have a session for that alone and
// open nothing else.
func TestRulesLeadToOtherNodes(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).HTTP(8080)
		attic := w.Node("attic", BehindNAT)
		attic.HTTP(9090)
		w.Gateway("gent")
		at := webgw.Target{Node: attic.ID(), Address: "127.0.0.1:9090"}
		rules := []webgw.Rule{{Match: webgw.Match{Prefix: "/api"}, Targets: []webgw.Target{at}, Rewrite: &webgw.Rewrite{Path: "/"}}}
		if err := w.applyWith("blog.example -> home1:8080 via gent", func(e *webgw.Exposure) { e.Rules = rules }); err != nil {
			t.Fatal(err)
		}
		w.Get("https://blog.example/a").Want(200, "hello from home1", "/a")
		w.Get("https://blog.example/api/x").Want(200, "hello from attic", "/x")
		w.Get("https://blog.example//api/x").Want(400)

		// Rules alone do as well.
		if err := w.applyWith("blog.example -> home1:8080 via gent", func(e *webgw.Exposure) { e.Rules, e.Targets = rules, nil }); err != nil {
			t.Fatal(err)
		}
		w.Get("https://blog.example/a").Want(404)
		w.Get("https://blog.example/api/y").Want(200, "hello from attic", "/y")

		nobody := webgw.Target{Node: w.Key().ID(), Address: "127.0.0.1:1"}
		err := w.applyWith("shop.example -> home1:8080 via gent", func(e *webgw.Exposure) {
			e.Rules = []webgw.Rule{{Targets: []webgw.Target{nobody}}}
		})
		if webgw.KindOf(err) != webgw.NotFound {
			t.Error("a rule leads to a node that does not exist:", err)
		}
	})
}

func TestPoliciesComeIntoForce(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).HTTP(8080)
		w.Gateway("gent")
		apply := func(p *webgw.Policy) {
			if err := w.applyWith("blog.example -> home1:8080 via gent", func(e *webgw.Exposure) { e.Policy = p }); err != nil {
				t.Fatal(err)
			}
		}
		all := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
		apply(nil)
		w.Get("https://blog.example/").Want(200)
		apply(&webgw.Policy{Deny: all})
		w.Get("https://blog.example/").Want(403)
		apply(&webgw.Policy{Allow: all, HTTPSOnly: true})
		w.Get("https://blog.example/").Want(200)
		w.Get("http://blog.example/").Want(308)
	})
}
