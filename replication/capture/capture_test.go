package capture

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres"
	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/entry"
)

const waitMax = 20 * time.Second

// event is one call of the Handler.
type event struct {
	kind    string // entry, digest or position
	payload entry.Payload
	header  entry.Header
	lsn     entry.LSN
}

// recorder is a Handler that passes every call on to the test.
type recorder struct {
	disposition Disposition
	events      chan event
	begins      chan Begin
}

func newRecorder(d Disposition) *recorder {
	return &recorder{disposition: d, events: make(chan event, 100_000), begins: make(chan Begin, 100_000)}
}

func (r *recorder) Begin(b Begin) Disposition {
	r.begins <- b
	return r.disposition
}

func (r *recorder) Entry(_ context.Context, p entry.Payload) error {
	p.Body = bytes.Clone(p.Body)
	r.events <- event{kind: "entry", payload: p, header: p.Header, lsn: p.Header.EndLSN}
	return nil
}

func (r *recorder) Digest(_ context.Context, h entry.Header) error {
	r.events <- event{kind: "digest", header: h, lsn: h.EndLSN}
	return nil
}

func (r *recorder) Position(_ context.Context, lsn entry.LSN) error {
	r.events <- event{kind: "position", lsn: lsn}
	return nil
}

// next returns the next event of that kind; it checks that nothing but
// positions lies before it.
func (r *recorder) next(t testing.TB, kind string) event {
	t.Helper()
	timeout := time.After(waitMax)
	for {
		select {
		case e := <-r.events:
			if e.kind == kind {
				return e
			}
			if e.kind != "position" {
				t.Fatalf("%s of transaction %d before the %s that was waited for:\n%s", e.kind, e.header.Xid, kind, render(t, e.payload.Body))
			}
		case <-timeout:
			t.Fatalf("no %s within %s", kind, waitMax)
		}
	}
}

var databases atomic.Int64

// database is one database of the test server with a publication and a
// replication slot.
type database struct {
	t      testing.TB
	server *postgres.Server
	name   string
	conn   *pgx.Conn
}

func newDatabase(t testing.TB, server *postgres.Server, setUp ...string) *database {
	t.Helper()
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToLower(t.Name()))
	if len(name) > 50 {
		name = name[len(name)-50:]
	}
	name = fmt.Sprintf("%s_%d", strings.Trim(name, "_"), databases.Add(1)) // a benchmark runs several times
	admin := postgrestest.Connect(t, server, "postgres")
	postgrestest.Exec(t, admin, "CREATE DATABASE "+name)
	d := &database{t: t, server: server, name: name, conn: postgrestest.Connect(t, server, name)}
	d.exec("SET synchronous_commit = local")
	d.exec(setUp...)
	d.exec("CREATE PUBLICATION quorate FOR ALL TABLES", "SELECT pg_create_logical_replication_slot('"+name+"', 'pgoutput')")
	t.Cleanup(func() {
		d.exec("SET synchronous_commit = local", "SELECT pg_drop_replication_slot('"+name+"')")
	})
	return d
}

func (d *database) exec(statements ...string) {
	d.t.Helper()
	postgrestest.Exec(d.t, d.conn, statements...)
}

func (d *database) one(query string) string {
	d.t.Helper()
	var s string
	if err := d.conn.QueryRow(context.Background(), query).Scan(&s); err != nil {
		d.t.Fatalf("%s: %v", query, err)
	}
	return s
}

func (d *database) lsn(query string) entry.LSN {
	d.t.Helper()
	var lsn entry.LSN
	if err := lsn.Scan(d.one(query)); err != nil {
		d.t.Fatal(err)
	}
	return lsn
}

func (d *database) config(h Handler) Config {
	return Config{ConnString: d.server.DSN(d.name), ReplicationSlot: d.name, Publication: "quorate", Handler: h}
}

