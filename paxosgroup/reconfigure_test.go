package paxosgroup

import (
	"errors"
	"slices"
	"testing"
	"time"
)

func voters(next ReplicaID, ids ...ReplicaID) Membership {
	m := Membership{NextID: next}
	for _, id := range ids {
		m.Members = append(m.Members, Member{ID: id, Region: "r", Kind: Voter})
	}
	return m
}

// grant lets members answer the last heartbeat, saying what they have as chosen.
func (l *lab) grant(chosen Slot, ids ...ReplicaID) (out []Message) {
	for _, id := range ids {
		out = append(out, l.step(Message{Kind: MsgHeartbeatAck, From: id, Ballot: l.r.ballot, SentAt: l.r.lead.heartbeatAt, Granted: true, Chosen: chosen})...)
	}
	return out
}

func (l *lab) accepted(s Slot, ids ...ReplicaID) (out []Message) {
	for _, id := range ids {
		out = append(out, l.step(Message{Kind: MsgAccepted, From: id, Ballot: l.r.ballot, Slots: []Slot{s}})...)
	}
	return out
}

func (l *lab) change(m Membership) {
	l.t.Helper()
	if err := l.r.ProposeMembership(l.now, m); err != nil {
		l.t.Fatal(err)
	}
	l.settle()
}

func (l *lab) propose() Slot {
	l.t.Helper()
	if _, _, err := l.r.Propose(l.now, []byte("x")); err != nil {
		l.t.Fatal(err)
	}
	l.settle()
	return l.r.lead.next - 1
}

func (l *lab) wantChange(want Change, epoch uint64) {
	l.t.Helper()
	if s := l.r.Status(); s.Change != want || s.Membership.Epoch != epoch {
		l.t.Fatalf("change %v in epoch %d, want %v in %d", s.Change, s.Membership.Epoch, want, epoch)
	}
}

// joint brings replica 1 from members 1 to 5 half way to m: the joint entry is
// chosen in slot 2. The new voters that are not of 1 to 3 answer.
func (l *lab) joint(m Membership) {
	l.t.Helper()
	l.change(m)
	for _, x := range m.Members {
		if x.ID > 3 {
			l.step(Message{Kind: MsgPromise, From: x.ID, Ballot: l.r.ballot})
			l.grant(1, x.ID)
		}
	}
	for _, x := range l.r.membership.All() {
		if l.r.lead.change == nil || l.r.lead.change.at != 2 {
			l.t.Fatalf("the joint entry is not proposed: %+v", l.r.lead.change)
		}
		if x.ID != 1 && x.ID <= 2 {
			l.accepted(2, x.ID)
		}
	}
}

func TestAChangeWaitsForTheNewVoters(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	l.change(voters(9, 6, 7, 8))
	l.wantChange(ChangeWaiting, 0)
	if c := l.r.Status().Contacts; len(c) != 8 {
		t.Errorf("to be connected with %+v, want the new ones too", c)
	}
	l.step(Message{Kind: MsgPromise, From: 6, Ballot: b})
	l.step(Message{Kind: MsgPromise, From: 7, Ballot: b})
	if l.grant(0, 6); l.r.lead.change.at != 0 {
		t.Fatal("proposed without their lease")
	}
	if l.grant(0, 7); l.r.lead.change.at != 2 {
		t.Fatal("not proposed with their promises, lease and log")
	}
	// The pipeline does not stop.
	if s := l.propose(); s != 3 {
		t.Errorf("the next proposal is in slot %d", s)
	}
}

// The grants of far voters are always older than those of near ones; that must
// neither let the lease lapse nor keep the change waiting.
func TestAChangeToFarVotersKeepsTheLease(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	l.change(voters(9, 6, 7, 8))
	l.step(Message{Kind: MsgPromise, From: 6, Ballot: b})
	l.step(Message{Kind: MsgPromise, From: 7, Ballot: b})
	var sent []Instant
	reported := Instant(0)
	for range 12 {
		l.pass(100 * time.Millisecond)
		l.grant(1, 2, 3)
		sent = append(sent, l.r.lead.heartbeatAt)
		if n := len(sent) - 4; n >= 0 { // 300 ms later
			for _, id := range []ReplicaID{6, 7} {
				l.step(Message{Kind: MsgHeartbeatAck, From: id, Ballot: b, SentAt: sent[n], Granted: true, Chosen: 1})
			}
		}
		if u := l.r.Status().LeaseUntil; u <= l.now || u < reported {
			t.Fatalf("lease until %v, was %v, now %v", u, reported, l.now)
		} else {
			reported = u
		}
	}
	if c := l.r.lead.change; c.at == 0 || l.r.leaseUntil(&c.quorums) < reported {
		t.Errorf("at slot %d, what was reported is %v more than what the new voters granted", c.at, reported.Sub(l.r.leaseUntil(&c.quorums)))
	}
}

