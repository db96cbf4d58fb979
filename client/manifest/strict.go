package manifest

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"webgw.dev/webgw"
)

// Limits of YAML input.
const (
	MaxSize      = 1 << 20 // bytes of one file
	MaxDocuments = 1000    // in one file
	maxDepth     = 16      // of nesting; no type of ours needs more than four
)

// Place is where something stands in a file.
type Place struct {
	File      string
	Line, Col int // from 1; 0: unknown
}

// String gives "file:line:col".
func (p Place) String() string {
	if p.Line == 0 {
		return p.File
	}
	return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Col)
}

// Error is an error at a place in a YAML file.
type Error struct {
	Place
	Err *webgw.Error
}

// Error gives "file:line:col: field: sentence".
func (e *Error) Error() string { return e.Place.String() + ": " + e.Err.Sentence() }

// Unwrap returns the error without its place.
func (e *Error) Unwrap() error { return e.Err }

// place is where something stands in a file.
type place struct{ line, col int }

func placeOf(t *token.Token) place {
	if t == nil || t.Position == nil {
		return place{}
	}
	return place{t.Position.Line, t.Position.Column}
}

// document is one YAML document of a file.
type document struct {
	file string
	root *ast.MappingNode
	// Where each field stands, by path ("targets[0].address"); "" is the start.
	places map[string]place
}

func (d *document) place(at place) Place { return Place{d.file, at.line, at.col} }

func (d *document) errorAt(at place, field, format string, args ...any) error {
	return &Error{d.place(at), &webgw.Error{Op: "read YAML", Kind: webgw.Invalid, Field: field, Public: fmt.Sprintf(format, args...)}}
}

// locate gives an error that names a field the place of that field, or of the
// nearest thing around it.
func (d *document) locate(err error) error {
	if _, ok := errors.AsType[*Error](err); ok {
		return err
	}
	e, ok := errors.AsType[*webgw.Error](err)
	if !ok {
		return err
	}
	field := e.Field
	for {
		if at, ok := d.places[field]; ok {
			return &Error{d.place(at), e}
		}
		if field == "" {
			return &Error{Place{File: d.file}, e}
		}
		field = field[:max(strings.LastIndexAny(field, ".["), 0)]
	}
}

// DecodeFile reads a file of exactly one YAML document, or none, into the
// struct that v points to. Every field of the file must be a field of the
// struct (by its yaml or json tag) and of its type; the *Error names the place.
// given maps the path of each field in the file ("gateway.tls-addr",
// "node.owners[0]") to its place.
func DecodeFile(file string, data []byte, v any) (given map[string]Place, err error) {
	docs, err := split(file, data)
	if err != nil || len(docs) == 0 {
		return nil, err
	}
	if len(docs) > 1 {
		return nil, docs[1].errorAt(docs[1].places[""], "", "a second document, where one is enough")
	}
	if err := docs[0].decode(v); err != nil {
		return nil, err
	}
	given = map[string]Place{}
	for path, at := range docs[0].places {
		if path != "" {
			given[path] = docs[0].place(at)
		}
	}
	return given, nil
}

// split parses data into documents, empty ones left out.
func split(file string, data []byte) ([]*document, error) {
	d := &document{file: file}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	if len(data) > MaxSize {
		return nil, d.errorAt(place{}, "", "the file is larger than %d KiB", MaxSize>>10)
	}
	// The parser calls itself for each level: the depth is judged first.
	tokens := lexer.Tokenize(string(data))
	if err := d.checkTokens(tokens); err != nil {
		return nil, err
	}
	f, err := parser.Parse(tokens, 0)
	if err != nil {
		if y, ok := errors.AsType[interface {
			error
			GetToken() *token.Token
			GetMessage() string
		}](err); ok {
			return nil, d.errorAt(placeOf(y.GetToken()), "", "%s", y.GetMessage())
		}
		return nil, d.errorAt(place{}, "", "this is not YAML: %v", err)
	}
	var out []*document
	for _, doc := range f.Docs {
		if doc.Body == nil || doc.Body.Type() == ast.NullType {
			continue
		}
		if len(out) == MaxDocuments {
			return nil, d.errorAt(placeOf(doc.Body.GetToken()), "", "the file holds more than %d documents", MaxDocuments)
		}
		one := &document{file: file, places: map[string]place{}}
		switch b := doc.Body.(type) {
		case *ast.MappingNode:
			one.root = b
		case *ast.MappingValueNode:
			one.root = &ast.MappingNode{BaseNode: &ast.BaseNode{}, Start: b.Start, Values: []*ast.MappingValueNode{b}}
		default:
			return nil, d.errorAt(placeOf(b.GetToken()), "", "a document must hold fields (name: value), not %s", describe(b))
		}
		if len(one.root.Values) > 0 {
			one.places[""] = placeOf(one.root.Values[0].Key.GetToken())
		}
		out = append(out, one)
	}
	return out, nil
}

