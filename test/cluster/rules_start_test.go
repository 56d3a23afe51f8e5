package cluster

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox"
	"quorate/deploy/sandbox/postgres"
)

// Test_existing_database: a cluster is made of a region with a database in use
// and others that are empty, which are seeded from it. With two such regions it
// is refused, and said why.
func Test_existing_database(t *testing.T) {
	t.Run("one region has it", func(t *testing.T) {
		c := startOver(t, "r2")
		c.AwaitEqual()
		for _, region := range c.Names {
			if n := query[int](c, region, "SELECT count(*)::int FROM used"); n != 20_000 {
				t.Errorf("%s holds %d of 20000 rows", region, n)
			}
			if next := query[string](c, region, "SELECT column_default FROM information_schema.columns WHERE table_name = 'used' AND column_name = 'id'"); !strings.Contains(next, "nextval") {
				t.Errorf("%s: the default of used.id is %s", region, next)
			}
		}
		leader := c.Leader()
		c.Exec(leader, "INSERT INTO used (v) VALUES ('new')", "UPDATE used SET v = 'changed' WHERE id <= 10", "ALTER TABLE used ADD w int")
		for _, region := range c.without(leader) {
			if _, err := c.Connect(region).Exec(context.Background(), "DELETE FROM used"); !Refused(err) {
				t.Errorf("a write to what was there before, in %s: %v; want 25006 with a hint", region, err)
			}
		}
		c.AwaitEqual()
		// It goes on where the sequence stood, wherever the leader is.
		c.handOver(c.other(leader))
		if id := query[int](c, c.Leader(), "INSERT INTO used (v) VALUES ('newer') RETURNING id"); id <= 20_001 {
			t.Errorf("the next id after 20001 is %d", id)
		}
		c.AwaitEqual()
	})
	t.Run("two regions have it", func(t *testing.T) {
		dir, s := prepare(t, "r1", "r3")
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		// The sidecar that makes the cluster ends, which may be before or after
		// the start is over.
		if err := s.Start(ctx); err != nil {
			t.Logf("start: %v", firstLine(err.Error()))
		}
		const want = "the databases of regions r1 and r3 both hold tables"
		Eventually(t, 30*time.Second, "a refusal", func(ctx context.Context) error {
			b, err := os.ReadFile(filepath.Join(dir, "r1", "log", "quorate.log"))
			if err == nil && !strings.Contains(string(b), want) {
				err = os.ErrNotExist
			}
			return err
		})
		for _, r := range s.Status(ctx).Regions {
			if r.Writable || r.State == "following" || r.State == "leading" {
				t.Errorf("%s is %s", r.Region, r.State)
			}
		}
		// Nothing was touched.
		d, err := sandbox.Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range d.Regions {
			for table, want := range map[string]bool{"public.used": r.Name != "r2", "quorate.identity": false} {
				if have, err := queryIn[bool](ctx, r.DSN(), "SELECT to_regclass($1) IS NOT NULL", table); err != nil || have != want {
					t.Errorf("%s has table %s: %v, %v", r.Name, table, have, err)
				}
			}
		}
	})
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// startOver runs a cluster of three regions in which some have a database in
// use before their sidecar first starts.
func startOver(t *testing.T, inUse ...string) *Cluster {
	t.Helper()
	dir, s := prepare(t, inUse...)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	err := s.Start(ctx)
	if err == nil {
		err = s.AwaitReady(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	c := &Cluster{t: t, Dir: dir, Supervisor: s}
	if c.desc, err = sandbox.Load(dir); err != nil {
		t.Fatal(err)
	}
	for _, r := range c.desc.Regions {
		c.Names = append(c.Names, r.Name)
	}
	return c
}

// prepare makes a sandbox that does not run yet, and databases in use in it.
func prepare(t *testing.T, inUse ...string) (dir string, s *sandbox.Supervisor) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "quorate-cluster-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // user postgres has to enter it
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	regions, wan := 3, "none"
	s, err = sandbox.New(ctx, sandbox.Options{Dir: dir, Regions: &regions, WAN: &wan, QuorateBin: filepath.Join(Binaries(t), "quorate")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Down(); err != nil {
			t.Errorf("down: %v", err)
		}
		if t.Failed() {
			t.Logf("logs are kept in %s", dir)
			return
		}
		os.RemoveAll(dir)
	})
	d, err := sandbox.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	bin, err := postgres.BinDir()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range inUse {
		r, err := d.Region(name)
		if err != nil {
			t.Fatal(err)
		}
		// Where the sandbox will look for it.
		server := &postgres.Server{BinDir: bin, Dir: filepath.Join(d.PostgresRoot, name, "postgres"), Port: r.Ports["postgres"], Settings: map[string]string{"unix_socket_directories": ""}}
		if err := server.Init(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := server.Start(ctx); err != nil {
			t.Fatal(err)
		}
		fill(t, ctx, server.DSN("postgres"), "CREATE DATABASE app")
		fill(t, ctx, r.DSN(), "CREATE TABLE used (id serial PRIMARY KEY, v text)", "CREATE INDEX ON used (v)",
			"INSERT INTO used (v) SELECT 'row ' || n FROM generate_series(1, 20000) n", "CREATE VIEW few AS SELECT * FROM used WHERE id < 10")
		if err := server.Stop(ctx, syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
	}
	return dir, s
}

func fill(t *testing.T, ctx context.Context, dsn string, statements ...string) {
	t.Helper()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	must(t, conn, statements...)
}