func TestAChangeWhoseVotersDoNotAnswerIsDropped(t *testing.T) {
	l := newLab(t, 1, false)
	l.lead()
	l.change(voters(9, 6, 7, 8))
	for range 31 {
		if l.pass(100 * time.Millisecond); l.r.role == Leader {
			l.grant(1, 2, 3)
		}
	}
	l.wantChange(ChangeNone, 0)
	if l.r.peer(6) != nil || len(l.r.peers) != 4 {
		t.Error("what was to be added is a peer still")
	}
}

// Slots above a joint entry are counted in what then governs them, once the
// entry is chosen: both configurations.
func TestBothMustAgreeAboveTheJointEntry(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	l.change(voters(9, 6, 7, 8))
	l.step(Message{Kind: MsgPromise, From: 6, Ballot: b})
	l.step(Message{Kind: MsgPromise, From: 7, Ballot: b})
	l.grant(1, 6, 7)
	data := l.propose() // 3
	l.accepted(data, 2, 3)
	if l.r.chosen != 1 {
		t.Fatalf("chosen %d: slot 3 was counted before slot 2 is known", l.r.chosen)
	}
	l.accepted(2, 6, 7, 8)
	if l.r.chosen != 1 {
		t.Fatal("the joint entry itself is the old configuration's to choose")
	}
	l.accepted(2, 2, 3)
	l.wantChange(ChangeJoint, 1)
	if l.r.chosen != 2 {
		t.Fatalf("chosen %d: slot 3 has no quorum of the incoming side", l.r.chosen)
	}
	l.accepted(data, 6)
	if l.accepted(data, 7); l.r.chosen != 3 {
		t.Fatal("both sides have accepted slot 3, and it is not chosen")
	}
}

func TestJointIsLeftOnlyWhenTheNewOnesKnowOfIt(t *testing.T) {
	l := newLab(t, 1, false)
	l.lead()
	l.joint(voters(9, 2, 6, 7))
	l.accepted(2, 3)
	l.wantChange(ChangeJoint, 1)
	if l.grant(2, 6); l.r.lead.change != nil {
		t.Fatal("left when one of three knows")
	}
	if l.grant(2, 7); l.r.lead.change == nil || l.r.lead.change.at != 3 {
		t.Fatal("not left when a quorum knows")
	}
	// The entry that leaves is both sides' to choose.
	if l.accepted(3, 6, 7); l.r.chosen != 2 {
		t.Fatal("left by the new side alone")
	}
	l.accepted(3, 2)
	l.accepted(3, 3)
	l.wantChange(ChangeSpreading, 2)
	if l.r.role != Leader {
		t.Fatal("the leader is left out, but it is not known yet: it must go on")
	}
	if s := l.propose(); l.r.chosen != s-1 {
		t.Fatal("the removed leader's own acceptance counts")
	}
	l.accepted(4, 6)
	if l.accepted(4, 2); l.r.chosen != 4 {
		t.Fatal("a removed leader's proposals are not chosen")
	}
	l.grant(3, 6)
	l.wantChange(ChangeSpreading, 2)
	l.grant(4, 7)
	l.wantChange(ChangeNone, 2)
	if l.r.peer(3) != nil {
		t.Error("replica 3 is out for good, and a peer still")
	}
	// Now the removed leader hands over, to one who has it all.
	if m := l.passUntil(MsgTimeoutNow); m.To != 2 && m.To != 6 && m.To != 7 {
		t.Errorf("hands over to %d", m.To)
	}
	if l.r.role != Follower {
		t.Error("leads on")
	}
	for range 500 {
		if out := only(l.pass(10*time.Millisecond), MsgPrepare); len(out) > 0 {
			t.Fatal("a removed replica campaigns")
		}
	}
}

