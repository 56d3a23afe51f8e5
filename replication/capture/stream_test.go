package capture

import (
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"quorate/deploy/sandbox/postgres"
	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/entry"
)

func openRefuses(t *testing.T, server *postgres.Server) {
	db := newDatabase(t, server)
	ctx, cancel := context.WithTimeout(context.Background(), waitMax)
	defer cancel()
	for _, tc := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"settings", func(c *Config) { c.ReplicationSlot, c.Publication, c.Handler = "Not One", "", nil }, "setting Publication is missing"},
		{"missing replication slot", func(c *Config) { c.ReplicationSlot = "no_such" }, "42704"},
		{"no server", func(c *Config) { c.ConnString = "postgres://postgres@127.0.0.1:1/x" }, "connect for replication"},
	} {
		cfg := db.config(newRecorder(Propose))
		tc.change(&cfg)
		if _, err := Open(ctx, cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q in it", tc.name, err, tc.want)
		}
	}
	_, stop := db.capture(newRecorder(Propose))
	var pgErr *pgconn.PgError
	if _, err := Open(ctx, db.config(newRecorder(Propose))); !errors.As(err, &pgErr) || pgErr.Code != "55006" {
		t.Errorf("replication slot in use: %v, want 55006", err)
	}
	// Run gives the replication slot back before it returns.
	for range 10 {
		stop()
		_, stop = db.capture(newRecorder(Propose))
	}
}

func serverEnds(t *testing.T, server *postgres.Server) {
	db := newDatabase(t, server)
	stream, err := Open(context.Background(), db.config(newRecorder(Propose)))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- stream.Run(context.Background()) }()
	db.exec("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '" + db.name + "'")
	select {
	case err := <-done:
		var pgErr *pgconn.PgError
		if !errors.As(err, &pgErr) || pgErr.Code != "57P01" {
			t.Fatalf("%v, want 57P01", err)
		}
	case <-time.After(waitMax):
		t.Fatal("the stream goes on")
	}
}

type failing struct{ *recorder }

var errHandler = errors.New("no room")

func (failing) Entry(context.Context, entry.Payload) error { return errHandler }

func handlerErrors(t *testing.T, server *postgres.Server) {
	db := newDatabase(t, server, "CREATE TABLE t(id int)")
	stream, err := Open(context.Background(), db.config(failing{newRecorder(Propose)}))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- stream.Run(context.Background()) }()
	db.exec("INSERT INTO t VALUES (1)")
	select {
	case err := <-done:
		if !errors.Is(err, errHandler) {
			t.Fatal(err)
		}
	case <-time.After(waitMax):
		t.Fatal("the stream goes on")
	}
}

// confirmAll is the Handler of a bare synchronous standby.
type confirmAll struct {
	stream *Stream
}

func (c *confirmAll) started(s *Stream)       { c.stream = s }
func (c *confirmAll) Begin(Begin) Disposition { return Propose }
func (c *confirmAll) Entry(_ context.Context, p entry.Payload) error {
	if p.Type != entry.TypeFragment {
		c.stream.Confirm(p.Header.EndLSN)
	}
	return nil
}
func (c *confirmAll) Digest(context.Context, entry.Header) error { return nil }
func (c *confirmAll) Position(_ context.Context, lsn entry.LSN) error {
	c.stream.Confirm(lsn)
	return nil
}

// synchronous makes application name quorate the server's synchronous standby,
// proves it by a commit that waits, and releases that.
func synchronous(t testing.TB, db *database, stream *Stream) {
	t.Helper()
	db.exec("ALTER SYSTEM SET synchronous_standby_names = 'quorate'", "SELECT pg_reload_conf()")
	t.Cleanup(func() {
		db.exec("SET synchronous_commit = local", "ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")
	})
	for deadline := time.Now().Add(waitMax); time.Now().Before(deadline); {
		probe := commitHangs(t, db.server, db.name, "SELECT pg_logical_emit_message(true, 'quorate.local.probe', '')")
		for {
			select {
			case <-probe: // the checkpointer has not read the setting yet
			case <-time.After(5 * time.Millisecond):
				if db.one("SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == "0" {
					continue
				}
				stream.Confirm(db.lsn("SELECT pg_current_wal_flush_lsn()"))
				isReleased(t, probe, "the probe")
				return
			}
			break
		}
	}
	t.Fatal("no commit waits")
}

