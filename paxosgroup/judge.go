package paxosgroup

import "slices"

// Judge returns what every learner makes of e, given all the entries below it,
// and advances the state past e.
//
// Multi-Paxos alone lets an entry of a dead leader be chosen without the one it
// was built on, or after another region has led (Junqueira, Reed and Serafini,
// DSN 2011, section 3). Judging restores primary order: an opening raises the
// term, a data entry counts only in its own term and in its turn.
//
// A data entry that its session has had effective already, or one after it, has
// its turn and is void: so a proposer that cannot know what became of its
// proposal may repeat it (Ongaro, "Consensus: Bridging Theory and Practice",
// 2014, section 6.3).
func (j *Judge) Judge(e Entry) Verdict {
	switch e.Kind {
	case KindOpening:
		if !j.Term.Less(e.Term) {
			return Void
		}
		j.Term, j.Region, j.Incarnation, j.Next = e.Term, e.Region, e.Incarnation, 1
		return Effective
	case KindData:
		if !j.HasTurn(e) {
			return Void
		}
		j.Next++
		if e.Session != 0 && !j.note(e.Session, e.Sequence) {
			return Void
		}
		return Effective
	case KindConfig:
		return Effective // exempt from terms; Membership.Next says whether it takes
	}
	return Void
}

// HasTurn reports whether e is a data entry that takes the next number of the
// term, be it effective or a repetition.
func (j *Judge) HasTurn(e Entry) bool {
	return e.Kind == KindData && e.Term == j.Term && e.Number == j.Next && j.Next != 0
}

// Effective reports whether a session's entry of that sequence number, or one
// after it, is effective already, as far as the session is remembered.
func (j *Judge) Effective(session, sequence uint64) bool {
	i := j.session(session)
	return i >= 0 && sequence <= j.Sessions[i].Sequence
}

// session returns where a session stands, or -1. The one that proposes most is
// found first.
func (j *Judge) session(id uint64) int {
	for i := len(j.Sessions) - 1; i >= 0; i-- {
		if j.Sessions[i].ID == id {
			return i
		}
	}
	return -1
}

// note takes in that a session proposed sequence, and reports whether that is
// new.
func (j *Judge) note(id, sequence uint64) bool {
	i := j.session(id)
	switch {
	case i >= 0 && sequence <= j.Sessions[i].Sequence:
		return false
	case i >= 0:
	case len(j.Sessions) < SessionsMax:
		i = len(j.Sessions)
		j.Sessions = append(j.Sessions, Session{})
	default:
		i = 0
	}
	last := len(j.Sessions) - 1
	copy(j.Sessions[i:last], j.Sessions[i+1:])
	j.Sessions[last] = Session{ID: id, Sequence: sequence}
	return true
}

// Replay advances only the sessions past an entry that is known to be effective.
func (j *Judge) Replay(e Entry) {
	if e.Session != 0 {
		j.note(e.Session, e.Sequence)
	}
}

// Equal reports whether two judges come to the same verdicts for ever.
func (j Judge) Equal(k Judge) bool {
	return j.Term == k.Term && j.Region == k.Region && j.Incarnation == k.Incarnation && j.Next == k.Next &&
		slices.Equal(j.Sessions, k.Sessions)
}

// Clone returns a judge that judges on its own.
func (j Judge) Clone() Judge {
	if len(j.Sessions) == 0 {
		j.Sessions = nil
		return j
	}
	j.Sessions = append(make([]Session, 0, SessionsMax), j.Sessions...)
	return j
}
