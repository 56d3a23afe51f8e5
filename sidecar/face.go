package sidecar

import (
	"context"
	"errors"
	"fmt"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/runner"
	"quorate/replication/catalog"
	"quorate/replication/entry"
	"quorate/sidecar/admin"
)

// publish keeps the SQL face true to about a second: what the regions are, and
// the newest part of the log, packed into one row each time. It is all that the
// log costs this database.
func (se *session) publish(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var next paxosgroup.Slot
	for {
		se.mu.Lock()
		leader := se.leaderLocked()
		turned := upon(&se.turned)
		se.mu.Unlock()
		if err := se.publishOnce(ctx, &next); err != nil {
			return endOf(ctx, err)
		}
		// A change of leader is told at once: it is in the hint of every refusal.
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
				waiting = false
			case <-turned:
				se.mu.Lock()
				turned = upon(&se.turned)
				waiting = se.leaderLocked() == leader
				se.mu.Unlock()
			}
		}
	}
}

func (s *shard) leaderLocked() string { return s.term.region }

func (s *shard) leaderRegion() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leaderLocked()
}

func (se *session) publishOnce(ctx context.Context, next *paxosgroup.Slot) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	status, err := se.others.Status(ctx, true)
	if err != nil {
		return err
	}
	own := status.Own()
	state := catalog.State{
		Shard: mainShard, Region: own.Name, Role: own.Role, Leader: status.Leader, Ballot: own.Ballot.String(),
		LeaseLeftSeconds: own.LeaseLeft.Seconds(), Chosen: uint64(own.Chosen), Applied: uint64(own.Applied),
		LagSlots: own.LagSlots, LagSeconds: own.Lag.Seconds(), Health: own.Health,
		DurabilityRegions: status.DurabilityRegions, Phase1Quorum: status.Phase1, Phase2Quorum: status.Phase2,
	}
	se.mu.Lock()
	state.Synchronous = se.synchronous
	se.mu.Unlock()
	for _, r := range status.Regions {
		region := catalog.RegionState{
			Region: r.Name, Kind: r.Kind, Role: r.Role, Chosen: uint64(r.Chosen), Applied: uint64(r.Applied),
			LagSlots: r.LagSlots, LagSeconds: r.Lag.Seconds(), Health: r.Health,
		}
		if region.Kind == "" { // never heard of
			c, _ := configured(se.cfg, r.Name)
			region.Kind = c.Kind
		}
		if r.Reachable {
			now := time.Now()
			region.LastHeard = &now
		}
		state.Regions = append(state.Regions, region)
	}
	if err := catalog.Publish(ctx, se.face, state); err != nil {
		return err
	}
	if *next == 0 {
		var last int64
		if err := se.face.QueryRow(ctx, "SELECT coalesce(max(last_slot), 0) FROM quorate.log_batch WHERE shard = $1", mainShard).Scan(&last); err != nil {
			return fmt.Errorf("transaction log: find its end: %w", err)
		}
		*next = max(paxosgroup.Slot(last), se.group.Status().Base) + 1
		// After a crash the table is empty; what is old anyway is not filled in.
		if chosen, _ := se.group.Chosen(); chosen > logRowsMax && *next < chosen-logRowsMax {
			*next = chosen - logRowsMax
		}
	}
	rows, err := se.logRows(next)
	if err != nil {
		return err
	}
	if len(rows) == 0 {
		return nil
	}
	if err := catalog.AppendLog(ctx, se.face, mainShard, rows); err != nil {
		return err
	}
	_, err = catalog.PruneLog(ctx, se.face, se.cfg.TransactionLog.MaxAge, int64(se.cfg.TransactionLog.MaxBytes))
	return err
}

// logRowsMax bounds how many transactions go into one packed row.
const logRowsMax = 20_000

