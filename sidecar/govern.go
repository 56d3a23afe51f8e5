package sidecar

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/paxosgroup"
	"quorate/replication/catalog"
	"quorate/replication/entry"
	"quorate/replication/sequence"
	"quorate/sidecar/admin"
)

// How long a step may take before this region gives leadership to another.
const (
	promoteWithin = 10 * time.Second
	drainWithin   = 5 * time.Second
	closeWait     = 100 * time.Millisecond
	proveWithin   = 5 * time.Second
	handOverWait  = time.Second // transactions under way may end by themselves in a planned transfer
)

// govern moves the database between its roles. It alone runs SQL that does so.
func (se *session) govern(ctx context.Context) error {
	if err := se.await(ctx, func() bool { return se.stream != nil }); err != nil {
		return nil
	}
	se.mu.Lock()
	shut := se.shut
	se.mu.Unlock()
	if shut {
		// A former session closed the database, since it may hold what must not be
		// read. All our connections are open: nobody else gets in until that is
		// settled.
		if err := se.shutOut(ctx); err != nil {
			return endOf(ctx, err)
		}
	}
	if err := se.makeSynchronous(ctx); err != nil {
		// Commits may not wait for us: no more writes.
		if ctx.Err() == nil {
			err = errors.Join(err, se.closeFence(ctx, se.ctl))
		}
		return endOf(ctx, err)
	}
	// What is known to be chosen is learned first: whatever is decided below is
	// decided by all of it.
	known, _ := se.group.Chosen()
	if err := se.await(ctx, func() bool { return se.learned >= known }); err != nil {
		return nil
	}
	electable := false
	for {
		if se.ctl.IsClosed() { // a step that was given up took it along
			return errors.New("the control connection to PostgreSQL is closed")
		}
		statusChanged := se.group.StatusChanged()
		status := se.group.Status()
		se.mu.Lock()
		turned := upon(&se.turned)
		condemned := se.divergent
		leads := status.Role == paxosgroup.Leader && se.term.ballot == status.Ballot && se.term.incarnation == se.incarnation
		lineage := se.lineage()
		proposing := se.proposing == status.Ballot && !se.unproposed || !se.restart.IsZero()
		settled, unresolved, open := se.settled, se.unresolved(), se.open
		se.mu.Unlock()

		var err error
		switch {
		case condemned != "":
			return se.quarantine(ctx)
		case leads && proposing && open:
			// Leading: nothing to do until that changes.
		case leads && lineage:
			err = se.renew(ctx, status.Ballot)
		case !lineage && unresolved > 0:
			se.set(func() {
				se.condemn(fmt.Sprintf("%d transactions committed here were not chosen before another region led", unresolved))
			})
			continue
		case !lineage && (!settled || open):
			err = se.settle(ctx)
		case leads:
			err = se.promote(ctx, status.Ballot)
		}
		if err != nil {
			return endOf(ctx, err)
		}
		if ready := se.ready(); ready != electable {
			electable = ready
			se.group.SetElectable(ready)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-statusChanged:
		case <-turned:
		case r := <-se.requests:
			r.done <- r.do(ctx)
		}
	}
}

// ready reports whether this database could lead.
func (se *session) ready() bool {
	se.mu.Lock()
	defer se.mu.Unlock()
	return se.divergent == "" && !se.conflict && se.synchronous && (se.settled || se.lineage())
}

// makeSynchronous has every COMMIT wait for this sidecar and proves it by one
// that is seen to wait. Publication, slot and stream are there before it.
func (se *session) makeSynchronous(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := catalog.EnsureSynchronous(ctx, se.ctl, se.cfg.Postgres.ApplicationName); err != nil {
		return err
	}
	defer se.proof.Close(context.WithoutCancel(ctx))
	if _, err := se.proof.Exec(ctx, "SET synchronous_commit = on"); err != nil {
		return err
	}
	se.set(func() { se.held = true })
	var err error
	// The setting is in force only when the checkpointer has read it too, which no
	// other session can see: until then commits do not wait.
	for begun := time.Now(); ; {
		var waited bool
		if waited, err = se.proveOnce(ctx); err != nil || waited {
			break
		}
		if time.Since(begun) > proveWithin {
			err = errors.New("a test commit returned although nothing was confirmed: another standby confirms in our place, or synchronous_standby_names does not name us")
			break
		}
	}
	se.set(func() { se.held, se.synchronous = false, err == nil })
	if err != nil {
		return fmt.Errorf("prove that COMMIT waits: %w", err)
	}
	return nil
}

