package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"quorate/deploy/sandbox/postgres"
	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/snapshot/snapshotpb"
)

// exporter is a Source whose snapshots are ordinary exported ones.
type exporter struct {
	connString string
	verify     func(context.Context) error
	opened     func(*pgx.Conn) // with the exporting connection
	released   atomic.Int32
}

func (e *exporter) Open(ctx context.Context) (*Exported, error) {
	conn, err := pgx.Connect(ctx, e.connString)
	if err != nil {
		return nil, err
	}
	var name string
	if _, err = conn.Exec(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"); err == nil {
		err = conn.QueryRow(ctx, "SELECT pg_export_snapshot()").Scan(&name)
	}
	if err != nil {
		closeConn(conn)
		return nil, err
	}
	if e.opened != nil {
		e.opened(conn)
	}
	return &Exported{ConnString: e.connString, SnapshotName: name, Slot: 77, Base: []byte("base"), Incarnation: 5, Verify: e.verify,
		Release: func() { closeConn(conn); e.released.Add(1) }}, nil
}

// serve runs a server for the source and returns its address.
func serve(t testing.TB, source Source, partBytes int64) string {
	t.Helper()
	bin, err := postgres.BinDir()
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewServer(ServerConfig{ClusterID: "c1", Source: source, BinDir: bin, PartBytes: partBytes})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	s.Register(g)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func loadConfig(t testing.TB, address, connString string) LoadConfig {
	t.Helper()
	bin, err := postgres.BinDir()
	if err != nil {
		t.Fatal(err)
	}
	client, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return LoadConfig{ClusterID: "c1", ConnString: connString, Client: client, BinDir: bin, TempDir: t.TempDir()}
}

var database atomic.Int32

func newDatabase(t testing.TB, s *postgres.Server, prefix string) string {
	t.Helper()
	name := fmt.Sprintf("%s%d", prefix, database.Add(1))
	conn := postgrestest.Connect(t, s, "postgres")
	postgrestest.Exec(t, conn, "CREATE DATABASE "+name+" TEMPLATE template0")
	return name
}

// hashes are of the rows of every table, view and materialized view.
func hashes(t testing.TB, conn *pgx.Conn) map[string]string {
	t.Helper()
	postgrestest.Exec(t, conn, "SET search_path = pg_catalog", "SET extra_float_digits = 3")
	rows, err := conn.Query(t.Context(), `SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind IN ('r', 'p', 'v', 'm') AND `+userSchema+` AND c.relpersistence = 'p' AND c.relispopulated`)
	if err != nil {
		t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]string)
	for _, n := range names {
		var h string
		if err := conn.QueryRow(t.Context(), `SELECT count(*) || ' ' || coalesce(md5(string_agg(md5(whole_::text), '' ORDER BY md5(whole_::text))), '') FROM `+n+` whole_`).Scan(&h); err != nil {
			t.Fatalf("%s: %v", n, err)
		}
		out[n] = h
	}
	return out
}

