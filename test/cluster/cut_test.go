package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"testing"
	"time"
)

// logState is what paxosctl status tells of a region's log.
type logState struct {
	Name     string `json:"name"`
	Base     uint64 `json:"base"`
	Chosen   uint64 `json:"chosen"`
	Durable  uint64 `json:"durable"`
	LogBytes uint64 `json:"log_bytes"`
	Incarn   string `json:"incarnation"`
	Replica  uint32 `json:"replica_id"`
}

func (c *Cluster) logs() map[string]logState {
	c.t.Helper()
	var v struct {
		Regions []logState `json:"regions"`
	}
	if err := json.Unmarshal([]byte(c.ctl("status", "-o", "json")), &v); err != nil {
		c.t.Fatal(err)
	}
	all := map[string]logState{}
	for _, r := range v.Regions {
		all[r.Name] = r
	}
	return all
}

// logDirBytes is what a region's log takes on disk.
func (c *Cluster) logDirBytes(region string) (n int64) {
	c.t.Helper()
	err := filepath.WalkDir(filepath.Join(c.Region(region).DataDirs["sidecar"], "log"), func(_ string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // deleted meanwhile
		}
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			n += info.Size()
		}
		return nil
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return n
}

// TestLogIsCut: with small bounds the log stays small under load; a region that
// was down is cut off and comes back by itself, and everything that begins from
// a log goes on from one that was cut.
func TestLogIsCut(t *testing.T) {
	const mib = 1 << 20
	begun := time.Now()
	step := func(what string) { t.Logf("%v: %s", time.Since(begun).Round(time.Second), what) }
	c := Start(t, Options{Regions: 4, Witnesses: []string{"r4"}, Settings: map[string]string{
		"log.segment_bytes": "1MiB", "log.keep_bytes": "2MiB", "log.max_bytes": "5MiB",
	}})
	databases := c.without("r4")
	rows := 0
	leader := c.Leader()
	c.Exec(leader, "CREATE TABLE t (id serial PRIMARY KEY, v text)")
	// write commits n times 100 rows, a good half of a MiB of log each two times.
	write := func(leader string, n int) {
		t.Helper()
		conn := c.Connect(leader)
		defer conn.Close(context.Background())
		for range n {
			must(t, conn, "INSERT INTO t (v) SELECT repeat(md5(random()::text), 80) FROM generate_series(1, 100)")
		}
	}
	// A checkpoint moves the position from which the server would hand commits over
	// again, which it does by itself only every 15 s.
	hurry := func() { c.Exec(c.Leader(), "CHECKPOINT") }
	cutBeyond := func(what string, slot uint64, regions ...string) {
		t.Helper()
		c.Eventually(30*time.Second, what, func(context.Context) error {
			hurry()
			time.Sleep(250 * time.Millisecond)
			logs := c.logs()
			for _, r := range regions {
				if l := logs[r]; l.Base <= slot {
					return fmt.Errorf("%s begins after slot %d, has chosen %d, and on disk %d, %d bytes", r, l.Base, l.Chosen, l.Durable, l.LogBytes)
				}
			}
			return nil
		})
	}

	// Under load: nobody is behind, and everywhere the log is cut. What the leader
	// wrote in the last 20 s or so stays, since its server could hand it over again.
	largest := int64(0)
	for range 8 {
		write(leader, 10)
		for _, r := range c.Names {
			largest = max(largest, c.logDirBytes(r))
		}
	}
	c.Eventually(40*time.Second, "logs within their bound", func(context.Context) error {
		c.Exec(leader, "INSERT INTO t (v) SELECT repeat(md5(random()::text), 80) FROM generate_series(1, 10)")
		rows += 10
		hurry()
		time.Sleep(250 * time.Millisecond)
		for _, r := range c.Names {
			if n := c.logDirBytes(r); n > 10*mib {
				return fmt.Errorf("that of %s takes %d MiB: %+v", r, n/mib, c.logs()[r])
			}
		}
		return nil
	})
	rows += 8 * 10 * 100
	t.Logf("the largest log took %.1f MiB while %d MiB were written", float64(largest)/mib, rows*2560/mib)

	step("written")

	// A region is down while the others cut their logs past it.
	down := c.other(leader, "r4")
	before := c.logs()[down]
	c.KillNow(down, "")
	write(leader, 20)
	// One transaction larger than a fragment, and than the bound, on the way.
	c.Exec(leader, "INSERT INTO t (v) SELECT repeat(md5(random()::text), 80) FROM generate_series(1, 2000)")
	write(leader, 20)
	cutBeyond("the log cut past "+down, before.Chosen, c.without(down)...)
	c.StartAgain(down)
	c.AwaitEqual(databases...)
	if after := c.logs()[down]; after.Incarn == before.Incarn {
		t.Errorf("%s caught up without being seeded anew: %+v, before %+v", down, after, before)
	}

	step("seeded anew")

	// Everything is started again from a log that was cut.
	kept := c.logs()
	for _, r := range c.Names {
		c.KillNow(r, "")
	}
	for _, r := range c.Names {
		c.StartAgain(r)
	}
	leader = c.Leader()
	c.AwaitEqual(databases...)
	for _, r := range databases {
		if now := c.logs()[r]; now.Incarn != kept[r].Incarn {
			t.Errorf("%s was seeded anew by a restart", r)
		}
	}
	write(leader, 20)

	step("all restarted")

	// The leader is lost, and comes back.
	c.KillNow(leader, "")
	second := c.Leader(c.without(leader)...)
	write(second, 20)
	c.StartAgain(leader)
	c.AwaitEqual(databases...)

	step("led by another")

	// A region without its disk joins, from an image and a log that is cut.
	c.Do("wipe "+down, func(ctx context.Context) error { return c.Wipe(ctx, down) })
	c.StartAgain(down)
	write(c.Leader(), 20)
	c.AwaitEqual(databases...)
	if n := query[int](c, down, "SELECT count(*)::int FROM t"); n != rows+20*100+2000+20*100+60*100 {
		t.Errorf("%s holds %d rows", down, n)
	}
}