func TestJointCanBeTakenBack(t *testing.T) {
	l := newLab(t, 1, false)
	l.lead()
	l.joint(voters(9, 6, 7, 8))
	l.accepted(2, 3)
	if err := l.r.ProposeMembership(l.now, voters(9, 1, 2)); !errors.Is(err, ErrWindowFull) {
		t.Errorf("a third configuration: %v", err)
	}
	l.change(five())
	l.grant(2, 2, 3)
	l.accepted(3, 2, 3, 6, 7)
	if m := l.r.Status().Membership; m.Joint() || len(m.Members) != 5 || m.Epoch != 2 {
		t.Fatalf("membership %+v", m)
	}
	l.wantChange(ChangeSpreading, 2)
	l.grant(3, 2, 3)
	l.wantChange(ChangeNone, 2)
}

func TestAChangeThatTouchesNoQuorumIsOneEntry(t *testing.T) {
	l := newLab(t, 1, false)
	l.lead()
	m := five()
	m.Members[4].Kind = Witness
	m.Members = append(m.Members, Member{ID: 6, Region: "r", Kind: Learner})
	m.NextID = 7
	l.change(m)
	l.accepted(2, 2, 3)
	l.wantChange(ChangeSpreading, 1)
	l.grant(2, 2, 3)
	l.wantChange(ChangeNone, 1)
}

// A leader that dies leaves a change half done; the next one finds it, and
// finishes it.
func TestANewLeaderFinishesAJointChange(t *testing.T) {
	to := voters(9, 6, 7, 8)
	to.Epoch = 1
	from := five().Incoming()
	to.Outgoing = &from
	entry := Entry{Kind: KindConfig, Term: Ballot{1, 5}, Payload: EncodeMembership(to)}
	l := newLab(t, 1, false)
	l.r.highest = Ballot{5, 5}
	b := l.prepare()
	l.step(Message{Kind: MsgPromise, From: 2, Ballot: b, Accepted: []AcceptedEntry{{Slot: 1, Ballot: Ballot{1, 5}, Entry: entry}}})
	out := l.step(Message{Kind: MsgPromise, From: 3, Ballot: b})
	if acc := only(out, MsgAccept); len(acc) != 4 || len(acc[0].Entries) != 1 || acc[0].Entries[0].Entry.Kind != KindConfig {
		t.Fatalf("proposes %+v, want the inherited entry and nothing above it", acc)
	}
	out = l.accepted(1, 2, 3)
	if got := only(out, MsgPrepare); len(got) < 3 {
		t.Fatalf("asks %+v for promises; want the new members too", got)
	}
	if l.r.lead.opened {
		t.Fatal("opened without the incoming side's promises")
	}
	l.step(Message{Kind: MsgPromise, From: 6, Ballot: b})
	l.step(Message{Kind: MsgPromise, From: 7, Ballot: b})
	if l.r.role != Leader {
		t.Fatal("does not lead with promises of both sides")
	}
	l.grant(1, 2, 3, 6, 7)
	if l.r.lead.change == nil || l.r.lead.change.to.Joint() || l.r.lead.change.to.Epoch != 2 {
		t.Fatalf("does not finish the change: %+v", l.r.lead.change)
	}
}

// Farther followers are sent entries a little later than the nearest quorum. The
// inherited change may be chosen by then, and in force without its own phase 1.
func TestAChosenChangeIsSentToFarFollowers(t *testing.T) {
	to := voters(9, 6, 7, 8)
	to.Epoch = 1
	from := five().Incoming()
	to.Outgoing = &from
	entry := Entry{Kind: KindConfig, Term: Ballot{1, 5}, Payload: EncodeMembership(to)}
	l := newLab(t, 1, false)
	l.r.highest = Ballot{5, 5}
	b := l.prepare()
	for _, id := range []ReplicaID{2, 3} {
		l.r.peer(id).flow.roundTrip.add(l.now, time.Millisecond, flowRoundTripPeriod)
	}
	l.step(Message{Kind: MsgPromise, From: 2, Ballot: b, Accepted: []AcceptedEntry{{Slot: 1, Ballot: Ballot{1, 5}, Entry: entry}}})
	if acc := only(l.step(Message{Kind: MsgPromise, From: 3, Ballot: b}), MsgAccept); len(acc) != 2 {
		t.Fatalf("sends %+v, want the entry on its way to the nearest quorum alone", acc)
	}
	out := l.accepted(1, 2, 3)
	if m := l.r.membership; !m.Joint() || l.r.lead.phase1 {
		t.Fatalf("membership %+v, phase 1 %v: want the change in force and its phase 1 open", m, l.r.lead.phase1)
	}
	late := map[ReplicaID]bool{}
	for _, m := range only(append(out, l.pass(2*hedgeDelay)...), MsgAccept) {
		late[m.To] = len(m.Entries) == 1 && m.Entries[0].Slot == 1 && m.Chosen == 1
	}
	if !late[4] || !late[5] {
		t.Errorf("sent to %v, want the chosen entry at 4 and 5", late)
	}
}

