package catalog_test

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/catalog"
)

func open(t *testing.T, own *pgx.Conn, counter int64) {
	t.Helper()
	if err := catalog.OpenFence(ctx(t), own, "main", counter, 1); err != nil {
		t.Fatal(err)
	}
}

func closed(t *testing.T, own *pgx.Conn, counter int64) {
	t.Helper()
	if err := catalog.CloseFence(ctx(t), own, "main", counter, 1, 0); err != nil {
		t.Fatal(err)
	}
}

func TestFence(t *testing.T) {
	s, own := installed(t)
	client := postgrestest.Connect(t, s, "postgres")
	postgrestest.Exec(t, own, "SET quorate.bookkeeping = on")
	postgrestest.Exec(t, own, "CREATE TABLE t (id int PRIMARY KEY)", "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id)",
		"CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (100)", "CREATE ROLE app LOGIN", "GRANT ALL ON t, p, p1 TO app", "SELECT quorate.protect_all()",
		"CREATE TABLE tally (n int)", "INSERT INTO tally VALUES (0)")

	t.Run("rr_older_than_lease", func(t *testing.T) {
		closed(t, own, 1)
		for _, level := range []string{"REPEATABLE READ", "SERIALIZABLE"} {
			postgrestest.Exec(t, client, "BEGIN ISOLATION LEVEL "+level, "SELECT count(*) FROM t")
			open(t, own, 2)
			refused(t, client, "25006", "INSERT INTO t VALUES (1)")
			postgrestest.Exec(t, client, "ROLLBACK", "INSERT INTO t VALUES (1)", "DELETE FROM t")
			// One that saw it open must not write after it has been closed, nor
			// after a newer term has opened it again.
			postgrestest.Exec(t, client, "BEGIN ISOLATION LEVEL "+level, "SELECT count(*) FROM t")
			closed(t, own, 2)
			refused(t, client, "25006", "INSERT INTO t VALUES (1)")
			postgrestest.Exec(t, client, "ROLLBACK")
		}
		open(t, own, 3)
		postgrestest.Exec(t, client, "BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT count(*) FROM t")
		open(t, own, 4)
		refused(t, client, "25006", "INSERT INTO t VALUES (1)")
		postgrestest.Exec(t, client, "ROLLBACK")
	})

	t.Run("older ballots move nothing", func(t *testing.T) {
		closed(t, own, 10)
		if err := catalog.OpenFence(ctx(t), own, "main", 9, 5); !errors.Is(err, catalog.ErrStaleBallot) {
			t.Errorf("open at an older ballot: %v", err)
		}
		if err := catalog.OpenFence(ctx(t), own, "main", 10, 0); !errors.Is(err, catalog.ErrStaleBallot) {
			t.Errorf("open at an older replica's ballot: %v", err)
		}
		refused(t, client, "25006", "INSERT INTO t VALUES (1)")
		open(t, own, 11)
		if err := catalog.CloseFence(ctx(t), own, "main", 10, 9, 0); !errors.Is(err, catalog.ErrStaleBallot) {
			t.Errorf("close at an older ballot: %v", err)
		}
		postgrestest.Exec(t, client, "INSERT INTO t VALUES (1)", "DELETE FROM t")
		if f, err := catalog.ReadFence(ctx(t), own, "main"); err != nil || f != (catalog.FenceState{Counter: 11, Replica: 1, Open: true}) {
			t.Errorf("fence is %+v, %v", f, err)
		}
	})

	t.Run("leaf_write", func(t *testing.T) {
		open(t, own, 20)
		postgrestest.Exec(t, client, "INSERT INTO p VALUES (1)", "INSERT INTO p1 VALUES (2)")
		closed(t, own, 20)
		for _, sql := range []string{"INSERT INTO p1 VALUES (3)", "UPDATE p1 SET id = 4", "DELETE FROM p1", "TRUNCATE p1", "INSERT INTO p VALUES (3)", "TRUNCATE p"} {
			refused(t, client, "25006", sql)
		}
	})

	t.Run("replica_role_ddl", func(t *testing.T) {
		open(t, own, 30)
		closed(t, own, 30)
		postgrestest.Exec(t, client, "SET session_replication_role = replica")
		refused(t, client, "25006", "INSERT INTO t VALUES (1)")
		refused(t, client, "25006", "CREATE TABLE r (id int)")
		open(t, own, 31)
		postgrestest.Exec(t, client, "CREATE TABLE r (id int)", "INSERT INTO r VALUES (1)")
		closed(t, own, 31)
		refused(t, client, "25006", "INSERT INTO r VALUES (1)")
		refused(t, client, "25006", "DROP TABLE r")
		postgrestest.Exec(t, client, "RESET session_replication_role")
	})

	t.Run("replay passes by its origin", func(t *testing.T) {
		replay := postgrestest.Connect(t, s, "postgres")
		postgrestest.Exec(t, replay, "SELECT pg_replication_origin_create('quorate_x')")
		refused(t, replay, "25006", "INSERT INTO t VALUES (50)")
		postgrestest.Exec(t, replay, "SELECT pg_replication_origin_session_setup('quorate_x')",
			"INSERT INTO t VALUES (50)", "CREATE TABLE replayed (id int)")
		refused(t, client, "25006", "INSERT INTO replayed VALUES (1)")
		postgrestest.Exec(t, replay, "DELETE FROM t WHERE id = 50", "DROP TABLE replayed")
	})

	t.Run("an ordinary role", func(t *testing.T) {
		app := postgrestest.Connect(t, s, "postgres")
		postgrestest.Exec(t, app, "SET ROLE app")
		refused(t, app, "25006", "INSERT INTO t VALUES (5)")
		open(t, own, 40)
		postgrestest.Exec(t, app, "INSERT INTO t VALUES (5)", "DELETE FROM p")
	})

	t.Run("switched off it comes back", func(t *testing.T) {
		open(t, own, 50)
		postgrestest.Exec(t, client, "ALTER TABLE t DISABLE TRIGGER quorate_fence", "ALTER TABLE t DISABLE TRIGGER ALL", "ALTER TABLE p1 ENABLE TRIGGER ALL")
		refused(t, client, "0A000", "DROP TRIGGER quorate_fence ON t")
		if n := query[int](t, own, "SELECT count(*)::int FROM quorate.unfenced WHERE relation::regclass::text <> 'tally'"); n != 0 {
			t.Errorf("%d tables without their fence", n)
		}
	})

	t.Run("closing ends writers and row lockers", func(t *testing.T) {
		open(t, own, 60)
		postgrestest.Exec(t, client, "INSERT INTO t VALUES (600)")
		var conns []*pgx.Conn
		for _, sql := range []string{"UPDATE t SET id = 601 WHERE id = 600", "UPDATE p SET id = id WHERE false", "SELECT FROM tally FOR UPDATE", "SELECT FROM t LIMIT 0", "UPDATE tally SET n = 1"} {
			c := postgrestest.Connect(t, s, "postgres")
			conns = append(conns, c)
			if sql == "UPDATE tally SET n = 1" { // a table without fence: found by its xid
				postgrestest.Exec(t, c, "SET lock_timeout = 100", "BEGIN", "SELECT pg_current_xact_id()")
				continue
			}
			postgrestest.Exec(t, c, "BEGIN", sql)
		}
		closed(t, own, 60)
		for i, wantGone := range []bool{true, true, true, false, true} {
			_, err := conns[i].Exec(context.Background(), "SELECT 1")
			if gone := err != nil; gone != wantGone {
				t.Errorf("session %d: %v", i, err)
			}
		}
		if n := query[int](t, own, "SELECT count(*)::int FROM t WHERE id = 601"); n != 0 {
			t.Error("the write of an ended session stands")
		}
	})

	t.Run("closing waits for those who end in time", func(t *testing.T) {
		open(t, own, 70)
		c := postgrestest.Connect(t, s, "postgres")
		postgrestest.Exec(t, c, "BEGIN", "INSERT INTO t VALUES (700)")
		go func() {
			time.Sleep(300 * time.Millisecond)
			_, _ = c.Exec(context.Background(), "COMMIT")
		}()
		if err := catalog.CloseFence(ctx(t), own, "main", 70, 1, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		if n := query[int](t, own, "SELECT count(*)::int FROM t WHERE id = 700"); n != 1 {
			t.Error("the transaction in flight was not let through")
		}
	})
}

func TestFenceAfterRestart(t *testing.T) {
	s, own := installed(t)
	for _, how := range []string{"crash", "clean restart"} {
		t.Run("fence_after_"+how, func(t *testing.T) {
			own = sidecar(t, s)
			open(t, own, 5)
			client := postgrestest.Connect(t, s, "postgres")
			postgrestest.Exec(t, client, "CREATE TABLE IF NOT EXISTS t (id int)", "INSERT INTO t VALUES (1)", "CHECKPOINT")
			var err error
			if how == "crash" {
				err = s.Kill(ctx(t))
			} else {
				err = s.Stop(ctx(t), syscall.SIGINT)
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Start(ctx(t)); err != nil {
				t.Fatal(err)
			}
			client = postgrestest.Connect(t, s, "postgres")
			refused(t, client, "25006", "INSERT INTO t VALUES (2)")
			own = sidecar(t, s)
			if err := catalog.OpenFence(ctx(t), own, "main", 4, 1); !errors.Is(err, catalog.ErrStaleBallot) {
				t.Errorf("open at an older ballot: %v", err)
			}
			open(t, own, 5)
			postgrestest.Exec(t, client, "INSERT INTO t VALUES (2)")
		})
	}
}
