package sidecar

import (
	"log/slog"
	"math"
	"testing"

	"quorate/paxosgroup"
	"quorate/replication/entry"
	"quorate/sidecar/config"
)

func TestCutAt(t *testing.T) {
	cfg := config.Log{KeepBytes: 100 << 20, MaxBytes: 1000 << 20}
	const all = paxosgroup.Slot(1) << 60
	for _, tc := range []struct {
		name string
		size int64
		n    needs
		want paxosgroup.Slot // of a log behind slot 1000, up to 11000
	}{
		{"little is kept although nobody needs it", 99 << 20, needs{all, all}, 1000},
		{"more is cut to a little", 150 << 20, needs{all, all}, 6000},
		{"not past what another region needs", 500 << 20, needs{all, 3000}, 3000},
		{"nor past what this one needs", 500 << 20, needs{2000, all}, 2000},
		{"a region that needs all stops it", 999 << 20, needs{all, 0}, 1000},
		{"until the log is too large", 1500 << 20, needs{all, 0}, 6000},
		{"then only this region stops it", 1500 << 20, needs{3000, 0}, 3000},
		{"and what nobody needs goes all the same", 1500 << 20, needs{all, 9000}, 9000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := cutAt(1000, 11000, tc.size, cfg, tc.n); got != tc.want {
				t.Errorf("cut at %d, want %d", got, tc.want)
			}
		})
	}
}

func TestSpansAreNotCut(t *testing.T) {
	var sp spans
	sp.begin(10)
	sp.finish(15)
	sp.begin(20) // overtaken by another attempt
	sp.begin(30)
	for limit, want := range map[paxosgroup.Slot]paxosgroup.Slot{9: 9, 10: 9, 14: 9, 15: 15, 19: 19, 20: 19, 29: 19, 30: 29, 99: 29} {
		if got := sp.whole(limit); got != want {
			t.Errorf("up to %d: %d, want %d", limit, got, want)
		}
	}
	sp.finish(40)
	sp.forget(30)
	if len(sp) != 1 || sp.whole(35) != 29 || sp.whole(40) != 40 {
		t.Errorf("left are %v", sp)
	}
}

// TestFootings: where a log begins, it is known what came before, or that
// nothing can have; or the database is replaced.
func TestFootings(t *testing.T) {
	const here, there, other paxosgroup.Incarnation = 1, 2, 3
	term := func(n uint64) paxosgroup.Ballot { return paxosgroup.Ballot{Counter: n, Replica: 1} }
	base := func(slot paxosgroup.Slot, n uint64, inc paxosgroup.Incarnation) paxosgroup.Base {
		return paxosgroup.Base{Slot: slot, Judge: paxosgroup.Judge{Term: term(n), Incarnation: inc, Next: 1}}
	}
	id := &identity{}
	if f, err := footingAt(id, here, paxosgroup.Base{}); err != nil || f.EffectiveLSN != 0 || !f.LastForeign.IsZero() {
		t.Errorf("a log from its beginning: %+v, %v", f, err)
	}
	if f, err := footingAt(id, here, base(50, 7, there)); err != nil || f.LastForeign != term(7) {
		t.Errorf("a log that was never cut begins with an image: %+v, %v", f, err)
	}
	id.Cut = true
	first := footing{Incarnation: here, Slot: 50, LastForeign: term(4), EffectiveLSN: 1000, Redelivered: 900}
	id.Footings = afterCut(id.Footings, 0, first)
	second := footing{Incarnation: here, Slot: 80, LastForeign: term(4), EffectiveLSN: entry.LSN(2000), Redelivered: 1800}
	id.Footings = afterCut(id.Footings, 50, second)
	for slot, want := range map[paxosgroup.Slot]footing{50: first, 80: second} { // the cut may or may not have come to be
		if f, err := footingAt(id, here, base(slot, 9, here)); err != nil || f != want {
			t.Errorf("cut at %d: %+v, %v", slot, f, err)
		}
	}
	if f, err := footingAt(id, here, base(80, 9, there)); err != nil || f.LastForeign != term(9) || f.EffectiveLSN != 2000 {
		t.Errorf("cut within another region's term: %+v, %v", f, err)
	}
	if _, err := footingAt(id, here, base(81, 9, here)); err == nil {
		t.Error("a log that begins where nothing is known is taken")
	}
	// Seeded anew: nothing of that database is below, wherever its log begins.
	id.Footings = addFooting(id.Footings, footing{Incarnation: there, Slot: 120, Seeded: true})
	if f, err := footingAt(id, there, base(80, 9, here)); err != nil || f.EffectiveLSN != 0 || f.LastForeign != term(9) {
		t.Errorf("seeded: %+v, %v", f, err)
	}
	if f, err := footingAt(id, here, base(80, 9, here)); err != nil || f != second {
		t.Errorf("the seeding did not come to be: %+v, %v", f, err)
	}
	again := &identity{Cut: true, Footings: afterCut(nil, 0, second)}
	for slot := paxosgroup.Slot(81); slot < 90; slot++ { // cuts that do not come to be
		again.Footings = afterCut(again.Footings, 80, footing{Incarnation: here, Slot: slot})
	}
	if f, err := footingAt(again, here, base(80, 9, here)); err != nil || f != second || len(again.Footings) > footingsMax {
		t.Errorf("after cuts that did not come to be: %+v, %v", f, err)
	}
	if _, err := footingAt(id, other, base(80, 9, here)); err == nil {
		t.Error("a database that nobody knows is taken")
	}
}

