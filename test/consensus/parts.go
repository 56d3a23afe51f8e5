package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

func place(delay time.Duration) string {
	if delay == 0 {
		return "local"
	}
	return fmt.Sprintf("%v round trip", delay)
}

// sizeName is how figures name a payload's size.
func sizeName(size int) string {
	if size%1024 == 0 {
		return fmt.Sprintf("%dk", size/1024)
	}
	return fmt.Sprint(size)
}

// contenders starts clusters that run side by side; stop ends them all.
func (b *bench) contenders(part string, delay time.Duration, names ...string) (clusters []*cluster, stop func() error, err error) {
	stop = func() error {
		var errs []error
		for _, c := range clusters {
			errs = append(errs, c.stop())
		}
		return errors.Join(errs...)
	}
	for _, name := range names {
		c, err := startCluster(filepath.Join(b.dir, part), name, delay/2, 1)
		if err != nil {
			return nil, stop, errors.Join(err, stop())
		}
		clusters = append(clusters, c)
	}
	return clusters, stop, nil
}

// turns has each cluster work in turn, round after round, the order changing
// from round to round, and files what came out under the contenders' names.
func (b *bench) turns(ctx context.Context, clusters []*cluster, delay time.Duration, size, proposers, rounds int, between func() error) (map[string]*cost, error) {
	costs := make(map[string]*cost)
	for _, c := range clusters {
		costs[c.contender] = &cost{contender: c.contender, place: place(delay), size: size, proposers: proposers}
	}
	for round := range rounds {
		for i := range clusters {
			c := clusters[i]
			if round%2 == 1 {
				c = clusters[len(clusters)-1-i]
			}
			t, err := c.measure(ctx, proposers, size, b.warm, b.length, "")
			if err != nil {
				return nil, err
			}
			if err := c.settle(20 * time.Second); err != nil {
				return nil, err
			}
			costs[c.contender].turns = append(costs[c.contender].turns, t)
		}
		if between != nil {
			if err := between(); err != nil {
				return nil, err
			}
		}
	}
	for _, c := range clusters {
		progress("%s, %d bytes, %d proposers: %s %s per s", place(delay), size, proposers, c.contender, number(costs[c.contender].rate()))
		b.report.costs = append(b.report.costs, *costs[c.contender])
	}
	return costs, nil
}

// local compares without delay.
func (b *bench) local(ctx context.Context) (err error) {
	clusters, stop, err := b.contenders("local", 0, "quorate", "etcd")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	ours := clusters[0]
	for _, size := range b.sizes {
		for _, proposers := range b.proposers {
			var flushes, calls, streams []float64
			between := func() error {
				if proposers != 1 {
					return nil
				}
				return b.probe(ours, size, &flushes, &calls, &streams)
			}
			costs, err := b.turns(ctx, clusters, 0, size, proposers, b.rounds, between)
			if err != nil {
				return err
			}
			name := fmt.Sprintf("consensus_%s_%d", sizeName(size), proposers)
			target := ""
			switch {
			case proposers >= 256 && size == 128:
				target = ">=2.5"
			case proposers >= 256:
				target = ">=1.7"
			case proposers == 1:
				target = ">=1"
			}
			b.report.add(figure{name: name, quorate: costs["quorate"].rate(), peer: costs["etcd"].rate(), target: target, unit: "per_s", peerIs: "etcd raft"})
			if proposers == 1 {
				q := micros(costs["quorate"].p50())
				b.report.add(figure{name: name + "_latency", quorate: q, peer: median(calls) + median(flushes), target: "<=1.25", unit: "us", peerIs: "a gRPC call that echoes, and one flush"})
				b.report.add(figure{name: name + "_latency_stream", quorate: q, peer: median(streams) + median(flushes), unit: "us", peerIs: "an echo on an open gRPC stream, and one flush"})
				b.report.note("Of %d bytes, p50: a gRPC call that echoes %.0f us, an echo on an open stream %.0f us, a flush %.0f us.", size, median(calls), median(streams), median(flushes))
			}
		}
	}
	for _, proposers := range b.curve {
		if _, err := b.turns(ctx, clusters[:1], 0, 128, proposers, 2, nil); err != nil {
			return err
		}
	}
	for _, c := range clusters {
		b.verifyFlushes(ctx, c)
	}
	if !b.hashicorp {
		return nil
	}
	third, stopThird, err := b.contenders("local", 0, "hashicorp")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopThird()) }()
	for _, proposers := range []int{1, 256, 1024} {
		costs, err := b.turns(ctx, []*cluster{ours, third[0]}, 0, 128, proposers, 3, nil)
		if err != nil {
			return err
		}
		b.report.add(figure{name: fmt.Sprintf("consensus_128_%d_hashicorp", proposers), quorate: costs["quorate"].rate(), peer: costs["hashicorp"].rate(), unit: "per_s", peerIs: "hashicorp/raft"})
	}
	b.verifyFlushes(ctx, third[0])
	return nil
}

