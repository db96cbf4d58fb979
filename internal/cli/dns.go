package cli

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/client/manifest"
	"webgw.dev/webgw/internal/idn"
)

type dnsVerb struct {
	Add    dnsAdd    `cmd:"" help:"Add a DNS record at a name of yours."`
	List   dnsList   `cmd:"" help:"List your DNS records."`
	Delete dnsDelete `cmd:"" help:"Remove DNS records."`
	Import dnsImport `cmd:"" help:"Take in the records of a zone file."`
}

// dnsEdit is what the verbs that change DNS records have in common.
type dnsEdit struct {
	Zone     string   `help:"Zone of yours that it belongs to; made if there is none. None is the nearest that you have." placeholder:"DOMAIN"`
	Gateways []string `name:"gateway" help:"Gateways that answer for the zone, if it is made; none takes those whose own zone it lies in, or the only one." placeholder:"NAME"`
	DryRun   bool     `help:"Show what would change, and change nothing."`
	ownerFlags
}

type dnsAdd struct {
	Name  string   `arg:"" help:"Whole name, such as www.example.org; the first label may be *, or begin with an underscore."`
	Type  string   `arg:"" help:"A, AAAA, ALIAS, CAA, CNAME, HTTPS, MX, NS, PTR, SRV, SVCB or TXT."`
	Value []string `arg:"" help:"As in a zone file, with whole names: 10 mail.example.org. Of TXT the text itself."`
	TTL   uint32   `name:"ttl" help:"Seconds, of all records of this name and type; 0 is theirs, or 300."`
	dnsEdit
}

type dnsDelete struct {
	Name  string   `arg:"" help:"Whole name."`
	Type  string   `arg:"" optional:"" help:"Type; none is every one."`
	Value []string `arg:"" optional:"" help:"Value; none is every one."`
	dnsEdit
}

type dnsImport struct {
	File    string `arg:"" help:"Zone file (RFC 1035); - is standard input."`
	Replace bool   `help:"Remove the records that are not in the file."`
	dnsEdit
}

type dnsList struct {
	Zone string `arg:"" optional:"" help:"Zone; none is all of yours."`
	ownerFlags
}

// dnsName reads the whole name of a record.
func dnsName(s string) (string, error) {
	name := webgw.NormalizeHost(s)
	if ascii := strings.IndexFunc(name, func(r rune) bool { return r >= 0x80 }) < 0; ascii {
		return name, nil // judged with the record: it may hold underscores
	}
	return manifest.Host("name", s, true)
}

func (v *dnsAdd) Run(ctx context.Context, a *app) error {
	name, err := dnsName(v.Name)
	if err != nil {
		return err
	}
	return v.change(ctx, a, name, func(zone string, z *webgw.Zone) error {
		r, err := webgw.NormalizeDNS(zone, webgw.DNSRecord{Name: name + ".", Type: webgw.DNSType(v.Type), TTL: v.TTL, Value: strings.Join(v.Value, " ")})
		if err != nil {
			return err
		}
		for i, old := range z.Records {
			if old.Name != r.Name || old.Type != r.Type {
				continue
			}
			if v.TTL == 0 {
				r.TTL = old.TTL
			}
			z.Records[i].TTL = r.TTL
		}
		if !slices.Contains(z.Records, r) {
			z.Records = append(z.Records, r)
		}
		return nil
	})
}

func (v *dnsDelete) Run(ctx context.Context, a *app) error {
	name, err := dnsName(v.Name)
	if err != nil {
		return err
	}
	typ := webgw.DNSType(strings.ToUpper(v.Type))
	value := strings.Join(v.Value, " ")
	if len(v.Value) > 0 {
		if value, err = webgw.CanonicalDNS(typ, value); err != nil {
			return err
		}
	}
	return v.change(ctx, a, name, func(zone string, z *webgw.Zone) error {
		n := len(z.Records)
		z.Records = slices.DeleteFunc(z.Records, func(r webgw.DNSRecord) bool {
			return r.FQDN(zone) == name && (typ == "" || r.Type == typ) && (len(v.Value) == 0 || r.Value == value)
		})
		if len(z.Records) == n {
			return &webgw.Error{Op: "delete record", Kind: webgw.NotFound, Public: "there is no such record in your zone " + zone, Hint: "webgw dns list " + zone}
		}
		return nil
	})
}

func (v *dnsImport) Run(ctx context.Context, a *app) error {
	if v.Zone == "" {
		return invalid("zone", "webgw dns import --zone example.org example.org.zone", "missing")
	}
	zone, err := manifest.Host("zone", v.Zone, false)
	if err != nil {
		return err
	}
	var data []byte
	if v.File == "-" {
		data, err = io.ReadAll(io.LimitReader(a.env.Stdin, manifest.MaxSize+1))
	} else {
		data, err = readFile(v.File)
	}
	if err == nil && len(data) > manifest.MaxSize {
		err = invalid("", "", "the file is larger than %d KiB", manifest.MaxSize>>10)
	}
	if err != nil {
		return err
	}
	fresh, err := parseZone(zone, data)
	if err != nil {
		return err
	}
	return v.change(ctx, a, zone, func(_ string, z *webgw.Zone) error {
		if v.Replace {
			z.Records = nil
		}
		for _, r := range fresh {
			z.Records = slices.DeleteFunc(z.Records, func(o webgw.DNSRecord) bool {
				return o.Name == r.Name && o.Type == r.Type && !slices.Contains(fresh, o)
			})
		}
		for _, r := range fresh {
			if !slices.Contains(z.Records, r) {
				z.Records = append(z.Records, r)
			}
		}
		return nil
	})
}

