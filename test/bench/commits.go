package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"quorate/deploy/sandbox"
)

// contender takes the writes of a turn.
type contender interface {
	name() string
	dsn() string
	settle(context.Context) error // all replicas have applied everything
	cpu(context.Context) cpu
}

// replicas is how many regions, and servers of the peer, there are.
const replicas = 5

// commits measures what a commit costs with one of the delays: both contenders
// run side by side and work in turns.
func (b *bench) commits(ctx context.Context, wan string) error {
	place := map[string]string{sandbox.WANNone: "local", sandbox.WANGlobal: "wan"}[wan]
	dir := filepath.Join(b.dir, place)
	limit, err := b.physicalLimit(ctx, wan)
	if err != nil {
		return err
	}
	b.progress("%s: starting the peer", place)
	peer, err := startQuorumCommit(ctx, filepath.Join(dir, "peer"), b.pgBin, wan, replicas)
	if err != nil {
		return fmt.Errorf("start the peer: %w", err)
	}
	defer peer.stop()
	b.progress("%s: starting quorate", place)
	ours, err := b.startQuorate(ctx, filepath.Join(dir, "quorate"), wan, replicas)
	if err != nil {
		return fmt.Errorf("start quorate: %w", err)
	}
	defer ours.stop()
	both := []contender{ours, peer}
	for _, c := range both {
		b.progress("%s: tables of %s", place, c.name())
		if err := exec1(ctx, c.dsn(), insertTable); err != nil {
			return err
		}
		if err := b.initTPCB(ctx, c.dsn(), b.scaleTPCB); err != nil {
			return err
		}
		if err := exec1(ctx, c.dsn(), "CHECKPOINT"); err != nil {
			return err
		}
	}
	for _, workload := range []string{insert, tpcb} {
		if _, err := b.turns(ctx, both, workload, 1, 1, 1); err != nil { // caches, plans
			return err
		}
	}
	if err := b.idle(ctx, place, both); err != nil {
		return err
	}
	if wan == sandbox.WANGlobal {
		for _, workload := range []string{insert, tpcb} {
			if err := b.latency(ctx, place, both, workload, limit); err != nil {
				return err
			}
		}
	}
	for _, clients := range b.scalingClients {
		if err := b.throughput(ctx, place, both, insert, clients); err != nil {
			return err
		}
	}
	for _, clients := range b.clientsTPCB {
		if err := b.throughput(ctx, place, both, tpcb, clients); err != nil {
			return err
		}
	}
	if wan != sandbox.WANGlobal {
		return nil
	}
	// What follows is about Quorate alone.
	peer.stop()
	return b.failover(ctx, ours)
}

// turns lets the contenders work in turns and returns each one's runs.
func (b *bench) turns(ctx context.Context, both []contender, workload string, clients, seconds, rounds int) ([][]pgbenchRun, error) {
	runs := make([][]pgbenchRun, len(both))
	for range rounds {
		for i, c := range both {
			for _, each := range both {
				if err := each.settle(ctx); err != nil {
					return nil, err
				}
			}
			before := c.cpu(ctx)
			r, err := b.pgbench(ctx, c.dsn(), workload, clients, seconds)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.name(), err)
			}
			// The work is not over before the replicas have it.
			if err := c.settle(ctx); err != nil {
				return nil, err
			}
			r.cpu = c.cpu(ctx).perCommit(before, len(r.latencies))
			b.progress("  %s, %d clients, %s: %.0f/s, p50 %.2f ms, p99 %.2f ms, CPU a commit %s", workload, clients, c.name(), r.perSecond,
				millis(percentile(r.latencies, 0.5)), millis(percentile(r.latencies, 0.99)), r.cpu)
			runs[i] = append(runs[i], r)
		}
	}
	return runs, nil
}

// latencies of several turns together.
func latencies(runs []pgbenchRun) []time.Duration {
	var all []time.Duration
	for _, r := range runs {
		all = append(all, r.latencies...)
	}
	return all
}

func rates(runs []pgbenchRun) []float64 {
	var all []float64
	for _, r := range runs {
		all = append(all, r.perSecond)
	}
	return all
}

const quorumCommitIs = "PostgreSQL, ANY 2 of 4 physical standbys"

// latency measures the commits of one client.
func (b *bench) latency(ctx context.Context, place string, both []contender, workload string, limit time.Duration) error {
	runs, err := b.turns(ctx, both, workload, 1, b.latencySeconds, b.latencyRounds)
	if err != nil {
		return err
	}
	ours, peer := latencies(runs[0]), latencies(runs[1])
	p50, peer50 := millis(percentile(ours, 0.5)), millis(percentile(peer, 0.5))
	p99, peer99 := millis(percentile(ours, 0.99)), millis(percentile(peer, 0.99))
	name := fmt.Sprintf("commit_%s_%s", workload, place)
	b.report.add(figure{name: name + "_p50", quorate: p50, peer: peer50, target: "<=1.05", unit: "ms", peerIs: quorumCommitIs})
	b.report.add(figure{name: name + "_p50_less_1ms", quorate: p50 - 1, peer: peer50, target: "<=1", unit: "ms", peerIs: quorumCommitIs + "; p50 less the 1 ms allowed"})
	b.report.add(figure{name: name + "_p99", quorate: p99, peer: peer99, target: "<=1.1", unit: "ms", peerIs: quorumCommitIs})
	if workload == insert {
		b.report.add(figure{name: name + "_p50_limit", quorate: p50, peer: millis(limit), unit: "ms", peerIs: "flush, measured round trip to the second nearest, flush"})
	}
	return nil
}

// throughput measures what several clients commit.
func (b *bench) throughput(ctx context.Context, place string, both []contender, workload string, clients int) error {
	runs, err := b.turns(ctx, both, workload, clients, b.loadSeconds, b.loadRounds)
	if err != nil {
		return err
	}
	target := ">=0.95"
	if place == "local" {
		target = ">=0.7"
	}
	for i, c := range both {
		all := latencies(runs[i])
		b.report.note("%s, %s, %d clients, %s: p50 %.2f ms, p99 %.2f ms; CPU a commit in the last turn %s", place, workload, clients, c.name(),
			millis(percentile(all, 0.5)), millis(percentile(all, 0.99)), runs[i][len(runs[i])-1].cpu)
	}
	b.report.add(figure{name: fmt.Sprintf("throughput_%s_%s_%d", workload, place, clients), quorate: median(rates(runs[0])), peer: median(rates(runs[1])), target: target, unit: "tps", peerIs: quorumCommitIs})
	return nil
}
