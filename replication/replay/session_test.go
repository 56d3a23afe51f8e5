package replay

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/entry"
)

func (p *pair) table() {
	p.both(`CREATE TABLE t (id int PRIMARY KEY, v text)`)
}

// progressElsewhere is what another session reads.
func (p *pair) progressElsewhere() uint64 {
	p.t.Helper()
	slot, err := Progress(p.t.Context(), p.target, p.origin, true)
	if err != nil {
		p.t.Fatal(err)
	}
	return slot
}

// rollback_then_bookkeeping: a batch that was rolled back after its position was
// set must leave a session in which nothing can commit that position.
func TestRollbackThenBookkeeping(t *testing.T) {
	p := newPair(t)
	p.table()
	p.do(`INSERT INTO t VALUES (1, 'a')`)
	first := p.transactions()
	s := p.connect()
	p.apply(s, first)

	// The hazard itself: position set, rolled back, another write in that session.
	hazard, err := pgx.Connect(t.Context(), p.server.DSN(p.destDB))
	if err != nil {
		t.Fatal(err)
	}
	defer hazard.Close(context.Background())
	postgrestest.Exec(t, hazard, `SELECT pg_replication_origin_create('hazard`+p.origin+`')`, `SELECT pg_replication_origin_session_setup('hazard`+p.origin+`')`,
		`BEGIN`, `SELECT pg_replication_origin_xact_setup('0/70', now())`, `INSERT INTO t VALUES (70, 'x')`, `ROLLBACK`, `CREATE TABLE bookkeeping ()`)
	if got, _ := Progress(t.Context(), p.target, "hazard"+p.origin, false); got != 0x70 {
		t.Fatalf("progress is %#x: the hazard this test is about does not exist here", got)
	}

	p.do(`INSERT INTO t VALUES (2, 'b')`, `INSERT INTO t VALUES (3, 'c')`)
	batch := p.transactions()
	postgrestest.Exec(t, p.target, `INSERT INTO t VALUES (3, 'in the way')`)
	conn := s.conn
	err = s.Apply(t.Context(), batch)
	var conflict *ConflictError
	if !errors.As(err, &conflict) || conflict.Slot != batch[1].Slot || conflict.Table != "public.t" || conflict.Key != "(id)=(3)" {
		t.Fatalf("error is %v", err)
	}
	if !conn.IsClosed() {
		t.Fatal("the connection of the failed batch is still open")
	}
	if err := s.Apply(t.Context(), batch); !errors.Is(err, ErrClosed) {
		t.Fatalf("a session goes on after an error: %v", err)
	}
	if got := p.progressElsewhere(); got != first[0].Slot {
		t.Fatalf("progress is %d after a batch that was rolled back, want %d", got, first[0].Slot)
	}
	postgrestest.Exec(t, p.target, `DELETE FROM t WHERE id = 3`)
	s = p.connect()
	if s.Progress() != first[0].Slot {
		t.Fatalf("a new session starts at %d", s.Progress())
	}
	p.apply(s, batch)
	p.same("t")
}

// noop_slot_wait_applied: slots that write nothing do not move progress, and the
// caller knows; it is moved when asked, or with the next slot that writes.
func TestNoopSlotWaitApplied(t *testing.T) {
	p := newPair(t)
	p.table()
	p.do(`INSERT INTO t VALUES (1, 'a')`)
	batch := p.transactions()
	s := p.connect()
	p.apply(s, batch)
	noop := []Transaction{{Slot: 2}, {Slot: 3, Payload: entry.Payload{Type: entry.TypeFragment, Fragment: 1, Body: []byte{1}}}}
	p.apply(s, noop)
	if s.Applied() != 3 || s.Progress() != 1 || p.progressElsewhere() != 1 {
		t.Fatalf("after two slots that write nothing: applied %d, progress %d, in the server %d", s.Applied(), s.Progress(), p.progressElsewhere())
	}
	if err := s.ForceProgress(t.Context(), []Transaction{{Slot: 4}}); err != nil {
		t.Fatal(err)
	}
	if s.Applied() != 4 || s.Progress() != 4 || p.progressElsewhere() != 4 {
		t.Fatalf("after forcing: applied %d, progress %d, in the server %d", s.Applied(), s.Progress(), p.progressElsewhere())
	}
	p.slot = 5
	p.do(`INSERT INTO t VALUES (2, 'a')`)
	p.apply(s, append([]Transaction{{Slot: 5}}, append(p.transactions(), Transaction{Slot: 7})...))
	if s.Progress() != 7 || p.progressElsewhere() != 7 {
		t.Fatalf("a batch that writes moves progress to %d, in the server %d, want its last slot", s.Progress(), p.progressElsewhere())
	}
	if flushed, err := s.Flushed(t.Context()); err != nil || flushed != 7 {
		t.Fatalf("flushed %d, %v", flushed, err)
	}
}

