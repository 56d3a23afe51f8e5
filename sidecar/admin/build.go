package admin

import (
	"cmp"
	"runtime"
	"runtime/debug"
)

// version is set by the linker in released builds.
var version string

// Build tells which build this program is; Protocol and Postgres are left to
// whoever knows them.
func Build() VersionInfo {
	v := VersionInfo{Version: cmp.Or(version, "devel"), Commit: "unknown", GoVersion: runtime.Version()}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	modified := ""
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Commit = s.Value[:min(12, len(s.Value))]
		case "vcs.modified":
			if s.Value == "true" {
				modified = "+changes"
			}
		}
	}
	v.Commit += modified
	return v
}
