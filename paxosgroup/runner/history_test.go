package runner

import (
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"quorate/paxosgroup"
)

// TestHistoryEqualsJudgingFromTheBase compares the compact history with judging
// random logs step by step.
func TestHistoryEqualsJudgingFromTheBase(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		base := paxosgroup.Base{Membership: paxosgroup.Membership{NextID: 2, Members: []paxosgroup.Member{{ID: 1, Region: "r1", Kind: paxosgroup.Voter}}}}
		if seed%2 == 1 {
			base.Slot = 1000
			base.Judge = paxosgroup.Judge{Term: paxosgroup.Ballot{Counter: 3, Replica: 1}, Region: "r1", Incarnation: 9, Next: 17}
		}
		h := newHistory(base)
		judge, membership := base.Judge, base.Membership
		want := []paxosgroup.Base{base}
		var verdicts []paxosgroup.Verdict
		var entries []paxosgroup.Entry
		cut := paxosgroup.Slot(0)
		at := func(s paxosgroup.Slot) paxosgroup.Base {
			b, from, to := h.at(s)
			for from++; from <= to; from++ {
				if h.verdict(from) == paxosgroup.Effective {
					b.Judge.Replay(entries[from-base.Slot-1])
				}
			}
			return b
		}
		for range 300 {
			e := paxosgroup.Entry{Kind: paxosgroup.KindData, Term: judge.Term, Number: judge.Next}
			switch rng.IntN(12) {
			case 0:
				e = paxosgroup.Entry{Kind: paxosgroup.KindNoOp}
			case 1:
				e = paxosgroup.Entry{Kind: paxosgroup.KindOpening, Region: "r2", Incarnation: paxosgroup.Incarnation(rng.Uint64()),
					Term: paxosgroup.Ballot{Counter: judge.Term.Counter + rng.Uint64N(3), Replica: paxosgroup.ReplicaID(rng.IntN(4))}}
			case 2:
				e.Number += rng.Uint64N(2)
			case 3:
				e.Term.Counter -= min(e.Term.Counter, 1)
			case 5, 6:
				e.Session, e.Sequence = 1+rng.Uint64N(70), 1+rng.Uint64N(20)
			case 4:
				m := membership
				m.Epoch += 1 + rng.Uint64N(2) // sometimes made for another membership
				m.NextID++
				e = paxosgroup.Entry{Kind: paxosgroup.KindConfig, Payload: paxosgroup.EncodeMembership(m)}
			}
			v := judge.Judge(e)
			entries = append(entries, e)
			if m, ok := membership.Next(e); ok {
				membership = m
			}
			if got := h.add(e); got != v {
				t.Fatalf("seed %d slot %d: verdict %d, want %d", seed, h.last, got, v)
			}
			if rng.IntN(100) == 0 {
				cut = base.Slot + paxosgroup.Slot(rng.IntN(int(h.last-base.Slot)+1))
				if cut >= h.base.Slot {
					h.cut(at(cut))
				}
			}
			want = append(want, paxosgroup.Base{Slot: h.last, Judge: judge.Clone(), Membership: membership})
			verdicts = append(verdicts, v)
		}
		for i, w := range want {
			if w.Slot < h.base.Slot {
				continue
			}
			if got := at(w.Slot); !reflect.DeepEqual(got, w) {
				t.Fatalf("seed %d: at slot %d %+v, want %+v", seed, w.Slot, got, w)
			}
			if i > 0 && w.Slot > h.base.Slot {
				if got := h.verdict(w.Slot); got != verdicts[i-1] {
					t.Fatalf("seed %d: verdict on slot %d %d, want %d", seed, w.Slot, got, verdicts[i-1])
				}
			}
		}
	}
}

