package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox"
)

// TestRules plays the scenarios that the rules of the design were drawn from on
// real processes, one after the other on one cluster.
func TestRules(t *testing.T) {
	c := Start(t, Options{Regions: 3})
	c.scenario(t, "straggler_across_terms_fk", stragglerAcrossTerms)
	c.scenario(t, "noop_slot_wait_applied", noopSlotWaitApplied)
	c.scenario(t, "confirm_past_divergent", confirmPastDivergent)
	c.scenario(t, "fence_after_crash", fenceAfterCrash)
	c.scenario(t, "nextval_only_failover", nextvalOnlyFailover)
	c.scenario(t, "nextval_only_failover while a client waits", nextvalWaiterFailover)
	c.scenario(t, "lsn_reuse_after_wipe", lsnReuseAfterWipe)
}

// A transaction that began before its region lost leadership commits after the
// region has won it back. In between another region wrote what contradicts it:
// replay checks no foreign key, so only the old transaction's end protects it.
func stragglerAcrossTerms(t *testing.T, c *Cluster) {
	c.Exec(c.Leader(), "CREATE TABLE parent (id int PRIMARY KEY)", "CREATE TABLE child (id int PRIMARY KEY, parent int NOT NULL REFERENCES parent)",
		"INSERT INTO parent SELECT generate_series(1, 20)")
	c.AwaitEqual()
	for i, how := range []string{"handed over", "cut off"} {
		row := i*10 + 1
		leader := c.Leader()
		next := c.other(leader)
		// One that has written, one that holds a lock, and two whose first write is
		// still to come and whose snapshot is of before.
		writer, locker := c.Connect(leader), c.Connect(leader)
		must(t, writer, "BEGIN", fmt.Sprintf("DELETE FROM parent WHERE id = %d", row))
		must(t, locker, "BEGIN", fmt.Sprintf("SELECT FROM parent WHERE id = %d FOR UPDATE", row+1))
		readers := map[string]*pgx.Conn{}
		for _, level := range []string{"REPEATABLE READ", "SERIALIZABLE"} {
			readers[level] = c.Connect(leader)
			must(t, readers[level], "BEGIN ISOLATION LEVEL "+level, "SELECT count(*) FROM child")
		}
		switch how {
		case "handed over":
			c.handOver(next)
		case "cut off":
			c.Do("partition", func(ctx context.Context) error { return c.Partition(ctx, leader) })
			next = c.Leader(c.without(leader)...)
		}
		for n := range 4 {
			c.Exec(next, fmt.Sprintf("INSERT INTO child VALUES (%d, %d)", row+n, row+n))
		}
		if how == "cut off" {
			c.Do("heal", func(ctx context.Context) error { return c.Heal(ctx) })
		}
		c.AwaitEqual()
		c.handOver(leader)
		if ok, err := committed(writer); ok {
			t.Errorf("%s: a transaction that had deleted a parent before the other term committed after it", how)
		} else {
			t.Logf("%s: COMMIT of the writer: %v", how, err)
		}
		if _, err := locker.Exec(context.Background(), fmt.Sprintf("DELETE FROM parent WHERE id = %d", row+1)); err == nil {
			if ok, _ := committed(locker); ok {
				t.Errorf("%s: a row lock outlived the other term", how)
			}
		}
		for level, reader := range readers {
			_, err := reader.Exec(context.Background(), fmt.Sprintf("DELETE FROM parent WHERE id = %d", row+2))
			if err == nil {
				t.Errorf("%s: a %s transaction with a snapshot of before the other term wrote", how, level)
				committed(reader)
				continue
			}
			t.Logf("%s: first write of %s: %v", how, level, err)
		}
		// The region works as before for those who begin now.
		c.Exec(leader, fmt.Sprintf("DELETE FROM parent WHERE id = %d", row+5))
		c.AwaitEqual()
		for _, region := range c.Names {
			if n := query[int](c, region, "SELECT count(*)::int FROM child WHERE parent NOT IN (SELECT id FROM parent)"); n != 0 {
				t.Errorf("%s: %s has %d children without their parent", how, region, n)
			}
		}
	}
}

