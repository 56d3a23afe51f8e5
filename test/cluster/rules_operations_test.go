package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox"
)

// TestOperations does to one cluster what its operators and their tools do.
func TestOperations(t *testing.T) {
	c := Start(t, Options{Regions: 3})
	c.scenario(t, "rolled_back_data_dir", rolledBackDataDir) // while there is little to seed
	c.scenario(t, "fence_at_every_table", fenceAtEveryTable)
	c.scenario(t, "ddl_replicates", ddlReplicates)
	c.scenario(t, "planned_transfer", plannedTransfer)
	c.scenario(t, "connections_stay_local", connectionsStayLocal)
	c.scenario(t, "large_transaction", largeTransaction)
	c.scenario(t, "seed_killed_half_way", seedKilledHalfWay)
}

// A data_dir that is put back to an earlier state is recognised by the other
// regions: the replica stops, and the region joins as a new one by itself.
func rolledBackDataDir(t *testing.T, c *Cluster) {
	leader := c.Leader()
	c.Exec(leader, "CREATE TABLE rolled (id int PRIMARY KEY)", "INSERT INTO rolled SELECT generate_series(1, 100)")
	c.AwaitEqual()
	region := c.other(leader)
	data, copied := c.Region(region).DataDirs["sidecar"], filepath.Join(c.Dir, "copied")
	c.KillNow(region, sandbox.Sidecar)
	if out, err := exec.Command("cp", "-a", data, copied).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	before := c.logs()[region].Replica
	c.StartAgain(region)
	c.Exec(leader, "INSERT INTO rolled SELECT generate_series(101, 200)")
	c.AwaitEqual()
	before = max(before, c.logs()[region].Replica)
	c.KillNow(region, sandbox.Sidecar)
	if err := os.RemoveAll(data); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(copied, data); err != nil {
		t.Fatal(err)
	}
	c.StartAgain(region)
	c.Eventually(time.Minute, region+" to be a new replica", func(context.Context) error {
		if now := c.logs()[region].Replica; now <= before {
			return fmt.Errorf("it is replica %d", now)
		}
		return nil
	})
	c.Exec(c.Leader(), "INSERT INTO rolled SELECT generate_series(201, 300)")
	c.AwaitEqual()
	c.Eventually(time.Minute, "the new replica to vote", func(context.Context) error {
		if out := c.ctl("member", "list"); strings.Contains(out, "learner") {
			return errors.New(out)
		}
		return nil
	})
	log, err := os.ReadFile(filepath.Join(c.Region(region).LogDir, "quorate.log"))
	if err != nil || !strings.Contains(string(log), "was put back to an earlier state") {
		t.Errorf("its log does not say why (%v)", err)
	}
}

// The ways around the fence that ordinary tools take, at the level of the whole:
// what a session in the replica role does on the leader reaches the followers,
// and what replay created there refuses writes.
func fenceAtEveryTable(t *testing.T, c *Cluster) {
	leader := c.Leader()
	conn := c.Connect(leader)
	must(t, conn, "SET session_replication_role = replica",
		"CREATE TABLE loaded (id int PRIMARY KEY)", "INSERT INTO loaded SELECT generate_series(1, 100)", "ALTER TABLE loaded ADD v text DEFAULT 'x'",
		"CREATE TABLE whole (id int PRIMARY KEY) PARTITION BY RANGE (id)", "CREATE TABLE leaf PARTITION OF whole FOR VALUES FROM (0) TO (100)",
		"CREATE TABLE attached (id int PRIMARY KEY)", "ALTER TABLE whole ATTACH PARTITION attached FOR VALUES FROM (100) TO (200)",
		"INSERT INTO leaf VALUES (1)", "INSERT INTO whole VALUES (150)")
	c.AwaitEqual()
	for _, region := range c.without(leader) {
		t.Run("replica_role_ddl in "+region, func(t *testing.T) {
			if n := query[int](c, region, "SELECT count(*)::int FROM loaded WHERE v = 'x'"); n != 100 {
				t.Errorf("%s holds %d of 100 rows of what a session in the replica role created and loaded", region, n)
			}
		})
		t.Run("leaf_write in "+region, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			for _, role := range []string{"origin", "replica"} {
				conn := c.Connect(region)
				must(t, conn, "SET session_replication_role = "+role)
				for _, sql := range []string{"INSERT INTO leaf VALUES (2)", "UPDATE leaf SET id = 3", "DELETE FROM attached", "TRUNCATE leaf", "INSERT INTO whole VALUES (3)",
					"INSERT INTO loaded VALUES (1000)", "ALTER TABLE whole DETACH PARTITION leaf", "DROP TABLE loaded", "ALTER TABLE leaf DISABLE TRIGGER ALL"} {
					if _, err := conn.Exec(ctx, sql); !Refused(err) {
						t.Errorf("role %s: %s: %v; want 25006 with a hint", role, sql, err)
					}
				}
			}
		})
	}
}