// TestNothingRedeliverableIsCut: an own commit that the server may hand over
// again stays in the log, although more were made since than are remembered.
func TestNothingRedeliverableIsCut(t *testing.T) {
	var o ownCommits
	if got := o.through(50); got != math.MaxUint64 {
		t.Errorf("without own commits: %d", got)
	}
	const made = ownCommitsMax + 3*forgottenEvery
	for i := uint64(1); i <= made; i++ {
		o.add(paxosgroup.Slot(2*i), header(i, entry.LSN(i*10)))
	}
	for lsn, want := range map[entry.LSN]paxosgroup.Slot{
		5:                            0, // the first may be handed over
		10:                           2,
		10 * forgottenEvery:          2, // the next that is known lies above
		10*forgottenEvery + 10:       2 * (forgottenEvery + 1),
		10 * (3*forgottenEvery + 1):  2*(3*forgottenEvery+2) - 1, // remembered, exactly
		10*(3*forgottenEvery+1) + 9:  2*(3*forgottenEvery+2) - 1,
		10 * made:                    math.MaxUint64,
		10*(made-1) + 5:              2*made - 1,
		10*(3*forgottenEvery) + 0:    2 * (2*forgottenEvery + 1),
		10*(2*forgottenEvery+1) - 10: 2 * (forgottenEvery + 1),
	} {
		if got := o.through(lsn); got != want {
			t.Errorf("handed over again above %d: %d, want %d", lsn, got, want)
		}
	}
}

// TestDurableFallsWithTheServer: what a server had on disk before it was put back
// to an earlier state is not counted on; what it has after a mere restart is.
func TestDurableFallsWithTheServer(t *testing.T) {
	s := &shard{applied: 520, durable: 500, progress: 500}
	s.large.begin(280)
	s.large.finish(310)
	s.standAt(500)
	if s.applied != 520 || s.durable != 500 {
		t.Errorf("restarted: applied %d, on disk %d", s.applied, s.durable)
	}
	s.standAt(300)
	if s.applied != 300 || s.durable != 279 {
		t.Errorf("put back: applied %d, on disk %d", s.applied, s.durable)
	}
	s.log = slog.New(slog.DiscardHandler)
	s.condemn("it was put back")
	if s.durable != 0 {
		t.Errorf("condemned: on disk %d", s.durable)
	}
}
