package cli

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client/manifest"
	"webgw.dev/webgw/internal/ident"
)

// limitFlags say who may come, and how often, by the words of a manifest's
// policy.
type limitFlags struct {
	Allow          []string `help:"Network or address of visitors who may come; without it all." placeholder:"CIDR"`
	Deny           []string `help:"Network or address of visitors who may not." placeholder:"CIDR"`
	AllowCountries []string `name:"allow-country" help:"Country of visitors who may come, by its code; with --allow, either lets in." placeholder:"CODE"`
	DenyCountries  []string `name:"deny-country" help:"Country of visitors who may not." placeholder:"CODE"`
	Idle           string   `help:"How long nothing may pass on a stream or flow, such as 10m." placeholder:"TIME"`
	Concurrent     int      `help:"Streams, or HTTP requests, at once." placeholder:"N"`
	Bandwidth      string   `help:"Bytes a second, each way, of all visitors together, such as 500K or 10M." placeholder:"SIZE"`
	OneBandwidth   string   `name:"connection-bandwidth" help:"Bytes a second, each way, of one connection." placeholder:"SIZE"`
	ConnectionRate string   `name:"connection-rate" help:"New connections of one visitor, such as 10/s or 100/m." placeholder:"RATE"`
}

func (f *limitFlags) shape(e *webgw.Exposure) (err error) {
	p := webgw.Policy{Concurrent: f.Concurrent, AllowCountries: f.AllowCountries, DenyCountries: f.DenyCountries}
	if p.Allow, err = prefixes("allow", f.Allow); err != nil {
		return err
	}
	if p.Deny, err = prefixes("deny", f.Deny); err != nil {
		return err
	}
	p.ConnectionRate = rateOf(f.ConnectionRate)
	if f.Idle != "" {
		p.Timeouts = &webgw.Timeouts{Idle: f.Idle}
	}
	if p.Bandwidth, err = bandwidth(f.OneBandwidth, f.Bandwidth); err != nil {
		return err
	}
	if len(p.Allow)+len(p.Deny)+len(p.AllowCountries)+len(p.DenyCountries)+p.Concurrent != 0 || p.ConnectionRate != nil || p.Timeouts != nil || p.Bandwidth != nil {
		e.Policy = &p
	}
	return nil
}

func bandwidth(connection, total string) (*webgw.Bandwidth, error) {
	var b webgw.Bandwidth
	for _, f := range [...]struct {
		name, size string
		to         **webgw.Throughput
	}{{"connection-bandwidth", connection, &b.Connection}, {"bandwidth", total, &b.Total}} {
		n, err := parseSize(f.name, f.size)
		if err != nil {
			return nil, err
		}
		if n > 0 {
			*f.to = &webgw.Throughput{In: n, Out: n}
		}
	}
	if b == (webgw.Bandwidth{}) {
		return nil, nil
	}
	return &b, nil
}

func rateOf(s string) *webgw.RateLimit {
	if s == "" {
		return nil
	}
	return &webgw.RateLimit{Address: &webgw.Rate{Rate: s}}
}

// prefixes reads networks; an address alone is one of its own.
func prefixes(field string, list []string) (out []netip.Prefix, err error) {
	for _, s := range list {
		if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
			continue
		}
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, invalid(field, "", "%q is not a network such as 192.0.2.0/24", s)
		}
		out = append(out, p)
	}
	return out, nil
}

// proxyFlag is of protocols whose bytes are passed on as they are.
type proxyFlag struct {
	ProxyProtocol string `name:"proxy-protocol" enum:"v1,v2," default:"" help:"Tell the server the visitor's address by a PROXY header: v1 or v2."`
}