// checkTokens refuses what could make a small file large or deep: anchors,
// aliases, merge keys and tags, none of which a manifest needs, and nesting.
func (d *document) checkTokens(tokens token.Tokens) error {
	flow, line, onLine := 0, 0, 0
	indents := []int{}
	for _, t := range tokens {
		at := placeOf(t)
		switch t.Type {
		case token.AnchorType, token.AliasType, token.MergeKeyType:
			return d.errorAt(at, "", "anchors and aliases are not read here; write the value out")
		case token.TagType:
			return d.errorAt(at, "", "tags (!…) are not read here")
		case token.DirectiveType:
			return d.errorAt(at, "", "directives (%%…) are not read here")
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow--
		case token.SequenceEntryType, token.MappingKeyType, token.MappingValueType:
			// Each opens at most one level, deeper than those to its left.
			if at.line != line {
				line, onLine = at.line, 0
			}
			if t.Type != token.MappingValueType || flow == 0 {
				onLine++
			}
			col := at.col
			for len(indents) > 0 && indents[len(indents)-1] >= col {
				indents = indents[:len(indents)-1]
			}
			if flow == 0 {
				indents = append(indents, col)
			}
		}
		if flow > maxDepth || onLine > maxDepth || len(indents) > 2*maxDepth {
			return d.errorAt(at, "", "nested deeper than %d levels", maxDepth)
		}
	}
	return nil
}

func (d *document) decode(v any) error { return d.value("", d.root, reflect.ValueOf(v).Elem()) }

// placed is a value that wants to know where it stands.
type placed interface{ setPlace(path string, at place) }

func (d *document) value(path string, n ast.Node, v reflect.Value) error {
	at := placeOf(n.GetToken())
	if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 {
		at = placeOf(m.Values[0].Key.GetToken())
	}
	if path != "" {
		d.places[path] = at
	}
	if p, ok := v.Addr().Interface().(placed); ok {
		p.setPlace(path, at)
	}
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		text, err := d.text(path, n, "text")
		if err != nil {
			return err
		}
		if err := u.UnmarshalText([]byte(text)); err != nil {
			if e, ok := errors.AsType[*webgw.Error](err); ok {
				return d.errorAt(at, path, "%s", e.Sentence())
			}
			return d.errorAt(at, path, "%q can't be read: %v", clip(text), err)
		}
		return nil
	}
	wrong := func(want string) error { return d.errorAt(at, path, "must be %s, not %s", want, describe(n)) }
	switch v.Kind() {
	case reflect.Struct:
		var values []*ast.MappingValueNode
		switch m := n.(type) {
		case *ast.MappingNode:
			values = m.Values
		case *ast.MappingValueNode:
			values = []*ast.MappingValueNode{m}
		default:
			return wrong("a group of fields")
		}
		return d.fields(path, values, v)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		return d.value(path, n, v.Elem())
	case reflect.Map: // of text to text
		var values []*ast.MappingValueNode
		switch m := n.(type) {
		case *ast.MappingNode:
			values = m.Values
		case *ast.MappingValueNode:
			values = []*ast.MappingValueNode{m}
		default:
			return wrong("a group of fields")
		}
		v.Set(reflect.MakeMap(v.Type()))
		for _, kv := range values {
			at := placeOf(kv.Key.GetToken())
			key, ok := kv.Key.(*ast.StringNode)
			if !ok {
				return d.errorAt(at, path, "the name of a field must be plain text")
			}
			field := path + "." + key.Value
			if v.MapIndex(reflect.ValueOf(key.Value)).IsValid() {
				return d.errorAt(at, field, "stands twice")
			}
			text := reflect.New(v.Type().Elem()).Elem()
			if err := d.value(field, kv.Value, text); err != nil {
				return err
			}
			d.places[field] = at
			v.SetMapIndex(reflect.ValueOf(key.Value), text)
		}
	case reflect.Slice:
		s, ok := n.(*ast.SequenceNode)
		if !ok {
			return wrong("a list")
		}
		v.Set(reflect.MakeSlice(v.Type(), len(s.Values), len(s.Values)))
		for i, e := range s.Values {
			if err := d.value(fmt.Sprintf("%s[%d]", path, i), e, v.Index(i)); err != nil {
				return err
			}
		}
	case reflect.String:
		text, err := d.text(path, n, "text")
		if err != nil {
			return err
		}
		if _, isNumber := n.(*ast.IntegerNode); isNumber && v.Type() != reflect.TypeFor[webgw.PortSet]() {
			return d.errorAt(at, path, "must be text, not a number; write it in quotes")
		}
		v.SetString(text)
	case reflect.Bool:
		b, ok := n.(*ast.BoolNode)
		if !ok {
			return wrong("true or false")
		}
		v.SetBool(b.Value)
	case reflect.Int, reflect.Int64, reflect.Uint16, reflect.Uint32:
		i, ok := n.(*ast.IntegerNode)
		if !ok {
			return wrong("a whole number")
		}
		var num int64
		switch x := i.Value.(type) {
		case int64:
			num = x
		case uint64:
			num = int64(min(x, math.MaxInt64))
		}
		if v.CanUint() {
			if most := int64(1)<<v.Type().Bits() - 1; num < 0 || num > most {
				return d.errorAt(at, path, "%s is not a number from 0 to %d", clip(i.String()), most)
			}
			v.SetUint(uint64(num))
			return nil
		}
		v.SetInt(num)
	default:
		return d.errorAt(at, path, "can't be set here") // no type of ours comes here
	}
	return nil
}

