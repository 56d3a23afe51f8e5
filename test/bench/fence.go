package main

import (
	"context"
	"fmt"
	"path/filepath"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres"
	"quorate/replication/catalog"
)

// fence measures what the triggers that keep writers out of followers cost on a
// leader: TPC-B in two databases of one server without any replication, with the
// triggers in one of them, in pairs of turns.
func (b *bench) fence(ctx context.Context) error {
	spawn := newChildren()
	defer spawn.close()
	port, err := postgres.FreePort()
	if err != nil {
		return err
	}
	s := &postgres.Server{BinDir: b.pgBin, Dir: filepath.Join(b.dir, "fence"), Port: port, Settings: serverSettings(), Spawn: spawn.start}
	// Vacuum would fall into one turn and not into its pair.
	s.Settings["autovacuum"] = "off"
	if err := s.Init(ctx); err != nil {
		return err
	}
	postmaster, err := s.Start(ctx)
	if err != nil {
		return err
	}
	defer func() {
		stop, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := s.Stop(stop, syscall.SIGQUIT); err != nil {
			b.progress("stop postgres: %v", err)
		}
	}()
	const fenced, plain = "fenced", "plain"
	for _, db := range []string{fenced, plain} {
		if err := exec1(ctx, s.DSN("postgres"), "CREATE DATABASE "+db); err != nil {
			return err
		}
		if err := b.initTPCB(ctx, s.DSN(db), b.fenceScale); err != nil {
			return err
		}
	}
	if err := installFence(ctx, s.DSN(fenced)); err != nil {
		return err
	}
	if err := exec1(ctx, s.DSN(plain), "CHECKPOINT"); err != nil {
		return err
	}
	var with, without, ratios []float64
	used, done := map[string]time.Duration{}, map[string]int{}
	for pair := range b.fencePairs + 1 {
		// Which of the two goes first changes, so that a drift hits both.
		order := []string{fenced, plain}
		if pair%2 == 1 {
			order = []string{plain, fenced}
		}
		rate := map[string]float64{}
		for _, db := range order {
			for _, table := range []string{"pgbench_branches", "pgbench_tellers"} { // small, hot, and bloated by the turn before
				if err := exec1(ctx, s.DSN(db), "VACUUM "+table); err != nil {
					return err
				}
			}
			before := cpuTime(postmaster)
			r, err := b.pgbench(ctx, s.DSN(db), tpcb, 4, b.fenceSeconds)
			if err != nil {
				return fmt.Errorf("%s: %w", db, err)
			}
			rate[db] = r.perSecond
			if pair > 0 { // the first is for the caches
				used[db] += cpuTime(postmaster) - before
				done[db] += len(r.latencies)
			}
		}
		if pair == 0 {
			continue
		}
		b.progress("  TPC-B with the fence %.0f/s, without %.0f/s: %.3f", rate[fenced], rate[plain], rate[fenced]/rate[plain])
		with, without = append(with, rate[fenced]), append(without, rate[plain])
		ratios = append(ratios, rate[fenced]/rate[plain])
	}
	// The ratio of pairs, not that of the medians: a pair met the same machine.
	peer := median(without)
	b.report.add(figure{name: "fence_tpcb", quorate: peer * median(ratios), peer: peer, target: ">=0.97", unit: "tps", peerIs: fmt.Sprintf("the same server, no fence; median of %d pairs", b.fencePairs)})
	// Other work on the machine hardly touches this one.
	micros := func(db string) float64 { return float64(used[db].Microseconds()) / float64(done[db]) }
	b.report.add(figure{name: "fence_tpcb_cpu", quorate: micros(fenced), peer: micros(plain), unit: "us", peerIs: "processor time of a transaction in the server, no fence"})
	b.report.note("TPC-B with the fence: median %.0f/s, without %.0f/s; ratios of pairs %.3f", median(with), peer, ratios)
	return nil
}

// installFence does what a sidecar does to the database of a leader.
func installFence(ctx context.Context, dsn string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer closeNow(conn)
	if err := catalog.Install(ctx, conn, catalog.Options{ClusterID: "bench", Region: first}); err != nil {
		return err
	}
	if err := catalog.OpenFence(ctx, conn, catalog.DefaultShard, 1, 1); err != nil {
		return err
	}
	// The server must not wait for a sidecar that is not there.
	var standbys string
	if err := conn.QueryRow(ctx, "SHOW synchronous_standby_names").Scan(&standbys); err != nil {
		return err
	}
	if standbys != "" {
		return fmt.Errorf("synchronous_standby_names is %q", standbys)
	}
	return nil
}
