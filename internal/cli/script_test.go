package cli

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/rogpeppe/go-internal/testscript"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/daemon"
	"webgw.dev/webgw/internal/ident"
	"webgw.dev/webgw/internal/store/memkv"
)

// patient is how long a script waits for something before it fails.
const patient = 30 * time.Second

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"webgw": func() { // as cmd/webgw does it
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			context.AfterFunc(ctx, stop)
			os.Exit(Main(ctx, os.Args[1:], Env{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv}))
		},
	})
}

// TestScripts runs the command as people do. The scripts have these commands
// of their own:
//
//	resolver FILE              a DNS resolver that knows the TXT records "NAME TEXT" of FILE; the grid after it asks for proofs
//	grid [COUNT]               a gateway "gent" with a registry, and COUNT ports in a row on offer, one if not
//	                           given; sets REGISTRY HTTP TLS CA, PORT and PORT2, PORT3…
//	workload KIND VAR          a server: http, echo, echoes (three of them on ports in a row), udp (an echo), tls
//	                           or unix (HTTP on a socket); sets VAR to its address, VARPORT to its (first) port,
//	                           for tls CERT
//	start NAME ARG...          webgw ARG... in the background
//	await NAME REGEXP          waits until its output matches; sets MATCH to the first group
//	up NAME                    waits until an exposure of the script's owner is up
//	[!] stop NAME              interrupts it and waits; it must end with 0, or not
//	[!] httpget URL [TEXT]     a visitor at the gateway; the page must hold TEXT; prints the status
//	tcpecho PORT               a visitor who sends, ends, and gets everything back
//	udpecho PORT               the same by datagrams
//	tlsget HOST[:PORT] CERT TEXT   a visitor who trusts only the workload's certificate
//	expired FILE               declares a record that has ended, by the key in FILE; it must be refused
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			home := filepath.Join(e.WorkDir, "home")
			e.Setenv("HOME", home)
			for _, v := range []string{"XDG_CONFIG_HOME", "WEBGW_REGISTRY", "WEBGW_CONFIG", "WEBGW_KEY"} {
				e.Setenv(v, "")
			}
			e.Setenv("XDG_STATE_HOME", filepath.Join(home, "state"))
			e.Setenv("GORACE", "atexit_sleep_ms=10") // else each run takes a second more under -race
			e.Values["world"] = &scriptWorld{env: e, running: map[string]*background{}}
			return os.MkdirAll(home, 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"grid": worldCmd((*scriptWorld).grid), "workload": worldCmd((*scriptWorld).workload),
			"start": worldCmd((*scriptWorld).start), "await": worldCmd((*scriptWorld).await), "up": worldCmd((*scriptWorld).up), "stop": worldCmd((*scriptWorld).stop),
			"httpget": worldCmd((*scriptWorld).httpget), "tcpecho": worldCmd((*scriptWorld).tcpecho), "udpecho": worldCmd((*scriptWorld).udpecho), "tlsget": worldCmd((*scriptWorld).tlsget),
			"resolver": worldCmd((*scriptWorld).resolver),
			"expired":  worldCmd((*scriptWorld).expired),
		},
	})
}

type scriptWorld struct {
	env     *testscript.Env
	running map[string]*background
}

func worldCmd(f func(*scriptWorld, *testscript.TestScript, bool, []string)) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		f(ts.Value("world").(*scriptWorld), ts, neg, args)
	}
}

// resolver starts a DNS server that answers TXT questions from the lines "NAME
// TEXT" of a file, read anew each time.
func (w *scriptWorld) resolver(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	file := ts.MkAbs(args[0])
	srv := &dns.Server{Listener: l, Handler: dns.HandlerFunc(func(rw dns.ResponseWriter, q *dns.Msg) {
		a := new(dns.Msg).SetRcode(q, dns.RcodeNameError)
		data, err := os.ReadFile(file)
		if err != nil {
			a.Rcode = dns.RcodeServerFailure
		}
		for line := range strings.Lines(string(data)) {
			if name, text, ok := strings.Cut(strings.TrimSpace(line), " "); ok && dns.Fqdn(name) == q.Question[0].Name {
				a.Rcode = dns.RcodeSuccess
				a.Answer = append(a.Answer, &dns.TXT{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{text}})
			}
		}
		rw.WriteMsg(a)
	})}
	up := make(chan struct{})
	srv.NotifyStartedFunc = func() { close(up) }
	ended := make(chan error, 1)
	go func() { ended <- srv.ActivateAndServe() }()
	<-up
	ts.Defer(func() {
		if err := errors.Join(srv.Shutdown(), <-ended); err != nil {
			ts.Logf("the resolver ended with %v", err)
		}
	})
	ts.Setenv("RESOLVER", l.Addr().String())
}

