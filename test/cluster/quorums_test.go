package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestFlexibleQuorums: with four of five in phase 1 and two in phase 2 a commit
// takes the round trip to the nearest region, which is 12 ms; a majority would
// take the 25 ms of the second nearest. What that gives up is told.
func TestFlexibleQuorums(t *testing.T) {
	one := 1
	c := Start(t, Options{WAN: "global", Phase1: 4, Phase2: 2, Durability: &one})
	refusedUnlessSaid(t, c)
	if leader := c.Leader(); leader != "r1" {
		c.handOver("r1")
	}
	conn := c.Connect("r1")
	must(t, conn, "CREATE TABLE t (id int PRIMARY KEY)")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var took []time.Duration
	for i := range 200 {
		begun := time.Now()
		if _, err := conn.Exec(ctx, "INSERT INTO t VALUES ($1)", i); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(begun))
	}
	slices.Sort(took)
	p50, p99 := took[len(took)/2], took[len(took)*99/100]
	t.Logf("commits at r1: p50 %v, p99 %v", p50, p99)
	if p50 < 11*time.Millisecond || p50 >= 20*time.Millisecond {
		t.Errorf("the median commit took %v, want the 12 ms to the nearest region and little more", p50)
	}
	c.Eventually(20*time.Second, "the quorums in quorate.status", func(context.Context) error {
		if got := query[string](c, "r1", "SELECT phase1_quorum || ' ' || phase2_quorum || ' ' || durability_regions FROM quorate.status"); got != "4 2 1" {
			return fmt.Errorf("phase 1, phase 2, losses: %s", got)
		}
		return nil
	})
	out := c.ctl("status")
	for _, want := range []string{"an acknowledged commit is on disk in 2 regions", "REDUCED DURABILITY: the loss of 2 of 5 voting regions loses acknowledged commits; 1 may be lost", "phase 1 (electing a leader) 4, phase 2 (committing) 2 of 5"} {
		if !strings.Contains(out, want) {
			t.Errorf("paxosctl status does not say %q:\n%s", want, out)
		}
	}
	if out := c.ctl("member", "apply", "--dry-run"); !strings.Contains(out, "nothing to change") {
		t.Errorf("paxosctl member apply: %s", out)
	}
	// One region may be lost, the leader's too.
	c.KillNow("r1", "")
	leader := c.Leader(c.without("r1")...)
	c.Exec(leader, "INSERT INTO t VALUES (1000)")
	c.AwaitEqual(c.without("r1")...)
	if n := query[int](c, leader, "SELECT count(*)::int FROM t"); n != 201 {
		t.Errorf("%d of 201 acknowledged rows are left", n)
	}
}

// refusedUnlessSaid: the same sizes without durability_regions are no
// configuration.
func refusedUnlessSaid(t *testing.T, c *Cluster) {
	t.Helper()
	text, err := os.ReadFile(c.Region("r1").ConfigFile)
	if err != nil {
		t.Fatal(err)
	}
	silent := filepath.Join(t.TempDir(), "region.yaml")
	var lines []string
	for _, l := range strings.Split(string(text), "\n") {
		if !strings.HasPrefix(l, "durability_regions") {
			lines = append(lines, l)
		}
	}
	if err := os.WriteFile(silent, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(filepath.Join(Binaries(t), "quorate"), "run", "--config", silent).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "set durability_regions: 1 if that is meant") {
		t.Errorf("without durability_regions: %v\n%s", err, out)
	}
}

// ctl is paxosctl for a command that must succeed.
func (c *Cluster) ctl(args ...string) string {
	c.t.Helper()
	out, err := c.paxosctl(args...)
	if err != nil {
		c.t.Fatalf("paxosctl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}