func TestConflicts(t *testing.T) {
	for _, tc := range []struct{ name, spoil, change, key, want string }{
		{"update of a missing row", `DELETE FROM t WHERE id = 5`, `UPDATE t SET v = 'x'`, "(id)=(5)", "to update 1 row(s), met 0"},
		{"delete of a missing row", `DELETE FROM t WHERE id = 5`, `DELETE FROM t WHERE id > 3`, "(id)=(5)", "to delete 1 row(s), met 0"},
		{"insert of a present row", `INSERT INTO t VALUES (11, '')`, `INSERT INTO t SELECT g, '' FROM generate_series(10, 5000) g`, "(id)=(11)", "to insert 1 row(s)"},
		{"key moves onto a present row", `INSERT INTO t VALUES (15, '')`, `UPDATE t SET id = 15 WHERE id = 5`, "(id)=(5)", "to update 1 row(s)"},
		{"violated constraint", `ALTER TABLE t ADD CHECK (v <> 'bad')`, `UPDATE t SET v = 'bad' WHERE id = 4`, "(id)=(4)", "to update 1 row(s)"},
		{"missing column", `ALTER TABLE t DROP v`, `UPDATE t SET v = 'bad' WHERE id = 4`, "", `column "v" to exist`},
		{"missing table", `DROP TABLE t`, `UPDATE t SET v = 'bad' WHERE id = 4`, "", "the table to exist"},
		{"other type", `ALTER TABLE t ALTER v TYPE int USING 1`, `UPDATE t SET v = 'bad' WHERE id = 4`, "(id)=(4)", "to update 1 row(s)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t)
			p.table()
			p.do(`INSERT INTO t SELECT g, 'v' FROM generate_series(1, 9) g`)
			s := p.connect()
			p.apply(s, p.transactions())
			postgrestest.Exec(t, p.target, tc.spoil)
			p.do(`INSERT INTO t VALUES (-1, '5')`, tc.change)
			batch := p.transactions()
			err := s.Apply(t.Context(), batch)
			var conflict *ConflictError
			if !errors.As(err, &conflict) {
				t.Fatalf("error is %v", err)
			}
			if conflict.Key != tc.key || !strings.HasSuffix(conflict.Want, tc.want) || conflict.Table != "public.t" {
				t.Fatalf("conflict is %+v", conflict)
			}
			if tc.key != "" && conflict.Slot != batch[1].Slot {
				t.Fatalf("conflict in slot %d, want %d", conflict.Slot, batch[1].Slot)
			}
			if got := p.progressElsewhere(); got != 1 {
				t.Fatalf("progress is %d", got)
			}
		})
	}
}

