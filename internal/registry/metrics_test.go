package registry

import (
	"slices"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestMetrics(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	bubble(t, 1, func(s *Server) { s.Metrics = reg }, func(g *grid) {
		g.site()
		if _, err := g.as(key(9)).Get(g.ctx, blog); err == nil {
			t.Error("a stranger got a record")
		}
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, f := range families {
			names = append(names, f.GetName())
		}
		for _, want := range []string{"webgw_registry_requests_total", "webgw_registry_refused_total", "webgw_registry_write_seconds", "webgw_registry_revision", "webgw_registry_watchers"} {
			if !slices.Contains(names, want) {
				t.Errorf("%s is missing among %v", want, names)
			}
		}
	})
}
