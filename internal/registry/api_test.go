package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/getkin/kin-openapi/openapi3"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/ident"
)

func TestDeclareGetListDelete(t *testing.T) {
	bubble(t, 2, nil, func(g *grid) {
		g.site()
		a, b := g.as(key(1), 0), g.as(key(1), 1)
		x := web("blog", "blog.gent.example")
		s, rev, err := a.Declare(g.ctx, x)
		if err != nil || rev == 0 {
			t.Fatal(rev, err)
		}
		// The replica that took it in shows it at once, the other soon.
		got, err := a.Get(g.ctx, s.Record.Key())
		if err != nil || !bytes.Equal(got.Envelope(), s.Envelope()) {
			t.Fatalf("get: %v", err)
		}
		synctest.Wait()
		if _, err = b.Get(g.ctx, s.Record.Key()); err != nil {
			t.Fatal(err)
		}
		if again, err := b.Put(g.ctx, s); err != nil || again != rev {
			t.Errorf("the same again: revision %d, %v; want %d", again, err, rev)
		}
		s2, _, err := b.Declare(g.ctx, x)
		if err != nil || s2.Record.Seq <= s.Record.Seq {
			t.Fatalf("declare again: %v", err)
		}
		list, err := b.List(g.ctx, webgw.KindExposure, key(1).ID())
		if err != nil || len(list) != 1 || list[0].Record.Seq != s2.Record.Seq {
			t.Fatalf("list: %v, %v", list, err)
		}
		if _, err = b.Delete(g.ctx, s.Record.Key()); err != nil {
			t.Fatal(err)
		}
		got, err = b.Get(g.ctx, s.Record.Key())
		if err != nil || !got.Record.Deleted || got.Record.Exposure == nil {
			t.Errorf("a withdrawn record: %v, %v", got.Record, err)
		}
		if list, err = b.List(g.ctx, webgw.KindExposure, key(1).ID()); err != nil || len(list) != 0 {
			t.Errorf("list: %v, %v", list, err)
		}
		if list, err = b.ListAll(g.ctx, webgw.KindExposure, key(1).ID()); err != nil || len(list) != 1 {
			t.Errorf("list with withdrawn ones: %v, %v", list, err)
		}
		if s, _, err = b.Declare(g.ctx, x); err != nil || s.Record.Seq <= got.Record.Seq {
			t.Errorf("declare after a withdrawal: %v", err)
		}
		info, err := a.Info(g.ctx)
		if err != nil || info.ID != key(1000).ID() || info.Epoch == "" {
			t.Errorf("info: %+v, %v", info, err)
		}
		if port, err := a.FreePort(g.ctx, webgw.TCP, key(100).ID()); err != nil || port < 2000 || port > 2009 {
			t.Errorf("free port: %d, %v", port, err)
		}
		_, err = a.FreePort(g.ctx, webgw.TCP, key(101).ID())
		wantKind(t, err, webgw.NotFound, "a port of an unknown gateway")
	})
}

func TestFreePortIsSharedByAll(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		g.declare(key(100), gateway("gent", ""))
		other := gateway("cairo", "")
		other.Gateway.Ports = "2008-2020"
		g.declare(key(101), other)
		g.declare(key(1), tcp("a", 2008, key(101).ID()))
		port, err := g.as(key(1)).FreePort(g.ctx, webgw.TCP, key(100).ID(), key(101).ID())
		if err != nil || port != 2009 {
			t.Errorf("got %d, %v; only 2009 is free on both", port, err)
		}
		g.declare(key(1), tcp("b", 2009, key(100).ID()))
		_, err = g.as(key(1)).FreePort(g.ctx, webgw.TCP, key(100).ID(), key(101).ID())
		wantKind(t, err, webgw.Exhausted, "when none is left")

		// UDP has ports of its own, of which there is one each as well.
		port, err = g.as(key(1)).FreePort(g.ctx, webgw.UDP, key(100).ID(), key(101).ID())
		if err != nil || port != 2008 && port != 2009 {
			t.Errorf("got UDP port %d, %v; want 2008 or 2009", port, err)
		}
		udp := tcp("c", 2009, key(100).ID())
		udp.Exposure.Protocol = webgw.UDP
		g.declare(key(1), udp)
		udp.Name = "d"
		_, _, err = g.as(key(2)).Declare(g.ctx, udp)
		wantKind(t, err, webgw.Taken, "the same UDP port again")
	})
}

