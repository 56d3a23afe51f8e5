package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/peer"
	"quorate/paxosgroup/slotlog"
)

// Transport is what a runner sends by.
type Transport interface {
	// Send never blocks and may lose anything.
	Send(g paxosgroup.GroupID, msgs []paxosgroup.Message)
}

// Config says what a runner drives.
type Config struct {
	Log       *slotlog.Log
	Restored  map[paxosgroup.GroupID]paxosgroup.Restored // what opening Log gave
	Transport Transport
	Clock     func() paxosgroup.Instant // nil means BootTime
	Groups    []GroupConfig
	Logger    *slog.Logger // nil discards
	// Accepted, if set, is told of each entry that this replica accepted and
	// flushed, for tracing: when it was stepped, handed to the log, and durable.
	// It is called on the log's goroutine and must not block.
	Accepted func(g paxosgroup.GroupID, e paxosgroup.SlotEntry, stepped, appended, durable time.Time)
	// InboxBytesMax bounds what has arrived and was not stepped yet; more is
	// dropped. 0 means 64 MiB.
	InboxBytesMax int
}

// GroupConfig says how a group is run.
type GroupConfig struct {
	// Core is the core's configuration. RestartedWithState is set by the runner
	// if the log holds anything of the group.
	Core paxosgroup.Config
	// Bootstrap is the membership that a group starts with if the log holds
	// nothing of it. It must be the same in every replica, and empty in one that
	// joins a group that exists.
	Bootstrap paxosgroup.Membership
	// RecentBytesMax and RecentEntriesMax bound the chosen entries kept in
	// memory. 0 means 64 MiB and 65536.
	RecentBytesMax   int
	RecentEntriesMax int
}

const (
	inboxBytesDefault    = 64 << 20
	recentBytesDefault   = 64 << 20
	recentEntriesDefault = 1 << 16
)

// Errors that callers compare.
var (
	ErrStopped   = errors.New("runner has stopped")
	ErrCompacted = errors.New("slot is at or below the base of the log")
	ErrNoGroup   = errors.New("no such group")
)

// NotLeaderError says that a proposal came to a replica that does not lead. It
// is a paxosgroup.ErrNotLeader.
type NotLeaderError struct {
	Leader paxosgroup.ReplicaID // believed; 0 if none is known
	Ballot paxosgroup.Ballot    // the highest seen
}

func (e *NotLeaderError) Error() string {
	if e.Leader == 0 {
		return "not the leader, and no leader is known"
	}
	return fmt.Sprintf("not the leader: replica %d is (ballot %v)", e.Leader, e.Ballot)
}

func (e *NotLeaderError) Unwrap() error { return paxosgroup.ErrNotLeader }

// Stats counts since New.
type Stats struct {
	Dropped     uint64 // messages that met a full inbox
	Unknown     uint64 // messages for groups that are not here
	Refused     uint64 // messages that a core would not take
	Batches     uint64 // sets of records handed to the log that needed a flush
	Delivered   uint64 // entries
	MissedTimes uint64 // the wall clock was found ahead of the boot clock
}

// Runner drives groups. Its methods may be called from any goroutine.
type Runner struct {
	cfg  Config
	wake chan struct{} // holds a token when a queue has something

	groups atomic.Pointer[map[paxosgroup.GroupID]*Group]

	mu         sync.Mutex // guards the queues that the loop empties
	inbox      []peer.GroupMessage
	inboxBytes int
	flushed    []flushed
	calls      []call
	failure    error // of the log
	stopped    bool

	stats struct {
		dropped, unknown, refused, batches, delivered, missed atomic.Uint64
	}

	loop loop
}

// loop is what only Run touches.
type loop struct {
	groups  []*Group
	dirty   []*Group // stepped since their last Ready
	missed  missedTime
	stepped time.Time // wall clock at the beginning of the step under way
	spare   struct {
		inbox   []peer.GroupMessage
		flushed []flushed
		calls   []call
	}
}

// flushed says that all Readies of a group up to seq are durable.
type flushed struct {
	group *Group
	seq   uint64
}

// call is something to be done by the loop: a proposal, or do.
type call struct {
	group    *Group // to be settled afterwards; nil if none
	proposal *proposal
	do       func(now paxosgroup.Instant)
	fail     func(error) // called instead of do once the runner has stopped
}