func TestRecentKeepsTheNewest(t *testing.T) {
	r := recent{bytesMax: 10 * (deliveredWeight + 100), entriesMax: 1 << 20}
	for s := paxosgroup.Slot(1); s <= 10_000; s++ {
		r.add(&paxosgroup.Delivered{Slot: s, Entry: paxosgroup.Entry{Payload: make([]byte, 100)}})
		first := max(1, int(s)-9)
		if r.first() != paxosgroup.Slot(first) {
			t.Fatalf("after slot %d the first is %d, want %d", s, r.first(), first)
		}
	}
	behind := 0
	for _, c := range r.chunks {
		behind += len(c.entries)
	}
	if behind > 4*10 {
		t.Errorf("%d entries are in memory for 10", behind)
	}
	// A chunk may end before maxBytes do: what is read is together without a gap.
	for next := paxosgroup.Slot(9_991); next <= 10_000; {
		got := r.read(next, 250)
		if len(got) < 1 || len(got) > 2 {
			t.Fatalf("read %d entries", len(got))
		}
		for _, d := range got {
			if d.Slot != next {
				t.Fatalf("read slot %d, want %d", d.Slot, next)
			}
			next++
		}
	}
	// One that is larger than everything is kept, alone.
	r.add(&paxosgroup.Delivered{Slot: 10_001, Entry: paxosgroup.Entry{Payload: make([]byte, 1<<20)}})
	if r.first() != 10_001 {
		t.Errorf("first is %d", r.first())
	}
}

func TestMissedTime(t *testing.T) {
	wall := time.Unix(1_000_000, 0)
	boot := paxosgroup.Instant(5 * time.Second)
	var m missedTime
	for _, step := range []struct {
		name       string
		wall, boot time.Duration
		want       time.Duration
	}{
		{"first look", 0, 0, 0},
		{"both go on", time.Second, time.Second, 0},
		{"both counted a suspend", time.Hour, time.Hour, 0},
		{"the wall clock was slewed", 1100 * time.Millisecond, time.Second, 0},
		{"the machine stood still unnoticed", 11 * time.Second, time.Second, 10 * time.Second},
		{"and goes on", time.Second, time.Second, 0},
		{"the wall clock was set back", -time.Hour, time.Second, 0},
	} {
		wall, boot = wall.Add(step.wall), boot.Add(step.boot)
		if got := m.look(wall, boot); got != step.want {
			t.Errorf("%s: %v, want %v", step.name, got, step.want)
		}
	}
}

func TestBootTimeGoesOn(t *testing.T) {
	a := BootTime()
	time.Sleep(2 * time.Millisecond)
	if d := BootTime().Sub(a); d < 2*time.Millisecond || d > 10*time.Second {
		t.Errorf("%v passed", d)
	}
}

// TestHistoryCut: a cut history says of what is left the same as a whole one.
func TestHistoryCut(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	m := paxosgroup.Membership{Members: []paxosgroup.Member{{ID: 1, Region: "r1", Kind: paxosgroup.Voter}}, NextID: 2}
	whole := newHistory(paxosgroup.Base{Membership: m})
	part := newHistory(paxosgroup.Base{Membership: m})
	var term, number uint64
	for range 2000 {
		var e paxosgroup.Entry
		switch rng.IntN(12) {
		case 0:
			term++
			number = 0
			e = paxosgroup.Entry{Kind: paxosgroup.KindOpening, Term: paxosgroup.Ballot{Counter: term, Replica: 1}}
		case 1:
			e = paxosgroup.Entry{Kind: paxosgroup.KindNoOp}
		case 2:
			n := whole.membership
			n.Epoch++
			n.NextID++
			e = paxosgroup.Entry{Kind: paxosgroup.KindConfig, Payload: paxosgroup.EncodeMembership(n)}
		default:
			number += 1 + uint64(rng.IntN(20)/19)
			e = paxosgroup.Entry{Kind: paxosgroup.KindData, Term: paxosgroup.Ballot{Counter: term, Replica: 1}, Number: number}
		}
		whole.add(e)
		part.add(e)
		if rng.IntN(50) == 0 {
			b, _, _ := part.at(part.base.Slot + paxosgroup.Slot(rng.Uint64N(uint64(part.last-part.base.Slot)+1)))
			part.cut(b)
		}
		s := part.base.Slot + paxosgroup.Slot(rng.Uint64N(uint64(part.last-part.base.Slot)+1))
		got, _, _ := part.at(s)
		if want, _, _ := whole.at(s); !reflect.DeepEqual(got, want) {
			t.Fatalf("cut at %d, at slot %d: %+v, want %+v", part.base.Slot, s, got, want)
		}
		if s > part.base.Slot && part.verdict(s) != whole.verdict(s) {
			t.Fatalf("cut at %d, slot %d is judged %d, want %d", part.base.Slot, s, part.verdict(s), whole.verdict(s))
		}
	}
}