func TestListPages(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		b := &bench{t: t, s: g.replicas[0], ctx: g.ctx}
		var changes []change
		for i := range 260 {
			s, err := b.sign(key(1), claimed(fmt.Sprintf("n%d.example", i), false))
			if err != nil {
				t.Fatal(err)
			}
			changes = append(changes, change{key: recordKey(s.Record.Key()), entry: &entry{Signed: s, key: s.Record.Key(), mod: 2}})
		}
		g.replicas[0].mirror.apply(2, changes)
		list, err := g.as(key(1)).List(g.ctx, webgw.KindName, webgw.ID{})
		if err != nil || len(list) != 260 {
			t.Fatalf("%d records, %v", len(list), err)
		}
		if !slices.IsSortedFunc(list, func(a, b ident.Signed) int {
			return strings.Compare(a.Record.Key().String(), b.Record.Key().String())
		}) {
			t.Error("not in key order")
		}
	})
}

func TestVisibility(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		g.site()
		g.declare(key(101), gateway("cairo", ""))
		farmer := key(300)
		other := node("home2", key(2).ID())
		other.Node.Farmer = farmer.ID()
		g.declare(key(201), other)
		g.declare(farmer, webgw.Record{Kind: webgw.KindFarm, Name: "farm", Farm: &webgw.Farm{}})
		g.declare(key(1), web("blog", "blog.gent.example"))
		g.declare(key(1), claimed("mine.example", false))
		k := func(kind webgw.Kind, owner int, name string) webgw.Key {
			return webgw.Key{Kind: kind, Owner: key(owner).ID(), Name: name}
		}
		all := []webgw.Key{
			k(webgw.KindGateway, 100, "gent"), k(webgw.KindGateway, 101, "cairo"), k(webgw.KindFarm, 300, "farm"),
			k(webgw.KindNode, 200, "home1"), k(webgw.KindNode, 201, "home2"),
			k(webgw.KindExposure, 1, "blog"), k(webgw.KindName, 1, "mine.example"),
		}
		for who, want := range map[int][]string{
			1:   {"gent", "cairo", "farm", "home1", "blog", "mine.example"},
			2:   {"gent", "cairo", "farm", "home2"},
			100: {"gent", "cairo", "farm", "home1", "blog"},
			101: {"gent", "cairo", "farm"},
			200: {"gent", "cairo", "farm", "home1", "blog"},
			201: {"gent", "cairo", "farm", "home2"},
			300: {"gent", "cairo", "farm", "home2"},
			999: {"gent", "cairo", "farm"},
		} {
			c := g.as(key(who))
			var got, listed []string
			for _, k := range all {
				_, err := c.Get(g.ctx, k)
				if err == nil {
					got = append(got, k.Name)
				} else {
					wantKind(t, err, webgw.NotFound, fmt.Sprint(who, " asks for ", k.Name))
				}
			}
			list, err := c.List(g.ctx, "", webgw.ID{})
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range list {
				listed = append(listed, s.Record.Name)
			}
			slices.Sort(want)
			slices.Sort(got)
			slices.Sort(listed)
			if !slices.Equal(got, want) || !slices.Equal(listed, want) {
				t.Errorf("%d sees %v, lists %v, want %v", who, got, listed, want)
			}
		}
	})
}

func TestClientJudgesTheServer(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		c := g.as(key(1))
		c.Server = key(5).ID()
		_, err := c.Info(g.ctx)
		wantKind(t, err, webgw.Unauthenticated, "another server than expected")
		c = g.as(key(1))
		c.Server = webgw.ID{}
		_, err = c.Info(g.ctx)
		wantKind(t, err, webgw.Unauthenticated, "an unknown server and nobody to judge")
		c = g.as(key(1))
		c.Server = webgw.ID{}
		var met webgw.ID
		c.TrustServer = func(addr string, id webgw.ID) error { met = id; return nil }
		if _, err = c.Info(g.ctx); err != nil || met != key(1000).ID() {
			t.Errorf("%v, %v", met, err)
		}
		c = g.as(ident.Key{})
		_, err = c.Info(g.ctx)
		wantKind(t, err, webgw.Unauthenticated, "a client without identity")
	})
}

