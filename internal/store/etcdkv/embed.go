package etcdkv

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/run"
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
	lock, err := run.Lock(filepath.Join(c.Dir, "lock"))
	if errors.Is(err, run.ErrLocked) {
		return fail(webgw.Unavailable, fmt.Sprintf("the data directory %s is in use by another process", c.Dir), err)
	}
	if err != nil {
		return fail(webgw.Internal, fmt.Sprintf("the data directory %s can't be written to", c.Dir), err)
	}
	sockets, err := socketDir(c.Dir)
	if err != nil {
		lock.Close()
		return fail(webgw.Internal, "no directory for etcd's sockets", err)
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
	cfg.WatchProgressNotifyInterval = progressInterval
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

// maxSocketPath is what every system takes as the path of a socket.
const maxSocketPath = 103

// socketDir makes a directory for the sockets on which etcd must listen though
// it talks to nobody: in dir, where nothing is left behind by a killed process,
// or a temporary one if paths in dir are too long.
func socketDir(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	sockets := filepath.Join(dir, "sockets")
	if len(filepath.Join(sockets, "client")) > maxSocketPath {
		return os.MkdirTemp("", "webgw-etcd-")
	}
	// What is there is a dead process's, for the lock is ours.
	if err := os.RemoveAll(sockets); err != nil {
		return "", err
	}
	return sockets, os.Mkdir(sockets, 0o700)
}

// etcdLog passes on the errors that etcd logs. Its warnings are of no use to
// who runs this, and neither is what it says while it starts or stops: that
// comes back as an error where it matters. But its last words, before it ends
// the process, are always heard.
type etcdLog struct {
	log     *slog.Logger
	running atomic.Bool
}

func (l *etcdLog) zap() *zap.Logger { return zap.New(logCore{to: l}) }

// logCore is the zapcore.Core of an etcdLog.
type logCore struct {
	to     *etcdLog
	fields []zapcore.Field // of the logger, before the entry's
}

func (c logCore) Enabled(l zapcore.Level) bool { return l >= zapcore.ErrorLevel }

func (c logCore) With(fields []zapcore.Field) zapcore.Core {
	return logCore{c.to, slices.Concat(c.fields, fields)}
}

func (c logCore) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return checked.AddCore(e, c)
	}
	return checked
}

func (c logCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range slices.Concat(c.fields, fields) {
		f.AddTo(enc)
	}
	args := []any{"msg", e.Message}
	for _, k := range slices.Sorted(maps.Keys(enc.Fields)) {
		args = append(args, k, enc.Fields[k])
	}
	level := slog.LevelDebug
	if c.to.running.Load() || e.Level > zapcore.ErrorLevel {
		level = slog.LevelError
	}
	c.to.log.Log(context.Background(), level, "etcd", slog.Group("etcd", args...))
	return nil
}

func (c logCore) Sync() error { return nil }
