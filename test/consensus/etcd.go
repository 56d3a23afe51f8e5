package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
)

// etcd is a replica of etcd's raft library on etcd's own write-ahead log, set
// up as etcd's server does it: its values of ticks, message sizes, messages in
// flight and log kept in memory; the leader sends before it flushes, a follower
// after; what is committed is applied by a goroutine of its own, beside the
// flush. The transport is lighter than the server's: one TCP connection for each
// direction of a pair, messages behind their length, everything that has
// gathered in one write. There is no snapshot of a state machine to make or to
// send, for there is no state.
type etcd struct {
	id      uint64
	node    raft.Node
	wal     *wal.WAL
	storage *raft.MemoryStorage
	peers   map[uint64]*etcdPeer
	waiters *waiters
	apply   chan []raftpb.Entry
	stop    chan struct{}
	running sync.WaitGroup

	compacted uint64 // the loop's

	lead     atomic.Bool
	applied  atomic.Uint64
	messages atomic.Uint64
	frames   atomic.Uint64
}

const (
	etcdTick           = 100 * time.Millisecond
	etcdElectionTicks  = 10
	etcdMessageBytes   = 512 << 10
	etcdInflight       = 512
	etcdSnapshotEvery  = 10_000
	etcdKeepEntries    = 5_000
	etcdQueueMessages  = 4096
	etcdQueueApply     = 256
	etcdMessageMax     = 64 << 20
	etcdReconnectAfter = 50 * time.Millisecond
)

func startEtcd(cfg nodeConfig, listener net.Listener) (*etcd, error) {
	logger := &raft.DefaultLogger{Logger: log.New(os.Stderr, "raft ", log.LstdFlags)}
	w, err := wal.Create(zap.NewNop(), filepath.Join(cfg.Dir, "wal"), []byte("bench"))
	if err != nil {
		return nil, err
	}
	e := &etcd{
		id: uint64(cfg.ID), wal: w, storage: raft.NewMemoryStorage(), peers: make(map[uint64]*etcdPeer),
		waiters: newWaiters(), apply: make(chan []raftpb.Entry, etcdQueueApply), stop: make(chan struct{}),
	}
	var members []raft.Peer
	for i, address := range cfg.Peers {
		id := uint64(i + 1)
		members = append(members, raft.Peer{ID: id})
		if id != e.id {
			e.peers[id] = &etcdPeer{etcd: e, id: id, address: address, queue: make(chan raftpb.Message, etcdQueueMessages)}
		}
	}
	e.node = raft.StartNode(&raft.Config{
		ID: e.id, ElectionTick: etcdElectionTicks, HeartbeatTick: 1, Storage: e.storage,
		MaxSizePerMsg: etcdMessageBytes, MaxInflightMsgs: etcdInflight, CheckQuorum: true, PreVote: true, Logger: logger,
	}, members)
	for _, p := range e.peers {
		go p.run()
	}
	go e.listen(listener)
	e.running.Go(e.loop)
	e.running.Go(e.applyAll)
	if e.id == 1 {
		go e.campaign()
	}
	return e, nil
}

// campaign makes this replica the first leader.
func (e *etcd) campaign() {
	for {
		select {
		case <-e.stop:
			return
		case <-time.After(3 * etcdTick):
		}
		if e.node.Status().Lead != raft.None {
			return
		}
		_ = e.node.Campaign(context.Background()) // else again
	}
}

// loop pays what the library is owed, in the order of etcd's server.
func (e *etcd) loop() {
	ticker := time.NewTicker(etcdTick)
	defer ticker.Stop()
	for {
		select {
		case <-e.stop:
			return
		case <-ticker.C:
			e.node.Tick()
		case rd := <-e.node.Ready():
			if rd.SoftState != nil {
				e.lead.Store(rd.RaftState == raft.StateLeader)
			}
			for _, entry := range rd.CommittedEntries {
				if entry.Type == raftpb.EntryConfChange {
					var cc raftpb.ConfChange
					if err := cc.Unmarshal(entry.Data); err != nil {
						e.fail(err)
					}
					e.node.ApplyConfChange(cc)
				}
			}
			if len(rd.CommittedEntries) > 0 {
				e.apply <- rd.CommittedEntries
			}
			lead := e.lead.Load()
			if lead {
				e.send(rd.Messages)
			}
			if !raft.IsEmptySnap(rd.Snapshot) {
				s := rd.Snapshot.Metadata
				if err := e.wal.SaveSnapshot(walpb.Snapshot{Index: s.Index, Term: s.Term, ConfState: &s.ConfState}); err != nil {
					e.fail(err)
				}
			}
			if err := e.wal.Save(rd.HardState, rd.Entries); err != nil {
				e.fail(err)
			}
			if !raft.IsEmptySnap(rd.Snapshot) {
				if err := e.storage.ApplySnapshot(rd.Snapshot); err != nil {
					e.fail(err)
				}
			}
			if err := e.storage.Append(rd.Entries); err != nil {
				e.fail(err)
			}
			if !lead {
				e.send(rd.Messages)
			}
			e.compact()
			e.node.Advance()
		}
	}
}