// The last slot of the log is an opening or a no-op, which writes nothing to any
// database: every region still comes to say that it has applied it.
func noopSlotWaitApplied(t *testing.T, c *Cluster) {
	reached := func(what string, from uint64) {
		t.Helper()
		var target uint64
		for _, region := range c.Names {
			target = max(target, c.Region(region).Chosen)
		}
		if target <= from {
			t.Fatalf("%s: nothing was chosen after slot %d", what, from)
		}
		kinds := map[string]int{}
		for _, e := range c.slots(c.Leader(), from+1) {
			if e.Slot <= target {
				kinds[e.Kind]++
			}
		}
		for kind := range kinds {
			if kind != "opening" && kind != "noop" && kind != "config" {
				t.Fatalf("%s: slots %d to %d are to hold no data, and hold %v", what, from+1, target, kinds)
			}
		}
		for _, region := range c.Names {
			c.Eventually(20*time.Second, fmt.Sprintf("%s: applied slot %d in %s", what, target, region), func(ctx context.Context) error {
				for _, sql := range []string{"SELECT quorate.applied_slot()", "SELECT applied FROM quorate.status"} {
					if at, err := queryIn[int64](ctx, c.DSN(region), sql); err != nil || uint64(at) < target {
						return fmt.Errorf("%s: %d, %w", sql, at, err)
					}
				}
				if at := c.Region(region).Applied; at < target {
					return fmt.Errorf("its sidecar says %d", at)
				}
				return nil
			})
		}
		t.Logf("%s: slots %d to %d hold %v; applied in every region", what, from+1, target, kinds)
	}
	c.AwaitEqual()
	leader := c.Leader()
	from := c.Region(leader).Chosen
	c.handOver(c.other(leader))
	reached("handed over", from)

	leader = c.Leader()
	from = c.Region(leader).Chosen
	c.KillNow(leader, sandbox.Sidecar)
	c.Leader(c.without(leader)...)
	c.StartAgain(leader)
	c.Eventually(30*time.Second, leader+" following", func(context.Context) error {
		if r := c.Region(leader); !r.Healthy || r.Chosen <= from {
			return fmt.Errorf("%s: %s", r.State, r.Health)
		}
		return nil
	})
	reached("its sidecar killed", from)
}

