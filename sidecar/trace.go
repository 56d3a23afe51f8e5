package sidecar

import (
	"context"
	"time"

	"quorate/paxosgroup"
	"quorate/replication/entry"
	"quorate/replication/replay"
	"quorate/tracing"
)

// stamps are when a commit passed the stages of its way; the commit path takes
// them, and spans are made of them afterwards.
type stamps struct {
	begun    time.Time // capture met its BEGIN
	captured time.Time // its payload was complete
	proposed time.Time // the proposal was taken
	chosen   time.Time // learned to be effective
}

// commitSpans is a released commit whose spans are to be made.
type commitSpans struct {
	commit   tracing.Commit
	at       stamps
	released time.Time
}

// spansMax bounds the released commits that wait for their spans to be made;
// more are dropped.
const spansMax = 4096

func (s *shard) traced(inc paxosgroup.Incarnation, slot paxosgroup.Slot, term paxosgroup.Ballot, h entry.Header) tracing.Commit {
	return tracing.Commit{
		Incarnation: uint64(inc), EndLSN: h.EndLSN, Client: h.Trace, Group: uint32(mainGroup), Slot: uint64(slot),
		BallotCounter: term.Counter, BallotReplica: uint32(term.Replica),
	}
}

// stampChosen notes that a commit was just learned to be effective. The caller
// holds mu. A commit that is learned before its proposal returned has no such
// stamp, and its trace no span of waiting.
func (s *shard) stampChosen(lsn entry.LSN) {
	for i := range s.pending {
		if p := &s.pending[i]; p.commit && p.lsn == lsn {
			if p.stamps != nil {
				p.stamps.chosen = time.Now()
			}
			return
		}
	}
}

// released queues the spans of a confirmed commit. The caller holds mu.
func (s *shard) released(p *pendingPosition, now time.Time) {
	if s.tracer == nil || p.stamps == nil {
		return
	}
	slot, _ := s.own.slotAt(p.lsn)
	select {
	case s.spans <- commitSpans{commit: s.traced(s.incarnation, slot, s.term.ballot, p.header), at: *p.stamps, released: now}:
	default:
	}
}

// acceptedEntry is an entry that this region accepted, with when it did.
type acceptedEntry struct {
	entry                      paxosgroup.SlotEntry
	stepped, appended, flushed time.Time
}

// noteAccepted queues the spans of an entry that this region accepted and
// flushed. The runner calls it on the log's goroutine.
func (s *shard) noteAccepted(_ paxosgroup.GroupID, e paxosgroup.SlotEntry, stepped, appended, flushed time.Time) {
	if e.Entry.Kind != paxosgroup.KindData {
		return
	}
	select {
	case s.accepted <- acceptedEntry{e, stepped, appended, flushed}:
	default:
	}
}

// makeSpans makes the spans of what is queued until ctx ends.
func (s *shard) makeSpans(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case a := <-s.accepted:
			p, err := entry.Decode(a.entry.Entry.Payload)
			if err != nil || p.Type != entry.TypeTransaction && p.Type != entry.TypeCommit {
				continue
			}
			c := s.traced(a.entry.Entry.Incarnation, a.entry.Slot, a.entry.Entry.Term, p.Header)
			s.tracer.Span(c, tracing.Accept, tracing.Interval{Start: a.stepped, End: a.flushed}, nil)
			s.tracer.Span(c, tracing.Flush, tracing.Interval{Start: a.appended, End: a.flushed}, nil)
		case c := <-s.spans:
			span := func(stage tracing.Stage, from, to time.Time) {
				if !from.IsZero() && !to.IsZero() {
					s.tracer.Span(c.commit, stage, tracing.Interval{Start: from, End: to}, nil)
				}
			}
			span(tracing.Capture, c.at.begun, c.at.captured)
			span(tracing.Propose, c.at.captured, c.at.proposed)
			span(tracing.Chosen, c.at.proposed, c.at.chosen)
			span(tracing.Release, c.at.chosen, c.released)
			span(tracing.Committed, c.at.begun, c.released)
		}
	}
}

// traceApply makes the spans of a batch that replay has committed.
func (s *shard) traceApply(work []replay.Transaction, incarnations []paxosgroup.Incarnation, begun, done time.Time) {
	if s.tracer == nil {
		return
	}
	for i, tx := range work {
		if tx.Payload.Type == entry.TypeMarks {
			continue
		}
		s.tracer.Span(s.traced(incarnations[i], paxosgroup.Slot(tx.Slot), paxosgroup.Ballot{}, tx.Payload.Header),
			tracing.Apply, tracing.Interval{Start: begun, End: done}, nil)
	}
}
