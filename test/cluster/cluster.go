// Package cluster holds what tests of a whole cluster share: five regions of
// real PostgreSQL servers and sidecars as processes of their own, workloads that
// remember what was acknowledged, and comparisons of what the regions hold.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"quorate/deploy/jaeger"
	"quorate/deploy/sandbox"
)

// Options of a cluster. Zero values are five regions without delay.
type Options struct {
	Regions  int
	WAN      string
	Feed     bool
	Jaeger   bool
	OTLP     string
	Postgres map[string]string // settings of every server

	Witnesses, Learners []string
	Phase1, Phase2      int               // 0: majorities
	Durability          *int              // durability_regions
	Settings            map[string]string // of every sidecar, by dotted key; see sandbox.Options
}

// Cluster is a running sandbox.
type Cluster struct {
	*sandbox.Supervisor
	t     testing.TB
	Dir   string
	Names []string
	desc  *sandbox.Description
}

var (
	buildOnce sync.Once
	buildDir  string
	buildErr  error
)

// Binaries builds the commands once in a test run and returns their directory.
func Binaries(t testing.TB) string {
	t.Helper()
	buildOnce.Do(func() {
		_, file, _, _ := runtime.Caller(0)
		root := filepath.Dir(filepath.Dir(filepath.Dir(file)))
		// Beside the sources, so that nothing is left in a temporary directory.
		buildDir = filepath.Join(root, "bin")
		cmd := exec.Command("go", "build", "-o", buildDir+"/", "./cmd/...")
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil {
			buildErr = fmt.Errorf("build the commands: %w\n%s", err, out)
		}
	})
	if buildErr != nil {
		t.Fatal(buildErr)
	}
	return buildDir
}

// Start runs a cluster until the test ends. If the test failed, the regions'
// logs are kept and their place is told.
func Start(t testing.TB, o Options) *Cluster {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "quorate-cluster-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // user postgres has to enter it
		t.Fatal(err)
	}
	c := &Cluster{t: t, Dir: dir}
	c.up(o)
	t.Cleanup(func() {
		if err := c.Down(); err != nil {
			t.Errorf("down: %v", err)
		}
		if t.Failed() {
			t.Logf("logs are kept in %s", dir)
			return
		}
		os.RemoveAll(dir)
	})
	return c
}

