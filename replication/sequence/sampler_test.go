package sequence

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres"
	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/entry"
)

func TestOnPostgres(t *testing.T) {
	server := postgrestest.Start(t, nil)
	for i, tc := range []struct {
		name string
		run  func(*testing.T, *database)
	}{
		{"a sample reads every sequence", sampleReadsAll},
		{"a sample follows what is created, renamed and dropped", sampleFollows},
		{"a locked sequence is bounded and holds up no other", sampleBoundsLocked},
		{"locked catalogs hold up no sample", sampleDespiteCatalogLock},
		{"many sequences are read in chunks", sampleManySequences},
		{"a million nextval in a loop stay before the marks", millionNextval},
		{"values handed out without WAL are covered", unloggedValues},
		{"marks are applied and tolerate what is gone", applyMarks},
		{"sequences are moved past their columns", advance},
	} {
		t.Run(tc.name, func(t *testing.T) {
			name := fmt.Sprintf("seq%d", i)
			postgrestest.Exec(t, postgrestest.Connect(t, server, "postgres"), "CREATE DATABASE "+name)
			tc.run(t, &database{t: t, server: server, name: name, conn: postgrestest.Connect(t, server, name)})
		})
	}
}

type database struct {
	t      *testing.T
	server *postgres.Server
	name   string
	conn   *pgx.Conn
}

func (d *database) exec(statements ...string) {
	d.t.Helper()
	postgrestest.Exec(d.t, d.conn, statements...)
}

func (d *database) number(query string) int64 {
	d.t.Helper()
	var n int64
	if err := d.conn.QueryRow(context.Background(), query).Scan(&n); err != nil {
		d.t.Fatalf("%s: %v", query, err)
	}
	return n
}

func (d *database) sampler() *Sampler {
	d.t.Helper()
	s, err := NewSampler(context.Background(), postgrestest.Connect(d.t, d.server, d.name))
	if err != nil {
		d.t.Fatal(err)
	}
	return s
}