// What psql changes of the schema at the leader is what pg_dump finds in every
// region.
func ddlReplicates(t *testing.T, c *Cluster) {
	leader := c.Leader()
	for _, script := range []string{
		`CREATE SCHEMA shop; CREATE SCHEMA gone;
		 CREATE TYPE shop.state AS ENUM ('new', 'paid');
		 CREATE DOMAIN shop.amount AS numeric(12,2) CHECK (VALUE >= 0);
		 CREATE SEQUENCE shop.numbers START 100 INCREMENT 5;
		 CREATE TABLE shop.customer (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL UNIQUE);
		 CREATE TABLE shop."Order" (id bigint DEFAULT nextval('shop.numbers') PRIMARY KEY, customer int REFERENCES shop.customer ON DELETE CASCADE,
			total shop.amount, state shop.state DEFAULT 'new', twice numeric GENERATED ALWAYS AS (total * 2) STORED, extra jsonb);
		 CREATE TABLE gone.a (id int PRIMARY KEY); CREATE TABLE gone.b (id serial PRIMARY KEY); CREATE SEQUENCE gone.s; CREATE VIEW gone.v AS SELECT id FROM gone.a;`,
		`CREATE INDEX order_state ON shop."Order" (state) WHERE total > 10; CREATE INDEX dropped_index ON shop."Order" USING gin (extra);
		 CREATE VIEW shop.paid AS SELECT id, total FROM shop."Order" WHERE state = 'paid';
		 CREATE MATERIALIZED VIEW shop.sums AS SELECT customer, sum(total) FROM shop."Order" GROUP BY 1 WITH NO DATA;
		 CREATE FUNCTION shop.count_all() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT count(*) FROM shop."Order"';
		 CREATE FUNCTION shop.touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.extra := '{"touched": true}'; RETURN NEW; END $$;
		 CREATE TRIGGER touched BEFORE INSERT ON shop."Order" FOR EACH ROW EXECUTE FUNCTION shop.touch();
		 COMMENT ON TABLE shop."Order" IS 'what was ordered; and "quoted" it''s';`,
		`INSERT INTO shop.customer (name) SELECT 'c' || n FROM generate_series(1, 50) n;
		 INSERT INTO shop."Order" (customer, total) SELECT 1 + n % 50, n FROM generate_series(0, 499) n; INSERT INTO gone.a SELECT generate_series(1, 9);`,
		`ALTER TYPE shop.state ADD VALUE 'sent' AFTER 'paid';`,
		`BEGIN; ALTER TABLE shop.customer ADD joined date NOT NULL DEFAULT '2020-01-01'; ALTER TABLE shop.customer ALTER name TYPE varchar(80);
		 UPDATE shop.customer SET joined = '2021-02-03' WHERE id % 2 = 0; ALTER TABLE shop.customer RENAME name TO called; COMMIT;`,
		`BEGIN; CREATE TABLE shop.never (id int); ROLLBACK;`,
		`ALTER TABLE shop."Order" ADD CONSTRAINT small CHECK (total < 100000), DROP COLUMN twice; ALTER SEQUENCE shop.numbers INCREMENT 7 CACHE 3;
		 ALTER INDEX shop.order_state RENAME TO order_by_state; ALTER VIEW shop.paid RENAME TO settled; DROP INDEX shop.dropped_index;
		 DROP VIEW gone.v; DROP SEQUENCE gone.s; DROP TABLE gone.a; DROP SCHEMA gone CASCADE;`,
		`CREATE INDEX CONCURRENTLY order_customer ON shop."Order" (customer);`,
		`CREATE TABLE shop.emptied (id int PRIMARY KEY); INSERT INTO shop.emptied SELECT generate_series(1, 100); TRUNCATE shop.emptied; INSERT INTO shop.emptied VALUES (7);
		 CREATE TABLE shop.renewed (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v int); INSERT INTO shop.renewed (v) SELECT generate_series(1, 100);
		 TRUNCATE shop.renewed RESTART IDENTITY; INSERT INTO shop.renewed (v) VALUES (1), (2);`,
	} {
		if out, err := c.Psql(leader, "-q", "-c", script); err != nil {
			// -c sends one transaction; what may not be in one comes by itself.
			t.Fatalf("psql: %v: %s\n%s", err, out, script)
		}
	}
	c.AwaitEqual()
	want := dumpSchema(t, c, leader)
	for _, must := range []string{`TABLE shop."Order"`, "order_by_state", "order_customer", "VIEW shop.settled", "MATERIALIZED VIEW shop.sums", "'sent'", "called character varying(80)", "TRIGGER touched", "INCREMENT BY 7"} {
		if !strings.Contains(want, must) {
			t.Errorf("the leader's schema does not hold %q", must)
		}
	}
	for _, no := range []string{"gone", "dropped_index", "shop.never", "twice"} {
		if strings.Contains(want, no) {
			t.Errorf("the leader's schema holds %q", no)
		}
	}
	for _, region := range c.without(leader) {
		if got := dumpSchema(t, c, region); got != want {
			t.Errorf("the schema of %s differs from that of %s:\n%s", region, leader, difference(want, got))
		}
	}
	if n := query[string](c, leader, "SELECT string_agg(id::text, ',' ORDER BY id) FROM shop.renewed"); n != "1,2" {
		t.Errorf("ids after TRUNCATE … RESTART IDENTITY are %s", n)
	}
	t.Logf("%d lines of schema are equal in %v", strings.Count(want, "\n"), c.Names)
}

