package replay

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/entry"
)

// benchmarkBacklog applies a backlog again and again, in batches of so many
// transactions, each time from the same state.
func benchmarkBacklog(b *testing.B, batchSize int, schema, before []string, load func(p *pair)) {
	p := newPair(b)
	p.both(schema...)
	p.do(before...)
	start := p.transactions()
	load(p)
	// Decoding sees what is flushed, and so does this commit to it.
	p.do("SET synchronous_commit = on", "CREATE TABLE flushed ()")
	backlog := p.transactions()
	rows := 0
	for i := range backlog {
		rows += int(backlog[i].Payload.Header.Changes)
	}
	var applied, txs int
	var slot uint64
	s := p.connect()
	renumber := func(batch []Transaction) []Transaction {
		batch = slices.Clone(batch)
		for i := range batch {
			slot++
			batch[i].Slot = slot
		}
		return batch
	}
	for b.Loop() {
		b.StopTimer()
		for _, t := range schema {
			var name string
			if n, _ := fmt.Sscanf(t, "CREATE TABLE %s", &name); n == 1 {
				postgrestest.Exec(b, p.target, "TRUNCATE "+name)
			}
		}
		p.apply(s, renumber(start))
		postgrestest.Exec(b, p.target, "VACUUM ANALYZE", "CHECKPOINT")
		b.StartTimer()
		for batch := range slices.Chunk(backlog, batchSize) {
			p.apply(s, renumber(batch))
		}
		applied += rows
		txs += len(backlog)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(applied)/b.Elapsed().Seconds(), "rows/s")
	b.ReportMetric(float64(txs)/b.Elapsed().Seconds(), "tx/s")
	if r := s.Stats().Retries; r != 0 {
		b.Fatalf("%d retries", r)
	}
}