// parseZone reads a zone file. SOA and NS of the zone itself are the gateways'
// to make, and left out; anything else that can't be served is an error. It
// includes no other files.
func parseZone(zone string, data []byte) (out []webgw.DNSRecord, err error) {
	p := dns.NewZoneParser(bytes.NewReader(data), dns.Fqdn(zone), "")
	p.SetDefaultTTL(webgw.DefaultTTL)
	for rr, ok := p.Next(); ok; rr, ok = p.Next() {
		h := rr.Header()
		typ := webgw.DNSType(dns.TypeToString[h.Rrtype])
		name := strings.ToLower(h.Name)
		if h.Class != dns.ClassINET {
			return nil, invalid("", "", "%s %s: only class IN is served", printable(h.Name), typ)
		}
		if apex := name == dns.Fqdn(zone); typ == "SOA" || apex && typ == webgw.TypeNS {
			continue
		}
		value := strings.TrimPrefix(rr.String(), h.String())
		if txt, ok := rr.(*dns.TXT); ok {
			if value, err = unescape(strings.Join(txt.Txt, "")); err != nil {
				return nil, err
			}
		}
		r, err := webgw.NormalizeDNS(zone, webgw.DNSRecord{Name: name, Type: typ, TTL: h.Ttl, Value: value})
		if err != nil {
			return nil, inZoneFile(h.Name, typ, err)
		}
		if !slices.Contains(out, r) {
			out = append(out, r)
		}
		if len(out) > webgw.MaxDNSRecords {
			return nil, invalid("", "", "the file has more than %d records", webgw.MaxDNSRecords)
		}
	}
	if err := p.Err(); err != nil {
		return nil, invalid("", "", "the zone file can't be read: %s", strings.TrimPrefix(err.Error(), "dns: "))
	}
	return out, nil
}

func inZoneFile(name string, t webgw.DNSType, err error) error {
	if e, ok := err.(*webgw.Error); ok {
		c := *e
		c.Public = fmt.Sprintf("%s %s: %s", name, t, e.Public)
		return &c
	}
	return err
}

// unescape reads the escapes of a zone file's text (RFC 1035 section 5.1).
func unescape(s string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] != '\\':
			b.WriteByte(s[i])
		case i+3 < len(s) && strings.Trim(s[i+1:i+4], "0123456789") == "":
			n, err := strconv.ParseUint(s[i+1:i+4], 10, 8)
			if err != nil {
				return "", invalid("value", "", "%q is not a byte", s[i:i+4])
			}
			b.WriteByte(byte(n))
			i += 3
		case i+1 < len(s):
			i++
			b.WriteByte(s[i])
		}
	}
	return b.String(), nil
}

// change edits the zone that name belongs to, and declares it. Should somebody
// with the same key have been quicker, it is edited anew, so that nothing is
// lost.
func (v *dnsEdit) change(ctx context.Context, a *app, name string, edit func(zone string, z *webgw.Zone) error) error {
	c, err := a.connect(v.ownerFlags)
	if err != nil {
		return err
	}
	defer c.Close()
	for try := 0; ; try++ {
		err = v.once(ctx, a, c, name, edit)
		if webgw.KindOf(err) != webgw.Stale || try == 5 {
			return err
		}
	}
}

func (v *dnsEdit) once(ctx context.Context, a *app, c *client.Client, name string, edit func(zone string, z *webgw.Zone) error) error {
	d := newDirectory(c)
	zone, old, err := v.find(ctx, d, name)
	if err != nil {
		return err
	}
	now := time.Now()
	r := webgw.Record{Version: 1, Kind: webgw.KindZone, Owner: c.Key.ID(), Name: zone, Seq: uint64(now.UnixMilli()), Issued: now, Expires: now.Add(manifest.DefaultLifetime)}
	z := &webgw.Zone{}
	if !old.IsZero() {
		r.Seq = old.Record.Seq + 1 // exactly: whoever else does the same now is told
	}
	if !old.IsZero() && old.Record.Live(now) {
		z.Gateways, z.Records = old.Record.Zone.Gateways, slices.Clone(old.Record.Zone.Records)
	} else if z.Gateways, err = v.gateways(ctx, d, zone); err != nil {
		return err
	}
	if err := edit(zone, z); err != nil {
		return err
	}
	slices.SortStableFunc(z.Records, func(a, b webgw.DNSRecord) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Type, b.Type))
	})
	r.Zone = z
	if err := r.Validate(); err != nil {
		return err
	}
	action := actionChange
	var before []string
	switch {
	case old.IsZero() || !old.Record.Live(now):
		action = actionCreate
	default:
		before = zoneLines(old.Record)
	}
	after := zoneLines(&r)
	changes := lineChanges(before, after)
	if action == actionChange && len(changes) == 0 {
		action = actionNothing
	}
	if !v.DryRun && action != actionNothing {
		s, err := c.Key.Sign(r)
		if err != nil {
			return err
		}
		if _, err := c.Put(ctx, s); err != nil {
			return err
		}
	}
	return a.printResults(results{DryRun: v.DryRun, Results: []result{{webgw.KindZone, zone, action, changes}}}, nil)
}

