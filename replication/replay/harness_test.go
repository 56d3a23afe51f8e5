package replay

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres"
	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/entry"
)

// shared is one server for the tests of the package, which use databases of
// their own in it.
var shared struct {
	once   sync.Once
	server *postgres.Server
	err    error
	n      int
}

func TestMain(m *testing.M) {
	code := m.Run()
	if s := shared.server; s != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		if err := s.Stop(ctx, syscall.SIGQUIT); err != nil {
			fmt.Fprintln(os.Stderr, "stop postgres:", err)
		}
		cancel()
		os.RemoveAll(s.Dir)
	}
	os.Exit(code)
}

func sharedServer(t testing.TB) *postgres.Server {
	t.Helper()
	shared.once.Do(func() {
		bin, err := postgres.BinDir()
		if err != nil {
			shared.err = err
			return
		}
		dir, err := os.MkdirTemp("/tmp", "quorate-replay-")
		if err != nil {
			shared.err = err
			return
		}
		port, err := postgres.FreePort()
		if err != nil {
			shared.err = err
			return
		}
		if shared.err = os.Chmod(dir, 0o755); shared.err != nil {
			return
		}
		s := &postgres.Server{BinDir: bin, Dir: dir, Port: port, Settings: map[string]string{
			"max_replication_slots": "40", "max_wal_senders": "40", "shared_buffers": "256MB",
			"max_wal_size": "8GB", "checkpoint_timeout": "1h",
		}}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if shared.err = s.Init(ctx); shared.err == nil {
			_, shared.err = s.Start(ctx)
		}
		shared.server = s
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.server
}

// pair is a publisher and a replica: two databases of one server, so their type
// oids differ as soon as types of their own are made.
type pair struct {
	t                testing.TB
	server           *postgres.Server
	source, target   *pgx.Conn
	sourceDB, destDB string
	builder          *entry.Builder
	slot             uint64
	origin           string
}

func newPair(t testing.TB) *pair {
	t.Helper()
	s := sharedServer(t)
	shared.n++
	p := &pair{t: t, server: s, sourceDB: fmt.Sprintf("source%d", shared.n), destDB: fmt.Sprintf("dest%d", shared.n),
		origin: fmt.Sprintf("origin%d", shared.n), builder: entry.NewBuilder()}
	admin, err := pgx.Connect(context.Background(), s.DSN("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	postgrestest.Exec(t, admin, "CREATE DATABASE "+p.sourceDB, "CREATE DATABASE "+p.destDB)
	admin.Close(context.Background())
	p.source, p.target = postgrestest.Connect(t, s, p.sourceDB), postgrestest.Connect(t, s, p.destDB)
	// Makes the oids of types differ between the two.
	postgrestest.Exec(t, p.target, "CREATE TYPE shift AS ENUM ('a')", "DROP TYPE shift")
	for _, set := range []string{"client_encoding='UTF8'", "DateStyle='ISO'", "IntervalStyle='postgres'", "extra_float_digits=3", "bytea_output='hex'", "TimeZone='UTC'"} {
		postgrestest.Exec(t, p.source, "SET "+set)
		postgrestest.Exec(t, p.target, "SET "+set)
	}
	postgrestest.Exec(t, p.source, "CREATE PUBLICATION quorate FOR ALL TABLES")
	postgrestest.Exec(t, p.source, fmt.Sprintf("SELECT pg_create_logical_replication_slot('%s', 'pgoutput')", p.sourceDB))
	t.Cleanup(func() {
		if _, err := p.source.Exec(context.Background(), "SELECT pg_drop_replication_slot($1)", p.sourceDB); err != nil {
			t.Errorf("drop replication slot: %v", err)
		}
	})
	return p
}

// both runs statements, schema changes mostly, at both ends.
func (p *pair) both(statements ...string) {
	p.t.Helper()
	postgrestest.Exec(p.t, p.source, statements...)
	postgrestest.Exec(p.t, p.target, statements...)
	p.drop()
}

// drop forgets what the publisher did up to here.
func (p *pair) drop() { p.transactions() }

func (p *pair) do(statements ...string) {
	p.t.Helper()
	postgrestest.Exec(p.t, p.source, statements...)
}

// transactions are the publisher's since the last call, as entries in the next
// slots. The bytes are those that a walsender sends.
func (p *pair) transactions() []Transaction {
	p.t.Helper()
	rows, err := p.source.Query(context.Background(), `SELECT data FROM pg_logical_slot_get_binary_changes($1, NULL, NULL,
		'proto_version', '1', 'publication_names', 'quorate', 'messages', 'true')`, p.sourceDB)
	if err != nil {
		p.t.Fatal(err)
	}
	defer rows.Close()
	var out []Transaction
	var header entry.Header
	local := make(map[uint32]bool)
	for rows.Next() {
		var raw []byte
		if err := rows.Scan(&raw); err != nil {
			p.t.Fatal(err)
		}
		switch raw[0] {
		case 'B':
			p.builder.Begin()
			micros := int64(binary.BigEndian.Uint64(raw[9:]))
			header = entry.Header{CommitTime: time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(micros) * time.Microsecond),
				Xid: uint64(binary.BigEndian.Uint32(raw[17:]))}
		case 'C':
			if p.builder.Bytes() == 0 {
				continue // such as CREATE TABLE
			}
			body := append([]byte(nil), p.builder.Body()...)
			header.Checksum, header.Changes, header.BodyBytes = p.builder.Checksum(), p.builder.Changes(), p.builder.Bytes()
			p.slot++
			out = append(out, Transaction{Slot: p.slot, CommitTime: header.CommitTime,
				Payload: entry.Payload{Type: entry.TypeTransaction, Header: header, Body: body}})
		case 'R':
			// As capture does, a region's own tables are left out.
			schema, _, _ := bytes.Cut(raw[5:], []byte{0})
			local[binary.BigEndian.Uint32(raw[1:])] = string(schema) == entry.LocalSchema
			err = p.builder.Define(raw)
		case 'O', 'Y':
		case 'I', 'U', 'D':
			if !local[binary.BigEndian.Uint32(raw[1:])] {
				err = p.builder.Add(raw)
			}
		default:
			err = p.builder.Add(raw)
		}
		if err != nil {
			p.t.Fatal(err)
		}
	}
	if err := rows.Err(); err != nil {
		p.t.Fatal(err)
	}
	return out
}

func (p *pair) config() Config {
	return Config{ConnString: p.server.DSN(p.destDB), Origin: p.origin,
		DDL: func(ctx context.Context, conn *pgx.Conn, content []byte) error {
			_, err := conn.Exec(ctx, string(content))
			return err
		},
		Marks: func(ctx context.Context, conn *pgx.Conn, marks []entry.Mark) error {
			for _, m := range marks {
				if _, err := conn.Exec(ctx, "SELECT setval(format('%I.%I', $1::text, $2::text)::regclass, $3)", m.Schema, m.Name, m.Value); err != nil {
					return err
				}
			}
			return nil
		}}
}

func (p *pair) connect() *Session {
	p.t.Helper()
	s, err := Connect(context.Background(), p.config())
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(s.Close)
	return s
}

func (p *pair) apply(s *Session, batch []Transaction) {
	p.t.Helper()
	if err := s.Apply(context.Background(), batch); err != nil {
		p.t.Fatal(err)
	}
}

// contents are a table's rows as text, sorted.
func contents(t testing.TB, conn *pgx.Conn, table string) []string {
	t.Helper()
	rows, err := conn.Query(context.Background(), fmt.Sprintf(`SELECT whole_::text FROM %s whole_ ORDER BY whole_::text COLLATE "C"`, table))
	if err != nil {
		t.Fatal(err)
	}
	out, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// same fails the test unless the tables hold the same rows, of which there are some.
func (p *pair) same(tables ...string) {
	p.t.Helper()
	for _, table := range tables {
		want, got := contents(p.t, p.source, table), contents(p.t, p.target, table)
		if strings.Join(want, "\n") != strings.Join(got, "\n") {
			p.t.Fatalf("table %s holds %d rows:\n%s\nwant %d rows:\n%s", table, len(got), shorten(got), len(want), shorten(want))
		}
	}
}

func shorten(rows []string) string {
	s := strings.Join(rows, "\n")
	if len(s) > 3000 {
		s = s[:3000] + "…"
	}
	return s
}

func one[T any](t testing.TB, conn *pgx.Conn, query string, args ...any) T {
	t.Helper()
	var v T
	if err := conn.QueryRow(context.Background(), query, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return v
}
