//go:build linux

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// exposeTCP exposes the program that listens at a port, and waits until it
// takes connections at the gateway's port.
func (g *grid) exposeTCP(name string, workload int) (port int) {
	g.t.Helper()
	port = g.firstPort
	address := fmt.Sprintf("127.0.0.1:%d", workload)
	g.wait(name+" itself", func() error { return dialable(address) })
	g.expose(name, fmt.Sprintf("protocol: tcp\nport: %d", port), address)
	g.wait(name, func() error { return dialable(fmt.Sprintf("127.0.0.1:%d", port)) })
	return port
}

// dialable reports whether a connection is taken, and kept for a moment: one
// that leads nowhere is reset.
func dialable(address string) error {
	c, err := net.DialTimeout("tcp", address, time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		return err
	}
	if _, err := c.Read(make([]byte, 1)); err != nil && !os.IsTimeout(err) {
		return err
	}
	return nil
}

func TestGit(t *testing.T) {
	need(t, "git")
	if _, err := os.Stat(strings.TrimSpace(cmd(t, "git", "--exec-path")) + "/git-daemon"); err != nil {
		t.Skipf("git has no daemon here: %v", err)
	}
	g := startGateway(t)
	g.startNode()
	dir := t.TempDir()
	git := func(args ...string) string {
		t.Helper()
		return cmd(t, "git", append([]string{"-c", "user.name=visitor", "-c", "user.email=visitor@example.org", "-c", "init.defaultBranch=main"}, args...)...)
	}
	git("init", "-q", "--bare", dir+"/srv/site.git")
	port := freePort(t)
	// One process, not a shell's child: git forks the daemon of its own name.
	start(t, nil, "git", "daemon", "--listen=127.0.0.1", fmt.Sprintf("--port=%d", port), "--reuseaddr", "--export-all", "--enable=receive-pack", "--base-path="+dir+"/srv", dir+"/srv")
	url := fmt.Sprintf("git://127.0.0.1:%d/site.git", g.exposeTCP("repo", port))

	git("clone", "-q", url, dir+"/one") // of an empty repository
	want := make([]byte, 4<<20)
	newNoise(int64(len(want))).Read(want)
	for i := range 3 {
		if err := os.WriteFile(fmt.Sprintf("%s/one/%d.bin", dir, i), want[i:], 0o644); err != nil {
			t.Fatal(err)
		}
		git("-C", dir+"/one", "add", "-A")
		git("-C", dir+"/one", "commit", "-q", "-m", fmt.Sprint("change ", i))
		git("-C", dir+"/one", "push", "-q", "origin", "HEAD:refs/heads/main")
	}
	git("clone", "-q", "-b", "main", url, dir+"/two")
	git("-C", dir+"/two", "fsck", "--full", "--strict")
	if a, b := git("-C", dir+"/one", "rev-parse", "HEAD"), git("-C", dir+"/two", "rev-parse", "HEAD"); a != b {
		t.Errorf("pushed %s, cloned %s", a, b)
	}
	if got, err := os.ReadFile(dir + "/two/2.bin"); err != nil || !bytes.Equal(got, want[2:]) {
		t.Errorf("a file came back as %d bytes, %v", len(got), err)
	}
	git("clone", "-q", "--depth=1", "-b", "main", url, dir+"/shallow")
}

