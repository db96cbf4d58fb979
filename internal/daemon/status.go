package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// check is one thing that must be so before the role is ready; its error says
// what is missing.
type check struct {
	name string
	ok   func() error
}

// serveStatus serves /healthz (the process answers), /readyz (it can do its
// work) and /metrics on l until ctx ends.
func serveStatus(ctx context.Context, l net.Listener, metrics *prometheus.Registry, checks []check, log *slog.Logger) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		var bad []error
		for _, c := range checks {
			if err := c.ok(); err != nil {
				bad = append(bad, fmt.Errorf("%s: %w", c.name, err))
			}
		}
		if len(bad) > 0 {
			http.Error(w, errors.Join(bad...).Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	return serveHTTP(ctx, l, &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)})
}

// serveHTTP serves until ctx ends, then lets requests finish for a moment.
func serveHTTP(ctx context.Context, l net.Listener, s *http.Server) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		one, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if s.Shutdown(one) != nil {
			s.Close()
		}
	})
	err := s.Serve(l)
	if !stop() {
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