// What a dead leader proposed above its joint entry, only the incoming side may
// have: a leader that knows nothing of the change need not find it, for it
// cannot be chosen; one that does asks them.
func TestJointNeedsPreVotesAndPromisesOfBoth(t *testing.T) {
	to := voters(9, 1, 6, 7)
	to.Epoch = 1
	from := five().Incoming()
	to.Outgoing = &from
	l := &lab{t: t, now: Instant(time.Hour)}
	r, err := New(Config{Group: 1, ID: 1, Region: "r", Seed: 7}, Restored{Base: Base{Membership: to}}, l, l.now)
	if err != nil {
		t.Fatal(err)
	}
	l.r = r
	pv := l.passUntil(MsgPreVote)
	grant := func(ids ...ReplicaID) {
		for _, id := range ids {
			l.step(Message{Kind: MsgPreVoteReply, From: id, Ballot: pv.Ballot, Granted: true, SentAt: pv.SentAt})
		}
	}
	if grant(2, 3, 4, 5); l.r.stage != asking {
		t.Fatal("the outgoing side alone granted the pre-vote")
	}
	if grant(6); l.r.stage != preparing {
		t.Fatal("both sides granted it")
	}
	for _, id := range []ReplicaID{6, 7} {
		l.step(Message{Kind: MsgPromise, From: id, Ballot: l.r.ballot})
	}
	if l.r.stage != preparing {
		t.Fatal("the incoming side alone made a leader")
	}
	l.step(Message{Kind: MsgPromise, From: 2, Ballot: l.r.ballot})
	if l.step(Message{Kind: MsgPromise, From: 3, Ballot: l.r.ballot}); l.r.role != Leader {
		t.Fatal("promises of both sides do not make a leader")
	}
	// Its lease is one of both, too.
	l.accepted(1, 2, 3, 6)
	if l.grant(1, 2, 3, 4, 5); l.r.Status().LeaseUntil != 0 {
		t.Error("holds a lease of the outgoing side alone")
	}
	if l.grant(1, 6); l.r.Status().LeaseUntil == 0 {
		t.Error("holds no lease of both sides")
	}
}

// A leader that is told by others that its own change is chosen was overtaken:
// it was chosen at a higher ballot, and leaders in between may not have known of
// it. To go on would be to propose under a membership that they could not ask.
func TestALeaderTakesNoMembershipFromOthers(t *testing.T) {
	l := newLab(t, 1, false)
	l.lead()
	l.change(voters(9, 1, 2, 6))
	l.step(Message{Kind: MsgPromise, From: 6, Ballot: l.r.ballot})
	l.grant(1, 2, 6)
	st := l.r.log.at(2)
	if st == nil || st.entry.Kind != KindConfig {
		t.Fatal("the change is not proposed: the test shows nothing")
	}
	change := st.entry
	l.step(Message{Kind: MsgLearn, From: 3, Slot: 2, Chosen: 2, Entries: []SlotEntry{{2, change}}})
	if l.r.chosen != 2 || !l.r.membership.Joint() {
		t.Error("did not learn it")
	}
	if l.r.role != Follower {
		t.Error("leads on")
	}
	// So does a candidate.
	l = newLab(t, 1, false)
	b := l.prepare()
	l.step(Message{Kind: MsgPromise, From: 2, Ballot: b, Chosen: 1})
	l.step(Message{Kind: MsgLearn, From: 2, Slot: 1, Chosen: 1, Entries: []SlotEntry{{1, change}}})
	if l.step(Message{Kind: MsgPromise, From: 3, Ballot: b}); l.r.stage >= preparing {
		t.Error("prepares on")
	}
}

