package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox"
)

// The bounds of a fail-over, in seconds.
const (
	failoverMedianMax = 4
	failoverWorstMax  = 8
)

// failover measures for how long nobody can write: when the leader is killed,
// and when it hands over. Writers in all regions are the clock.
func (b *bench) failover(ctx context.Context, c *quorateCluster) error {
	if err := exec1(ctx, c.dsn(), "CREATE TABLE bench_beat (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at timestamptz NOT NULL)"); err != nil {
		return err
	}
	if err := c.settle(ctx); err != nil {
		return err
	}
	var killed []float64
	for range b.kills {
		took, err := b.kill(ctx, c)
		if err != nil {
			return err
		}
		killed = append(killed, took.Seconds())
	}
	worst := 0.0
	for _, k := range killed {
		worst = max(worst, k)
	}
	told := fmt.Sprintf("the bound; %d times kill -9 of PostgreSQL and sidecar", b.kills)
	b.report.add(figure{name: "failover_median", quorate: median(killed), peer: failoverMedianMax, target: "<=1", unit: "s", peerIs: told})
	b.report.add(figure{name: "failover_worst", quorate: worst, peer: failoverWorstMax, target: "<=1", unit: "s", peerIs: told})
	var pauses []float64
	for i := range b.transfers {
		took, err := b.handOver(ctx, c, c.names[1+i%(len(c.names)-1)])
		if err != nil {
			return err
		}
		pauses = append(pauses, took.Seconds())
	}
	b.report.add(figure{name: "transfer_pause_median", quorate: median(pauses), peer: failoverMedianMax, unit: "s", peerIs: fmt.Sprintf("the bound of a kill; %d hand-overs", b.transfers)})
	return nil
}

// kill kills the leader and returns the time until a commit is acknowledged
// elsewhere. When it returns the region is back.
func (b *bench) kill(ctx context.Context, c *quorateCluster) (time.Duration, error) {
	if err := c.leadFirst(ctx); err != nil {
		return 0, err
	}
	beats := startBeats(ctx, c)
	defer beats.stop()
	if _, err := beats.next(ctx, time.Now(), func(region string) bool { return region == first }); err != nil {
		return 0, err
	}
	at := time.Now()
	if err := c.Kill(ctx, first, sandbox.Both); err != nil {
		return 0, err
	}
	ack, err := beats.next(ctx, at, func(region string) bool { return region != first })
	if err != nil {
		return 0, err
	}
	beats.stop()
	b.progress("  leader killed: %s took a write after %.2f s", ack.region, ack.at.Sub(at).Seconds())
	if err := c.StartRegion(ctx, first); err != nil {
		return 0, err
	}
	return ack.at.Sub(at), c.settle(ctx)
}

// handOver hands leadership over and returns the time between the last commit
// acknowledged before and the first after.
func (b *bench) handOver(ctx context.Context, c *quorateCluster, to string) (time.Duration, error) {
	if err := c.leadFirst(ctx); err != nil {
		return 0, err
	}
	beats := startBeats(ctx, c)
	defer beats.stop()
	if _, err := beats.next(ctx, time.Now(), func(region string) bool { return region == first }); err != nil {
		return 0, err
	}
	asked := time.Now()
	if err := c.transfer(ctx, to); err != nil {
		return 0, err
	}
	after, err := beats.next(ctx, asked, func(region string) bool { return region == to })
	if err != nil {
		return 0, err
	}
	before, ok := beats.last(first, after.at)
	if !ok {
		return 0, fmt.Errorf("%s acknowledged nothing before the hand-over", first)
	}
	beats.stop()
	b.progress("  handed over to %s: no write for %.2f s", to, after.at.Sub(before).Seconds())
	return after.at.Sub(before), c.settle(ctx)
}

// beats are writers, one a region, that write as often as they may.
type beats struct {
	c      *quorateCluster
	cancel context.CancelFunc
	wait   sync.WaitGroup

	mu    sync.Mutex
	acks  []ack
	moved chan struct{} // closed and replaced at every acknowledgement
}

// ack is an acknowledged commit.
type ack struct {
	region string
	at     time.Time
}

// beatInterval is the pause between two tries; it bounds how exactly the time
// of the first success is known.
const beatInterval = 10 * time.Millisecond

func startBeats(ctx context.Context, c *quorateCluster) *beats {
	ctx, cancel := context.WithCancel(ctx)
	b := &beats{c: c, cancel: cancel, moved: make(chan struct{})}
	for _, region := range c.names {
		b.wait.Go(func() { b.write(ctx, region) })
	}
	return b
}

func (b *beats) write(ctx context.Context, region string) {
	var conn *pgx.Conn
	defer func() {
		if conn != nil {
			closeNow(conn)
		}
	}()
	for ; ctx.Err() == nil; sleep(ctx, beatInterval) {
		if conn == nil || conn.IsClosed() {
			dial, cancel := context.WithTimeout(ctx, time.Second)
			var err error
			conn, err = pgx.Connect(dial, b.c.dsns[region])
			cancel()
			if err != nil {
				conn = nil
				continue
			}
		}
		// A commit that waits for a quorum is not given up: the wait is what is
		// measured. It ends with the writer, or with the server.
		_, err := conn.Exec(ctx, "INSERT INTO bench_beat (at) VALUES (clock_timestamp())")
		if err != nil {
			continue // refused, as in every region that does not lead, or broken
		}
		b.mu.Lock()
		b.acks = append(b.acks, ack{region, time.Now()})
		close(b.moved)
		b.moved = make(chan struct{})
		b.mu.Unlock()
	}
}

// next returns the first acknowledgement after t in a region that is wanted.
func (b *beats) next(ctx context.Context, t time.Time, wanted func(string) bool) (ack, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		b.mu.Lock()
		moved := b.moved
		for _, a := range b.acks {
			if a.at.After(t) && wanted(a.region) {
				b.mu.Unlock()
				return a, nil
			}
		}
		b.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return ack{}, fmt.Errorf("no write is acknowledged: %w", ctx.Err())
		}
	}
}

// last returns when a region last acknowledged a commit before t.
func (b *beats) last(region string, t time.Time) (time.Time, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var at time.Time
	for _, a := range b.acks {
		if a.region == region && a.at.Before(t) {
			at = a.at
		}
	}
	return at, !at.IsZero()
}

// stop ends the writers; it may be called twice.
func (b *beats) stop() {
	b.cancel()
	b.wait.Wait()
}

func closeNow(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	conn.Close(ctx)
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
