package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// run runs paxosctl with arguments, in a directory that holds no sandbox.
func runIn(t *testing.T, dir string, args ...string) (stdout string, code int, err error) {
	t.Helper()
	t.Chdir(dir)
	root := newRootCommand()
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(args)
	err = root.ExecuteContext(context.Background())
	return out.String(), exitCode(err), err
}

const describedSandbox = `{"version": 1, "cluster": "demo", "wan": "none", "regions": [
	{"name": "r1", "ports": {"postgres": 10001, "admin": 10002}, "admin": "127.0.0.1:10002"},
	{"name": "r2", "ports": {"postgres": 10003, "admin": 10004}, "admin": "127.0.0.1:10004"}]}`

func describe(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "sandbox.json"), []byte(describedSandbox), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestDSNOfTheSandboxHereOrAtDir(t *testing.T) {
	here, elsewhere := t.TempDir(), t.TempDir()
	describe(t, filepath.Join(here, ".sandbox"))
	describe(t, elsewhere)
	for _, args := range [][]string{
		{"dev", "dsn", "r2"},
		{"dev", "dsn", "r2", "--dir", elsewhere},
		{"--dir", elsewhere, "dev", "dsn", "r2"},
	} {
		out, code, err := runIn(t, here, args...)
		if out != "postgres://postgres@127.0.0.1:10003/app\n" || code != exitOK {
			t.Errorf("%q: %q, %v", args, out, err)
		}
	}
}

func TestDevErrors(t *testing.T) {
	empty, described := t.TempDir(), t.TempDir()
	describe(t, filepath.Join(described, ".sandbox"))
	for _, tc := range []struct {
		dir  string
		args string
		code int
		says string
	}{
		{empty, "dev dsn r1", exitError, "paxosctl dev up"},
		{empty, "dev down", exitError, "no sandbox"},
		{empty, "dev kill", exitUsage, "accepts 1 arg"},
		{empty, "dev partition", exitUsage, "at least 1 arg"},
		{empty, "dev frobnicate", exitUsage, "unknown command"},
		{empty, "dev up --wan mars", exitError, "wan"},
		{empty, "dev up --regions 99", exitError, "regions"},
		{empty, "dev up --otlp http://127.0.0.1:1 --jaeger", exitUsage, "exclude"},
		{described, "dev dsn r9", exitUsage, "there are r1, r2"},
		{described, "dev kill r1", exitError, "does not run"},
		{described, "dev status", exitError, "does not run"},
		{described, "dev up --regions 3", exitError, "has 2"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			t.Setenv("QUORATE_BIN", "/bin/true")
			_, code, err := runIn(t, tc.dir, strings.Fields(tc.args)...)
			if code != tc.code || err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("exit code %d, %v; want %d, an error that says %q", code, err, tc.code, tc.says)
			}
		})
	}
}

func TestPsqlTakesOnlyDirOfWhatFollowsTheRegion(t *testing.T) {
	root := newRootCommand()
	psql, _, err := root.Find([]string{"dev", "psql"})
	if err != nil {
		t.Fatal(err)
	}
	if err := psql.ParseFlags([]string{"r1", "-c", "SELECT 1"}); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"-c", "SELECT 1", "--dir", "/somewhere", "-At"},
		{"-c", "SELECT 1", "-At", "--dir=/somewhere"},
	} {
		rest, err := takeDir(psql, args)
		if err != nil || !slices.Equal(rest, []string{"-c", "SELECT 1", "-At"}) || psql.Flag("dir").Value.String() != "/somewhere" {
			t.Errorf("%q: left %q, --dir %s, %v", args, rest, psql.Flag("dir").Value, err)
		}
	}
	if _, err := takeDir(psql, []string{"--dir"}); exitCode(err) != exitUsage {
		t.Errorf("--dir with nothing: %v", err)
	}
}
