package etcdkv

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/store"
	"webgw.dev/webgw/internal/store/storetest"
)

func openIn(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestEmbeddedContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.KV { return openIn(t, t.TempDir()) })
}

func TestExternalContract(t *testing.T) {
	endpoint := external(t)
	n := 0
	storetest.Run(t, func(t *testing.T) store.KV {
		n++
		s, err := Open(t.Context(), Config{Endpoints: []string{endpoint}, Prefix: fmt.Sprintf("/test%d/", n)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	})
}

// external starts an etcd that is reached over TCP, as a cluster of others is.
func external(t *testing.T) (endpoint string) {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	cfg.ListenPeerUrls = []url.URL{{Scheme: "unix", Path: filepath.Join(t.TempDir(), "peer")}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	client := url.URL{Scheme: "http", Host: l.Addr().String()}
	l.Close()
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.TickMs, cfg.ElectionMs = 20, 200
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	<-e.Server.ReadyNotify()
	return client.String()
}

func TestNobodyAnswers(t *testing.T) {
	_, err := Open(t.Context(), Config{Endpoints: []string{"http://127.0.0.1:1"}})
	if webgw.KindOf(err) != webgw.Unavailable || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("%v", err)
	}
}

func TestADirectoryHasOneUser(t *testing.T) {
	dir := t.TempDir()
	openIn(t, dir)
	_, err := Open(t.Context(), Config{Dir: dir})
	if webgw.KindOf(err) != webgw.Unavailable || !strings.Contains(err.Error(), dir) {
		t.Errorf("a second user of the directory: %v", err)
	}
}

func TestLongDirectoryAndReopen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long/", 40))
	s := openIn(t, dir)
	if _, _, err := s.Txn(t.Context(), nil, []store.Op{{Key: "a", Value: []byte("1")}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	item, ok, _, err := openIn(t, dir).Get(t.Context(), "a")
	if err != nil || !ok || string(item.Value) != "1" {
		t.Errorf("after reopening: %s %v %v", item.Value, ok, err)
	}
}

const childDir = "WEBGW_TEST_ETCDKV_DIR"

// TestMain is also the process that TestKilledProcessLosesNothing kills: it
// writes, and prints what was acknowledged.
func TestMain(m *testing.M) {
	dir := os.Getenv(childDir)
	if dir == "" {
		os.Exit(m.Run())
	}
	s, err := Open(context.Background(), Config{Dir: dir})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for i := 0; ; i++ {
		if _, _, err := s.Txn(context.Background(), nil, []store.Op{{Key: fmt.Sprintf("k/%06d", i), Value: []byte("v")}}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(i)
	}
}

func TestKilledProcessLosesNothing(t *testing.T) {
	dir := t.TempDir()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childDir+"="+dir)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	acknowledged := -1
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if _, err := fmt.Sscan(lines.Text(), &acknowledged); err != nil {
			t.Fatal(err)
		}
		if acknowledged == 1000 {
			child.Process.Kill()
		}
	}
	child.Wait() // it was killed
	if acknowledged < 1000 {
		t.Fatalf("it ended after %d writes", acknowledged)
	}
	items, _, err := openIn(t, dir).List(t.Context(), "k/", "", 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	// One more may be there: written, but killed before it was told.
	if len(items) < acknowledged+1 || items[acknowledged].Key != fmt.Sprintf("k/%06d", acknowledged) {
		t.Errorf("%d writes were acknowledged, %d are there", acknowledged+1, len(items))
	}
}
