package ingress

import (
	"net/http"

	"webgw.dev/webgw"
)

// nowhere is the route of a connection whose visitors are redirected, whatever
// they ask for.
var nowhere = &Route{Exposure: &webgw.Exposure{Protocol: webgw.HTTP}, owner: &tally{}, use: &tally{}}

// otherwise returns the route for names that nobody has exposed, or nil.
func (s *Server) otherwise(t *Table) *Route {
	if s.DefaultRedirect != "" {
		return nowhere
	}
	if s.DefaultHost == "" {
		return nil
	}
	return t.HTTP(s.DefaultHost)
}

// unknown answers a request for a name that nobody has exposed, or lets it in
// elsewhere.
func (x *exchange) unknown(t *Table) *page {
	s := x.web.s
	switch r := s.otherwise(t); r {
	case nil:
		return &unknownHost
	case nowhere:
		x.ruled = &ruling{answer: http.Header{"Location": {s.DefaultRedirect}}}
		return &redirected
	default:
		return x.enter(r)
	}
}
