package runner

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/peer"
)

// heldLog is a Log whose flush ends when the test says so.
type heldLog struct {
	callbacks []func(error)
	slots     []paxosgroup.Slot // accepted
	crowded   bool
}

func (l *heldLog) Crowded(paxosgroup.GroupID) bool { return l.crowded }

func (l *heldLog) Append(_ paxosgroup.GroupID, recs []paxosgroup.Record, durable func(error)) {
	for _, r := range recs {
		if r.Kind == paxosgroup.RecordAccept {
			l.slots = append(l.slots, r.Slot)
		}
	}
	l.callbacks = append(l.callbacks, durable)
}

func (l *heldLog) Group(paxosgroup.GroupID) paxosgroup.Storage { return noStorage{} }

func (l *heldLog) flush() {
	callbacks := l.callbacks
	l.callbacks = nil
	for _, durable := range callbacks {
		durable(nil)
	}
}

type noStorage struct{}

func (noStorage) Chosen(_, _ paxosgroup.Slot, _ int) ([]paxosgroup.SlotEntry, error) {
	return nil, errors.New("nothing is kept")
}

type noTransport struct{}

func (noTransport) Send(paxosgroup.GroupID, []paxosgroup.Message) {}

// bench is an engine with one group of one replica, which leads.
type bench struct {
	t      *testing.T
	now    paxosgroup.Instant
	log    heldLog
	engine *Engine
	group  *EngineGroup
}

func newBench(t *testing.T, configure func(*GroupConfig)) *bench {
	b := &bench{t: t, now: paxosgroup.Instant(time.Hour)}
	gc := GroupConfig{
		Core:      paxosgroup.Config{Group: 1, ID: 1, Region: "a", Seed: 1},
		Bootstrap: paxosgroup.Membership{Members: []paxosgroup.Member{{ID: 1, Region: "a", Kind: paxosgroup.Voter}}, NextID: 2},
	}
	if configure != nil {
		configure(&gc)
	}
	var err error
	b.engine, err = NewEngine(Config{Log: &b.log, Transport: noTransport{}, Groups: []GroupConfig{gc}}, b.now)
	if err != nil {
		t.Fatal(err)
	}
	b.group = b.engine.Group(1)
	for range 1000 {
		b.pass(10 * time.Millisecond)
		b.log.flush()
		if s := b.group.Status(); s.Role == paxosgroup.Leader && s.Chosen == s.LastSlot {
			b.pass(0)
			b.log.flush()
			b.pass(0)
			b.log.slots = nil
			return b
		}
	}
	t.Fatal("it does not lead")
	return nil
}

// pass lets time pass and does what is due.
func (b *bench) pass(d time.Duration) {
	b.t.Helper()
	b.now = b.now.Add(d)
	if err := b.engine.Step(b.now); err != nil {
		b.t.Fatal(err)
	}
}

// propose hands in a proposal, whose answer appears in what it returns.
func (b *bench) propose() *[]error {
	answers := new([]error)
	b.group.Propose(&Proposal{Payload: []byte("x"), Answered: func(p *Proposal) { *answers = append(*answers, p.Err) }})
	return answers
}

func TestProposalsGatherDuringAFlush(t *testing.T) {
	b := newBench(t, nil)
	first := b.propose()
	b.pass(0)
	if len(*first) != 1 || len(b.log.slots) != 1 {
		t.Fatalf("at rest a proposal waits: answers %v, slots %v", *first, b.log.slots)
	}
	second := b.propose()
	b.pass(0)
	b.pass(gatherTime / 2)
	third := b.propose()
	b.pass(0)
	if len(*second)+len(*third) != 0 || len(b.log.callbacks) != 1 {
		t.Fatalf("they do not wait for the flush: %d are with the log", len(b.log.callbacks))
	}
	if at, ok := b.engine.Deadline(); !ok || at > b.now.Add(gatherTime/2) {
		t.Errorf("the engine is to be woken at %v, now is %v", at, b.now)
	}
	b.log.flush()
	b.pass(0)
	if len(*second) != 1 || len(*third) != 1 || len(b.log.slots) != 3 {
		t.Fatalf("after the flush: answers %v %v, slots %v", *second, *third, b.log.slots)
	}
	b.log.flush()
	b.pass(0)

	// A flush that takes long is not waited for.
	b.propose()
	b.pass(0)
	late := b.propose()
	b.pass(0)
	b.pass(gatherTime)
	if len(*late) != 1 || len(b.log.callbacks) < 2 {
		t.Errorf("after %v: answers %v", gatherTime, *late)
	}
}