// httpFlags are of protocol http.
type httpFlags struct {
	Upstream     string   `enum:"auto,http1,h2c,h2," default:"" help:"How the workload is spoken to: auto, http1, h2c, or h2 over TLS."`
	UpstreamTLS  bool     `name:"upstream-tls" help:"Speak TLS to the workload, and verify its certificate; the flags below imply it."`
	UpstreamName string   `name:"upstream-name" help:"Name that the workload's certificate must be for; none is the target's host." placeholder:"HOST"`
	UpstreamCA   string   `name:"upstream-ca" help:"File of the authorities (PEM) that count for the workload instead of the system's." placeholder:"FILE"`
	UpstreamPins []string `name:"upstream-pin" help:"Public key that the workload must have: base64 of its SHA-256." placeholder:"PIN"`

	RequestRate string `name:"request-rate" help:"Requests of one visitor, such as 10/s or 100/m." placeholder:"RATE"`
	MaxBody     string `name:"max-body" help:"Largest body of a request: bytes, or with K, M or G." placeholder:"SIZE"`
	MaxResponse string `name:"max-response" help:"Largest body of an answer: bytes, or with K, M or G." placeholder:"SIZE"`
	Compress    bool   `help:"Compress answers that the server has not."`
	HTTPSOnly   bool   `name:"https-only" help:"Redirect plain HTTP."`
	HSTS        string `name:"hsts" help:"How long browsers are to use https only, such as 365d." placeholder:"TIME"`
	BasicAuth   string `name:"basic-auth" help:"File of visitors with passwords, as htpasswd -nB -C 10 NAME prints them." placeholder:"FILE"`
	JWTIssuer   string `name:"jwt-issuer" help:"Issuer (https URL) of the tokens that let visitors in." placeholder:"URL"`
	JWTAudience string `name:"jwt-audience" help:"Whom the tokens must be for." placeholder:"NAME"`
	ClientCA    string `name:"client-ca" help:"File of the authorities (PEM) that every visitor must show a certificate of." placeholder:"FILE"`
	Connect     bool   `name:"connect" help:"Let visitors CONNECT to the target, and speak whatever it speaks."`
	RewriteHost string `name:"rewrite-host" help:"Host that the workload is asked for, instead of the visitor's." placeholder:"HOST"`
}

func (f *httpFlags) shape(e *webgw.Exposure) (err error) {
	e.Upstream, e.Connect = webgw.Upstream(f.Upstream), f.Connect
	if f.UpstreamTLS || f.UpstreamName != "" || f.UpstreamCA != "" || len(f.UpstreamPins) > 0 {
		u := webgw.UpstreamTLS{ServerName: f.UpstreamName, Pins: f.UpstreamPins}
		if u.CA, err = textOf("upstream-ca", f.UpstreamCA); err != nil {
			return err
		}
		e.UpstreamTLS = &u
	}
	if f.RewriteHost != "" {
		e.Rules = []webgw.Rule{{Rewrite: &webgw.Rewrite{Host: f.RewriteHost}}}
	}
	p := webgw.Policy{RequestRate: rateOf(f.RequestRate), HTTPSOnly: f.HTTPSOnly}
	if f.Compress {
		p.Compress = &webgw.Compress{}
	}
	if p.MaxBody, err = parseSize("max-body", f.MaxBody); err != nil {
		return err
	}
	if p.MaxResponse, err = parseSize("max-response", f.MaxResponse); err != nil {
		return err
	}
	if f.HSTS != "" {
		d, err := manifest.ParseLifetime(f.HSTS)
		if err != nil {
			return invalid("hsts", "", "%s", err.(*webgw.Error).Public)
		}
		p.HSTS = &webgw.HSTS{MaxAge: int(d / time.Second)}
	}
	if f.BasicAuth != "" {
		if p.BasicAuth, err = readPasswords(f.BasicAuth); err != nil {
			return err
		}
	}
	if f.JWTIssuer+f.JWTAudience != "" {
		p.JWT = &webgw.JWT{Issuer: f.JWTIssuer}
		if f.JWTAudience != "" {
			p.JWT.Audiences = []string{f.JWTAudience}
		}
	}
	if p.ClientCA, err = textOf("client-ca", f.ClientCA); err != nil {
		return err
	}
	if p.RequestRate == nil && p.MaxBody+p.MaxResponse == 0 && p.Compress == nil && !p.HTTPSOnly && p.HSTS == nil && !p.Identifies() {
		return nil
	}
	if was := e.Policy; was != nil {
		p.Allow, p.Deny, p.AllowCountries, p.DenyCountries = was.Allow, was.Deny, was.AllowCountries, was.DenyCountries
		p.Concurrent, p.ConnectionRate, p.Timeouts, p.Bandwidth = was.Concurrent, was.ConnectionRate, was.Timeouts, was.Bandwidth
	}
	e.Policy = &p
	return nil
}

