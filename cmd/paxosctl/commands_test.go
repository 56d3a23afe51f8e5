package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"quorate/paxosgroup"
	"quorate/sidecar/admin"
	"quorate/sidecar/admin/admintest"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files in testdata anew")

// run executes paxosctl in this process.
func run(t *testing.T, args ...string) (out string, err error) {
	t.Helper()
	return runContext(t, t.Context(), args...)
}

func runContext(t *testing.T, ctx context.Context, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	root := newRootCommand()
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	return out.String(), err
}

// sandboxOf writes the description of a sandbox whose sidecars are c's.
func sandboxOf(t *testing.T, c *admintest.Cluster, names ...string) string {
	t.Helper()
	type region struct {
		Name  string         `json:"name"`
		Ports map[string]int `json:"ports"`
	}
	var regions []region
	for _, name := range names {
		_, port, err := net.SplitHostPort(c.Region(name).Address)
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(port)
		if err != nil {
			t.Fatal(err)
		}
		regions = append(regions, region{name, map[string]int{"admin": n}})
	}
	text, err := json.Marshal(map[string]any{"version": 1, "cluster": "demo", "regions": regions})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "sandbox.json"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *rewrite {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", path, got, want)
	}
}

func filled(t *testing.T) *admintest.Cluster {
	t.Helper()
	c := admintest.Start(t, "r1", "r2", "r3")
	term := paxosgroup.Ballot{Counter: 1, Replica: 1}
	at := time.Date(2026, 11, 23, 3, 4, 5, 678_900_000, time.UTC)
	c.Append(
		admin.LogEntry{Kind: "opening", Term: term, Region: "r1", Incarnation: 0xabc, Effective: true},
		admin.LogEntry{Kind: "transaction", Term: term, Number: 1, Region: "r1", Incarnation: 0xabc, Effective: true, Time: at, Xid: 4711, EndLSN: 0x1_0000_00ff,
			Tables: []admin.TableRows{{Table: "public.accounts", Rows: 2}, {Table: "public.history", Rows: 1}}, Bytes: 321,
			Trace: "4bf92f3577b34da6a3ce929d0e0e4736", Changes: []string{"UPDATE public.accounts id=1 balance=5", "INSERT public.history id=9"}},
		admin.LogEntry{Kind: "marks", Term: term, Number: 2, Region: "r1", Incarnation: 0xabc, Effective: true, Bytes: 40, Detail: "public.history_id_seq: 64"},
		admin.LogEntry{Kind: "noop"},
	)
	c.Change("r2", func(s *admin.RegionStatus) {
		s.Applied, s.CaughtUp, s.LagSlots, s.Lag = 2, false, 0, 1500*time.Millisecond
		s.Healthy, s.Health = false, "replay of slot 3 waits for a lock of pid 77; end it"
	})
	return c
}

func TestPrints(t *testing.T) {
	c := filled(t)
	dir := sandboxOf(t, c, "r1", "r2", "r3")
	c.Stop("r3")
	for _, tc := range []struct {
		file string
		args []string
	}{
		{"status.txt", []string{"status"}},
		{"status.json", []string{"status", "-o", "json"}},
		{"leader.txt", []string{"leader"}},
		{"leader.json", []string{"leader", "-o", "json"}},
		{"log.txt", []string{"log", "read"}},
		{"log.json", []string{"log", "read", "-o", "json"}},
		{"log_one_with_changes.txt", []string{"log", "read", "--from", "2", "--limit", "1", "--changes"}},
		{"log_one_with_changes.json", []string{"log", "read", "--from", "2", "--limit", "1", "--changes", "-o", "json"}},
	} {
		t.Run(tc.file, func(t *testing.T) {
			out, err := run(t, append(tc.args, "--dir", dir)...)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, tc.file, out)
		})
	}
}

// One address is asked for all regions, and tells the same.
func TestOneAddress(t *testing.T) {
	c := filled(t)
	addr := c.Region("r2").Address
	out, err := run(t, "leader", "--addr", addr)
	if err != nil || out != "r1\n" {
		t.Errorf("leader: got %q, %v", out, err)
	}
	out, err = run(t, "status", "--addr", addr, "-o", "json")
	var v clusterView
	if err != nil || json.Unmarshal([]byte(out), &v) != nil {
		t.Fatalf("status: got %q, %v", out, err)
	}
	if len(v.Regions) != 3 || v.Leader != "r1" || v.Regions[1].LagSlots != 2 {
		t.Errorf("status: got %+v", v)
	}
}

func TestVersion(t *testing.T) {
	c := admintest.Start(t, "r1", "r2")
	dir := sandboxOf(t, c, "r1", "r2")
	c.Stop("r2")
	out, err := run(t, "version", "--dir", dir, "-o", "json")
	var v versionView
	if err != nil || json.Unmarshal([]byte(out), &v) != nil {
		t.Fatalf("got %q, %v", out, err)
	}
	want := buildView{Region: "r1", Version: "v1.2.3", Commit: "0123456789ab", GoVersion: "go1.26.0", Protocol: 1, Postgres: "15.18"}
	if len(v.Sidecars) != 1 || v.Sidecars[0] != want || v.Paxosctl.GoVersion == "" {
		t.Errorf("got %+v", v)
	}
}

