package sidecar

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"quorate/paxosgroup"
	"quorate/replication/capture"
	"quorate/replication/catalog"
	"quorate/replication/entry"
	"quorate/replication/replay"
	"quorate/replication/sequence"
	"quorate/sidecar/admin"
)

// errBeginAgain ends a session whose database is not the one it was: what it is
// must be found out from the start.
var errBeginAgain = errors.New("the database is another one")

// errReplace ends a session whose database must be replaced by an image.
var errReplace = errors.New("the database must be replaced")

// endOf returns nil when ctx has ended, since then every error is its echo.
func endOf(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// session is one connectedness with the region's PostgreSQL: it opens at its
// start all connections it will ever need, and ends with the first that breaks.
// The acceptor, the log and the learner outlive it.
type session struct {
	*shard
	db          *database
	member      *membership
	done        chan struct{} // closed when the session has ended
	ctl         *pgx.Conn     // roles: fence, settings; used by govern only
	watch       *pgx.Conn     // watchdog
	samples     *pgx.Conn     // sequence samples
	face        *pgx.Conn     // what the SQL face shows
	position    *pgx.Conn     // the replication slot's
	proof       *pgx.Conn     // the test commit
	ddlKey      []byte        // of the database's DDL messages
	replay      *replay.Session
	start       time.Time // of the postmaster
	flushed     entry.LSN // at the session's start
	redelivered entry.LSN // from where the stream hands commits over, as the server had it at the session's start

	requests chan request // run by govern
}

// request is something govern is asked to do; done is closed after it ran.
type request struct {
	do   func(ctx context.Context) error
	done chan error
}

// runSession returns when the connection to PostgreSQL is lost, when the
// database must be replaced (errReplace) or looked at anew (errBeginAgain), or
// when ctx ends (nil).
func (s *shard) runSession(ctx context.Context, db *database, member *membership) (err error) {
	se := &session{shard: s, db: db, member: member, requests: make(chan request), done: make(chan struct{})}
	defer se.end()
	if err := se.connect(ctx); err != nil {
		return endOf(ctx, err)
	}
	sampler, err := sequence.NewSampler(ctx, se.samples)
	if err != nil {
		return endOf(ctx, err)
	}
	s.set(func() { s.session = se })
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return se.capture(ctx) })
	g.Go(func() error { return se.watchdog(ctx) })
	g.Go(func() error { return se.replayer(ctx) })
	g.Go(func() error { return s.sampler(ctx, sampler, se.visible) })
	g.Go(func() error { return se.publish(ctx) })
	g.Go(func() error { return se.trim(ctx) })
	g.Go(func() error { return se.govern(ctx) })
	return g.Wait()
}

// end leaves nothing of the session: nothing is proposed or confirmed any more,
// and a database that was to be kept shut is shut again, for the next session
// has to be let in.
func (se *session) end() {
	s := se.shard
	s.group.SetElectable(false)
	s.mu.Lock()
	shut := s.shut
	s.proposing, s.restart, s.settled, s.open, s.synchronous = paxosgroup.Ballot{}, paxosgroup.Ballot{}, false, false, false
	s.stream, s.session = nil, nil
	if se.replay != nil {
		s.progress = se.replay.Progress()
	}
	s.turn()
	s.mu.Unlock()
	close(se.done)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if shut {
		if err := se.db.refuseConnections(ctx); err != nil {
			s.log.Warn("the database could not be shut again", "err", err)
		}
	}
	for _, c := range []*pgx.Conn{se.ctl, se.watch, se.samples, se.face, se.position, se.proof} {
		if c != nil {
			c.Close(ctx)
		}
	}
	if se.replay != nil {
		se.replay.Close()
	}
}

// lockApplying waits for the batch under way and keeps the next from beginning.
func (s *shard) lockApplying(ctx context.Context) error {
	select {
	case s.applying <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for replay: %w", ctx.Err())
	}
}

func (s *shard) unlockApplying() { <-s.applying }

// visible reports whether every transaction up to xid that will ever be visible
// is. It runs on the sampler's connection, between samples.
func (se *session) visible(ctx context.Context, xid uint64) (bool, error) {
	var done bool
	err := se.samples.QueryRow(ctx, "SELECT pg_snapshot_xmin(pg_current_snapshot()) > $1::text::xid8", fmt.Sprint(xid)).Scan(&done)
	if err != nil {
		return false, fmt.Errorf("look whether transaction %d is visible: %w", xid, err)
	}
	return done, nil
}