// proveOnce commits a bookkeeping message and reports whether that was seen to
// wait. It is then ended: having waited is all that was to be proved, and to be
// released it may need a leader.
func (se *session) proveOnce(ctx context.Context) (waited bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	pid := se.proof.PgConn().PID()
	released := make(chan error, 1)
	go func() {
		_, err := se.proof.Exec(ctx, "SELECT pg_logical_emit_message(true, $1, 'proof')", entry.LocalPrefix)
		released <- err
	}()
	for {
		select {
		case err := <-released:
			return false, err
		case <-time.After(2 * time.Millisecond):
		}
		blocked, err := catalog.Blocked(ctx, se.ctl, pid)
		if err == nil && blocked {
			_, err = se.ctl.Exec(ctx, "SELECT pg_terminate_backend($1::int)", pid)
		}
		if err != nil || blocked {
			cancel()
			<-released
			return blocked, err
		}
	}
}

// shutOut keeps clients out of the database and ends those that are in it.
func (se *session) shutOut(ctx context.Context) error {
	se.set(func() { se.shut = true })
	if err := se.db.refuseConnections(ctx); err != nil {
		return err
	}
	if _, err := catalog.TerminateClients(ctx, se.ctl); err != nil {
		return fmt.Errorf("end sessions: %w", err)
	}
	return nil
}

// letIn lets clients into the database again.
func (se *session) letIn(ctx context.Context) error {
	if err := se.db.allowConnections(ctx); err != nil {
		return err
	}
	se.set(func() { se.shut = false })
	return nil
}

// closeFence closes the fence by the newest ballot known.
func (se *session) closeFence(ctx context.Context, conn *pgx.Conn) error {
	fence, err := catalog.ReadFence(ctx, conn, mainShard)
	if err != nil {
		return err
	}
	b := paxosgroup.Ballot{Counter: uint64(fence.Counter), Replica: paxosgroup.ReplicaID(fence.Replica)}
	se.mu.Lock()
	if b.Less(se.term.ballot) {
		b = se.term.ballot
	}
	se.mu.Unlock()
	if err := catalog.CloseFence(ctx, conn, mainShard, int64(b.Counter), int64(b.Replica), closeWait); err != nil {
		return fmt.Errorf("close the fence: %w", err)
	}
	return nil
}

// settle closes the database after another region opened a term, and finds out
// whether it holds anything that is not effective. Only then is replay let in.
func (se *session) settle(ctx context.Context) error {
	se.mu.Lock()
	lost := se.open || se.unresolved() > 0
	se.state, se.settled = admin.StateDemoting, false
	se.proposing, se.restart = paxosgroup.Ballot{}, paxosgroup.Ballot{}
	se.turn()
	se.mu.Unlock()
	if lost {
		// The term was lost without a hand-over. Clients may wait in COMMIT for
		// what will never be effective; ending a waiter shows its rows to others,
		// so nobody is let read before it is known that there is none such.
		if err := se.shutOut(ctx); err != nil {
			return fmt.Errorf("settle: %w", err)
		}
	}
	if err := se.closeFence(ctx, se.ctl); err != nil {
		return fmt.Errorf("settle: %w", err)
	}
	if _, err := catalog.TerminateWriters(ctx, se.ctl); err != nil {
		return fmt.Errorf("settle: end writers: %w", err)
	}
	se.set(func() { se.open = false })
	end, err := se.nudge(ctx)
	if err != nil {
		return err
	}
	if err := se.await(ctx, func() bool { return se.captured >= end || se.divergent != "" }); err != nil {
		return err
	}
	se.mu.Lock()
	clean := se.divergent == "" && se.unresolved() == 0 && se.intact()
	se.mu.Unlock()
	if !clean {
		return nil // govern sees why
	}
	if se.cfg.Postgres.DefaultReadOnly {
		if err := catalog.SetReadOnlyDefault(ctx, se.ctl, true); err != nil {
			return err
		}
	}
	if err := se.letIn(ctx); err != nil {
		return err
	}
	se.mu.Lock()
	se.settled, se.state = true, admin.StateFollowing
	se.confirm()
	se.turn()
	se.mu.Unlock()
	return nil
}

// intact reports whether the server still has every effective commit of this
// incarnation; else it was restored or rolled back, and is condemned. The
// replication slot's position, read before the stream began, is part of what a
// roll-back takes along: every effective commit behind it must have been handed
// over again. It looks once a session, when all WAL there was has been captured;
// later commits come from the WAL themselves. The caller holds mu.
func (se *session) intact() bool {
	if !se.looking {
		return true
	}
	if se.flushed < se.redelivered || !se.own.allIn(se.redelivered, se.seen) {
		se.condemn(fmt.Sprintf("the server's WAL (up to %s when the sidecar connected) lacks effective commits of this database, the last of which ends at %s: it was restored or replaced", se.flushed, se.effectiveLSN))
		return false
	}
	se.looking, se.seen = false, nil
	return true
}

