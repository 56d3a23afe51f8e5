package runner

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/peer"
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

// BatchBuckets is how many sizes of batches Stats tells apart.
const BatchBuckets = 12

// Stats counts since New.
type Stats struct {
	Dropped     uint64               // messages that met a full inbox
	Unknown     uint64               // messages for groups that are not here
	Refused     uint64               // messages that a core would not take
	Batches     uint64               // sets of records handed to the log that needed a flush
	Delivered   uint64               // entries
	BatchSizes  [BatchBuckets]uint64 // of sets of records that accept entries: bucket i counts those of at most 1<<i entries, the last also larger ones
	Accepted    uint64               // entries in them
	Unstored    uint64               // messages not taken because the log was full or crowded, or the group had failed
	MissedTimes uint64               // the wall clock was found ahead of the boot clock
}

// Runner drives groups. Its methods may be called from any goroutine.
//
// Whoever brings work (a transport with messages, the log with what it has
// flushed, a proposer) leaves it in a queue, and does it himself if nobody holds
// the engine at that moment; else the one who holds it does it, and hands the
// engine to Run's goroutine if there is more than a round of it. So a message
// that meets a runner at rest is answered on the goroutine that brought it, and
// under load work gathers into rounds. (Hendler, Incze, Shavit and Tzafrir,
// "Flat combining", SPAA 2010.)
type Runner struct {
	cfg   Config
	wake  chan struct{} // holds a token when Run's goroutine has to look
	timer *time.Timer

	groups atomic.Pointer[map[paxosgroup.GroupID]*Group]

	mu       sync.Mutex
	released sync.Cond // busy has become false
	queue    queue
	busy     bool // somebody holds the engine
	handed   bool // it is for Run's goroutine to hold it, which has not noticed yet
	resting  bool // as the engine was left: nothing is with the log
	stopped  bool
	failure  error // of the log
	stats    Stats // as the engine was left
	dropped  uint64

	// Of who holds the engine.
	engine  *Engine
	spare   queue
	now     paxosgroup.Instant
	stepped time.Time // wall clock at the beginning of the step under way
	stale   []*Group  // whose Status is to be published anew
	armed   paxosgroup.Instant
}

// queue is what waits for the engine.
type queue struct {
	inbox      []peer.GroupMessage
	inboxBytes int
	done       []done
	calls      []call
	due        bool // a deadline has come
}

func (q *queue) empty() bool {
	return len(q.inbox) == 0 && len(q.done) == 0 && len(q.calls) == 0 && !q.due
}

// call is something to be done with the engine held: a proposal, or do.
type call struct {
	group    *EngineGroup
	proposal *Proposal
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
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	for cfg.Life == 0 {
		cfg.Life = drawLife()
	}
	r := &Runner{cfg: cfg, wake: make(chan struct{}, 1), timer: time.NewTimer(time.Hour), armed: never}
	r.timer.Stop()
	r.released.L = &r.mu
	r.busy, r.queue.due = true, true // until Run
	groups := make(map[paxosgroup.GroupID]*Group)
	r.groups.Store(&groups)

	ecfg := cfg
	ecfg.Groups = nil
	if cfg.Accepted != nil {
		ecfg.Log = tracedLog{cfg.Log, r}
	}
	var err error
	r.engine, err = newEngine(&Engine{
		cfg:     ecfg,
		durable: r.durable,
		settled: func(g *EngineGroup) { g.shell.publish(r.now) },
		moved:   func(g *EngineGroup) { g.shell.moved() },
	}, cfg.Clock())
	if err != nil {
		return nil, err
	}
	r.engine.place(cfg.Groups)
	for _, gc := range cfg.Groups {
		if groups[gc.Core.Group] != nil {
			return nil, fmt.Errorf("runner: group %d is configured twice", gc.Core.Group)
		}
		g, err := r.newGroup(gc)
		if err != nil {
			return nil, err
		}
		if err := r.engine.admit(g.engine); err != nil {
			return nil, err
		}
		groups[g.id] = g
	}
	return r, nil
}

