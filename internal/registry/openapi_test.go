package registry

import (
	"encoding"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"

	"webgw.dev/webgw"
)

// What the document says of an exposure's body has the fields of the Go type.
func TestExposureIsDocumented(t *testing.T) {
	s := loadSchema(t)
	compareFields(t, "exposure", reflect.TypeFor[webgw.Exposure](), s.doc.Components.Schemas["Exposure"].Value)
	compareFields(t, "zone", reflect.TypeFor[webgw.Zone](), s.doc.Components.Schemas["Zone"].Value)
}

func compareFields(t *testing.T, path string, typ reflect.Type, s *openapi3.Schema) {
	t.Helper()
	for typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	if reflect.PointerTo(typ).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()) {
		if !s.Type.Is("string") {
			t.Errorf("%s is not text", path)
		}
		return
	}
	switch typ.Kind() {
	case reflect.Slice:
		if !s.Type.Is("array") {
			t.Errorf("%s is not a list", path)
			return
		}
		compareFields(t, path+"[]", typ.Elem(), s.Items.Value)
	case reflect.Struct:
		fields := map[string]bool{}
		for i := range typ.NumField() {
			name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			fields[name] = true
			if p := s.Properties[name]; p != nil {
				compareFields(t, path+"."+name, typ.Field(i).Type, p.Value)
			}
		}
		in, documented := slices.Sorted(maps.Keys(fields)), slices.Sorted(maps.Keys(s.Properties))
		if !slices.Equal(in, documented) {
			t.Errorf("%s has %v, documented are %v", path, in, documented)
		}
	}
}