func TestDDLAndMarksAtTheirPlace(t *testing.T) {
	p := newPair(t)
	p.table()
	ddl := func(sql string) {
		p.do(`BEGIN; ` + sql + `; SELECT pg_logical_emit_message(true, 'quorate.ddl', '` + strings.ReplaceAll(sql, "'", "''") + `'); COMMIT`)
	}
	p.do(`INSERT INTO t VALUES (1, 'a')`)
	ddl(`ALTER TABLE t ADD w int DEFAULT 5`)
	p.do(`INSERT INTO t VALUES (2, 'b', 6)`, `UPDATE t SET w = 7 WHERE id = 1`, `SELECT pg_logical_emit_message(true, 'traceparent', '00-x')`)
	p.do(`BEGIN; INSERT INTO t VALUES (3, 'c', 1); ALTER TABLE t RENAME v TO vv; SELECT pg_logical_emit_message(true, 'quorate.ddl', 'ALTER TABLE t RENAME v TO vv; SET LOCAL search_path = nowhere; SET ROLE pg_monitor'); INSERT INTO t VALUES (4, 'd', 1); COMMIT`)
	ddl(`CREATE SEQUENCE sq`)
	ddl(`CREATE TABLE late (id int PRIMARY KEY)`)
	p.do(`INSERT INTO late VALUES (1)`, `UPDATE t SET vv = 'z'`)
	batch := p.transactions()
	p.slot++
	batch = append(batch, Transaction{Slot: p.slot, Payload: entry.Payload{Type: entry.TypeMarks, Marks: []entry.Mark{{Schema: "public", Name: "sq", Value: 30}, {Schema: "public", Name: "sq", Value: 41}}}})
	cfg := p.config()
	cfg.DDL = func(ctx context.Context, conn *pgx.Conn, content []byte) error {
		if _, err := conn.Exec(ctx, "SET LOCAL search_path = public"); err != nil {
			return err
		}
		_, err := conn.PgConn().Exec(ctx, string(content)).ReadAll()
		return err
	}
	s, err := Connect(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	p.apply(s, batch)
	p.same("t", "late")
	if n := one[int64](t, p.target, "SELECT nextval('sq')"); n != 42 {
		t.Fatalf("sequence gives %d", n)
	}
	// The fast statements must not be left with an old plan or a lost setting.
	if got := one[string](t, s.conn, "SHOW session_replication_role"); got != "replica" {
		t.Fatalf("session_replication_role is %s", got)
	}
	if s.Stats().Retries != 0 {
		t.Fatal("retried")
	}
}

// TestFragments applies one transaction from small fragments that cut through
// messages, whose buffer is reused.
func TestFragments(t *testing.T) {
	p := newPair(t)
	p.table()
	p.both(`CREATE TABLE other (id int PRIMARY KEY, v text UNIQUE)`)
	p.do(`BEGIN; INSERT INTO t SELECT g, 'row ' || g FROM generate_series(1, 20000) g; INSERT INTO other SELECT g, repeat('x', 3000) || g FROM generate_series(1, 50) g;
		UPDATE t SET v = v || '!' WHERE id % 7 = 0; UPDATE other SET v = 'short' || id; DELETE FROM t WHERE id % 5 = 0; COMMIT`)
	whole := p.transactions()[0]
	var fragments [][]byte
	for chunk := range slices.Chunk(whole.Payload.Body, 1000) {
		fragments = append(fragments, chunk)
	}
	commit := Transaction{Slot: 9, Payload: entry.Payload{Type: entry.TypeCommit, Header: whole.Payload.Header, Fragment: uint32(len(fragments))},
		Fragments: func(yield func([]byte) error) error {
			buf := make([]byte, 1000)
			for _, f := range fragments {
				n := copy(buf, f)
				if err := yield(buf[:n:n]); err != nil {
					return err
				}
				for i := range buf {
					buf[i] = 0xff
				}
			}
			return nil
		}}
	s := p.connect()
	bad := commit
	bad.Payload.Header.Checksum++
	if err := s.Apply(t.Context(), []Transaction{bad}); err == nil || !strings.Contains(err.Error(), "checksum") {
		t.Fatalf("a wrong checksum gives %v", err)
	}
	if n := one[int](t, p.target, "SELECT count(*) FROM t"); n != 0 {
		t.Fatalf("%d rows of a refused transaction", n)
	}
	s = p.connect()
	p.apply(s, []Transaction{commit})
	p.same("t", "other")
	if s.Stats().Retries != 0 {
		t.Fatal("retried")
	}
}

func TestTriggersThatFireInReplay(t *testing.T) {
	p := newPair(t)
	p.table()
	p.both(`CREATE TABLE log (n serial, id int, present bigint)`,
		`CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.log (id, present) SELECT NEW.id, count(*) FROM public.t; RETURN NEW; END $$`)
	postgrestest.Exec(t, p.target, `CREATE TRIGGER ordinary BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION note()`)
	s := p.connect()
	p.do(`INSERT INTO t SELECT g, '' FROM generate_series(1, 5) g`)
	p.apply(s, p.transactions())
	if n := one[int](t, p.target, "SELECT count(*) FROM log"); n != 0 {
		t.Fatal("an ordinary trigger fired in replay")
	}
	postgrestest.Exec(t, p.target, `ALTER TABLE t ENABLE ALWAYS TRIGGER ordinary`)
	s.Close()
	s = p.connect()
	p.do(`INSERT INTO t SELECT g, '' FROM generate_series(6, 9) g`)
	p.apply(s, p.transactions())
	if got := one[string](t, p.target, "SELECT string_agg(id || ':' || present, ' ' ORDER BY n) FROM log"); got != "6:5 7:6 8:7 9:8" {
		t.Fatalf("the trigger saw %s", got)
	}
}

// TestReaderInTheWay: a reader's lock blocks TRUNCATE; replay tries again in new
// connections and ends the reader only after the set delay, at once while
// promoting.
func TestReaderInTheWay(t *testing.T) {
	for _, promoting := range []bool{false, true} {
		t.Run(fmt.Sprintf("promoting=%v", promoting), func(t *testing.T) {
			p := newPair(t)
			p.table()
			p.do(`INSERT INTO t VALUES (1, '')`)
			cfg := p.config()
			cfg.LockTimeout, cfg.MaxReaderDelay = 100*time.Millisecond, 700*time.Millisecond
			if promoting {
				cfg.LockTimeout, cfg.MaxReaderDelay = 20*time.Second, time.Hour
			}
			s, err := Connect(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			p.apply(s, p.transactions())
			reader := postgrestest.Connect(t, p.server, p.destDB)
			postgrestest.Exec(t, reader, "BEGIN", "SELECT * FROM t")
			p.do(`TRUNCATE t`, `INSERT INTO t VALUES (2, '')`)
			batch := p.transactions()
			began := time.Now()
			s.SetPromoting(promoting)
			p.apply(s, batch)
			took := time.Since(began)
			if err := reader.Ping(t.Context()); err == nil {
				t.Fatal("the reader is still there")
			}
			if st := s.Stats(); st.Terminated != 1 || !promoting && (st.Retries < 2 || took < cfg.MaxReaderDelay) || promoting && st.Retries != 0 {
				t.Fatalf("took %v, %+v", took, st)
			}
			p.same("t")
		})
	}
}

// TestReaderThatEnds is not killed.
func TestReaderThatEnds(t *testing.T) {
	p := newPair(t)
	p.table()
	cfg := p.config()
	cfg.LockTimeout = 30 * time.Millisecond
	s, err := Connect(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	reader := postgrestest.Connect(t, p.server, p.destDB)
	postgrestest.Exec(t, reader, "BEGIN", "SELECT * FROM t")
	p.do(`TRUNCATE t`)
	batch := p.transactions()
	done := make(chan error, 1)
	go func() { done <- s.Apply(t.Context(), batch) }()
	for s.Stats().Retries < 2 {
		time.Sleep(5 * time.Millisecond)
	}
	postgrestest.Exec(t, reader, "COMMIT")
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := reader.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestFormerLife: a session whose client is gone still holds the origin and is
// in the middle of something.
func TestFormerLife(t *testing.T) {
	p := newPair(t)
	p.table()
	old := p.connect()
	postgrestest.Exec(t, old.conn, "BEGIN", "INSERT INTO public.t VALUES (1, 'of the former life')")
	s := p.connect()
	if !strings.Contains(fmt.Sprint(old.conn.Ping(t.Context())), "57P01") {
		t.Fatal("the former session goes on")
	}
	if n := one[int](t, p.target, "SELECT count(*) FROM t"); n != 0 {
		t.Fatal("the former session's transaction committed")
	}
	p.do(`INSERT INTO t VALUES (1, '')`)
	p.apply(s, p.transactions())

	cfg := p.config()
	cfg.ApplicationName, cfg.ConnectTimeout = "somebody else", time.Second
	if _, err := Connect(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "held by another session") {
		t.Fatalf("a stranger's origin was taken: %v", err)
	}
}

func TestExport(t *testing.T) {
	p := newPair(t)
	p.table()
	s := p.connect()
	p.do(`INSERT INTO t VALUES (1, '')`)
	p.apply(s, p.transactions())
	p.apply(s, []Transaction{{Slot: 2}})
	p.slot = 2
	e, err := s.Export(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer e.Release()
	p.do(`INSERT INTO t VALUES (2, '')`)
	p.apply(s, p.transactions())
	postgrestest.Exec(t, p.target, "BEGIN ISOLATION LEVEL REPEATABLE READ", "SET TRANSACTION SNAPSHOT '"+e.Name+"'")
	if n := one[int](t, p.target, "SELECT count(*) FROM t"); n != 1 || e.Slot != 2 {
		t.Fatalf("snapshot of slot %d has %d rows", e.Slot, n)
	}
	postgrestest.Exec(t, p.target, "COMMIT")
	if n := one[int](t, p.target, "SELECT count(*) FROM t"); n != 2 {
		t.Fatal("replay was held up")
	}
}

func TestAdvanceOrigin(t *testing.T) {
	p := newPair(t)
	ctx := t.Context()
	for _, step := range []struct{ to, want uint64 }{{500, 500}, {400, 500}, {501, 501}} {
		if err := AdvanceOrigin(ctx, p.target, p.origin, step.to); err != nil {
			t.Fatal(err)
		}
		if got := p.progressElsewhere(); got != step.want {
			t.Fatalf("progress is %d after advancing to %d", got, step.to)
		}
	}
	// On disk: what was flushed includes the record of the advance.
	insert := one[string](t, p.target, "SELECT pg_current_wal_insert_lsn()::text")
	if err := AdvanceOrigin(ctx, p.target, p.origin, 600); err != nil {
		t.Fatal(err)
	}
	flushed := one[string](t, p.target, "SELECT pg_current_wal_flush_lsn()::text")
	a, _ := pglogrepl.ParseLSN(insert)
	if b, _ := pglogrepl.ParseLSN(flushed); b <= a {
		t.Fatalf("flushed up to %v, the advance is above %v", b, a)
	}
	s := p.connect()
	if s.Progress() != 600 || s.Applied() != 600 {
		t.Fatalf("session starts at %d", s.Progress())
	}
	if err := AdvanceOrigin(ctx, p.target, p.origin, 700); err == nil {
		t.Fatal("advanced an origin that a session holds")
	}
}
