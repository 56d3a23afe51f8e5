package main

import (
	"context"
	"errors"
	"path/filepath"
	"time"

	"quorate/deploy/sandbox/relay"
)

const (
	slowLinkBytesPerSecond = 250_000 // 2 Mbit/s
	slowLinkBackWithin     = 5 * time.Second
)

// slowLink compares ours with itself, the link of the leader and one follower
// falling to 2 Mbit/s and coming back under load.
func (b *bench) slowLink(ctx context.Context) (err error) {
	wire := relay.NewWire(0)
	c, err := startCluster(filepath.Join(b.dir, "slowlink"), "quorate", 0, 1, wire)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	const proposers, size = 64, 1024
	var before, slow, rateBefore, rateSlow, back []float64
	for range b.stalledRounds {
		t, err := c.measure(ctx, proposers, size, b.warm, b.length, "")
		if err != nil {
			return err
		}
		before, rateBefore = append(before, micros(t.P99)), append(rateBefore, t.rate())
		wire.SetRate(slowLinkBytesPerSecond)
		if t, err = c.measure(ctx, proposers, size, b.warm, b.length, ""); err != nil {
			return err
		}
		slow, rateSlow = append(slow, micros(t.P99)), append(rateSlow, t.rate())
		wire.SetRate(0)
		began := time.Now()
		if err := c.settle(time.Minute); err != nil {
			return err
		}
		back = append(back, time.Since(began).Seconds())
	}
	b.report.add(figure{name: "consensus_slow_link_p99", quorate: median(slow), peer: median(before), target: "<=1.1", unit: "us", peerIs: "ours before the link fell to 2 Mbit/s, 1 KiB, 64 proposers"})
	b.report.add(figure{name: "consensus_slow_link_rate", quorate: median(rateSlow), peer: median(rateBefore), target: ">=0.95", unit: "per_s", peerIs: "the same"})
	b.report.add(figure{name: "consensus_slow_link_back", quorate: median(back), peer: slowLinkBackWithin.Seconds(), target: "<=1", unit: "s", peerIs: "the time allowed until the follower has all again"})
	return nil
}
