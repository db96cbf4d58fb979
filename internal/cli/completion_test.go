package cli

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// script prints the completion of a shell by the command itself.
func script(t *testing.T, shell string) string {
	t.Helper()
	var out strings.Builder
	if code := Main(t.Context(), []string{"completion", shell}, Env{Stdout: &out, Stderr: io.Discard, Getenv: func(string) string { return "" }}); code != 0 {
		t.Fatalf("exit %d", code)
	}
	return out.String()
}

func TestBashCompletes(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("there is no bash here")
	}
	file := script(t, "bash")
	for line, want := range map[string]string{
		"webgw ex":                          "expose",
		"webgw expose t":                    "tcp tls",
		"webgw expose http --dom":           "--domain",
		"webgw expose http --json --na":     "--name",
		"webgw expose http --upstream h":    "http1 h2c h2",
		"webgw get ex":                      "exposure",
		"webgw completion f":                "fish",
		"webgw --js":                        "--json",
		"webgw gateway --tls":               "--tls-addr",
		"webgw config ch":                   "check",
		"webgw apply --dry":                 "--dry-run",
		"webgw --config x.yaml describe fa": "farm",
	} {
		words := strings.Fields(line)
		run := file + "\nCOMP_WORDS=(" + line + ")\nCOMP_CWORD=" + string(rune('0'+len(words)-1)) + "\n_webgw\necho \"${COMPREPLY[*]}\"\n"
		out, err := exec.Command(bash, "--norc", "-c", run).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
		if got := strings.TrimSpace(string(out)); got != want {
			t.Errorf("%q completes to %q, want %q", line, got, want)
		}
	}
}

func TestFishCompletes(t *testing.T) {
	fish, err := exec.LookPath("fish")
	if err != nil {
		t.Skip("there is no fish here")
	}
	file := filepath.Join(t.TempDir(), "webgw.fish")
	if err := os.WriteFile(file, []byte(script(t, "fish")), 0o600); err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]string{
		"webgw ex":                          "expose",
		"webgw expose http --dom":           "--domain",
		"webgw get ex":                      "exposure",
		"webgw completion f":                "fish",
		"webgw --js":                        "--json",
		"webgw gateway --tls":               "--tls-addr",
		"webgw config ch":                   "check",
		"webgw --config x.yaml describe fa": "farm",
	} {
		cmd := exec.Command(fish, "--no-config", "-c", "source $argv[1]; complete -C $argv[2]", file, line)
		cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
		var got []string
		for l := range strings.Lines(string(out)) {
			word, _, _ := strings.Cut(strings.TrimSpace(l), "\t") // a description follows
			got = append(got, word)
		}
		if g := strings.Join(got, " "); g != want {
			t.Errorf("%q completes to %q, want %q", line, g, want)
		}
	}
}

func TestOtherShellsRead(t *testing.T) {
	for shell, check := range map[string][]string{"zsh": {"-n"}, "fish": {"--no-execute"}} {
		file := script(t, shell)
		for _, want := range []string{"expose", "dry-run", "upstream", "completion"} {
			if !strings.Contains(file, want) {
				t.Errorf("%s: %q is missing", shell, want)
			}
		}
		path, err := exec.LookPath(shell)
		if err != nil {
			t.Logf("%s is not here; its script was only looked at", shell)
			continue
		}
		cmd := exec.Command(path, check...)
		cmd.Stdin = strings.NewReader(file)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", shell, err, out)
		}
	}
}