func take(t testing.TB, s *Sampler) Sample {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	sample, err := s.Sample(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return sample
}

func find(t testing.TB, s Sample, name string) State {
	t.Helper()
	i := slices.IndexFunc(s.States, func(s State) bool { return s.Name == name })
	if i < 0 {
		t.Fatalf("no sequence %s in %+v", name, s.States)
	}
	return s.States[i]
}

func names(s Sample) string {
	var all []string
	for i := range s.States {
		all = append(all, s.States[i].Schema+"."+s.States[i].Name)
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

func sampleReadsAll(t *testing.T, d *database) {
	d.exec("CREATE SCHEMA quorate", "CREATE SEQUENCE quorate.own", "CREATE TEMP SEQUENCE temporary", `CREATE SCHEMA "a b"`,
		`CREATE SEQUENCE "a b"."c""d" INCREMENT -5 MINVALUE -1000 MAXVALUE 100 START 7 CYCLE`, "CREATE SEQUENCE plain", "CREATE TABLE t(id serial, g int GENERATED ALWAYS AS IDENTITY)",
		"SELECT nextval('plain')", "SELECT nextval('plain')")
	sample := take(t, d.sampler())
	if got := names(sample); got != `a b.c"d public.plain public.t_g_seq public.t_id_seq` {
		t.Fatal(got)
	}
	odd, plain := find(t, sample, `c"d`), find(t, sample, "plain")
	if odd.Called || odd.LastValue != 7 || odd.Increment != -5 || odd.Min != -1000 || odd.Max != 100 || odd.Locked {
		t.Fatalf("%+v", odd)
	}
	if !plain.Called || plain.LastValue != 2 || plain.LogCount != 31 || plain.reach() != 33 {
		t.Fatalf("%+v", plain)
	}
}

func sampleFollows(t *testing.T, d *database) {
	s := d.sampler()
	if got := names(take(t, s)); got != "" {
		t.Fatal(got)
	}
	for _, step := range []struct{ sql, want string }{
		{"CREATE SEQUENCE a; CREATE SEQUENCE b", "public.a public.b"},
		{"ALTER SEQUENCE a RENAME TO c", "public.b public.c"},
		{"CREATE SCHEMA s; ALTER SEQUENCE b SET SCHEMA s", "public.c s.b"},
		{"DROP SEQUENCE c; CREATE SEQUENCE c", "public.c s.b"},
		{"DROP SEQUENCE c; DROP SCHEMA s CASCADE", ""},
	} {
		d.exec(step.sql)
		if got := names(take(t, s)); got != step.want {
			t.Fatalf("%s: %q, want %q", step.sql, got, step.want)
		}
	}
	d.exec("CREATE SEQUENCE e MAXVALUE 100")
	take(t, s)
	d.exec("ALTER SEQUENCE e MAXVALUE 200")
	if got := find(t, take(t, s), "e").Max; got != 200 {
		t.Fatalf("bound %d after it was altered", got)
	}
}

func sampleBoundsLocked(t *testing.T, d *database) {
	d.exec("CREATE TABLE t(id serial)", "CREATE SEQUENCE free", "SELECT nextval('free')", "INSERT INTO t SELECT FROM generate_series(1, 100)")
	s := d.sampler()
	before := find(t, take(t, s), "t_id_seq")
	holder := postgrestest.Connect(t, d.server, d.name)
	postgrestest.Exec(t, holder, "BEGIN", "TRUNCATE t RESTART IDENTITY")
	d.exec("SELECT nextval('free')")
	var bound State
	for range 3 { // the bound stays, however long the lock does
		began := time.Now()
		sample := take(t, s)
		if took := time.Since(began); took > 2*time.Second {
			t.Fatalf("the sample took %s", took)
		}
		bound = find(t, sample, "t_id_seq")
		if free := find(t, sample, "free"); free.Locked || free.LastValue != 2 {
			t.Fatalf("%+v", free)
		}
		if !bound.Locked || bound.LastValue != min(before.reach()+lockedSteps, bound.Max) {
			t.Fatalf("%+v after %+v", bound, before)
		}
	}
	postgrestest.Exec(t, holder, "COMMIT")
	if after := find(t, take(t, s), "t_id_seq"); after.Locked || after.Called || after.LastValue != 1 {
		t.Fatalf("%+v", after)
	}
}

func sampleDespiteCatalogLock(t *testing.T, d *database) {
	d.exec("CREATE SEQUENCE a", "SELECT nextval('a')")
	s := d.sampler()
	holder := postgrestest.Connect(t, d.server, d.name)
	postgrestest.Exec(t, holder, "SELECT nextval('a')", "BEGIN", "LOCK pg_class, pg_sequence, pg_namespace")
	if a := find(t, take(t, s), "a"); a.Locked || a.LastValue != 2 {
		t.Fatalf("%+v", a)
	}
	postgrestest.Exec(t, holder, "ROLLBACK")
}

func sampleManySequences(t *testing.T, d *database) {
	const count = 2*chunk + 50
	d.exec(fmt.Sprintf("DO $$ BEGIN FOR i IN 1..%d LOOP EXECUTE format('CREATE SEQUENCE q%%s START %%s', i, i); PERFORM nextval('q' || i); END LOOP; END $$", count))
	s := d.sampler()
	check := func(locked string) {
		t.Helper()
		sample := take(t, s)
		if len(sample.States) != count {
			t.Fatalf("%d sequences", len(sample.States))
		}
		for i := range sample.States {
			state := &sample.States[i]
			if state.Locked != (state.Name == locked) || !state.Locked && fmt.Sprintf("q%d", state.LastValue) != state.Name {
				t.Fatalf("%+v", *state)
			}
		}
	}
	check("")
	holder := postgrestest.Connect(t, d.server, d.name)
	postgrestest.Exec(t, holder, "BEGIN", fmt.Sprintf("ALTER SEQUENCE q%d OWNED BY NONE", chunk+7), fmt.Sprintf("DROP SEQUENCE q%d", chunk+7))
	check(fmt.Sprintf("q%d", chunk+7))
}

// The client draws a million values; at any time each value that it holds lies
// at or before what the marks of the sample taken then say.
func millionNextval(t *testing.T, d *database) {
	d.exec("CREATE SEQUENCE a")
	s, tracker := d.sampler(), NewTracker()
	client := postgrestest.Connect(t, d.server, d.name)
	postgrestest.Exec(t, client, "SET synchronous_commit = off")
	const total, perQuery = 1_000_000, 2_000
	held, marks := int64(0), 0
	for held < total {
		if err := client.QueryRow(context.Background(), "SELECT max(nextval('a')) FROM generate_series(1, $1)", perQuery).Scan(&held); err != nil {
			t.Fatal(err)
		}
		sample := take(t, s)
		need := tracker.Need(sample)
		tracker.Chosen(need)
		marks += len(need)
		if !tracker.Covered(sample) {
			t.Fatalf("sample %+v is not covered", sample.States)
		}
		mark := tracker.sequences[name{"public", "a"}].chosen
		// PostgreSQL hands out what it has logged without another commit that waits.
		if logged := find(t, sample, "a").LogCount; held+logged > mark {
			t.Fatalf("the client holds %d, %d more are logged, the mark is %d", held, logged, mark)
		}
	}
	if marks > 100 {
		t.Fatalf("%d marks", marks)
	}
	mark := tracker.sequences[name{"public", "a"}].chosen
	d.exec("SELECT setval('a', 1)") // a follower that knows nothing but the mark
	if err := Apply(context.Background(), d.conn, []entry.Mark{{Schema: "public", Name: "a", Value: mark}}); err != nil {
		t.Fatal(err)
	}
	if next := d.number("SELECT nextval('a')"); next <= held {
		t.Fatalf("%d again; %d was handed out", next, held)
	}
}

func unloggedValues(t *testing.T, d *database) {
	for _, options := range []string{"", "CACHE 10", "INCREMENT -3", "CACHE 50 INCREMENT 7"} {
		d.exec("CREATE SEQUENCE a "+options, "SELECT nextval('a')")
		s := d.sampler()
		sample := take(t, s)
		reach := find(t, sample, "a")
		wal := d.number("SELECT pg_current_wal_insert_lsn() - '0/0'")
		var last int64
		for n := 0; ; n++ {
			v := d.number("SELECT nextval('a')")
			if d.number("SELECT pg_current_wal_insert_lsn() - '0/0'") != wal {
				if n == 0 {
					t.Fatalf("%q: the first value already writes WAL", options)
				}
				break
			}
			last = v
		}
		if reach.beyond(last, reach.reach()) {
			t.Fatalf("%q: %d was handed out without WAL, the sample reaches to %d", options, last, reach.reach())
		}
		d.exec("DROP SEQUENCE a")
	}
}

func applyMarks(t *testing.T, d *database) {
	d.exec("CREATE SEQUENCE a", "CREATE SEQUENCE down INCREMENT -1", "CREATE SEQUENCE short MAXVALUE 10", "CREATE TABLE notseq(id int)")
	ctx := context.Background()
	apply := func(marks ...entry.Mark) {
		t.Helper()
		if err := Apply(ctx, d.conn, marks); err != nil {
			t.Fatal(err)
		}
	}
	apply()
	apply(entry.Mark{Schema: "public", Name: "a", Value: 500}, entry.Mark{Schema: "public", Name: "down", Value: -40}, entry.Mark{Schema: "public", Name: "short", Value: 11},
		entry.Mark{Schema: "gone", Name: "a", Value: 1}, entry.Mark{Schema: "public", Name: "gone", Value: 1}, entry.Mark{Schema: "public", Name: "notseq", Value: 1})
	if a, down, short := d.number("SELECT nextval('a')"), d.number("SELECT nextval('down')"), d.number("SELECT last_value FROM short"); a != 501 || down != -41 || short != 10 {
		t.Fatalf("%d, %d, %d", a, down, short)
	}
	apply(entry.Mark{Schema: "public", Name: "a", Value: 20}) // it went back on the leader
	if a := d.number("SELECT nextval('a')"); a != 21 {
		t.Fatal(a)
	}
}

func advance(t *testing.T, d *database) {
	d.exec(`CREATE TABLE "T"("Id" serial PRIMARY KEY, v text)`, `INSERT INTO "T" VALUES (70), (60)`,
		"CREATE TABLE ahead(id bigint GENERATED ALWAYS AS IDENTITY)", "INSERT INTO ahead SELECT FROM generate_series(1, 100)", "DELETE FROM ahead WHERE id > 50",
		"CREATE TABLE down(id int)", "CREATE SEQUENCE d INCREMENT -1 OWNED BY down.id", "INSERT INTO down VALUES (-9), (-3)",
		"CREATE TABLE edge(id serial)", "INSERT INTO edge VALUES (5), (2147483647)",
		"CREATE TABLE one(id serial)", "INSERT INTO one VALUES (1)",
		"CREATE TABLE two(id serial)", "INSERT INTO two VALUES (2)",
		"CREATE TABLE empty(id serial)", "CREATE TABLE txt(id serial)", "ALTER TABLE txt ALTER id DROP DEFAULT", "ALTER TABLE txt ALTER id TYPE text", "INSERT INTO txt VALUES ('x')",
		"CREATE TABLE part(id serial, k int) PARTITION BY LIST (k)", "CREATE TABLE part1 PARTITION OF part FOR VALUES IN (1)", "INSERT INTO part VALUES (33, 1)")
	for range 2 {
		if leftOut, err := AdvancePastColumns(context.Background(), d.conn); err != nil || len(leftOut) != 0 {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		sequence string
		next     int64
	}{{`"T_Id_seq"`, 71}, {"ahead_id_seq", 101}, {"d", -10}, {"edge_id_seq", 1}, {"one_id_seq", 2}, {"two_id_seq", 3}, {"empty_id_seq", 1}, {"part_id_seq", 34}} {
		if got := d.number("SELECT nextval('" + tc.sequence + "')"); got != tc.next {
			t.Errorf("%s goes on with %d, want %d", tc.sequence, got, tc.next)
		}
	}
}

func BenchmarkSample(b *testing.B) {
	server := postgrestest.Start(b, nil)
	conn := postgrestest.Connect(b, server, "postgres")
	made := 0
	for _, count := range []int{0, 10, 200} {
		for ; made < count; made++ {
			postgrestest.Exec(b, conn, fmt.Sprintf("CREATE SEQUENCE q%d", made))
		}
		b.Run(fmt.Sprintf("sequences=%d", count), func(b *testing.B) {
			s, err := NewSampler(context.Background(), postgrestest.Connect(b, server, "postgres"))
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				take(b, s)
			}
		})
	}
}