// capture runs a stream until the test ends or stop is called.
func (d *database) capture(h Handler, change ...func(*Config)) (stream *Stream, stop func()) {
	d.t.Helper()
	cfg := d.config(h)
	for _, f := range change {
		f(&cfg)
	}
	stream, err := Open(context.Background(), cfg)
	if err != nil {
		d.t.Fatal(err)
	}
	if r, ok := h.(interface{ started(*Stream) }); ok {
		r.started(stream)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- stream.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			d.t.Errorf("stream: %v", err)
		}
	}
	d.t.Cleanup(stop)
	return stream, stop
}

// render reads bodies, in order those of one transaction, into JSON lines.
func render(t testing.TB, bodies ...[]byte) string {
	t.Helper()
	r := entry.NewReader(entry.NewRelationCache())
	var out strings.Builder
	for _, body := range bodies {
		r.Feed(body)
		for {
			c, ok, err := r.Next()
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				break
			}
			fmt.Fprintf(&out, "%s\n", c.AppendJSON(nil))
		}
	}
	if err := r.Finish(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestCapture(t *testing.T) {
	server := postgrestest.Start(t, map[string]string{"max_replication_slots": "20", "max_wal_senders": "20"})
	for _, tc := range []struct {
		name string
		run  func(*testing.T, *postgres.Server)
	}{
		{"commits arrive in order with their content", commitsInOrder},
		{"replayed transactions are positions", replayedTransactions},
		{"all_tables_publishes_fence", allTablesPublishesFence},
		{"a redelivered commit gives the same header", redeliveredCommit},
		{"large transactions go in fragments", largeTransaction},
		{"one large row is cut too", largeRow},
		{"every kind of change arrives", kindsOfChange},
		{"subtransactions and rollbacks", subtransactions},
		{"ddl stays in place, applications' messages do not travel", messages},
		{"values do not depend on settings", settings},
		{"open refuses what cannot work", openRefuses},
		{"the server's end ends the stream", serverEnds},
		{"handler errors end the stream", handlerErrors},
	} {
		t.Run(tc.name, func(t *testing.T) { tc.run(t, server) })
	}
}

func commitsInOrder(t *testing.T, server *postgres.Server) {
	db := newDatabase(t, server, "CREATE TABLE t(id int PRIMARY KEY, v text)")
	r := newRecorder(Propose)
	stream, _ := db.capture(r)
	var last entry.LSN
	for i := range 50 {
		tx := db.one(fmt.Sprintf("WITH i AS (INSERT INTO t VALUES (%d, 'v%d') RETURNING 1) SELECT pg_current_xact_id() FROM i", i, i))
		after := db.lsn("SELECT pg_current_wal_insert_lsn()")
		e := r.next(t, "entry")
		b := <-r.begins
		if got := fmt.Sprint(e.header.Xid); got != tx || b.Xid != e.header.Xid {
			t.Fatalf("xid %s, begin says %d, want %s", got, b.Xid, tx)
		}
		if e.lsn <= last || e.lsn > after || b.CommitLSN < last || b.CommitLSN >= e.lsn {
			t.Fatalf("commit at %s to %s after one that ended at %s; the server is at %s", b.CommitLSN, e.lsn, last, after)
		}
		last = e.lsn
		p := e.payload
		if p.Type != entry.TypeTransaction || p.Header.Changes != 1 || p.Header.Checksum != entry.Checksum(0, p.Body) || p.Header.BodyBytes != uint64(len(p.Body)) {
			t.Fatalf("%+v", p.Header)
		}
		if age := time.Since(p.Header.CommitTime); age < 0 || age > time.Minute {
			t.Fatalf("commit time %s", p.Header.CommitTime)
		}
		want := fmt.Sprintf(`{"op":"insert","schema":"public","table":"t","new":{"id":"%d","v":"v%d"}}`+"\n", i, i)
		if got := render(t, p.Body); got != want {
			t.Fatalf("%s\nwant %s", got, want)
		}
	}
	stream.Confirm(last)
	stream.Confirm(last - 1)
	if stream.Confirmed() != last {
		t.Fatalf("confirmed %s, want %s", stream.Confirmed(), last)
	}
	deadline := time.Now().Add(waitMax)
	for {
		var state string
		err := db.conn.QueryRow(context.Background(), `SELECT format('%s %s %s %s', write_lsn, flush_lsn, replay_lsn, application_name)
			FROM pg_stat_replication JOIN pg_replication_slots ON active_pid = pid WHERE slot_name = $1`, db.name).Scan(&state)
		want := fmt.Sprintf("%s %s %s quorate", last, last, last)
		if err == nil && state == want {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("server knows %q, %v; want %q", state, err, want)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func replayedTransactions(t *testing.T, server *postgres.Server) {
	db := newDatabase(t, server, "CREATE TABLE t(id int PRIMARY KEY)")
	r := newRecorder(Propose)
	db.capture(r)
	replay := postgrestest.Connect(t, server, db.name)
	postgrestest.Exec(t, replay, "SET synchronous_commit = local",
		"SELECT pg_replication_origin_create('quorate_main')", "SELECT pg_replication_origin_create('elsewhere')",
		"SELECT pg_replication_origin_session_setup('quorate_main')",
		"BEGIN", "SELECT pg_replication_origin_xact_setup('0/70', now())", "INSERT INTO t VALUES (1)", "COMMIT")
	end := db.lsn("SELECT pg_current_wal_insert_lsn()")
	for reached := entry.LSN(0); reached < end; {
		reached = r.next(t, "position").lsn
	}
	// Of another origin, such as a native subscription: a local write like any.
	postgrestest.Exec(t, replay, "SELECT pg_replication_origin_session_reset()", "SELECT pg_replication_origin_session_setup('elsewhere')",
		"BEGIN", "SELECT pg_replication_origin_xact_setup('0/80', now())", "INSERT INTO t VALUES (2)", "COMMIT")
	if got := render(t, r.next(t, "entry").payload.Body); !strings.Contains(got, `{"id":"2"}`) {
		t.Fatal(got)
	}
	// The relation was described within the replayed transaction only.
	db.exec("INSERT INTO t VALUES (3)")
	if got := render(t, r.next(t, "entry").payload.Body); !strings.Contains(got, `{"id":"3"}`) {
		t.Fatal(got)
	}
	if len(r.begins) != 2 {
		t.Fatalf("the handler was asked about %d transactions, want 2", len(r.begins))
	}
	postgrestest.Exec(t, replay, "SELECT pg_replication_origin_session_reset()", "SELECT pg_replication_origin_drop('quorate_main')", "SELECT pg_replication_origin_drop('elsewhere')")
}

// A publication FOR ALL TABLES publishes the bookkeeping tables as well: none of
// it may become an entry, alone or beside a user's changes.
func allTablesPublishesFence(t *testing.T, server *postgres.Server) {
	db := newDatabase(t, server, "CREATE SCHEMA quorate", "CREATE TABLE quorate.fence(id int PRIMARY KEY)", "CREATE TABLE quorate.b(id int PRIMARY KEY)", "CREATE TABLE t(id int PRIMARY KEY)")
	r := newRecorder(Propose)
	db.capture(r)
	db.exec("INSERT INTO quorate.fence VALUES (1)", "UPDATE quorate.fence SET id = 2", "TRUNCATE quorate.fence, quorate.b",
		"SELECT pg_logical_emit_message(true, 'quorate.local.x', 'x')", "SELECT pg_logical_emit_message(false, 'user', 'outside')")
	end := db.lsn("SELECT pg_current_wal_insert_lsn()")
	for reached := entry.LSN(0); reached < end; {
		reached = r.next(t, "position").lsn
	}
	db.exec("BEGIN", "INSERT INTO quorate.fence VALUES (3)", "INSERT INTO t VALUES (1)", "DELETE FROM quorate.fence", "TRUNCATE quorate.fence, t, quorate.b", "COMMIT")
	want := `{"op":"insert","schema":"public","table":"t","new":{"id":"1"}}
{"op":"truncate","tables":[{"schema":"public","table":"t"}]}
`
	e := r.next(t, "entry")
	if got := render(t, e.payload.Body); got != want || e.header.Changes != 2 {
		t.Fatalf("%d changes\n%s", e.header.Changes, got)
	}
	if len(r.begins) != 1 {
		t.Fatalf("the handler was asked about %d transactions, want 1", len(r.begins))
	}
}

func redeliveredCommit(t *testing.T, server *postgres.Server) {
	db := newDatabase(t, server, "CREATE TYPE mood AS ENUM ('sad', 'glad')", "CREATE SCHEMA s", "CREATE TABLE s.t(id int PRIMARY KEY, m mood, v text)", "CREATE TABLE u(id int PRIMARY KEY)")
	r := newRecorder(Propose)
	_, stop := db.capture(r, func(c *Config) { c.FragmentBytesMax = 2000 })
	const transactions = 9
	db.exec("INSERT INTO u VALUES (1)",
		"INSERT INTO s.t VALUES (1, 'sad', 'x')",
		"ALTER TYPE mood RENAME TO temper", // names of types are no part of a body
		"INSERT INTO s.t VALUES (2, 'glad', 'y')",
		// A renamed schema goes unnoticed by pgoutput until something else about
		// the table or the publication changes.
		"BEGIN", "ALTER SCHEMA s RENAME TO s2", "ALTER PUBLICATION quorate SET (publish = 'insert, update, delete, truncate')", "COMMIT",
		"INSERT INTO s2.t VALUES (3, 'glad', 'y')",
		"BEGIN", "INSERT INTO s2.t VALUES (4, 'sad', 'z')", "ALTER TABLE s2.t ADD w int DEFAULT 7", "INSERT INTO s2.t VALUES (5, 'sad', 'z')", "COMMIT",
		"BEGIN", "SELECT pg_logical_emit_message(true, 'traceparent', '00-0123456789abcdef0123456789abcdef-0123456789abcdef-01')", "UPDATE s2.t SET v = 'q'", "COMMIT",
		"ANALYZE s2.t", // makes the publisher describe the table again
		"DELETE FROM s2.t WHERE id = 1",
		"INSERT INTO s2.t SELECT i, 'sad', repeat('x', 100) FROM generate_series(10, 200) i",
		"INSERT INTO u VALUES (2)")
	collect := func(r *recorder) (headers []entry.Header, attempt uint64) {
		for len(headers) < transactions-1 {
			e := r.next(t, "entry")
			if e.payload.Type == entry.TypeFragment {
				continue
			}
			if e.payload.Type == entry.TypeCommit {
				attempt = e.payload.Attempt
			}
			headers = append(headers, e.header)
		}
		return headers, attempt
	}
	first, attempt := collect(r)
	stop()
	if attempt == 0 {
		t.Fatal("no transaction went in fragments")
	}

	// Again, by streams that begin elsewhere and know less.
	again := newRecorder(Propose)
	_, stop = db.capture(again, func(c *Config) { c.FragmentBytesMax = 1500 })
	second, attempt2 := collect(again)
	stop()
	if attempt2 <= attempt {
		t.Fatalf("attempt %d after %d", attempt2, attempt)
	}
	for i := range first {
		if first[i] != second[i] || !first[i].Same(second[i]) {
			t.Errorf("transaction %d:\n first %+v\nsecond %+v", i, first[i], second[i])
		}
	}
	digest := newRecorder(Digest)
	stream, stop := db.capture(digest, func(c *Config) { c.FragmentBytesMax = 1500 })
	for i := range first {
		if got := digest.next(t, "digest"); got.header != first[i] {
			t.Errorf("transaction %d:\n first %+v\ndigest %+v", i, first[i], got.header)
		}
	}
	// Part of it confirmed: the next stream begins there.
	stream.Confirm(first[4].EndLSN)
	deadline := time.Now().Add(waitMax)
	for db.lsn("SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '"+db.name+"'") < first[4].EndLSN {
		if time.Now().After(deadline) {
			t.Fatal("the confirmation does not arrive")
		}
		time.Sleep(5 * time.Millisecond)
	}
	stop()
	rest := newRecorder(Digest)
	db.capture(rest)
	for i := 5; i < len(first); i++ {
		if got := rest.next(t, "digest"); got.header != first[i] {
			t.Errorf("transaction %d:\n first %+v\n  rest %+v", i, first[i], got.header)
		}
	}
}

func kindsOfChange(t *testing.T, server *postgres.Server) {
	db := newDatabase(t, server,
		"CREATE TABLE t(id int PRIMARY KEY, big text, small int)", "ALTER TABLE t ALTER big SET STORAGE EXTERNAL",
		"CREATE TABLE f(a int, b text)", "ALTER TABLE f REPLICA IDENTITY FULL",
		"CREATE TABLE p(id int, v int, PRIMARY KEY (id)) PARTITION BY RANGE (id)", "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10)",
		"CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20)")
	r := newRecorder(Propose)
	db.capture(r)
	for _, step := range []struct{ sql, want string }{
		{"INSERT INTO t SELECT 1, repeat('x', 3000), 1", `{"op":"insert","schema":"public","table":"t","new":{"id":"1","big":"` + strings.Repeat("x", 3000) + `","small":"1"}}`},
		{"UPDATE t SET small = NULL", `{"op":"update","schema":"public","table":"t","new":{"id":"1","small":null},"unchanged":["big"]}`},
		{"UPDATE t SET id = 2", `{"op":"update","schema":"public","table":"t","key":{"id":"1"},"new":{"id":"2","small":null},"unchanged":["big"]}`},
		{"DELETE FROM t", `{"op":"delete","schema":"public","table":"t","key":{"id":"2"}}`},
		{"INSERT INTO f VALUES (1, ''), (1, NULL)", `{"op":"insert","schema":"public","table":"f","new":{"a":"1","b":""}}
{"op":"insert","schema":"public","table":"f","new":{"a":"1","b":null}}`},
		{"UPDATE f SET b = 'y' WHERE b = ''", `{"op":"update","schema":"public","table":"f","old":{"a":"1","b":""},"new":{"a":"1","b":"y"}}`},
		{"DELETE FROM f WHERE b = 'y'", `{"op":"delete","schema":"public","table":"f","old":{"a":"1","b":"y"}}`},
		{"INSERT INTO p VALUES (1, 1)", `{"op":"insert","schema":"public","table":"p1","new":{"id":"1","v":"1"}}`},
		{"UPDATE p SET id = 11", `{"op":"delete","schema":"public","table":"p1","key":{"id":"1"}}
{"op":"insert","schema":"public","table":"p2","new":{"id":"11","v":"1"}}`},
		{"TRUNCATE t, f RESTART IDENTITY CASCADE", `{"op":"truncate","tables":[{"schema":"public","table":"t"},{"schema":"public","table":"f"}],"cascade":true,"restart_identity":true}`},
	} {
		db.exec(step.sql)
		if got := render(t, r.next(t, "entry").payload.Body); got != step.want+"\n" {
			t.Errorf("%s:\n%.500s\nwant\n%.500s", step.sql, got, step.want)
		}
	}
}

func subtransactions(t *testing.T, server *postgres.Server) {
	db := newDatabase(t, server, "CREATE TABLE a(id int PRIMARY KEY)", "CREATE TABLE b(id int PRIMARY KEY)")
	r := newRecorder(Propose)
	db.capture(r)
	db.exec("BEGIN", "INSERT INTO a VALUES (1)", "ROLLBACK",
		"BEGIN", "INSERT INTO a VALUES (2)", "SAVEPOINT s", "INSERT INTO b VALUES (3)", "ROLLBACK TO s", "INSERT INTO b VALUES (4)",
		"SAVEPOINT s2", "INSERT INTO a VALUES (5)", "RELEASE s2", "INSERT INTO b VALUES (6)", "COMMIT")
	got := render(t, r.next(t, "entry").payload.Body)
	want := `{"op":"insert","schema":"public","table":"a","new":{"id":"2"}}
{"op":"insert","schema":"public","table":"b","new":{"id":"4"}}
{"op":"insert","schema":"public","table":"a","new":{"id":"5"}}
{"op":"insert","schema":"public","table":"b","new":{"id":"6"}}
`
	if got != want {
		t.Fatalf("%s", got)
	}
}

func messages(t *testing.T, server *postgres.Server) {
	db := newDatabase(t, server, "CREATE TABLE t(id int PRIMARY KEY)")
	r := newRecorder(Propose)
	db.capture(r)
	db.exec("BEGIN", "INSERT INTO t VALUES (1)", "SELECT pg_logical_emit_message(true, 'quorate.ddl', '{\"sql\":\"ALTER\"}')",
		"ALTER TABLE t ADD v int", "SELECT pg_logical_emit_message(true, 'traceparent', 'nonsense')",
		"SELECT pg_logical_emit_message(true, 'traceparent', '00-0123456789abcdef0123456789abcdef-0123456789abcdef-01')",
		"INSERT INTO t VALUES (2, 2)", "SELECT pg_logical_emit_message(true, 'mine', 'content')", "COMMIT")
	e := r.next(t, "entry")
	want := `{"op":"insert","schema":"public","table":"t","new":{"id":"1"}}
{"op":"ddl","ddl":{"sql":"ALTER"}}
{"op":"insert","schema":"public","table":"t","new":{"id":"2","v":"2"}}
`
	if got := render(t, e.payload.Body); got != want || e.header.Changes != 3 {
		t.Fatalf("%d changes\n%s", e.header.Changes, got)
	}
	trace := entry.Trace{TraceID: [16]byte{1, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 1, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef}, SpanID: [8]byte{1, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef}, Flags: 1}
	if e.header.Trace != trace {
		t.Fatalf("trace %+v", e.header.Trace)
	}
	// A trace alone is no change: the commit is a position.
	db.exec("SELECT pg_logical_emit_message(true, 'traceparent', '00-0123456789abcdef0123456789abcdef-0123456789abcdef-01')")
	end := db.lsn("SELECT pg_current_wal_insert_lsn()")
	for reached := entry.LSN(0); reached < end; {
		reached = r.next(t, "position").lsn
	}
}

func settings(t *testing.T, server *postgres.Server) {
	db := newDatabase(t, server, "CREATE TABLE t(ts timestamptz PRIMARY KEY, f float8, i interval, b bytea, m money, r regclass)")
	db.exec("ALTER DATABASE "+db.name+" SET timezone = 'Asia/Tokyo'", "ALTER DATABASE "+db.name+" SET datestyle = 'German'",
		"ALTER DATABASE "+db.name+" SET extra_float_digits = -3", "ALTER DATABASE "+db.name+" SET intervalstyle = 'iso_8601'", "ALTER DATABASE "+db.name+" SET bytea_output = 'escape'")
	r := newRecorder(Propose)
	db.capture(r)
	db.exec("INSERT INTO t VALUES ('2026-02-03 04:05:06.789+00', 0.1::float8 + 0.2::float8, '1 day 2 hours', '\\x00ff', 1.5, 't')")
	want := `{"op":"insert","schema":"public","table":"t","new":{"ts":"2026-02-03 04:05:06.789+00","f":"0.30000000000000004","i":"1 day 02:00:00","b":"\\x00ff","m":"$1.50","r":"public.t"}}
`
	if got := render(t, r.next(t, "entry").payload.Body); got != want && got != strings.Replace(want, "$", "", 1) {
		t.Fatalf("%s", got)
	}
}
