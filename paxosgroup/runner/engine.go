package runner

import (
	"container/heap"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"slices"
	"sync/atomic"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/peer"
)

// Transport is what an engine sends by.
type Transport interface {
	// Send never blocks and may lose anything. The messages are the caller's
	// again when it returns, what they point to is shared and never changed.
	Send(g paxosgroup.GroupID, msgs []paxosgroup.Message)
}

// Log is where an engine keeps what its cores owe to the disk.
type Log interface {
	// Append adds records of a group, in order, and has durable called once,
	// when they and all earlier ones of the group are flushed, or with the error
	// for which they will not be. It must not block, nor call durable from within.
	// The records are the caller's again when it returns; what they point to is
	// shared and never changed.
	Append(g paxosgroup.GroupID, recs []paxosgroup.Record, durable func(error))
	// Group reads back what was appended, flushed or not.
	Group(g paxosgroup.GroupID) paxosgroup.Storage
}

// finite is a Log that may run out of room.
type finite interface {
	// Full reports whether there is no room for the log to grow. It ends by
	// itself.
	Full() bool
}

// queueing is a Log that may be behind with what it is handed.
type queueing interface {
	// Crowded reports whether so much waits for the disk of a group that no more
	// should be taken which the group has to store. It ends by itself.
	Crowded(g paxosgroup.GroupID) bool
}

// crowdedRetry is after how long proposals that a crowded log keeps waiting are
// looked at again, at the latest.
const crowdedRetry = 10 * time.Millisecond

// divided is a Log of several parts, of which each may fail or fill by itself: the
// groups on it are stopped, or wait, and the others go on.
type divided interface {
	// Place sees to it that the groups have a part to be on, and is called before
	// anything else is asked for them. An error, for one group, says that it cannot
	// be run.
	Place(groups ...paxosgroup.GroupID) error
	// Lost says why what a group appends is not kept any more, or nil.
	Lost(g paxosgroup.GroupID) error
	// FullFor is Full of the part that the group is on.
	FullFor(g paxosgroup.GroupID) bool
}

// Config says what an engine drives.
type Config struct {
	Log       Log
	Restored  map[paxosgroup.GroupID]paxosgroup.Restored // what opening Log gave
	Transport Transport
	Clock     func() paxosgroup.Instant // of a Runner; nil means BootTime. An Engine is handed the time
	Groups    []GroupConfig
	Logger    *slog.Logger // nil discards
	// Accepted, if set, is told by a Runner of each entry that this replica
	// accepted and flushed, for tracing: when it was stepped, handed to the log,
	// and durable. It is called on the log's goroutine and must not block.
	Accepted func(g paxosgroup.GroupID, e paxosgroup.SlotEntry, stepped, appended, durable time.Time)
	// Life is a random number of this life of the process, by which heartbeats
	// are shared by all its groups. 0: a Runner draws it, in an Engine each group
	// sends its own.
	Life uint64
	// InboxBytesMax bounds what has arrived at a Runner and was not stepped yet;
	// more is dropped. 0 means 64 MiB.
	InboxBytesMax int
}

// GroupConfig says how a group is run.
type GroupConfig struct {
	// Core is the core's configuration. RestartedWithState is set by the engine
	// if the log holds anything of the group.
	Core paxosgroup.Config
	// Bootstrap is the membership that a group starts with if the log holds
	// nothing of it: the very first one, and the same in every replica. One that
	// joins a group that exists may have it too, or none: it is no member then of
	// anything until it learns of the change that makes it one, from the log or an
	// image.
	Bootstrap paxosgroup.Membership
	// RecentBytesMax and RecentEntriesMax bound the chosen entries kept in
	// memory. 0 means 64 MiB and 65536.
	RecentBytesMax   int
	RecentEntriesMax int
	// WaitingMax bounds the proposals that wait for room in the window; more are
	// answered with ErrBusy. 0 means 65536.
	WaitingMax int
}

const (
	inboxBytesDefault    = 64 << 20
	recentBytesDefault   = 64 << 20
	recentEntriesDefault = 1 << 16
	waitingDefault       = 1 << 16
)

