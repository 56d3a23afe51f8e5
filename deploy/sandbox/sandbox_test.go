package sandbox

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// tempDir is like t.TempDir, but user postgres can enter it.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "quorate-sandbox-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func options(t *testing.T, dir string, regions int, wan string) Options {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Options{Dir: dir, Regions: &regions, WAN: &wan, QuorateBin: self, Progress: func(line string) { t.Log(line) }}
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func up(t *testing.T, o Options) *Supervisor {
	t.Helper()
	t.Setenv(standInVariable, "sidecar")
	ctx := testContext(t)
	s, err := New(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Down(); err != nil {
			t.Error(err)
		}
	})
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.AwaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return s
}

func statusOf(t *testing.T, c *Client, region string) RegionStatus {
	t.Helper()
	st, err := c.Status(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range st.Regions {
		if r.Region == region {
			return r
		}
	}
	t.Fatalf("status lists no %s", region)
	panic("not reached")
}

func alive(pid int) bool {
	fields, err := statFields("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && fields[0] != "Z"
}

func exec1(t *testing.T, dsn, statement string) error {
	t.Helper()
	ctx := testContext(t)
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, statement)
	return err
}

func TestLifeOfASandbox(t *testing.T) {
	dir := tempDir(t)
	o := options(t, dir, 3, WANNone)
	s := up(t, o)
	ctx := testContext(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	if _, err := New(ctx, o); !errors.Is(err, ErrRunning) {
		t.Errorf("a second supervisor: %v", err)
	}
	c, err := Connect(dir)
	must(err)

	first := statusOf(t, c, "r2")
	if !alive(first.SidecarPID) || !alive(first.PostgresPID) || !first.Healthy {
		t.Fatalf("after up: %+v", first)
	}
	must(exec1(t, first.DSN, "CREATE TABLE kept (a int)"))

	// kill -9 of parts, and start of what does not run.
	must(c.Kill(ctx, "r2", Sidecar))
	if r := statusOf(t, c, "r2"); alive(first.SidecarPID) || r.SidecarPID != 0 || r.PostgresPID != first.PostgresPID {
		t.Errorf("after killing the sidecar: %+v", r)
	}
	must(c.StartRegion(ctx, "r2"))
	must(c.Kill(ctx, "r2", Postgres))
	if r := statusOf(t, c, "r2"); alive(first.PostgresPID) || r.SidecarPID == 0 || r.PostgresPID != 0 {
		t.Errorf("after killing PostgreSQL: %+v", r)
	}
	must(c.StartRegion(ctx, "r2"))
	must(c.StartRegion(ctx, "r2")) // all runs: no error
	must(c.Kill(ctx, "r2", Both))
	if r := statusOf(t, c, "r2"); r.SidecarPID != 0 || r.PostgresPID != 0 || r.State != "stopped" {
		t.Errorf("after killing both: %+v", r)
	}
	must(c.StartRegion(ctx, "r2"))
	must(exec1(t, first.DSN, "INSERT INTO kept VALUES (1)"))

	// Pauses.
	must(c.Pause(ctx, "r3", Both))
	if r := statusOf(t, c, "r3"); r.State != "sidecar paused" {
		t.Errorf("after a pause: %q", r.State)
	}
	must(c.Resume(ctx, "r3", Both))
	must(c.Pause(ctx, "r3", Postgres))
	r3 := statusOf(t, c, "r3")
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	if conn, err := pgx.Connect(short, r3.DSN); err == nil {
		conn.Close(ctx)
		t.Error("a paused server answers")
	}
	cancel()
	must(c.Resume(ctx, "r3", Postgres))
	must(exec1(t, r3.DSN, "SELECT 1"))

	// A wiped region has nothing, and comes back empty.
	must(c.Wipe(ctx, "r2"))
	if r := statusOf(t, c, "r2"); r.State != "wiped" {
		t.Errorf("after a wipe: %q", r.State)
	}
	for name, path := range first.DataDirs {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("after a wipe the data of the %s is there", name)
		}
	}
	must(c.StartRegion(ctx, "r2"))
	if err := exec1(t, first.DSN, "SELECT FROM kept"); err == nil {
		t.Error("a wiped region has its table back")
	}

	for _, err := range []error{
		c.Kill(ctx, "r9", Both), c.StartRegion(ctx, "r9"), c.Wipe(ctx, "r9"), c.Pause(ctx, "r9", Both),
		c.Resume(ctx, "r9", Both), c.Partition(ctx, "r9"), c.Heal(ctx, "r9"), c.Partition(ctx),
	} {
		if err == nil {
			t.Error("an operation on a region that is not there went well")
		}
	}

	// Down leaves nothing; up goes on with the same ports and data.
	before, err := c.Status(ctx)
	must(err)
	must(exec1(t, before.Regions[0].DSN, "CREATE TABLE kept (a int)"))
	must(c.Pause(ctx, "r1", Postgres)) // also what is paused ends
	must(c.Down(ctx))
	for _, r := range before.Regions {
		if alive(r.SidecarPID) || alive(r.PostgresPID) {
			t.Errorf("after down processes of %s run", r.Region)
		}
		for purpose, address := range r.Addresses {
			if conn, err := net.Dial("tcp", address); err == nil {
				conn.Close()
				t.Errorf("after down %s of %s answers", purpose, r.Region)
			}
		}
	}
	if _, err := Connect(dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("connect after down: %v", err)
	}
	again := up(t, Options{Dir: dir, QuorateBin: o.QuorateBin})
	after := again.Status(ctx)
	for i, r := range after.Regions {
		if r.DSN != before.Regions[i].DSN {
			t.Errorf("%s moved from %s to %s", r.Region, before.Regions[i].DSN, r.DSN)
		}
	}
	must(exec1(t, after.Regions[0].DSN, "SELECT FROM kept"))
	_ = s
}

// probe opens a connection over the relay from one region to another, and tells
// whether a byte comes back within patience.
func probe(t *testing.T, st Status, from, to string, patience time.Duration) (time.Duration, bool) {
	t.Helper()
	for _, l := range st.Links {
		if l.From != from || l.To != to || l.Purpose != "peer" {
			continue
		}
		conn, err := net.Dial("tcp", l.Address)
		if err != nil {
			t.Error(err)
			return 0, false
		}
		defer conn.Close()
		begin := time.Now()
		_ = conn.SetDeadline(begin.Add(patience))
		if _, err := conn.Write([]byte{1}); err != nil {
			t.Error(err)
			return 0, false
		}
		_, err = io.ReadFull(conn, make([]byte, 1))
		return time.Since(begin), err == nil
	}
	t.Errorf("no link from %s to %s", from, to)
	return 0, false
}

func TestDelaysAndPartitions(t *testing.T) {
	s := up(t, options(t, tempDir(t), 4, WANGlobal))
	ctx := testContext(t)
	st := s.Status(ctx)
	d, ok := probe(t, st, "r1", "r4", 5*time.Second)
	if want := 2 * RoundTrip(WANGlobal, 0, 3); !ok || d < want || d > want+time.Second { // with the handshake's
		t.Errorf("connecting from r1 to r4 and a round trip took %v, want %v", d, want)
	}
	check := func(when string, reachable map[string]bool) {
		t.Helper()
		var probing sync.WaitGroup
		for pair, want := range reachable {
			probing.Go(func() {
				from, to, _ := strings.Cut(pair, ">")
				patience := 5 * time.Second
				if !want { // four round trips of this map's longest
					patience = 4 * RoundTrip(WANGlobal, 3, 4)
				}
				if _, got := probe(t, st, from, to, patience); got != want {
					t.Errorf("%s: %s reaches %s: %v, want %v", when, from, to, got, want)
				}
			})
		}
		probing.Wait()
	}
	if err := s.Partition(ctx, "r1", "r2"); err != nil {
		t.Fatal(err)
	}
	check("r1 and r2 cut off", map[string]bool{"r1>r2": true, "r2>r1": true, "r1>r3": false, "r3>r1": false, "r2>r4": false, "r3>r4": true})
	if err := s.Partition(ctx, "r3"); err != nil {
		t.Fatal(err)
	}
	check("and r3", map[string]bool{"r1>r2": true, "r1>r3": false, "r3>r4": false, "r4>r3": false, "r2>r4": false})
	if err := s.Heal(ctx, "r1", "r2"); err != nil {
		t.Fatal(err)
	}
	check("r1 and r2 healed", map[string]bool{"r1>r2": true, "r1>r4": true, "r2>r4": true, "r1>r3": false, "r3>r4": false})
	if err := s.Heal(ctx); err != nil {
		t.Fatal(err)
	}
	check("all healed", map[string]bool{"r1>r3": true, "r3>r4": true})
}

func TestConnectionsAreReadFromTheKernel(t *testing.T) {
	s := up(t, options(t, tempDir(t), 2, WANNone))
	st := s.Status(testContext(t))
	var link LinkStatus
	for _, l := range st.Links {
		if l.From == "r1" && l.Purpose == "peer" {
			link = l
		}
	}
	conn, err := net.Dial("tcp", link.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil { // the relay has reached r2
		t.Fatal(err)
	}
	ctx := testContext(t)
	client, err := pgx.Connect(ctx, st.Regions[0].DSN)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close(ctx)
	connections, err := st.Connections()
	if err != nil {
		t.Fatal(err)
	}
	peer, server := false, false
	for _, c := range connections {
		peer = peer || c.Region == "r2" && c.Process == Sidecar && c.Local == st.Regions[1].Addresses["peer"] && !c.Called
		server = server || c.Region == "r1" && c.Process == Postgres && c.Local == st.Regions[0].Addresses["postgres"] && !c.Called
	}
	if !peer || !server {
		t.Errorf("r2's sidecar was reached: %v, r1's server was reached: %v; connections: %+v", peer, server, connections)
	}
}

func TestRoundTripsMakeAMap(t *testing.T) {
	for i, want := range []time.Duration{12, 25, 60, 80} {
		if got := RoundTrip(WANGlobal, 0, i+1); got != want*time.Millisecond {
			t.Errorf("r1 to r%d is %v", i+2, got)
		}
	}
	for a := range RegionsMax {
		for b := range RegionsMax {
			if a != b && RoundTrip(WANGlobal, a, b) <= 0 || RoundTrip(WANGlobal, a, b) != RoundTrip(WANGlobal, b, a) {
				t.Errorf("r%d to r%d is %v", a+1, b+1, RoundTrip(WANGlobal, a, b))
			}
			for c := range RegionsMax {
				if a != c && b != c && RoundTrip(WANGlobal, a, b) > RoundTrip(WANGlobal, a, c)+RoundTrip(WANGlobal, c, b) {
					t.Errorf("from r%d to r%d it is shorter by r%d", a+1, b+1, c+1)
				}
			}
		}
	}
}

func TestASidecarThatEndsIsToldWithItsLog(t *testing.T) {
	t.Setenv(standInVariable, "broken")
	ctx := testContext(t)
	s, err := New(ctx, options(t, tempDir(t), 1, WANNone))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Down()
	err = s.Start(ctx)
	if err == nil || !strings.Contains(err.Error(), "the stand-in is told to fail") {
		t.Errorf("start: %v", err)
	}
	if st := s.Status(ctx); !strings.Contains(st.Regions[0].State, "exit status 1") {
		t.Errorf("state: %q", st.Regions[0].State)
	}
}

func TestATakenPortIsReplaced(t *testing.T) {
	dir := tempDir(t)
	s := up(t, options(t, dir, 1, WANNone))
	old := s.description.Regions[0].Ports["postgres"]
	if err := s.Down(); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", address(old))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	again := up(t, options(t, dir, 1, WANNone))
	if now := again.description.Regions[0].Ports["postgres"]; now == old {
		t.Errorf("port %d is still used", old)
	}
	if err := exec1(t, again.description.Regions[0].DSN(), "SELECT 1"); err != nil {
		t.Error(err)
	}
}

func TestSettingsOfARunningSandboxAreCompared(t *testing.T) {
	dir := tempDir(t)
	o := options(t, dir, 1, WANNone)
	up(t, o)
	if err := o.CheckRunning(); err != nil {
		t.Errorf("the same settings: %v", err)
	}
	other := WANGlobal
	o.WAN = &other
	if err := o.CheckRunning(); !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), "--wan") {
		t.Errorf("other delays: %v", err)
	}
}