// connect opens the connections and looks at where the database stands.
func (se *session) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	shut, err := se.db.openForSession(ctx)
	if err != nil {
		return err
	}
	if shut {
		se.set(func() { se.shut = true })
	}
	for name, c := range map[string]**pgx.Conn{"control": &se.ctl, "watchdog": &se.watch, "sequences": &se.samples, "status": &se.face, "position": &se.position, "proof": &se.proof} {
		if *c, err = se.db.connect(ctx, name); err != nil {
			return err
		}
	}
	if err := se.ctl.QueryRow(ctx, "SELECT pg_postmaster_start_time()").Scan(&se.start); err != nil {
		return err
	}
	state, err := se.db.readState(ctx, se.ctl)
	if err != nil {
		return err
	}
	se.ddlKey = state.ddlKey
	if state.incarnation != se.incarnation {
		return fmt.Errorf("%w: incarnation %s, not %s", errBeginAgain, state.incarnation, se.incarnation)
	}
	if se.redelivered, err = se.db.requireSlot(ctx, se.ctl, state); err != nil {
		if !errors.Is(err, errReplace) {
			return err
		}
		// What was committed without the slot is in no other region. Nobody reads
		// it, and nobody is left waiting for its confirmation, which would also
		// hold up the making of another slot.
		se.set(func() { se.condemn(err.Error()) })
		return se.quarantine(ctx)
	}
	if err := se.db.check(ctx, se.ctl, se.incarnationName(), se.warn); err != nil {
		return err
	}
	if se.flushed, err = se.db.flushLSN(ctx, se.ctl); err != nil {
		return err
	}
	fence, err := catalog.ReadFence(ctx, se.ctl, mainShard)
	if err != nil {
		return err
	}
	if se.replay, err = replay.Connect(ctx, replay.Config{
		ConnString: se.db.dsn, Origin: state.origin(), ApplicationName: se.db.name("replay"),
		LockTimeout: se.cfg.Replay.LockTimeout, MaxReaderDelay: se.cfg.Replay.MaxReaderDelay,
		DDL: func(ctx context.Context, conn *pgx.Conn, content []byte) error {
			return catalog.ReplayDDL(ctx, conn, content)
		}, Marks: sequence.Apply, Logger: se.log,
	}); err != nil {
		return err
	}
	se.set(func() {
		se.opened = state.opened
		se.open = fence.Open
		se.settled, se.looking, se.seen = false, true, nil
		// Sequences of a former term of this database may have handed out values
		// that only a session's end or a mark may let go.
		if !se.opened.term.IsZero() {
			se.sequences = true
		}
		se.state = admin.StateStarting
		se.health = ""
		se.standAt(paxosgroup.Slot(se.replay.Progress()))
	})
	se.mu.Lock()
	base, applied, floor := se.ground.Slot, se.applied, se.ground.Redelivered
	se.mu.Unlock()
	why := ""
	switch {
	case applied < base:
		why = fmt.Sprintf("the database stands at slot %d, and the log begins only after slot %d: it was restored", applied, base)
	case se.redelivered < floor:
		why = fmt.Sprintf("the replication slot stands at %s, and stood at %s before: the server was restored or replaced", se.redelivered, floor)
	}
	if why != "" {
		se.set(func() { se.condemn(why) })
		return se.quarantine(ctx)
	}
	return nil
}

// standAt takes note of the origin's progress, flushed, that a session begins
// with. The caller holds mu.
func (s *shard) standAt(progress paxosgroup.Slot) {
	// What lies between the progress and what was applied wrote nothing, or was
	// this incarnation's own, if the progress is what it was.
	if progress != paxosgroup.Slot(s.progress) || s.applied < progress {
		s.applied = progress
	}
	// A server that was put back to an earlier state meanwhile no longer has what
	// it had: neither this log nor another's may be cut by that.
	s.durable = min(s.durable, s.large.whole(progress))
}

// slotBusyMax bounds how long a new stream waits for the last one's walsender.
const slotBusyMax = 10 * time.Second