// maxFile bounds what is read into a record, bytes; a record holds less.
const maxFile = 64 << 10

// textOf reads a file; "" is none.
func textOf(field, name string) (string, error) {
	if name == "" {
		return "", nil
	}
	f, err := os.Open(name)
	if err != nil {
		return "", invalid(field, "", "the file %s can't be read", name)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil || len(b) > maxFile {
		return "", invalid(field, "", "the file %s can't be read, or is longer than %d KiB", name, maxFile>>10)
	}
	return string(b), nil
}

// readPasswords reads lines of NAME:HASH.
func readPasswords(name string) (*webgw.BasicAuth, error) {
	text, err := textOf("basic-auth", name)
	if err != nil {
		return nil, err
	}
	auth := &webgw.BasicAuth{}
	lines := bufio.NewScanner(strings.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		user, hash, ok := strings.Cut(line, ":")
		if _, err := webgw.ParsePasswordHash(hash); !ok || err != nil {
			why := "is not NAME:HASH"
			if ok {
				why = "the hash " + err.(*webgw.Error).Public
			}
			return nil, invalid("basic-auth", "htpasswd -nB -C 10 NAME prints a line", "%s:%d: %s", name, n, why)
		}
		auth.Users = append(auth.Users, webgw.User{Name: user, Hash: hash})
	}
	if err := lines.Err(); err != nil || len(auth.Users) == 0 {
		return nil, invalid("basic-auth", "", "the file %s names nobody", name)
	}
	return auth, nil
}

// parseSize reads bytes, "" for none, or a number with K, M or G.
func parseSize(field, s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	digits, shift := s, 0
	if i := strings.IndexByte("KMG", s[len(s)-1]); i >= 0 {
		digits, shift = s[:len(s)-1], 10*(i+1)
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n <= 0 || n > 1<<(62-shift) {
		return 0, invalid(field, "", "%q is not a size such as 500K, 10M or 1048576", s)
	}
	return n << shift, nil
}

// manifest prints what would be declared, as a file for webgw apply.
func (v *exposing) manifest(ctx context.Context, a *app, d *directory, p *plan, target webgw.Target, lifetime time.Duration) error {
	if p.freePort && p.exposure.Port == 0 { // a proposal, which nobody holds
		port, err := d.c.FreePorts(ctx, p.exposure.Protocol, p.count, p.exposure.Gateways...)
		if err != nil {
			return err
		}
		p.take(port)
	}
	var none webgw.ID
	if target.Direct == "" && target.Node.IsZero() {
		stranger, err := ident.Generate() // any identity at all
		if err != nil {
			return err
		}
		none = stranger.ID()
		target.Node = none
	}
	p.exposure.Targets = []webgw.Target{target}
	now := time.Now()
	r := &webgw.Record{Version: webgw.Protocol, Kind: webgw.KindExposure, Owner: d.c.Key.ID(), Name: p.name, Seq: 1, Issued: now, Expires: now.Add(lifetime), Exposure: &p.exposure}
	if err := r.Validate(); err != nil {
		return err
	}
	var failed error
	text, err := manifest.Format(r, func(kind webgw.Kind, id webgw.ID) string {
		if id == none {
			return "your-node"
		}
		name, err := d.label(ctx, kind, id)
		if err != nil {
			failed = err
		}
		return name
	})
	if err == nil {
		err = failed
	}
	if err != nil {
		return err
	}
	if !none.IsZero() {
		text = append([]byte("# your-node is to be the name of the node that the target is on: webgw get nodes\n"), text...)
	}
	if a.json {
		return a.printJSON(struct {
			Manifest string `json:"manifest"`
		}{string(text)})
	}
	a.printf("%s", bytes.TrimRight(text, "\n"))
	a.printf("\n")
	return nil
}
