package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftwal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/metrics"
)

// hashicorp is a replica of hashicorp/raft on raft-wal, with its network
// transport, tuned for throughput: proposals are taken, sent and applied in
// batches of up to 1024, the most it allows, with a cache of the log's end in
// memory, and no snapshots. Pipelining is left at the two calls in flight that
// its authors measured as best.
type hashicorp struct {
	raft    *raft.Raft
	wal     *raftwal.WAL
	metrics *metrics.AtomicCollector
	applied *atomic.Uint64
}

const hashicorpBatch = 1024 // the most it allows

func startHashicorp(cfg nodeConfig, listener net.Listener) (*hashicorp, error) {
	h := &hashicorp{metrics: metrics.NewAtomicCollector(raftwal.MetricDefinitions), applied: new(atomic.Uint64)}
	dir := filepath.Join(cfg.Dir, "wal")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Error, Output: os.Stderr})
	var err error
	if h.wal, err = raftwal.Open(dir, raftwal.WithMetricsCollector(h.metrics), raftwal.WithLogger(logger)); err != nil {
		return nil, err
	}
	cached, err := raft.NewLogCache(8*hashicorpBatch, h.wal)
	if err != nil {
		return nil, err
	}
	c := raft.DefaultConfig()
	c.LocalID = serverID(cfg.ID)
	c.MaxAppendEntries, c.BatchApplyCh = hashicorpBatch, true
	c.SnapshotThreshold, c.SnapshotInterval = 1<<62, time.Hour
	c.Logger = logger
	if cfg.ID != 1 {
		// Replica 1 becomes the first leader.
		c.ElectionTimeout, c.HeartbeatTimeout = 2*c.ElectionTimeout, 2*c.HeartbeatTimeout
	}
	transport := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: streamLayer{listener}, MaxPool: 4, Timeout: 10 * time.Second, Logger: logger,
		ServerAddressProvider: addressesOf(cfg.Peers),
	})
	snapshots := raft.NewDiscardSnapshotStore()
	var all raft.Configuration
	for i, address := range cfg.Peers {
		all.Servers = append(all.Servers, raft.Server{ID: serverID(i + 1), Address: raft.ServerAddress(address)})
	}
	if err := raft.BootstrapCluster(c, cached, h.wal, snapshots, transport, all); err != nil {
		return nil, err
	}
	h.raft, err = raft.NewRaft(c, machine{h.applied}, cached, h.wal, snapshots, transport)
	return h, err
}

func serverID(id int) raft.ServerID { return raft.ServerID(fmt.Sprint(id)) }

type addressesOf []string

func (a addressesOf) ServerAddr(id raft.ServerID) (raft.ServerAddress, error) {
	for i, address := range a {
		if serverID(i+1) == id {
			return raft.ServerAddress(address), nil
		}
	}
	return "", fmt.Errorf("no server %s", id)
}

type streamLayer struct{ net.Listener }

func (streamLayer) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout("tcp", string(address), timeout)
}

// machine is a state machine without state, which takes batches.
type machine struct{ applied *atomic.Uint64 }

func (m machine) Apply(l *raft.Log) any {
	m.applied.Store(l.Index)
	return nil
}

func (m machine) ApplyBatch(logs []*raft.Log) []any {
	m.applied.Store(logs[len(logs)-1].Index)
	return make([]any, len(logs))
}

func (machine) Snapshot() (raft.FSMSnapshot, error) {
	return nil, errors.New("there is nothing to keep")
}

func (machine) Restore(r io.ReadCloser) error { return r.Close() }

func (h *hashicorp) leads() int {
	if h.raft.State() == raft.Leader && h.applied.Load() > 0 {
		return 1
	}
	// Its applied index moves with the first command.
	if h.raft.State() == raft.Leader && h.raft.VerifyLeader().Error() == nil {
		return 1
	}
	return 0
}

func (h *hashicorp) propose(_ context.Context, _ int, payload []byte) error {
	return h.raft.Apply(payload, 10*time.Second).Error()
}

func (h *hashicorp) count(c *counters) {
	s := h.metrics.Summary().Counters
	// Each append, and each change of the stable store, ends with a flush.
	c.Flushes, c.LogBytes = s["log_appends"]+s["stable_sets"], s["log_entry_bytes_written"]
	c.Applied = h.applied.Load()
}

func (h *hashicorp) close() error {
	return errors.Join(h.raft.Shutdown().Error(), h.wal.Close())
}
