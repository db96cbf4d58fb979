package registry

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"

	"webgw.dev/webgw"
)

// route is one operation of the API. The table is held against the OpenAPI
// document by a test.
type route struct {
	method string
	path   string // as in OpenAPI and net/http
	open   bool   // needs no identity
	serve  func(*Server, http.ResponseWriter, *http.Request, webgw.ID) error
}

var routes = []route{
	{"GET", "/healthz", true, (*Server).healthz},
	{"GET", "/readyz", true, (*Server).readyz},
	{"GET", "/v1/openapi.json", true, (*Server).openapiJSON},
	{"GET", "/v1/openapi.yaml", true, (*Server).openapiYAML},
	{"GET", "/v1/info", false, (*Server).info},
	{"GET", "/v1/records", false, (*Server).list},
	{"GET", "/v1/records/{kind}/{owner}/{name}", false, (*Server).get},
	{"PUT", "/v1/records/{kind}/{owner}/{name}", false, (*Server).put},
	{"DELETE", "/v1/records/{kind}/{owner}/{name}", false, (*Server).withdraw},
	{"GET", "/v1/watch", false, (*Server).watch},
	{"PUT", "/v1/status", false, (*Server).putStatus},
	{"GET", "/v1/status", false, (*Server).getStatus},
	{"GET", "/v1/ports", false, (*Server).freePort},
	{"GET", "/v1/domain", false, (*Server).domain},
}

// statusOf maps kinds of errors to HTTP (docs/errors.md).
func statusOf(k webgw.ErrorKind) int {
	switch k {
	case webgw.Invalid:
		return http.StatusBadRequest
	case webgw.Unauthenticated:
		return http.StatusUnauthorized
	case webgw.Forbidden:
		return http.StatusForbidden
	case webgw.NotFound:
		return http.StatusNotFound
	case webgw.Taken:
		return http.StatusConflict
	case webgw.Stale:
		return http.StatusPreconditionFailed
	case webgw.Expired:
		return http.StatusUnprocessableEntity
	case webgw.Exhausted:
		return http.StatusTooManyRequests
	case webgw.Unavailable:
		return http.StatusServiceUnavailable
	case webgw.Unsupported:
		return http.StatusNotImplemented
	}
	return http.StatusInternalServerError
}

// Handler answers the API. Behind Serve it learns who asks from the
// connection; elsewhere from the request's TLS state.
func (s *Server) Handler() http.Handler {
	s.init()
	mux := http.NewServeMux()
	for _, rt := range routes {
		mux.HandleFunc(rt.method+" "+rt.path, func(w http.ResponseWriter, r *http.Request) {
			s.answer(rt, w, r)
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.answer(route{path: "other", serve: func(*Server, http.ResponseWriter, *http.Request, webgw.ID) error {
			return &webgw.Error{Kind: webgw.NotFound, Public: "there is no such operation", Hint: "see /v1/openapi.yaml"}
		}}, w, r)
	})
	return mux
}

// recorder remembers the status for metrics and lets ResponseController
// through.
type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return r.ResponseWriter.Write(p)
}

func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

func (s *Server) answer(rt route, w http.ResponseWriter, r *http.Request) {
	rec := &recorder{ResponseWriter: w}
	w.Header().Set("X-Content-Type-Options", "nosniff")
	err := s.judge(rt, rec, r)
	if err != nil && rec.status != 0 {
		s.log().Debug("registry: answer not taken", "path", r.URL.Path, "err", err)
	} else if err != nil {
		s.refuse(rec, r, err)
	}
	s.metrics.requests.WithLabelValues(rt.method+" "+rt.path, strconv.Itoa(rec.status)).Inc()
}

func (s *Server) judge(rt route, w http.ResponseWriter, r *http.Request) error {
	if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(requestTimeout + writeTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return err
	}
	if rt.open {
		return rt.serve(s, w, r, webgw.ID{})
	}
	id, ok := identity(r)
	if !ok {
		return &webgw.Error{Kind: webgw.Unauthenticated, Public: "no identity was shown", Hint: "connect with a client certificate of your key"}
	}
	if _, _, loaded, _ := s.mirror.at(); !loaded {
		return &webgw.Error{Kind: webgw.Unavailable, Public: "the registry is starting", Hint: "try again"}
	}
	return rt.serve(s, w, r, id)
}

// errorBody is the JSON of every error.
type errorBody struct {
	Error struct {
		Kind    webgw.ErrorKind `json:"kind"`
		Field   string          `json:"field,omitempty"`
		Message string          `json:"message"`
		Hint    string          `json:"hint,omitempty"`
	} `json:"error"`
}

