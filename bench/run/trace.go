//go:build linux

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Every system call by which a byte can enter or leave a process.
const carriers = "read,write,readv,writev,pread64,pwrite64,preadv,pwritev,sendto,recvfrom,sendmsg,recvmsg,sendmmsg,recvmmsg,sendfile,splice,tee,vmsplice,copy_file_range"

// traced is the end of a call in strace's output: its name, and how many bytes.
var traced = regexp.MustCompile(`(?:^|\s)(?:<\.\.\. )?([a-z0-9_]+)(?:\(| resumed).* = ([0-9]+)$`)

// trace prints which system calls carry the bytes of 8 streams, on both hops.
// It looks from outside, at a time when everything is slow: only the shares
// mean something.
func (r *rig) trace(ctx context.Context, kinds []kind) error {
	fmt.Println("| system | stream | hop | system call | calls | MB | share of bytes |\n|---|---|---|---|---:|---:|---:|")
	for _, k := range kinds {
		s, err := k.start(ctx)
		if err != nil {
			return fmt.Errorf("start %s: %w", k.name, err)
		}
		err = r.traceServices(ctx, s)
		s.stop()
		if err != nil {
			return fmt.Errorf("trace %s: %w", k.name, err)
		}
	}
	return nil
}

func (r *rig) traceServices(ctx context.Context, s *system) error {
	for _, service := range []string{passthrough, sealedTCP, plainHTTP} {
		at, ok := s.services[service]
		if !ok || !r.o.only.MatchString(service) {
			continue
		}
		traces := make([]*exec.Cmd, len(s.hops))
		files := make([]string, len(s.hops))
		started := make(chan result, 1)
		go func() {
			var res result
			if err := r.load.call(job{Endpoint: at, Op: opDown, Streams: 8, Warm: r.o.seconds / 2, Seconds: r.o.seconds}, &res); err != nil {
				res.Failed = err.Error()
			}
			started <- res
		}()
		time.Sleep(seconds(r.o.seconds / 2))
		var err error
		for i, pid := range s.pids() {
			files[i] = filepath.Join(r.dir, "trace")
			files[i] += strconv.Itoa(i)
			traces[i] = exec.CommandContext(ctx, "strace", "-f", "-qq", "-s", "0", "-e", "trace="+carriers, "-o", files[i], "-p", strconv.Itoa(pid))
			traces[i].Stderr = os.Stderr
			if e := traces[i].Start(); e != nil {
				traces[i], err = nil, errors.Join(err, e)
			}
		}
		res := <-started
		for _, t := range traces {
			if t != nil {
				t.Process.Signal(os.Interrupt)
				t.Wait() // strace ends by the signal it was sent
			}
		}
		if err != nil {
			return err
		}
		if res.Failed != "" {
			return errors.New(res.Failed)
		}
		for i, file := range files {
			if err := printTrace(s.name+" | "+service+" | "+hopNames[i], file); err != nil {
				return err
			}
		}
	}
	return nil
}

func printTrace(title, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	type sum struct {
		name         string
		calls, bytes int64
	}
	sums := map[string]*sum{}
	var total int64
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		m := traced.FindStringSubmatch(strings.TrimSpace(lines.Text()))
		if m == nil {
			continue
		}
		n, err := strconv.ParseInt(m[2], 10, 64)
		if err != nil {
			return err
		}
		if sums[m[1]] == nil {
			sums[m[1]] = &sum{name: m[1]}
		}
		sums[m[1]].calls++
		sums[m[1]].bytes += n
		total += n
	}
	var all []*sum
	for _, s := range sums {
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b *sum) int { return int(b.bytes - a.bytes) })
	for _, s := range all {
		fmt.Printf("| %s | %s | %d | %.1f | %.2f %% |\n", title, s.name, s.calls, float64(s.bytes)/1e6, 100*float64(s.bytes)/float64(max(total, 1)))
	}
	return lines.Err()
}