// A leader that was cut off holds commits that will never be effective. While it
// recovers it comes to confirm positions beyond them, and no client may be told
// success by that: neither one that waited all along nor one that comes then.
// And nobody reads them.
func confirmPastDivergent(t *testing.T, c *Cluster) {
	leader := c.Leader()
	c.Exec(leader, "CREATE TABLE told (id int PRIMARY KEY, who text)", "CREATE SEQUENCE told_ids")
	c.AwaitEqual()
	const waiters = 6
	reader := c.Connect(leader) // a session of before, which must not see them either
	conns := make([]*pgx.Conn, waiters)
	for i := range conns {
		conns[i] = c.Connect(leader)
	}
	incarnation := c.replica(leader).Incarnation
	c.Do("partition", func(ctx context.Context) error { return c.Partition(ctx, leader) })

	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var ending sync.WaitGroup
	var told, ended, seen atomic.Int32
	for i, conn := range conns {
		ending.Go(func() {
			defer ended.Add(1)
			insert := fmt.Sprintf("INSERT INTO told VALUES (%d, 'waiter')", i)
			var err error
			if i%2 == 0 {
				_, err = conn.Exec(ctx, insert)
			} else {
				err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
					_, err := tx.Exec(ctx, insert)
					return err
				})
			}
			if err == nil {
				told.Add(1)
			}
		})
	}
	c.Eventually(20*time.Second, "waiters", func(ctx context.Context) error {
		n, err := queryIn[int](ctx, c.maintenanceDSN(leader), "SELECT count(*)::int FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND (query LIKE 'INSERT INTO told%' OR query = 'commit')")
		if err != nil || n < waiters {
			return fmt.Errorf("%d wait, %w", n, err)
		}
		return nil
	})

	// Clients that come meanwhile, and one that only looks.
	recovered := make(chan struct{})
	var coming sync.WaitGroup
	var late []int
	var mu sync.Mutex
	id := atomic.Int32{}
	id.Store(1000)
	for range 3 {
		coming.Go(func() {
			for {
				select {
				case <-recovered:
					return
				case <-time.After(5 * time.Millisecond):
				}
				n := int(id.Add(1))
				ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
				conn, err := pgx.Connect(ctx, c.DSN(leader))
				if err == nil {
					_, err = conn.Exec(ctx, "INSERT INTO told VALUES ($1, 'late')", n)
					conn.Close(context.Background())
				}
				cancel()
				if err == nil {
					mu.Lock()
					late = append(late, n)
					mu.Unlock()
				}
			}
		})
	}
	look := func(conn *pgx.Conn) error {
		ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		var n int32
		err := conn.QueryRow(ctx, "SELECT count(*) FROM told WHERE who = 'waiter'").Scan(&n)
		seen.Add(n)
		return err
	}
	coming.Go(func() {
		conn := reader
		for {
			if err := look(conn); err != nil {
				conn.Close(context.Background())
				ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
				fresh, err := pgx.Connect(ctx, c.DSN(leader))
				cancel()
				if err == nil {
					conn = fresh
				}
			}
			select {
			case <-recovered:
				conn.Close(context.Background())
				return
			case <-time.After(2 * time.Millisecond):
			}
		}
	})

	next := c.Leader(c.without(leader)...)
	c.Exec(next, "INSERT INTO told VALUES (100, 'the next leader')")
	if n := ended.Load(); n != 0 {
		t.Errorf("%d of the COMMITs ended while the region was cut off", n)
	}
	c.Do("heal", func(ctx context.Context) error { return c.Heal(ctx) })
	c.Eventually(time.Minute, leader+" recovered", func(context.Context) error {
		if n := told.Load(); n != 0 {
			t.Fatalf("%d clients were told success of a transaction that was not chosen", n)
		}
		if r := c.Region(leader); r.State != "following" || !r.Healthy {
			return fmt.Errorf("it is %s: %s", r.State, r.Health)
		}
		if c.replica(leader).Incarnation == incarnation {
			return errors.New("it has the incarnation of before")
		}
		return nil
	})
	close(recovered)
	coming.Wait()
	ending.Wait()
	c.AwaitEqual()
	if n := told.Load(); n != 0 {
		t.Errorf("%d clients were told success of a transaction that was not chosen", n)
	}
	if n := seen.Load(); n != 0 {
		t.Errorf("readers saw rows that were never chosen, %d times", n)
	}
	for _, region := range c.Names {
		if n := query[int](c, region, "SELECT count(*)::int FROM told WHERE who = 'waiter'"); n != 0 {
			t.Errorf("%s holds %d rows that were not chosen", region, n)
		}
		for _, n := range late {
			if query[int](c, region, "SELECT count(*)::int FROM told WHERE id = $1", n) != 1 {
				t.Errorf("%s lacks row %d, which its client saw committed in %s", region, n, leader)
			}
		}
	}
	t.Logf("%d clients waited in COMMIT at %s, none was told success; %d tries of others while it recovered, %d succeeded", waiters, leader, id.Load()-1000, len(late))
}