// nudge commits a bookkeeping message, so that the walsender tells of a position
// behind everything committed before. It returns one below that commit's end.
func (se *session) nudge(ctx context.Context) (entry.LSN, error) {
	var lsn entry.LSN
	err := se.ctl.QueryRow(ctx, "SELECT pg_logical_emit_message(true, $1, 'nudge')::text", entry.LocalPrefix).Scan(&lsn)
	if err != nil {
		return 0, fmt.Errorf("write a bookkeeping message: %w", err)
	}
	return lsn, nil
}

// renew goes on in a new term of this region's own, with no foreign one since
// the fence was opened: what was captured and not chosen is handed over again.
func (se *session) renew(ctx context.Context, ballot paxosgroup.Ballot) error {
	stepCtx, cancel := context.WithTimeout(ctx, promoteWithin)
	defer cancel()
	se.mu.Lock()
	opened, looking := se.term.slot, se.looking
	se.mu.Unlock()
	if looking {
		end, err := se.nudge(stepCtx)
		if err != nil {
			return err
		}
		if err := se.await(stepCtx, func() bool { return se.captured >= end || se.divergent != "" }); err != nil {
			return fmt.Errorf("capture everything up to %s: %w", end, err)
		}
	}
	se.mu.Lock()
	intact := se.divergent == "" && se.intact()
	se.mu.Unlock()
	if !intact {
		return nil // govern sees why
	}
	if err := se.await(stepCtx, func() bool { return se.applied >= opened }); err != nil {
		return fmt.Errorf("apply everything below slot %d: %w", opened, err)
	}
	if err := se.letIn(stepCtx); err != nil {
		return err
	}
	se.mu.Lock()
	open := se.open
	se.mu.Unlock()
	// A fence that is open stays as it is: to move it takes a lock that clients
	// hold who wait in COMMIT for just this term.
	if !open {
		if err := se.openFence(stepCtx, ballot); err != nil {
			return err
		}
	}
	se.mu.Lock()
	defer se.mu.Unlock()
	if se.term.ballot != ballot {
		return nil // deposed meanwhile: it is settled
	}
	if se.tracker == nil {
		se.tracker, se.sequences = sequence.NewTracker(), true
	}
	se.settled = false
	if se.unproposed || se.unresolved() > 0 {
		if se.proposedIn == ballot {
			// Some commits of this very term are proposed already: handed over
			// again they would be in it twice. In a new term it is known which are.
			se.group.Resign()
			return nil
		}
		se.restart = ballot
	} else {
		se.proposing = ballot
	}
	se.state = admin.StateLeading
	se.log.Info("leading again", "ballot", ballot.String())
	se.turn()
	return nil
}

// promote opens the database to writes in this region's term, after another's
// or for the first time. Everything below the opening entry is judged; nothing
// local is left that is not effective.
func (se *session) promote(ctx context.Context, ballot paxosgroup.Ballot) error {
	begun := time.Now()
	se.replay.SetPromoting(true)
	defer se.replay.SetPromoting(false)
	se.set(func() { se.state = admin.StatePromoting })
	stepCtx, cancel := context.WithTimeout(ctx, promoteWithin)
	defer cancel()
	still := func() bool {
		st := se.group.Status()
		return st.Role == paxosgroup.Leader && st.Ballot == ballot
	}
	var watch sync.WaitGroup
	watch.Go(func() { // a lost term ends the waiting below
		for {
			changed := se.group.StatusChanged()
			if !still() {
				cancel()
				return
			}
			select {
			case <-stepCtx.Done():
				return
			case <-changed:
			}
		}
	})
	err := se.openForWrites(stepCtx, ballot)
	cancel()
	watch.Wait()
	switch {
	case err == nil:
		se.log.Info("leading", "ballot", ballot.String(), "took", time.Since(begun))
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case !still():
		se.set(func() { se.state = admin.StateFollowing })
		return nil
	case errors.Is(err, context.DeadlineExceeded):
		se.log.Warn("could not open the database in time: leadership goes to another region", "err", err)
		se.group.Resign()
		se.set(func() { se.state = admin.StateFollowing })
		return nil
	}
	return err
}

