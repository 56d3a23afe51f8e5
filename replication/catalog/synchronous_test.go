package catalog_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/catalog"
)

func TestSynchronous(t *testing.T) {
	s, own := installed(t)
	client := postgrestest.Connect(t, s, "postgres")
	open(t, own, 1)
	postgrestest.Exec(t, client, "CREATE TABLE t (id int PRIMARY KEY)")
	for range 2 {
		if err := catalog.EnsureSynchronous(ctx(t), own, "quorate"); err != nil {
			t.Fatal(err)
		}
	}
	var foreign *catalog.ForeignStandbysError
	if err := catalog.EnsureSynchronous(ctx(t), own, "another"); !errors.As(err, &foreign) {
		t.Errorf("another value stands: %v", err)
	}

	// Nobody confirms: the commit waits, and everything of this package does not.
	writer, reader := postgrestest.Connect(t, s, "postgres"), postgrestest.Connect(t, s, "postgres")
	done := make(chan error, 1)
	go func() {
		_, err := writer.Exec(context.Background(), "INSERT INTO t VALUES (1)")
		done <- err
	}()
	if err := waitBlocked(ctx(t), own, writer.PgConn().PID()); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	if err := waitBlocked(short, own, reader.PgConn().PID()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a session that does not wait: %v", err)
	}
	own = sidecar(t, s)
	if err := catalog.Publish(ctx(t), own, catalog.State{Shard: "main"}); err != nil {
		t.Fatal(err)
	}
	if err := catalog.WriteIncarnation(ctx(t), own, 7); err != nil {
		t.Fatal(err)
	}
	if err := catalog.Install(ctx(t), own, catalog.Options{ClusterID: "c", Region: "r1"}); err != nil {
		t.Fatal(err)
	}
	// Ending the waiter makes its row visible: the readers go first.
	if err := catalog.CloseFence(ctx(t), own, "main", 2, 1, 0); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("the client was told COMMIT")
	}
	if _, err := reader.Exec(ctx(t), "TABLE t"); err == nil {
		t.Error("a reader of before the repair is still there")
	}
	if err := catalog.ClearSynchronous(ctx(t), own); err != nil {
		t.Fatal(err)
	}
	if on, err := catalog.IsSynchronous(ctx(t), own, "quorate"); err != nil || on {
		t.Errorf("after clearing: %v, %v", on, err)
	}
}

func TestTerminateClients(t *testing.T) {
	s, own := installed(t)
	a, b, other := postgrestest.Connect(t, s, "postgres"), postgrestest.Connect(t, s, "postgres"), sidecar(t, s)
	postgrestest.Exec(t, b, "SET application_name = 'psql'")
	n, err := catalog.TerminateClients(ctx(t), own)
	if err != nil || n != 2 {
		t.Errorf("ended %d, %v", n, err)
	}
	if a.Ping(ctx(t)) == nil || b.Ping(ctx(t)) == nil {
		t.Error("a client is still there")
	}
	if err := other.Ping(ctx(t)); err != nil {
		t.Errorf("a session of the sidecar was ended: %v", err)
	}
}

func TestReadOnlyDefault(t *testing.T) {
	s, own := installed(t)
	client := postgrestest.Connect(t, s, "postgres")
	for _, on := range []bool{true, true, false} {
		if err := catalog.SetReadOnlyDefault(ctx(t), own, on); err != nil {
			t.Fatal(err)
		}
		want := map[bool]string{true: "on", false: "off"}[on]
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			got := query[string](t, client, "SHOW transaction_read_only")
			if got == want {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("read only is %s, want %s", got, want)
			}
		}
	}
}

// waitBlocked returns nil when the session pid is seen to wait, or ctx's error.
func waitBlocked(ctx context.Context, conn *pgx.Conn, pid uint32) error {
	for {
		if blocked, err := catalog.Blocked(ctx, conn, pid); err != nil || blocked {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}