// logRows reads what the learner has judged from *next on and moves *next.
func (se *session) logRows(next *paxosgroup.Slot) ([]catalog.LogRow, error) {
	se.mu.Lock()
	learned := se.learned
	se.mu.Unlock()
	var rows []catalog.LogRow
	for *next <= learned && len(rows) < logRowsMax {
		batch, err := se.group.Read(*next, 4<<20)
		if errors.Is(err, runner.ErrCompacted) { // cut before it could be shown
			*next = se.group.Status().Base + 1
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("transaction log: read slot %d: %w", *next, err)
		}
		for _, d := range batch {
			if d.Slot > learned {
				break
			}
			*next = d.Slot + 1
			e, err := readable(d, se.group, se.relations, false)
			if err != nil {
				se.log.Error("an entry is not in quorate.log, since it cannot be read", "slot", d.Slot, "err", err)
				continue
			}
			if !e.Effective || e.Kind != "transaction" && e.Kind != "commit" {
				continue
			}
			row := catalog.LogRow{Slot: uint64(e.Slot), Transaction: e.Xid, Time: e.Time, Region: e.Region, Bytes: e.Bytes, Trace: e.Trace}
			for _, t := range e.Tables {
				row.Tables = append(row.Tables, t.Table)
				row.Rows += t.Rows
			}
			rows = append(rows, row)
		}
	}
	return rows, nil
}

// readable puts an entry of the log into words.
func readable(d paxosgroup.Delivered, log logReader, relations *entry.RelationCache, changes bool) (admin.LogEntry, error) {
	e := admin.LogEntry{
		Slot: d.Slot, Kind: d.Entry.Kind.String(), Term: d.Entry.Term, Number: d.Entry.Number, Region: d.Entry.Region,
		Incarnation: d.Entry.Incarnation, Effective: d.Verdict == paxosgroup.Effective, Bytes: uint64(len(d.Entry.Payload)),
	}
	switch d.Entry.Kind {
	case paxosgroup.KindConfig:
		m, err := paxosgroup.DecodeMembership(d.Entry.Payload)
		if err != nil {
			return e, fmt.Errorf("slot %d: %w", d.Slot, err)
		}
		for _, member := range m.Members {
			e.Detail += fmt.Sprintf("%s=%d(%s) ", member.Region, member.ID, memberKind(member.Kind))
		}
		return e, nil
	case paxosgroup.KindData:
	default:
		return e, nil
	}
	p, err := entry.Decode(d.Entry.Payload)
	if err != nil {
		return e, fmt.Errorf("slot %d: %w", d.Slot, err)
	}
	e.Xid, e.EndLSN = p.Header.Xid, p.Header.EndLSN
	if !p.Header.CommitTime.IsZero() {
		e.Time = p.Header.CommitTime
	}
	if p.Header.Trace != (entry.Trace{}) {
		e.Trace = fmt.Sprintf("%x", p.Header.Trace.TraceID)
	}
	switch p.Type {
	case entry.TypeMarks:
		e.Kind = "marks"
		for _, m := range p.Marks {
			e.Detail += fmt.Sprintf("%s.%s=%d ", m.Schema, m.Name, m.Value)
		}
		return e, nil
	case entry.TypeFragment:
		e.Kind = "fragment"
		e.Detail = fmt.Sprintf("fragment %d of attempt %d", p.Fragment, p.Attempt)
		return e, nil
	case entry.TypeCommit:
		e.Kind = "commit"
		e.Detail = fmt.Sprintf("%d fragments", p.Fragment)
	case entry.TypeTransaction:
		e.Kind = "transaction"
	}
	r := entry.NewReader(relations)
	var totals entry.Totals
	body := func(b []byte) error {
		r.Feed(b)
		for {
			c, ok, err := r.Next()
			if err != nil || !ok {
				return err
			}
			totals.Add(&c)
			if changes {
				e.Changes = append(e.Changes, string(c.AppendJSON(nil)))
			}
		}
	}
	if p.Type == entry.TypeTransaction {
		err = body(p.Body)
	} else if e.Effective {
		err = fragments(log, d, p, body)
		e.Bytes = p.Header.BodyBytes
	}
	if err != nil {
		return e, fmt.Errorf("slot %d: %w", d.Slot, err)
	}
	for _, t := range totals.Tables {
		e.Tables = append(e.Tables, admin.TableRows{Table: t.Schema + "." + t.Name, Rows: t.Inserts + t.Updates + t.Deletes})
	}
	return e, nil
}

func memberKind(k paxosgroup.MemberKind) string {
	switch k {
	case paxosgroup.Voter:
		return "voter"
	case paxosgroup.Witness:
		return "witness"
	case paxosgroup.Learner:
		return "learner"
	}
	return "unknown"
}