// newGroup restores a group, which the engine has yet to admit.
func (r *Runner) newGroup(gc GroupConfig) (*Group, error) {
	now := r.cfg.Clock()
	g := &Group{runner: r, id: gc.Core.Group}
	eg, err := r.engine.newGroup(now, gc, &g.mu)
	if err != nil {
		return nil, err
	}
	eg.shell = g
	g.engine, g.lease = eg, eg.lease
	g.publish(now)
	return g, nil
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
	err = r.ask(ctx, func(paxosgroup.Instant) error {
		if err := r.engine.admit(g.engine); err != nil {
			return err
		}
		groups := maps.Clone(*r.groups.Load())
		groups[g.id] = g
		r.groups.Store(&groups)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return g, nil
}

// Deliver takes messages from a peer. It does not block, but may do what there
// is to do about them.
func (r *Runner) Deliver(_ paxosgroup.ReplicaID, batch []peer.GroupMessage) {
	size := 0
	for i := range batch {
		size += batch[i].Weight()
	}
	r.mu.Lock()
	q := &r.queue
	if r.stopped || q.inboxBytes > 0 && q.inboxBytes+size > r.cfg.InboxBytesMax {
		r.dropped += uint64(len(batch))
		r.mu.Unlock()
		return
	}
	q.inbox = append(q.inbox, batch...)
	q.inboxBytes += size
	r.left(true)
}

// propose queues a proposal. A proposer does the work himself if nothing is on
// its way to the disk. Else it is done when the log has called back, or after
// gatherTime: those that come meanwhile are done together.
func (r *Runner) propose(g *EngineGroup, p *Proposal) {
	r.mu.Lock()
	if !r.stopped && !r.busy && !r.resting {
		r.queue.calls = append(r.queue.calls, call{group: g, proposal: p})
		r.mu.Unlock()
		return
	}
	r.submit(call{group: g, proposal: p}, r.resting)
}

// submit queues a call. Called with mu held, which it releases.
func (r *Runner) submit(c call, inline bool) {
	if r.stopped {
		err := r.stopError()
		r.mu.Unlock()
		c.reject(err)
		return
	}
	r.queue.calls = append(r.queue.calls, c)
	r.left(inline)
}

// left has somebody look at what was left in the queue: the caller, if nobody
// holds the engine and inline says so. Called with mu held, which it releases.
func (r *Runner) left(inline bool) {
	if r.busy {
		r.mu.Unlock() // the holder looks once more before he lets go
		return
	}
	r.busy = true
	if inline {
		r.mu.Unlock()
		r.work(1)
		return
	}
	r.hand()
}

// hand gives the engine to Run's goroutine. Called with mu held by the holder of
// the engine; releases mu.
func (r *Runner) hand() {
	r.handed = true
	r.mu.Unlock()
	r.signal()
}

func (r *Runner) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// ask has something done with the engine held and waits for its answer.
func (r *Runner) ask(ctx context.Context, do func(now paxosgroup.Instant) error) error {
	answer := make(chan error, 1)
	r.mu.Lock()
	r.submit(call{
		do:   func(now paxosgroup.Instant) { answer <- do(now) },
		fail: func(err error) { answer <- err },
	}, false)
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// tell has something done with the engine held, in order with what else is asked.
func (r *Runner) tell(do func(now paxosgroup.Instant)) {
	r.mu.Lock()
	r.submit(call{do: do, fail: func(error) {}}, false)
}

// durable is told by the log, on its goroutine, what became of an Append. The
// log's goroutine goes on with it only if the log has nothing else to do.
func (r *Runner) durable(d done) {
	r.mu.Lock()
	if r.stopped {
		r.mu.Unlock()
		return
	}
	r.queue.done = append(r.queue.done, d)
	r.left(r.engine.withLog.Load() == int64(len(r.queue.done)))
}

// stopError says why nothing is done any more. Called with mu held.
func (r *Runner) stopError() error {
	if r.failure != nil {
		return fmt.Errorf("%w: %w", ErrStopped, r.failure)
	}
	return ErrStopped
}

// Stats returns the counters.
func (r *Runner) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.stats
	s.Dropped = r.dropped
	return s
}

// Run drives the groups until ctx ends or the log fails, which it returns; of a
// log in several parts, until those of all groups have. It may be called once. When it returns, nobody holds the engine or will.
func (r *Runner) Run(ctx context.Context) error {
	defer r.stop()
	r.mu.Lock()
	r.hand() // New kept it
	for {
		due := false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-r.timer.C:
			due = true
		case <-r.wake:
			// Whoever can run may bring more, to be done in the same round.
			runtime.Gosched()
		}
		r.mu.Lock()
		if due {
			r.queue.due = true
		}
		mine := r.handed || due && !r.busy
		if mine {
			r.busy, r.handed = true, false
		}
		r.mu.Unlock()
		if mine {
			r.work(roundsMax)
		}
		r.mu.Lock()
		err := r.failure
		r.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// roundsMax is how many rounds Run's goroutine does before it looks whether it
// is to end.
const roundsMax = 16

// work does what is queued, up to a number of rounds. The caller holds the
// engine, and does no longer when it returns.
func (r *Runner) work(rounds int) {
	for n := 0; ; n++ {
		r.mu.Lock()
		if r.stopped || r.failure != nil || r.queue.empty() {
			r.release()
			return
		}
		if n == rounds {
			r.hand()
			return
		}
		q := r.queue
		r.queue = r.spare
		r.mu.Unlock()
		err := r.step(&q)
		clear(q.inbox)
		clear(q.done)
		clear(q.calls)
		r.spare = queue{inbox: q.inbox[:0], done: q.done[:0], calls: q.calls[:0]}
		if err != nil {
			r.mu.Lock()
			r.failure = err
			r.release()
			r.signal()
			return
		}
	}
}

// release lets go of the engine. Called with mu held, which it releases.
func (r *Runner) release() {
	r.busy = false
	r.resting = r.engine.withLog.Load() == 0
	r.stats = r.engine.Stats()
	r.released.Broadcast()
	r.mu.Unlock()
}

// step is a round: it does what is in q and everything that is due.
func (r *Runner) step(q *queue) error {
	e := r.engine
	// Not before the inbox was taken: a lease is granted from receipt, and a
	// pause between the two would let it end before the leader thinks.
	r.now = r.cfg.Clock()
	r.stepped = time.Now()
	e.Wall(r.now, r.stepped)
	e.done = append(e.done, q.done...)
	e.Deliver(r.now, 0, q.inbox)
	for _, c := range q.calls {
		if c.proposal != nil {
			c.group.Propose(c.proposal)
		} else {
			c.do(r.now)
		}
	}
	if err := e.Step(r.now); err != nil {
		return err
	}
	if q.due {
		r.armed = never // it has rung
	}
	next, ok := e.Deadline()
	if !ok {
		next = never
	}
	next = min(next, r.publishStale())
	if e.withLog.Load() > 0 {
		next = min(next, r.now.Add(gatherTime)) // see propose
	}
	if next < r.armed {
		// One that is set too early rings for nothing and is set anew.
		r.armed = next
		r.timer.Reset(max(0, next.Sub(r.now)))
	}
	return nil
}

// publishStale publishes the progress of those who have not for long enough, and
// returns when the next are due.
func (r *Runner) publishStale() paxosgroup.Instant {
	next, kept := never, r.stale[:0]
	for _, g := range r.stale {
		if !g.stale {
			continue
		}
		if due := g.publishedAt.Add(statusAgeMax); due > r.now {
			next, kept = min(next, due), append(kept, g)
			continue
		}
		g.publish(r.now)
	}
	clear(r.stale[len(kept):])
	r.stale = kept
	return next
}

// stop answers everyone who waits.
func (r *Runner) stop() {
	r.mu.Lock()
	r.stopped = true
	for r.busy && !r.handed {
		r.released.Wait()
	}
	r.busy, r.handed = true, false // for ever
	calls, err := r.queue.calls, r.stopError()
	r.queue = queue{}
	r.mu.Unlock()
	r.timer.Stop()
	for _, c := range calls {
		c.reject(err)
	}
	for _, g := range r.engine.order {
		g.failProposals(err)
		g.failReads(err)
	}
}

// tracedLog tells Config.Accepted what becomes of accepted entries.
type tracedLog struct {
	Log
	runner *Runner
}

func (l tracedLog) Append(g paxosgroup.GroupID, recs []paxosgroup.Record, durable func(error)) {
	stepped, appended := l.runner.stepped, time.Now()
	var accepted []paxosgroup.SlotEntry
	for i := range recs {
		if recs[i].Kind == paxosgroup.RecordAccept {
			accepted = append(accepted, paxosgroup.SlotEntry{Slot: recs[i].Slot, Entry: recs[i].Entry})
		}
	}
	l.Log.Append(g, recs, func(err error) {
		flushed := time.Now()
		durable(err)
		if err != nil {
			return
		}
		for _, e := range accepted {
			l.runner.cfg.Accepted(g, e, stepped, appended, flushed)
		}
	})
}
