package catalog_test

import (
	"context"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres"
	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/catalog"
	"quorate/replication/entry"
)

// captured returns the contents of the DDL messages since its last call, as
// test_decoding shows them.
func captured(t *testing.T, own *pgx.Conn) [][]byte {
	t.Helper()
	rows, err := own.Query(ctx(t), "SELECT data FROM pg_logical_slot_get_changes('probe_' || current_database(), NULL, NULL) WHERE data LIKE 'message: transactional: 1 prefix: "+entry.DDLPrefix+",%'")
	if err != nil {
		t.Fatal(err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	var contents [][]byte
	for _, line := range lines {
		_, content, _ := strings.Cut(line, " content:")
		contents = append(contents, []byte(content))
	}
	return contents
}

func statements(t *testing.T, contents [][]byte) []string {
	t.Helper()
	var s []string
	for _, content := range contents {
		d, err := catalog.DecodeDDL(content)
		if err != nil {
			t.Fatalf("%s: %v", content, err)
		}
		s = append(s, d.Statement)
	}
	return s
}

// TestDDL runs the stories below on one server, each in a database of its own.
func TestDDL(t *testing.T) {
	s := postgrestest.Start(t, nil)
	for name, story := range map[string]func(*testing.T, *postgres.Server){
		"replays to the same schema":      replaysToTheSameSchema,
		"each statement of a batch, once": statementsOfABatch,
		"what cannot be carried":          whatCannotBeCarried,
		"forged messages":                 forgedMessages,
		"nobody else can capture":         nobodyElseCanCapture,
		"ordinary tools work on a leader": ordinaryTools,
		"replay names a missing role":     replayNamesAMissingRole,
	} {
		t.Run(name, func(t *testing.T) { story(t, s) })
	}
}

// region is a new database with Quorate.
func region(t *testing.T, s *postgres.Server, database string) *pgx.Conn {
	t.Helper()
	postgrestest.Exec(t, postgrestest.Connect(t, s, "postgres"), "CREATE DATABASE "+database)
	own := sidecarTo(t, s, database)
	if err := catalog.Install(ctx(t), own, catalog.Options{ClusterID: "c", Region: database}); err != nil {
		t.Fatal(err)
	}
	return own
}

// leader is a region with an open fence and a slot for captured.
func leader(t *testing.T, s *postgres.Server, database string) (own, client *pgx.Conn) {
	t.Helper()
	own = region(t, s, database)
	postgrestest.Exec(t, own, "SELECT pg_create_logical_replication_slot('probe_' || current_database(), 'test_decoding')")
	open(t, own, 1)
	return own, postgrestest.Connect(t, s, database)
}

func schemaOf(t *testing.T, s *postgres.Server, database string) string {
	t.Helper()
	out, err := exec.Command(filepath.Join(s.BinDir, "pg_dump"), "--schema-only", "-N", "quorate", s.DSN(database)).CombinedOutput()
	if err != nil {
		t.Fatalf("pg_dump: %v\n%s", err, out)
	}
	// Newer pg_dumps write a random word here.
	return regexp.MustCompile(`(?m)^\\(un)?restrict .*$`).ReplaceAllString(string(out), "")
}

// differences lists the lines that only one of two texts has.
func differences(a, b string) string {
	var out strings.Builder
	count := map[string]int{}
	for line := range strings.Lines(a) {
		count[line]++
	}
	for line := range strings.Lines(b) {
		count[line]--
	}
	for line, n := range count {
		switch {
		case n > 0:
			out.WriteString("- " + line)
		case n < 0:
			out.WriteString("+ " + line)
		}
	}
	return out.String()
}

func replaysToTheSameSchema(t *testing.T, s *postgres.Server) {
	own, client := leader(t, s, "from_here")
	followerOwn := region(t, s, "to_there")
	postgrestest.Exec(t, own, "CREATE ROLE app", "GRANT CREATE ON DATABASE from_here TO app", "GRANT CREATE ON DATABASE to_there TO app")
	replay := postgrestest.Connect(t, s, "to_there")
	postgrestest.Exec(t, replay, "SELECT pg_replication_origin_create('quorate_main')", "SELECT pg_replication_origin_session_setup('quorate_main')",
		"SET session_replication_role = replica")

	for _, sql := range []string{
		`CREATE TABLE a (id serial PRIMARY KEY, n int CHECK (n > 0), w text DEFAULT now()::text, g int GENERATED ALWAYS AS (n * 2) STORED, i bigint GENERATED ALWAYS AS IDENTITY)`,
		`CREATE INDEX CONCURRENTLY a_n ON a (n)`,
		`create unique  index -- why
		   concurrently a_nw ON a (n, w)`,
		`DROP INDEX CONCURRENTLY a_nw`,
		`INSERT INTO a (n) VALUES (1), (2)`,
		`ALTER TABLE a ADD COLUMN c int DEFAULT 7, ADD COLUMN d text`,
		`ALTER TABLE a ALTER c TYPE bigint USING c + 1`,
		`CREATE SCHEMA s CREATE TABLE t1 (a int) CREATE VIEW v1 AS SELECT * FROM t1`,
		`SET search_path = s`,
		`CREATE TABLE in_s (d date DEFAULT '2026-02-01'); CREATE TABLE in_s2 (LIKE in_s INCLUDING ALL); COMMENT ON TABLE in_s IS 'semi; colon''s'; ALTER TABLE in_s ADD x int; ALTER TABLE in_s RENAME x TO y;`,
		`SET datestyle = 'SQL, DMY'`,
		`ALTER TABLE in_s ADD e date DEFAULT '03/02/2026'`,
		`RESET search_path`,
		`RESET datestyle`,
		`CREATE FUNCTION f(a int) RETURNS int LANGUAGE plpgsql AS $f$ BEGIN RAISE NOTICE ';'; RETURN a; END $f$; CREATE FUNCTION g(a int) RETURNS int BEGIN ATOMIC SELECT CASE WHEN a > 0 THEN 1 ELSE 2 END; SELECT 2; END; CREATE VIEW vv AS SELECT E'a\';b' AS x /* ; /* ; */ ; */`,
		`DO $do$ BEGIN CREATE TABLE from_do (id int); EXECUTE 'CREATE INDEX ON from_do (id)'; FOR i IN 1..3 LOOP EXECUTE format('CREATE TABLE loop_%s (id int)', i); END LOOP; END $do$; CREATE TABLE after_do (id int)`,
		`CREATE TYPE mood AS ENUM ('sad', 'ok'); ALTER TYPE mood ADD VALUE 'happy'`,
		`CREATE SEQUENCE q START 10; ALTER SEQUENCE q INCREMENT 5`,
		`CREATE TABLE parts (id int, PRIMARY KEY (id)) PARTITION BY RANGE (id)`,
		`CREATE TABLE part1 PARTITION OF parts FOR VALUES FROM (0) TO (10); CREATE TABLE part2 (id int PRIMARY KEY); ALTER TABLE parts ATTACH PARTITION part2 FOR VALUES FROM (10) TO (20)`,
		`CREATE TABLE part3 PARTITION OF parts FOR VALUES FROM (20) TO (30); ALTER TABLE parts DETACH PARTITION part3`,
		`CREATE TABLE words (w text DEFAULT 'today', d date DEFAULT now(), e timestamptz DEFAULT CURRENT_TIMESTAMP)`,
		`CREATE TABLE ref (id int REFERENCES a (id))`,
		`CREATE UNLOGGED TABLE scratch (id int)`,
		`CREATE RULE r1 AS ON INSERT TO ref DO ALSO (SELECT 1; SELECT 2); CREATE TABLE after_rule ()`,
		`SET ROLE app`,
		`CREATE SCHEMA mine; CREATE TABLE mine.owned (id int); GRANT SELECT ON mine.owned TO PUBLIC`,
		`RESET ROLE`,
		`ALTER DEFAULT PRIVILEGES FOR ROLE app IN SCHEMA mine GRANT SELECT ON TABLES TO PUBLIC`,
		`CREATE TEMP TABLE tmp (id int); CREATE INDEX ON tmp (id); CREATE TABLE with_tmp (id int); DROP TABLE tmp`,
		`DROP TABLE IF EXISTS never_was`,
		`DROP VIEW vv; DROP TABLE loop_1, loop_2; DROP TABLE IF EXISTS loop_3`,
		`CREATE TABLE twice (x int); DROP TABLE twice; CREATE TABLE twice (y int)`,
		`BEGIN; CREATE TABLE undone (); ROLLBACK; CREATE VIEW kept AS SELECT 1 AS one`,
		`CREATE EXTENSION IF NOT EXISTS pgcrypto; CREATE TABLE after_ext (id int)`,
		`CREATE MATERIALIZED VIEW mv AS SELECT 1 AS x; REFRESH MATERIALIZED VIEW mv`,
		`CREATE TABLE empty_copy AS SELECT * FROM a WITH NO DATA`,
		`CREATE TRIGGER tg BEFORE INSERT ON a FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()`,
		`ALTER TABLE a ENABLE ROW LEVEL SECURITY; CREATE POLICY pol ON a USING (n > 0)`,
		`ALTER TABLE a DISABLE TRIGGER ALL; ALTER TABLE a ENABLE TRIGGER ALL`,
		`CREATE DOMAIN pos AS int CHECK (value > 0); CREATE STATISTICS st ON n, c FROM a; CREATE OR REPLACE VIEW kept AS SELECT 1 AS one, 2 AS two`,
		`ALTER TABLE a DROP COLUMN d; ALTER TABLE a REPLICA IDENTITY FULL`,
		`CREATE TABLE "odd ""name;" ("a;b" int); ALTER TABLE "odd ""name;" ADD "c;d" int`,
	} {
		postgrestest.Exec(t, client, sql)
	}
	id, err := catalog.ReadIdentity(ctx(t), own)
	if err != nil {
		t.Fatal(err)
	}
	for _, content := range captured(t, own) {
		if !catalog.Authentic(id.DDLKey, content) {
			t.Errorf("not authentic: %s", content)
		}
		err := pgx.BeginFunc(ctx(t), replay, func(tx pgx.Tx) error {
			before := query[string](t, tx.Conn(), "SELECT current_setting('search_path') || current_setting('datestyle') || current_user")
			if err := catalog.ReplayDDL(ctx(t), tx, content); err != nil {
				return err
			}
			if after := query[string](t, tx.Conn(), "SELECT current_setting('search_path') || current_setting('datestyle') || current_user"); after != before {
				t.Errorf("settings were %s, are %s", before, after)
			}
			return nil
		})
		if err != nil {
			t.Fatalf("%s: %v", content, err)
		}
	}
	if got, want := schemaOf(t, s, "to_there"), schemaOf(t, s, "from_here"); got != want {
		t.Errorf("schemas differ (- leader, + follower):\n%s", differences(want, got))
	}
	for _, c := range []*pgx.Conn{own, followerOwn} {
		if n := query[int](t, c, "SELECT count(*)::int FROM quorate.unfenced"); n != 0 {
			t.Errorf("%d tables without a fence", n)
		}
	}
}

func statementsOfABatch(t *testing.T, s *postgres.Server) {
	own, client := leader(t, s, "batch")
	for _, tc := range []struct {
		sql  string
		want []string
	}{
		{"CREATE TABLE a (x int);", []string{"CREATE TABLE a (x int)"}},
		{"CREATE TABLE b (x int); INSERT INTO b VALUES (1); CREATE TABLE c (x int)", []string{"CREATE TABLE b (x int)", "CREATE TABLE c (x int)"}},
		{"CREATE TABLE d (); COMMIT; CREATE TABLE e ()", []string{"CREATE TABLE d ()", "CREATE TABLE e ()"}},
		{"CREATE TEMP TABLE f (); CREATE TABLE g ()", []string{"CREATE TABLE g ()"}},
		{"CREATE ROLE somebody; GRANT pg_monitor TO somebody; GRANT SELECT ON a TO somebody", []string{"GRANT SELECT ON a TO somebody"}},
		{"SELECT 1", nil},
		{"CREATE TEMP TABLE IF NOT EXISTS f ()", nil},
		{"CREATE TABLE IF NOT EXISTS a (x int)", nil},
		{"CREATE TABLE IF NOT EXISTS a2 (x int)", []string{"CREATE TABLE IF NOT EXISTS a2 (x int)"}},
		{"BEGIN; CREATE TABLE z (); ROLLBACK", nil},
		{"DO $$ BEGIN CREATE TABLE n1 (); CREATE TABLE n2 (); END $$", []string{"CREATE TABLE n1 ()", "CREATE TABLE n2 ()"}},
	} {
		postgrestest.Exec(t, client, tc.sql)
		if got := statements(t, captured(t, own)); strings.Join(got, "|") != strings.Join(tc.want, "|") {
			t.Errorf("%s: captured %q, want %q", tc.sql, got, tc.want)
		}
	}
}

func whatCannotBeCarried(t *testing.T, s *postgres.Server) {
	own, client := leader(t, s, "refusing")
	postgrestest.Exec(t, client, "CREATE TABLE t (id int PRIMARY KEY, w text)", "INSERT INTO t VALUES (1)", "CREATE TABLE empty (id int)",
		"CREATE TABLE parent (id int) PARTITION BY RANGE (id)", "CREATE TABLE child PARTITION OF parent FOR VALUES FROM (0) TO (9)", "INSERT INTO parent VALUES (1)")
	captured(t, own)
	for _, sql := range []string{
		"CREATE TABLE u AS SELECT 1 AS x",
		"SELECT 1 AS x INTO u",
		"ALTER TABLE t ADD c timestamptz DEFAULT now()",
		"ALTER TABLE t ADD c date DEFAULT CURRENT_DATE",
		"ALTER TABLE t ADD c float DEFAULT random()",
		"ALTER TABLE t ADD c serial",
		"ALTER TABLE t ADD c int GENERATED ALWAYS AS IDENTITY",
		"ALTER TABLE parent ADD c timestamptz DEFAULT now()",
		"ALTER TABLE t ALTER w TYPE float USING random()",
		"ALTER TABLE t ALTER w TYPE text USING current_timestamp::text",
		"ALTER TABLE t SET UNLOGGED",
		"CREATE TABLE dated (id int, d timestamptz DEFAULT 'now')",
		"ALTER TABLE empty ADD d date DEFAULT 'today'",
		"CREATE TEMP TABLE tmp (x int); CREATE TABLE like_tmp (LIKE tmp)",
		"ALTER TABLE parent DETACH PARTITION child CONCURRENTLY",
		"CREATE SUBSCRIPTION s CONNECTION 'dbname=x' PUBLICATION p WITH (connect = false)",
		"DO $$ BEGIN EXECUTE 'CREATE TABLE m1 (); CREATE TABLE m2 ()'; END $$",
		"BEGIN; CREATE TABLE r1 (); ROLLBACK; CREATE TABLE r2 ()",
		"DROP SCHEMA quorate CASCADE",
		"DROP SCHEMA quorate_fence CASCADE",
		"DROP FUNCTION quorate_fence.fence() CASCADE",
		"DROP PUBLICATION quorate",
		"ALTER TABLE quorate.identity ADD x int",
	} {
		pg := refused(t, client, "0A000", sql)
		if pg.Hint == "" {
			t.Errorf("%s: no hint", sql)
		}
		_, _ = client.Exec(ctx(t), "ROLLBACK")
	}
	if got := statements(t, captured(t, own)); len(got) != 0 {
		t.Errorf("captured %q", got)
	}
	postgrestest.Exec(t, client, "ALTER TABLE empty ADD c timestamptz DEFAULT now()", "ALTER TABLE t ALTER w SET DEFAULT now()::text",
		"ALTER TABLE t ADD c int DEFAULT 5", "ALTER TABLE empty ADD n serial")
	if got := statements(t, captured(t, own)); len(got) != 4 {
		t.Errorf("captured %q", got)
	}
}

func forgedMessages(t *testing.T, s *postgres.Server) {
	own, client := leader(t, s, "forged")
	postgrestest.Exec(t, client, "CREATE TABLE t ()", "SELECT pg_logical_emit_message(true, 'quorate.ddl', '{\"mac\": \"00\", \"version\": 1}')")
	contents := captured(t, own)
	id, err := catalog.ReadIdentity(ctx(t), own)
	if err != nil || len(contents) != 2 {
		t.Fatalf("%v, %d messages", err, len(contents))
	}
	if !catalog.Authentic(id.DDLKey, contents[0]) || catalog.Authentic(id.DDLKey, contents[1]) {
		t.Error("cannot tell what the event trigger wrote")
	}
	changed := strings.Replace(string(contents[0]), "CREATE TABLE t ()", "CREATE TABLE u ()", 1)
	if catalog.Authentic(id.DDLKey, []byte(changed)) {
		t.Error("a changed message passes")
	}
}

// What the event trigger writes is replayed as the role it names, so no user's
// code that runs within a command may write in its place.
func nobodyElseCanCapture(t *testing.T, s *postgres.Server) {
	own, client := leader(t, s, "capturing")
	postgrestest.Exec(t, own, "CREATE ROLE intruder", "GRANT CREATE ON DATABASE capturing TO intruder")
	postgrestest.Exec(t, client, "SET ROLE intruder", "CREATE SCHEMA app", "CREATE TABLE app.t (id int)", "INSERT INTO app.t VALUES (1)",
		`CREATE FUNCTION app.evil(id int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
			PERFORM quorate.ddl_end('CREATE FUNCTION', '{"role": "postgres", "settings": {}}'); RETURN id; END $$`)
	refused(t, client, "42501", "CREATE INDEX ON app.t (app.evil(id))")
	postgrestest.Exec(t, client, `SET quorate.caller = '{"role": "postgres", "settings": {}}'`, "CREATE TABLE app.u ()")
	for _, content := range captured(t, own) {
		if d, err := catalog.DecodeDDL(content); err != nil || d.Role != "intruder" {
			t.Errorf("%s: %v", content, err)
		}
	}
}

func replayNamesAMissingRole(t *testing.T, s *postgres.Server) {
	conn := postgrestest.Connect(t, s, "postgres")
	err := catalog.ReplayDDL(context.Background(), conn, []byte(`{"mac":"","version":1,"tag":"CREATE TABLE","statement":"CREATE TABLE t ()","role":"nobody"}`))
	if err == nil || !strings.Contains(err.Error(), `CREATE ROLE "nobody"`) {
		t.Errorf("got %v", err)
	}
}

// Ordinary tools work on the leader: pgbench -i, pg_dump and psql or pg_restore
// into it, with --disable-triggers too.
func ordinaryTools(t *testing.T, s *postgres.Server) {
	own, client := leader(t, s, "tools")
	cmd := exec.Command(filepath.Join(s.BinDir, "pgbench"), "-i", "-s", "1", "--partitions=3", s.DSN("tools"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("pgbench -i: %v\n%s", err, out)
	}
	cmd = exec.Command(filepath.Join(s.BinDir, "pgbench"), "-n", "-t", "50", "-c", "2", s.DSN("tools"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("pgbench: %v\n%s", err, out)
	}
	captured(t, own)

	file := filepath.Join(t.TempDir(), "dump")
	run(t, s, nil, "pg_dump", "-Fc", "-f", file, "-t", "pgbench_*", s.DSN("tools"))
	postgrestest.Exec(t, client, "DROP TABLE pgbench_accounts, pgbench_branches, pgbench_history, pgbench_tellers")
	run(t, s, nil, "pg_restore", "--exit-on-error", "-d", s.DSN("tools"), file)
	postgrestest.Exec(t, client, "TRUNCATE pgbench_accounts, pgbench_branches, pgbench_history, pgbench_tellers")
	cmd = exec.Command(filepath.Join(s.BinDir, "pg_restore"), "--exit-on-error", "--data-only", "--disable-triggers", "-d", s.DSN("tools"), file)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("pg_restore --disable-triggers: %v\n%s", err, out)
	}
	if n := query[int](t, client, "SELECT count(*)::int FROM pgbench_accounts"); n != 100000 {
		t.Errorf("%d accounts", n)
	}
	if n := query[int](t, own, "SELECT count(*)::int FROM quorate.unfenced"); n != 0 {
		t.Errorf("%d tables without a fence", n)
	}
	for _, sql := range statements(t, captured(t, own)) {
		if len(sql) > 2000 {
			t.Errorf("captured a statement of %d bytes", len(sql))
		}
	}
}
