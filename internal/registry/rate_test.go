package registry

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"webgw.dev/webgw"
)

// An owner who floods the registry is slowed down; nobody else is, and the
// owner itself only until its allowance has grown again.
func TestWriteRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{Writes: WriteRate{PerSecond: 2, Burst: 5}, Metrics: prometheus.NewRegistry()}
		s.init()
		flooder, other := key(1).ID(), key(2).ID()
		for range 5 {
			if err := s.mayWrite(flooder); err != nil {
				t.Fatal(err)
			}
		}
		for range 1000 {
			err := s.mayWrite(flooder)
			wantKind(t, err, webgw.Exhausted, "a sixth write at once")
			if e, _ := errors.AsType[*webgw.Error](err); !strings.Contains(e.Public, "2 writes a second") {
				t.Fatalf("%q does not name the rule", e.Public)
			}
		}
		for range 5 {
			wantKind(t, s.mayWrite(other), "", "a write by somebody else")
		}
		var m dto.Metric
		if err := s.metrics.limited.WithLabelValues("writes").Write(&m); err != nil || m.Counter.GetValue() != 1000 {
			t.Errorf("the metric tells of %v, %v", m.Counter.GetValue(), err)
		}
		time.Sleep(500 * time.Millisecond) // of the bubble: one write's worth
		wantKind(t, s.mayWrite(flooder), "", "a write after half a second")
		wantKind(t, s.mayWrite(flooder), webgw.Exhausted, "a second one")
	})
}

// Identities cost nothing to make: what is remembered of them goes away.
func TestWriteRateForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{Writes: WriteRate{PerSecond: 2, Burst: 4}}
		s.init()
		for i := range 500 {
			wantKind(t, s.mayWrite(key(i).ID()), "", "a first write")
		}
		time.Sleep(5 * time.Second) // of the bubble: every allowance is whole again
		wantKind(t, s.mayWrite(key(1000).ID()), "", "a write")
		if n := len(s.rates.of); n != 1 {
			t.Errorf("%d identities are remembered, want 1", n)
		}
	})
}

// The limit is met on the API's way in, by PUT and DELETE, before a body is read.
func TestWriteRateOverHTTP(t *testing.T) {
	bubble(t, 1, func(s *Server) { s.Writes = WriteRate{PerSecond: 0.001, Burst: 2} }, func(g *grid) {
		ghost := webgw.Key{Kind: webgw.KindExposure, Owner: key(9).ID(), Name: "ghost"}
		path := "/v1/records/exposure/" + ghost.Owner.String() + "/ghost"
		for i, want := range []int{400, 400, 429, 429} {
			method := []string{"PUT", "DELETE"}[i%2]
			if got, _ := g.ask(key(9), method, path, []byte("{}")); got != want {
				t.Errorf("%s %d: %d, want %d", method, i, got, want)
			}
		}
		if got, _ := g.ask(key(8), "PUT", path, []byte("{}")); got != 404 {
			t.Errorf("somebody else: %d, want 404", got)
		}
	})
}