func (c *Cluster) up(o Options) {
	c.t.Helper()
	if o.Jaeger {
		// The first time on a machine this takes longer than all the rest.
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
		defer cancel()
		if _, err := jaeger.Binary(ctx); err != nil {
			c.t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if o.Regions == 0 {
		o.Regions = 5
	}
	if o.WAN == "" {
		o.WAN = "none"
	}
	s, err := sandbox.New(ctx, sandbox.Options{
		Dir: c.Dir, Regions: &o.Regions, WAN: &o.WAN, Feed: &o.Feed, OTLP: &o.OTLP, Jaeger: &o.Jaeger,
		QuorateBin: filepath.Join(Binaries(c.t), "quorate"), PostgresSettings: o.Postgres,
		Witnesses: o.Witnesses, Learners: o.Learners, Phase1: &o.Phase1, Phase2: &o.Phase2, DurabilityRegions: o.Durability, Settings: o.Settings,
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.Supervisor = s
	if err = s.Start(ctx); err == nil {
		err = s.AwaitReady(ctx)
	}
	if err != nil {
		s.Down()
		c.t.Fatalf("start the cluster: %v (logs in %s)", err, c.Dir)
	}
	if c.desc, err = sandbox.Load(c.Dir); err != nil {
		c.t.Fatal(err)
	}
	c.Names = nil
	for _, r := range c.desc.Regions {
		c.Names = append(c.Names, r.Name)
	}
}

// Do fails the test if f fails within a minute.
func (c *Cluster) Do(what string, f func(context.Context) error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := f(ctx); err != nil {
		c.t.Fatalf("%s: %v", what, err)
	}
}

// KillNow ends a region's processes (or a part of them) with SIGKILL.
func (c *Cluster) KillNow(region string, part sandbox.Part) {
	c.t.Helper()
	c.Do("kill "+region, func(ctx context.Context) error { return c.Kill(ctx, region, part) })
}

// StartAgain starts what does not run in a region.
func (c *Cluster) StartAgain(region string) {
	c.t.Helper()
	c.Do("start "+region, func(ctx context.Context) error { return c.StartRegion(ctx, region) })
}

// Region returns how a region is now.
func (c *Cluster) Region(name string) sandbox.RegionStatus {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, r := range c.Status(ctx).Regions {
		if r.Region == name {
			return r
		}
	}
	c.t.Fatalf("no region %s", name)
	return sandbox.RegionStatus{}
}

// DSN returns the superuser's URL to a region's database.
func (c *Cluster) DSN(region string) string {
	c.t.Helper()
	r, err := c.desc.Region(region)
	if err != nil {
		c.t.Fatal(err)
	}
	return r.DSN()
}

// Connect opens a session that ends with the test at the latest.
func (c *Cluster) Connect(region string) *pgx.Conn {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, c.DSN(region))
	if err != nil {
		c.t.Fatalf("connect to %s: %v", region, err)
	}
	c.t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// Exec runs statements on a region, each in its own transaction.
func (c *Cluster) Exec(region string, statements ...string) {
	c.t.Helper()
	conn := c.Connect(region)
	defer conn.Close(context.Background())
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, s := range statements {
		if _, err := conn.Exec(ctx, s); err != nil {
			c.t.Fatalf("on %s: %s: %v", region, s, err)
		}
	}
}

// Leader returns the region that takes writes, once there is one among those
// given (all, if none are).
func (c *Cluster) Leader(among ...string) string {
	c.t.Helper()
	if len(among) == 0 {
		among = c.Names
	}
	var leader string
	c.Eventually(30*time.Second, "a leader among "+fmt.Sprint(among), func(ctx context.Context) error {
		for _, r := range c.Status(ctx).Regions {
			if r.Writable && slices.Contains(among, r.Region) {
				leader = r.Region
				return nil
			}
		}
		return errors.New("none takes writes")
	})
	return leader
}

// Eventually fails the test unless f succeeds within the time given.
func (c *Cluster) Eventually(within time.Duration, what string, f func(context.Context) error) {
	c.t.Helper()
	Eventually(c.t, within, what, f)
}

// Eventually fails the test unless f succeeds within the time given.
func Eventually(t testing.TB, within time.Duration, what string, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	for {
		err := f(ctx)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %v: %v", what, within, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Content returns a hash of every user table's rows in order, by table, and the
// number of rows.
func Content(ctx context.Context, conn *pgx.Conn) (map[string]string, error) {
	rows, err := conn.Query(ctx, `SELECT quote_ident(n.nspname)||'.'||quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname NOT LIKE 'pg\_%' AND n.nspname NOT IN ('information_schema', 'quorate', 'quorate_fence') ORDER BY 1`)
	if err != nil {
		return nil, err
	}
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}
	content := make(map[string]string, len(tables))
	for _, table := range tables {
		var n int64
		var hash string
		// The hash of row hashes in their order does not depend on where rows lie.
		err := conn.QueryRow(ctx, `SELECT count(*), coalesce(md5(string_agg(h, '' ORDER BY h)), '') FROM (SELECT md5(t::text) AS h FROM `+table+` t) s`).Scan(&n, &hash)
		if err != nil {
			return nil, fmt.Errorf("hash %s: %w", table, err)
		}
		content[table] = fmt.Sprintf("%d rows %s", n, hash)
	}
	return content, nil
}

// AwaitEqual waits until the regions (all, if none are given) have applied all
// that is chosen, and fails the test unless they then hold the same rows.
func (c *Cluster) AwaitEqual(regions ...string) {
	c.t.Helper()
	if len(regions) == 0 {
		regions = c.Names
	}
	var problem string
	c.Eventually(2*time.Minute, "equal content", func(ctx context.Context) error {
		var highest uint64
		status := c.Status(ctx).Regions
		for _, r := range status {
			if slices.Contains(regions, r.Region) {
				highest = max(highest, r.Chosen)
			}
		}
		for _, r := range status {
			if slices.Contains(regions, r.Region) && (r.Applied < highest || r.State != "following" && r.State != "leading") {
				return fmt.Errorf("%s is %s at slot %d of %d: %s", r.Region, r.State, r.Applied, highest, r.Health)
			}
		}
		var first map[string]string
		problem = ""
		for _, region := range regions {
			conn, err := pgx.Connect(ctx, c.DSN(region))
			if err != nil {
				return err
			}
			content, err := Content(ctx, conn)
			conn.Close(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", region, err)
			}
			if first == nil {
				first = content
				continue
			}
			for table, want := range first {
				if content[table] != want {
					problem += fmt.Sprintf("%s: %s has %s, %s has %s\n", table, regions[0], want, region, content[table])
				}
			}
			if len(content) != len(first) {
				problem += fmt.Sprintf("%s has %d tables, %s has %d\n", regions[0], len(first), region, len(content))
			}
		}
		// Applied is announced in each region by itself; a difference counts only
		// if it stays. Writers of the test have stopped.
		if problem != "" {
			return errors.New(problem)
		}
		return nil
	})
}

// Refused reports whether err is the fence's: 25006 with a hint.
func Refused(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "25006" && pg.Hint != ""
}

// Psql runs psql on a region and returns what it printed.
func (c *Cluster) Psql(region string, args ...string) (string, error) {
	out, err := exec.Command("psql", append([]string{"-X", "-v", "ON_ERROR_STOP=1", "-d", c.DSN(region)}, args...)...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}