func (w *scriptWorld) grid(ts *testscript.TestScript, _ bool, args []string) {
	kv := memkv.New()
	offer := 1
	if len(args) > 0 {
		var err error
		offer, err = strconv.Atoi(args[0])
		ts.Check(err)
	}
	ports := []int{unusedPort(ts), unusedPort(ts), unusedPorts(ts, offer)}
	at := func(i int) string { return "127.0.0.1:" + strconv.Itoa(ports[i]) }
	config := daemon.GatewayConfig{Common: daemon.Common{StateDir: ts.MkAbs("gent")}, Name: "gent", Zone: "gent.test", Bind: "127.0.0.1",
		HTTPAddr: at(0), TLSAddr: at(1), Ports: webgw.PortSet(fmt.Sprintf("%d-%d", ports[2], ports[2]+offer-1)), Addresses: []string{at(1)}}
	if r := ts.Getenv("RESOLVER"); r != "" {
		config.Embedded.Resolvers = []string{r}
	}
	ready := make(chan daemon.Info, 1)
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		ended <- config.Run(ctx, daemon.Env{Store: kv, Drain: time.Second, Ready: func(i daemon.Info) { ready <- i }})
	}()
	ts.Defer(func() {
		cancel()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			ts.Logf("the gateway ended with %v", err)
		}
		kv.Close()
	})
	select {
	case i := <-ready:
		ts.Setenv("REGISTRY", i.Registry)
		ts.Setenv("WEBGW_REGISTRY", i.Registry)
		ts.Setenv("CA", i.CAFile)
		ts.Setenv("GENT", i.ID.String())
	case err := <-ended:
		ended <- err
		ts.Fatalf("the gateway ended at its start: %v", err)
	case <-time.After(patient):
		ts.Fatalf("the gateway does not start")
	}
	for i, name := range []string{"HTTP", "TLS", "PORT"} {
		ts.Setenv(name, strconv.Itoa(ports[i]))
	}
	for i := 1; i < offer; i++ {
		ts.Setenv("PORT"+strconv.Itoa(i+1), strconv.Itoa(ports[2]+i))
	}
	// Its own record is declared in the background.
	key, err := ident.Generate()
	ts.Check(err)
	late, enough := context.WithTimeout(ctx, patient)
	defer enough()
	for news, err := range w.client(ts, key).Watch(late, client.ScopeOwner, 0, "") {
		ts.Check(err)
		if len(news.Records) > 0 {
			return
		}
	}
}

func (w *scriptWorld) client(ts *testscript.TestScript, key ident.Key) *client.Client {
	id, addr, err := client.ParseRegistry(ts.Getenv("REGISTRY"))
	ts.Check(err)
	c := &client.Client{Endpoints: []string{addr}, Server: id, Key: key}
	ts.Defer(c.Close)
	return c
}

// unusedPorts returns the first of several in a row.
func unusedPorts(ts *testscript.TestScript, count int) int {
	for range 100 {
		first := unusedPort(ts)
		free := true
		for n := first + 1; n < first+count && free; n++ {
			l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(n))
			if free = err == nil; free {
				l.Close()
			}
		}
		if free {
			return first
		}
	}
	ts.Fatalf("there are no %d unused ports in a row", count)
	return 0
}

func unusedPort(ts *testscript.TestScript) int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func (w *scriptWorld) workload(ts *testscript.TestScript, _ bool, args []string) {
	switch args[0] {
	case "udp":
		w.udpWorkload(ts, args[1])
		return
	case "echoes":
		first := unusedPorts(ts, 3)
		for n := first; n < first+3; n++ {
			l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(n))
			ts.Check(err)
			serveEcho(ts, l)
		}
		ts.Setenv(args[1], fmt.Sprintf("127.0.0.1:%d-%d", first, first+2))
		ts.Setenv(args[1]+"PORT", strconv.Itoa(first))
		return
	}
	network, at := "tcp", "127.0.0.1:0"
	if args[0] == "unix" { // not below the script's directory, whose name may be too long
		dir, err := os.MkdirTemp("", "webgw-*")
		ts.Check(err)
		ts.Defer(func() { os.RemoveAll(dir) })
		network, at = "unix", filepath.Join(dir, "s")
	}
	l, err := net.Listen(network, at)
	ts.Check(err)
	ts.Setenv(args[1], l.Addr().String())
	if _, port, err := net.SplitHostPort(l.Addr().String()); err == nil {
		ts.Setenv(args[1]+"PORT", port)
	}
	var serving sync.WaitGroup
	s := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(rw, "hello from the workload at %s\n", r.URL.Path)
	})}
	switch args[0] {
	case "http", "unix":
		serving.Go(func() { s.Serve(l) })
	case "tls":
		cert, file := ownCertificate(ts)
		ts.Setenv("CERT", file)
		serving.Go(func() { s.Serve(tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}})) })
	case "echo":
		serveEcho(ts, l)
	}
	ts.Defer(func() {
		s.Close()
		l.Close()
		serving.Wait()
	})
}