// TestSupervisorOfAnotherProcess is no test: it is the process that the next
// one kills.
func TestSupervisorOfAnotherProcess(t *testing.T) {
	dir := os.Getenv("QUORATE_SANDBOX_TEST_DIR")
	if dir == "" {
		t.Skip("run by TestNothingOutlivesAKilledSupervisor")
	}
	up(t, options(t, dir, 1, WANNone))
	time.Sleep(time.Hour)
}

func TestNothingOutlivesAKilledSupervisor(t *testing.T) {
	dir := tempDir(t)
	cmd := exec.Command(os.Args[0], "-test.run=^TestSupervisorOfAnotherProcess$")
	cmd.Env = append(os.Environ(), "QUORATE_SANDBOX_TEST_DIR="+dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	var r RegionStatus
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if c, err := Connect(dir); err == nil && c.AwaitReady(testContext(t)) == nil {
			r = statusOf(t, c, "r1")
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the other process's sandbox did not start")
		}
	}
	server := regionsOf(dir, &Description{PostgresRoot: dir, Regions: []*RegionDescription{{Name: "r1"}}})[0].server
	if err := syscall.Kill(cmd.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); alive(r.SidecarPID) || alive(r.PostgresPID); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("10 s after its supervisor was killed: sidecar runs %v, postgres runs %v", alive(r.SidecarPID), alive(r.PostgresPID))
		}
	}
	if pid, ok := server.Running(); ok {
		t.Errorf("postgres %d runs", pid)
	}
	up(t, options(t, dir, 1, WANNone)) // and the directory is free
}