func (s *Server) refuse(w *recorder, r *http.Request, err error) {
	var b errorBody
	b.Error.Kind = webgw.KindOf(err)
	b.Error.Message = "the registry has failed at this; its log tells more"
	if e, ok := errors.AsType[*webgw.Error](err); ok {
		b.Error.Field, b.Error.Hint = e.Field, e.Hint
		if e.Public != "" {
			b.Error.Message = e.Public
		}
	}
	s.metrics.refusals.WithLabelValues(string(b.Error.Kind)).Inc()
	if b.Error.Kind == webgw.Internal || b.Error.Kind == webgw.Unavailable {
		s.log().Warn("registry: request failed", "path", r.URL.Path, "err", err)
	}
	if b.Error.Kind == webgw.Unavailable || b.Error.Kind == webgw.Exhausted {
		w.Header().Set("Retry-After", "1")
	}
	if err := reply(w, statusOf(b.Error.Kind), b); err != nil {
		s.log().Debug("registry: answer not taken", "err", err)
	}
}

func reply(w http.ResponseWriter, status int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, err = w.Write(append(body, '\n'))
	return err
}

// read reads a body of at most most bytes; what is longer ends in an error of
// the one kind that says so.
func read(w http.ResponseWriter, r *http.Request, most int64) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, most))
	if _, big := errors.AsType[*http.MaxBytesError](err); big {
		return nil, &webgw.Error{Kind: webgw.Invalid, Public: fmt.Sprintf("the body is larger than %d KiB", most>>10)}
	}
	if err != nil {
		return nil, &webgw.Error{Kind: webgw.Invalid, Public: "the body ended early", Err: err}
	}
	return body, nil
}

func (s *Server) healthz(w http.ResponseWriter, _ *http.Request, _ webgw.ID) error {
	return reply(w, http.StatusOK, map[string]bool{"ok": true})
}

// readyz tells whether this replica can read and write.
func (s *Server) readyz(w http.ResponseWriter, _ *http.Request, _ webgw.ID) error {
	if _, _, _, ready := s.mirror.at(); !ready {
		return &webgw.Error{Kind: webgw.Unavailable, Public: "the store is out of reach"}
	}
	return reply(w, http.StatusOK, map[string]bool{"ok": true})
}

// Info is the answer to GET /v1/info.
type Info struct {
	ID       webgw.ID `json:"id"`
	Protocol int      `json:"protocol"`
	Epoch    string   `json:"epoch"`
	Rev      int64    `json:"rev"`
	Zone     string   `json:"zone,omitempty"` // of the grid, for which every gateway answers
}

func (s *Server) info(w http.ResponseWriter, _ *http.Request, _ webgw.ID) error {
	rev, epoch, _, _ := s.mirror.at()
	return reply(w, http.StatusOK, Info{s.Key.ID(), webgw.Protocol, epoch, rev, s.Zone})
}

// pathKey reads the record's key from the path. What is no key names nothing.
func pathKey(r *http.Request) (webgw.Key, error) {
	k, err := webgw.ParseKey(r.PathValue("kind") + "/" + r.PathValue("owner") + "/" + r.PathValue("name"))
	if err != nil {
		return k, &webgw.Error{Kind: webgw.NotFound, Public: "there is no such record", Err: err}
	}
	return k, nil
}

func (s *Server) get(w http.ResponseWriter, r *http.Request, id webgw.ID) error {
	k, err := pathKey(r)
	if err != nil {
		return err
	}
	s.mirror.mu.RLock()
	e, err := s.mirror.getLocked(id, k)
	s.mirror.mu.RUnlock()
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Webgw-Revision", strconv.FormatInt(e.mod, 10))
	_, err = w.Write(e.Envelope())
	return err
}

// stored is the answer to a write.
type stored struct {
	Rev int64 `json:"rev"`
}

func (s *Server) put(w http.ResponseWriter, r *http.Request, id webgw.ID) error {
	return s.change(w, r, id, false)
}

func (s *Server) withdraw(w http.ResponseWriter, r *http.Request, id webgw.ID) error {
	return s.change(w, r, id, true)
}

func (s *Server) change(w http.ResponseWriter, r *http.Request, id webgw.ID, deleted bool) error {
	k, err := pathKey(r)
	if err != nil {
		return err
	}
	if err := s.mayWrite(id); err != nil {
		return err
	}
	// One byte more than allowed is left for write to refuse, in the words
	// that the caller may hear.
	body, err := read(w, r, webgw.MaxEnvelope+1)
	if err != nil && id != k.Owner {
		return &webgw.Error{Kind: webgw.NotFound, Public: "there is no such record", Err: err}
	} else if err != nil {
		return err
	}
	rev, err := s.write(r.Context(), id, k, body, deleted)
	if err != nil {
		return err
	}
	return reply(w, http.StatusOK, stored{rev})
}

