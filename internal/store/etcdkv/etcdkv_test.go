package etcdkv

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.etcd.io/etcd/client/pkg/v3/transport"
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

// compacting lets the suite make the store forget.
type compacting struct{ *Store }

func (c compacting) Compact(ctx context.Context, rev int64) error {
	_, err := c.client.Compact(ctx, rev)
	return err
}

func TestEmbeddedContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.KV { return compacting{openIn(t, t.TempDir())} })
}

func TestExternalContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.KV {
		s, err := Open(t.Context(), Config{Endpoints: []string{external(t, nil)}, Prefix: "/test/"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return compacting{s}
	})
}

// external starts an etcd that is reached over TCP, or TLS with secure's files,
// as a cluster of others is.
func external(t *testing.T, secure *transport.TLSInfo) (endpoint string) {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.ListenPeerUrls = []url.URL{{Scheme: "unix", Path: filepath.Join(t.TempDir(), "peer")}}
	cfg.TickMs, cfg.ElectionMs = 20, 200
	cfg.MaxTxnOps = maxTxnOps
	cfg.WatchProgressNotifyInterval = progressInterval
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	scheme := "http"
	if secure != nil {
		scheme, cfg.ClientTLSInfo = "https", *secure
	}
	for range 10 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		client := url.URL{Scheme: scheme, Host: l.Addr().String()}
		l.Close()
		cfg.Dir = t.TempDir()
		cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
		e, err := embed.StartEtcd(cfg)
		if errors.Is(err, syscall.EADDRINUSE) {
			continue // somebody was faster
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(e.Close)
		<-e.Server.ReadyNotify()
		return client.String()
	}
	t.Fatal("no free port")
	return ""
}

func TestExternalTLS(t *testing.T) {
	t.Parallel()
	info, err := transport.SelfCert(zap.NewNop(), t.TempDir(), []string{"127.0.0.1:0"}, 1)
	if err != nil {
		t.Fatal(err)
	}
	endpoint := external(t, &info)
	root, err := os.ReadFile(info.CertFile)
	if err != nil {
		t.Fatal(err)
	}
	trusted := x509.NewCertPool()
	trusted.AppendCertsFromPEM(root)
	s, err := Open(t.Context(), Config{Endpoints: []string{endpoint}, TLS: &tls.Config{RootCAs: trusted}})
	if err != nil {
		t.Fatal(err)
	}
	if ok, _, err := s.Txn(t.Context(), nil, []store.Op{{Key: "a"}}); err != nil || !ok {
		t.Errorf("txn: %v %v", ok, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := Open(t.Context(), Config{Endpoints: []string{endpoint}, TLS: &tls.Config{RootCAs: x509.NewCertPool()}}); webgw.KindOf(err) != webgw.Unavailable || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a cluster that nobody vouches for: %v", err)
	}
}

func TestNobodyAnswers(t *testing.T) {
	t.Parallel()
	_, err := Open(t.Context(), Config{Endpoints: []string{"http://127.0.0.1:1"}})
	if webgw.KindOf(err) != webgw.Unavailable || !strings.Contains(err.Error(), "127.0.0.1:1") || !strings.Contains(err.Error(), "refused") {
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

func TestADirectoryMustBeUsable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{file, filepath.Join(file, "below")} {
		if s, err := Open(t.Context(), Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "the data directory "+dir) {
			t.Errorf("%s: %v, %v", dir, s, err)
		}
	}
}

// No sockets are left behind, and nobody else reads the data.
func TestNothingIsLeftBesideTheData(t *testing.T) {
	dir := t.TempDir()
	if err := openIn(t, dir).Close(); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := []string{"etcd", "lock"}; !slices.Equal(names, want) {
		t.Errorf("%v, want %v", names, want)
	}
	info, err := os.Stat(filepath.Join(dir, "etcd"))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the data has mode %v, %v", info.Mode(), err)
	}
}

func TestLogOfEtcd(t *testing.T) {
	var out strings.Builder
	l := &etcdLog{log: slog.New(slog.NewTextHandler(&out, nil))}
	z := l.zap().With(zap.String("member", "m"))
	z.Error("starting")
	l.running.Store(true)
	z.Warn("slow")
	z.Error("broken", zap.Int("disk", 3))
	if got := out.String(); strings.Count(got, "\n") != 1 || !strings.HasSuffix(got, "level=ERROR msg=etcd etcd.msg=broken etcd.disk=3 etcd.member=m\n") {
		t.Errorf("logged %s", got)
	}
	l.running.Store(false)
	out.Reset()
	func() {
		defer func() { recover() }() // zap's, as promised
		z.Panic("the last words")
	}()
	if !strings.Contains(out.String(), "the last words") {
		t.Errorf("logged %q", out.String())
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
	t.Parallel()
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
			if err := child.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := child.Wait(); err == nil || child.ProcessState.Exited() {
		t.Fatalf("it was not killed, but ended: %v", err)
	}
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