// Clients draw values of sequences and write nothing; the leader is killed. No
// value is handed out a second time.
func nextvalOnlyFailover(t *testing.T, c *Cluster) {
	leader := c.Leader()
	c.Exec(leader, "CREATE SEQUENCE many", "CREATE SEQUENCE single INCREMENT -3 CACHE 20", "CREATE TABLE fenced (id int PRIMARY KEY)")
	const batch, total = 10_000, 1_000_000
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var mu sync.Mutex
	drawn := map[string]map[int64]bool{"many": {}, "single": {}}
	after := map[string]int{} // values acknowledged since the leader was killed
	killed := false
	twice := 0
	count := func(sequence string) int {
		mu.Lock()
		defer mu.Unlock()
		return len(drawn[sequence])
	}
	draw := func(sequence string, n, start int) {
		var conn *pgx.Conn
		defer func() {
			if conn != nil {
				conn.Close(context.Background())
			}
		}()
		for i := start; ctx.Err() == nil && count("many") < total; i++ {
			if conn == nil {
				dial, cancel := context.WithTimeout(ctx, 2*time.Second)
				var err error
				conn, err = pgx.Connect(dial, c.DSN(c.Names[i%len(c.Names)]))
				if err == nil {
					// Nothing of PostgreSQL can refuse nextval itself, so a client of a
					// sequence finds the leader by what the fence refuses elsewhere.
					if _, err = conn.Exec(dial, "DELETE FROM fenced"); err != nil {
						conn.Close(context.Background())
					}
				}
				cancel()
				if err != nil {
					conn = nil
					sleep(ctx, 20*time.Millisecond)
					continue
				}
			}
			op, cancel := context.WithTimeout(ctx, 20*time.Second)
			rows, err := conn.Query(op, "SELECT nextval('"+sequence+"') FROM generate_series(1, $1)", n)
			var values []int64
			if err == nil {
				values, err = pgx.CollectRows(rows, pgx.RowTo[int64])
			}
			cancel()
			if err != nil { // nothing of it was acknowledged
				conn.Close(context.Background())
				conn = nil
				sleep(ctx, 20*time.Millisecond)
				continue
			}
			mu.Lock()
			for _, v := range values {
				if drawn[sequence][v] {
					twice++
				}
				drawn[sequence][v] = true
			}
			if killed {
				after[sequence] += len(values)
			}
			mu.Unlock()
		}
	}
	var drawing sync.WaitGroup
	for i := range 3 {
		drawing.Go(func() { draw("many", batch, i) })
	}
	drawing.Go(func() { draw("single", 1, 0) })
	c.Eventually(time.Minute, "a good part of the values", func(context.Context) error {
		if n := count("many"); n < total*2/5 || count("single") < 50 {
			return fmt.Errorf("%d values and %d", n, count("single"))
		}
		return nil
	})
	before := count("many")
	c.KillNow(leader, sandbox.Both)
	mu.Lock()
	killed = true
	mu.Unlock()
	next := c.Leader(c.without(leader)...)
	drawing.Wait()
	if ctx.Err() != nil {
		t.Fatalf("only %d values were drawn in time", count("many"))
	}
	c.StartAgain(leader)
	c.AwaitEqual()
	if twice != 0 {
		t.Errorf("%d values were handed out twice", twice)
		for _, e := range c.slots(next, 0) {
			if e.Kind == "opening" || e.Kind == "marks" {
				t.Logf("slot %d: %s %s, term %d: %s", e.Slot, e.Verdict, e.Kind, e.TermCounter, e.Detail)
			}
		}
	}
	if after["many"] == 0 || after["single"] == 0 {
		t.Errorf("after the leader was killed %v values were drawn: the test has shown nothing", after)
	}
	t.Logf("%d values of two sequences, %d of them before %s was killed, the rest from %s; none twice", count("many")+count("single"), before, leader, next)
}

