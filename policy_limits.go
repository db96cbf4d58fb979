package webgw

import (
	"slices"
	"strings"
)

// Compress lets the gateway compress answers that the workload has not.
type Compress struct {
	Types   []string `json:"types,omitempty"`   // content types, "text/*" too; none: the usual ones of texts
	MinSize int64    `json:"minSize,omitempty"` // bytes, of answers that tell their length; 0: 1024
}

const (
	maxTypes   = 64
	maxMinSize = 1 << 30
)

func (c *Compress) validate() error {
	if c == nil {
		return nil
	}
	if len(c.Types) > maxTypes {
		return invalid("types", "holds more than %d", maxTypes)
	}
	for i, t := range c.Types {
		kind, sub, ok := strings.Cut(t, "/")
		if !ok || !isTypeName(kind) || sub != "*" && !isTypeName(sub) {
			return invalid(index("types", i), "%q is not a content type in lower case without parameters, such as text/html or text/*", clip(t, 60))
		}
		if slices.Contains(c.Types[:i], t) {
			return invalid(index("types", i), "stands twice")
		}
	}
	if c.MinSize < 0 || c.MinSize > maxMinSize {
		return invalid("minSize", "must be a number of bytes up to 2^30")
	}
	return nil
}

// isTypeName reports whether s is a half of a content type (RFC 6838 section
// 4.2), in lower case.
func isTypeName(s string) bool {
	return s != "" && len(s) <= 127 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789!#$&-^_.+") == ""
}

func checkCountries(field string, list []string) error {
	for i, c := range list {
		if len(c) != 2 || strings.Trim(c, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") != "" {
			return invalid(index(field, i), "%q is not a country's code of two capitals, such as BE", clip(c, 20))
		}
		if slices.Contains(list[:i], c) {
			return invalid(index(field, i), "stands twice")
		}
	}
	return nil // two letters, each once: there can't be many
}