func TestRsync(t *testing.T) {
	need(t, "rsync")
	g := startGateway(t)
	g.startNode()
	dir := t.TempDir()
	port := freePort(t)
	config := fmt.Sprintf("address = 127.0.0.1\nport = %d\nuse chroot = no\nreverse lookup = no\n[files]\npath = %s\nread only = no\n", port, dir+"/srv")
	if os.Getuid() == 0 {
		config += "uid = 0\ngid = 0\n"
	}
	for _, sub := range []string{"srv", "in/deep/er", "out"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(dir+"/rsyncd.conf", []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		b := make([]byte, i*100)
		newNoise(int64(len(b))).Read(b)
		if err := os.WriteFile(fmt.Sprintf("%s/in/deep/er/%d", dir, i), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	big, sum := bigFile(t, 8<<20)
	if err := os.Rename(big, dir+"/in/big"); err != nil {
		t.Fatal(err)
	}
	start(t, nil, "rsync", "--daemon", "--no-detach", "--config="+dir+"/rsyncd.conf", "--log-file=/dev/stderr")
	url := fmt.Sprintf("rsync://127.0.0.1:%d/files/", g.exposeTCP("sync", port))
	cmd(t, "rsync", "-a", "--timeout=20", dir+"/in/", url)
	// The second time only a difference travels, by checksums in both directions.
	f, err := os.OpenFile(dir+"/in/big", os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt([]byte("changed"), 5<<20)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if fileSum(t, dir+"/in/big") == sum {
		t.Fatal("nothing was changed")
	}
	cmd(t, "rsync", "-a", "--checksum", "--no-whole-file", "--timeout=20", dir+"/in/", url)
	cmd(t, "rsync", "-az", "--timeout=20", url, dir+"/out/")
	cmd(t, "diff", "-r", dir+"/in", dir+"/out")
}

func TestPostgreSQL(t *testing.T) {
	need(t, "psql")
	servers, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil || len(servers) == 0 {
		t.Skip("PostgreSQL's server is not installed (./check installs it when it runs as root on Debian)")
	}
	bin := filepath.Dir(servers[len(servers)-1])
	dir, err := os.MkdirTemp("", "webgw-postgres-") // t.TempDir is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	// It refuses to run as root.
	var as *syscall.Credential
	if os.Getuid() == 0 {
		u, err := user.Lookup("nobody")
		if err != nil {
			t.Skipf("PostgreSQL does not run as root, and there is nobody else: %v", err)
		}
		uid, err := strconv.Atoi(u.Uid)
		if err != nil {
			t.Fatal(err)
		}
		gid, err := strconv.Atoi(u.Gid)
		if err != nil {
			t.Fatal(err)
		}
		as = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	initdb := exec.CommandContext(t.Context(), bin+"/initdb", "-D", dir+"/data", "-U", "owner", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
	initdb.SysProcAttr, initdb.Dir = &syscall.SysProcAttr{Credential: as}, dir
	if out, err := initdb.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	port := freePort(t)
	startAs(t, as, dir, nil, bin+"/postgres", "-D", dir+"/data", "-p", fmt.Sprint(port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off")

	g := startGateway(t)
	g.startNode()
	public := g.exposeTCP("db", port)
	url := fmt.Sprintf("postgresql://owner@127.0.0.1:%d/postgres?sslmode=disable", public)
	psql := func(args ...string) string {
		t.Helper()
		return cmd(t, "psql", append([]string{"-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", url}, args...)...)
	}
	g.wait("the database", func() error { return exec.CommandContext(t.Context(), bin+"/pg_isready", "-q", "-d", url).Run() })
	var rows bytes.Buffer
	for i := range 100_000 {
		fmt.Fprintf(&rows, "%d\trow %d of many, %x\n", i, i, i*7919)
	}
	in := filepath.Join(t.TempDir(), "rows.tsv")
	if err := os.WriteFile(in, rows.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	psql("-c", "CREATE TABLE t (id int PRIMARY KEY, what text)", "-c", `\copy t FROM '`+in+`'`)
	if got := psql("-c", `\copy (SELECT * FROM t ORDER BY id) TO STDOUT`); got != rows.String() {
		t.Errorf("%d bytes of rows came back as %d", rows.Len(), len(got))
	}
	got := psql("-c", "SELECT repeat('x', 8 * 1024 * 1024)")
	if len(got) != 8<<20+1 || strings.Trim(got, "x") != "\n" {
		t.Errorf("a value of 8 MB came back as %d bytes", len(got))
	}
	// An error does not end the connection, and a listener hears of another's
	// notification.
	got = cmd(t, "psql", "-X", "-q", "-A", "-t", url, "-c", "SELECT 1/0", "-c", "LISTEN news", "-c", "NOTIFY news, 'hello'", "-c", "SELECT 'still here'")
	if !strings.Contains(got, "still here") || !strings.Contains(got, `"hello"`) {
		t.Errorf("after an error: %q", got)
	}
}

func TestIperf3(t *testing.T) {
	need(t, "iperf3")
	g := startGateway(t)
	g.startNode()
	port := freePort(t)
	start(t, nil, "iperf3", "-s", "-B", "127.0.0.1", "-p", fmt.Sprint(port))
	public := g.exposeTCP("speed", port)
	for _, tt := range []struct {
		name string
		args []string
	}{
		{"to the workload", nil},
		{"to the visitor", []string{"-R"}},
		{"both ways, 4 streams", []string{"--bidir", "-P", "4"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out := cmd(t, "iperf3", append([]string{"-c", "127.0.0.1", "-p", fmt.Sprint(public), "-t", "1", "-J"}, tt.args...)...)
			type sum struct {
				Bytes int64   `json:"bytes"`
				Rate  float64 `json:"bits_per_second"`
			}
			var report struct {
				Error string `json:"error"`
				End   struct {
					Sent     sum `json:"sum_sent"`
					Received sum `json:"sum_received"`
				} `json:"end"`
			}
			if err := json.Unmarshal([]byte(out), &report); err != nil {
				t.Fatalf("%v\n%s", err, tail(out, 1000))
			}
			if report.Error != "" || report.End.Received.Bytes < 1<<20 || report.End.Sent.Bytes < report.End.Received.Bytes {
				t.Errorf("error %q, %d bytes sent, %d received", report.Error, report.End.Sent.Bytes, report.End.Received.Bytes)
			}
			t.Logf("%.1f Gbit/s", report.End.Received.Rate/1e9)
		})
	}
}