// probe measures what latency is compared with: echoes from the leader to each
// other replica over the same links, and flushes in its directory.
func (b *bench) probe(c *cluster, size int, flushes, calls, streams *[]float64) error {
	if flushes != nil {
		a, err := c.leader.do(command{Do: "flush", Bytes: size, Count: b.probeFlushes})
		if err != nil {
			return err
		}
		*flushes = append(*flushes, micros(a.Times["flush"]))
	}
	count := b.probeEchoes
	if len(c.relays) > 0 {
		count = b.probeEchoesWAN
	}
	for i, address := range c.leader.peers {
		if i+1 == c.leader.id {
			continue
		}
		a, err := c.leader.do(command{Do: "echo", Address: address, Bytes: size, Count: count})
		if err != nil {
			return err
		}
		*calls = append(*calls, micros(a.Times["call"]))
		*streams = append(*streams, micros(a.Times["stream"]))
	}
	return nil
}

// wan compares with a delay between any two replicas.
func (b *bench) wan(ctx context.Context) (err error) {
	if b.delay == 0 {
		return nil
	}
	clusters, stop, err := b.contenders("wan", b.delay, "quorate", "etcd")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	for _, size := range b.sizes {
		for _, proposers := range b.wanProposers {
			var calls, streams []float64
			rounds := 3
			if size != 128 && proposers < 1024 {
				rounds = 2
			}
			costs, err := b.turns(ctx, clusters, b.delay, size, proposers, rounds, func() error {
				return b.probe(clusters[0], size, nil, &calls, &streams)
			})
			if err != nil {
				return err
			}
			name := fmt.Sprintf("consensus_wan_%s_%d", sizeName(size), proposers)
			target := ""
			if proposers == 4096 {
				target = ">=1.5"
			}
			b.report.add(figure{name: name, quorate: costs["quorate"].rate(), peer: costs["etcd"].rate(), target: target, unit: "per_s", peerIs: "etcd raft"})
			if proposers <= 1024 {
				b.report.add(figure{name: name + "_p50", quorate: micros(costs["quorate"].p50()) / 1000, peer: median(streams) / 1000, target: "<=1.1", unit: "ms", peerIs: "round trip through the same relays (echo on an open gRPC stream)"})
			}
		}
	}
	return nil
}