// A region that believes to lead under an older ballot does not: a quorum has
// promised the newer one, so whichever most of the regions answer, one tells it.
func TestDeposedLeaderIsNoLeader(t *testing.T) {
	c := admintest.Start(t, "r1", "r2", "r3")
	c.Change("r3", func(s *admin.RegionStatus) {
		s.Role, s.Writable, s.Ballot = admin.RoleLeader, true, paxosgroup.Ballot{Counter: 9, Replica: 3}
	})
	c.Change("r2", func(s *admin.RegionStatus) { s.Ballot = paxosgroup.Ballot{Counter: 9, Replica: 3} })
	for _, names := range [][]string{{"r1", "r2", "r3"}, {"r3", "r2", "r1"}} {
		out, err := run(t, "leader", "--dir", sandboxOf(t, c, names...))
		if err != nil || out != "r3\n" {
			t.Errorf("%v: got %q, %v", names, out, err)
		}
	}
}

func TestTransfer(t *testing.T) {
	c := admintest.Start(t, "r1", "r2", "r3")
	c.TransferPause = 50 * time.Millisecond
	// The leader stands last: the request must find its way to it.
	dir := sandboxOf(t, c, "r3", "r2", "r1")
	out, err := run(t, "leader", "transfer", "--to", "r2", "--dir", dir, "-o", "json")
	var v transferView
	if err != nil || json.Unmarshal([]byte(out), &v) != nil {
		t.Fatalf("got %q, %v", out, err)
	}
	if v.From != "r1" || v.To != "r2" || v.PauseMS == nil || *v.PauseMS < 25 || *v.PauseMS > 5000 {
		t.Errorf("got %s", out)
	}
	if out, err := run(t, "leader", "--dir", dir); err != nil || out != "r2\n" {
		t.Errorf("leader afterwards: %q, %v", out, err)
	}
	out, err = run(t, "leader", "transfer", "--to", "r2", "--dir", dir)
	if err != nil || out != "r2 leads already\n" {
		t.Errorf("again: %q, %v", out, err)
	}
	out, err = run(t, "leader", "transfer", "--to", "r3", "--dir", dir)
	if err != nil || !strings.HasPrefix(out, "r3 leads, r2 led before; writes paused for ") {
		t.Errorf("on: %q, %v", out, err)
	}
}

func TestFollow(t *testing.T) {
	c := filled(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	go func() {
		time.Sleep(200 * time.Millisecond)
		c.Append(admin.LogEntry{Kind: "opening", Region: "r2"})
	}()
	out, err := runContext(t, ctx, "log", "read", "--follow", "--from", "4", "--limit", "2", "-o", "json", "--addr", c.Region("r1").Address)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 2 || !strings.Contains(lines[0], `"slot":4`) || !strings.Contains(lines[1], `"slot":5`) {
		t.Errorf("got %s", out)
	}
}

func TestExitCodes(t *testing.T) {
	c := filled(t)
	c.Compact(2)
	dir := sandboxOf(t, c, "r1", "r2", "r3")
	leaderless := admintest.Start(t, "r1", "r2")
	leaderless.Stop("r1")
	leaderlessDir := sandboxOf(t, leaderless, "r1", "r2")
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := closed.Addr().String()
	closed.Close()
	for _, tc := range []struct {
		name string
		args string
		want int
		text string
	}{
		{"done", "status --dir " + dir, exitOK, ""},
		{"no such command", "stauts", exitUsage, "unknown command"},
		{"no such flag", "status --colour", exitUsage, "unknown flag"},
		{"no such format", "status -o xml", exitUsage, "neither table nor json"},
		{"an argument too many", "leader r2", exitUsage, "unknown command"},
		{"no region to hand over to", "leader transfer --dir " + dir, exitUsage, "--to is missing"},
		{"an unknown region to hand over to", "leader transfer --to r9 --dir " + dir, exitError, "no such region"},
		{"asked of a follower", "leader transfer --to r3 --addr " + c.Region("r2").Address, exitError, "ask region r1"},
		{"no leader", "leader --dir " + leaderlessDir, exitNoLeader, "no region leads"},
		{"no leader to hand over", "leader transfer --to r2 --dir " + leaderlessDir, exitNoLeader, "no region leads"},
		{"nobody answers", "status --addr " + nobody, exitUnreachable, "no sidecar answers"},
		{"nobody's log", "log read --addr " + nobody, exitUnreachable, "no sidecar answers"},
		{"a version needs nobody", "version --addr " + nobody, exitOK, ""},
		{"a slot no longer held", "log read --from 1 --dir " + dir, exitNotHeld, "no longer holds"},
		{"no sandbox there", "status --dir " + filepath.Join(dir, "nothing"), exitError, "no sandbox"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, err := run(t, strings.Fields(tc.args)...)
			if got := exitCode(err); got != tc.want {
				t.Errorf("exit code %d, want %d (%v, %s)", got, tc.want, err, out)
			}
			if !strings.Contains(fmt.Sprint(err), tc.text) {
				t.Errorf("error %q lacks %q", err, tc.text)
			}
		})
	}
}

// A sidecar that is stopped accepts connections and says nothing: the others
// are enough to know the leader, and it costs nothing but its own answer.
func TestSilentSidecar(t *testing.T) {
	c := admintest.Start(t, "r1", "r2", "r3")
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	c.Stop("r3")
	c.Region("r3").Address = silent.Addr().String()
	dir := sandboxOf(t, c, "r1", "r2", "r3")
	begun := time.Now()
	if out, err := run(t, "leader", "--dir", dir); err != nil || out != "r1\n" {
		t.Errorf("got %q, %v", out, err)
	}
	if took := time.Since(begun); took > answerWait/2 {
		t.Errorf("the leader was told after %v", took)
	}
	out, err := run(t, "status", "--dir", dir)
	if err != nil || !strings.Contains(out, "unreachable: its sidecar does not answer") {
		t.Errorf("got %q, %v", out, err)
	}
}