func (e *etcd) fail(err error) {
	fmt.Fprintln(os.Stderr, "etcd:", err)
	os.Exit(1)
}

func (e *etcd) applyAll() {
	for {
		select {
		case <-e.stop:
			return
		case entries := <-e.apply:
			for i := range entries {
				if entries[i].Type == raftpb.EntryNormal {
					e.waiters.delivered(entries[i].Data)
				}
			}
			e.applied.Store(entries[len(entries)-1].Index)
		}
	}
}

// compact cuts the log in memory as etcd's server does.
func (e *etcd) compact() {
	applied := e.applied.Load()
	if applied < e.compacted+etcdSnapshotEvery+etcdKeepEntries {
		return
	}
	voters := []uint64{e.id}
	for id := range e.peers {
		voters = append(voters, id)
	}
	if _, err := e.storage.CreateSnapshot(applied, &raftpb.ConfState{Voters: voters}, nil); err != nil && !errors.Is(err, raft.ErrSnapOutOfDate) {
		e.fail(err)
	}
	e.compacted = applied - etcdKeepEntries
	if err := e.storage.Compact(e.compacted); err != nil && !errors.Is(err, raft.ErrCompacted) {
		e.fail(err)
	}
}

func (e *etcd) send(messages []raftpb.Message) {
	for _, m := range messages {
		p := e.peers[m.To]
		if p == nil {
			continue
		}
		select {
		case p.queue <- m:
			e.messages.Add(1)
		default:
			e.node.ReportUnreachable(m.To)
		}
		if m.Type == raftpb.MsgSnap {
			e.node.ReportSnapshot(m.To, raft.SnapshotFinish)
		}
	}
}

// etcdPeer is the connection to one other replica.
type etcdPeer struct {
	etcd    *etcd
	id      uint64
	address string
	queue   chan raftpb.Message
}

func (p *etcdPeer) run() {
	for {
		conn, err := net.DialTimeout("tcp", p.address, time.Second)
		if err == nil {
			err = p.write(conn)
			conn.Close()
		}
		if err == nil {
			return
		}
		p.etcd.node.ReportUnreachable(p.id)
		select {
		case <-p.etcd.stop:
			return
		case <-time.After(etcdReconnectAfter):
		}
	}
}

// write sends until the connection breaks, or returns nil when the replica stops.
func (p *etcdPeer) write(conn net.Conn) error {
	w := bufio.NewWriterSize(conn, 128<<10)
	var buf []byte
	for {
		var m raftpb.Message
		select {
		case m = <-p.queue:
		default:
			if w.Buffered() > 0 {
				p.etcd.frames.Add(1)
				if err := w.Flush(); err != nil {
					return err
				}
			}
			select {
			case m = <-p.queue:
			case <-p.etcd.stop:
				return nil
			}
		}
		n := m.Size()
		if cap(buf) < n+4 {
			buf = make([]byte, max(n+4, 2*cap(buf)))
		}
		buf = buf[:n+4]
		binary.BigEndian.PutUint32(buf, uint32(n))
		if _, err := m.MarshalTo(buf[4:]); err != nil {
			p.etcd.fail(err)
		}
		if _, err := w.Write(buf); err != nil {
			return err
		}
	}
}

func (e *etcd) listen(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go e.read(conn)
	}
}

// read steps what arrives until the connection breaks.
func (e *etcd) read(conn net.Conn) {
	defer conn.Close()
	r := bufio.NewReaderSize(conn, 128<<10)
	var buf []byte
	for {
		var length [4]byte
		if _, err := io.ReadFull(r, length[:]); err != nil {
			return
		}
		n := binary.BigEndian.Uint32(length[:])
		if n > etcdMessageMax {
			return
		}
		if cap(buf) < int(n) {
			buf = make([]byte, n)
		}
		buf = buf[:n]
		if _, err := io.ReadFull(r, buf); err != nil {
			return
		}
		var m raftpb.Message
		if err := m.Unmarshal(buf); err != nil { // copies what it keeps
			e.fail(err)
		}
		if err := e.node.Step(context.Background(), m); err != nil {
			return
		}
	}
}

func (e *etcd) leads() int {
	if e.lead.Load() && e.applied.Load() > 0 {
		return 1
	}
	return 0
}

func (e *etcd) propose(ctx context.Context, i int, payload []byte) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	e.waiters.clear(i)
	if err := e.node.Propose(ctx, payload); err != nil {
		return err
	}
	return e.waiters.wait(ctx, i)
}

func (e *etcd) count(c *counters) {
	c.Applied, c.Messages, c.Frames = e.applied.Load(), e.messages.Load(), e.frames.Load()
	families, err := prometheus.DefaultGatherer.Gather()
	if err != nil {
		return
	}
	for _, f := range families {
		switch f.GetName() {
		case "etcd_disk_wal_fsync_duration_seconds":
			c.Flushes = f.GetMetric()[0].GetHistogram().GetSampleCount()
		case "etcd_disk_wal_write_bytes_total":
			c.LogBytes = uint64(f.GetMetric()[0].GetGauge().GetValue())
		}
	}
}

func (e *etcd) close() error {
	close(e.stop)
	e.running.Wait()
	e.node.Stop()
	return e.wal.Close()
}
