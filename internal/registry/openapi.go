package registry

import (
	_ "embed"
	"net/http"

	"github.com/goccy/go-yaml"

	"webgw.dev/webgw"
)

// openapi describes the API; a test holds it against the code.
//
//go:embed openapi.yaml
var openapi []byte

func (s *Server) openapiYAML(w http.ResponseWriter, _ *http.Request, _ webgw.ID) error {
	w.Header().Set("Content-Type", "application/yaml")
	_, err := w.Write(openapi)
	return err
}

func (s *Server) openapiJSON(w http.ResponseWriter, _ *http.Request, _ webgw.ID) error {
	doc, err := yaml.YAMLToJSON(openapi)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, err = w.Write(doc)
	return err
}
