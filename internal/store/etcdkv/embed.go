package etcdkv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"webgw.dev/webgw"
)

// embed starts a single etcd member in this process.
func (s *Store) embed(ctx context.Context, c Config) error {
	fail := func(kind webgw.ErrorKind, public string, err error) error {
		return &webgw.Error{Op: "open store", Kind: kind, Public: public, Err: err}
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return fail(webgw.Internal, fmt.Sprintf("the data directory %s can't be made", c.Dir), err)
	}
	// etcd itself would wait for the other process, without a word.
	lock, err := os.OpenFile(filepath.Join(c.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fail(webgw.Internal, fmt.Sprintf("the data directory %s can't be written to", c.Dir), err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return fail(webgw.Unavailable, fmt.Sprintf("the data directory %s is in use by another process", c.Dir), err)
	}
	// It talks to nobody, but must listen: on sockets with short paths.
	sockets, err := os.MkdirTemp("", "webgw-etcd-")
	if err != nil {
		lock.Close()
		return fail(webgw.Internal, "no temporary directory for etcd's sockets", err)
	}
	s.unlock = func() { os.RemoveAll(sockets); lock.Close() }

	cfg := embed.NewConfig()
	cfg.Name = "webgw"
	cfg.Dir = filepath.Join(c.Dir, "etcd")
	cfg.ListenPeerUrls = []url.URL{{Scheme: "unix", Path: filepath.Join(sockets, "peer")}}
	cfg.ListenClientUrls = []url.URL{{Scheme: "unix", Path: filepath.Join(sockets, "client")}}
	// What it advertises is written into its data: it must not change with the
	// sockets, and nobody dials it.
	never := url.URL{Scheme: "http", Host: "localhost:2380"}
	cfg.AdvertisePeerUrls, cfg.AdvertiseClientUrls = []url.URL{never}, []url.URL{never}
	cfg.InitialCluster = cfg.Name + "=" + never.String()
	cfg.TickMs, cfg.ElectionMs = 20, 200 // alone, it elects itself at once
	cfg.QuotaBackendBytes = 8 << 30
	cfg.MaxTxnOps = maxTxnOps
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = "periodic", "1h"
	cfg.WatchProgressNotifyInterval = 5e9
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(s.log.zap())
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		s.unlock()
		return fail(webgw.Internal, fmt.Sprintf("the store in %s does not open", c.Dir), err)
	}
	select {
	case <-server.Server.ReadyNotify():
	case err = <-server.Err():
	case <-server.Server.StopNotify():
		err = errors.New("it stopped")
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		server.Close()
		s.unlock()
		return fail(webgw.Internal, fmt.Sprintf("the store in %s does not start", c.Dir), err)
	}
	s.server, s.client = server, v3client.New(server.Server)
	s.log.running.Store(true)
	return nil
}

// etcdLog passes on the errors that etcd logs. Its warnings are of no use to
// who runs this, and neither is what it says while it starts or stops: that
// comes back as an error where it matters.
type etcdLog struct {
	log     *slog.Logger
	running atomic.Bool
}

func (l *etcdLog) zap() *zap.Logger {
	enc := zap.NewProductionEncoderConfig()
	enc.TimeKey = ""
	return zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(enc), zapcore.AddSync(l), zapcore.ErrorLevel))
}

func (l *etcdLog) Write(p []byte) (int, error) {
	level := slog.LevelDebug
	if l.running.Load() {
		level = slog.LevelError
	}
	l.log.Log(context.Background(), level, "etcd", "line", string(bytes.TrimSpace(p)))
	return len(p), nil
}
