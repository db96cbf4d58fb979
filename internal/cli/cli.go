// Package cli is the webgw command: its verbs, where their settings come
// from, and how results and errors look to people and to programs.
//
// It must not know how anything is served: roles run through package daemon,
// everything else goes through the registry's API.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client"
	"webgw.dev/webgw/internal/daemon"
	"webgw.dev/webgw/internal/netx"
)

// Env is the surroundings of one run of the command.
type Env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
	Net            netx.Net // nil: the machine's own
}

// grammar is the command line, as kong reads it.
type grammar struct {
	Config string `help:"Settings file; see webgw config check." placeholder:"FILE" type:"path" group:"Everywhere"`
	JSON   bool   `name:"json" help:"Print JSON: results on standard output, errors on standard error." group:"Everywhere"`

	Expose     exposeVerb     `cmd:"" help:"Make something reachable from the internet."`
	Apply      applyVerb      `cmd:"" help:"Declare what YAML files say."`
	Get        getVerb        `cmd:"" help:"List records."`
	Describe   describeVerb   `cmd:"" help:"Show everything about one record."`
	Delete     deleteVerb     `cmd:"" help:"Withdraw records."`
	Seal       sealVerb       `cmd:"" help:"Seal a secret, read from standard input, for a file that gateways read."`
	Status     statusVerb     `cmd:"" help:"Tell what is up, what is not, and why."`
	Domain     domainVerb     `cmd:"" help:"Prove, hold and hand over host names."`
	DNS        dnsVerb        `cmd:"" name:"dns" help:"Add, list, import and remove DNS records of your zones."`
	Whoami     whoamiVerb     `cmd:"" help:"Show your identity and your registry."`
	Gateway    gatewayVerb    `cmd:"" help:"Run a gateway; without a registry it embeds one."`
	Node       nodeVerb       `cmd:"" help:"Run a node."`
	Registry   registryVerb   `cmd:"" help:"Run a registry."`
	Conf       configVerb     `cmd:"" name:"config" help:"Look at settings."`
	Demo       demoVerb       `cmd:"" help:"Run a whole grid on this machine, to try things; leaves nothing behind."`
	Completion completionVerb `cmd:"" help:"Print a completion script for a shell."`
	Version    versionVerb    `cmd:"" help:"Print the version."`
}

// app is what every verb works with.
type app struct {
	env      Env
	json     bool
	settings *settings
	parser   *kong.Kong
}

func (a *app) getenv(name string) string { return a.env.Getenv(name) }

func (a *app) printf(format string, args ...any) { fmt.Fprintf(a.env.Stdout, format, args...) }
func (a *app) notef(format string, args ...any)  { fmt.Fprintf(a.env.Stderr, format, args...) }

// Exit codes; docs/errors.md has them for people.
const (
	exitOK       = 0
	exitFailure  = 1
	exitInvalid  = 2
	exitNotFound = 3
	exitDenied   = 4
)

// exited carries the exit code of kong's help out of its parser.
type exited int

// Main runs the command with the arguments after its name, and returns its
// exit code. When ctx ends, what runs is stopped in good order.
func Main(ctx context.Context, args []string, env Env) (code int) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case exited:
			code = int(r)
		default:
			panic(r)
		}
	}()
	a := &app{env: env, json: wantsJSON(args)}
	err := a.run(ctx, args)
	if err == nil {
		return exitOK
	}
	return a.fail(err)
}

func (a *app) run(ctx context.Context, args []string) error {
	var g grammar
	a.settings = &settings{getenv: a.getenv}
	parser, err := a.newParser(&g)
	if err != nil {
		return err
	}
	a.parser = parser
	if len(args) == 0 {
		args = []string{"--help"}
	}
	if err := a.settings.load(configFlag(args)); err != nil {
		return err
	}
	k, err := parser.Parse(args)
	if err != nil {
		return a.usage(err)
	}
	a.json = g.JSON
	k.BindTo(ctx, (*context.Context)(nil))
	return k.Run(a)
}

