package cluster

import (
	"context"
	"errors"
	"os/exec"
	"testing"
	"time"

	"quorate/deploy/sandbox"
)

// TestFaultsUnderLoad kills, pauses and cuts off regions under a workload that
// remembers what was acknowledged, one fault after the other on one cluster.
func TestFaultsUnderLoad(t *testing.T) {
	c := Start(t, Options{})
	AppenderSchema(c, c.Leader())

	// Each fault returns how it ends.
	faults := []struct {
		name string
		do   func(t *testing.T, leader string) (mend func(), cutOff []string)
	}{
		{"leader killed", func(t *testing.T, leader string) (func(), []string) {
			c.KillNow(leader, sandbox.Both)
			return func() { c.StartAgain(leader) }, []string{leader}
		}},
		{"leader's sidecar killed", func(t *testing.T, leader string) (func(), []string) {
			c.KillNow(leader, sandbox.Sidecar)
			return func() { c.StartAgain(leader) }, nil
		}},
		{"leader's PostgreSQL killed", func(t *testing.T, leader string) (func(), []string) {
			c.KillNow(leader, sandbox.Postgres)
			return func() { c.StartAgain(leader) }, []string{leader}
		}},
		{"two regions killed", func(t *testing.T, leader string) (func(), []string) {
			other := c.other(leader)
			c.KillNow(leader, sandbox.Both)
			c.KillNow(other, sandbox.Both)
			return func() { c.StartAgain(leader); c.StartAgain(other) }, []string{leader, other}
		}},
		{"leader partitioned away", func(t *testing.T, leader string) (func(), []string) {
			c.Do("partition", func(ctx context.Context) error { return c.Partition(ctx, leader) })
			return func() { c.Do("heal", func(ctx context.Context) error { return c.Heal(ctx) }) }, []string{leader}
		}},
		{"leader paused longer than its lease", func(t *testing.T, leader string) (func(), []string) {
			c.Do("pause", func(ctx context.Context) error { return c.Pause(ctx, leader, sandbox.Sidecar) })
			return func() {
				c.Do("resume", func(ctx context.Context) error { return c.Resume(ctx, leader, sandbox.Sidecar) })
			}, []string{leader}
		}},
	}
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			leader := c.Leader()
			c.Exec(leader, "TRUNCATE appended", "UPDATE clients SET last = 0, appended = 0")
			a := StartAppender(c, 4)
			defer a.Stop()
			a.AwaitProgress(t, 100, 20*time.Second)
			mend, cutOff := f.do(t, leader)
			if cutOff != nil { // another region goes on
				c.Leader(c.without(cutOff...)...)
			}
			a.AwaitProgress(t, 100, 30*time.Second)
			mend()
			a.AwaitProgress(t, 100, 30*time.Second)
			a.Stop()
			c.AwaitEqual()
			a.Check(t)
		})
		if t.Failed() {
			return // what follows would only repeat it
		}
	}
}

// other returns a region that is not among those given.
func (c *Cluster) other(not ...string) string { return c.without(not...)[0] }

func (c *Cluster) without(not ...string) []string {
	var rest []string
next:
	for _, name := range c.Names {
		for _, n := range not {
			if n == name {
				continue next
			}
		}
		rest = append(rest, name)
	}
	return rest
}

// TestPgbench initialises and runs pgbench on the leader and compares the regions.
func TestPgbench(t *testing.T) {
	c := Start(t, Options{WAN: "global"})
	leader := c.Leader()
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("pgbench", append(args, c.DSN(leader))...).CombinedOutput(); err != nil {
			t.Fatalf("pgbench %v: %v\n%s", args, err, out)
		}
	}
	run("-i", "-s", "5", "-q")
	run("-c", "8", "-j", "2", "-T", "30", "-n")
	c.AwaitEqual()
}

// TestNoQuorum: what happens while too few regions reach each other.
func TestNoQuorum(t *testing.T) {
	c := Start(t, Options{})
	c.scenario(t, "three regions down", threeRegionsDown)
	c.scenario(t, "commit while cut off", commitWhileCutOff)
}