func serveEcho(ts *testscript.TestScript, l net.Listener) {
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				io.Copy(c, c)
				c.Close()
			})
		}
	})
	ts.Defer(func() {
		l.Close()
		serving.Wait()
	})
}

func ownCertificate(ts *testscript.TestScript) (tls.Certificate, string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"vault.gent.test", "vault.example.org"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	ts.Check(err)
	file := ts.MkAbs("workload.pem")
	ts.Check(os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, file
}

// background is a webgw that runs beside the script.
type background struct {
	cmd    *exec.Cmd
	exited chan struct{} // closed after err is set
	err    error

	mu   sync.Mutex
	more chan struct{} // closed and replaced by each write
	out  bytes.Buffer
}

func (b *background) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.more)
	b.more = make(chan struct{})
	return b.out.Write(p)
}

func (b *background) seen() (string, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.out.String(), b.more
}

func (w *scriptWorld) start(ts *testscript.TestScript, _ bool, args []string) {
	path, err := exec.LookPath("webgw")
	ts.Check(err)
	b := &background{cmd: exec.Command(path, args[1:]...), exited: make(chan struct{}), more: make(chan struct{})}
	b.cmd.Dir = ts.MkAbs(".")
	for _, name := range []string{"HOME", "PATH", "XDG_STATE_HOME", "WEBGW_REGISTRY", "WEBGW_CONFIG", "TMPDIR", "GORACE", "GOCOVERDIR"} {
		if v := ts.Getenv(name); v != "" {
			b.cmd.Env = append(b.cmd.Env, name+"="+v)
		}
	}
	b.cmd.Stdout, b.cmd.Stderr = b, b
	ts.Check(b.cmd.Start())
	go func() {
		b.err = b.cmd.Wait()
		close(b.exited)
	}()
	w.running[args[0]] = b
	ts.Defer(func() {
		select {
		case <-b.exited:
		default:
			b.cmd.Process.Kill()
			<-b.exited
		}
		out, _ := b.seen()
		ts.Logf("[%s]\n%s", args[0], out)
	})
}

func (w *scriptWorld) up(ts *testscript.TestScript, _ bool, args []string) {
	key, err := ident.Load(ts.MkAbs("home/.config/webgw/owner.key"))
	ts.Check(err)
	c := w.client(ts, key)
	late := time.After(patient)
	for {
		o, err := c.Status(context.Background())
		ts.Check(err)
		why := "it is not known"
		for _, e := range o.Exposures {
			if e.Key.Name == args[0] {
				if why = e.Why; e.Up {
					return
				}
			}
		}
		select {
		case <-time.After(pollFast): // the registry does not tell of it by itself
		case <-late:
			ts.Fatalf("%s is not up: %s", args[0], why)
		}
	}
}

func (w *scriptWorld) await(ts *testscript.TestScript, _ bool, args []string) {
	b := w.running[args[0]]
	re, err := regexp.Compile("(?m)" + args[1])
	ts.Check(err)
	late := time.After(patient)
	for {
		out, more := b.seen()
		if m := re.FindStringSubmatch(out); m != nil {
			ts.Setenv("MATCH", m[len(m)-1])
			return
		}
		select {
		case <-more:
		case <-b.exited:
			if again, _ := b.seen(); re.MatchString(again) {
				continue
			}
			ts.Fatalf("%s has ended (%v) without %q", args[0], b.err, args[1])
		case <-late:
			ts.Fatalf("%s does not print %q", args[0], args[1])
		}
	}
}

