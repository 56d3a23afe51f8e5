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