func compare(t testing.TB, want, got map[string]string) {
	t.Helper()
	for n, h := range want {
		if got[n] != h {
			t.Errorf("%s: %q, want %q", n, got[n], h)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d tables and views, want %d", len(got), len(want))
	}
}

func one[T any](t testing.TB, conn *pgx.Conn, query string, args ...any) T {
	t.Helper()
	var v T
	if err := conn.QueryRow(context.Background(), query, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return v
}

// shared are two servers for the tests of the package, which use databases of
// their own in them. The destination's settings are in the way of every session
// that does not set its own.
var shared struct {
	once                sync.Once
	source, destination *postgres.Server
	err                 error
}

func TestMain(m *testing.M) {
	code := m.Run()
	for _, s := range []*postgres.Server{shared.source, shared.destination} {
		if s == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		if err := s.Stop(ctx, syscall.SIGQUIT); err != nil {
			fmt.Fprintln(os.Stderr, "stop postgres:", err)
		}
		cancel()
		os.RemoveAll(s.Dir)
	}
	os.Exit(code)
}

func startServer(settings map[string]string) (*postgres.Server, error) {
	bin, err := postgres.BinDir()
	if err != nil {
		return nil, err
	}
	// Not a directory of the test's: user postgres must be able to enter it.
	dir, err := os.MkdirTemp("/tmp", "quorate-snapshot-pg-")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	port, err := postgres.FreePort()
	if err != nil {
		return nil, err
	}
	s := &postgres.Server{BinDir: bin, Dir: dir, Port: port, Settings: settings}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := s.Init(ctx); err != nil {
		return nil, err
	}
	_, err = s.Start(ctx)
	return s, err
}

func servers(t testing.TB) (source, destination *postgres.Server) {
	t.Helper()
	shared.once.Do(func() {
		if shared.source, shared.err = startServer(map[string]string{"max_wal_size": "4GB"}); shared.err == nil {
			shared.destination, shared.err = startServer(map[string]string{"max_wal_size": "4GB", "default_transaction_read_only": "on"})
		}
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.source, shared.destination
}

func newWritable(t testing.TB, s *postgres.Server, prefix string) string {
	t.Helper()
	name := fmt.Sprintf("%s%d", prefix, database.Add(1))
	conn := postgrestest.Connect(t, s, "postgres")
	postgrestest.Exec(t, conn, "SET default_transaction_read_only = off", "CREATE DATABASE "+name+" TEMPLATE template0")
	return name
}

const everything = `
CREATE ROLE owner_role LOGIN;
CREATE ROLE reader_role;
CREATE SCHEMA "App ""x";
CREATE SCHEMA quorate;
CREATE TABLE quorate.state (x int);
CREATE FUNCTION quorate.fence() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''fenced''; END';
CREATE FUNCTION quorate.ddl() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
CREATE EVENT TRIGGER quorate_ddl ON ddl_command_end EXECUTE FUNCTION quorate.ddl();
CREATE EXTENSION pgcrypto;
CREATE TYPE mood AS ENUM ('a', 'b');
CREATE DOMAIN posint AS int CHECK (value > 0);
CREATE TYPE pair AS (x int, y text);
CREATE COLLATION german (provider = icu, locale = 'de-DE');
CREATE FUNCTION twice(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 2 * $1';
CREATE TABLE plain (id bigserial PRIMARY KEY, m mood, p posint, c pair, a int[], t text COLLATE german, tw int GENERATED ALWAYS AS (twice(p)) STORED);
INSERT INTO plain (m, p, c, a, t) SELECT 'a', g, (g, 'y')::pair, ARRAY[g], 'text ' || g FROM generate_series(1, 5000) g;
CREATE TABLE big (id int GENERATED ALWAYS AS IDENTITY, pad text);
INSERT INTO big (pad) SELECT md5(g::text) || repeat(md5((g % 50)::text), 10) FROM generate_series(1, 30000) g;
DELETE FROM big WHERE id % 10 = 3;
ALTER TABLE big ADD PRIMARY KEY (id);
CREATE INDEX big_pad ON big (left(pad, 8));
CREATE TABLE parts (id int, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE parts_a PARTITION OF parts FOR VALUES FROM ('2024-01-01') TO ('2024-06-01');
CREATE TABLE parts_b PARTITION OF parts DEFAULT PARTITION BY HASH (id);
CREATE TABLE parts_b0 PARTITION OF parts_b FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE parts_b1 PARTITION OF parts_b FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO parts SELECT g, '2024-01-01'::date + g FROM generate_series(1, 300) g;
CREATE TABLE parent (id int);
CREATE TABLE child (extra text) INHERITS (parent);
INSERT INTO parent VALUES (1); INSERT INTO child VALUES (2, 'c');
CREATE UNLOGGED TABLE volatile (id int); INSERT INTO volatile VALUES (1);
CREATE TABLE none (); INSERT INTO none DEFAULT VALUES; INSERT INTO none DEFAULT VALUES;
CREATE TABLE "App ""x"."T %d" ("C ""1" text, dropped int, "ü" bytea);
ALTER TABLE "App ""x"."T %d" DROP dropped;
INSERT INTO "App ""x"."T %d" VALUES (E'a\tb\\', '\x00ff'), (NULL, NULL), ('', '');
CREATE TABLE ref (id int PRIMARY KEY, big int REFERENCES big (id) DEFERRABLE INITIALLY DEFERRED, CHECK (id > 0));
INSERT INTO ref SELECT g, g FROM generate_series(4, 9) g;
CREATE VIEW v AS SELECT count(*) FROM plain;
CREATE MATERIALIZED VIEW mv2_base AS SELECT p % 10 AS k, count(*) AS n FROM plain GROUP BY 1;
CREATE MATERIALIZED VIEW amv AS SELECT sum(n) AS s FROM mv2_base;
CREATE MATERIALIZED VIEW unfilled AS SELECT 1 AS x WITH NO DATA;
CREATE UNIQUE INDEX ON mv2_base (k);
CREATE SEQUENCE sq INCREMENT -5 MAXVALUE 100 START 50;
SELECT nextval('sq'), nextval('sq');
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''fires''; END';
CREATE TRIGGER own AFTER INSERT ON plain FOR EACH ROW EXECUTE FUNCTION note();
ALTER TABLE plain ENABLE ALWAYS TRIGGER own;
CREATE TRIGGER quorate_fence BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON plain FOR EACH STATEMENT EXECUTE FUNCTION quorate.fence();
ALTER TABLE plain ENABLE ALWAYS TRIGGER quorate_fence;
CREATE TRIGGER quorate_fence BEFORE INSERT ON parts FOR EACH STATEMENT EXECUTE FUNCTION quorate.fence();
ALTER TABLE plain OWNER TO owner_role;
GRANT SELECT ON big TO reader_role;
ALTER TABLE big ENABLE ROW LEVEL SECURITY;
CREATE POLICY pol ON big TO reader_role USING (id < 100);
CREATE PUBLICATION quorate FOR ALL TABLES;
CREATE PUBLICATION theirs FOR TABLE big;
CREATE STATISTICS st ON id, pad FROM big;
CREATE RULE r AS ON DELETE TO ref DO ALSO NOTHING;
ALTER TABLE big REPLICA IDENTITY FULL;
COMMENT ON TABLE big IS 'commented';
CREATE FOREIGN DATA WRAPPER fdw; CREATE SERVER fs FOREIGN DATA WRAPPER fdw; CREATE FOREIGN TABLE ft (x int) SERVER fs;
`

func TestEverySortOfObject(t *testing.T) {
	src, dst := servers(t)
	db := newDatabase(t, src, "s")
	conn := postgrestest.Connect(t, src, db)
	if _, err := conn.PgConn().Exec(t.Context(), everything).ReadAll(); err != nil {
		t.Fatal(err)
	}
	want := hashes(t, postgrestest.Connect(t, src, db))
	e := &exporter{connString: src.DSN(db)}
	var opened sync.Once
	e.verify = func(context.Context) error { opened.Do(func() {}); return nil }
	address := serve(t, e, 1<<20)
	dest := newWritable(t, dst, "d")
	cfg := loadConfig(t, address, dst.DSN(dest))
	var phases []string
	cfg.Progress = func(p Progress) {
		if len(phases) == 0 || phases[len(phases)-1] != p.Phase {
			phases = append(phases, p.Phase)
		}
	}
	cfg.Streams = 1 // so that phases needs no lock
	m, err := Load(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	got := postgrestest.Connect(t, dst, dest)
	postgrestest.Exec(t, got, "SET default_transaction_read_only = off")
	compare(t, want, hashes(t, got))
	if m.Slot != 77 || string(m.Base) != "base" || m.Incarnation != 5 || strings.Join(phases, " ") != "schema data indexes analyze" {
		t.Errorf("manifest %+v, phases %v", m, phases)
	}
	if notes := strings.Join(m.Notes, "\n"); !strings.Contains(notes, `"owner_role" was missing`) || !strings.Contains(notes, `"reader_role" was missing`) {
		t.Errorf("notes: %s", notes)
	}
	for _, check := range []struct{ what, query, want string }{
		{"schema quorate", `SELECT count(*)::text FROM pg_namespace WHERE nspname = 'quorate'`, "0"},
		{"publications", `SELECT string_agg(pubname, ' ') FROM pg_publication`, "theirs"},
		{"triggers", `SELECT string_agg(tgname || tgenabled::text, ' ') FROM pg_trigger WHERE NOT tgisinternal`, "ownA"},
		{"event triggers", `SELECT count(*)::text FROM pg_event_trigger`, "0"},
		{"sequence", `SELECT nextval('public.sq')::text`, "40"},
		{"identity", `SELECT nextval('public.big_id_seq')::text`, "30001"},
		{"owner", `SELECT relowner::regrole::text FROM pg_class WHERE relname = 'plain'`, "owner_role"},
		{"unlogged", `SELECT count(*)::text FROM public.volatile`, "0"},
		{"unfilled view", `SELECT relispopulated::text FROM pg_class WHERE relname = 'unfilled'`, "false"},
		{"login", `SELECT rolcanlogin::text FROM pg_roles WHERE rolname = 'owner_role'`, "false"},
		{"statistics", `SELECT (count(*) > 0)::text FROM pg_stats WHERE tablename = 'big'`, "true"},
		{"valid constraints and indexes", `SELECT (SELECT count(*) FROM pg_constraint WHERE NOT convalidated) || ' ' || (SELECT count(*) FROM pg_index WHERE NOT indisvalid)`, "0 0"},
		{"identity of big", `SELECT relreplident::text FROM pg_class WHERE relname = 'big'`, "f"},
	} {
		if got := one[string](t, got, check.query); got != check.want {
			t.Errorf("%s: %s, want %s", check.what, got, check.want)
		}
	}
	// The schema is the same but for what is a region's own.
	if a, b := schemaOf(t, src, db), schemaOf(t, dst, dest); a != b {
		t.Errorf("schemas differ:\n%s", firstDifference(a, b))
	}
	for i := 0; e.released.Load() != 1; i++ {
		if i > 100 {
			t.Fatalf("the snapshot was released %d times", e.released.Load())
		}
		time.Sleep(10 * time.Millisecond)
	}

	// Into what is there now, nothing is loaded.
	if _, err := Load(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("a full database was loaded again: %v", err)
	}
}

func schemaOf(t testing.TB, s *postgres.Server, db string) string {
	t.Helper()
	cmd, said, err := program(t.Context(), s.BinDir, "pg_dump", s.DSN(db), nil, "--schema-only", "-N", "quorate")
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	var kept []string
	for line := range strings.SplitSeq(string(out), "\n") {
		if !strings.Contains(line, "quorate") && line != "" && !strings.HasPrefix(line, "--") && !strings.HasPrefix(line, `\`) && !strings.Contains(line, "EXECUTE FUNCTION quorate.") {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "\n")
}

func firstDifference(a, b string) string {
	as, bs := strings.Split(a, "\n"), strings.Split(b, "\n")
	for i := range min(len(as), len(bs)) {
		if as[i] != bs[i] {
			return fmt.Sprintf("line %d: %q\n%q", i, as[i:min(i+3, len(as))], bs[i:min(i+3, len(bs))])
		}
	}
	return fmt.Sprintf("%d and %d lines", len(as), len(bs))
}

// TestConcurrentWrites loads while the source goes on changing, and compares
// with what the exported snapshot itself holds.
func TestConcurrentWrites(t *testing.T) {
	src, dst := servers(t)
	db := newDatabase(t, src, "s")
	conn := postgrestest.Connect(t, src, db)
	postgrestest.Exec(t, conn, `CREATE TABLE a (id int PRIMARY KEY, n int, pad text)`, `CREATE TABLE b (id serial PRIMARY KEY, n int)`,
		`INSERT INTO a SELECT g, 0, repeat('x', 100) FROM generate_series(1, 60000) g`, `INSERT INTO b (n) VALUES (0)`)
	ctx, stop := context.WithCancel(t.Context())
	var writers sync.WaitGroup
	var written atomic.Int64
	write := func() {
		defer writers.Done()
		c, err := pgx.Connect(t.Context(), src.DSN(db))
		if err != nil {
			t.Error(err)
			return
		}
		defer closeConn(c)
		for i := 0; ctx.Err() == nil; i++ {
			if _, err := c.PgConn().Exec(t.Context(), fmt.Sprintf(`BEGIN; UPDATE a SET n = n + 1 WHERE id %% 1000 = %d; INSERT INTO b (n) VALUES (%d);
				DELETE FROM a WHERE id = %d; INSERT INTO a VALUES (100000 + %d, 1, repeat('y', 500)); COMMIT`, i%1000, i, 60000-i, i)).ReadAll(); err != nil {
				t.Error(err)
				return
			}
			written.Add(1)
		}
	}
	want := make(chan map[string]string, 1)
	var before int64
	e := &exporter{connString: src.DSN(db), opened: func(conn *pgx.Conn) { want <- hashes(t, conn); before = written.Load() }}
	address := serve(t, e, 1<<20)
	dest := newWritable(t, dst, "d")
	cfg := loadConfig(t, address, dst.DSN(dest))
	writers.Add(1)
	go write()
	m, err := Load(t.Context(), cfg)
	during := written.Load() - before
	stop()
	writers.Wait()
	if err != nil {
		t.Fatal(err)
	}
	compare(t, <-want, hashes(t, postgrestest.Connect(t, dst, dest)))
	if during == 0 || m.Rows < 60000 {
		t.Fatalf("%d transactions were written during the load of %d rows", during, m.Rows)
	}
}

// relay passes bytes on to address; spoil sees those of the server and may change
// them, or end the connection.
func relay(t testing.TB, address string, spoil func(b []byte, sofar int64) error) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var pumps sync.WaitGroup
	pumps.Add(1)
	go func() {
		defer pumps.Done()
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", address)
			if err != nil {
				client.Close()
				continue
			}
			pumps.Add(2)
			go func() {
				defer pumps.Done()
				io.Copy(server, client)
				server.Close()
			}()
			go func() {
				defer pumps.Done()
				defer client.Close()
				defer server.Close()
				var sofar int64
				buf := make([]byte, 32<<10)
				for {
					n, err := server.Read(buf)
					if err == nil {
						err = spoil(buf[:n], sofar)
					}
					if err != nil {
						return
					}
					sofar += int64(n)
					if _, err := client.Write(buf[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		pumps.Wait()
	})
	return l.Addr().String()
}

// TestBrokenTransport flips one byte of the stream, or cuts it, at many places:
// no load succeeds with other contents than the source's.
func TestBrokenTransport(t *testing.T) {
	src, dst := servers(t)
	db := newDatabase(t, src, "s")
	conn := postgrestest.Connect(t, src, db)
	postgrestest.Exec(t, conn, `CREATE TABLE a (id int, h text)`, `INSERT INTO a SELECT g, md5(g::text) || md5((-g)::text) FROM generate_series(1, 60000) g`)
	e := &exporter{connString: src.DSN(db)}
	address := serve(t, e, 2<<20)
	corrupt := 0
	for i, at := range []int64{400_000, 1_000_003, 2_300_001} {
		for _, cut := range []bool{false, true} {
			var hit atomic.Bool
			through := relay(t, address, func(b []byte, sofar int64) error {
				if at >= sofar && at < sofar+int64(len(b)) && hit.CompareAndSwap(false, true) {
					if cut {
						return io.ErrUnexpectedEOF
					}
					b[at-sofar] ^= 0x10
				}
				return nil
			})
			dest := newWritable(t, dst, "d")
			cfg := loadConfig(t, through, dst.DSN(dest))
			_, err := Load(t.Context(), cfg)
			if !hit.Load() {
				t.Fatalf("nothing passes at byte %d", at)
			}
			if err == nil {
				t.Errorf("%d: loaded in spite of a broken stream (cut %v)", i, cut)
			}
			if errors.Is(err, ErrCorrupt) {
				corrupt++
			}
		}
	}
	if corrupt == 0 {
		t.Error("no flipped byte was found by a checksum")
	}
}

// TestSourceKilled kills the source's PostgreSQL in the middle of the data.
func TestSourceKilled(t *testing.T) {
	_, dst := servers(t)
	src := postgrestest.Start(t, nil)
	db := newDatabase(t, src, "s")
	conn := postgrestest.Connect(t, src, db)
	postgrestest.Exec(t, conn, `CREATE TABLE a (id int, h text)`, `INSERT INTO a SELECT g, md5(g::text) || md5((-g)::text) FROM generate_series(1, 200000) g`)
	e := &exporter{connString: src.DSN(db)}
	address := serve(t, e, 1<<20)
	dest := newWritable(t, dst, "d")
	cfg := loadConfig(t, address, dst.DSN(dest))
	var once sync.Once
	cfg.Progress = func(p Progress) {
		if p.Phase == "data" && p.PartsDone > 1 {
			once.Do(func() {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				if err := src.Stop(ctx, syscall.SIGQUIT); err != nil {
					t.Error(err)
				}
			})
		}
	}
	_, err := Load(t.Context(), cfg)
	if err == nil {
		t.Fatal("loaded from a dead source")
	}
	t.Log(err)
}

func TestRefusals(t *testing.T) {
	src, dst := servers(t)
	db := newDatabase(t, src, "s")
	conn := postgrestest.Connect(t, src, db)
	postgrestest.Exec(t, conn, `CREATE TABLE a (id int)`, `INSERT INTO a VALUES (1)`)
	e := &exporter{connString: src.DSN(db)}
	address := serve(t, e, 1<<20)
	load := func(change func(*LoadConfig)) error {
		cfg := loadConfig(t, address, dst.DSN(newWritable(t, dst, "d")))
		if change != nil {
			change(&cfg)
		}
		_, err := Load(t.Context(), cfg)
		return err
	}
	expect := func(err error, part string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("error %v, want one with %q", err, part)
		}
	}
	expect(load(func(c *LoadConfig) { c.ClusterID = "other" }), `of cluster "c1", not "other"`)
	expect(load(func(c *LoadConfig) {
		other := postgrestest.Connect(t, dst, "postgres")
		postgrestest.Exec(t, other, "SET default_transaction_read_only = off", "CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
		c.ConnString = dst.DSN("latin")
	}), "encoding")
	e.verify = func(context.Context) error { return errors.New("slot 7 was not effective") }
	expect(load(nil), "slot 7 was not effective")
	e.verify = nil
	if err := load(nil); err != nil {
		t.Error(err)
	}
	postgrestest.Exec(t, conn, "SELECT lo_create(0)")
	expect(load(nil), "large objects")
}

// TestChunks cuts and joins, and breaks what is between in every way.
func TestChunks(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 3*ChunkBytes/16-5)
	make := func() []*snapshotpb.Chunk {
		var chunks []*snapshotpb.Chunk
		w := &chunkWriter{part: 3, send: func(c *snapshotpb.Chunk) error { chunks = append(chunks, c); return nil }}
		w.Write(content)
		if err := w.close(42); err != nil {
			t.Fatal(err)
		}
		return chunks
	}
	read := func(part uint32, chunks []*snapshotpb.Chunk) ([]byte, uint64, error) {
		r := &chunkReader{part: part, recv: func() (*snapshotpb.Chunk, error) {
			if len(chunks) == 0 {
				return nil, io.EOF
			}
			c := chunks[0]
			chunks = chunks[1:]
			return c, nil
		}}
		b, err := io.ReadAll(r)
		return b, r.rows, err
	}
	if b, rows, err := read(3, make()); err != nil || rows != 42 || !bytes.Equal(b, content) {
		t.Fatalf("%d bytes, %d rows, %v", len(b), rows, err)
	}
	for name, spoil := range map[string]func(c []*snapshotpb.Chunk) []*snapshotpb.Chunk{
		"order":        func(c []*snapshotpb.Chunk) []*snapshotpb.Chunk { c[0], c[1] = c[1], c[0]; return c },
		"missing":      func(c []*snapshotpb.Chunk) []*snapshotpb.Chunk { return append(c[:1], c[2:]...) },
		"no end":       func(c []*snapshotpb.Chunk) []*snapshotpb.Chunk { return c[:len(c)-1] },
		"flipped data": func(c []*snapshotpb.Chunk) []*snapshotpb.Chunk { c[1].Data[len(c[1].Data)/2] ^= 1; return c },
		"renumbered": func(c []*snapshotpb.Chunk) []*snapshotpb.Chunk {
			c[0], c[1] = c[1], c[0]
			c[0].Index, c[1].Index = 0, 1
			return c
		},
		"claims":   func(c []*snapshotpb.Chunk) []*snapshotpb.Chunk { c[0].RawBytes = 1 << 31; return c },
		"codec":    func(c []*snapshotpb.Chunk) []*snapshotpb.Chunk { c[0].Codec = 9; return c },
		"shortend": func(c []*snapshotpb.Chunk) []*snapshotpb.Chunk { c[len(c)-1].TotalBytes--; return c },
	} {
		if _, _, err := read(3, spoil(make())); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := read(4, make()); !errors.Is(err, ErrCorrupt) {
		t.Errorf("another part's: %v", err)
	}
}
