package replay

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/entry"
)

// TestCrashKeepsProgressWithData kills the server again and again while batches
// are applied to a table without any key, in which a repeated row would stay.
func TestCrashKeepsProgressWithData(t *testing.T) {
	p := newPair(t)
	p.both("CREATE TABLE t (n int)")
	const last = 1500
	p.do(fmt.Sprintf(`DO $$ BEGIN FOR i IN 1..%d LOOP INSERT INTO t VALUES (i); COMMIT; END LOOP; END $$`, last))
	all := p.transactions()
	if len(all) != last {
		t.Fatalf("%d transactions", len(all))
	}
	server := postgrestest.Start(t, nil)
	setup := postgrestest.Connect(t, server, "postgres")
	postgrestest.Exec(t, setup, "CREATE TABLE t (n int)")
	cfg := p.config()
	cfg.ConnString = server.DSN("postgres")
	cfg.Marks = func(context.Context, *pgx.Conn, []entry.Mark) error { return nil }
	lost := 0
	for crash := 0; ; crash++ {
		s, err := Connect(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		told := s.Progress()
		killed := make(chan error, 1)
		if crash < 3 {
			go func() {
				time.Sleep(time.Duration(30+20*crash) * time.Millisecond)
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				killed <- server.Kill(ctx)
			}()
		}
		for told < last {
			next := min(told+3, last)
			if err = s.Apply(t.Context(), all[told:next]); err != nil {
				break
			}
			told = next
		}
		s.Close()
		if crash >= 3 {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		if err := <-killed; err != nil {
			t.Fatal(err)
		}
		if _, err := server.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		conn := postgrestest.Connect(t, server, "postgres")
		progress, err := Progress(t.Context(), conn, cfg.Origin, true)
		if err != nil {
			t.Fatal(err)
		}
		if n := one[int64](t, conn, "SELECT count(*) FROM t WHERE n <= $1", int64(progress)); n != int64(progress) {
			t.Fatalf("progress %d with %d rows", progress, n)
		}
		if progress < told {
			lost++
		}
	}
	conn := postgrestest.Connect(t, server, "postgres")
	if got := one[string](t, conn, "SELECT count(*) || ' ' || count(DISTINCT n) || ' ' || max(n) FROM t"); got != fmt.Sprintf("%d %d %d", last, last, last) {
		t.Fatalf("table holds %s", got)
	}
	t.Logf("%d of 3 crashes lost commits that Apply had reported", lost)
}
