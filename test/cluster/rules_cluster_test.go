package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"quorate/deploy/sandbox"
	"quorate/sidecar/admin/adminpb"
)

// in returns the cluster with its failures told to t, for subtests that share it.
func (c *Cluster) in(t testing.TB) *Cluster {
	d := *c
	d.t = t
	return &d
}

// scenario runs one scenario on a shared cluster. One that fails may leave the
// cluster in a state that says nothing about the next: those are skipped.
func (c *Cluster) scenario(t *testing.T, name string, run func(t *testing.T, c *Cluster)) {
	t.Helper()
	if t.Failed() {
		t.Run(name, func(t *testing.T) { t.Skip("an earlier scenario failed on this cluster") })
		return
	}
	t.Run(name, func(t *testing.T) {
		begun := time.Now()
		run(t, c.in(t))
		t.Logf("took %v", time.Since(begun).Round(time.Millisecond))
	})
}

// query returns the only value of the only row.
func query[T any](c *Cluster, region, sql string, args ...any) T {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	value, err := queryIn[T](ctx, c.DSN(region), sql, args...)
	if err != nil {
		c.t.Fatalf("on %s: %s: %v", region, sql, err)
	}
	return value
}

func queryIn[T any](ctx context.Context, dsn, sql string, args ...any) (value T, err error) {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return value, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	err = conn.QueryRow(ctx, sql, args...).Scan(&value)
	return value, err
}

// maintenanceDSN leads to a region's server, beside the replicated database.
func (c *Cluster) maintenanceDSN(region string) string {
	return strings.TrimSuffix(c.DSN(region), "/app") + "/postgres?synchronous_commit=local"
}

// must runs statements in a session the scenario goes on with.
func must(t testing.TB, conn *pgx.Conn, statements ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, s := range statements {
		if _, err := conn.Exec(ctx, s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

// committed reports whether a COMMIT of the session succeeds; of an aborted
// transaction it does without error, and says ROLLBACK.
func committed(conn *pgx.Conn) (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	tag, err := conn.Exec(ctx, "COMMIT")
	return err == nil && tag.String() == "COMMIT", err
}

// paxosctl runs the command on this sandbox.
func (c *Cluster) paxosctl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(Binaries(c.t), "paxosctl"), append(args, "--dir", c.Dir)...)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// handOver has leadership transferred to a region, trying again while that
// region is not ready for it, and returns what paxosctl said.
func (c *Cluster) handOver(to string) string {
	c.t.Helper()
	var said string
	c.Eventually(time.Minute, "leadership for "+to, func(ctx context.Context) error {
		out, err := c.paxosctl("leader", "transfer", "--to", to)
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		said = out
		if leader := c.Leader(); leader != to {
			return fmt.Errorf("%s leads", leader)
		}
		return nil
	})
	return said
}

// admin calls a region's sidecar as paxosctl does.
func (c *Cluster) admin(region string, call func(ctx context.Context, client adminpb.AdminClient) error) {
	c.t.Helper()
	r, err := c.desc.Region(region)
	if err != nil {
		c.t.Fatal(err)
	}
	conn, err := grpc.NewClient(r.Address("admin"), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		c.t.Fatal(err)
	}
	defer conn.Close()
	c.Do("ask the sidecar of "+region, func(ctx context.Context) error { return call(ctx, adminpb.NewAdminClient(conn)) })
}

// slots reads a region's log from a slot on.
func (c *Cluster) slots(region string, from uint64) []*adminpb.LogEntry {
	c.t.Helper()
	var entries []*adminpb.LogEntry
	c.admin(region, func(ctx context.Context, client adminpb.AdminClient) error {
		stream, err := client.LogRead(ctx, &adminpb.LogReadRequest{From: from})
		if err != nil {
			return err
		}
		for {
			e, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			entries = append(entries, e)
		}
	})
	return entries
}

// replica tells how a region's sidecar is, as it says itself.
func (c *Cluster) replica(region string) *adminpb.RegionStatus {
	c.t.Helper()
	var own *adminpb.RegionStatus
	c.admin(region, func(ctx context.Context, client adminpb.AdminClient) error {
		st, err := client.Status(ctx, &adminpb.StatusRequest{})
		if err != nil {
			return err
		}
		for _, r := range st.Regions {
			if r.Name == region {
				own = r
				return nil
			}
		}
		return errors.New("it does not tell of itself")
	})
	return own
}

// logged counts the lines of a sidecar's log that hold a text.
func (c *Cluster) logged(region, text string) int {
	c.t.Helper()
	b, err := os.ReadFile(filepath.Join(c.Region(region).LogDir, "quorate.log"))
	if err != nil {
		c.t.Fatal(err)
	}
	return strings.Count(string(b), text)
}

// loseSlot takes a region's replication slot away while its sidecar is down.
// What its server commits meanwhile was never captured, so it has to be seeded.
func (c *Cluster) loseSlot(region string) {
	c.t.Helper()
	c.KillNow(region, sandbox.Sidecar)
	c.Eventually(20*time.Second, "the slot of "+region+" dropped", func(ctx context.Context) error {
		n, err := queryIn[int](ctx, c.maintenanceDSN(region),
			"SELECT count(pg_drop_replication_slot(slot_name)) FROM pg_replication_slots WHERE database = 'app'")
		if err == nil && n != 1 {
			c.t.Fatalf("%s had %d replication slots", region, n)
		}
		return err
	})
}

// sqlState returns an error's SQLSTATE, or what else it is.
func sqlState(err error) string {
	if err == nil {
		return "success"
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return err.Error()
}
