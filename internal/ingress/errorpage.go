package ingress

import (
	"encoding/json"
	"fmt"
	"html"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// ErrorHeader stands on every answer that is the gateway's own, so that it can
// be told from the workload's. Its value is a stable code.
const ErrorHeader = "Webgw-Error"

// page is an answer of the gateway itself.
type page struct {
	status int
	code   string // stable, value of ErrorHeader
	text   string // one sentence
	retry  int    // seconds, for Retry-After; 0: none
}

var (
	unknownHost    = page{404, "unknown_host", "Nothing is exposed under this name on this gateway.", 0}
	tlsOnly        = page{404, "tls_only", "This name is served over TLS only: use https.", 0}
	misdirected    = page{421, "misdirected", "This connection was made for another name; a new connection to this one will work.", 0}
	refusedPage    = page{502, "target_refused", "The workload behind this name does not accept connections at the moment.", 0}
	brokenPage     = page{502, "target_broken", "The workload behind this name ended the connection before it answered.", 0}
	unprovenPage   = page{502, "target_unverified", "The workload behind this name could not prove that it is the right one.", 0}
	noTarget       = page{503, "target_unreachable", "The machine behind this name is not connected to this gateway at the moment.", 5}
	ownerBusy      = page{503, "owner_limit", "Too many connections are open to this owner's services.", 5}
	exposureFull   = page{503, "exposure_limit", "Too many connections are open to this name.", 5}
	noAnswer       = page{504, "timeout", "The workload behind this name did not answer in time.", 0}
	plainOnTLS     = page{400, "plain_http", "This port speaks TLS: use https.", 0}
	badRequest     = page{400, "bad_request", "The request is not well-formed HTTP.", 0}
	ambiguous      = page{400, "ambiguous_request", "The request could be read in more than one way.", 0}
	badHost        = page{400, "bad_host", "The request must name exactly one valid host.", 0}
	badMethod      = page{405, "method_not_allowed", "This method is not passed on.", 0}
	badExpectation = page{417, "expectation", "This expectation can't be met.", 0}
	headTooLarge   = page{431, "head_too_large", "The head of the request is too large.", 0}
	requestTimeout = page{408, "request_timeout", "The request did not arrive in time.", 0}
	badVersion     = page{505, "http_version", "This version of HTTP is not spoken here.", 0}
	internalError  = page{500, "internal", "The gateway made a mistake; its log has the cause.", 0}
)

// write answers with the page in the form that the visitor accepts best. The
// body holds nothing of the request.
func (p *page) write(w http.ResponseWriter, accept, gateway, id string) {
	kind, body := p.render(accept, gateway, id)
	h := w.Header()
	for k := range h {
		if k != "Connection" {
			delete(h, k) // of a response that was given up
		}
	}
	h.Set("Content-Type", kind)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
	h.Set("X-Request-Id", id)
	h.Set(ErrorHeader, p.code)
	if p.retry > 0 {
		h.Set("Retry-After", strconv.Itoa(p.retry))
	}
	if p.status == http.StatusMethodNotAllowed {
		h.Set("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
	}
	w.WriteHeader(p.status)
	w.Write([]byte(body)) // an error means that nobody reads it
}

func (p *page) render(accept, gateway, id string) (kind, body string) {
	title := fmt.Sprintf("%d %s", p.status, http.StatusText(p.status))
	switch {
	case strings.Contains(accept, "application/json"):
		b, err := json.Marshal(struct {
			Status  int    `json:"status"`
			Error   string `json:"error"`
			Message string `json:"message"`
			Gateway string `json:"gateway"`
			ID      string `json:"requestId"`
		}{p.status, p.code, p.text, gateway, id})
		if err == nil {
			return "application/json", string(b) + "\n"
		}
		fallthrough
	default:
		return "text/plain; charset=utf-8", fmt.Sprintf("%s\n\n%s\n\ngateway %s, request %s\n", title, p.text, gateway, id)
	case strings.Contains(accept, "text/html"):
		return "text/html; charset=utf-8", fmt.Sprintf(`<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>%[1]s</title>
<style>body{font:1rem/1.5 system-ui,sans-serif;max-width:34rem;margin:15vh auto;padding:0 1rem;color-scheme:light dark}small{opacity:.7}</style>
<h1>%[1]s</h1>
<p>%[2]s</p>
<p><small>gateway %[3]s · request %[4]s</small></p>
</html>
`, html.EscapeString(title), html.EscapeString(p.text), html.EscapeString(gateway), html.EscapeString(id))
	}
}

// rawPage is the page as bytes for a connection on which no HTTP server runs.
func (s *Server) rawPage(v *visit, p page) []byte {
	kind, body := p.render("", s.Name, newRequestID())
	s.log.Debug("turned away", "visitor", v.visitor, "err", p.text)
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nDate: %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n%s: %s\r\nConnection: close\r\n\r\n%s",
		p.status, http.StatusText(p.status), time.Now().UTC().Format(http.TimeFormat), kind, len(body), ErrorHeader, p.code, body)
}