func (w *scriptWorld) stop(ts *testscript.TestScript, neg bool, args []string) {
	b := w.running[args[0]]
	ts.Check(b.cmd.Process.Signal(os.Interrupt))
	select {
	case <-b.exited:
	case <-time.After(patient):
		ts.Fatalf("%s does not end", args[0])
	}
	if (b.err != nil) != neg {
		ts.Fatalf("%s ended with %v", args[0], b.err)
	}
}

// visitor returns a client that reaches every host at the gateway.
func visitor(ts *testscript.TestScript, authority string) *http.Client {
	t := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		var d net.Dialer
		return d.DialContext(ctx, network, "127.0.0.1:"+port)
	}}
	if authority != "" {
		data, err := os.ReadFile(authority)
		ts.Check(err)
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(data)
		t.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	return &http.Client{Transport: t, Timeout: patient, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func get(ts *testscript.TestScript, neg bool, authority, url, text string) {
	res, err := visitor(ts, authority).Get(url)
	if err != nil {
		if neg {
			return
		}
		ts.Fatalf("%v", err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	ts.Check(err)
	ok := res.StatusCode == http.StatusOK && strings.Contains(string(body), text)
	if ok == neg {
		ts.Fatalf("%s: %s %.300s", url, res.Status, body)
	}
}

func (w *scriptWorld) httpget(ts *testscript.TestScript, neg bool, args []string) {
	get(ts, neg, ts.Getenv("CA"), args[0], strings.Join(args[1:], " "))
}

func (w *scriptWorld) tlsget(ts *testscript.TestScript, neg bool, args []string) {
	at := args[0]
	if !strings.Contains(at, ":") {
		at += ":" + ts.Getenv("TLS")
	}
	get(ts, neg, args[1], "https://"+at+"/", strings.Join(args[2:], " "))
}

func (w *scriptWorld) tcpecho(ts *testscript.TestScript, neg bool, args []string) {
	c, err := net.DialTimeout("tcp", "127.0.0.1:"+args[0], patient)
	if err != nil && neg {
		return
	}
	ts.Check(err)
	defer c.Close()
	ts.Check(c.SetDeadline(time.Now().Add(patient)))
	const words = "back and forth\n"
	_, err = io.WriteString(c, words)
	if err == nil {
		err = c.(*net.TCPConn).CloseWrite()
	}
	got := []byte(nil)
	if err == nil {
		got, err = io.ReadAll(c)
	}
	if ok := err == nil && string(got) == words; ok == neg {
		ts.Fatalf("came back: %q, %v", got, err)
	}
}

func (w *scriptWorld) udpWorkload(ts *testscript.TestScript, name string) {
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	ts.Check(err)
	ts.Setenv(name, c.LocalAddr().String())
	ts.Setenv(name+"PORT", strconv.Itoa(c.LocalAddr().(*net.UDPAddr).Port))
	var serving sync.WaitGroup
	serving.Go(func() {
		b := make([]byte, 64<<10)
		for {
			n, peer, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(b[:n], peer)
		}
	})
	ts.Defer(func() { c.Close(); serving.Wait() })
}

func (w *scriptWorld) udpecho(ts *testscript.TestScript, neg bool, args []string) {
	c, err := net.Dial("udp", "127.0.0.1:"+args[0])
	ts.Check(err)
	defer c.Close()
	const words = "back and forth"
	b := make([]byte, 100)
	for range 5 { // visitors of UDP repeat what was not answered
		n := 0
		if _, err = io.WriteString(c, words); err == nil {
			ts.Check(c.SetReadDeadline(time.Now().Add(patient / 10)))
			n, err = c.Read(b)
		}
		if ok := err == nil && string(b[:n]) == words; ok {
			if neg {
				ts.Fatalf("the echo came back")
			}
			return
		}
		if neg {
			return
		}
	}
	ts.Fatalf("nothing came back: %v", err)
}

// expired shows what the registry answers to a record that has ended.
func (w *scriptWorld) expired(ts *testscript.TestScript, _ bool, args []string) {
	key, err := ident.Load(ts.MkAbs(args[0]))
	ts.Check(err)
	ended := time.Now().Add(-webgw.MaxSkew - time.Minute)
	s, err := key.Sign(webgw.Record{Version: 1, Kind: webgw.KindFarm, Name: "old", Seq: 1, Issued: ended.Add(-time.Hour), Expires: ended, Farm: &webgw.Farm{}})
	ts.Check(err)
	_, err = w.client(ts, key).Put(context.Background(), s)
	if webgw.KindOf(err) != webgw.Expired {
		ts.Fatalf("an expired record got %v", err)
	}
}
