package paxosgroup

import (
	"errors"
	"testing"
	"time"
)

func TestTransferStopsUsingTheLeaseBeforeAnybodyMayPassIt(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	if _, _, err := l.r.Propose(l.now, []byte("x")); err != nil {
		t.Fatal(err)
	}
	l.settle()
	if err := l.r.Transfer(l.now, 2); err != nil {
		t.Fatal(err)
	}
	if until := l.r.Status().LeaseUntil; until != 0 {
		t.Errorf("lease until %d is reported while handing over", until)
	}
	if _, _, err := l.r.Propose(l.now, nil); !errors.Is(err, ErrWindowFull) {
		t.Errorf("a proposal while draining gives %v", err)
	}
	if out := only(l.pass(50*time.Millisecond), MsgTimeoutNow); len(out) != 0 {
		t.Fatalf("handed over before all was chosen: %+v", out)
	}
	asked := l.now
	for id := ReplicaID(2); id <= 3; id++ {
		l.step(Message{Kind: MsgAccepted, From: id, Ballot: b, Slots: []Slot{2}})
	}
	m := l.passUntil(MsgTimeoutNow)
	if m.To != 2 || m.Ballot != b || m.Chosen != 2 {
		t.Errorf("sends %+v", m)
	}
	if took := l.now.Sub(asked); took > 20*time.Millisecond {
		t.Errorf("drained, but handed over only %v later", took)
	}
	if s := l.r.Status(); s.Role != Follower || s.LeaseUntil != 0 {
		t.Errorf("after handing over: %v, lease until %d", s.Role, s.LeaseUntil)
	}
	if _, _, err := l.r.Propose(l.now, nil); !errors.Is(err, ErrNotLeader) {
		t.Errorf("a proposal after handing over gives %v", err)
	}
}

func TestTransferWaitsUntilNobodyTrustsAnEarlierStatus(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	l.step(Message{Kind: MsgHeartbeatAck, From: 2, Ballot: b, SentAt: l.r.lead.heartbeatAt, Granted: true, Chosen: 1})
	if err := l.r.Transfer(l.now, 2); err != nil {
		t.Fatal(err)
	}
	if out := only(l.pass(19*time.Millisecond), MsgTimeoutNow); len(out) != 0 {
		t.Error("a Status of a tick ago may still be in use")
	}
	if out := only(l.pass(10*time.Millisecond), MsgTimeoutNow); len(out) != 1 {
		t.Error("nothing left to drain, and not handed over")
	}
}

func TestTransferThatCannotDrainIsGivenUp(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	if _, _, err := l.r.Propose(l.now, []byte("x")); err != nil {
		t.Fatal(err)
	}
	l.settle()
	if err := l.r.Transfer(l.now, 2); err != nil {
		t.Fatal(err)
	}
	for range 35 {
		l.pass(100 * time.Millisecond)
		for id := ReplicaID(2); id <= 3; id++ {
			l.step(Message{Kind: MsgHeartbeatAck, From: id, Ballot: b, SentAt: l.r.lead.heartbeatAt, Granted: true, Chosen: 1})
		}
	}
	if _, n, err := l.r.Propose(l.now, nil); err != nil || n != 2 {
		t.Errorf("after a transfer given up: number %d, %v", n, err)
	}
}

func TestSuccessorNamesTheLeaseItPasses(t *testing.T) {
	l := newLab(t, 1, false)
	old := Ballot{5, 2}
	l.step(heartbeat(2, old, 7))
	out := only(l.step(Message{Kind: MsgTimeoutNow, From: 2, Ballot: old}), MsgPrepare)
	if len(out) != 4 || !out[0].Transfer || out[0].Released != old || !old.Less(out[0].Ballot) {
		t.Errorf("sends %+v", out)
	}
	l = newLab(t, 1, false)
	l.r.SetElectable(false)
	l.step(heartbeat(2, old, 7))
	if out := only(l.step(Message{Kind: MsgTimeoutNow, From: 2, Ballot: old}), MsgPrepare); len(out) != 0 {
		t.Errorf("a database that cannot lead campaigns: %+v", out)
	}
}

func TestResignReleasesTheLease(t *testing.T) {
	l := newLab(t, 1, false)
	b := l.lead()
	l.r.Resign(l.now)
	if s := l.r.Status(); s.Role != Follower || s.LeaseUntil != 0 {
		t.Errorf("%v, lease until %d", s.Role, s.LeaseUntil)
	}
	out := only(l.pass(30*time.Millisecond), MsgHeartbeat)
	if len(out) != 4 || !out[0].Transfer || out[0].Ballot != b {
		t.Errorf("sends %+v, want the release to four", out)
	}
	// Its own acceptor is free as well.
	if out := l.step(Message{Kind: MsgPrepare, From: 3, Ballot: Ballot{9, 3}, Slot: 1}); len(only(out, MsgPromise)) != 1 {
		t.Errorf("answers %+v", out)
	}
}

// Followers that hear a leader which does not hear them would honour its lease
// for ever.
func TestLeaderThatHearsNobodyStepsDown(t *testing.T) {
	l := newLab(t, 1, false)
	l.lead()
	l.pass(3200 * time.Millisecond)
	if l.r.lead.opened {
		t.Error("leads two lease durations after the last grant")
	}
}