// text returns a scalar as it is written.
func (d *document) text(path string, n ast.Node, want string) (string, error) {
	switch s := n.(type) {
	case *ast.StringNode:
		return s.Value, nil
	case *ast.LiteralNode:
		return s.Value.Value, nil
	case *ast.IntegerNode:
		return s.Token.Value, nil
	}
	return "", d.errorAt(placeOf(n.GetToken()), path, "must be %s, not %s", want, describe(n))
}

func (d *document) fields(path string, values []*ast.MappingValueNode, v reflect.Value) error {
	known := map[string]reflect.Value{}
	var names []string
	collect(v, known, &names)
	seen := map[string]bool{}
	for _, kv := range values {
		at := placeOf(kv.Key.GetToken())
		key, ok := kv.Key.(*ast.StringNode)
		if !ok {
			return d.errorAt(at, path, "the name of a field must be plain text")
		}
		field := key.Value
		if path != "" {
			field = path + "." + key.Value
		}
		target, ok := known[key.Value]
		switch {
		case !ok:
			e := &webgw.Error{Op: "read YAML", Kind: webgw.Invalid, Field: clip(field), Public: "there is no such field", Hint: suggest(key.Value, names)}
			return &Error{d.place(at), e}
		case seen[key.Value]:
			return d.errorAt(at, field, "stands twice")
		}
		seen[key.Value] = true
		if err := d.value(field, kv.Value, target); err != nil {
			return err
		}
		d.places[field] = at // of its name: that is what people look for
	}
	return nil
}

// collect gathers the fields of a struct by the names that files use,
// embedded ones included.
func collect(v reflect.Value, known map[string]reflect.Value, names *[]string) {
	for i := range v.NumField() {
		f := v.Type().Field(i)
		tag, has := f.Tag.Lookup("yaml")
		if !has {
			tag = f.Tag.Get("json")
		}
		name, options, _ := strings.Cut(tag, ",")
		switch {
		case name == "-" || !f.IsExported() && !f.Anonymous:
		case f.Anonymous && (name == "" || options == "inline"):
			collect(v.Field(i), known, names)
		default:
			if name == "" {
				name = f.Name
			}
			known[name] = v.Field(i)
			*names = append(*names, name)
		}
	}
}

// suggest names the known field that was probably meant, or all of them.
func suggest(got string, names []string) string {
	for _, n := range names {
		if got = strings.ReplaceAll(got, "_", "-"); strings.EqualFold(got, n) || near(got, n) {
			return "did you mean " + n + "?"
		}
	}
	return "known here: " + strings.Join(names, ", ")
}

// near reports whether a becomes b by one letter changed, added, left out or
// swapped with its neighbour.
func near(a, b string) bool {
	if len(a) < 3 || len(b) < 3 {
		return false
	}
	i := 0
	for i < len(a) && i < len(b) && a[i] == b[i] {
		i++
	}
	a, b = a[i:], b[i:]
	switch {
	case len(a) == len(b)+1:
		return a[1:] == b
	case len(b) == len(a)+1:
		return b[1:] == a
	case len(a) == len(b):
		return len(a) > 0 && (a[1:] == b[1:] || len(a) > 1 && a[0] == b[1] && a[1] == b[0] && a[2:] == b[2:])
	}
	return false
}

// describe names what a node is, for people.
func describe(n ast.Node) string {
	switch n.(type) {
	case *ast.NullNode:
		return "nothing"
	case *ast.BoolNode:
		return "true or false"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "a number"
	case *ast.StringNode, *ast.LiteralNode:
		return "text"
	case *ast.SequenceNode:
		return "a list"
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a group of fields"
	}
	return "this"
}

func clip(s string) string {
	if r := []rune(s); len(r) > 60 {
		s = string(r[:60]) + "…"
	}
	return strings.ToValidUTF8(s, "�")
}
