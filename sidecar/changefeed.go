package sidecar

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"quorate/paxosgroup"
	"quorate/paxosgroup/runner"
	"quorate/replication/entry"
	"quorate/replication/feed"
	"quorate/sidecar/admin"
)

// runFeed runs this region's NATS server, unless an external one is used, and
// the publisher for as long as this region leads. The feed reads the log behind
// everyone else; whatever goes wrong with it delays no commit.
func (s *shard) runFeed(ctx context.Context) error {
	for {
		err := s.feedOnce(ctx)
		if ctx.Err() != nil {
			return nil
		}
		s.log.Warn("the change feed stopped and is started again", "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(2 * time.Second):
		}
	}
}

func (s *shard) feedOnce(ctx context.Context) error {
	servers := 0 // as many run one of their own: a witness has nothing to publish
	for _, r := range s.cfg.Regions {
		if r.HasDatabase() {
			servers++
		}
	}
	cfg := feed.Config{
		Cluster: s.cfg.Cluster, ClusterID: fmt.Sprintf("%016x", s.clusterID), Shard: mainShard, Group: uint32(mainGroup), Source: feedSource{s},
		URL: s.cfg.Feed.ExternalURL, MaxAge: s.cfg.Feed.MaxAge, MaxBytes: int64(s.cfg.Feed.MaxBytes),
		Replicas: feed.ReplicasFor(servers), Logger: s.log,
	}
	if cfg.URL == "" {
		server := feed.ServerConfig{
			ServerName: s.cfg.Cluster + "-" + s.cfg.Region, StoreDir: s.cfg.DataDir + "/nats", ListenAddr: s.cfg.Listen.NATS, Logger: s.log,
		}
		if servers > 1 {
			server.ClusterName, server.ClusterListen = s.cfg.Cluster, s.cfg.Listen.NATSCluster
			for _, r := range s.cfg.Regions {
				if r.Name != s.cfg.Region && r.HasDatabase() && r.NATSRoute != "" {
					server.Routes = append(server.Routes, r.NATSRoute)
				}
			}
		}
		started, err := feed.StartServer(server)
		if err != nil {
			return err
		}
		defer started.Close()
		cfg.Server = started
	}
	publisher, err := feed.New(cfg)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.publisher = publisher
	s.mu.Unlock()
	leads := func() bool { return s.state == admin.StateLeading }
	for {
		if err := s.await(ctx, leads); err != nil {
			return nil
		}
		g, gctx := errgroup.WithContext(ctx)
		deposed := errors.New("no longer leading")
		g.Go(func() error { return publisher.Run(gctx) })
		g.Go(func() error {
			if err := s.await(gctx, func() bool { return !leads() }); err != nil {
				return nil
			}
			return deposed
		})
		if err := g.Wait(); err != nil && !errors.Is(err, deposed) && !errors.Is(err, context.Canceled) {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

// feedSource reads the log for the feed.
type feedSource struct{ s *shard }

// Read implements feed.Source.
func (f feedSource) Read(ctx context.Context, from uint64) (feed.Batch, error) {
	if base := f.s.group.Status().Base; paxosgroup.Slot(from) <= base {
		return feed.Batch{}, &feed.CutError{Base: uint64(base)}
	}
	for {
		chosen, moved := f.s.group.Chosen()
		if paxosgroup.Slot(from) <= chosen {
			break
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return feed.Batch{}, ctx.Err()
		}
	}
	ds, err := f.s.group.Read(paxosgroup.Slot(from), 1<<20)
	if errors.Is(err, runner.ErrCompacted) {
		return feed.Batch{}, &feed.CutError{Base: uint64(f.s.group.Status().Base)}
	}
	if err != nil {
		return feed.Batch{}, err
	}
	b := feed.Batch{Next: from}
	for _, d := range ds {
		b.Next = uint64(d.Slot) + 1
		if d.Verdict != paxosgroup.Effective || d.Entry.Kind != paxosgroup.KindData {
			continue
		}
		p, err := entry.Decode(d.Entry.Payload)
		if err != nil {
			return feed.Batch{}, fmt.Errorf("slot %d: %w", d.Slot, err)
		}
		item := feed.Item{
			Slot: uint64(d.Slot), Region: d.Entry.Region, Incarnation: uint64(d.Entry.Incarnation), Payload: p,
			Trace: f.s.tracer.Context(f.s.traced(d.Entry.Incarnation, d.Slot, d.Entry.Term, p.Header)),
		}
		switch p.Type {
		case entry.TypeTransaction:
		case entry.TypeCommit:
			item.Fragments = func(yield func([]byte) error) error { return fragments(f.s.group, d, p, yield) }
		default:
			continue
		}
		b.Items = append(b.Items, item)
	}
	return b, nil
}
