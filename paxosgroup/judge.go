package paxosgroup

// Judge returns what every learner makes of e, given all the entries below it,
// and advances the state past e.
//
// Multi-Paxos alone lets an entry of a dead leader be chosen without the one it
// was built on, or after another region has led (Junqueira, Reed and Serafini,
// DSN 2011, section 3). Judging restores primary order: an opening raises the
// term, a data entry counts only in its own term and in its turn.
func (j *Judge) Judge(e Entry) Verdict {
	switch e.Kind {
	case KindOpening:
		if !j.Term.Less(e.Term) {
			return Void
		}
		*j = Judge{Term: e.Term, Region: e.Region, Incarnation: e.Incarnation, Next: 1}
		return Effective
	case KindData:
		if e.Term != j.Term || e.Number != j.Next || j.Next == 0 {
			return Void
		}
		j.Next++
		return Effective
	case KindConfig:
		return Effective // exempt from terms; Membership.Next says whether it takes
	}
	return Void
}