func (c *Config) fill() error {
	if c.Log == nil || c.Transport == nil {
		return errors.New("runner: log and transport are needed")
	}
	if c.Clock == nil {
		c.Clock = BootTime
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.InboxBytesMax == 0 {
		c.InboxBytesMax = inboxBytesDefault
	}
	return nil
}

// Engine is what drives groups, without goroutine, clock or lock: all times are
// handed in, and the same calls in the same order have the same effects. It is
// not safe for concurrent use. Runner puts it among goroutines; a simulator
// calls it directly.
//
// Deliver, and what is asked of a group, take effect on the cores at once; what
// the cores owe in return is paid by the next Step, which must follow.
type Engine struct {
	cfg      Config
	groups   map[paxosgroup.GroupID]*EngineGroup
	order    []*EngineGroup
	due      deadlines
	dirty    []*EngineGroup    // touched since the last Step
	beats    *paxosgroup.Beats // nil: not shared
	missed   missedTime
	done     []done
	withLog  atomic.Int64 // Appends that were not called back yet, or not heard of
	finite   finite       // the log, if it may be full
	divided  divided      // the log, if it has parts
	queueing queueing     // the log, if it may be crowded
	failure  error
	failed   bool // a group is
	full     bool // the log is, or a part of it
	stats    Stats

	// A Runner's: none of them changes what the engine does.
	durable func(done)           // nil: the log calls back on the engine's own goroutine
	settled func(g *EngineGroup) // has been settled
	moved   func(g *EngineGroup) // delivered or restarted; with the guard held
}

// done says what became of an Append.
type done struct {
	group  *EngineGroup
	seq    uint64 // of the Ready; 0 if nothing counts upon it
	counts bool   // the core waits to hear of it
	after  []paxosgroup.Message
	ticket bool // unflushed counts it
	err    error
}

// nobody is the guard of what is not shared.
type nobody struct{}

func (nobody) Lock()   {}
func (nobody) Unlock() {}

// NewEngine restores the cores at an instant.
func NewEngine(cfg Config, now paxosgroup.Instant) (*Engine, error) {
	return newEngine(&Engine{cfg: cfg}, now)
}

// newEngine completes e, whose hooks are set.
func newEngine(e *Engine, now paxosgroup.Instant) (*Engine, error) {
	if err := e.cfg.fill(); err != nil {
		return nil, err
	}
	e.groups = make(map[paxosgroup.GroupID]*EngineGroup)
	if e.durable == nil {
		e.durable = func(d done) { e.done = append(e.done, d) }
	}
	log := e.cfg.Log
	if t, ok := log.(tracedLog); ok {
		log = t.Log
	}
	e.finite, _ = log.(finite)
	e.divided, _ = log.(divided)
	e.queueing, _ = log.(queueing)
	e.place(e.cfg.Groups)
	for _, gc := range e.cfg.Groups {
		if _, err := e.AddGroup(now, gc); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// place places many groups at once, which is quicker than one by one. What is
// wrong with any is found again with it.
func (e *Engine) place(groups []GroupConfig) {
	if e.divided == nil {
		return
	}
	ids := make([]paxosgroup.GroupID, len(groups))
	for i, gc := range groups {
		ids[i] = gc.Core.Group
	}
	e.divided.Place(ids...)
}

// AddGroup drives one more group, restored from what the log held when it was
// opened. One that the log cannot keep is there and has failed; see Failed.
func (e *Engine) AddGroup(now paxosgroup.Instant, gc GroupConfig) (*EngineGroup, error) {
	if e.groups[gc.Core.Group] != nil {
		return nil, fmt.Errorf("runner: group %d is here already", gc.Core.Group)
	}
	g, err := e.newGroup(now, gc, nobody{})
	if err != nil {
		return nil, err
	}
	return g, e.admit(g)
}

// admit takes up a group that newGroup made.
func (e *Engine) admit(g *EngineGroup) error {
	if e.groups[g.id] != nil {
		return fmt.Errorf("runner: group %d is here already", g.id)
	}
	e.groups[g.id] = g
	e.order = append(e.order, g)
	if err := e.share(g); err != nil {
		return err
	}
	heap.Push(&e.due, g)
	e.failed = e.failed || g.failure != nil
	e.touch(g)
	return nil
}

// Group returns a group, or nil if it is not here.
func (e *Engine) Group(id paxosgroup.GroupID) *EngineGroup { return e.groups[id] }

// Groups returns all groups in the order in which they were added.
func (e *Engine) Groups() []*EngineGroup { return e.order }

// Deliver takes messages from a peer.
func (e *Engine) Deliver(now paxosgroup.Instant, _ paxosgroup.ReplicaID, batch []peer.GroupMessage) {
	e.payDone(now) // others wait for what the disk has done
	e.lookForRoom(now)
	for i := range batch {
		if batch[i].Group == 0 && e.beats != nil {
			e.cfg.Transport.Send(0, e.beats.Step(now, batch[i].Message))
			continue
		}
		g := e.groups[batch[i].Group]
		if g == nil {
			e.stats.Unknown++
			continue
		}
		if g.failure != nil || grows(batch[i].Message.Kind) && (g.full || g.crowded()) {
			e.stats.Unstored++
			continue
		}
		if err := g.core.Step(now, batch[i].Message); err != nil {
			if e.stats.Refused++; e.stats.Refused == 1 {
				e.cfg.Logger.Warn("refused a message; further ones are only counted", "group", g.id, "err", err)
			}
		}
		e.touch(g)
	}
}

// Wall compares the wall clock with the boot clock. Whoever leads resigns if the
// boot clock has missed time, for its lease may have run out unnoticed.
func (e *Engine) Wall(now paxosgroup.Instant, wall time.Time) {
	ahead := e.missed.look(wall, now)
	if ahead <= 0 {
		return
	}
	e.stats.MissedTimes++
	e.cfg.Logger.Warn("the wall clock went ahead of the boot clock: leases are given up", "ahead", ahead)
	for _, g := range e.order {
		g.Resign(now)
	}
}

// Step does everything that is due. It returns the error that stopped the log, or
// all parts of it that groups are on, and does nothing from then on.
func (e *Engine) Step(now paxosgroup.Instant) error {
	e.payDone(now)
	if e.failed && e.failure == nil && !slices.ContainsFunc(e.order, func(g *EngineGroup) bool { return g.failure == nil }) {
		e.failure = e.order[0].failure
	}
	if e.failure != nil {
		return e.failure
	}
	e.lookForRoom(now)
	e.beat(now)
	for len(e.due) > 0 && e.due[0].deadline <= now {
		g := e.due[0]
		g.core.Tick(now)
		e.touch(g)
		// Out of the way until it is settled, which gives it its next deadline.
		g.deadline = never
		heap.Fix(&e.due, 0)
	}
	// Whom a callback touches again waits for the next Step: nobody's callbacks
	// can keep this one from ending.
	n := len(e.dirty)
	for i := range n {
		g := e.dirty[i]
		g.dirty = false
		g.settle(now)
	}
	rest := copy(e.dirty, e.dirty[n:])
	clear(e.dirty[rest:])
	e.dirty = e.dirty[:rest]
	e.woken(now)
	return nil
}

// grows reports whether a message has its receiver write what may be put off:
// its sender repeats it, or asks another.
func grows(k paxosgroup.MessageKind) bool {
	switch k {
	case paxosgroup.MsgPrepare, paxosgroup.MsgAccept, paxosgroup.MsgLearn, paxosgroup.MsgTimeoutNow:
		return true
	}
	return false
}

// crowded reports whether what the group would have to store is to be put off.
// Its sender repeats it, as what the network loses; all else goes on.
func (g *EngineGroup) crowded() bool {
	q := g.engine.queueing
	return q != nil && q.Crowded(g.id)
}

// lookForRoom stops what makes the log grow while there is no room for it, and
// lets it go on when there is. What is left of the log is for what is on its way,
// and for bases, which free room. What is chosen can be read and fetched all the
// time; a replica with a full log leads nothing, since it could not accept what it
// proposes, and another that can takes over.
func (e *Engine) lookForRoom(now paxosgroup.Instant) {
	if e.finite == nil {
		return
	}
	full := e.finite.Full()
	if !full && !e.full {
		return
	}
	if full != e.full {
		if full {
			e.cfg.Logger.Error("the disk of the log is full: nothing is proposed, accepted or promised by the groups on it until there is room; free some")
		} else {
			e.cfg.Logger.Info("the log has room again")
		}
	}
	e.full = full
	for _, g := range e.order {
		if its := full && (e.divided == nil || e.divided.FullFor(g.id)); its != g.full {
			g.full = its
			g.SetElectable(g.electable)
			if its {
				g.Resign(now)
			}
		}
	}
}

// stopped takes in that what a group appended is not kept. The part of the log
// that it is on is lost, and with it the others there: they need not try first.
func (e *Engine) stopped(now paxosgroup.Instant, g *EngineGroup, err error) {
	if g.failure != nil {
		return
	}
	err = fmt.Errorf("persist records of group %d: %w", g.id, err)
	if e.divided == nil {
		if e.failure == nil {
			e.failure = err
		}
		return
	}
	g.fail(now, err)
	for _, other := range e.order {
		if err := e.divided.Lost(other.id); err != nil {
			other.fail(now, err)
		}
	}
}

// payDone does what waited for the disk, in order.
func (e *Engine) payDone(now paxosgroup.Instant) {
	for i := 0; i < len(e.done); i++ {
		d := e.done[i]
		e.done[i] = done{}
		e.withLog.Add(-1)
		g := d.group
		if d.err != nil {
			// What is with the log behind it fails as well, and what may have
			// been flushed is not counted: nothing may leave that rests on it.
			e.stopped(now, g, d.err)
			continue
		}
		if g.failure != nil || e.failure != nil {
			continue
		}
		if d.ticket {
			if g.unflushed--; g.unflushed == 0 && len(g.proposals.waiting) > 0 {
				e.touch(g)
			}
		}
		if len(d.after) > 0 {
			e.cfg.Transport.Send(g.id, d.after)
			g.core.Recycle(paxosgroup.Ready{AfterSync: d.after})
		}
		if d.counts {
			g.core.Persisted(now, d.seq)
			e.touch(g)
		}
	}
	e.done = e.done[:0]
}

// Deadline returns when Step has to be called next at the latest; false if
// never. What waits to be settled is due at once.
func (e *Engine) Deadline() (paxosgroup.Instant, bool) {
	if len(e.dirty) > 0 || len(e.done) > 0 {
		return 0, true
	}
	next := never
	if len(e.due) > 0 {
		next = e.due[0].deadline
	}
	if e.beats != nil {
		if at, ok := e.beats.NextDeadline(); ok {
			next = min(next, at)
		}
	}
	if next == never {
		return 0, false
	}
	return next, true
}

// batch counts entries that were accepted at once.
func (s *Stats) batch(entries int) {
	if entries == 0 {
		return
	}
	s.Accepted += uint64(entries)
	s.BatchSizes[min(bits.Len(uint(entries-1)), BatchBuckets-1)]++
}

// Stats returns the counters.
func (e *Engine) Stats() Stats { return e.stats }

func (e *Engine) touch(g *EngineGroup) {
	if !g.dirty {
		g.dirty = true
		e.dirty = append(e.dirty, g)
	}
}

const never = paxosgroup.Instant(1<<63 - 1)

// deadlines is a heap of groups, the earliest first, and of those with one
// deadline the one added first.
type deadlines []*EngineGroup

func (d deadlines) Len() int { return len(d) }
func (d deadlines) Less(i, j int) bool {
	return d[i].deadline < d[j].deadline || d[i].deadline == d[j].deadline && d[i].id < d[j].id
}
func (d deadlines) Swap(i, j int) {
	d[i], d[j] = d[j], d[i]
	d[i].heapIndex, d[j].heapIndex = i, j
}
func (d *deadlines) Push(x any) {
	g := x.(*EngineGroup)
	g.heapIndex = len(*d)
	*d = append(*d, g)
}
func (d *deadlines) Pop() any { panic("runner: no group is ever taken away") }