// capture runs streams, one after the other, until ctx ends or one breaks.
func (se *session) capture(ctx context.Context) error {
	authentic := func(content []byte) bool {
		ok := catalog.Authentic(se.ddlKey, content)
		if !ok {
			se.log.Warn("a client sent a message that claims to be DDL; it is ignored")
		}
		return ok
	}
	var busy time.Time // since when another walsender has held the slot
	for {
		stream, err := capture.Open(ctx, capture.Config{
			ConnString: se.db.dsn, ReplicationSlot: se.incarnationName(), Publication: catalog.DefaultPublication,
			ApplicationName: se.cfg.Postgres.ApplicationName, FragmentBytesMax: int(se.cfg.Capture.FragmentBytesMax),
			Handler: se, Authentic: authentic, Logger: se.log,
		})
		if isCode(err, "55006") && (busy.IsZero() || time.Since(busy) < slotBusyMax) {
			// Our last stream's walsender is still decoding and has not seen its end.
			if busy.IsZero() {
				busy = time.Now()
			}
			select {
			case <-time.After(50 * time.Millisecond):
				continue
			case <-ctx.Done():
				return nil
			}
		}
		if err != nil {
			return endOf(ctx, fmt.Errorf("capture: %w", err))
		}
		busy = time.Time{}
		se.startOver(stream)
		streamCtx, stop := context.WithCancel(ctx)
		g, streamCtx := errgroup.WithContext(streamCtx)
		g.Go(func() error { return stream.Run(streamCtx) })
		again := false // the stream's end was asked for
		g.Go(func() error {
			defer stop()
			if se.await(streamCtx, func() bool { return !se.restart.IsZero() }) == nil {
				again = true
			}
			return nil
		})
		err = g.Wait()
		stop()
		if ctx.Err() != nil {
			return nil
		}
		if !again {
			if err == nil {
				err = errors.New("the stream ended")
			}
			return fmt.Errorf("capture: %w", err)
		}
	}
}

func (s *shard) incarnationName() string { return instanceName(s.incarnation) }

// standing reports whether err holds a problem by which commits may be
// acknowledged that are not replicated, or lost. The others, such as walsenders
// that are all in use for a moment, matter only when a session begins.
func standing(err error) bool {
	var all interface{ Unwrap() []error }
	if !errors.As(err, &all) {
		return false
	}
	for _, e := range all.Unwrap() {
		var u *unfitError
		if errors.As(e, &u) {
			switch u.Name {
			case "other_databases", "subscriptions", "fsync", "full_page_writes", "privileges", "synchronous_standby_names", "replication_slot":
				return true
			}
		}
	}
	return false
}

func (se *session) warn(problem string) {
	se.log.Warn("the server is set up in a way to look at", "problem", problem)
}

// How often the watchdog looks whether the server answers, and whether it is
// still one that can carry the promises.
const (
	watchInterval = 500 * time.Millisecond
	checkEvery    = 20 // looks
)

// watchdog ends the session when the server does not answer, restarts, or is no
// longer set up so that COMMIT waits for us and for nothing else.
func (se *session) watchdog(ctx context.Context) error {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	// Whatever commits in a server that is unfit may not be waited for: no more
	// writes first.
	unfit := func(err error) error {
		return errors.Join(err, se.closeFence(ctx, se.watch))
	}
	impostors := 0
	for look := 1; ; look++ {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		queryCtx, cancel := context.WithTimeout(ctx, 2*time.Second)
		var start time.Time
		var standbys int
		err := se.watch.QueryRow(queryCtx, `SELECT pg_postmaster_start_time(), (SELECT count(*) FROM pg_stat_replication r WHERE application_name = $1
			AND NOT EXISTS (SELECT FROM pg_replication_slots s WHERE s.slot_name = $2 AND s.active_pid = r.pid))`,
			se.cfg.Postgres.ApplicationName, se.incarnationName()).Scan(&start, &standbys)
		var synchronous bool
		var foreign *catalog.ForeignStandbysError
		if err == nil {
			synchronous, err = catalog.IsSynchronous(queryCtx, se.watch, se.cfg.Postgres.ApplicationName)
		}
		cancel()
		se.mu.Lock()
		proved := se.synchronous
		se.mu.Unlock()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.As(err, &foreign) || err == nil && proved && !synchronous:
			return unfit(errors.Join(errors.New("synchronous_standby_names was changed: commits no longer wait for a quorum of regions"), err))
		case err != nil:
			return fmt.Errorf("PostgreSQL does not answer: %w", err)
		case !start.Equal(se.start):
			return errors.New("PostgreSQL was restarted")
		case standbys == 0:
			impostors = 0
		case impostors == 0:
			impostors++ // may be a stream of ours that is just beginning or ending
		default:
			return unfit(fmt.Errorf("another standby is named %q and confirms commits in the sidecar's place: end it and refuse it in pg_hba.conf", se.cfg.Postgres.ApplicationName))
		}
		if look%checkEvery != 0 {
			continue
		}
		checkCtx, cancel := context.WithTimeout(ctx, 10*time.Second)
		err = se.db.check(checkCtx, se.watch, se.incarnationName(), func(string) {})
		cancel()
		var problem *unfitError
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.As(err, &problem):
			if standing(err) {
				return unfit(err)
			}
		case err != nil:
			return err
		}
	}
}

