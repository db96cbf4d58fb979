//go:build linux

// Command run measures the whole data path, from a load generator through a
// gateway and a node to a workload, each in a process of its own on loopback,
// beside HAProxy in front of HAProxy, interleaved in the same run. Its output
// is one table. See bench/README.md for what each row means.
//
// It must not know how the gateway and the node work inside: it runs the real
// binary and looks at it from outside.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"syscall"
	"time"
)

type options struct {
	rounds  int
	seconds float64
	only    *regexp.Regexp // of measures
	systems *regexp.Regexp
	tries   int
	idle    int
	quick   bool
	json    bool
	strace  bool
	far     bool   // within a network namespace, over an emulated link
	profile string // directory, or ""
	webgw   string // binary, or "" to build it
}

func main() {
	var o options
	var role, config, only, systems string
	flag.IntVar(&o.rounds, "rounds", 5, "how often each measure is taken of each system, interleaved; the median is shown")
	flag.Float64Var(&o.seconds, "seconds", 2, "length of one measure")
	flag.StringVar(&only, "only", "", "regular `expression` of the measures to take")
	flag.StringVar(&systems, "systems", "", "regular `expression` of the systems to measure")
	flag.IntVar(&o.tries, "tries", 2, "how often a measure is taken at most when others keep the machine busy; the least disturbed counts")
	flag.IntVar(&o.idle, "idle", 2000, "idle connections held to measure memory")
	flag.BoolVar(&o.quick, "quick", false, "see whether everything works, in a few minutes; the figures mean little")
	flag.BoolVar(&o.json, "json", false, "print every value of every round as JSON instead of the table")
	flag.BoolVar(&o.strace, "strace", false, "show which system calls carry the bytes instead of measuring")
	flag.StringVar(&o.profile, "profile", "", "run webgw's roles inside bench/run and write their CPU and heap profiles of each measure into this `directory`")
	flag.StringVar(&o.webgw, "webgw", "", "the webgw `binary` to measure; none builds it")
	flag.BoolVar(&o.far, "far", false, "internal: measure over an emulated link")
	flag.StringVar(&role, "role", "", "internal: what this process is")
	flag.StringVar(&config, "config", "", "internal: the role's configuration")
	flag.Parse()
	if o.quick {
		o.rounds, o.seconds, o.tries, o.idle = 1, 0.3, 1, 400
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := func() (err error) {
		if role != "" {
			return runRole(ctx, role, json.RawMessage(config))
		}
		if o.only, err = regexp.Compile(only); err != nil {
			return err
		}
		if o.systems, err = regexp.Compile(systems); err != nil {
			return err
		}
		return o.run(ctx)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/run: error:", err)
		os.Exit(1)
	}
}

// rig is what all systems are measured with: one process of workloads, one of
// visitors, and a directory for files.
type rig struct {
	o     options
	dir   string
	sink  *child
	load  *child
	ports sinkPorts
	cert  string // PEM file of certificate and key for secureHost
	bin   string // webgw, or ""
	link  *child // emulated, between the hops; nil: loopback
}

// secureHost and the like are the names by which visitors ask for workloads.
const (
	secureHost = "secure.bench.example" // TLS ended by the gateway
	plainHost  = "plain.bench.example"  // plain HTTP
	passHost   = "pass.bench.example"   // TLS passed through
)

func (o options) run(ctx context.Context) (err error) {
	r := &rig{o: o}
	if r.dir, err = os.MkdirTemp("", "webgw-bench"); err != nil {
		return err
	}
	defer os.RemoveAll(r.dir)
	if r.cert, err = writeCertificate(r.dir); err != nil {
		return err
	}
	if o.far { // in a namespace that is empty yet
		var why string
		if r.link, err = startRole(ctx, "link", nil, &why); err != nil {
			return err
		}
		defer r.link.stop()
		if why != "" {
			return json.NewEncoder(os.Stdout).Encode(farAnswer{Unavailable: why})
		}
	}
	if r.sink, err = startRole(ctx, "sink", nil, &r.ports); err != nil {
		return err
	}
	defer r.sink.stop()
	if r.load, err = startRole(ctx, "load", nil, nil); err != nil {
		return err
	}
	defer r.load.stop()
	kinds := r.kinds(ctx)
	if o.strace {
		return r.trace(ctx, kinds)
	}
	t := newTable()
	if o.far {
		if err := r.speeds(ctx, kinds, far, t); err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(farAnswer{Systems: t.systems, Results: t.results})
	}
	if err := r.speeds(ctx, kinds, here, t); err != nil {
		return err
	}
	if err := r.overLink(ctx, t); err != nil {
		return err
	}
	if err := r.goBenchmarks(ctx, t); err != nil {
		return err
	}
	if err := r.memory(ctx, kinds, t); err != nil {
		return err
	}
	if o.json {
		return t.writeJSON(os.Stdout)
	}
	t.writeMarkdown(os.Stdout)
	return nil
}

// wanted are the measures that are asked for, of those taken in one way.
func (o options) wanted(how where) (out []measure) {
	for _, m := range measures() {
		if m.where() == how && o.only.MatchString(m.name()) {
			out = append(out, m)
		}
	}
	return out
}

// speeds takes the measures that interleave: round by round, each measure of
// each system.
func (r *rig) speeds(ctx context.Context, kinds []kind, how where, t *table) error {
	wanted := r.o.wanted(how)
	if len(wanted) == 0 {
		return nil
	}
	var systems []*system
	defer func() {
		for _, s := range systems {
			s.stop()
		}
	}()
	for _, k := range kinds {
		if !slices.ContainsFunc(wanted, func(m measure) bool { return m.isFor(k.name) }) {
			continue
		}
		s, err := k.start(ctx)
		if err != nil {
			return fmt.Errorf("start %s: %w", k.name, err)
		}
		systems = append(systems, s)
	}
	for round := range r.o.rounds {
		for _, m := range wanted {
			start := time.Now()
			for _, s := range systems {
				at, ok := s.services[m.service]
				if !ok || !m.isFor(s.name) {
					continue
				}
				res, err := r.quietly(ctx, s, m, at)
				if err != nil {
					return fmt.Errorf("%s of %s: %w", m.name(), s.name, err)
				}
				if res.Failed != "" {
					fmt.Fprintf(os.Stderr, "%s of %s: %d failed, the first with: %s\n", m.name(), s.name, res.Failures, res.Failed)
				}
				t.add(s.name, m, res)
			}
			fmt.Fprintf(os.Stderr, "round %d of %d: %s: %.0f s\n", round+1, r.o.rounds, m.name(), time.Since(start).Seconds())
		}
	}
	return nil
}

// quietly takes a measure, again if others were busy on the machine meanwhile,
// and returns the least disturbed.
func (r *rig) quietly(ctx context.Context, s *system, m measure, at Endpoint) (best result, err error) {
	const bearable = 0.1 // processors
	j := job{Endpoint: at, Op: m.op, Streams: m.n, Bulk: at, PIDs: s.pids(), Own: []int{r.sink.cmd.Process.Pid, os.Getpid()}}
	j.Warm, j.Seconds = m.times(r.o.seconds)
	if m.op == opFair {
		j.Bulk = s.services[blaster]
	}
	if r.link != nil {
		j.Own = append(j.Own, r.link.cmd.Process.Pid)
		if err := r.link.call(m.link(), &linkSettings{}); err != nil {
			return best, err
		}
	}
	for try := range r.o.tries {
		profiled, err := s.profile(r.o.profile, m, r.o.seconds)
		if err != nil {
			return best, err
		}
		var res result
		if err := r.load.call(j, &res); err != nil {
			return best, err
		}
		if err := errors.Join(profiled(), ctx.Err()); err != nil {
			return best, err
		}
		if try == 0 || res.Others < best.Others {
			best = res
		}
		if best.Others < bearable {
			break
		}
	}
	return best, nil
}

// memory measures idle connections, each system in fresh processes.
func (r *rig) memory(ctx context.Context, kinds []kind, t *table) error {
	for _, m := range r.o.wanted(alone) {
		start := time.Now()
		for _, k := range kinds {
			if !m.isFor(k.name) {
				continue
			}
			if err := r.idle(ctx, k, m, t); err != nil {
				return fmt.Errorf("%s of %s: %w", m.name(), k.name, err)
			}
		}
		fmt.Fprintf(os.Stderr, "%s: %.0f s\n", m.name(), time.Since(start).Seconds())
	}
	return nil
}

func (r *rig) idle(ctx context.Context, k kind, m measure, t *table) error {
	s, err := k.start(ctx)
	if err != nil {
		return err
	}
	defer s.stop()
	if r.o.quick {
		s.rest = 0
	}
	at, ok := s.services[m.service]
	if !ok {
		return nil
	}
	// The first ones pay for what is needed once, for any number.
	const first = 500
	hold := job{Endpoint: at, Op: opIdle, Streams: first}
	var res result
	if err := r.load.call(hold, &res); err != nil {
		return err
	}
	before, err := s.settle()
	if err != nil {
		return err
	}
	hold.Streams = r.o.idle
	if err := r.load.call(hold, &res); err != nil {
		return err
	}
	defer r.load.call(job{Op: opRelease}, &result{})
	if res.Failures > 0 {
		return fmt.Errorf("%d of %d connections failed: %s", res.Failures, hold.Streams, res.Failed)
	}
	after, err := s.settle()
	if err != nil {
		return err
	}
	profiled, err := s.profile(r.o.profile, m, 0)
	if err == nil {
		err = profiled()
	}
	if err != nil {
		return err
	}
	res.Idle = make([]footprint, len(after))
	for i := range after {
		res.Idle[i] = after[i].less(before[i]).over(hold.Streams)
	}
	t.add(s.name, m, res)
	return nil
}

// settle waits until the processes' memory stands still, and returns what each
// takes.
func (s *system) settle() ([]footprint, error) {
	const every, most = 300 * time.Millisecond, 45 * time.Second
	still := max(5, int(s.rest/every))
	var last []footprint
	for calm, tries := 0, 0; calm < still && tries < int(most/every); tries++ {
		time.Sleep(every)
		now := make([]footprint, len(s.hops))
		for i, h := range s.hops {
			var err error
			if now[i], err = h.footprint(); err != nil {
				return nil, err
			}
		}
		calm++
		for i := range last {
			if d := now[i].KB - last[i].KB; d > 0.005*now[i].KB || -d > 0.005*now[i].KB {
				calm = 0
			}
		}
		last = now
	}
	return last, nil
}