func (se *session) openForWrites(ctx context.Context, ballot paxosgroup.Ballot) error {
	se.mu.Lock()
	opened := se.term.slot
	se.mu.Unlock()
	if err := se.await(ctx, func() bool { return se.applied >= opened }); err != nil {
		return fmt.Errorf("apply everything below slot %d: %w", opened, err)
	}
	leftOut, err := sequence.AdvancePastColumns(ctx, se.ctl)
	if err != nil {
		return err
	}
	if len(leftOut) > 0 {
		se.log.Warn("columns too large to be searched in time for values beyond their sequences' marks; an index on each would help", "columns", leftOut)
	}
	// The lease is what keeps two regions from being open at once; what it cannot
	// keep, terms do.
	for {
		changed := se.group.StatusChanged()
		if se.group.Status().LeaseUntil > se.now() {
			break
		}
		select {
		case <-changed:
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("wait for the lease: %w", ctx.Err())
		}
	}
	recorded, err := catalog.WriteOpening(ctx, se.ctl, mainShard, int64(ballot.Counter), int64(ballot.Replica))
	if err != nil {
		return err
	}
	o := opening{term: ballot, horizon: recorded.Horizon}
	if se.cfg.Postgres.DefaultReadOnly {
		if err := catalog.SetReadOnlyDefault(ctx, se.ctl, false); err != nil {
			return err
		}
	}
	// Captured commits are proposed from before the fence opens, and no image is
	// being taken as of a follower any more.
	if err := se.lockApplying(ctx); err != nil {
		return err
	}
	se.mu.Lock()
	if se.divergent != "" || se.unresolved() > 0 || se.term.ballot != ballot {
		se.mu.Unlock()
		se.unlockApplying()
		return nil // govern sees which
	}
	se.opened, se.proposing, se.unproposed, se.settled = o, ballot, false, false
	se.tracker, se.sequences = sequence.NewTracker(), true
	se.turn()
	se.mu.Unlock()
	se.unlockApplying()
	// Whoever has a transaction id by now has one below the horizon; sessions of a
	// follower get one by SELECT FOR UPDATE or a temporary table.
	_, err = catalog.TerminateWriters(ctx, se.ctl)
	if err == nil {
		err = se.openFence(ctx, ballot)
	}
	if err != nil {
		se.set(func() { se.proposing = paxosgroup.Ballot{} })
		return err
	}
	se.mu.Lock()
	defer se.mu.Unlock()
	if se.term.ballot == ballot {
		se.state = admin.StateLeading
	}
	se.turn()
	return nil
}

func (se *session) openFence(ctx context.Context, ballot paxosgroup.Ballot) error {
	if err := catalog.OpenFence(ctx, se.ctl, mainShard, int64(ballot.Counter), int64(ballot.Replica)); err != nil {
		return fmt.Errorf("open the fence: %w", err)
	}
	se.set(func() { se.open = true })
	return nil
}

// quarantine closes the database for good: nobody reads what will be discarded,
// and no waiter is ever told success.
func (se *session) quarantine(ctx context.Context) error {
	se.mu.Lock()
	why := se.divergent
	se.state, se.proposing, se.held = admin.StateRepairing, paxosgroup.Ballot{}, true
	se.turn()
	se.mu.Unlock()
	se.group.SetElectable(false)
	se.group.Resign()
	// From now on it is known, across restarts too, that nobody may get in.
	if err := se.member.markReplace(why); err != nil {
		return err
	}
	if err := se.shutOut(ctx); err != nil {
		return err
	}
	return errReplace
}

// handOver is a planned transfer: no new writes, what is under way becomes
// effective, then the other region opens its term.
func (se *session) handOver(ctx context.Context, to paxosgroup.ReplicaID) (time.Duration, error) {
	begun := time.Now()
	se.mu.Lock()
	ballot := se.proposing
	se.mu.Unlock()
	if ballot.IsZero() {
		return 0, &admin.NotLeaderError{Leader: se.leaderRegion()}
	}
	reopen := func(cause error) (time.Duration, error) {
		if st := se.group.Status(); st.Role == paxosgroup.Leader && st.Ballot == ballot {
			if err := se.openFence(ctx, ballot); err != nil {
				return 0, errors.Join(cause, err)
			}
			se.set(func() { se.state = admin.StateLeading })
		}
		return 0, cause
	}
	se.set(func() { se.state = admin.StateDemoting })
	if err := catalog.CloseFence(ctx, se.ctl, mainShard, int64(ballot.Counter), int64(ballot.Replica), handOverWait); err != nil {
		return reopen(fmt.Errorf("close the fence: %w", err))
	}
	se.set(func() { se.open, se.settled = false, false })
	drainCtx, cancel := context.WithTimeout(ctx, drainWithin)
	defer cancel()
	end, err := se.nudge(drainCtx)
	if err != nil {
		return reopen(err)
	}
	drained := func() bool {
		return se.captured >= end && se.unresolved() == 0 && (len(se.pending) == 0 || se.pending[0].lsn > end)
	}
	if err := se.await(drainCtx, drained); err != nil {
		return reopen(fmt.Errorf("what is under way does not become effective: %w", err))
	}
	if err := se.group.Transfer(drainCtx, to); err != nil {
		return reopen(fmt.Errorf("hand over: %w", err))
	}
	if err := se.await(drainCtx, func() bool { return ballot.Less(se.lastForeign) }); err != nil {
		return reopen(fmt.Errorf("the other region did not open its term: %w", err))
	}
	return time.Since(begun), nil
}