// A dead replica costs a try, not the answer; the next request goes straight
// to the one that lives.
func TestClientChangesReplica(t *testing.T) {
	bubble(t, 2, nil, func(g *grid) {
		c := g.as(key(1))
		if _, err := c.Info(g.ctx); err != nil {
			t.Fatal(err)
		}
		g.world.Kill(g.hosts[0])
		if _, _, err := c.Declare(g.ctx, claimed("a.example", false)); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if _, err := c.Info(g.ctx); err != nil || time.Since(start) > time.Second {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		g.world.Kill(g.hosts[1])
		_, err := c.Info(g.ctx)
		wantKind(t, err, webgw.Unavailable, "all replicas dead")
	})
}

func TestStoreOutage(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		g.site()
		g.kv.setFail(errors.New("no quorum"))
		synctest.Wait()
		c := g.as(key(1))
		if _, err := c.Get(g.ctx, webgw.Key{Kind: webgw.KindGateway, Owner: key(100).ID(), Name: "gent"}); err != nil {
			t.Errorf("read from memory: %v", err)
		}
		_, _, err := c.Declare(g.ctx, claimed("a.example", false))
		wantKind(t, err, webgw.Unavailable, "a write")
		g.kv.setFail(nil)
		time.Sleep(10 * time.Second)
		if _, _, err := c.Declare(g.ctx, claimed("a.example", false)); err != nil {
			t.Errorf("after the outage: %v", err)
		}
	})
}

// A damaged value doesn't replace the good one, and can be replaced.
func TestDamagedValue(t *testing.T) {
	bubble(t, 1, nil, func(g *grid) {
		s := g.declare(key(1), claimed("a.example", false))
		k := s.Record.Key()
		g.kv.spoil(recordKey(k), []byte("{}\n{}"))
		synctest.Wait()
		c := g.as(key(1))
		if _, err := c.Get(g.ctx, k); err != nil {
			t.Errorf("the last good version: %v", err)
		}
		if _, _, err := c.Declare(g.ctx, claimed("a.example", true)); err != nil {
			t.Errorf("a new version: %v", err)
		}
	})
}

// schema checks bodies against the document, and notes what was exercised.
type schema struct {
	t    *testing.T
	doc  *openapi3.T
	seen map[string]bool
}

func loadSchema(t *testing.T) *schema {
	l := openapi3.NewLoader()
	doc, err := l.LoadFromData(openapi)
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(context.Background()); err != nil {
		t.Fatal(err)
	}
	return &schema{t, doc, map[string]bool{}}
}

// check holds an answer against the operation's schema for its status; each
// line of NDJSON on its own.
func (s *schema) check(method, path string, status int, body []byte) {
	s.t.Helper()
	op := s.doc.Paths.Find(path).GetOperation(method)
	what := fmt.Sprint(method, " ", path, " ", status)
	ref := op.Responses.Status(status)
	if ref == nil {
		ref = op.Responses.Default()
	}
	if ref == nil {
		s.t.Errorf("%s is not in the document", what)
		return
	}
	s.seen[fmt.Sprint(op.OperationID, " ", status)] = true
	for kind, media := range ref.Value.Content {
		docs := [][]byte{body}
		switch kind {
		case "application/yaml":
			continue
		case "application/x-ndjson":
			docs = bytes.Split(bytes.TrimSpace(body), []byte("\n"))
		}
		for _, d := range docs {
			var v any
			if err := json.Unmarshal(d, &v); err != nil {
				s.t.Errorf("%s: %v in %q", what, err, d)
				continue
			}
			if err := media.Schema.Value.VisitJSON(v, openapi3.EnableJSONSchema2020()); err != nil {
				s.t.Errorf("%s: %v in %s", what, err, d)
			}
		}
	}
}

func TestDocumentAndRoutesAgree(t *testing.T) {
	s := loadSchema(t)
	want := map[string]bool{}
	for path, item := range s.doc.Paths.Map() {
		for method, op := range item.Operations() {
			want[method+" "+path] = op.Security != nil && len(*op.Security) > 0 && len((*op.Security)[0]) == 0
		}
	}
	for _, rt := range routes {
		name := rt.method + " " + rt.path
		open, ok := want[name]
		if !ok {
			t.Errorf("%s is not in the document", name)
		} else if open != rt.open {
			t.Errorf("%s: the document and the code disagree on whether it needs an identity", name)
		}
		delete(want, name)
	}
	for name := range want {
		t.Errorf("%s is in the document only", name)
	}
}

// ask sends a raw request, for what the SDK would never send.
func (g *grid) ask(k ident.Key, method, path string, body []byte) (int, []byte) {
	g.t.Helper()
	config, err := k.ClientTLS(key(1000).ID(), "http/1.1")
	if err != nil {
		g.t.Fatal(err)
	}
	host := g.as(k).Net
	tr := &http.Transport{TLSClientConfig: config}
	tr.DialTLSContext = dialTLS(host, config)
	defer tr.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(g.ctx, 12*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "https://10.0.0.1:8443"+path, bytes.NewReader(body))
	if err != nil {
		g.t.Fatal(err)
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		g.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) {
		g.t.Fatalf("%s %s: %v", method, path, err)
	}
	return resp.StatusCode, out
}