// Bits are given anew when a member goes; what the last one acknowledged is not
// the next one's.
func TestABitGivenAnewCarriesNoAcknowledgement(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	l.change(voters(9, 1, 6, 8))
	l.step(Message{Kind: MsgPromise, From: 6, Ballot: b})
	s := l.propose()
	l.accepted(s, 6)
	bit := l.r.peer(6).index
	l.r.dropChange()
	l.change(voters(9, 1, 7, 8))
	if l.r.peer(7).index != bit {
		t.Fatal("another bit: the test shows nothing")
	}
	if l.r.log.at(s).acks&(1<<bit) != 0 {
		t.Error("7 is taken to have accepted what 6 did")
	}
}

func TestTheLeaderKnowsAConfigurationOnlyWhenItIsFlushed(t *testing.T) {
	l := newLab(t, 1, false)
	l.lead()
	m := five()
	m.NextID = 9
	l.change(m)
	l.accepted(2, 2)
	if err := l.r.Step(l.now, Message{Kind: MsgAccepted, From: 3, To: 1, Ballot: l.r.ballot, Slots: []Slot{2}}); err != nil {
		t.Fatal(err)
	}
	rd, _ := l.r.Ready()
	if !slices.ContainsFunc(rd.Persist, func(r Record) bool { return r.Kind == RecordChosen && r.Slot == 2 && r.NeedsFlush() }) {
		t.Fatalf("persists %+v, want the chosen slot, flushed", rd.Persist)
	}
	for _, id := range []ReplicaID{2, 3} {
		l.r.Step(l.now, Message{Kind: MsgHeartbeatAck, From: id, To: 1, Ballot: l.r.ballot, SentAt: l.r.lead.heartbeatAt, Granted: true, Chosen: 2})
	}
	l.wantChange(ChangeSpreading, 1)
	l.r.Persisted(l.now, rd.Seq)
	l.wantChange(ChangeNone, 1)
}

func TestAWitnessVotesAndNeverCampaigns(t *testing.T) {
	m := five()
	m.Members[0].Kind = Witness
	l := &lab{t: t, now: Instant(time.Hour)}
	r, err := New(Config{Group: 1, ID: 1, Region: "r", Seed: 7}, Restored{Base: Base{Membership: m}}, l, l.now)
	if err != nil {
		t.Fatal(err)
	}
	l.r = r
	for range 200 {
		for _, m := range l.pass(50 * time.Millisecond) {
			if m.Kind == MsgPrepare || m.Kind == MsgPreVote && m.Ballot.Counter > 1 || l.r.role != Follower {
				t.Fatalf("campaigns: %+v", m)
			}
		}
	}
	b := Ballot{5, 2}
	l.step(Message{Kind: MsgTimeoutNow, From: 2, Ballot: b})
	if l.r.role != Follower {
		t.Error("takes over leadership")
	}
	l.pass(2 * time.Second)
	if out := only(l.step(Message{Kind: MsgPreVote, From: 2, Ballot: Ballot{6, 2}}), MsgPreVoteReply); len(out) != 1 || !out[0].Granted {
		t.Errorf("answers a pre-vote with %+v", out)
	}
	if out := only(l.step(Message{Kind: MsgPrepare, From: 2, Ballot: Ballot{6, 2}, Slot: 1}), MsgPromise); len(out) != 1 {
		t.Error("does not promise")
	}
	if out := only(l.step(Message{Kind: MsgAccept, From: 2, Ballot: Ballot{6, 2}, Entries: []SlotEntry{{1, data(b, 1, "x")}}}), MsgAccepted); len(out) != 1 {
		t.Error("does not accept")
	}
	if err := (Membership{NextID: 3, Members: []Member{{1, "r", Witness}, {2, "r", Learner}}}).Validate(); err == nil {
		t.Error("a group that nobody can lead validates")
	}
}

func TestALeaderThatSeesAHigherBallotOfAVoterStepsDown(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	l.step(Message{Kind: MsgPreVoteReply, From: 9, Ballot: Ballot{b.Counter + 1, 9}})
	if l.r.role != Leader {
		t.Error("a stranger deposes")
	}
	l.step(Message{Kind: MsgPreVoteReply, From: 2, Ballot: Ballot{b.Counter + 1, 3}})
	if l.r.role != Follower {
		t.Error("proposes without phase 1 below a ballot that a voter has promised")
	}
}

