package cli

import (
	"runtime"
	"runtime/debug"

	"webgw.dev/webgw"
)

type versionVerb struct{}

type versionJSON struct {
	Version  string `json:"version"`
	Protocol struct {
		Min int `json:"min"`
		Max int `json:"max"`
	} `json:"protocol"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
	Commit   string `json:"commit,omitempty"`
	Modified bool   `json:"modified,omitempty"` // built from a changed tree
}

// version reads what the toolchain has written into the binary.
func version() versionJSON {
	v := versionJSON{Version: "(devel)", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	v.Protocol.Min, v.Protocol.Max = webgw.MinProtocol, webgw.Protocol
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	if info.Main.Version != "" {
		v.Version = info.Main.Version
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Commit = s.Value
		case "vcs.modified":
			v.Modified = s.Value == "true"
		}
	}
	return v
}

func (*versionVerb) Run(a *app) error {
	v := version()
	if a.json {
		return a.printJSON(v)
	}
	a.printf("webgw %s\nprotocol %d to %d\n%s %s\n", v.Version, v.Protocol.Min, v.Protocol.Max, v.Go, v.Platform)
	if v.Commit != "" {
		changed := ""
		if v.Modified {
			changed = ", changed"
		}
		a.printf("commit %s%s\n", v.Commit, changed)
	}
	return nil
}