// A client that has drawn values waits in its commit while the sidecar is dead,
// and another region takes over. When the sidecar is back, the client must not
// be told success: the values are covered by no mark, and are drawn again there.
func nextvalWaiterFailover(t *testing.T, c *Cluster) {
	const n = 200_000
	leader := c.Leader()
	c.Exec(leader, "CREATE SEQUENCE waited", "SELECT nextval('waited')")
	c.AwaitEqual()
	draw := func(conn *pgx.Conn, n int) (values []int64, err error) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		rows, err := conn.Query(ctx, "SELECT nextval('waited') FROM generate_series(1, $1)", n)
		if err != nil {
			return nil, err
		}
		return pgx.CollectRows(rows, pgx.RowTo[int64])
	}
	conn := c.Connect(leader)
	c.KillNow(leader, sandbox.Sidecar)
	type result struct {
		values []int64
		err    error
	}
	waiter := make(chan result, 1)
	go func() {
		values, err := draw(conn, n)
		waiter <- result{values, err}
	}()
	c.Eventually(20*time.Second, "a client that waits", func(ctx context.Context) error {
		if n, err := queryIn[int](ctx, c.maintenanceDSN(leader), "SELECT count(*)::int FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%waited%'"); err != nil || n == 0 {
			return fmt.Errorf("%d, %w", n, err)
		}
		return nil
	})
	next := c.Leader(c.without(leader)...)
	here, err := draw(c.Connect(next), n)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case r := <-waiter:
		t.Fatalf("the commit ended without a sidecar: %v", r.err)
	default:
	}
	c.StartAgain(leader)
	var r result
	select {
	case r = <-waiter:
	case <-time.After(30 * time.Second):
		t.Fatal("the client is still left waiting")
	}
	c.AwaitEqual()
	if r.err == nil {
		drawn := map[int64]bool{}
		for _, v := range here {
			drawn[v] = true
		}
		twice := 0
		for _, v := range r.values {
			if drawn[v] {
				twice++
			}
		}
		t.Errorf("a client of %s was told success after %s had led; %d of its %d values were handed out twice", leader, next, twice, n)
	}
	t.Logf("the client that waited at %s: %v", leader, r.err)
}

// A leader's server crashes while its sidecar stands still. It comes up with its
// fence closed, whatever it was before, and nobody had to close it.
func fenceAfterCrash(t *testing.T, c *Cluster) {
	leader := c.Leader()
	c.Exec(leader, "CREATE TABLE crashed (id int PRIMARY KEY)", "INSERT INTO crashed VALUES (1)", "CHECKPOINT")
	c.AwaitEqual()
	c.Do("pause", func(ctx context.Context) error { return c.Pause(ctx, leader, sandbox.Sidecar) })
	c.KillNow(leader, sandbox.Postgres)
	c.StartAgain(leader)
	conn := c.Connect(leader)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, sql := range []string{"INSERT INTO crashed VALUES (2)", "CREATE TABLE crashed_too (id int)", "TRUNCATE crashed"} {
		if _, err := conn.Exec(ctx, sql); sqlState(err) != "25006" {
			t.Errorf("after the crash: %s: %v; want 25006", sql, err)
		}
	}
	next := c.Leader(c.without(leader)...)
	c.Exec(next, "INSERT INTO crashed VALUES (3)")
	c.Do("resume", func(ctx context.Context) error { return c.Resume(ctx, leader, sandbox.Sidecar) })
	c.AwaitEqual()
	if ids := query[string](c, leader, "SELECT string_agg(id::text, ',' ORDER BY id) FROM crashed"); ids != "1,3" {
		t.Errorf("%s holds %s", leader, ids)
	}
}