// Every operation answers what the document says, well and badly.
func TestAnswersMatchTheDocument(t *testing.T) {
	s := loadSchema(t)
	bubble(t, 1, nil, func(g *grid) {
		g.site()
		blog := g.declare(key(1), web("blog", "blog.gent.example"))
		next := *blog.Record
		next.Seq++
		put, err := key(1).Sign(next)
		if err != nil {
			t.Fatal(err)
		}
		next.Seq++
		next.Deleted = true
		gone, err := key(1).Sign(next)
		if err != nil {
			t.Fatal(err)
		}
		path := "/v1/records/exposure/" + key(1).ID().String() + "/blog"
		const record = "/v1/records/{kind}/{owner}/{name}"
		gwStatus := `{"release":"v1","protocol":1,"since":"2026-01-01T00:00:00Z","rev":3,"gateway":{"sessions":["` + key(200).ID().String() + `"]}}`
		for _, c := range []struct {
			owner        int // 0: nobody
			method, path string
			op           string // path in the document, if another
			body         string
			want         int
		}{
			{0, "GET", "/healthz", "", "", 200},
			{0, "GET", "/readyz", "", "", 200},
			{0, "GET", "/v1/openapi.json", "", "", 200},
			{0, "GET", "/v1/openapi.yaml", "", "", 200},
			{0, "GET", "/v1/info", "", "", 401},
			{1, "GET", "/v1/info", "", "", 200},
			{1, "GET", "/v1/records?kind=exposures&limit=1", "/v1/records", "", 200},
			{1, "GET", "/v1/records?limit=1", "/v1/records", "", 200},
			{1, "GET", "/v1/records?limit=0", "/v1/records", "", 400},
			{1, "GET", "/v1/records?owner=me", "/v1/records", "", 400},
			{1, "GET", "/v1/records?kind=thing", "/v1/records", "", 400},
			{1, "GET", path, record, "", 200},
			{1, "GET", path + "x", record, "", 404},
			{1, "PUT", path, record, string(put.Envelope()), 200},
			{1, "PUT", path, record, string(blog.Envelope()), 412},
			{1, "PUT", path, record, "{}", 400},
			{1, "PUT", path + "x", record, string(put.Envelope()), 400},
			{1, "PUT", path, record, strings.Repeat(" ", webgw.MaxEnvelope+1), 400},
			{1, "PUT", path, record, strings.Repeat(" ", webgw.MaxEnvelope+2), 400},
			{1, "PUT", path, record, string(gone.Envelope()), 400},
			{1, "DELETE", path, record, string(put.Envelope()), 400},
			{1, "GET", "/v1/watch?scope=all", "/v1/watch", "", 400},
			{1, "GET", "/v1/watch?scope=owner&since=x", "/v1/watch", "", 400},
			{1, "GET", "/v1/watch?scope=owner", "/v1/watch", "", 200},
			{200, "GET", "/v1/watch?scope=node", "/v1/watch", "", 200},
			{1, "PUT", "/v1/status", "", gwStatus, 404},
			{100, "PUT", "/v1/status", "", gwStatus, 200},
			{100, "PUT", "/v1/status", "", "{}", 400},
			{100, "PUT", "/v1/status", "", strings.Repeat(" ", webgw.MaxStatus+1), 400},
			{1, "GET", "/v1/status", "", "", 200},
			{1, "GET", "/v1/domain?name=www.one.org", "/v1/domain", "", 200},
			{1, "GET", "/v1/domain?name=One.org.", "/v1/domain", "", 400},
			{1, "GET", "/v1/ports?gateway=" + key(100).ID().String(), "/v1/ports", "", 200},
			{1, "GET", "/v1/ports", "", "", 400},
			{1, "GET", "/v1/ports?gateway=" + key(101).ID().String(), "/v1/ports", "", 404},
			{1, "DELETE", path, record, string(gone.Envelope()), 200},
		} {
			k := ident.Key{}
			if c.owner != 0 {
				k = key(c.owner)
			}
			status, body := g.ask(k, c.method, c.path, []byte(c.body))
			if status != c.want {
				t.Errorf("%s %s: %d %s, want %d", c.method, c.path, status, body, c.want)
			}
			if c.op == "" {
				c.op = c.path
			}
			s.check(c.method, c.op, status, body)
		}
		status, body := g.ask(key(1), "GET", "/v1/nothing", nil)
		if status != 404 || !strings.Contains(string(body), `"not_found"`) {
			t.Errorf("an unknown path: %d %s", status, body)
		}
	})
	for path, item := range s.doc.Paths.Map() {
		for method, op := range item.Operations() {
			if !s.seen[op.OperationID+" 200"] {
				t.Errorf("%s %s was never seen to succeed", method, path)
			}
		}
	}
}

