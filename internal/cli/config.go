package cli

import (
	"cmp"
	"io"
	"net/url"
	"slices"
	"strings"

	"github.com/alecthomas/kong"

	"webgw.dev/webgw/internal/netx"
)

type configVerb struct {
	Check configCheck `cmd:"" help:"Check the settings and print each with its source."`
}

type configCheck struct {
	File string `arg:"" optional:"" help:"The settings file; none is the one that would be used." type:"path"`
}

type settingJSON struct {
	Section string   `json:"section"`
	Field   string   `json:"field"`
	Value   []string `json:"value"` // more than one for lists only
	Source  string   `json:"source"`
}

func (v *configCheck) Run(a *app) error {
	if v.File != "" {
		a.settings.given, a.settings.path = nil, ""
		if err := a.settings.read(v.File); err != nil {
			return err
		}
	}
	var all []settingJSON
	// Each role's settings come by the same way as when it runs.
	for _, section := range []string{"registry", "gateway", "node"} {
		some, err := a.effective(section)
		if err != nil {
			return err
		}
		all = append(all, some...)
	}
	some, err := a.effective("whoami")
	if err != nil {
		return err
	}
	all = append(all, some...)
	if a.json {
		return a.printJSON(struct {
			File     string        `json:"file,omitempty"`
			Settings []settingJSON `json:"settings"`
		}{a.settings.path, all})
	}
	if a.settings.path == "" {
		a.printf("no settings file\n")
	} else {
		a.printf("%s is good\n", a.settings.path)
	}
	if len(all) == 0 {
		return nil
	}
	rows := [][]string{{"SETTING", "VALUE", "SOURCE"}}
	for _, s := range all {
		rows = append(rows, []string{s.Section + "." + s.Field, strings.Join(s.Value, ","), s.Source})
	}
	return a.table(rows)
}

// effective parses a verb without arguments and returns its settings that are
// not empty. A role for which nothing is set need not be complete.
func (a *app) effective(verb string) ([]settingJSON, error) {
	var g grammar
	one := &app{env: a.env, settings: &settings{getenv: a.getenv, path: a.settings.path, file: a.settings.file, given: a.settings.given}}
	one.env.Stdout, one.env.Stderr = io.Discard, io.Discard
	parser, err := one.newParser(&g)
	if err != nil {
		return nil, err
	}
	k, err := parser.Parse([]string{verb})
	isSet := false
	for _, at := range one.settings.source {
		isSet = isSet || at.from != "default" && at.section == verb
	}
	switch {
	case err != nil && isSet:
		return nil, one.usage(err)
	case err != nil: // a role that is not meant to run here
		return nil, nil
	}
	var out []settingJSON
	for _, flag := range k.Selected().Flags {
		at, ok := one.settings.source[flag]
		if !ok || at.section != verb && at.section != "owner" {
			continue
		}
		if s := (settingJSON{at.section, at.field, shown(flag), at.from}); len(s.Value) > 0 && (at.from != "default" || isSet) {
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(x, y settingJSON) int {
		return cmp.Or(cmp.Compare(x.Section, y.Section), cmp.Compare(x.Field, y.Field))
	})
	return out, nil
}

// values writes what a flag holds, in the form in which it is given; none when
// it is empty. Passwords in URLs are left out.
func values(flag *kong.Flag) (out []string) {
	if flag.Target.IsZero() {
		return nil
	}
	if !flag.IsSlice() {
		return []string{redact(text(flag.Target))}
	}
	for i := range flag.Target.Len() {
		out = append(out, redact(text(flag.Target.Index(i))))
	}
	return out
}

func redact(s string) string {
	if u, err := url.Parse(s); err == nil && u.User != nil && u.Host != "" {
		return u.Redacted()
	}
	return s
}

// shown are a flag's values without what is secret in them.
func shown(flag *kong.Flag) []string {
	out := values(flag)
	if flag.Name == "proxy" && len(out) > 0 {
		u, err := netx.ParseProxy(out[0])
		if err != nil {
			return []string{"(not valid)"}
		}
		out[0] = u.Redacted()
	}
	return out
}
