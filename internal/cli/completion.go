package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/alecthomas/kong"

	"webgw.dev/webgw"
)

type completionVerb struct {
	Shell string `arg:"" enum:"bash,zsh,fish" help:"bash, zsh or fish."`
}

func (*completionVerb) Help() string {
	return "bash: source <(webgw completion bash)\n\nzsh: webgw completion zsh > a file _webgw in a directory of $fpath\n\nfish: webgw completion fish > ~/.config/fish/completions/webgw.fish"
}

func (v *completionVerb) Run(a *app) error {
	all := completions(a.parser.Model.Node)
	switch v.Shell {
	case "bash":
		a.printf("%s", bashCompletion(all))
	case "zsh":
		a.printf("%s", zshCompletion(all))
	case "fish":
		a.printf("%s", fishCompletion(all))
	}
	return nil
}

// completion is what may follow the words of one command.
type completion struct {
	path  string // "" for webgw itself, "/expose/http"
	words []option
	flags []option
}

type option struct {
	name, help string
	values     []string // of a flag, if they are few
	takesValue bool
}

// completions lists every command of the model, outer ones first.
func completions(root *kong.Node) []completion {
	var out []completion
	var walk func(n *kong.Node, path string, above []option)
	walk = func(n *kong.Node, path string, above []option) {
		c := completion{path: path, flags: slices.Clone(above)}
		for _, f := range n.Flags {
			if f.Hidden {
				continue
			}
			o := option{name: "--" + f.Name, help: f.Help, takesValue: !f.IsBool()}
			if f.Enum != "" {
				o.values = slices.DeleteFunc(f.EnumSlice(), func(s string) bool { return s == "" })
			}
			c.flags = append(c.flags, o)
			if f.Short != 0 {
				o.name = "-" + string(f.Short)
				c.flags = append(c.flags, o)
			}
		}
		for _, child := range n.Children {
			if !child.Hidden {
				c.words = append(c.words, option{name: child.Name, help: child.Help})
			}
		}
		if len(n.Positional) > 0 {
			p := n.Positional[0]
			switch {
			case p.Enum != "":
				for _, e := range p.EnumSlice() {
					c.words = append(c.words, option{name: e})
				}
			case p.Name == "kind":
				for _, k := range webgw.Kinds {
					c.words = append(c.words, option{name: string(k)})
				}
			}
		}
		out = append(out, c)
		for _, child := range n.Children {
			if !child.Hidden {
				walk(child, path+"/"+child.Name, c.flags)
			}
		}
	}
	walk(root, "", nil)
	return out
}

// paths lists those that a word can lead to.
func paths(all []completion) []string {
	var out []string
	for _, c := range all[1:] {
		out = append(out, c.path)
	}
	return out
}

func names(options []option) string {
	var out []string
	for _, o := range options {
		out = append(out, o.name)
	}
	return strings.Join(out, " ")
}

// withValue lists the flags after which a value comes, which may be a file.
func withValue(all []completion) []string {
	var out []string
	for _, c := range all {
		for _, f := range c.flags {
			if f.takesValue && len(f.values) == 0 && !slices.Contains(out, f.name) {
				out = append(out, f.name)
			}
		}
	}
	return out
}

func bashCompletion(all []completion) string {
	var b strings.Builder
	b.WriteString(`# bash completion of webgw
_webgw() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} path= words= flags= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$path/${COMP_WORDS[i]}" in
`)
	fmt.Fprintf(&b, "        %s) path=\"$path/${COMP_WORDS[i]}\" ;;\n        esac\n    done\n    COMPREPLY=()\n", strings.Join(paths(all), "|"))
	for _, c := range all {
		for _, f := range c.flags {
			if len(f.values) > 0 {
				fmt.Fprintf(&b, "    if [[ $path == '%s' && $prev == %s ]]; then COMPREPLY=($(compgen -W '%s' -- \"$cur\")); return; fi\n", c.path, f.name, strings.Join(f.values, " "))
			}
		}
	}
	fmt.Fprintf(&b, "    case \"$prev\" in\n    %s) COMPREPLY=($(compgen -f -- \"$cur\")); return ;;\n    esac\n    case \"$path\" in\n", strings.Join(withValue(all), "|"))
	for _, c := range all {
		fmt.Fprintf(&b, "    '%s') words='%s' flags='%s' ;;\n", c.path, names(c.words), names(c.flags))
	}
	b.WriteString(`    esac
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$cur"))
    else
        COMPREPLY=($(compgen -W "$words" -- "$cur"))
    fi
}
complete -o default -F _webgw webgw
`)
	return b.String()
}