// replayPace is the time from one batch to the next: a transaction is applied up
// to this much later than it could be, together with those that came meanwhile,
// which costs a fraction of applying each by itself.
const replayPace = 10 * time.Millisecond

// replayer applies foreign entries in log order, and counts what needs no
// applying: own entries are in this database already, and no-ops, void entries,
// openings, configurations and fragments write nothing.
func (se *session) replayer(ctx context.Context) error {
	se.mu.Lock()
	next := se.applied + 1
	se.mu.Unlock()
	var begun time.Time
	for {
		var hurry bool
		if err := se.await(ctx, func() bool {
			hurry = se.applied < se.term.slot // this region may be about to lead
			return se.learned >= next
		}); err != nil {
			return nil
		}
		if wait := replayPace - time.Since(begun); wait > 0 && !hurry {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return nil
			}
		}
		begun = time.Now()
		batch, err := se.group.Read(next, int(se.cfg.Replay.BatchBytesMax))
		if err != nil {
			return fmt.Errorf("replay: read slot %d: %w", next, err)
		}
		var work []replay.Transaction
		var incarnations []paxosgroup.Incarnation
		flush := func() error {
			if len(work) == 0 {
				return nil
			}
			for {
				if err := se.await(ctx, func() bool { return se.settled }); err != nil {
					return err
				}
				err := se.apply(ctx, work, incarnations)
				if errors.Is(err, errNotSettled) {
					continue
				}
				work, incarnations = nil, nil
				return err
			}
		}
		for _, d := range batch {
			se.mu.Lock()
			learned := se.learned
			se.mu.Unlock()
			if d.Slot > learned {
				break // chosen, but its term is not judged by the learner yet
			}
			next = d.Slot + 1
			tx, err := se.transaction(d)
			if err != nil {
				return err
			}
			if tx == nil {
				continue
			}
			// What DDL makes (an enum's value, say) may be of use only in later
			// transactions, as it was at its origin.
			alone := tx.Payload.Type == entry.TypeCommit || bytes.Contains(tx.Payload.Body, []byte(entry.DDLPrefix))
			if alone {
				if err := flush(); err != nil {
					return endOf(ctx, err)
				}
			}
			work = append(work, *tx)
			incarnations = append(incarnations, d.Entry.Incarnation)
			if alone {
				if err := flush(); err != nil {
					return endOf(ctx, err)
				}
			}
		}
		if err := flush(); err != nil {
			return endOf(ctx, err)
		}
		se.mu.Lock()
		se.applied = next - 1
		se.notify()
		se.mu.Unlock()
		se.group.SetApplied(next - 1)
	}
}

// apply commits a batch to the database.
func (se *session) apply(ctx context.Context, work []replay.Transaction, incarnations []paxosgroup.Incarnation) error {
	begun := time.Now()
	if err := se.lockApplying(ctx); err != nil {
		return err
	}
	defer se.unlockApplying()
	se.mu.Lock()
	settled := se.settled
	se.mu.Unlock()
	if !settled {
		// Promoted between the waiting and here: there is nothing foreign to apply
		// in a term of our own, unless the term is over already.
		return fmt.Errorf("replay slot %d: %w", work[0].Slot, errNotSettled)
	}
	if err := se.replay.Apply(ctx, work); err != nil {
		var conflict *replay.ConflictError
		if errors.As(err, &conflict) {
			se.set(func() { se.health, se.conflict = err.Error(), true })
			se.log.Error("replay stopped: this database does not hold what the log says", "slot", conflict.Slot, "err", err)
		}
		return fmt.Errorf("replay: %w", err)
	}
	se.mu.Lock()
	if se.conflict {
		se.conflict = false
		se.turn()
	}
	se.mu.Unlock()
	se.traceApply(work, incarnations, begun, time.Now())
	se.metrics.applied.Add(float64(len(work)))
	return nil
}

