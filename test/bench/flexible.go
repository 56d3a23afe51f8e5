package main

import (
	"context"
	"path/filepath"
	"time"

	"quorate/deploy/sandbox"
)

// flexible measures the commits of one client where two of five regions suffice
// for one (and four are needed to elect a leader), beside the round trip to the
// nearest region, which bounds them.
func (b *bench) flexible(ctx context.Context) error {
	nearest := sandbox.RoundTrip(sandbox.WANGlobal, 0, 1)
	for i := 2; i < replicas; i++ {
		nearest = min(nearest, sandbox.RoundTrip(sandbox.WANGlobal, 0, i))
	}
	trips, err := probeRoundTrip(ctx, nearest, b.probeRoundTrips)
	if err != nil {
		return err
	}
	regions, wan, phase1, phase2, losses := replicas, sandbox.WANGlobal, 4, 2, 1
	b.progress("flexible: starting quorate")
	c, err := b.startQuorateAs(ctx, sandbox.Options{Dir: filepath.Join(b.dir, "flexible"), Regions: &regions, WAN: &wan,
		Phase1: &phase1, Phase2: &phase2, DurabilityRegions: &losses})
	if err != nil {
		return err
	}
	defer c.stop()
	if err := exec1(ctx, c.dsn(), insertTable); err != nil {
		return err
	}
	if _, err := b.turns(ctx, []contender{c}, insert, 1, 1, 1); err != nil { // caches, plans
		return err
	}
	runs, err := b.turns(ctx, []contender{c}, insert, 1, b.latencySeconds, b.latencyRounds)
	if err != nil {
		return err
	}
	const bound = "measured round trip to the nearest region; phase 1 = 4, phase 2 = 2 of 5, durability_regions 1"
	all := latencies(runs[0])
	for _, p := range []struct {
		name string
		at   float64
	}{{"commit_wan_flexible", 0.5}, {"commit_wan_flexible_p99", 0.99}} {
		b.report.add(figure{name: p.name, quorate: millis(percentile(all, p.at)), peer: millis(percentile(trips, p.at)), unit: "ms", peerIs: bound})
	}
	b.report.note("flexible: the relays' round trip to the nearest region: p50 %.2f ms; a majority would be at %v", millis(percentile(trips, 0.5)),
		sandbox.RoundTrip(wan, 0, 2).Round(time.Millisecond))
	return nil
}
