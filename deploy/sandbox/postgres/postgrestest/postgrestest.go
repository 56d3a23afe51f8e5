// Package postgrestest starts a real PostgreSQL server for one test and
// destroys it afterwards.
package postgrestest

import (
	"context"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres"
)

// Start runs a new server with the given extra settings until the test ends.
func Start(t testing.TB, settings map[string]string) *postgres.Server {
	t.Helper()
	bin, err := postgres.BinDir()
	if err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir: its parents may not be enterable by user postgres.
	dir, err := os.MkdirTemp("/tmp", "quorate-pg-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	port, err := postgres.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	s := &postgres.Server{BinDir: bin, Dir: dir, Port: port, Settings: settings}
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := s.Stop(ctx, syscall.SIGQUIT); err != nil {
			t.Errorf("stop postgres: %v", err)
		}
		os.RemoveAll(dir)
	})
	if err := s.Init(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	return s
}

// Connect opens a connection to database db that closes with the test.
func Connect(t testing.TB, s *postgres.Server, db string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), s.DSN(db))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// Exec runs each statement in its own round trip and fails the test on error.
func Exec(t testing.TB, conn *pgx.Conn, statements ...string) {
	t.Helper()
	for _, s := range statements {
		if _, err := conn.Exec(context.Background(), s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}
