//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// child is a process of this run that serves until its standard input ends. A
// role of our own also answers calls, one line of JSON each way.
type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// startRole starts this executable in a role and waits for its first line,
// which goes into ready.
func startRole(ctx context.Context, role string, config, ready any) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	p, err := startProcess(ctx, nil, self, "-role", role, "-config", string(c))
	if err != nil {
		return nil, err
	}
	var discard json.RawMessage
	if ready == nil {
		ready = &discard
	}
	if err := p.answer(ready); err != nil {
		p.stop()
		return nil, fmt.Errorf("%s: %w", role, err)
	}
	return p, nil
}

// startProcess starts a program; a nil env is ours.
func startProcess(ctx context.Context, env []string, name string, args ...string) (*child, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env, cmd.Stderr = env, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	// Pdeathsig follows the thread: it must be one that lives on.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return &child{cmd, in, bufio.NewReader(out)}, cmd.Start()
}

// call sends a request and waits for its answer.
func (c *child) call(request, answer any) error {
	if err := json.NewEncoder(c.in).Encode(request); err != nil {
		return err
	}
	return c.answer(answer)
}

func (c *child) answer(v any) error {
	line, err := c.out.ReadBytes('\n')
	if err != nil {
		return errors.Join(errors.New("the process ended"), err)
	}
	return json.Unmarshal(line, v)
}

// stop ends the process and waits for it; how it ended does not matter any
// more.
func (c *child) stop() {
	c.in.Close()
	c.cmd.Process.Signal(syscall.SIGTERM)
	kill := time.AfterFunc(3*time.Second, func() { c.cmd.Process.Kill() })
	io.Copy(io.Discard, c.out)
	c.cmd.Wait()
	kill.Stop()
}

// runRole is the other side of startRole.
func runRole(ctx context.Context, role string, config json.RawMessage) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var handle func(json.RawMessage) any
	var ready any
	var err error
	switch role {
	case "sink":
		ready, err = serveSinks()
	case "load":
		handle = newLoad().handle
	case "link":
		handle, ready = serveLink()
	case "relay":
		ready, err = serveRelay(config)
	case "tunnel-gateway":
		ready, err = serveTunnelGateway(ctx, config)
	case "tunnel-node":
		ready, err = serveTunnelNode(ctx, config)
	case "webgw":
		ready, err = serveWebgw(ctx, config)
	default:
		err = fmt.Errorf("no role %q", role)
	}
	if err != nil {
		return err
	}
	if handle == nil {
		handle = inspect
	}
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(ready); err != nil {
		return err
	}
	in := bufio.NewReader(os.Stdin)
	for {
		line, err := in.ReadBytes('\n')
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := out.Encode(handle(line)); err != nil {
			return err
		}
	}
}

// inspection asks a role about itself.
type inspection struct {
	CPU     string // begin a CPU profile to this file
	Stop    bool   // end it
	Heap    string // write a heap profile to this file
	Threads string // write the goroutines' stacks to this file
}

type inspected struct {
	Goroutines int
	Error      string `json:",omitempty"`
}

var cpuProfile *os.File // of this process

func inspect(raw json.RawMessage) any {
	var q inspection
	err := json.Unmarshal(raw, &q)
	write := func(profile, file string) {
		if file == "" || err != nil {
			return
		}
		var f *os.File
		if f, err = os.Create(file); err == nil {
			err = errors.Join(pprof.Lookup(profile).WriteTo(f, 0), f.Close())
		}
	}
	if q.CPU != "" && err == nil {
		if cpuProfile, err = os.Create(q.CPU); err == nil {
			err = pprof.StartCPUProfile(cpuProfile)
		}
	}
	if q.Stop {
		pprof.StopCPUProfile()
		err = errors.Join(err, cpuProfile.Close())
	}
	if q.Heap != "" {
		if err == nil {
			err = writeMemory(q.Heap + ".txt")
		}
		runtime.GC()
	}
	write("heap", q.Heap)
	write("goroutine", q.Threads)
	a := inspected{Goroutines: runtime.NumGoroutine()}
	if err != nil {
		a.Error = err.Error()
	}
	return a
}

// writeMemory writes of what this process's memory consists right now.
func writeMemory(file string) error {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	const kb = 1024
	return os.WriteFile(file, fmt.Appendf(nil, "KB: heap in use %d (objects %d), stacks %d, runtime %d, idle and not released %d, next collection at %d, collections %d\n",
		m.HeapInuse/kb, m.HeapAlloc/kb, m.StackInuse/kb, (m.MSpanSys+m.MCacheSys+m.GCSys+m.OtherSys+m.BuckHashSys)/kb,
		(m.HeapIdle-m.HeapReleased)/kb, m.NextGC/kb, m.NumGC), 0o666)
}

// footprint is what a process takes; per stream when divided.
type footprint struct {
	KB          float64 // resident memory
	Descriptors float64
	Goroutines  float64 // 0: not to be seen
}

func (f footprint) less(g footprint) footprint {
	return footprint{f.KB - g.KB, f.Descriptors - g.Descriptors, f.Goroutines - g.Goroutines}
}

func (f footprint) over(n int) footprint {
	return footprint{f.KB / float64(n), f.Descriptors / float64(n), f.Goroutines / float64(n)}
}

// readFootprint looks at a process from outside; goroutines are not to be seen.
func readFootprint(pid int) (f footprint, err error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return f, err
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			f.KB, err = strconv.ParseFloat(strings.Fields(rest)[0], 64)
		}
	}
	fds, err2 := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	f.Descriptors = float64(len(fds))
	return f, errors.Join(err, err2)
}

// cpuSeconds is the processor time that a process has used. The kernel tells it
// in ticks of 10 ms.
func cpuSeconds(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field, the command in parentheses, may hold spaces.
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, err1 := strconv.ParseFloat(f[11], 64)
	system, err2 := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100, errors.Join(err1, err2)
}

// machineSeconds is how much processor time all processes of the machine have
// used, together with what the hypervisor gave to other machines while this one
// wanted it.
func machineSeconds() (float64, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b)) // cpu user nice system idle iowait irq softirq steal
	var sum float64
	for _, i := range []int{1, 2, 3, 8} {
		s, e := strconv.ParseFloat(f[i], 64)
		sum, err = sum+s/100, errors.Join(err, e)
	}
	return sum, err
}

// freePort returns a TCP port of the loopback that nobody listens on now.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// waitPort waits until somebody listens.
func waitPort(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		if err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("nobody listens on %s: %w", addr, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