func dumpSchema(t *testing.T, c *Cluster, region string) string {
	t.Helper()
	out, err := exec.Command("pg_dump", "-s", "-N", "quorate", "-d", c.DSN(region)).Output()
	if err != nil {
		var ended *exec.ExitError
		if errors.As(err, &ended) {
			t.Fatalf("pg_dump of %s: %v: %s", region, err, ended.Stderr)
		}
		t.Fatal(err)
	}
	// Newer versions guard a dump by a random word.
	lines := slices.DeleteFunc(strings.Split(string(out), "\n"), func(l string) bool {
		return strings.HasPrefix(l, `\restrict`) || strings.HasPrefix(l, `\unrestrict`)
	})
	return strings.Join(lines, "\n")
}

// difference returns the lines that only one of two texts has.
func difference(a, b string) string {
	var out strings.Builder
	for _, side := range []struct{ mark, have, other string }{{"-", a, b}, {"+", b, a}} {
		other := map[string]bool{}
		for _, l := range strings.Split(side.other, "\n") {
			other[l] = true
		}
		for _, l := range strings.Split(side.have, "\n") {
			if !other[l] {
				out.WriteString(side.mark + l + "\n")
			}
		}
	}
	if out.Len() == 0 {
		return "the same lines in another order"
	}
	return out.String()
}

