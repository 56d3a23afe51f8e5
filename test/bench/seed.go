package main

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
)

// seed times the loading of a new region beside the initial copy of PostgreSQL's
// own logical replication, by the benchmark of package snapshot, which takes the
// two in turns.
func (b *bench) seed(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkSeed$", "-benchtime", strconv.Itoa(b.seedRounds)+"x", "-timeout", "30m",
		"quorate/snapshot", "-seed.scale", strconv.Itoa(b.seedScale))
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd.Args, err, out)
	}
	value := func(unit string) (float64, error) {
		m := regexp.MustCompile(`([0-9.eE+]+) ` + regexp.QuoteMeta(unit) + `\s`).FindSubmatch(out)
		if m == nil {
			return 0, fmt.Errorf("%v told no %s:\n%s", cmd.Args, unit, out)
		}
		return strconv.ParseFloat(string(m[1]), 64)
	}
	ours, err := value("image-s")
	if err != nil {
		return err
	}
	native, err := value("native-s")
	if err != nil {
		return err
	}
	size, err := value("MB")
	if err != nil {
		return err
	}
	b.progress("  seeding %.0f MB: %.2f s, natively %.2f s", size, ours, native)
	b.report.add(figure{name: fmt.Sprintf("seed_%.0fMB", size), quorate: ours, peer: native, target: "<=1.5", unit: "s", peerIs: "initial copy of native logical replication, keys before"})
	return nil
}