// commitHangs runs a statement in a session of its own and reports whether its
// commit is still waiting after a while; released tells when it has ended.
func commitHangs(t testing.TB, server *postgres.Server, name, statement string) (released chan error) {
	t.Helper()
	conn := postgrestest.Connect(t, server, name)
	released = make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.Background(), statement)
		released <- err
	}()
	return released
}

func stillWaits(t testing.TB, db *database, released chan error, what string) {
	t.Helper()
	deadline := time.Now().Add(waitMax)
	for db.one("SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == "0" {
		select {
		case err := <-released:
			t.Fatalf("%s was released: %v", what, err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not wait", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	select {
	case err := <-released:
		t.Fatalf("%s was released: %v", what, err)
	case <-time.After(1500 * time.Millisecond): // more than one sign of life
	}
}

func isReleased(t testing.TB, released chan error, what string) {
	t.Helper()
	select {
	case err := <-released:
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	case <-time.After(waitMax):
		t.Fatalf("%s still waits", what)
	}
}

func TestCommitWaitsForConfirm(t *testing.T) {
	server := postgrestest.Start(t, nil)
	db := newDatabase(t, server, "CREATE TABLE t(id int PRIMARY KEY)", "CREATE SEQUENCE s")
	r := newRecorder(Propose)
	stream, stop := db.capture(r)
	synchronous(t, db, stream)

	first := commitHangs(t, server, db.name, "INSERT INTO t VALUES (1)")
	e1 := r.next(t, "entry")
	stillWaits(t, db, first, "an unconfirmed commit")
	second := commitHangs(t, server, db.name, "INSERT INTO t VALUES (2)")
	e2 := r.next(t, "entry")
	stream.Confirm(e1.header.EndLSN)
	isReleased(t, first, "the first commit")
	stillWaits(t, db, second, "the second commit, with the first confirmed")

	// A stream that begins anew confirms nothing by itself.
	stop()
	r = newRecorder(Propose)
	stream, _ = db.capture(r)
	e2again := r.next(t, "entry")
	for e2again.header.Same(e1.header) {
		e2again = r.next(t, "entry")
	}
	if !e2again.header.Same(e2.header) || e2again.lsn != e2.lsn {
		t.Fatalf("redelivered %+v, was %+v", e2again.header, e2.header)
	}
	stillWaits(t, db, second, "the second commit, after a new stream began")
	stream.Confirm(e2.header.EndLSN)
	isReleased(t, second, "the second commit")

	// What touches nothing published: released by an idle position alone.
	for _, statement := range []string{"SELECT nextval('s')", "CREATE UNLOGGED TABLE unlogged(id int)", "CREATE ROLE somebody"} {
		released := commitHangs(t, server, db.name, statement)
		stillWaits(t, db, released, statement)
		end := db.lsn("SELECT pg_current_wal_flush_lsn()")
		reached := entry.LSN(0)
		for reached < end {
			reached = r.next(t, "position").lsn
		}
		stream.Confirm(reached)
		isReleased(t, released, statement)
	}
	db.exec("DROP ROLE somebody")
}

func TestExtendXid(t *testing.T) {
	for _, tc := range []struct {
		name   string
		newest uint64
		xid    uint32
		want   uint64
	}{
		{"first epoch", 800, 790, 790},
		{"after the reading", 800, 900, 900},
		{"epoch of the reading", 5<<32 | 800, 790, 5<<32 | 790},
		{"committed before the epoch turned", 5<<32 | 10, 0xfffffff0, 4<<32 | 0xfffffff0},
		{"committed after the epoch turned", 4<<32 | 0xfffffff0, 10, 5<<32 | 10},
	} {
		x := xidExtender{newest: tc.newest}
		if got := x.extend(tc.xid); got != tc.want {
			t.Errorf("%s: %x, want %x", tc.name, got, tc.want)
		}
		if x.newest != max(tc.want, tc.newest) {
			t.Errorf("%s: newest is %x", tc.name, x.newest)
		}
	}
}

func TestParseTraceparent(t *testing.T) {
	good := "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
	if _, ok := parseTraceparent([]byte(good)); !ok {
		t.Fatal("refused", good)
	}
	for _, bad := range []string{"", good[:54], good + "0", "01" + good[2:], strings.Replace(good, "-", "_", 2), strings.Replace(good, "a", "g", 1),
		"00-00000000000000000000000000000000-0123456789abcdef-01", "00-0123456789abcdef0123456789abcdef-0000000000000000-01"} {
		if _, ok := parseTraceparent([]byte(bad)); ok {
			t.Error("accepted", bad)
		}
	}
}

func TestStatusSetsAllThreePositions(t *testing.T) {
	b := appendStatus(nil, 0x1122334455667788, postgresEpoch.Add(time.Second), true)
	if len(b) != 39 || b[0] != 'd' || binary.BigEndian.Uint32(b[1:]) != uint32(len(b)-1) || b[5] != 'r' || b[38] != 1 {
		t.Fatalf("%x", b)
	}
	for i := range 3 {
		if binary.BigEndian.Uint64(b[6+8*i:]) != 0x1122334455667788 {
			t.Fatalf("position %d of %x", i, b)
		}
	}
	if binary.BigEndian.Uint64(b[30:]) != 1_000_000 {
		t.Fatalf("time of %x", b)
	}
}

// Whatever arrives, the decoder refuses it or follows it.
func FuzzDecoder(f *testing.F) {
	f.Add([]byte("B12345678123456781234"))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := newDecoder(discard{}, 64, 1000, 1)
		for len(b) > 0 {
			n := min(int(b[0]), len(b)-1)
			if err := d.message(context.Background(), b[1:1+n]); err != nil {
				return
			}
			b = b[1+n:]
		}
	})
}

