package cli

import (
	"encoding"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"slices"
	"strings"

	"github.com/alecthomas/kong"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client/manifest"
	"webgw.dev/webgw/internal/daemon"
)

// file is the settings file: one section per role, one for the owner's verbs,
// and one for what they share.
type file struct {
	Common   commonSection         `yaml:"common"`
	Registry daemon.RegistryConfig `yaml:"registry"`
	Gateway  daemon.GatewayConfig  `yaml:"gateway"`
	Node     daemon.NodeConfig     `yaml:"node"`
	Owner    ownerSection          `yaml:"owner"`
}

type commonSection struct {
	daemon.Common `yaml:",inline"`
	Registry      string `yaml:"registry"`
}

type ownerSection struct {
	Registry string `yaml:"registry"`
	Key      string `yaml:"key"`
	Proxy    string `yaml:"proxy"`
}

// shared are the fields of the section common, which every section has too.
var shared = []string{"state-dir", "log-level", "log-format", "metrics-addr", "proxy", "registry"}

// settings gives flags that are not on the command line their values: from the
// environment, then from the settings file. It implements kong.Resolver.
type settings struct {
	getenv func(string) string

	path   string // of the file, or "": there is none
	file   file
	given  map[string]manifest.Place // fields of the file and where they stand
	source map[*kong.Flag]setting    // where each flag's value came from
}

// setting is where a value came from, and what it is called in the file.
type setting struct {
	section, field string
	from           string // "flag", "WEBGW_…", a place in the file, or "default"
}

// load reads the settings file: the one named, by flag or by WEBGW_CONFIG, or
// the first of the usual places that has one.
func (s *settings) load(named string) error {
	if named == "" {
		named = s.getenv("WEBGW_CONFIG")
	}
	if named != "" {
		return s.read(named)
	}
	places := []string{"/etc/webgw/config.yaml"}
	a := app{env: Env{Getenv: s.getenv}}
	if dir, err := a.configDir(); err == nil { // without a home there is only the other place
		places = slices.Insert(places, 0, dir+"/config.yaml")
	}
	for _, p := range places {
		if _, err := os.Stat(p); err == nil {
			return s.read(p)
		}
	}
	return nil
}

func (s *settings) read(path string) error {
	data, err := readFile(path)
	if err != nil {
		return err
	}
	s.path, s.file = path, file{}
	s.given, err = manifest.DecodeFile(path, data, &s.file)
	return err
}

// readFile reads a file of at most the size that a manifest may have.
func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err == nil && info.Mode().IsRegular() && info.Size() > manifest.MaxSize {
		return nil, invalid("", "", "%s is larger than %d KiB", path, manifest.MaxSize>>10)
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(path)
	}
	if err != nil {
		kind := webgw.Invalid
		if errors.Is(err, fs.ErrNotExist) {
			kind = webgw.NotFound
		} else if errors.Is(err, fs.ErrPermission) {
			kind = webgw.Forbidden
		}
		return nil, &webgw.Error{Op: "read file", Kind: kind, Public: fmt.Sprintf("the file %s can't be read", path), Hint: reasonOf(err), Err: err}
	}
	return data, nil
}

// reasonOf is what the system says, without the path that is told already.
func reasonOf(err error) string {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err.Error()
	}
	return err.Error()
}

// Validate implements kong.Resolver: the file was checked when it was read.
func (s *settings) Validate(*kong.Application) error { return nil }

// place tells the section and the field that a flag is in the file, and the
// variables of the environment that set it, first choice first.
func place(node *kong.Node, flag *kong.Flag) (at setting, variables []string) {
	at.section, at.field = "owner", flag.Name
	for n := node; n != nil && n.Type == kong.CommandNode; n = n.Parent {
		if n.Name == "gateway" || n.Name == "node" || n.Name == "registry" {
			at.section = n.Name
		}
	}
	if f := flag.Tag.Get("yaml"); f != "" {
		at.field = f
	}
	if flag.Tag.Has("section") { // of another role that this one embeds
		at.section = flag.Tag.Get("section")
	}
	env := strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_"))
	variables = []string{"WEBGW_" + strings.ToUpper(at.section) + "_" + env}
	if at.section == "owner" {
		variables = []string{"WEBGW_" + env}
	} else if slices.Contains(shared, flag.Name) {
		variables = append(variables, "WEBGW_"+env)
	}
	return at, variables
}

