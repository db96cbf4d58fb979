package daemon

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/certs"
	"webgw.dev/webgw/internal/store"
	"webgw.dev/webgw/internal/store/etcdkv"
)

// openEtcd opens the registry's own store.
func openEtcd(ctx context.Context, c RegistryConfig, env Env) (store.KV, error) {
	config := etcdkv.Config{Dir: filepath.Join(c.StateDir, "etcd"), Endpoints: c.EtcdEndpoints, Log: env.Log}
	if c.EtcdCA != "" || c.EtcdCert != "" {
		config.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	if c.EtcdCA != "" {
		pem, err := os.ReadFile(c.EtcdCA)
		if err != nil {
			return nil, &webgw.Error{Op: "start", Kind: webgw.Invalid, Field: "etcd-ca", Public: "the file " + c.EtcdCA + " can't be read", Err: err}
		}
		config.TLS.RootCAs = x509.NewCertPool()
		if !config.TLS.RootCAs.AppendCertsFromPEM(pem) {
			return nil, invalid("etcd-ca", "the file %s holds no certificate", c.EtcdCA)
		}
	}
	if c.EtcdCert != "" {
		pair, err := tls.LoadX509KeyPair(c.EtcdCert, c.EtcdKey)
		if err != nil {
			return nil, &webgw.Error{Op: "start", Kind: webgw.Invalid, Field: "etcd-cert", Public: "certificate and key can't be used", Err: err}
		}
		config.TLS.Certificates = []tls.Certificate{pair}
	}
	return etcdkv.Open(ctx, config)
}

// certificates opens the gateway's certificates; caFile is that of the
// development authority, or "".
func (c GatewayConfig) certificates(env Env, name string) (s *certs.Store, caFile string, err error) {
	s = &certs.Store{Host: cmp.Or(c.Zone, name), Log: env.Log}
	for _, p := range c.CertFiles {
		cert, key, _ := strings.Cut(p, ":") // validated
		s.Files = append(s.Files, certs.Pair{Cert: cert, Key: key})
	}
	if c.DevCA || len(c.CertFiles) == 0 {
		s.Dir = c.StateDir
		caFile = filepath.Join(c.StateDir, "dev-ca.pem")
	}
	return s, caFile, s.Load()
}

// covers reports whether a certificate stands ready for a host name, which
// may be a wildcard.
func covers(s *certs.Store) func(host string) bool {
	return func(host string) bool {
		if rest, ok := strings.CutPrefix(host, "*."); ok {
			host = "any." + rest
		}
		_, err := s.GetCertificate(&tls.ClientHelloInfo{ServerName: host})
		return err == nil
	}
}