// page is the answer to a list.
type page struct {
	Rev     int64             `json:"rev"`
	Records []json.RawMessage `json:"records"`
	Next    string            `json:"next,omitempty"` // for after; none: this was the last page
}

// Bounds of a page.
const (
	pageDefault = 100
	pageMost    = 1000
	pageBytes   = 4 << 20
)

func (s *Server) list(w http.ResponseWriter, r *http.Request, id webgw.ID) error {
	q := r.URL.Query()
	var kind webgw.Kind
	var owner webgw.ID
	var err error
	if t := q.Get("kind"); t != "" {
		if kind, err = webgw.ParseKind(t); err != nil {
			return err
		}
	}
	if t := q.Get("owner"); t != "" {
		if owner, err = webgw.ParseID(t); err != nil {
			return &webgw.Error{Kind: webgw.Invalid, Field: "owner", Public: "is not an identity", Err: err}
		}
	}
	limit := pageDefault
	if t := q.Get("limit"); t != "" {
		if limit, err = strconv.Atoi(t); err != nil || limit < 1 || limit > pageMost {
			return &webgw.Error{Kind: webgw.Invalid, Field: "limit", Public: fmt.Sprintf("must be from 1 to %d", pageMost)}
		}
	}
	withdrawn := false
	if t := q.Get("withdrawn"); t != "" {
		if withdrawn, err = strconv.ParseBool(t); err != nil {
			return &webgw.Error{Kind: webgw.Invalid, Field: "withdrawn", Public: "must be true or false"}
		}
	}
	after := q.Get("after")
	m := s.mirror
	m.mu.RLock()
	p := page{Rev: m.rev, Records: []json.RawMessage{}}
	found := m.listLocked(id, kind, owner, withdrawn, time.Now())
	m.mu.RUnlock()
	size := 0
	for _, e := range found {
		key := e.key.String()
		if key <= after {
			continue
		}
		if len(p.Records) == limit || size > pageBytes {
			p.Next = after
			break
		}
		p.Records = append(p.Records, e.Envelope())
		size += len(e.Envelope())
		after = key
	}
	return reply(w, http.StatusOK, p)
}

// port is the answer to GET /v1/ports.
type port struct {
	Port uint16 `json:"port"`
}

// freePort finds a port that all named gateways offer and nobody holds, or the
// first of as many in a row as are asked for. It is
// a proposal: only declaring an exposure takes it. So it is drawn at random,
// lest everybody who asks at once gets the same.
func (s *Server) freePort(w http.ResponseWriter, r *http.Request, _ webgw.ID) error {
	names := r.URL.Query()["gateway"]
	if len(names) == 0 || len(names) > webgw.MaxGateways {
		return &webgw.Error{Kind: webgw.Invalid, Field: "gateway", Public: fmt.Sprintf("name 1 to %d gateways", webgw.MaxGateways)}
	}
	protocol := webgw.ExposureProtocol(cmp.Or(r.URL.Query().Get("protocol"), string(webgw.TCP)))
	if !protocol.ByPort() {
		return &webgw.Error{Kind: webgw.Invalid, Field: "protocol", Public: "must be tcp or udp"}
	}
	count, err := portCount(r.URL.Query().Get("count"))
	if err != nil {
		return err
	}
	m, now := s.mirror, time.Now()
	m.mu.RLock()
	defer m.mu.RUnlock()
	var ids []webgw.ID
	var offers []webgw.PortSet
	for i, t := range names {
		field := fmt.Sprintf("gateway[%d]", i)
		id, err := webgw.ParseID(t)
		if err != nil {
			return &webgw.Error{Kind: webgw.Invalid, Field: field, Public: "is not an identity", Err: err}
		}
		g := m.gatewayLocked(id, now)
		if g == nil {
			return &webgw.Error{Kind: webgw.NotFound, Field: field, Public: fmt.Sprintf("there is no gateway %s", id)}
		}
		ids, offers = append(ids, id), append(offers, g.Record.Gateway.Ports)
	}
	free := newPlan(m, now, 0, Quota{}).freePorts(ids, offers, protocol, count)
	if len(free) == 0 {
		what := "port is"
		if count > 1 {
			what = fmt.Sprintf("%d ports in a row are", count)
		}
		return &webgw.Error{Kind: webgw.Exhausted, Field: "gateway", Public: "no " + what + " on offer and free on all of these gateways", Hint: "name fewer gateways, or ports for each"}
	}
	return reply(w, http.StatusOK, port{free[rand.IntN(len(free))]})
}