// settable are the flags that the environment and the file may set: what a
// role or an owner is, and not what is to be done now.
func settable(flag *kong.Flag) bool { return flag.Tag.Has("yaml") }

// Resolve implements kong.Resolver.
func (s *settings) Resolve(_ *kong.Context, parent *kong.Path, flag *kong.Flag) (any, error) {
	if !settable(flag) {
		return nil, nil
	}
	value, at := s.lookup(parent.Node(), flag)
	if s.source == nil {
		s.source = map[*kong.Flag]setting{}
	}
	s.source[flag] = at
	return value, nil
}

// lookup returns the value that environment or file have for a flag, or nil.
func (s *settings) lookup(node *kong.Node, flag *kong.Flag) (any, setting) {
	at, variables := place(node, flag)
	for _, name := range variables {
		if v := s.getenv(name); v != "" {
			at.from = name
			return v, at
		}
	}
	for _, section := range []string{at.section, "common"} {
		path := section + "." + at.field
		if where, ok := s.given[path]; ok && (section != "common" || slices.Contains(shared, at.field)) {
			at.from = where.String()
			return s.fileValue(section, at.field), at
		}
	}
	at.from = "default"
	if at.field == "state-dir" {
		if dir, err := (&app{env: Env{Getenv: s.getenv}}).stateDir(at.section); err == nil { // else it is missing, which is told
			return dir, at
		}
	}
	return nil, at
}

// fileValue returns a field of the file in the form in which kong reads it.
func (s *settings) fileValue(section, field string) any {
	v, ok := yamlField(reflect.ValueOf(&s.file).Elem(), section)
	if ok {
		v, ok = yamlField(v, field)
	}
	if !ok {
		return nil
	}
	if v.Kind() == reflect.Slice {
		all := make([]any, v.Len())
		for i := range all {
			all[i] = text(v.Index(i))
		}
		return all
	}
	return text(v)
}

// yamlField finds a field of a struct by its name in files.
func yamlField(v reflect.Value, name string) (reflect.Value, bool) {
	for i := range v.NumField() {
		f := v.Type().Field(i)
		tag, options, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if f.Anonymous && options == "inline" {
			if found, ok := yamlField(v.Field(i), name); ok {
				return found, true
			}
		} else if tag == name {
			return v.Field(i), true
		}
	}
	return reflect.Value{}, false
}

// text writes a value as a flag takes it.
func text(v reflect.Value) string {
	if m, ok := v.Interface().(encoding.TextMarshaler); ok {
		if b, err := m.MarshalText(); err == nil { // identities and prefixes don't fail
			return string(b)
		}
	}
	return fmt.Sprint(v.Interface())
}

// locate gives an error of a role's validation the place of the field that it
// names, if that came from the file.
func (s *settings) locate(section string, err error) error {
	e, ok := errors.AsType[*webgw.Error](err)
	if !ok || e.Field == "" {
		return err
	}
	bare, _, _ := strings.Cut(e.Field, "[")
	for _, from := range []string{section, "common"} {
		for _, field := range []string{e.Field, bare} {
			at, ok := s.given[from+"."+field]
			if ok && s.fromFile(section, bare) {
				return &manifest.Error{Place: at, Err: e}
			}
		}
	}
	return err
}

// fromFile reports whether a field has its value from the file.
func (s *settings) fromFile(section, field string) bool {
	for _, at := range s.source {
		if at.section == section && at.field == field {
			return strings.HasPrefix(at.from, s.path+":")
		}
	}
	return false
}
