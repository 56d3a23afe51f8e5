package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"quorate/deploy/sandbox"
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
	// The file says otherwise in every region, and is applied.
	quorumsBecome(t, c, 3, 3, 2)
	quorumsBecome(t, c, 4, 2, 1)
	// One region may be lost, the leader's too.
	c.KillNow("r1", "")
	leader := c.Leader(c.without("r1")...)
	c.Exec(leader, "INSERT INTO t VALUES (1000)")
	c.AwaitEqual(c.without("r1")...)
	if n := query[int](c, leader, "SELECT count(*)::int FROM t"); n != 201 {
		t.Errorf("%d of 201 acknowledged rows are left", n)
	}
}

// quorumsBecome changes the quorums of a running cluster, as an operator does.
func quorumsBecome(t *testing.T, c *Cluster, phase1, phase2, losses int) {
	t.Helper()
	size := regexp.MustCompile(`(phase1_quorum|phase2_quorum|durability_regions): \d+`)
	for _, region := range c.Names {
		file := c.Region(region).ConfigFile
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text = size.ReplaceAllFunc(text, func(setting []byte) []byte {
			name, _, _ := strings.Cut(string(setting), ":")
			return fmt.Appendf(nil, "%s: %d", name, map[string]int{"phase1_quorum": phase1, "phase2_quorum": phase2, "durability_regions": losses}[name])
		})
		if err := os.WriteFile(file, text, 0o644); err != nil {
			t.Fatal(err)
		}
		c.KillNow(region, sandbox.Sidecar)
		c.StartAgain(region)
	}
	leader := c.Leader()
	if out := c.ctl("status"); !strings.Contains(out, "region.yaml asks for another membership") {
		t.Errorf("status does not tell that the file asks for something else:\n%s", out)
	}
	c.Eventually(30*time.Second, "the change", func(context.Context) error {
		if out, err := c.paxosctl("member", "apply"); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		want := fmt.Sprintf("phase 1 (electing a leader) %d, phase 2 (committing) %d; %d may be lost", phase1, phase2, losses)
		if out := c.ctl("member", "list"); !strings.Contains(out, want) {
			return errors.New(out)
		}
		return nil
	})
	c.Exec(c.Leader(), fmt.Sprintf("CREATE TABLE q%d%d (id int PRIMARY KEY)", phase1, phase2))
	if leader != "r1" {
		c.handOver("r1")
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

// TestWitnessAndLearner: of five voters one has no database, and yet any two may
// be lost; a sixth region has a database and no vote, and never leads.
func TestWitnessAndLearner(t *testing.T) {
	c := Start(t, Options{Regions: 6, Witnesses: []string{"r5"}, Learners: []string{"r6"}})
	first := c.Leader()
	c.Exec(first, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t SELECT generate_series(1, 1000)")
	c.AwaitEqual(c.without("r5")...)
	if w := c.Region("r5"); w.Role != "witness" || w.State != "witness" || w.PostgresPID != 0 || !w.Healthy {
		t.Errorf("the witness is %+v", w)
	}
	if l := c.Region("r6"); l.Role != "learner" || l.State != "following" || !l.Healthy {
		t.Errorf("the learner is %+v", l)
	}
	for _, region := range []string{"r5", "r6"} {
		if out, err := c.paxosctl("leader", "transfer", "--to", region); err == nil || !strings.Contains(out, "no voter with a database") {
			t.Errorf("leadership for %s: %v, %s", region, err, out)
		}
	}
	// Two of five voters go, the leader among them; the witness makes up the
	// majority.
	second := c.other(first, "r5", "r6")
	c.KillNow(first, "")
	c.KillNow(second, "")
	leader := c.Leader(c.without(first, second)...)
	if leader == "r5" || leader == "r6" {
		t.Fatalf("%s leads", leader)
	}
	c.Exec(leader, "INSERT INTO t SELECT generate_series(1001, 2000)")
	c.AwaitEqual(c.without(first, second, "r5")...)
	if n := query[int](c, "r6", "SELECT count(*)::int FROM t"); n != 2000 {
		t.Errorf("the learner holds %d of 2000 rows", n)
	}
	c.StartAgain(first)
	c.StartAgain(second)
	c.AwaitEqual(c.without("r5")...)
	// A witness that lost its disk comes back as a new replica, without a seeding.
	before := query[string](c, leader, "SELECT string_agg(region || ' ' || kind, ', ' ORDER BY region) FROM quorate.regions")
	c.Do("wipe r5", func(ctx context.Context) error { return c.Wipe(ctx, "r5") })
	c.StartAgain("r5")
	c.Eventually(30*time.Second, "the witness to vote again", func(context.Context) error {
		out := c.ctl("member", "list")
		for _, l := range strings.Split(out, "\n") {
			if f := strings.Fields(l); len(f) >= 4 && f[0] == "r5" && f[1] == "7" && f[2] == "witness" {
				return nil
			}
		}
		return fmt.Errorf("%s", out)
	})
	if want := "r1 voter, r2 voter, r3 voter, r4 voter, r5 witness, r6 learner"; before != want {
		t.Errorf("quorate.regions: %s, want %s", before, want)
	}
	c.Exec(leader, "INSERT INTO t SELECT generate_series(2001, 2100)")
	c.AwaitEqual(c.without("r5")...)
	membersChange(t, c)
}

// membersChange has a voter become a learner, then a voter again and another
// region leave, all by the file and one command.
func membersChange(t *testing.T, c *Cluster) {
	t.Helper()
	c.configure(func(region map[string]any) bool {
		if region["name"] == "r4" {
			region["kind"] = "learner"
		}
		return true
	})
	c.applyMembers("region r4 becomes a learner, it is a voter")
	c.awaitMembers("r1 voter, r2 voter, r3 voter, r4 learner, r5 witness, r6 learner")
	if out, err := c.paxosctl("leader", "transfer", "--to", "r4"); err == nil {
		t.Errorf("a learner was given leadership: %s", out)
	}
	c.Exec(c.Leader(), "INSERT INTO t SELECT generate_series(2101, 2200)")
	c.AwaitEqual(c.without("r5")...)

	c.configure(func(region map[string]any) bool {
		if region["name"] == "r4" {
			delete(region, "kind")
		}
		return region["name"] != "r6"
	}, "r6")
	c.applyMembers("region r6 is removed") // r4, which has caught up, may have its vote already
	c.awaitMembers("r1 voter, r2 voter, r3 voter, r4 voter, r5 witness")
	// Its sidecar, which runs on with its old file, does no harm.
	c.Eventually(30*time.Second, "r6 to tell that it is out", func(context.Context) error {
		if r := c.Region("r6"); r.Healthy || !strings.Contains(r.Health, "no longer a member") {
			return fmt.Errorf("it is %+v", r)
		}
		return nil
	})
	c.KillNow("r6", "")
	c.handOver("r4")
	c.Exec("r4", "INSERT INTO t SELECT generate_series(2201, 2300)")
	c.AwaitEqual(c.without("r5", "r6")...)
}

// awaitMembers waits until the regions and their kinds are these, as r1 sees them.
func (c *Cluster) awaitMembers(want string) {
	c.t.Helper()
	c.Eventually(30*time.Second, "members "+want, func(context.Context) error {
		if got := query[string](c, "r1", "SELECT string_agg(region || ' ' || kind, ', ' ORDER BY region) FROM quorate.regions"); got != want {
			return errors.New(got)
		}
		return nil
	})
}

// configure edits the list of regions in every region.yaml but those of the
// regions left out, and restarts the sidecars, all at once. A region stays on the
// list if edit says so.
func (c *Cluster) configure(edit func(region map[string]any) bool, leftOut ...string) {
	c.t.Helper()
	for _, name := range c.without(leftOut...) {
		file := c.Region(name).ConfigFile
		text, err := os.ReadFile(file)
		if err != nil {
			c.t.Fatal(err)
		}
		var settings map[string]any
		if err := yaml.Unmarshal(text, &settings); err != nil {
			c.t.Fatal(err)
		}
		settings["regions"] = slices.DeleteFunc(settings["regions"].([]any), func(r any) bool { return !edit(r.(map[string]any)) })
		if text, err = yaml.Marshal(settings); err != nil {
			c.t.Fatal(err)
		}
		if err := os.WriteFile(file, text, 0o644); err != nil {
			c.t.Fatal(err)
		}
		c.KillNow(name, sandbox.Sidecar)
	}
	for _, name := range c.without(leftOut...) {
		c.StartAgain(name)
	}
}

// applyMembers runs paxosctl member apply, once all can be asked, which must tell
// of these changes.
func (c *Cluster) applyMembers(changes ...string) {
	c.t.Helper()
	c.Eventually(30*time.Second, "the change of members", func(context.Context) error {
		out, err := c.paxosctl("member", "apply")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		mustHold(c.t, "paxosctl member apply", out, changes...)
		return nil
	})
	c.Eventually(30*time.Second, "nothing more to change", func(context.Context) error {
		if out := c.ctl("member", "apply", "--dry-run"); !strings.Contains(out, "nothing to change") {
			return errors.New(out)
		}
		return nil
	})
}
