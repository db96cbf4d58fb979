package webgw

import (
	"errors"
	"fmt"
	"strings"
)

// ErrorKind is a stable, documented code (docs/errors.md). Codes are never
// renamed or reused.
type ErrorKind string

const (
	// Invalid: the input breaks a rule; Field and Public say which.
	Invalid ErrorKind = "invalid"
	// Unauthenticated: no identity, or a signature that does not verify.
	Unauthenticated ErrorKind = "unauthenticated"
	// Forbidden: a known identity that may not do this.
	Forbidden ErrorKind = "forbidden"
	// NotFound: no such thing, or none that the asker may see.
	NotFound ErrorKind = "not_found"
	// Taken: a name or port that another owner or exposure holds.
	Taken ErrorKind = "taken"
	// Stale: the owner sequence is not above what is already known.
	Stale ErrorKind = "stale"
	// Expired: the record or certificate is past its end.
	Expired ErrorKind = "expired"
	// Exhausted: a quota or limit is reached; trying later may help.
	Exhausted ErrorKind = "exhausted"
	// Unavailable: the other side can't be reached or is stopping.
	Unavailable ErrorKind = "unavailable"
	// Unsupported: a version or feature that this release doesn't speak.
	Unsupported ErrorKind = "unsupported"
	// Internal: our fault; the log has the cause.
	Internal ErrorKind = "internal"
)

// Error is the one error type that crosses rooms. Public is a single sentence
// that may be shown to whoever asked; Err is the cause, for logs only.
type Error struct {
	Op     string    // what was being done, "declare exposure"
	Kind   ErrorKind // stable code
	Field  string    // path of the wrong field, "targets[0].address", or ""
	Public string    // one sentence for people
	Hint   string    // what to try, or ""
	Err    error     // cause, not shown to others, or nil
}

// Error gives operation, public sentence and cause, for logs.
func (e *Error) Error() string {
	var b strings.Builder
	if e.Op != "" {
		b.WriteString(e.Op + ": ")
	}
	b.WriteString(e.Sentence())
	if e.Err != nil {
		fmt.Fprintf(&b, " (%v)", e.Err)
	}
	return b.String()
}

// Sentence gives the field and the public sentence without operation or cause.
func (e *Error) Sentence() string {
	s := e.Public
	if s == "" {
		s = string(e.Kind)
	}
	if e.Field != "" {
		s = e.Field + ": " + s
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// KindOf returns the kind of the first *Error in err's tree, Internal for any
// other error, and "" for nil.
func KindOf(err error) ErrorKind {
	if err == nil {
		return ""
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Internal
}

// invalid is the shape of every validation error.
func invalid(field, format string, args ...any) error {
	return &Error{Kind: Invalid, Field: field, Public: fmt.Sprintf(format, args...)}
}

// in prefixes the field of a validation error with the path of its parent.
func in(parent string, err error) error {
	e, ok := errors.AsType[*Error](err)
	if !ok || err == nil {
		return err
	}
	c := *e
	switch {
	case c.Field == "":
		c.Field = parent
	case strings.HasPrefix(c.Field, "["):
		c.Field = parent + c.Field
	default:
		c.Field = parent + "." + c.Field
	}
	return &c
}