// Every verb on somebody else's object finds nothing; without identity, every
// verb is refused. The verbs and paths come from the document.
func TestForeignObjects(t *testing.T) {
	s := loadSchema(t)
	bubble(t, 1, nil, func(g *grid) {
		g.site()
		x := g.declare(key(1), web("blog", "blog.gent.example"))
		n := g.declare(key(1), claimed("mine.example", false))
		h := g.declare(key(201), node("home2"))
		stranger := key(9)
		forged := *x.Record
		forged.Seq++
		own, err := stranger.Sign(forged) // signed by the stranger, for the stranger
		if err != nil {
			t.Fatal(err)
		}
		altered := bytes.Replace(x.Envelope(), []byte(`"payload":"`), []byte(`"payload":"A`), 1)
		tried := 0
		for path, item := range s.doc.Paths.Map() {
			for method, op := range item.Operations() {
				if op.Security != nil {
					continue // open to all
				}
				object := strings.Contains(path, "{")
				for _, key := range []webgw.Key{x.Record.Key(), n.Record.Key(), h.Record.Key()} {
					p := strings.NewReplacer("{kind}", string(key.Kind), "{owner}", key.Owner.String(), "{name}", key.Name).Replace(path)
					for _, body := range [][]byte{nil, []byte("{}"), own.Envelope(), altered, bytes.Repeat([]byte("x"), webgw.MaxEnvelope+2)} {
						if status, answer := g.ask(ident.Key{}, method, p, body); status != 401 {
							t.Errorf("%s %s without identity: %d %s", method, p, status, answer)
						}
						if !object {
							continue
						}
						tried++
						status, answer := g.ask(stranger, method, p, body)
						if status != 404 {
							t.Errorf("%s %s by a stranger: %d %s", method, p, status, answer)
						}
						s.check(method, path, status, answer)
						nothing := strings.Replace(p, key.Name, "absent", 1)
						if _, other := g.ask(stranger, method, nothing, body); !bytes.Equal(answer, other) {
							t.Errorf("%s %s tells that it exists: %s, otherwise %s", method, p, answer, other)
						}
					}
				}
			}
		}
		if tried == 0 {
			t.Error("no object was tried")
		}
		list, err := g.as(stranger).List(g.ctx, "", key(1).ID())
		if err != nil || len(list) != 0 {
			t.Errorf("a stranger lists %v, %v", list, err)
		}
		for _, scope := range []client.Scope{client.ScopeGateway, client.ScopeNode, client.ScopeOwner} {
			w := g.watch(g.as(stranger), scope, 0, "")
			synctest.Wait()
			w.end()
			for k := range w.records {
				if k.Kind != webgw.KindGateway {
					t.Errorf("a stranger watches %s", k)
				}
			}
		}
		o, err := g.as(stranger).Status(g.ctx)
		if err != nil || len(o.Exposures)+len(o.Nodes) != 0 {
			t.Errorf("a stranger sees the status of %v, %v", o, err)
		}
	})
}

// Whatever comes as the body of a PUT: never a crash, never a success without
// the owner's signature.
func FuzzPutBody(f *testing.F) {
	b := newBench(f)
	s, err := b.sign(key(1), claimed("a.example", true))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(s.Envelope())
	f.Add([]byte("{}"))
	f.Add([]byte(`{"payloadType":"","payload":"","signatures":[]}`))
	f.Add(bytes.Replace(s.Envelope(), []byte("sig"), []byte("Sig"), 1))
	h := b.s.Handler()
	path := "/v1/records/" + s.Record.Key().String()
	k, err := key(1).ServerTLS(false)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r := httptest.NewRequest("PUT", path, bytes.NewReader(body))
		r.TLS = stateOf(t, k)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code == 200 {
			if _, err := ident.Verify(body); err != nil {
				t.Errorf("taken in, though %v", err)
			}
		} else if w.Code >= 500 && w.Code != 501 {
			t.Errorf("%d %s", w.Code, w.Body)
		}
	})
}