func TestALeaderWithoutALeaseProposesNothing(t *testing.T) {
	l := newLab(t, 1, false)
	l.lead()
	l.now = l.now.Add(10 * time.Second) // paused, and not ticked since
	if _, _, err := l.r.Propose(l.now, nil); !errors.Is(err, ErrNotLeader) {
		t.Errorf("a leadership that outlived its lease takes a proposal: %v", err)
	}
}

// hear lets members answer all that was proposed, and that they have as chosen
// what the leader has.
func (l *lab) hear(ids ...ReplicaID) {
	var slots []Slot
	for s := Slot(1); s < l.r.lead.next; s++ {
		slots = append(slots, s)
	}
	for _, id := range ids {
		l.step(Message{Kind: MsgAccepted, From: id, Ballot: l.r.ballot, Slots: slots, Chosen: l.r.chosen})
		l.grant(l.r.chosen, id)
	}
}

// A leader that waits for somebody else's change to be chosen is told by one who
// then dies that it has more as chosen than anybody else.
func TestALatePromiseOfTheDeadDoesNotStopALeader(t *testing.T) {
	l := newLab(t, 1, false)
	old := Ballot{1, 5}
	l.step(Message{Kind: MsgHeartbeat, From: 5, Ballot: old})
	b := l.prepare()
	out := five().Incoming()
	m := voters(7, 1, 2, 3, 4)
	m.Epoch, m.Outgoing = 1, &out
	inherited := []AcceptedEntry{
		{1, old, Entry{Kind: KindOpening, Term: old, Region: "r"}},
		{2, old, Entry{Kind: KindConfig, Term: old, Region: "r", Payload: EncodeMembership(m)}},
		{3, old, data(old, 1, "a")},
	}
	l.step(Message{Kind: MsgPromise, From: 2, Ballot: b, Accepted: inherited})
	l.step(Message{Kind: MsgPromise, From: 3, Ballot: b, Accepted: inherited})
	if l.r.lead.inheritedAt != 2 {
		t.Fatal("it does not wait for the change")
	}
	l.step(Message{Kind: MsgPromise, From: 5, Ballot: b, Chosen: 3})
	for range 10 {
		l.pass(100 * time.Millisecond)
		l.step(Message{Kind: MsgPromise, From: 4, Ballot: b})
		l.hear(2, 3, 4)
	}
	if s := l.r.Status(); s.Role != Leader || s.Ballot != b || s.Judge.Term != b {
		t.Errorf("it neither leads nor gives up: %+v", s)
	}
}

func TestALeaderThatIsMadeAWitnessHandsOver(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	m := five()
	m.Members[0].Kind = Witness
	l.change(m)
	for range 10 {
		if l.hear(2, 3); l.r.Status().Role == Leader {
			l.pass(10 * time.Millisecond)
		}
	}
	if s := l.r.Status(); s.Role == Leader || s.Membership.Epoch != 1 || s.Judge.Term != b {
		t.Errorf("it leads with no database: %+v", s)
	}
}

// A late promise tells of a change that was accepted above everything that the
// quorum of phase 1 knew of: it cannot have been chosen.
func TestAChangeThatOnlyALatePromiseTellsOf(t *testing.T) {
	l := newLab(t, 1, false)
	old := Ballot{1, 5}
	l.step(Message{Kind: MsgHeartbeat, From: 5, Ballot: old})
	b := l.prepare()
	l.step(Message{Kind: MsgPromise, From: 2, Ballot: b})
	l.step(Message{Kind: MsgPromise, From: 3, Ballot: b})
	out := five().Incoming()
	m := voters(7, 1, 2, 3, 4)
	m.Epoch, m.Outgoing = 1, &out
	l.step(Message{Kind: MsgPromise, From: 4, Ballot: b, Accepted: []AcceptedEntry{
		{40, old, Entry{Kind: KindConfig, Term: old, Region: "r", Payload: EncodeMembership(m)}},
	}})
	l.hear(2, 3)
	s := l.r.Status()
	if s.Role != Leader || s.Ballot != b || s.Membership.Epoch != 0 || s.Chosen < 40 {
		t.Errorf("%+v", s)
	}
	l.propose()
}