// A region comes back with a new server, whose WAL positions lie below those of
// its old commits in the log. When it leads, its new commits must not be taken
// for old ones delivered again, which would confirm and drop them; and the old
// ones are not in its new database by being its own.
func lsnReuseAfterWipe(t *testing.T, c *Cluster) {
	region := c.Leader()
	c.Exec(region, "CREATE TABLE reused (id int PRIMARY KEY, part text)", "CREATE TABLE filler (id serial PRIMARY KEY)")
	want := 0
	insert := func(n int) {
		t.Helper()
		for range n {
			c.Exec(region, fmt.Sprintf("INSERT INTO reused VALUES (%d, 'x')", want))
			want++
		}
	}
	check := func(when string) {
		t.Helper()
		c.AwaitEqual()
		for _, r := range c.Names {
			if n := query[int](c, r, "SELECT count(*)::int FROM reused"); n != want {
				t.Errorf("%s: %s holds %d of %d acknowledged rows", when, r, n, want)
			}
		}
	}
	for _, lost := range []string{"server", "server and sidecar"} {
		for range 5 { // 16 MiB each: far above all that seeding will write
			c.Exec(region, "INSERT INTO filler DEFAULT VALUES", "SELECT pg_switch_wal()")
		}
		old := query[int64](c, region, "SELECT (pg_current_wal_lsn() - '0/0')::bigint")
		insert(40)
		c.AwaitEqual()
		before := c.replica(region)
		if lost == "server" {
			// The log stays, with all the old commits in it.
			c.KillNow(region, sandbox.Both)
			for _, path := range []string{c.Region(region).DataDirs["postgres"], filepath.Join(c.Dir, region, "database-created")} {
				if err := os.RemoveAll(path); err != nil {
					t.Fatal(err)
				}
			}
		} else {
			c.Do("wipe", func(ctx context.Context) error { return c.Wipe(ctx, region) })
		}
		c.Leader(c.without(region)...)
		c.StartAgain(region)
		check("lost " + lost)
		if now := c.replica(region); now.Incarnation == before.Incarnation || (now.ReplicaId == before.ReplicaId) != (lost == "server") {
			t.Errorf("lost %s: incarnation %x of replica %d became %x of %d", lost, before.Incarnation, before.ReplicaId, now.Incarnation, now.ReplicaId)
		}
		c.handOver(region)
		insert(40)
		at := query[int64](c, region, "SELECT (pg_current_wal_lsn() - '0/0')::bigint")
		if at >= old {
			t.Fatalf("the new server's WAL is at %x, not below the old commits at %x: the test would show nothing", at, old)
		}
		check("the new server leads")
		// What is delivered again after a crash is the new server's, and is known.
		c.KillNow(region, sandbox.Both)
		c.StartAgain(region)
		check("killed and started")
		c.handOver(region)
		insert(1)
		check("leads again")
		t.Logf("%s lost its %s: old commits above LSN %X, new ones below %X; all %d rows in every region", region, lost, old, at, want)
	}
}

// TestRulesOfFive plays those that need a quorum beside two regions.
func TestRulesOfFive(t *testing.T) {
	c := Start(t, Options{})
	c.scenario(t, "seed_with_waiter_then_depose", seedWithWaiterThenDepose)
	c.scenario(t, "wipe_and_rejoin", wipeAndRejoin)
}

// The only region that could give an image is a leader that is cut off and has a
// COMMIT waiting. Then it is deposed. The region that was to be seeded must come
// to hold nothing that was never chosen.
func seedWithWaiterThenDepose(t *testing.T, c *Cluster) {
	leader := c.Leader()
	c.Exec(leader, "CREATE TABLE imaged (id int PRIMARY KEY)", "INSERT INTO imaged SELECT generate_series(1, 1000)")
	c.AwaitEqual()
	seeded := c.other(leader)
	majority := c.without(leader, seeded)
	conn := c.Connect(leader)
	c.loseSlot(seeded)
	c.Do("partition", func(ctx context.Context) error { return c.Partition(ctx, leader, seeded) })
	ended := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		_, err := conn.Exec(ctx, "INSERT INTO imaged VALUES (-1)")
		ended <- err
	}()
	c.Eventually(20*time.Second, "COMMIT waits", func(ctx context.Context) error {
		if n, err := queryIn[int](ctx, c.maintenanceDSN(leader), "SELECT count(*)::int FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE 'INSERT INTO imaged%'"); err != nil || n == 0 {
			return fmt.Errorf("%d, %w", n, err)
		}
		return nil
	})
	asked := c.logged(seeded, "loading an image from region "+leader)
	c.StartAgain(seeded)
	c.Eventually(30*time.Second, seeded+" asks "+leader+" for an image", func(context.Context) error {
		if c.logged(seeded, "loading an image from region "+leader) == asked {
			return errors.New(c.Region(seeded).State)
		}
		return nil
	})
	next := c.Leader(majority...)
	c.Exec(next, "INSERT INTO imaged VALUES (2000)")
	// For a while yet the image could be taken.
	until := time.Now().Add(3 * time.Second)
	for time.Now().Before(until) {
		select {
		case err := <-ended:
			t.Fatalf("COMMIT ended (%v) while the leader was cut off from a quorum", err)
		case <-time.After(50 * time.Millisecond):
		}
		if r := c.Region(seeded); r.State == "following" || r.State == "leading" {
			if n := query[int](c, seeded, "SELECT count(*)::int FROM imaged WHERE id = -1"); n != 0 {
				t.Fatalf("%s was seeded with a row that is not chosen", seeded)
			}
		}
	}
	c.Do("heal", func(ctx context.Context) error { return c.Heal(ctx) })
	var err error
	select {
	case err = <-ended:
	case <-time.After(time.Minute):
		t.Fatal("COMMIT has not ended after the leader was deposed")
	}
	if err == nil {
		t.Error("the client was told success of a transaction that was not chosen")
	}
	c.AwaitEqual()
	for _, r := range c.Names {
		if n := query[int](c, r, "SELECT count(*)::int FROM imaged"); n != 1001 {
			t.Errorf("%s holds %d rows instead of 1001", r, n)
		}
		if n := query[int](c, r, "SELECT count(*)::int FROM imaged WHERE id = -1"); n != 0 {
			t.Errorf("%s holds the row that was never chosen", r)
		}
	}
	t.Logf("%s asked %s for an image while a COMMIT waited there; %s led then; COMMIT ended with: %v", seeded, leader, next, err)
}

