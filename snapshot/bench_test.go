package snapshot

import (
	"flag"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"quorate/deploy/sandbox/postgres"
	"quorate/deploy/sandbox/postgres/postgrestest"
)

var seedScale = flag.Int("seed.scale", 15, "pgbench scale of BenchmarkSeed: 1 is about 16 MB")

// BenchmarkSeed seeds a database of pgbench, by an image and by the initial copy
// of PostgreSQL's own logical replication (its keys made before the copy), in
// turns, so that both meet the same machine. Each result is a loaded and
// indexed database.
func BenchmarkSeed(b *testing.B) {
	settings := map[string]string{"max_wal_size": "8GB", "shared_buffers": "512MB", "wal_retrieve_retry_interval": "100ms", "max_worker_processes": "16"}
	src, dst := postgrestest.Start(b, settings), postgrestest.Start(b, settings)
	db := newDatabase(b, src, "s")
	gen := exec.Command(filepath.Join(src.BinDir, "pgbench"), "-h", "127.0.0.1", "-p", strconv.Itoa(src.Port), "-U", "postgres", "-i", "-I", "dtGvp", "-q", "-s", strconv.Itoa(*seedScale), db)
	if out, err := gen.CombinedOutput(); err != nil {
		b.Fatalf("pgbench: %v: %s", err, out)
	}
	conn := postgrestest.Connect(b, src, db)
	postgrestest.Exec(b, conn, "CREATE PUBLICATION quorate FOR ALL TABLES", "CHECKPOINT")
	bytes := one[int64](b, conn, "SELECT pg_database_size(current_database())")
	admin := postgrestest.Connect(b, dst, "postgres")
	address := serve(b, &exporter{connString: src.DSN(db)}, 0)
	rows := int64(*seedScale) * 100_011
	var ours, native time.Duration
	var phases [4]time.Duration
	rounds := 0
	for b.Loop() {
		rounds++
		name := newDatabase(b, dst, "d")
		cfg := loadConfig(b, address, dst.DSN(name))
		began := time.Now()
		last := began
		phase := -1
		names := map[string]int{"schema": 0, "data": 1, "indexes": 2, "analyze": 3}
		cfg.Progress = progressTimer(&phase, &last, &phases, names)
		m, err := Load(b.Context(), cfg)
		if err != nil {
			b.Fatal(err)
		}
		ours += time.Since(began)
		phases[3] += time.Since(last)
		if int64(m.Rows) != rows {
			b.Fatalf("%d rows, want %d", m.Rows, rows)
		}
		postgrestest.Exec(b, admin, "DROP DATABASE "+name, "CHECKPOINT")

		name = newDatabase(b, dst, "n")
		native += nativeCopy(b, src, dst, db, name, rows)
		postgrestest.Exec(b, admin, "DROP DATABASE "+name, "CHECKPOINT")
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(bytes)/1e6, "MB")
	b.ReportMetric(ours.Seconds()/float64(rounds), "image-s")
	b.ReportMetric(native.Seconds()/float64(rounds), "native-s")
	b.ReportMetric(ours.Seconds()/native.Seconds(), "image/native")
	b.ReportMetric(phases[1].Seconds()/float64(rounds), "image-data-s")
	b.ReportMetric(phases[2].Seconds()/float64(rounds), "image-indexes-s")
	b.ReportMetric(float64(rows)*float64(rounds)/ours.Seconds(), "rows/s")
}

// progressTimer sums the time of each phase. The loader reports one at a time.
func progressTimer(phase *int, last *time.Time, phases *[4]time.Duration, names map[string]int) func(Progress) {
	return func(p Progress) {
		if n := names[p.Phase]; n != *phase {
			if now := time.Now(); *phase >= 0 {
				phases[*phase] += now.Sub(*last)
				*last = now
			}
			*phase = n
		}
	}
}

func nativeCopy(b *testing.B, src, dst *postgres.Server, db, name string, rows int64) time.Duration {
	b.Helper()
	conn := postgrestest.Connect(b, dst, name)
	defer closeConn(conn)
	postgrestest.Exec(b, conn,
		`CREATE TABLE pgbench_accounts (aid int PRIMARY KEY, bid int, abalance int, filler char(84)) WITH (fillfactor=100)`,
		`CREATE TABLE pgbench_branches (bid int PRIMARY KEY, bbalance int, filler char(88)) WITH (fillfactor=100)`,
		`CREATE TABLE pgbench_tellers (tid int PRIMARY KEY, bid int, tbalance int, filler char(84)) WITH (fillfactor=100)`,
		`CREATE TABLE pgbench_history (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22))`)
	began := time.Now()
	postgrestest.Exec(b, conn, fmt.Sprintf(`CREATE SUBSCRIPTION %s CONNECTION 'host=127.0.0.1 port=%d user=postgres dbname=%s' PUBLICATION quorate`, name, src.Port, db))
	for one[int64](b, conn, `SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'`) > 0 {
		time.Sleep(10 * time.Millisecond)
	}
	took := time.Since(began)
	if n := one[int64](b, conn, `SELECT (SELECT count(*) FROM pgbench_accounts) + (SELECT count(*) FROM pgbench_branches) + (SELECT count(*) FROM pgbench_tellers)`); n != rows {
		b.Fatalf("native copy has %d rows, want %d", n, rows)
	}
	postgrestest.Exec(b, conn, "DROP SUBSCRIPTION "+name)
	return took
}
