// Package internal_test holds the one test that keeps the rooms apart.
package internal_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "webgw.dev/webgw"

var (
	ground  = []string{"", "internal/run", "internal/netx", "internal/netx/memnet", "internal/ident", "internal/idn"}
	engines = []string{"internal/ingress", "internal/tunnel", "internal/authdns", "internal/certs", "internal/overlay", "internal/live", "internal/store", "internal/store/etcdkv", "internal/store/memkv"}
)

// rooms says what of this module each room may import, packages below it
// included; "" is the root package. Whatever a room owns below itself it may
// import. nil: everything.
var rooms = map[string][]string{
	"":                 {},
	"internal/run":     {},
	"internal/netx":    {},
	"internal/ident":   {""},
	"internal/idn":     {""},
	"internal/store":   {"", "internal/run"},
	"internal/tunnel":  ground,
	"internal/ingress": ground,
	"internal/authdns": ground,
	"internal/certs":   ground,
	"internal/overlay": ground,
	"internal/live":    ground,

	"client":            ground,
	"internal/registry": slices.Concat(ground, []string{"internal/store"}),
	"internal/gateway":  slices.Concat(ground, engines, []string{"client"}),
	"internal/node":     slices.Concat(ground, engines, []string{"client"}),

	"internal/cli":    slices.Concat(ground, []string{"client", "internal/daemon"}),
	"internal/daemon": nil,
	"internal/world":  nil,
	"cmd":             nil,
	"bench":           nil,
	"web":             {},
}

// roomOf returns the longest room that dir lies in.
func roomOf(dir string) (room string, ok bool) {
	for r := range rooms {
		if inRoom(dir, r) && len(r) >= len(room) {
			room, ok = r, true
		}
	}
	return room, ok
}

// inRoom reports whether dir is room or lies below it; only the root package
// itself is in the room "".
func inRoom(dir, room string) bool {
	return dir == room || room != "" && strings.HasPrefix(dir, room+"/")
}

// imports calls f for each import of each file that is not a test.
func imports(t *testing.T, f func(file, dir, path string)) {
	t.Helper()
	err := filepath.WalkDir("..", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		base := d.Name()
		if d.IsDir() && (base == "testdata" || base == "node_modules" || base != ".." && strings.HasPrefix(base, ".")) {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(base, ".go") || strings.HasSuffix(base, "_test.go") {
			return nil
		}
		file, err := filepath.Rel("..", name)
		if err != nil {
			return err
		}
		file = filepath.ToSlash(file)
		dir := strings.TrimSuffix(strings.TrimSuffix(file, base), "/")
		src, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, i := range src.Imports {
			path, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			f(file, dir, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestRoomsImportOnlyWhatTheyMay(t *testing.T) {
	seen := 0
	imports(t, func(file, dir, path string) {
		room, ok := roomOf(dir)
		if !ok {
			t.Errorf("%s lies in no room that the table knows", file)
			return
		}
		own, inside := strings.CutPrefix(path, module+"/")
		if path == module {
			own, inside = "", true
		}
		if !inside {
			return
		}
		seen++
		may := rooms[room]
		if may == nil || room != "" && inRoom(own, room) {
			return
		}
		if !slices.ContainsFunc(may, func(r string) bool { return inRoom(own, r) }) {
			t.Errorf("%s imports %s, which the room %q must not know", file, path, room)
		}
	})
	if seen == 0 {
		t.Error("not one import was looked at")
	}
}

func TestEnginesDoNotKnowEachOther(t *testing.T) {
	for _, e := range engines {
		room, ok := roomOf(e)
		if !ok {
			t.Errorf("%s is no room", e)
		}
		for _, may := range rooms[room] {
			if slices.Contains(engines, may) {
				t.Errorf("the table lets %s import %s", e, may)
			}
		}
	}
}

// The vocabulary, run and netx stand on the standard library alone (netx also on
// x/sys, for what sockets offer); the vocabulary does without net/http too.
func TestGroundStandsOnTheStandardLibrary(t *testing.T) {
	imports(t, func(file, dir, path string) {
		first, _, _ := strings.Cut(path, "/")
		foreign := strings.Contains(first, ".") && path != module && !strings.HasPrefix(path, module+"/") &&
			!(dir == "internal/netx" && strings.HasPrefix(path, "golang.org/x/sys/"))
		bare := dir == "" || inRoom(dir, "internal/run") || inRoom(dir, "internal/netx")
		if bare && foreign {
			t.Errorf("%s imports %s", file, path)
		}
		if dir == "" && (path == "net/http" || path == "crypto/tls" || path == "os") {
			t.Errorf("%s imports %s: the vocabulary does no I/O", file, path)
		}
	})
}

func TestRoomOf(t *testing.T) {
	for dir, want := range map[string]string{
		"":                      "",
		"internal/netx/memnet":  "internal/netx",
		"internal/store/etcdkv": "internal/store",
		"internal/tunnel/x/y":   "internal/tunnel",
		"cmd/webgw":             "cmd",
	} {
		if got, ok := roomOf(dir); !ok || got != want {
			t.Errorf("%s is in room %q, want %q", dir, got, want)
		}
	}
	for _, dir := range []string{"internal", "internal/tunnels", "util"} {
		if room, ok := roomOf(dir); ok {
			t.Errorf("%s is in room %q", dir, room)
		}
	}
}