// transaction returns what replay has to do for an entry, or nil.
func (se *session) transaction(d paxosgroup.Delivered) (*replay.Transaction, error) {
	if d.Verdict != paxosgroup.Effective || d.Entry.Kind != paxosgroup.KindData || d.Entry.Incarnation == se.incarnation {
		return nil, nil
	}
	p, err := entry.Decode(d.Entry.Payload)
	if err != nil {
		return nil, fmt.Errorf("slot %d: %w", d.Slot, err)
	}
	if p.Type == entry.TypeFragment {
		return nil, nil
	}
	tx := &replay.Transaction{Slot: uint64(d.Slot), CommitTime: p.Header.CommitTime, Payload: p}
	if p.Type == entry.TypeCommit {
		tx.Fragments = func(yield func(body []byte) error) error {
			return fragments(se.group, d, p, yield)
		}
	}
	return tx, nil
}

// errNotSettled says that the database is not one to replay into at the moment.
var errNotSettled = errors.New("the database is not settled")

// logReader is what fragments needs of a group.
type logReader interface {
	Read(from paxosgroup.Slot, maxBytes int) ([]paxosgroup.Delivered, error)
}

// fragments yields the bodies of a large transaction in order, reading them back
// from the log: they stand before their commit entry, in the same term.
func fragments(log logReader, commit paxosgroup.Delivered, c entry.Payload, yield func(body []byte) error) error {
	ours := func(d paxosgroup.Delivered) (entry.Payload, bool, error) {
		if d.Entry.Kind != paxosgroup.KindData || d.Verdict != paxosgroup.Effective ||
			d.Entry.Incarnation != commit.Entry.Incarnation || d.Entry.Term != commit.Entry.Term {
			return entry.Payload{}, false, nil
		}
		p, err := entry.Decode(d.Entry.Payload)
		if err != nil {
			return p, false, fmt.Errorf("slot %d: %w", d.Slot, err)
		}
		return p, p.Type == entry.TypeFragment && p.Header.Xid == c.Header.Xid && p.Attempt == c.Attempt, nil
	}
	// Walk back to the first fragment. Numbers within a term are dense and other
	// entries are few, so it is near the commit's slot less the count.
	count := paxosgroup.Slot(c.Fragment)
	first := commit.Slot - min(count, commit.Slot-1)
	for {
		ds, err := log.Read(first, 1)
		if err != nil {
			return fmt.Errorf("fragments of slot %d: %w", commit.Slot, err)
		}
		p, is, err := ours(ds[0])
		if err != nil {
			return err
		}
		if is && p.Fragment == 1 {
			break
		}
		if first == 1 || is && p.Fragment == 0 {
			return fmt.Errorf("fragments of slot %d: the first of %d is not in the log", commit.Slot, c.Fragment)
		}
		first--
	}
	next := uint32(1)
	for slot := first; slot < commit.Slot; {
		ds, err := log.Read(slot, 4<<20)
		if err != nil {
			return fmt.Errorf("fragments of slot %d: %w", commit.Slot, err)
		}
		for _, d := range ds {
			if d.Slot >= commit.Slot {
				break
			}
			slot = d.Slot + 1
			p, is, err := ours(d)
			if err != nil {
				return err
			}
			if !is {
				continue
			}
			if p.Fragment != next {
				return fmt.Errorf("fragments of slot %d: slot %d holds fragment %d instead of %d", commit.Slot, d.Slot, p.Fragment, next)
			}
			next++
			if err := yield(p.Body); err != nil {
				return err
			}
		}
	}
	if next-1 != c.Fragment {
		return fmt.Errorf("fragments of slot %d: %d of %d are in the log", commit.Slot, next-1, c.Fragment)
	}
	return nil
}