func (a *app) newParser(g *grammar) (*kong.Kong, error) {
	return kong.New(g,
		kong.Name("webgw"),
		kong.Description("Reach what runs on hidden machines, through gateways of your choice.\n\n"+
			"Settings: flag, else WEBGW_… in the environment, else the settings file, else a default."),
		kong.Writers(a.env.Stdout, a.env.Stderr),
		kong.Exit(func(code int) { panic(exited(code)) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, NoExpandSubcommands: true}),
		kong.Resolvers(a.settings),
		kong.ExplicitGroups([]kong.Group{{Key: "Everywhere", Title: "Everywhere:"}}),
	)
}

// usage turns the parser's errors into ours.
func (a *app) usage(err error) error {
	p, ok := errors.AsType[*kong.ParseError](err)
	if !ok {
		return err
	}
	path := ""
	if p.Context != nil {
		path = commandPath(p.Context.Selected())
	}
	if _, ok := errors.AsType[*webgw.Error](err); ok { // a role's settings are not valid
		return a.settings.locate(path, err)
	}
	hint := strings.ReplaceAll("webgw "+path+" --help", "  ", " ")
	return &webgw.Error{Op: "read arguments", Kind: webgw.Invalid, Public: strings.ReplaceAll(p.Error(), "\n", " "), Hint: hint}
}

func commandPath(n *kong.Node) string {
	var names []string
	for ; n != nil && n.Type == kong.CommandNode; n = n.Parent {
		names = append(names, n.Name)
	}
	slices.Reverse(names)
	return strings.Join(names, " ")
}

// wantsJSON looks for --json before anything is parsed: errors of the parser
// are JSON too.
func wantsJSON(args []string) bool {
	for _, a := range args {
		switch a {
		case "--json", "--json=true":
			return true
		case "--":
			return false
		}
	}
	return false
}

// configFlag finds --config before anything is parsed: other flags have their
// values from that file.
func configFlag(args []string) string {
	for i, a := range args {
		if v, ok := strings.CutPrefix(a, "--config="); ok {
			return v
		}
		if a == "--config" && i+1 < len(args) {
			return args[i+1]
		}
		if a == "--" {
			break
		}
	}
	return ""
}

// shortly bounds what is still done after a stop was asked for.
func shortly(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
}

// ownerFlags are those of every verb that speaks for an owner.
type ownerFlags struct {
	Registry string `yaml:"registry" help:"The registry, as ID@host:port; without ID it is trusted on first use." placeholder:"ID@HOST:PORT"`
	Key      string `yaml:"key" help:"Your key file; made on first use." placeholder:"FILE" type:"path"`
	Proxy    string `yaml:"proxy" help:"HTTP proxy by which the registry and gateways are dialed (CONNECT), as http://[user:password@]host:port." placeholder:"URL"`
}

// connect loads the owner's key and returns a client of the registry.
func (a *app) connect(f ownerFlags) (*client.Client, error) {
	key, err := a.ownerKey(f.Key)
	if err != nil {
		return nil, err
	}
	nw, err := daemon.Outward(f.Proxy, a.env.Net)
	if err != nil {
		return nil, err
	}
	return a.client(f.Registry, key, nw)
}

// userDir returns one of the user's base directories (XDG).
func (a *app) userDir(variable string, below ...string) (string, error) {
	if d := a.getenv(variable); strings.HasPrefix(d, "/") {
		return d, nil
	}
	home := a.getenv("HOME")
	if home == "" {
		return "", &webgw.Error{Op: "find directory", Kind: webgw.Invalid, Public: "neither HOME nor " + variable + " is set", Hint: "set one, or name the files by flags"}
	}
	return home + "/" + strings.Join(below, "/"), nil
}

// configDir is where the owner's key, settings and known registries are.
func (a *app) configDir() (string, error) {
	d, err := a.userDir("XDG_CONFIG_HOME", ".config")
	return d + "/webgw", err
}

// stateDir is the default of --state-dir for a role.
func (a *app) stateDir(role string) (string, error) {
	if os.Geteuid() == 0 && a.getenv("XDG_STATE_HOME") == "" {
		return "/var/lib/webgw/" + role, nil
	}
	d, err := a.userDir("XDG_STATE_HOME", ".local", "state")
	return d + "/webgw/" + role, err
}
