package replay

import (
	"context"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/catalog"
)

// TestInstalledDatabases replays into a database whose tables are fenced, with
// schema changes as the publisher's event triggers captured them.
func TestInstalledDatabases(t *testing.T) {
	p := newPair(t)
	for conn, region := range map[*pgx.Conn]string{p.source: "r1", p.target: "r2"} {
		if err := catalog.Install(t.Context(), conn, catalog.Options{ClusterID: "c1", Region: region}); err != nil {
			t.Fatal(err)
		}
	}
	if err := catalog.OpenFence(t.Context(), p.source, catalog.DefaultShard, 1, 1); err != nil {
		t.Fatal(err)
	}
	p.drop()
	cfg := p.config()
	cfg.DDL = func(ctx context.Context, conn *pgx.Conn, content []byte) error {
		return catalog.ReplayDDL(ctx, conn, content)
	}
	s, err := Connect(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	p.do(`CREATE TABLE a (id int PRIMARY KEY, v text)`, `INSERT INTO a SELECT g, 'v' FROM generate_series(1, 3000) g`,
		`BEGIN; ALTER TABLE a ADD w int; UPDATE a SET w = id WHERE id < 10; CREATE TABLE b (x int PRIMARY KEY); INSERT INTO b VALUES (1); COMMIT`,
		`CREATE TABLE gone (id int PRIMARY KEY)`, `INSERT INTO gone VALUES (1)`, `DROP TABLE gone`,
		`CREATE SCHEMA app`, `CREATE TABLE app.parts (id int PRIMARY KEY) PARTITION BY RANGE (id)`, `CREATE TABLE app.leaf PARTITION OF app.parts DEFAULT`,
		`INSERT INTO app.parts VALUES (7)`, `DELETE FROM a WHERE id > 2000`, `ALTER TABLE a RENAME v TO vv`, `UPDATE a SET vv = 'u' WHERE id = 5`, `TRUNCATE b`, `INSERT INTO b VALUES (2)`)
	batch := p.transactions()
	p.apply(s, batch)
	p.same("a", "b", "app.leaf")
	if s.Stats().Retries != 0 {
		t.Errorf("%d batches were repeated row by row", s.Stats().Retries)
	}
	// What replay made is fenced, for everybody else.
	for _, write := range []string{`INSERT INTO a VALUES (9999)`, `INSERT INTO b VALUES (3)`, `INSERT INTO app.leaf VALUES (3)`, `CREATE TABLE c ()`} {
		if _, err := p.target.Exec(t.Context(), write); err == nil || !strings.Contains(err.Error(), "25006") {
			t.Errorf("%s: %v", write, err)
		}
	}
	postgrestest.Exec(t, p.target, "SET session_replication_role = replica")
	if _, err := p.target.Exec(t.Context(), `DELETE FROM a`); err == nil || !strings.Contains(err.Error(), "25006") {
		t.Errorf("with the replica role: %v", err)
	}
}