// thousand looks at many groups that do nothing, and at the loss of the leader of
// all of them.
func (b *bench) thousand(ctx context.Context) (err error) {
	if b.groups == 0 {
		return nil
	}
	c, err := startCluster(filepath.Join(b.dir, "groups"), "quorate", 0, b.groups)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	for _, p := range c.running() {
		if _, err := p.do(command{Do: "gather"}); err != nil {
			return err
		}
	}
	pause(ctx, 5*time.Second)
	before := make(map[*process]counters)
	for _, p := range c.running() {
		a, err := p.do(command{Do: "counters"})
		if err != nil {
			return err
		}
		before[p] = *a.Counters
	}
	if b.profile != "" {
		for _, p := range c.running() {
			if _, err := p.do(command{Do: "mark", Profile: fmt.Sprintf("%s-idle%d.cpu", b.profile, p.id)}); err != nil {
				return err
			}
		}
	}
	began := time.Now()
	pause(ctx, b.idle)
	var cpu, rss float64
	for _, p := range c.running() {
		a, err := p.do(command{Do: "counters"})
		if err != nil {
			return err
		}
		d := a.Counters.sub(before[p])
		cpu = max(cpu, 100*d.CPU.Seconds()/time.Since(began).Seconds())
		rss = max(rss, float64(d.RSSBytes)/(1<<20))
	}
	b.report.add(figure{name: fmt.Sprintf("consensus_%d_groups_cpu", b.groups), quorate: cpu, peer: 2, target: "<=1", unit: "percent", peerIs: "the bound, of one core; the busiest process"})
	b.report.add(figure{name: fmt.Sprintf("consensus_%d_groups_memory", b.groups), quorate: rss, peer: 200, target: "<=1", unit: "MiB", peerIs: "the bound; the largest process"})

	if b.profile != "" {
		for _, p := range c.running() {
			if _, err := p.do(command{Do: "finish"}); err != nil {
				return err
			}
		}
	}
	if err := c.awaitLeader(10 * time.Second); err != nil {
		return err
	}
	lead := c.leader
	a, err := lead.do(command{Do: "status"})
	if err != nil {
		return err
	}
	killed := time.Now()
	lead.kill()
	c.nodes[lead.id-1] = nil
	if err := c.awaitLeader(time.Minute); err != nil {
		return err
	}
	b.report.add(figure{name: fmt.Sprintf("consensus_%d_groups_failover", b.groups), quorate: time.Since(killed).Seconds(), peer: 5, target: "<=1", unit: "s", peerIs: "the bound; until every group has a leader with a lease"})
	b.report.note("The process killed led %d of %d groups.", a.Leads, b.groups)
	return nil
}

// stalledMemoryMiB bounds what a stalled follower may cost its leader: a peer's
// queue of 64 MiB, twice, for what the garbage collector has yet to see.
const stalledMemoryMiB = 128

// stalledFollower compares ours with itself, one follower stopped.
func (b *bench) stalledFollower(ctx context.Context) (err error) {
	c, err := startCluster(filepath.Join(b.dir, "stalled"), "quorate", 0, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	const proposers, size = 1024, 128
	var whole, without []float64
	var memory, memoryWithout float64
	for round := range b.stalledRounds {
		t, err := c.measure(ctx, proposers, size, b.warm, b.length, "")
		if err != nil {
			return err
		}
		whole = append(whole, t.rate())
		memory = max(memory, float64(t.leader.RSSBytes)/(1<<20))
		if err := c.stall(); err != nil {
			return err
		}
		length := b.length
		if round == b.stalledRounds-1 {
			length = b.stalledLong
		}
		if t, err = c.measure(ctx, proposers, size, b.warm, length, ""); err != nil {
			return err
		}
		without = append(without, t.rate())
		memoryWithout = max(memoryWithout, float64(t.leader.RSSBytes)/(1<<20))
		if err := c.resume(); err != nil {
			return err
		}
		if err := c.settle(time.Minute); err != nil {
			return err
		}
	}
	b.report.add(figure{name: "consensus_stalled", quorate: median(without), peer: median(whole), target: ">=0.95", unit: "per_s", peerIs: "ours with all five, 128 B, 1024 proposers"})
	b.report.add(figure{name: "consensus_stalled_memory", quorate: max(0, memoryWithout-memory), peer: stalledMemoryMiB, target: "<=1", unit: "MiB", peerIs: "the bound of the leader's growth"})
	b.report.note("The leader's memory was at most %.0f MiB with all followers and %.0f MiB with one stalled, the last time for %v.", memory, memoryWithout, b.stalledLong)
	return nil
}