func (c call) reject(err error) {
	if c.proposal != nil {
		c.proposal.reject(err)
		return
	}
	c.fail(err)
}

// New restores the cores. Nothing runs before Run.
func New(cfg Config) (*Runner, error) {
	if cfg.Log == nil || cfg.Transport == nil {
		return nil, errors.New("runner: log and transport are needed")
	}
	if cfg.Clock == nil {
		cfg.Clock = BootTime
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.InboxBytesMax == 0 {
		cfg.InboxBytesMax = inboxBytesDefault
	}
	r := &Runner{cfg: cfg, wake: make(chan struct{}, 1)}
	groups := make(map[paxosgroup.GroupID]*Group)
	for _, gc := range cfg.Groups {
		if groups[gc.Core.Group] != nil {
			return nil, fmt.Errorf("runner: group %d is configured twice", gc.Core.Group)
		}
		g, err := r.newGroup(gc)
		if err != nil {
			return nil, err
		}
		groups[g.id] = g
		r.loop.groups = append(r.loop.groups, g)
	}
	r.groups.Store(&groups)
	return r, nil
}

// Group returns a group, or nil if it is not here.
func (r *Runner) Group(id paxosgroup.GroupID) *Group { return (*r.groups.Load())[id] }

// AddGroup starts to drive one more group, restored from what the log held when
// it was opened. Run must be running, or ctx end.
func (r *Runner) AddGroup(ctx context.Context, gc GroupConfig) (*Group, error) {
	if r.Group(gc.Core.Group) != nil {
		return nil, fmt.Errorf("runner: group %d is here already", gc.Core.Group)
	}
	g, err := r.newGroup(gc)
	if err != nil {
		return nil, err
	}
	err = r.ask(ctx, nil, func(paxosgroup.Instant) error {
		groups := maps.Clone(*r.groups.Load())
		if groups[g.id] != nil {
			return fmt.Errorf("runner: group %d is here already", g.id)
		}
		groups[g.id] = g
		r.groups.Store(&groups)
		r.loop.groups = append(r.loop.groups, g)
		r.touch(g)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return g, nil
}

// Deliver takes messages from a peer. It does not block.
func (r *Runner) Deliver(_ paxosgroup.ReplicaID, batch []peer.GroupMessage) {
	size := 0
	for i := range batch {
		size += batch[i].Weight()
	}
	r.mu.Lock()
	if r.stopped || r.inboxBytes > 0 && r.inboxBytes+size > r.cfg.InboxBytesMax {
		r.mu.Unlock()
		r.stats.dropped.Add(uint64(len(batch)))
		return
	}
	r.inbox = append(r.inbox, batch...)
	r.inboxBytes += size
	r.mu.Unlock()
	r.signal()
}

// Stats returns the counters.
func (r *Runner) Stats() Stats {
	s := &r.stats
	return Stats{
		Dropped: s.dropped.Load(), Unknown: s.unknown.Load(), Refused: s.refused.Load(),
		Batches: s.batches.Load(), Delivered: s.delivered.Load(), MissedTimes: s.missed.Load(),
	}
}

func (r *Runner) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// submit queues a call for the loop.
func (r *Runner) submit(c call) {
	r.mu.Lock()
	if r.stopped {
		err := r.stopError()
		r.mu.Unlock()
		c.reject(err)
		return
	}
	r.calls = append(r.calls, c)
	r.mu.Unlock()
	r.signal()
}

// ask has the loop do something and waits for its answer.
func (r *Runner) ask(ctx context.Context, g *Group, do func(now paxosgroup.Instant) error) error {
	answer := make(chan error, 1)
	r.submit(call{
		group: g,
		do:    func(now paxosgroup.Instant) { answer <- do(now) },
		fail:  func(err error) { answer <- err },
	})
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// tell has the loop do something, in order with what else is asked of it.
func (r *Runner) tell(g *Group, do func(now paxosgroup.Instant)) {
	r.submit(call{group: g, do: do, fail: func(error) {}})
}

// stopError says why nothing is done any more. Called with mu held.
func (r *Runner) stopError() error {
	if r.failure != nil {
		return fmt.Errorf("%w: %w", ErrStopped, r.failure)
	}
	return ErrStopped
}

// Run drives the groups until ctx ends or the log fails, which it returns. It
// may be called once.
func (r *Runner) Run(ctx context.Context) error {
	defer r.stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-r.wake:
		case <-timer.C:
		}
		if err := r.step(); err != nil {
			return err
		}
		if next, ok := r.nextDeadline(); ok {
			timer.Reset(max(0, next.Sub(r.cfg.Clock())))
		}
	}
}

// step does everything that is due.
func (r *Runner) step() error {
	l := &r.loop
	r.mu.Lock()
	inbox, done, calls, failure := r.inbox, r.flushed, r.calls, r.failure
	r.inbox, r.flushed, r.calls = l.spare.inbox[:0], l.spare.flushed[:0], l.spare.calls[:0]
	r.inboxBytes = 0
	r.mu.Unlock()
	// Not before the inbox was taken: a lease is granted from receipt, and a
	// pause between the two would let it end before the leader thinks.
	now := r.cfg.Clock()
	if failure != nil {
		for _, c := range calls {
			c.reject(fmt.Errorf("%w: %w", ErrStopped, failure))
		}
		return failure
	}

	l.stepped = time.Now()
	if ahead := l.missed.look(l.stepped, now); ahead > 0 {
		r.stats.missed.Add(1)
		r.cfg.Logger.Warn("the wall clock went ahead of the boot clock: leases are given up", "ahead", ahead)
		for _, g := range l.groups {
			g.core.Resign(now)
			r.touch(g)
		}
	}
	// What the disk has done comes first: others wait for it.
	for _, f := range done {
		f.group.core.Persisted(now, f.seq)
		r.touch(f.group)
	}
	groups := *r.groups.Load()
	for i := range inbox {
		g := groups[inbox[i].Group]
		if g == nil {
			r.stats.unknown.Add(1)
			continue
		}
		if err := g.core.Step(now, inbox[i].Message); err != nil {
			if r.stats.refused.Add(1) == 1 {
				r.cfg.Logger.Warn("refused a message; further ones are only counted", "group", g.id, "err", err)
			}
		}
		r.touch(g)
	}
	for _, c := range calls {
		if c.proposal != nil {
			c.group.waiting = append(c.group.waiting, c.proposal)
		} else {
			c.do(now)
		}
		if c.group != nil {
			r.touch(c.group)
		}
	}
	for _, g := range l.groups {
		if g.deadline <= now {
			g.core.Tick(now)
			r.touch(g)
		}
	}
	for _, g := range l.dirty {
		g.dirty = false
		g.settle(now)
	}
	l.dirty = l.dirty[:0]

	clear(inbox)
	clear(done)
	clear(calls)
	l.spare.inbox, l.spare.flushed, l.spare.calls = inbox, done, calls
	return nil
}

func (r *Runner) touch(g *Group) {
	if !g.dirty {
		g.dirty = true
		r.loop.dirty = append(r.loop.dirty, g)
	}
}

func (r *Runner) nextDeadline() (paxosgroup.Instant, bool) {
	if len(r.loop.groups) == 0 {
		return 0, false
	}
	return slices.MinFunc(r.loop.groups, func(a, b *Group) int {
		if a.deadline < b.deadline {
			return -1
		}
		return 1
	}).deadline, true
}

// durable is told by the log, on its goroutine, that a Ready is flushed.
func (r *Runner) durable(f flushed, err error) {
	r.mu.Lock()
	if err != nil {
		if r.failure == nil {
			r.failure = fmt.Errorf("persist records of group %d: %w", f.group.id, err)
		}
	} else if !r.stopped {
		r.flushed = append(r.flushed, f)
	}
	r.mu.Unlock()
	r.signal()
}

// stop answers everyone who waits.
func (r *Runner) stop() {
	r.mu.Lock()
	r.stopped = true
	calls, err := r.calls, r.stopError()
	r.calls, r.inbox, r.flushed = nil, nil, nil
	r.mu.Unlock()
	for _, c := range calls {
		c.reject(err)
	}
	for _, g := range r.loop.groups {
		g.failProposals(err)
	}
}
