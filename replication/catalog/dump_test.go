package catalog_test

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"testing"

	"quorate/deploy/sandbox/postgres"
	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/catalog"
)

// run runs one of PostgreSQL's own programs and wants it to say nothing on
// stderr.
func run(t *testing.T, s *postgres.Server, stdin []byte, program string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(filepath.Join(s.BinDir, program), args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &out, &errs
	if err := cmd.Run(); err != nil || errs.Len() > 0 {
		t.Fatalf("%s %q: %v\n%s", program, args, err, errs.String())
	}
	return out.Bytes()
}

// A dump taken with -N quorate --no-publications restores into a server that
// has no Quorate, without an error, and works there as any table does.
func TestDumpRestoresIntoAPlainServer(t *testing.T) {
	s, own := installed(t)
	open(t, own, 1)
	client := postgrestest.Connect(t, s, "postgres")
	postgrestest.Exec(t, client, "CREATE TABLE t (id serial PRIMARY KEY, w text)", "INSERT INTO t (w) VALUES ('a'), ('b')",
		"CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id)", "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (9)", "INSERT INTO p VALUES (1)")

	for _, tc := range []struct{ name, database string }{{"plain", "plain"}, {"custom", "custom"}} {
		t.Run(tc.name, func(t *testing.T) {
			// Another database without Quorate is as plain as another server: what
			// is installed is of one database.
			postgrestest.Exec(t, own, "CREATE DATABASE "+tc.database)
			flags := []string{"-N", "quorate", "--no-publications", s.DSN("postgres")}
			if tc.name == "plain" {
				dump := run(t, s, nil, "pg_dump", flags...)
				run(t, s, dump, "psql", "-q", "-v", "ON_ERROR_STOP=1", "-o", "/dev/null", s.DSN(tc.database))
			} else {
				file := filepath.Join(t.TempDir(), "dump")
				run(t, s, nil, "pg_dump", append([]string{"-Fc", "-f", file}, flags...)...)
				run(t, s, nil, "pg_restore", "--exit-on-error", "-d", s.DSN(tc.database), file)
			}
			plain := postgrestest.Connect(t, s, tc.database)
			postgrestest.Exec(t, plain, "INSERT INTO t (w) VALUES ('c')", "UPDATE p1 SET id = 2", "TRUNCATE p", "CREATE TABLE u (id int)", "ALTER TABLE t ADD x int", "DROP TABLE u")
			if n := query[int](t, plain, "SELECT count(*)::int FROM t"); n != 3 {
				t.Errorf("%d rows, want 3", n)
			}
			if tc.name == "custom" {
				// It can be made a region again.
				again := sidecarTo(t, s, tc.database)
				if err := catalog.Install(ctx(t), again, catalog.Options{ClusterID: "c2", Region: "r9"}); err != nil {
					t.Fatal(err)
				}
				refused(t, plain, "25006", "INSERT INTO t (w) VALUES ('d')")
				open(t, again, 1)
				postgrestest.Exec(t, plain, "INSERT INTO t (w) VALUES ('d')")
				return
			}
			// What is left of Quorate goes with one statement.
			postgrestest.Exec(t, plain, "DROP SCHEMA quorate_fence CASCADE")
			if n := query[int](t, plain, "SELECT count(*)::int FROM pg_trigger") + query[int](t, plain, "SELECT count(*)::int FROM pg_event_trigger"); n != 0 {
				t.Errorf("%d triggers are left", n)
			}
		})
	}
}