func TestCostsAreCounted(t *testing.T) {
	b := newBench(t, nil)
	if s := b.group.Status(); s.Openings != 1 || s.OpeningTook <= 0 || s.OpeningTotal != s.OpeningTook {
		t.Errorf("%d openings, the last took %v, all %v", s.Openings, s.OpeningTook, s.OpeningTotal)
	}
	before := b.engine.Stats()
	for range 5 {
		b.propose()
	}
	b.pass(0)
	after := b.engine.Stats()
	if after.Accepted-before.Accepted != 5 || after.BatchSizes[3]-before.BatchSizes[3] != 1 { // up to 8
		t.Errorf("%d entries, batches %v, before %v", after.Accepted-before.Accepted, after.BatchSizes, before.BatchSizes)
	}
}

// What would make a crowded log longer is put off, and nothing else.
func TestNothingIsAddedToACrowdedLog(t *testing.T) {
	b := newBench(t, nil)
	b.log.crowded = true
	waits := b.propose()
	for range 100 {
		b.pass(crowdedRetry)
	}
	if len(*waits) != 0 || len(b.log.slots) != 0 {
		t.Fatalf("answers %v, slots %v", *waits, b.log.slots)
	}
	unstored := b.engine.Stats().Unstored
	ballot := paxosgroup.Ballot{Counter: 1 << 20, Replica: 2}
	for _, kind := range []paxosgroup.MessageKind{paxosgroup.MsgAccept, paxosgroup.MsgPreVote} {
		b.engine.Deliver(b.now, 2, []peer.GroupMessage{{Group: 1, Message: paxosgroup.Message{Kind: kind, From: 2, To: 1, Ballot: ballot}}})
	}
	if got := b.engine.Stats().Unstored - unstored; got != 1 || b.group.Status().Role != paxosgroup.Leader {
		t.Errorf("%d messages put off, want the Accept alone", got)
	}
	b.log.crowded = false
	if at, ok := b.engine.Deadline(); !ok || at > b.now.Add(crowdedRetry) {
		t.Errorf("the engine is to be woken at %v, now is %v", at, b.now)
	}
	b.pass(crowdedRetry)
	if len(*waits) != 1 || (*waits)[0] != nil || len(b.log.slots) != 1 {
		t.Errorf("with room again: answers %v, slots %v", *waits, b.log.slots)
	}
}

func TestMoreProposalsThanMayWaitAreRefused(t *testing.T) {
	const window, waiting = 4, 3
	b := newBench(t, func(gc *GroupConfig) {
		gc.Core.WindowSlotsMax = window
		gc.WaitingMax = waiting
	})
	b.propose()
	b.pass(0) // nothing is flushed from here on
	var answers []*[]error
	for range 2 * (window + waiting) {
		answers = append(answers, b.propose())
		b.pass(gatherTime)
		b.pass(gatherTime)
	}
	var taken, busy, silent int
	for _, a := range answers {
		switch {
		case len(*a) == 0:
			silent++
		case len(*a) == 1 && (*a)[0] == nil:
			taken++
		case len(*a) == 1 && errors.Is((*a)[0], ErrBusy):
			busy++
		default:
			t.Errorf("answered %v", *a)
		}
	}
	if silent != waiting || busy != len(answers)-waiting-taken || taken < window-1 || taken > window {
		t.Errorf("%d taken, %d refused, %d wait; want about %d, the rest, and %d", taken, busy, silent, window, waiting)
	}
	// They go on in order when there is room, and nobody is answered twice.
	for range 10 {
		b.log.flush()
		b.pass(gatherTime)
	}
	for i, a := range answers {
		if len(*a) != 1 {
			t.Errorf("proposal %d: answers %v", i, *a)
		}
	}
	if !slices.IsSorted(b.log.slots) {
		t.Error(fmt.Sprint("slots ", b.log.slots))
	}
	if again := b.propose(); len(*again) != 0 && errors.Is((*again)[0], ErrBusy) {
		t.Error("still busy")
	}
}