// A region whose disks are lost comes back as a new replica with an image, and
// its vote counts: with two others dead, writes need it.
func wipeAndRejoin(t *testing.T, c *Cluster) {
	leader := c.Leader()
	c.Exec(leader, "CREATE TABLE kept (id int PRIMARY KEY)", "INSERT INTO kept SELECT generate_series(1, 1000)")
	c.AwaitEqual()
	region := c.other(leader)
	before := c.replica(region)
	if out, err := c.paxosctl("dev", "wipe", region); err != nil {
		t.Fatalf("paxosctl dev wipe: %v: %s", err, out)
	}
	if st := c.Region(region); st.State != "wiped" {
		t.Fatalf("after the wipe %s is %s", region, st.State)
	}
	c.Exec(leader, "INSERT INTO kept VALUES (2000)")
	begun := time.Now()
	c.StartAgain(region)
	c.AwaitEqual()
	took := time.Since(begun)
	members := func() map[string]string {
		m := map[string]string{}
		for _, e := range c.slots(leader, 0) {
			if e.Kind != "config" {
				continue
			}
			clear(m)
			for _, field := range strings.Fields(e.Detail) {
				name, as, _ := strings.Cut(field, "=")
				m[name] += as
			}
		}
		return m
	}
	now := c.replica(region)
	want := fmt.Sprintf("%d(voter)", now.ReplicaId)
	c.Eventually(time.Minute, region+" votes under its new id alone", func(context.Context) error {
		now = c.replica(region)
		want = fmt.Sprintf("%d(voter)", now.ReplicaId)
		if m := members(); m[region] != want || len(m) != len(c.Names) {
			return fmt.Errorf("the members are %v, want %s=%s", m, region, want)
		}
		return nil
	})
	if now.ReplicaId == before.ReplicaId || now.Incarnation == before.Incarnation {
		t.Errorf("it came back as replica %d, incarnation %x, as before", now.ReplicaId, now.Incarnation)
	}
	down := c.without(leader, region)[:2]
	for _, r := range down {
		c.KillNow(r, sandbox.Both)
	}
	c.Leader(c.without(down...)...)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn := c.Connect(c.Leader(c.without(down...)...))
	if _, err := conn.Exec(ctx, "INSERT INTO kept VALUES (2001)"); err != nil {
		t.Errorf("a write with %v dead: %v", down, err)
	}
	for _, r := range down {
		c.StartAgain(r)
	}
	c.AwaitEqual()
	for _, r := range c.Names {
		if n := query[int](c, r, "SELECT count(*)::int FROM kept"); n != 1002 {
			t.Errorf("%s holds %d of 1002 rows", r, n)
		}
	}
	t.Logf("%s was wiped: replica %d became %d, seeded in %v, members %v; a write was acknowledged with %v dead", region, before.ReplicaId, now.ReplicaId,
		took.Round(time.Millisecond), slices.Sorted(maps.Values(members())), down)
}
