package postgres_test

import (
	"context"
	"testing"
	"time"

	"quorate/deploy/sandbox/postgres/postgrestest"
)

func TestKillLeavesNothingAndStartRecovers(t *testing.T) {
	s := postgrestest.Start(t, nil)
	conn := postgrestest.Connect(t, s, "postgres")
	postgrestest.Exec(t, conn, "CREATE TABLE t(a int)", "INSERT INTO t VALUES (1)")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := s.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if pid, ok := s.Running(); ok {
		t.Fatalf("pid %d still runs", pid)
	}
	if _, err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	var n int
	if err := postgrestest.Connect(t, s, "postgres").QueryRow(ctx, "SELECT count(*) FROM t").Scan(&n); err != nil || n != 1 {
		t.Fatalf("after the crash: %d rows, %v; want 1", n, err)
	}
}
