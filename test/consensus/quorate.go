package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"quorate/paxosgroup"
	"quorate/paxosgroup/peer"
	"quorate/paxosgroup/runner"
	"quorate/paxosgroup/slotlog"
)

// quorate is a replica of this project: runner, slot log and peer transport as
// in a sidecar, with the defaults, and no database behind.
type quorate struct {
	log       *slotlog.Log
	transport *peer.Transport
	runner    *runner.Runner
	server    *grpc.Server
	groups    []*runner.Group
	cancel    context.CancelFunc
	running   sync.WaitGroup
}

func startQuorate(cfg nodeConfig, listener net.Listener) (*quorate, error) {
	logger := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	log, restored, err := slotlog.Open(slotlog.Config{Dir: filepath.Join(cfg.Dir, "log"), Logger: logger})
	if err != nil {
		return nil, err
	}
	q := &quorate{log: log}
	self := paxosgroup.ReplicaID(cfg.ID)
	q.transport, err = peer.New(peer.Config{ClusterID: "bench", Self: self, Logger: logger,
		Deliver: func(from paxosgroup.ReplicaID, batch []peer.GroupMessage) { q.runner.Deliver(from, batch) }})
	if err != nil {
		return nil, err
	}
	addresses := make(map[paxosgroup.ReplicaID]string)
	m := paxosgroup.Membership{NextID: paxosgroup.ReplicaID(len(cfg.Peers) + 1)}
	for i, address := range cfg.Peers {
		id := paxosgroup.ReplicaID(i + 1)
		addresses[id] = address
		m.Members = append(m.Members, paxosgroup.Member{ID: id, Region: region(id), Kind: paxosgroup.Voter})
	}
	rc := runner.Config{Log: log, Restored: restored, Transport: q.transport, Logger: logger}
	for g := range max(cfg.Groups, 1) {
		rc.Groups = append(rc.Groups, runner.GroupConfig{
			Core: paxosgroup.Config{Group: paxosgroup.GroupID(g + 1), ID: self, Region: region(self),
				PreferredRegion: region(1), Seed: uint64(cfg.ID)<<32 | uint64(g)},
			Bootstrap: m,
		})
	}
	if q.runner, err = runner.New(rc); err != nil {
		return nil, err
	}
	for _, gc := range rc.Groups {
		q.groups = append(q.groups, q.runner.Group(gc.Core.Group))
	}
	q.server = grpc.NewServer(peer.ServerOptions()...)
	q.transport.Register(q.server)
	registerEcho(q.server)
	q.transport.SetPeers(addresses)
	ctx, cancel := context.WithCancel(context.Background())
	q.cancel = cancel
	q.run("server", func() error { return q.server.Serve(listener) })
	q.run("transport", func() error { return q.transport.Run(ctx) })
	q.run("runner", func() error { return q.runner.Run(ctx) })
	q.run("delivery", func() error { return q.deliver(ctx) })
	return q, nil
}

func region(id paxosgroup.ReplicaID) string { return fmt.Sprintf("r%d", id) }

// run has f run until close; a replica of which a part has failed is of no use.
func (q *quorate) run(what string, f func() error) {
	q.running.Go(func() {
		if err := f(); err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, grpc.ErrServerStopped) {
			fmt.Fprintln(os.Stderr, what+":", err)
			os.Exit(1)
		}
	})
}

// deliver reads what is chosen in the first group, as the sidecar of every
// replica does. Proposers do not wait for it: ProposeAndWait returns when an entry
// is effective, in order.
func (q *quorate) deliver(ctx context.Context) error {
	g := q.groups[0]
	last, moved := g.Chosen()
	next := last + 1
	for {
		for next <= last {
			entries, err := g.Read(next, 1<<20)
			if err != nil {
				return err
			}
			for i := range entries {
				next = entries[i].Slot + 1
			}
		}
		g.SetApplied(last)
		if last, moved = g.Chosen(); last >= next {
			continue
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
		last, moved = g.Chosen()
	}
}

func (q *quorate) leads() int {
	n := 0
	now := runner.BootTime()
	for _, g := range q.groups {
		if s := g.Status(); s.Role == paxosgroup.Leader && s.LeaseUntil > now {
			n++
		}
	}
	return n
}

// gather hands every group that this replica leads to the first one.
func (q *quorate) gather() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var transfers errgroup.Group
	transfers.SetLimit(32)
	for _, g := range q.groups {
		if s := g.Status(); s.Role == paxosgroup.Leader && s.ID != 1 {
			transfers.Go(func() error {
				_ = g.Transfer(ctx, 1) // who leads is looked at afterwards
				return nil
			})
		}
	}
	_ = transfers.Wait()
}

func (q *quorate) propose(ctx context.Context, _ int, payload []byte) error {
	_, err := q.groups[0].ProposeAndWait(ctx, payload)
	return err
}

func (q *quorate) count(c *counters) {
	s := q.log.Stats()
	c.Flushes, c.LogBytes = s.Flushes, s.Bytes
	for _, p := range q.transport.Peers() {
		c.Messages += p.Sent
		c.Frames += p.Frames
	}
	last, _ := q.groups[0].Chosen()
	c.Applied = uint64(last)
}

func (q *quorate) close() error {
	q.cancel()
	q.server.Stop()
	q.running.Wait()
	return q.log.Close()
}
