package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"quorate/deploy/sandbox"
)

// quorateCluster is Quorate's contender: a sandbox with r1 leading.
type quorateCluster struct {
	*sandbox.Supervisor
	dir   string
	bin   string
	names []string
	dsns  map[string]string
}

// first is where leadership is wanted: the delays are counted from there.
const first = "r1"

func (b *bench) startQuorate(ctx context.Context, dir, wan string, regions int) (*quorateCluster, error) {
	return b.startQuorateAs(ctx, sandbox.Options{Dir: dir, Regions: &regions, WAN: &wan})
}

func (b *bench) startQuorateAs(ctx context.Context, o sandbox.Options) (_ *quorateCluster, err error) {
	off, none := false, ""
	o.Feed, o.OTLP, o.Jaeger = &off, &none, &off
	o.QuorateBin, o.PostgresBin, o.PostgresSettings = filepath.Join(b.bin, "quorate"), b.pgBin, serverSettings()
	dir := o.Dir
	if b.verbose {
		o.Progress = func(line string) { b.progress("%s", line) }
	}
	s, err := sandbox.New(ctx, o)
	if err != nil {
		return nil, err
	}
	c := &quorateCluster{Supervisor: s, dir: dir, bin: b.bin, dsns: map[string]string{}}
	defer func() {
		if err != nil {
			c.stop()
		}
	}()
	startCtx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := s.Start(startCtx); err != nil {
		return nil, err
	}
	if err := s.AwaitReady(startCtx); err != nil {
		return nil, err
	}
	for _, r := range s.Status(ctx).Regions {
		c.names = append(c.names, r.Region)
		c.dsns[r.Region] = r.DSN
	}
	return c, c.leadFirst(ctx)
}

func (c *quorateCluster) name() string { return "quorate" }
func (c *quorateCluster) dsn() string  { return c.dsns[first] }

// leader returns the region that takes writes, empty if none does.
func (c *quorateCluster) leader(ctx context.Context) string {
	for _, r := range c.Status(ctx).Regions {
		if r.Writable {
			return r.Region
		}
	}
	return ""
}

// leadFirst returns when r1 leads, which it has itself handed over if need be.
func (c *quorateCluster) leadFirst(ctx context.Context) error {
	return eventually(ctx, time.Minute, first+" to lead", func() error {
		switch at := c.leader(ctx); at {
		case first:
			return nil
		case "":
			return fmt.Errorf("no region takes writes")
		default:
			return c.transfer(ctx, first)
		}
	})
}

// transfer hands leadership over, as an operator does.
func (c *quorateCluster) transfer(ctx context.Context, to string) error {
	out, err := exec.CommandContext(ctx, filepath.Join(c.bin, "paxosctl"), "leader", "transfer", "--to", to, "--dir", c.dir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("paxosctl leader transfer --to %s: %w\n%s", to, err, out)
	}
	return nil
}

// settle returns when every region is up and has applied all there is.
func (c *quorateCluster) settle(ctx context.Context) error {
	return eventually(ctx, 3*time.Minute, "every region to catch up", func() error {
		regions := c.Status(ctx).Regions
		var chosen uint64
		for _, r := range regions {
			chosen = max(chosen, r.Chosen)
		}
		for _, r := range regions {
			if r.Applied < chosen || !slices.Contains([]string{"leading", "following"}, r.State) {
				return fmt.Errorf("%s is %s at slot %d of %d: %s", r.Region, r.State, r.Applied, chosen, r.Health)
			}
		}
		return nil
	})
}

func (c *quorateCluster) stop() {
	if err := c.Down(); err != nil {
		fmt.Fprintln(os.Stderr, "bench: take the sandbox down:", err)
	}
}
