package world

import (
	"slices"
	"strings"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/ident"
)

// Lifetime of the records that a world's owners declare.
const Lifetime = 30 * 24 * time.Hour

// Apply declares an exposure of Alice's and lets it come into force:
//
//	blog.example -> home1:8080 via gent, cairo
//	tls vault.example -> home1:8443 via gent
//	tls vault.example:20443 -> home1:8443 via gent
//	tcp 20022 -> home1:22, home2:22 via gent
//	udp 20000-20009 -> home1:7000 via gent
//	api.example -> direct 8.8.8.8:80 via gent
//
// A target NODE:PORT is that port of the node's loopback; NODE/ADDRESS is any
// address as seen from the node.
func (w *World) Apply(line string) {
	w.T.Helper()
	if err := w.Alice.Apply(line); err != nil {
		w.T.Fatalf("apply %q: %v", line, err)
	}
	w.Settle()
}

// Withdraw withdraws an exposure of Alice's, by what Apply had before the
// arrow, and lets that come into force.
func (w *World) Withdraw(left string) {
	w.T.Helper()
	if err := w.Alice.Withdraw(left); err != nil {
		w.T.Fatalf("withdraw %q: %v", left, err)
	}
	w.Settle()
}

// Apply declares an exposure and returns what the registry says.
func (o *Owner) Apply(line string) error {
	o.w.T.Helper()
	s, err := o.Key.Sign(o.Exposure(line))
	if err != nil {
		return err
	}
	o.w.trace.add("world", o.Name+" applies: "+line)
	return o.Put(s)
}

// Withdraw signs a tombstone and returns what the registry says.
func (o *Owner) Withdraw(left string) error {
	o.w.T.Helper()
	r, ok := o.w.declared[webgw.Key{Kind: webgw.KindExposure, Owner: o.ID(), Name: exposureName(left)}]
	if !ok {
		o.w.T.Fatalf("%s has not applied %q", o.Name, left)
	}
	r.Seq++
	r.Deleted, r.Issued, r.Expires = true, time.Now(), time.Now().Add(Lifetime)
	o.w.declared[r.Key()] = r
	s, err := o.Key.Sign(r)
	if err != nil {
		return err
	}
	o.w.trace.add("world", o.Name+" withdraws: "+left)
	return o.Put(s)
}

// Put sends what is signed, by whomever, to the registry.
func (o *Owner) Put(s ident.Signed) error {
	o.w.T.Helper()
	_, err := o.w.Client(o.Key, o.w.desk).Put(o.w.T.Context(), s)
	return err
}

// Exposure reads a line of Apply into the next version of its record, signed
// and sent by nobody yet.
func (o *Owner) Exposure(line string) webgw.Record {
	w := o.w
	w.T.Helper()
	left, right, ok1 := strings.Cut(line, " -> ")
	targets, gateways, ok2 := strings.Cut(right, " via ")
	if !ok1 || !ok2 {
		w.T.Fatalf("%q is not WHAT -> TARGETS via GATEWAYS", line)
	}
	e := &webgw.Exposure{Protocol: webgw.HTTP}
	switch proto, what, ok := strings.Cut(left, " "); {
	case !ok:
		e.Hosts = []string{left}
	case proto == "tls":
		host, port, _ := strings.Cut(what, ":")
		e.Protocol, e.Hosts = webgw.TLS, []string{host}
		w.ports(e, port)
	case proto == "tcp" || proto == "udp":
		e.Protocol = webgw.ExposureProtocol(proto)
		w.ports(e, what)
	default:
		w.T.Fatalf("%q: no such protocol", left)
	}
	for _, t := range strings.Split(targets, ", ") {
		if address, ok := strings.CutPrefix(t, "direct "); ok {
			e.Targets = append(e.Targets, webgw.Target{Direct: address})
		} else if node, address, ok := strings.Cut(t, "/"); ok {
			e.Targets = append(e.Targets, webgw.Target{Node: w.Daemon(node).ID(), Address: address})
		} else if node, port, ok := strings.Cut(t, ":"); ok {
			e.Targets = append(e.Targets, webgw.Target{Node: w.Daemon(node).ID(), Address: "127.0.0.1:" + port})
		} else {
			w.T.Fatalf("%q is no target", t)
		}
	}
	var carriers []*Daemon
	for _, g := range strings.Split(gateways, ", ") {
		carriers = append(carriers, w.Daemon(g))
		e.Gateways = append(e.Gateways, w.Daemon(g).ID())
	}
	for _, h := range e.Hosts {
		w.dns[h] = slices.Clone(carriers)
	}
	r := webgw.Record{Version: webgw.Protocol, Kind: webgw.KindExposure, Owner: o.ID(), Name: exposureName(left),
		Issued: time.Now(), Expires: time.Now().Add(Lifetime), Exposure: e}
	r.Seq = w.declared[r.Key()].Seq + 1
	w.declared[r.Key()] = r
	return r
}

// ports gives an exposure a public port, a range of them, or "".
func (w *World) ports(e *webgw.Exposure, s string) {
	w.T.Helper()
	if s == "" {
		return
	}
	r, err := webgw.ParsePortRange(s)
	if err != nil {
		w.T.Fatal(err)
	}
	if e.Port = r.First; r.Len() > 1 {
		e.PortEnd = r.Last
	}
}

// exposureName makes a record's name of what stands before the arrow.
func exposureName(left string) string {
	return strings.Trim(strings.NewReplacer(".", "-", " ", "-", ":", "-", "*", "any").Replace(left), "-")
}

// Key returns the key of an exposure, by what stands before the arrow.
func (o *Owner) ExposureKey(left string) webgw.Key {
	return webgw.Key{Kind: webgw.KindExposure, Owner: o.ID(), Name: exposureName(left)}
}