// Writes wait and are not acknowledged, reads go on; with two regions back,
// writes go on and nothing is lost.
func threeRegionsDown(t *testing.T, c *Cluster) {
	leader := c.Leader()
	AppenderSchema(c, leader)
	c.AwaitEqual()
	down := c.without(leader)[:3]
	for _, r := range down {
		c.KillNow(r, sandbox.Both)
	}
	a := StartAppender(c, 2)
	defer a.Stop()
	before := a.Acked()
	time.Sleep(7 * time.Second) // longer than a lease and an election, and than a client waits before it tries again
	if n := a.Acked(); n != before {
		t.Errorf("%d commits were acknowledged by two regions of five", n-before)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for _, r := range c.without(down...) {
		var n int
		if err := c.Connect(r).QueryRow(ctx, "SELECT count(*) FROM clients").Scan(&n); err != nil || n != 64 {
			t.Errorf("read in %s: %d, %v", r, n, err)
		}
	}
	c.StartAgain(down[0])
	c.StartAgain(down[1])
	a.AwaitProgress(t, 20, 30*time.Second)
	c.StartAgain(down[2])
	a.Stop()
	c.AwaitEqual()
	a.Check(t)
}

// TestFollower: what sessions may do where writes are not taken.
func TestFollower(t *testing.T) {
	c := Start(t, Options{Regions: 3})
	c.scenario(t, "writes", writeOnFollower)
	c.scenario(t, "sessions", sessionsOfAFollower)
}

// A write where it cannot be taken fails at once, with the code and the hint,
// whatever the session sets.
func writeOnFollower(t *testing.T, c *Cluster) {
	leader := c.Leader()
	c.Exec(leader, "CREATE TABLE t (id int PRIMARY KEY)")
	c.AwaitEqual()
	follower := c.other(leader)
	for _, prepare := range []string{"SELECT 1", "SET default_transaction_read_only = off", "SET session_replication_role = replica"} {
		conn := c.Connect(follower)
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		if _, err := conn.Exec(ctx, prepare); err != nil {
			t.Fatal(err)
		}
		for _, write := range []string{"INSERT INTO t VALUES (1)", "DELETE FROM t", "TRUNCATE t", "CREATE TABLE u (id int)", "COPY t FROM PROGRAM 'echo 7'"} {
			if _, err := conn.Exec(ctx, write); !Refused(err) {
				t.Errorf("after %q: %s: %v; want 25006 with a hint", prepare, write, err)
			}
		}
		cancel()
	}
}

// A COMMIT of a leader that is cut off does not return; after healing it has
// either succeeded in every region or is in none, and in that case the client
// never saw success.
func commitWhileCutOff(t *testing.T, c *Cluster) {
	leader := c.Leader()
	c.Exec(leader, "CREATE TABLE t (id int PRIMARY KEY)")
	c.AwaitEqual()
	conn := c.Connect(leader)
	c.Do("partition", func(ctx context.Context) error { return c.Partition(ctx, leader) })
	done := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_, err := conn.Exec(ctx, "INSERT INTO t VALUES (1)")
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("COMMIT returned (%v) with all other regions cut off", err)
	case <-time.After(4 * time.Second):
	}
	c.Do("heal", func(ctx context.Context) error { return c.Heal(ctx) })
	var err error
	select {
	case err = <-done:
	case <-time.After(40 * time.Second):
		t.Fatal("COMMIT has not ended after healing")
	}
	c.AwaitEqual()
	for _, r := range c.Names {
		var n int
		if qerr := c.Connect(r).QueryRow(context.Background(), "SELECT count(*) FROM t").Scan(&n); qerr != nil {
			t.Fatal(qerr)
		}
		if err == nil && n != 1 {
			t.Errorf("%s lost a commit that the client saw succeed", r)
		}
	}
	var closed interface{ Timeout() bool }
	if err != nil && errors.As(err, &closed) && closed.Timeout() {
		t.Errorf("the client was left waiting: %v", err)
	}
}

// What an ordinary session does on a follower that no fence sees neither has its
// database replaced nor, when the region is promoted, gets into the new term.
func sessionsOfAFollower(t *testing.T, c *Cluster) {
	leader := c.Leader()
	c.Exec(leader, "INSERT INTO t VALUES (1), (2)")
	c.AwaitEqual()
	follower := c.other(leader)
	before := query[int64](c, follower, "SELECT incarnation FROM quorate.identity")

	// A message changes nothing, so it is nobody's business.
	c.Exec(follower, "SELECT pg_logical_emit_message(true, 'outbox', 'something happened')", "CREATE TEMP TABLE x AS SELECT 1")

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	early := c.Connect(follower)
	if _, err := early.Exec(ctx, "BEGIN"); err != nil {
		t.Fatal(err)
	}
	if _, err := early.Exec(ctx, "SELECT * FROM t WHERE id = 1 FOR UPDATE"); err != nil { // takes a transaction id
		t.Fatal(err)
	}
	c.handOver(follower)
	if _, err := early.Exec(ctx, "UPDATE t SET id = 10 WHERE id = 1"); err == nil {
		if _, err = early.Exec(ctx, "COMMIT"); err == nil {
			t.Error("a transaction that began before the region led was committed in its term")
		}
	}
	c.Exec(follower, "INSERT INTO t VALUES (3)")
	c.AwaitEqual()
	if after := query[int64](c, follower, "SELECT incarnation FROM quorate.identity"); after != before {
		t.Error("the region's database was replaced")
	}
	if n := query[int](c, follower, "SELECT count(*)::int FROM t WHERE id IN (1, 2, 3)"); n != 3 {
		t.Errorf("%d of the 3 rows are there", n)
	}
}
