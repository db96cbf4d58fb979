package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"webgw.dev/webgw"
	"webgw.dev/webgw/client/manifest"
)

// fail prints an error and returns the exit code for it.
func (a *app) fail(err error) int {
	e, known := errors.AsType[*webgw.Error](err)
	if !known {
		e = &webgw.Error{Kind: webgw.Internal, Public: err.Error()}
		if errors.Is(err, context.Canceled) {
			e = &webgw.Error{Kind: webgw.Unavailable, Public: "stopped before it was done"}
		}
	}
	at, hasPlace := errors.AsType[*manifest.Error](err)
	if a.json {
		var out errorJSON
		out.Error.Kind, out.Error.Field, out.Error.Message, out.Error.Hint = e.Kind, e.Field, e.Public, e.Hint
		if hasPlace {
			out.Error.File, out.Error.Line, out.Error.Column = at.File, at.Line, at.Col
		}
		// A failure to write to standard error can't be told to anybody.
		json.NewEncoder(a.env.Stderr).Encode(out)
		return exitCode(e.Kind)
	}
	sentence := e.Sentence()
	if hasPlace {
		sentence = at.Error()
	}
	if e.Kind == webgw.Internal && e.Err != nil {
		sentence += " (" + e.Err.Error() + ")"
	}
	a.notef("webgw: error: %s\n", printable(sentence))
	hint := e.Hint
	if hint == "" && e.Kind == webgw.Unavailable && e.Err != nil {
		hint = e.Err.Error() // what the system said
	}
	if hint != "" {
		a.notef("hint: %s\n", printable(hint))
	}
	return exitCode(e.Kind)
}

// errorJSON is an error as programs see it.
type errorJSON struct {
	Error struct {
		Kind    webgw.ErrorKind `json:"kind"`
		Field   string          `json:"field,omitempty"`
		Message string          `json:"message"`
		Hint    string          `json:"hint,omitempty"`
		File    string          `json:"file,omitempty"`
		Line    int             `json:"line,omitempty"`
		Column  int             `json:"column,omitempty"`
	} `json:"error"`
}

func exitCode(k webgw.ErrorKind) int {
	switch k {
	case webgw.Invalid:
		return exitInvalid
	case webgw.NotFound:
		return exitNotFound
	case webgw.Unauthenticated, webgw.Forbidden:
		return exitDenied
	}
	return exitFailure
}

// printable keeps what others have written from steering the terminal, and
// from showing as something else than it is: controls, marks of direction and
// what has no width (Unicode Cf), separators of lines, bytes that are not UTF-8.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r != '\t' && unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

// printableLines is printable for text of several lines.
func printableLines(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		lines[i] = printable(l)
	}
	return strings.Join(lines, "\n")
}

// printJSON writes one value on one line, so that several make a stream.
func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.env.Stdout)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// table prints rows in columns; the first row is the head.
func (a *app) table(rows [][]string) error {
	w := tabwriter.NewWriter(a.env.Stdout, 0, 8, 2, ' ', 0)
	for _, r := range rows {
		cells := make([]string, len(r))
		for i, c := range r {
			cells[i] = strings.ReplaceAll(printable(c), "\t", " ")
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	return w.Flush()
}

// size writes a number of bytes for people.
func size(n int64) string {
	const units = "kMGTPE"
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1000, 0
	for f >= 999.5 && i < len(units)-1 {
		f /= 1000
		i++
	}
	return fmt.Sprintf("%.3g %cB", f, units[i])
}

// took writes a short length of time for people.
func took(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return "<1 ms"
	case d < 10*time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return d.Round(time.Second).String()
}

// count writes how many there are of something.
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// until writes how far away a time is, in the unit that matters.
func until(t, now time.Time) string {
	d := t.Sub(now)
	if d < 0 {
		return "expired"
	}
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%dd", int(d.Hours())/24)
	case d >= 2*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	case d >= 2*time.Minute:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	}
	return fmt.Sprintf("%ds", int(d.Seconds()))
}

func invalid(field, hint, format string, args ...any) error {
	return &webgw.Error{Kind: webgw.Invalid, Field: field, Public: fmt.Sprintf(format, args...), Hint: hint}
}
