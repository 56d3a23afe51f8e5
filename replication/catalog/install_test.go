package catalog_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"quorate/deploy/sandbox/postgres"
	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/catalog"
)

func installed(t *testing.T) (*postgres.Server, *pgx.Conn) {
	t.Helper()
	s := postgrestest.Start(t, nil)
	own := sidecar(t, s)
	if err := catalog.Install(ctx(t), own, catalog.Options{ClusterID: "c", Region: "r1"}); err != nil {
		t.Fatal(err)
	}
	return s, own
}

// sidecar connects as a sidecar does.
func sidecar(t *testing.T, s *postgres.Server) *pgx.Conn {
	t.Helper()
	return sidecarTo(t, s, "postgres")
}

func sidecarTo(t *testing.T, s *postgres.Server, database string) *pgx.Conn {
	t.Helper()
	cfg, err := pgx.ParseConfig(s.DSN(database))
	if err != nil {
		t.Fatal(err)
	}
	cfg.RuntimeParams["application_name"] = catalog.ApplicationName + " test"
	cfg.RuntimeParams["synchronous_commit"] = "local"
	cfg.RuntimeParams["default_transaction_read_only"] = "off"
	conn, err := pgx.ConnectConfig(ctx(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func ctx(t *testing.T) context.Context {
	c, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return c
}

func query[T any](t *testing.T, conn *pgx.Conn, sql string, args ...any) T {
	t.Helper()
	var v T
	if err := conn.QueryRow(ctx(t), sql, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// refused runs sql and wants it to fail with a SQLSTATE.
func refused(t *testing.T, conn *pgx.Conn, code, sql string) *pgconn.PgError {
	t.Helper()
	_, err := conn.Exec(ctx(t), sql)
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || pg.Code != code {
		t.Fatalf("%s: got %v, want SQLSTATE %s", sql, err, code)
	}
	return pg
}

func TestInstallIsIdempotentAndUninstallLeavesNothing(t *testing.T) {
	s := postgrestest.Start(t, nil)
	own := sidecar(t, s)
	postgrestest.Exec(t, own, "CREATE TABLE t (id int PRIMARY KEY)", "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id)",
		"CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10)")
	const picture = `SELECT string_agg(x, E'\n' ORDER BY x) FROM (
		SELECT 'class ' || oid::regclass || relpersistence::text x FROM pg_class WHERE oid >= 16384 AND relkind <> 't' AND relname !~ '^pg_toast'
		UNION ALL SELECT 'proc ' || oid::regprocedure FROM pg_proc WHERE oid >= 16384
		UNION ALL SELECT 'namespace ' || nspname FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp'
		UNION ALL SELECT 'trigger ' || tgname || tgrelid::regclass FROM pg_trigger
		UNION ALL SELECT 'event trigger ' || evtname FROM pg_event_trigger
		UNION ALL SELECT 'publication ' || pubname FROM pg_publication
		UNION ALL SELECT 'slot ' || slot_name FROM pg_replication_slots
		UNION ALL SELECT 'origin ' || roname FROM pg_replication_origin
		UNION ALL SELECT 'setting ' || name || ' ' || setting FROM pg_file_settings WHERE sourcefile ~ 'auto.conf$') s`
	before := query[string](t, own, picture)

	o := catalog.Options{ClusterID: "c", Region: "r1"}
	if err := catalog.Install(ctx(t), own, o); err != nil {
		t.Fatal(err)
	}
	first := query[string](t, own, picture)
	if got := query[int](t, own, "SELECT count(*)::int FROM pg_trigger WHERE tgname = 'quorate_fence' AND tgenabled = 'A'"); got != 3 {
		t.Errorf("%d fences, want 3", got)
	}
	if err := catalog.Install(ctx(t), own, o); err != nil {
		t.Fatalf("second install: %v", err)
	}
	if got := query[string](t, own, picture); got != first {
		t.Errorf("the second install changed\n%s\nto\n%s", first, got)
	}
	if err := catalog.Install(ctx(t), own, catalog.Options{ClusterID: "other", Region: "r1"}); !errors.Is(err, catalog.ErrOtherCluster) {
		t.Errorf("install for another cluster: %v", err)
	}
	postgrestest.Exec(t, own, "SELECT pg_create_logical_replication_slot('quorate_r1', 'pgoutput')", "SELECT pg_replication_origin_create('quorate_main')")
	if err := catalog.SetReadOnlyDefault(ctx(t), own, true); err != nil {
		t.Fatal(err)
	}
	if err := catalog.EnsureSynchronous(ctx(t), own, "quorate"); err != nil {
		t.Fatal(err)
	}
	postgrestest.Exec(t, own, "INSERT INTO quorate.version VALUES (1000)")
	var newer *catalog.NewerSchemaError
	if err := catalog.Install(ctx(t), own, o); !errors.As(err, &newer) || newer.Installed != 1000 {
		t.Errorf("install of an older binary: %v", err)
	}
	if err := catalog.Uninstall(ctx(t), own, catalog.UninstallOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := query[string](t, own, picture); got != before {
		t.Errorf("after uninstall:\n%s\nwant\n%s", got, before)
	}
	if err := catalog.Uninstall(ctx(t), own, catalog.UninstallOptions{}); err != nil {
		t.Errorf("second uninstall: %v", err)
	}
}

func TestIdentity(t *testing.T) {
	s := postgrestest.Start(t, nil)
	own := sidecar(t, s)
	if _, err := catalog.ReadIdentity(ctx(t), own); !errors.Is(err, catalog.ErrNotInstalled) {
		t.Fatalf("before install: %v", err)
	}
	if err := catalog.Install(ctx(t), own, catalog.Options{ClusterID: "c", Region: "r1"}); err != nil {
		t.Fatal(err)
	}
	if err := catalog.WriteIncarnation(ctx(t), own, 0xfedcba9876543210); err != nil {
		t.Fatal(err)
	}
	id, err := catalog.ReadIdentity(ctx(t), own)
	if err != nil {
		t.Fatal(err)
	}
	if id.ClusterID != "c" || id.Region != "r1" || id.Shard != "main" || id.Incarnation != 0xfedcba9876543210 || id.Version < 1 || len(id.DDLKey) != 32 {
		t.Errorf("identity is %+v", id)
	}
}

func TestFollowerRefusesWithTheLeader(t *testing.T) {
	s, own := installed(t)
	client := postgrestest.Connect(t, s, "postgres")
	if err := catalog.OpenFence(ctx(t), own, "main", 1, 1); err != nil {
		t.Fatal(err)
	}
	postgrestest.Exec(t, client, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)", "CREATE TEMP TABLE mine (a int)")
	if err := catalog.CloseFence(ctx(t), own, "main", 1, 1, time.Second); err != nil {
		t.Fatal(err)
	}
	if err := catalog.Publish(ctx(t), own, catalog.State{Shard: "main", Region: "r1", Leader: "r2"}); err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{"INSERT INTO t VALUES (2)", "UPDATE t SET id = 3", "DELETE FROM t", "TRUNCATE t",
		"SET default_transaction_read_only = off; INSERT INTO t VALUES (2)", "COPY t FROM STDIN", "CREATE TABLE u ()", "DROP TABLE t", "CREATE INDEX ON t (id)"} {
		if sql == "COPY t FROM STDIN" {
			_, err := client.PgConn().CopyFrom(ctx(t), strings.NewReader("7\n"), sql)
			var pg *pgconn.PgError
			if !errors.As(err, &pg) || pg.Code != "25006" {
				t.Errorf("%s: %v", sql, err)
			}
			continue
		}
		if pg := refused(t, client, "25006", sql); !strings.Contains(pg.Hint, "region r2") {
			t.Errorf("%s: hint %q", sql, pg.Hint)
		}
	}
	postgrestest.Exec(t, client, "INSERT INTO mine VALUES (1)", "ALTER TABLE mine ADD b int", "CREATE TEMP TABLE mine2 ()", "DROP TABLE mine, mine2", "TABLE t")
}