func zoneLines(r *webgw.Record) (lines []string) {
	for _, d := range r.Zone.Records {
		lines = append(lines, d.Line(r.Name))
	}
	return lines
}

// lineChanges tells the lines that differ.
func lineChanges(before, after []string) (out []change) {
	for _, l := range before {
		if !slices.Contains(after, l) {
			out = append(out, change{Field: "record", From: l})
		}
	}
	for _, l := range after {
		if !slices.Contains(before, l) {
			out = append(out, change{Field: "record", To: l})
		}
	}
	return out
}

// find returns the zone that a name belongs to: the one asked for, else the
// nearest that the asker has.
func (v *dnsEdit) find(ctx context.Context, d *directory, name string) (zone string, old client.Signed, err error) {
	if v.Zone != "" {
		if zone, err = manifest.Host("zone", v.Zone, false); err != nil {
			return "", old, err
		}
		if name != zone && !strings.HasSuffix(name, "."+zone) {
			return "", old, invalid("name", "", "%q is not in the zone %s", printable(name), zone)
		}
		old, err = d.c.Get(ctx, webgw.Key{Kind: webgw.KindZone, Owner: d.c.Key.ID(), Name: zone})
		if webgw.KindOf(err) == webgw.NotFound {
			err = nil
		}
		return zone, old, err
	}
	all, err := d.list(ctx, webgw.KindZone)
	if err != nil {
		return "", old, err
	}
	for _, s := range all {
		r := s.Record
		if r.Owner == d.c.Key.ID() && (name == r.Name || strings.HasSuffix(name, "."+r.Name)) && len(r.Name) > len(zone) {
			zone, old = r.Name, s
		}
	}
	if zone == "" {
		return "", old, &webgw.Error{Op: "find zone", Kind: webgw.NotFound, Field: "zone", Public: "you have no zone that " + printable(name) + " belongs to", Hint: "--zone makes one"}
	}
	return zone, old, nil
}

// gateways chooses those that answer for a new zone.
func (v *dnsEdit) gateways(ctx context.Context, d *directory, zone string) (ids []webgw.ID, err error) {
	for i, name := range v.Gateways {
		id, err := manifest.Resolve(ctx, d, webgw.KindGateway, fmt.Sprintf("gateway[%d]", i), name)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	if len(ids) > 0 {
		return ids, nil
	}
	all, err := d.list(ctx, webgw.KindGateway)
	if err != nil {
		return nil, err
	}
	for _, s := range all {
		if webgw.Under(zone, s.Record.Gateway.Zone) && !slices.Contains(ids, s.Record.Owner) {
			ids = append(ids, s.Record.Owner)
		}
	}
	switch {
	case len(ids) > 0:
		return ids, nil
	case len(all) == 1:
		return []webgw.ID{all[0].Record.Owner}, nil
	}
	return nil, invalid("gateway", "webgw get gateways lists them", "missing: name the gateways that are to answer for %s", zone)
}

func (v *dnsList) Run(ctx context.Context, a *app) error {
	c, err := a.connect(v.ownerFlags)
	if err != nil {
		return err
	}
	defer c.Close()
	all, err := c.List(ctx, webgw.KindZone, c.Key.ID())
	if err != nil {
		return err
	}
	if v.Zone != "" {
		zone, err := manifest.Host("zone", v.Zone, false)
		if err != nil {
			return err
		}
		all = slices.DeleteFunc(all, func(s client.Signed) bool { return s.Record.Name != zone })
		if len(all) == 0 {
			return &webgw.Error{Op: "list records", Kind: webgw.NotFound, Field: "zone", Public: "you have no zone " + zone, Hint: "webgw get zones lists those that you have"}
		}
	}
	if a.json {
		type listed struct {
			Zone    string            `json:"zone"`
			Records []webgw.DNSRecord `json:"records"`
		}
		out := []listed{}
		for _, s := range all {
			out = append(out, listed{s.Record.Name, append([]webgw.DNSRecord{}, s.Record.Zone.Records...)})
		}
		return a.printJSON(struct {
			Zones []listed `json:"zones"`
		}{out})
	}
	rows := [][]string{{"NAME", "TTL", "TYPE", "VALUE"}}
	for _, s := range all {
		for _, r := range s.Record.Zone.Records {
			ttl := cmp.Or(r.TTL, webgw.DefaultTTL)
			rows = append(rows, []string{idn.Both(r.FQDN(s.Record.Name)), strconv.FormatUint(uint64(ttl), 10), string(r.Type), r.Value})
		}
	}
	if len(rows) == 1 {
		a.notef("there is nothing\n")
		return nil
	}
	return a.table(rows)
}