type discard struct{}

func (discard) Begin(Begin) Disposition                    { return Propose }
func (discard) Entry(context.Context, entry.Payload) error { return nil }
func (discard) Digest(context.Context, entry.Header) error { return nil }
func (discard) Position(context.Context, entry.LSN) error  { return nil }

// commits counts what a decoder hands over.
type commits struct {
	discard
	entries int
}

func (c *commits) Entry(context.Context, entry.Payload) error { c.entries++; return nil }

func TestForgedDDLIsDropped(t *testing.T) {
	c := &commits{}
	d := newDecoder(c, 1<<20, 1000, 1)
	d.authentic = func(content []byte) bool { return string(content) == "genuine" }
	logical := func(content string) []byte {
		m := append([]byte{'M', 1}, make([]byte, 8)...)
		m = append(append(m, entry.DDLPrefix...), 0)
		m = binary.BigEndian.AppendUint32(m, uint32(len(content)))
		return append(m, content...)
	}
	begin := append([]byte{'B'}, make([]byte, 16)...)
	begin = binary.BigEndian.AppendUint32(begin, 900)
	for i, content := range []string{"forged", "genuine"} {
		commit := append([]byte{'C'}, make([]byte, 9)...)
		commit = binary.BigEndian.AppendUint64(commit, uint64(i+1)*100) // end LSN
		commit = append(commit, make([]byte, 8)...)
		for _, m := range [][]byte{begin, logical(content), commit} {
			if err := d.message(t.Context(), m); err != nil {
				t.Fatal(err)
			}
		}
	}
	if c.entries != 1 {
		t.Errorf("%d entries were handed over, want the genuine one alone", c.entries)
	}
}
