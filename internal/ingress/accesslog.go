package ingress

import "webgw.dev/webgw"

// Access tells of one HTTP request or one stream that has ended. Of a stream,
// Method, Path and Status are empty and Proto is "tls" or "tcp". Of a request
// that led nowhere, Exposure is the zero key.
type Access struct {
	webgw.Access
	Target webgw.Target // the last one tried; zero: none was
	Err    error        // why it did not go well, for logs
}

func (s *Server) record(a Access) {
	if s.AccessLog != nil {
		s.AccessLog(a)
	}
}