// benchmarkNative has PostgreSQL's own subscription apply the same backlog, for
// comparison on the same machine at the same time.
func benchmarkNative(b *testing.B, schema, before []string, load func(p *pair)) {
	p := newPair(b)
	p.both(append(slices.Clone(schema), "CREATE TABLE marker (n int)")...)
	p.do(before...)
	rows, txs, n := 0, 0, 0
	for _, t := range p.transactions() { // fills the target as well
		s := p.connect()
		p.apply(s, []Transaction{t})
		s.Close()
	}
	name := "native_" + p.destDB
	p.do(fmt.Sprintf("SELECT pg_create_logical_replication_slot('%s', 'pgoutput')", name))
	postgrestest.Exec(b, p.target, fmt.Sprintf(`CREATE SUBSCRIPTION %s CONNECTION 'host=127.0.0.1 port=%d user=postgres dbname=%s' PUBLICATION quorate
		WITH (create_slot = false, copy_data = false, enabled = false, slot_name = '%s', synchronous_commit = off)`, name, p.server.Port, p.sourceDB, name))
	var took time.Duration
	for b.Loop() {
		n++
		p.do(fmt.Sprintf("INSERT INTO marker VALUES (-%d)", n))
		load(p)
		p.do("SET synchronous_commit = on", fmt.Sprintf("INSERT INTO marker VALUES (%d)", n))
		for _, t := range p.transactions() {
			rows += int(t.Payload.Header.Changes)
			txs++
		}
		postgrestest.Exec(b, p.target, "ALTER SUBSCRIPTION "+name+" ENABLE")
		seen := func(marker int) {
			for one[int](b, p.target, fmt.Sprintf("SELECT count(*) FROM marker WHERE n = %d", marker)) == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		seen(-n) // the worker's start is not what is compared
		began := time.Now()
		seen(n)
		took += time.Since(began)
		postgrestest.Exec(b, p.target, "ALTER SUBSCRIPTION "+name+" DISABLE")
		for one[bool](b, p.source, "SELECT active FROM pg_replication_slots WHERE slot_name = '"+name+"'") {
			time.Sleep(time.Millisecond)
		}
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(rows)/took.Seconds(), "rows/s")
	b.ReportMetric(float64(txs)/took.Seconds(), "tx/s")
	postgrestest.Exec(b, p.target, "DROP SUBSCRIPTION "+name)
}

var batchSizes = []int{1, 100, 2000}

func BenchmarkInserts(b *testing.B) {
	b.Run("native", func(b *testing.B) {
		from := 0
		benchmarkNative(b, []string{"CREATE TABLE t (id int PRIMARY KEY, v text)"}, nil, func(p *pair) {
			p.do("SET synchronous_commit = off", fmt.Sprintf(`DO $$ BEGIN FOR i IN %d..%d LOOP INSERT INTO t VALUES (i, 'value ' || i); COMMIT; END LOOP; END $$`, from+1, from+20_000))
			from += 20_000
		})
	})
	for _, n := range batchSizes {
		b.Run(fmt.Sprintf("batch=%d", n), func(b *testing.B) {
			benchmarkBacklog(b, n, []string{"CREATE TABLE t (id int PRIMARY KEY, v text)"}, nil, func(p *pair) {
				p.do("SET synchronous_commit = off", fmt.Sprintf(`DO $$ BEGIN FOR i IN 1..%d LOOP INSERT INTO t VALUES (i, 'value ' || i); COMMIT; END LOOP; END $$`, min(20_000, 2000*n)))
			})
		})
	}
}

func BenchmarkUpdates(b *testing.B) {
	b.Run("native", func(b *testing.B) {
		benchmarkNative(b, []string{"CREATE TABLE t (id int PRIMARY KEY, v text)"}, []string{"INSERT INTO t SELECT g, 'value' FROM generate_series(1, 100000) g"}, func(p *pair) {
			p.do("SET synchronous_commit = off", `DO $$ BEGIN FOR i IN 1..20000 LOOP UPDATE t SET v = 'changed ' || i WHERE id = 1 + (i::bigint * 7919) % 100000; COMMIT; END LOOP; END $$`)
		})
	})
	for _, n := range batchSizes {
		b.Run(fmt.Sprintf("batch=%d", n), func(b *testing.B) {
			benchmarkBacklog(b, n, []string{"CREATE TABLE t (id int PRIMARY KEY, v text)"}, []string{"INSERT INTO t SELECT g, 'value' FROM generate_series(1, 100000) g"}, func(p *pair) {
				p.do("SET synchronous_commit = off", fmt.Sprintf(`DO $$ BEGIN FOR i IN 1..%d LOOP UPDATE t SET v = 'changed ' || i WHERE id = 1 + (i::bigint * 7919) %% 100000; COMMIT; END LOOP; END $$`, min(20_000, 2000*n)))
			})
		})
	}
}

// BenchmarkUpdatesTwoUniques cannot use runs: any update may move the other
// unique value.
func BenchmarkUpdatesTwoUniques(b *testing.B) {
	benchmarkBacklog(b, 2000, []string{"CREATE TABLE t (id int PRIMARY KEY, u int UNIQUE, v text)"}, []string{"INSERT INTO t SELECT g, g, 'value' FROM generate_series(1, 100000) g"}, func(p *pair) {
		p.do("SET synchronous_commit = off", `DO $$ BEGIN FOR i IN 1..20000 LOOP UPDATE t SET v = 'changed ' || i WHERE id = 1 + (i::bigint * 7919) % 100000; COMMIT; END LOOP; END $$`)
	})
}

func BenchmarkTPCB(b *testing.B) {
	schema := []string{
		`CREATE TABLE pgbench_accounts (aid int PRIMARY KEY, bid int, abalance int, filler char(84)) WITH (fillfactor=100)`,
		`CREATE TABLE pgbench_branches (bid int PRIMARY KEY, bbalance int, filler char(88)) WITH (fillfactor=100)`,
		`CREATE TABLE pgbench_tellers (tid int PRIMARY KEY, bid int, tbalance int, filler char(84)) WITH (fillfactor=100)`,
		`CREATE TABLE pgbench_history (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22))`,
	}
	before := []string{
		`INSERT INTO pgbench_branches SELECT g, 0, '' FROM generate_series(1, 10) g`,
		`INSERT INTO pgbench_tellers SELECT g, 1 + g / 10, 0, '' FROM generate_series(1, 100) g`,
		`INSERT INTO pgbench_accounts SELECT g, 1 + g / 100000, 0, '' FROM generate_series(1, 300000) g`,
	}
	tpcb := func(n int) string {
		return fmt.Sprintf(`DO $$ DECLARE d int; BEGIN FOR i IN 1..%d LOOP d := i %% 1000;
			UPDATE pgbench_accounts SET abalance = abalance + d WHERE aid = 1 + (i::bigint * 7919) %% 300000;
			UPDATE pgbench_tellers SET tbalance = tbalance + d WHERE tid = 1 + i %% 100;
			UPDATE pgbench_branches SET bbalance = bbalance + d WHERE bid = 1 + i %% 10;
			INSERT INTO pgbench_history VALUES (1 + i %% 100, 1 + i %% 10, i, d, now(), ''); COMMIT; END LOOP; END $$`, n)
	}
	b.Run("native", func(b *testing.B) {
		benchmarkNative(b, schema, before, func(p *pair) { p.do("SET synchronous_commit = off", tpcb(10_000)) })
	})
	for _, n := range batchSizes {
		b.Run(fmt.Sprintf("batch=%d", n), func(b *testing.B) {
			benchmarkBacklog(b, n, schema, before, func(p *pair) { p.do("SET synchronous_commit = off", tpcb(min(10_000, 1000*n))) })
		})
	}
}

// BenchmarkLargeTransaction applies one transaction of a million rows from
// fragments.
func BenchmarkLargeTransaction(b *testing.B) {
	const rows, fragmentBytes = 1_000_000, 1 << 20
	p := newPair(b)
	p.both("CREATE TABLE t (id int PRIMARY KEY, v text)")
	p.do(fmt.Sprintf("INSERT INTO t SELECT g, 'value ' || g FROM generate_series(1, %d) g", rows))
	whole := p.transactions()[0]
	payload := entry.Payload{Type: entry.TypeCommit, Header: whole.Payload.Header, Fragment: uint32((len(whole.Payload.Body) + fragmentBytes - 1) / fragmentBytes)}
	s := p.connect()
	var slot uint64
	for b.Loop() {
		b.StopTimer()
		postgrestest.Exec(b, p.target, "TRUNCATE t", "CHECKPOINT")
		b.StartTimer()
		slot++
		p.apply(s, []Transaction{{Slot: slot, Payload: payload, Fragments: func(yield func([]byte) error) error {
			buf := make([]byte, fragmentBytes)
			for f := range slices.Chunk(whole.Payload.Body, fragmentBytes) {
				if err := yield(buf[:copy(buf, f)]); err != nil {
					return err
				}
			}
			return nil
		}}})
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(rows)*float64(slot)/b.Elapsed().Seconds(), "rows/s")
}