// Leadership is handed around under load. Clients see refused writes and ended
// sessions, nothing else; nothing acknowledged is lost.
func plannedTransfer(t *testing.T, c *Cluster) {
	c.Exec(c.Leader(), "CREATE TABLE handed (client int, number int, PRIMARY KEY (client, number))")
	c.AwaitEqual()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	const clients = 4
	var mu sync.Mutex
	acked, uncertain, errs := make([][]int, clients), make([]map[int]bool, clients), map[string]int{}
	var gap time.Duration
	last := time.Now()
	var running sync.WaitGroup
	for id := range clients {
		uncertain[id] = map[int]bool{}
		running.Go(func() {
			var conn *pgx.Conn
			failed := func(what string, err error) {
				mu.Lock()
				errs[what+sqlState(err)]++
				mu.Unlock()
			}
			region := id
			for number := 1; ctx.Err() == nil; {
				op, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				if conn == nil {
					var err error
					if conn, err = pgx.Connect(op, c.DSN(c.Names[region%len(c.Names)])); err != nil {
						failed("connect: ", err)
						conn = nil
						cancel()
						sleep(ctx, 10*time.Millisecond)
						continue
					}
				}
				_, err := conn.Exec(op, "INSERT INTO handed VALUES ($1, $2)", id, number)
				cancel()
				mu.Lock()
				if err == nil {
					acked[id] = append(acked[id], number)
					gap, last = max(gap, time.Since(last)), time.Now()
				} else if !Refused(err) {
					uncertain[id][number] = true
				}
				mu.Unlock()
				number++
				if err != nil {
					failed("", err)
					conn.Close(context.Background())
					conn = nil
					region++
					sleep(ctx, 2*time.Millisecond)
				}
			}
			if conn != nil {
				conn.Close(context.Background())
			}
		})
	}
	count := func() (n int) {
		mu.Lock()
		defer mu.Unlock()
		for _, a := range acked {
			n += len(a)
		}
		return n
	}
	progress := func() {
		t.Helper()
		from := count()
		c.Eventually(30*time.Second, "100 more commits", func(context.Context) error {
			if n := count() - from; n < 100 {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
	}
	mu.Lock()
	gap, last = 0, time.Now()
	mu.Unlock()
	progress()
	for range 3 {
		to := c.other(c.Leader())
		begun := time.Now()
		said := c.handOver(to)
		if !strings.Contains(said, "writes paused for") {
			t.Errorf("the pause is not told: %q", said)
		}
		progress()
		t.Logf("%s (command and check took %v)", said, time.Since(begun).Round(time.Millisecond))
	}
	stop()
	running.Wait()
	c.AwaitEqual()
	for state, n := range errs {
		if state != "25006" && state != "57P01" {
			t.Errorf("clients saw %s, %d times", state, n)
		}
	}
	for _, region := range c.Names {
		have := make([]map[int]bool, clients)
		for id := range have {
			have[id] = map[int]bool{}
		}
		conn := c.Connect(region)
		rows, err := conn.Query(context.Background(), "SELECT client, number FROM handed")
		if err != nil {
			t.Fatal(err)
		}
		var id, number int
		if _, err := pgx.ForEachRow(rows, []any{&id, &number}, func() error { have[id][number] = true; return nil }); err != nil {
			t.Fatal(err)
		}
		for id := range clients {
			for _, number := range acked[id] {
				if !have[id][number] {
					t.Errorf("%s lost the acknowledged (%d, %d)", region, id, number)
				}
				delete(have[id], number)
			}
			for number := range have[id] {
				if !uncertain[id][number] {
					t.Errorf("%s holds (%d, %d), which was refused", region, id, number)
				}
			}
		}
	}
	t.Logf("%d commits were acknowledged; the longest time without any was %v; clients saw %v", count(), gap.Round(time.Millisecond), errs)
}

// A sidecar speaks to its own PostgreSQL only, and to other regions only at
// their sidecars' ports, which in a sandbox lie behind relays.
func connectionsStayLocal(t *testing.T, c *Cluster) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	st := c.Status(ctx)
	connections, err := st.Connections()
	if err != nil {
		t.Fatal(err)
	}
	own, relays := map[string]map[string]string{}, map[string]map[string]string{} // by region: address to what it is
	for _, r := range st.Regions {
		own[r.Region], relays[r.Region] = map[string]string{}, map[string]string{}
		for purpose, address := range r.Addresses {
			own[r.Region][address] = purpose
		}
	}
	for _, l := range st.Links {
		relays[l.From][l.Address] = l.To
	}
	callers := map[string]string{} // local address of a connection that was made: by whom
	kinds := map[string]int{}
	reached := map[string]map[string]bool{}
	for _, conn := range connections {
		who := conn.Region + " " + string(conn.Process)
		if !conn.Called {
			continue
		}
		callers[conn.Local] = conn.Region
		switch {
		case conn.Process == sandbox.Postgres:
			t.Errorf("the server of %s called %s", conn.Region, conn.Remote)
		case own[conn.Region][conn.Remote] == "postgres":
			kinds["to its own PostgreSQL"]++
			note(reached, conn.Region, "postgres")
		case own[conn.Region][conn.Remote] != "":
			kinds["to itself"]++
		case relays[conn.Region][conn.Remote] != "":
			kinds["to a relay"]++
			note(reached, conn.Region, relays[conn.Region][conn.Remote])
		default:
			t.Errorf("%s has a connection to %s, which is neither its PostgreSQL nor a relay of its own", who, conn.Remote)
		}
	}
	for _, conn := range connections {
		if conn.Called {
			continue
		}
		kinds["taken"]++
		// Its other end is a relay's, a client's, or its own region's.
		if from, ok := callers[conn.Remote]; ok && from != conn.Region {
			t.Errorf("the %s of %s has a connection that came from %s itself, not by a relay", conn.Process, conn.Region, from)
		}
		if _, _, err := net.SplitHostPort(conn.Remote); err != nil {
			t.Error(err)
		}
	}
	for _, region := range c.Names {
		want := append([]string{"postgres"}, c.without(region)...)
		slices.Sort(want)
		if got := slices.Sorted(maps.Keys(reached[region])); !slices.Equal(got, want) {
			t.Errorf("the sidecar of %s has connections to %v, want %v", region, got, want)
		}
	}
	t.Logf("%d connections: %v", len(connections), kinds)
}

func note(in map[string]map[string]bool, region, what string) {
	if in[region] == nil {
		in[region] = map[string]bool{}
	}
	in[region][what] = true
}

// A million rows in one transaction: the followers come to hold them, and no
// sidecar needs memory for more than a part of them at a time.
func largeTransaction(t *testing.T, c *Cluster) {
	const rows, residentMax = 1_000_000, 400 << 20
	leader := c.Leader()
	c.Exec(leader, "CREATE TABLE large (id int PRIMARY KEY, a text, b timestamptz)")
	c.AwaitEqual()
	from := c.Region(leader).Chosen
	done := make(chan error, 1)
	begun := time.Now()
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		conn, err := pgx.Connect(ctx, c.DSN(leader))
		if err == nil {
			_, err = conn.Exec(ctx, "INSERT INTO large SELECT n, md5(n::text) || repeat('x', n % 60), '2020-01-01'::timestamptz + n * interval '1 second' FROM generate_series(1, $1::int) n", rows)
			conn.Close(context.Background())
		}
		done <- err
	}()
	most := map[string]int64{}
	sample := func() {
		for _, region := range c.Names {
			if pid := c.Region(region).SidecarPID; pid != 0 {
				most[region] = max(most[region], resident(t, pid))
			}
		}
	}
	var took time.Duration
	for running := true; running; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			took, running = time.Since(begun), false
		case <-time.After(50 * time.Millisecond):
			sample()
		}
	}
	c.Eventually(3*time.Minute, "the rows in every region", func(ctx context.Context) error {
		sample()
		for _, region := range c.without(leader) {
			if n, err := queryIn[int](ctx, c.DSN(region), "SELECT count(*)::int FROM large"); err != nil || n != rows {
				if n != 0 {
					t.Errorf("%s shows %d of the transaction's rows", region, n)
				}
				return fmt.Errorf("%s holds %d, %w", region, n, err)
			}
		}
		return nil
	})
	everywhere := time.Since(begun)
	c.AwaitEqual()
	fragments := 0
	for _, e := range c.slots(leader, from+1) {
		if e.Kind == "fragment" {
			fragments++
		}
	}
	if fragments < 2 {
		t.Errorf("the transaction lies in %d fragments: memory was not put to the test", fragments)
	}
	for region, bytes := range most {
		if bytes > residentMax {
			t.Errorf("the sidecar of %s had %d MiB in memory", region, bytes>>20)
		}
		most[region] = bytes >> 20
	}
	t.Logf("%d rows, %d fragments, acknowledged after %v, in every region after %v; at most %v MiB resident", rows, fragments, took.Round(time.Millisecond), everywhere.Round(time.Millisecond), most)
}

