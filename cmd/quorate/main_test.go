package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/catalog"
)

func execute(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	root := rootCommand()
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(args)
	err := root.ExecuteContext(t.Context())
	return out.String(), err
}

// configFile writes a configuration for the server at dsn.
func configFile(t *testing.T, dsn string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "region.yaml")
	text := fmt.Sprintf(`cluster: demo
region: r1
data_dir: %s
postgres:
  dsn: %s
regions:
  - {name: r1, peer: "127.0.0.1:1"}
  - {name: r2, peer: "127.0.0.1:2"}
  - {name: r3, peer: "127.0.0.1:3"}
`, t.TempDir(), dsn)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestExitCodes(t *testing.T) {
	faulty := configFile(t, "postgres://postgres@127.0.0.1:1/")
	nobody := configFile(t, "postgres://postgres@127.0.0.1:1/app")
	for _, tc := range []struct {
		name string
		args []string
		want int
		text string
	}{
		{"version", []string{"version"}, exitOK, ""},
		{"no such command", []string{"walk"}, exitUsage, "unknown command"},
		{"no such flag", []string{"check", "--configuration", "x"}, exitUsage, "unknown flag"},
		{"an argument", []string{"check", "x"}, exitUsage, "unknown command"},
		{"no configuration named", []string{"check"}, exitUsage, "--config is missing"},
		{"no such configuration", []string{"check", "--config", "/nonexistent/region.yaml"}, exitUsage, "no such file"},
		{"a fault, with its line", []string{"install", "--config", faulty}, exitUsage, faulty + ":5: postgres.dsn: names no database"},
		{"a server that is not there", []string{"check", "--config", nobody}, exitError, "connect to this region's PostgreSQL (postgres.dsn)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, err := execute(t, tc.args...)
			if got := exitCode(err); got != tc.want {
				t.Errorf("exit code %d, want %d (%v, %s)", got, tc.want, err, out)
			}
			if !strings.Contains(fmt.Sprint(err), tc.text) {
				t.Errorf("error %q lacks %q", err, tc.text)
			}
		})
	}
}

func TestUnfitServer(t *testing.T) {
	server := postgrestest.Start(t, map[string]string{"wal_level": "replica"})
	postgrestest.Exec(t, postgrestest.Connect(t, server, "postgres"), "CREATE DATABASE app")
	out, err := execute(t, "check", "--config", configFile(t, server.DSN("app")))
	if exitCode(err) != exitUnfit || !strings.Contains(out, "error: wal_level: ") || !strings.Contains(out, "mend: ") {
		t.Errorf("got %v, %s", err, out)
	}
}

func TestInstallAndUninstall(t *testing.T) {
	server := postgrestest.Start(t, map[string]string{"wal_level": "logical"})
	postgrestest.Exec(t, postgrestest.Connect(t, server, "postgres"), "CREATE DATABASE app")
	file := configFile(t, server.DSN("app"))
	conn := postgrestest.Connect(t, server, "app")
	step := func(command, want string) {
		t.Helper()
		out, err := execute(t, command, "--config", file)
		if err != nil || !strings.Contains(out, want) {
			t.Fatalf("%s: got %v, %s; want %s", command, err, out, want)
		}
	}
	step("check", "schema quorate: not installed")
	step("install", "nothing is installed yet")
	if err := catalog.Install(t.Context(), conn, catalog.Options{ClusterID: "0000000000000001", Region: "r1"}); err != nil {
		t.Fatal(err)
	}
	step("install", "schema quorate: version ")
	step("check", "region r1, incarnation 0000000000000000")
	step("uninstall", "uninstalled from database app")
	step("uninstall", "uninstalled from database app")
	step("check", "schema quorate: not installed")
	var left int
	if err := conn.QueryRow(t.Context(), "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'quorate%'").Scan(&left); err != nil || left != 0 {
		t.Errorf("%d schemas left, %v", left, err)
	}
}
