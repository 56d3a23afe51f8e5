package snapshot

import (
	"testing"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/catalog"
)

// TestInstalledSource ships a database in which Quorate is installed: none of
// that arrives, so it can be installed there anew.
func TestInstalledSource(t *testing.T) {
	src, dst := servers(t)
	db := newDatabase(t, src, "s")
	conn := postgrestest.Connect(t, src, db)
	postgrestest.Exec(t, conn, `CREATE TABLE before (id serial PRIMARY KEY)`, `INSERT INTO before DEFAULT VALUES`)
	options := catalog.Options{ClusterID: "c1", Region: "r1"}
	if err := catalog.Install(t.Context(), conn, options); err != nil {
		t.Fatal(err)
	}
	if err := catalog.OpenFence(t.Context(), conn, catalog.DefaultShard, 1, 1); err != nil {
		t.Fatal(err)
	}
	postgrestest.Exec(t, conn, `CREATE TABLE after (id int PRIMARY KEY, at int) PARTITION BY RANGE (id)`, `CREATE TABLE after_1 PARTITION OF after DEFAULT`,
		`INSERT INTO after SELECT g, g FROM generate_series(1, 100) g`)
	want := map[string]string{}
	for n, h := range hashes(t, postgrestest.Connect(t, src, db)) {
		want[n] = h
	}
	dest := newWritable(t, dst, "d")
	if _, err := Load(t.Context(), loadConfig(t, serve(t, &exporter{connString: src.DSN(db)}, 0), dst.DSN(dest))); err != nil {
		t.Fatal(err)
	}
	got := postgrestest.Connect(t, dst, dest)
	compare(t, want, hashes(t, got))
	postgrestest.Exec(t, got, "SET default_transaction_read_only = off", "RESET search_path")
	if left := one[string](t, got, `SELECT concat((SELECT string_agg(nspname, ' ') FROM pg_namespace WHERE nspname ~ '^quorate'), (SELECT string_agg(evtname, ' ') FROM pg_event_trigger),
		(SELECT string_agg(pubname, ' ') FROM pg_publication), (SELECT string_agg(tgname, ' ') FROM pg_trigger))`); left != "" {
		t.Errorf("the source's own things arrived: %s", left)
	}
	options.Region = "r2"
	if err := catalog.Install(t.Context(), got, options); err != nil {
		t.Fatal(err)
	}
	if _, err := got.Exec(t.Context(), "INSERT INTO after VALUES (1000, 1)", pgx.QueryExecModeSimpleProtocol); err == nil {
		t.Error("the new region takes writes")
	}
}