// resident returns a process's memory, as the kernel counts it.
func resident(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	t.Fatalf("/proc/%d/status tells no VmRSS", pid)
	return 0
}

// A region is seeded anew, and its sidecar is killed while the image is being
// loaded. The old database is still there, and the sidecar begins again by
// itself. It runs after a scenario that has left much to load.
func seedKilledHalfWay(t *testing.T, c *Cluster) {
	region := c.other(c.Leader())
	type databases struct {
		app        uint32
		size, seed int64
	}
	look := func(ctx context.Context) (d databases, err error) {
		conn, err := pgx.Connect(ctx, c.maintenanceDSN(region))
		if err != nil {
			return d, err
		}
		defer conn.Close(context.WithoutCancel(ctx))
		err = conn.QueryRow(ctx, `SELECT coalesce(max(oid) FILTER (WHERE datname = 'app'), 0)::oid, coalesce(max(pg_database_size(oid)) FILTER (WHERE datname = 'app'), 0),
			coalesce(max(pg_database_size(oid)) FILTER (WHERE datname LIKE 'app\_%seed'), 0) FROM pg_database WHERE datname LIKE 'app%'`).Scan(&d.app, &d.size, &d.seed)
		return d, err
	}
	var before, half, after databases
	c.Do("look at the databases", func(ctx context.Context) (err error) { before, err = look(ctx); return err })
	const enough = 30 << 20
	if before.size < 4*enough {
		t.Fatalf("the database has %d MiB only: its seeding would be over at once", before.size>>20)
	}
	c.loseSlot(region)
	images := c.logged(region, "loading an image from region")
	c.StartAgain(region)
	c.Eventually(time.Minute, "a part of the image loaded", func(ctx context.Context) (err error) {
		if half, err = look(ctx); err == nil && half.seed < enough {
			err = fmt.Errorf("%d MiB", half.seed>>20)
		}
		return err
	})
	c.KillNow(region, sandbox.Sidecar)
	c.Do("look at the databases", func(ctx context.Context) (err error) { half, err = look(ctx); return err })
	if half.app != before.app || half.size < before.size*9/10 {
		t.Errorf("the old database, oid %d of %d MiB, is now oid %d of %d MiB", before.app, before.size>>20, half.app, half.size>>20)
	}
	if half.seed == 0 {
		t.Fatal("no half-loaded database is left: the sidecar was not killed half way")
	}
	c.StartAgain(region)
	c.AwaitEqual()
	c.Do("look at the databases", func(ctx context.Context) (err error) { after, err = look(ctx); return err })
	if after.app == before.app || after.seed != 0 {
		t.Errorf("database app has oid %d, before %d; the half-loaded one has %d MiB", after.app, before.app, after.seed>>20)
	}
	if n := c.logged(region, "loading an image from region") - images; n < 2 {
		t.Errorf("an image was loaded %d times, want the one cut short and another", n)
	}
	t.Logf("%s was killed with %d of %d MiB loaded, its old database in place; it began again and is equal", region, half.seed>>20, before.size>>20)
}