func TestWhatAnEarlierSupervisorLeftIsEnded(t *testing.T) {
	dir := tempDir(t)
	s := up(t, options(t, dir, 1, WANNone))
	pidFile := s.regions[0].pidFile()
	if err := s.Down(); err != nil {
		t.Fatal(err)
	}
	left := exec.Command("sleep", "100")
	other := exec.Command("sleep", "100")
	for _, cmd := range []*exec.Cmd{left, other} {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Wait()
		defer cmd.Process.Kill()
	}
	ctx := testContext(t)
	if err := record(pidFile, left.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if err := CleanUp(ctx, dir); err != nil {
		t.Fatal(err)
	}
	if alive(left.Process.Pid) {
		t.Error("what was recorded runs on")
	}
	// The same pid, handed to another process since, is let be.
	if err := os.WriteFile(pidFile, []byte(`{"pid":`+strconv.Itoa(other.Process.Pid)+`,"start":"1","boot":""}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := CleanUp(ctx, dir); err != nil {
		t.Fatal(err)
	}
	if !alive(other.Process.Pid) {
		t.Error("another process of a recorded pid was ended")
	}
}

func TestADeepDirectory(t *testing.T) {
	dir := filepath.Join(tempDir(t), strings.Repeat("deep/", 25))
	s := up(t, options(t, dir, 1, WANNone))
	c, err := Connect(dir)
	if err != nil {
		t.Fatal(err)
	}
	if r := statusOf(t, c, "r1"); !r.Healthy {
		t.Errorf("status: %+v", r)
	}
	if err := c.Down(testContext(t)); err != nil {
		t.Fatal(err)
	}
	<-s.Done()
}

func TestADirectoryThatPostgresCannotEnter(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root runs the servers as another user")
	}
	dir := filepath.Join(tempDir(t), "closed")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := up(t, options(t, dir, 1, WANNone))
	root := s.description.PostgresRoot
	t.Cleanup(func() { os.RemoveAll(root) })
	if !strings.HasPrefix(root, "/var/tmp/quorate-") {
		t.Errorf("the servers lie under %s", root)
	}
	if err := exec1(t, s.description.Regions[0].DSN(), "SELECT 1"); err != nil {
		t.Error(err)
	}
	if err := s.Down(); err != nil { // before the directory goes
		t.Fatal(err)
	}
}