func zshCompletion(all []completion) string {
	// Items of _describe are name:help, in single quotes.
	item := func(o option) string {
		return "'" + strings.ReplaceAll(strings.ReplaceAll(o.name+":"+strings.ReplaceAll(o.help, ":", `\:`), "'", `'\''`), "\n", " ") + "'"
	}
	items := func(options []option) string {
		var out []string
		for _, o := range options {
			out = append(out, item(o))
		}
		return strings.Join(out, " ")
	}
	var b strings.Builder
	b.WriteString(`#compdef webgw
_webgw() {
    local at= i
    local -a verbs flags
    for ((i = 2; i < CURRENT; i++)); do
        case "$at/${words[i]}" in
`)
	fmt.Fprintf(&b, "        (%s) at=\"$at/${words[i]}\" ;;\n        esac\n    done\n", strings.Join(paths(all), "|"))
	for _, c := range all {
		for _, f := range c.flags {
			if len(f.values) > 0 {
				fmt.Fprintf(&b, "    if [[ $at == '%s' && ${words[CURRENT-1]} == %s ]]; then compadd %s; return; fi\n", c.path, f.name, strings.Join(f.values, " "))
			}
		}
	}
	fmt.Fprintf(&b, "    case \"${words[CURRENT-1]}\" in\n    (%s) _files; return ;;\n    esac\n    case \"$at\" in\n", strings.Join(withValue(all), "|"))
	for _, c := range all {
		fmt.Fprintf(&b, "    ('%s') verbs=(%s) flags=(%s) ;;\n", c.path, items(c.words), items(c.flags))
	}
	b.WriteString(`    esac
    if [[ ${words[CURRENT]} == -* ]]; then
        _describe -o flag flags
    elif (( $#verbs )); then
        _describe verb verbs
    else
        _files
    fi
}
compdef _webgw webgw
`)
	return b.String()
}

func fishCompletion(all []completion) string {
	quote := func(s string) string {
		return "'" + strings.NewReplacer(`\`, `\\`, "'", `\'`, "\n", " ").Replace(s) + "'"
	}
	var b strings.Builder
	b.WriteString(`# fish completion of webgw
function __webgw_at
    set -l at ''
    for word in (commandline -opc)[2..-1]
`)
	fmt.Fprintf(&b, "        if contains -- \"$at/$word\" %s\n", strings.Join(paths(all), " "))
	b.WriteString(`            set at "$at/$word"
        end
    end
    test "$at" = "$argv[1]"
end
`)
	for _, c := range all {
		at := fmt.Sprintf("complete -c webgw -n \"__webgw_at '%s'\"", c.path)
		for _, w := range c.words {
			fmt.Fprintf(&b, "%s -f -a %s -d %s\n", at, w.name, quote(w.help))
		}
		for _, f := range c.flags {
			how := ""
			if f.takesValue {
				how = " -r"
			}
			if len(f.values) > 0 {
				how = " -x -a " + quote(strings.Join(f.values, " "))
			}
			name := "-l " + strings.TrimPrefix(f.name, "--")
			if !strings.HasPrefix(f.name, "--") {
				name = "-s " + f.name[1:]
			}
			fmt.Fprintf(&b, "%s %s%s -d %s\n", at, name, how, quote(f.help))
		}
	}
	return b.String()
}
