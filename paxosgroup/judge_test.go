package paxosgroup

import "testing"

func TestJudge(t *testing.T) {
	a, b := Ballot{5, 1}, Ballot{6, 2}
	opening := func(b Ballot) Entry { return Entry{Kind: KindOpening, Term: b, Region: "r", Incarnation: 3} }
	d := func(b Ballot, n uint64) Entry { return data(b, n, "") }
	type step struct {
		e    Entry
		want Verdict
	}
	tests := []struct {
		name  string
		steps []step
	}{
		{"a term in order", []step{{opening(a), Effective}, {d(a, 1), Effective}, {d(a, 2), Effective}}},
		{"a gap voids all that follows it", []step{{opening(a), Effective}, {Entry{Kind: KindNoOp}, Void}, {d(a, 2), Void}, {d(a, 3), Void}}},
		{"a newer term ends the older", []step{{opening(a), Effective}, {opening(b), Effective}, {d(a, 1), Void}, {d(b, 1), Effective}}},
		{"an older opening comes late", []step{{opening(b), Effective}, {opening(a), Void}, {d(a, 1), Void}, {d(b, 1), Effective}}},
		{"an opening twice does not number anew", []step{{opening(a), Effective}, {d(a, 1), Effective}, {opening(a), Void}, {d(a, 1), Void}, {d(a, 2), Effective}}},
		{"an entry twice counts once", []step{{opening(a), Effective}, {d(a, 1), Effective}, {d(a, 1), Void}, {d(a, 2), Effective}}},
		{"nothing before an opening", []step{{d(a, 1), Void}, {d(Ballot{}, 0), Void}, {d(Ballot{}, 1), Void}}},
		{"a change of membership is of no term", []step{{opening(a), Effective}, {Entry{Kind: KindConfig, Term: b}, Effective}, {d(a, 1), Effective}}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			var j Judge
			for i, s := range tc.steps {
				if got := j.Judge(s.e); got != s.want {
					t.Errorf("entry %d: verdict %d, want %d", i, got, s.want)
				}
			}
		})
	}
}

func TestJudgeOfSessions(t *testing.T) {
	a, b := Ballot{5, 1}, Ballot{6, 2}
	opening := func(b Ballot) Entry { return Entry{Kind: KindOpening, Term: b} }
	of := func(b Ballot, n, session, sequence uint64) Entry {
		e := data(b, n, "")
		e.Session, e.Sequence = session, sequence
		return e
	}
	many := func(b Ballot, n uint64, sessions int) (out []Entry) {
		for i := range sessions {
			out = append(out, of(b, n+uint64(i), uint64(100+i), 1))
		}
		return out
	}
	type step struct {
		es   []Entry
		want Verdict
	}
	one := func(e Entry, v Verdict) step { return step{[]Entry{e}, v} }
	tests := []struct {
		name  string
		steps []step
	}{
		{"a repetition takes its number and has no effect", []step{one(opening(a), Effective), one(of(a, 1, 7, 1), Effective), one(of(a, 2, 7, 1), Void), one(of(a, 3, 7, 2), Effective)}},
		{"a repetition in a later term", []step{one(opening(a), Effective), one(of(a, 1, 7, 5), Effective), one(opening(b), Effective), one(of(b, 1, 7, 5), Void), one(of(b, 2, 7, 6), Effective)}},
		{"what was void is no reason against repeating it", []step{one(opening(a), Effective), one(of(a, 2, 7, 1), Void), one(opening(b), Effective), one(of(b, 1, 7, 1), Effective)}},
		{"a lower number comes late", []step{one(opening(a), Effective), one(of(a, 1, 7, 5), Effective), one(of(a, 2, 7, 4), Void)}},
		{"sessions know nothing of each other", []step{one(opening(a), Effective), one(of(a, 1, 7, 5), Effective), one(of(a, 2, 8, 5), Effective)}},
		{"no session repeats nothing", []step{one(opening(a), Effective), one(of(a, 1, 0, 0), Effective), one(of(a, 2, 0, 0), Effective)}},
		{"remembered among as many as there may be", []step{one(opening(a), Effective), one(of(a, 1, 7, 1), Effective), {many(a, 2, SessionsMax-1), Effective}, one(of(a, 2+SessionsMax-1, 7, 1), Void)}},
		{"the one silent for longest is forgotten", []step{one(opening(a), Effective), one(of(a, 1, 7, 1), Effective), {many(a, 2, SessionsMax), Effective}, one(of(a, 2+SessionsMax, 7, 1), Effective)}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			var j Judge
			for i, s := range tc.steps {
				for _, e := range s.es {
					before := j.Clone()
					if got := j.Judge(e); got != s.want {
						t.Errorf("step %d: verdict %d, want %d", i, got, s.want)
					}
					again := before.Clone()
					if again.Judge(e); !again.Equal(j) {
						t.Errorf("step %d: a clone comes to %+v, not %+v", i, again, j)
					}
					in := Base{Slot: 9, Judge: j.Clone(), Membership: five()}
					out, err := DecodeBase(EncodeBase(in))
					if err != nil || !out.Judge.Equal(j) {
						t.Errorf("step %d: a base read back holds %+v, not %+v (%v)", i, out.Judge, j, err)
					}
				}
			}
		})
	}
}
