// Package jaeger builds Jaeger, the viewer of traces that the sandbox runs, by
// the recipe in build.sh. Nothing of Jaeger is linked into Quorate.
package jaeger

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

//go:embed build.sh
var recipe string

// Version is the release that the recipe builds.
func Version() string {
	_, rest, _ := strings.Cut(recipe, "\nversion=")
	version, _, _ := strings.Cut(rest, "\n")
	return version
}

// Binary returns Jaeger's all-in-one server, building it into the user's cache
// directory the first time. That takes minutes, the Go toolchain, and the Go
// module proxy.
func Binary(ctx context.Context) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find a place for Jaeger: %w", err)
	}
	file := filepath.Join(cache, "quorate", "jaeger-"+Version())
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	cmd := exec.CommandContext(ctx, "bash", "-s", "--", file)
	cmd.Stdin = strings.NewReader(recipe)
	// What is broken off ends with all that it runs: a compiler left over would go
	// on for minutes, and its output be waited for.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build Jaeger: %w\n%s", err, out)
	}
	return file, nil
}
