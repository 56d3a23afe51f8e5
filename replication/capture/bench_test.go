package capture

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres/postgrestest"
)

// BenchmarkInsert measures single-row INSERTs of 1 and 64 clients on a plain
// server and with capture as the synchronous standby that confirms each commit
// at once: the difference is what capture costs.
func BenchmarkInsert(b *testing.B) {
	for _, synchronousStandby := range []bool{false, true} {
		server := postgrestest.Start(b, map[string]string{"max_connections": "400"})
		for _, clients := range []int{1, 64} {
			b.Run(fmt.Sprintf("standby=%v/clients=%d", synchronousStandby, clients), func(b *testing.B) {
				// The framework calls this several times, a database each.
				db := newDatabase(b, server, "CREATE TABLE t(id bigserial PRIMARY KEY, client int, v text)")
				if synchronousStandby {
					stream, stop := db.capture(&confirmAll{})
					defer stop()
					synchronous(b, db, stream)
				}
				conns := make([]*pgx.Conn, clients)
				for i := range conns {
					conns[i] = postgrestest.Connect(b, server, db.name)
				}
				var left atomic.Int64
				left.Store(int64(b.N))
				b.ResetTimer()
				var wg sync.WaitGroup
				for i, conn := range conns {
					wg.Go(func() {
						for left.Add(-1) >= 0 {
							if _, err := conn.Exec(context.Background(), "INSERT INTO t(client, v) VALUES ($1, $2)", i, "some text"); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				b.StopTimer()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "tx/s")
				for _, conn := range conns {
					conn.Close(context.Background())
				}
				db.exec("SET synchronous_commit = local", "ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")
			})
		}
	}
}
