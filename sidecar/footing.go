package sidecar

import (
	"fmt"
	"slices"

	"quorate/paxosgroup"
	"quorate/replication/entry"
)

// footing is what the learner knows at a slot of the log that it can no longer
// read there: where a log is cut, it goes on from this. It lies in the identity,
// durable before the cut.
type footing struct {
	Incarnation paxosgroup.Incarnation `json:"incarnation"`
	Slot        paxosgroup.Slot        `json:"slot"`
	// Seeded: the incarnation began with an image at this slot, so nothing of its
	// own is at or below it.
	Seeded bool `json:"seeded,omitempty"`
	// LastForeign is the term of the last effective opening of another incarnation.
	LastForeign paxosgroup.Ballot `json:"last_foreign"`
	// EffectiveLSN is where the last own effective commit ends.
	EffectiveLSN entry.LSN `json:"effective_lsn"`
	// Redelivered is the position of the replication slot below which the server
	// hands no commit over again, whatever crashes.
	Redelivered entry.LSN `json:"redelivered"`
}

// footingsMax is how many are kept: those of the present base and of the cut
// under way, and those of the database's beginning and of a seeding under way.
const footingsMax = 4

// addFooting returns the newest footings, f the last of them.
func addFooting(footings []footing, f footing) []footing {
	kept := slices.DeleteFunc(slices.Clone(footings), func(o footing) bool {
		return o.Incarnation == f.Incarnation && o.Slot == f.Slot && o.Seeded == f.Seeded
	})
	return append(kept[max(0, len(kept)-footingsMax+1):], f)
}

// afterCut returns the footings that matter once the log of an incarnation began
// at base and is about to begin at f. However often that does not come to be, the
// footing at base stays.
func afterCut(footings []footing, base paxosgroup.Slot, f footing) []footing {
	kept := slices.DeleteFunc(slices.Clone(footings), func(o footing) bool {
		return o.Incarnation != f.Incarnation || !o.Seeded && o.Slot < base
	})
	present := slices.IndexFunc(kept, func(o footing) bool { return !o.Seeded && o.Slot == base })
	if present < 0 {
		present = slices.IndexFunc(kept, func(o footing) bool { return o.Seeded && o.Slot >= base })
	}
	if present >= 0 {
		o := kept[present]
		kept = append(slices.Delete(kept, present, present+1), o)
	}
	return addFooting(kept, f)
}

// footingAt returns what an incarnation's learner starts from where the log does.
func footingAt(id *identity, inc paxosgroup.Incarnation, base paxosgroup.Base) (footing, error) {
	f := footing{Incarnation: inc, Slot: base.Slot}
	for _, o := range id.Footings {
		if o.Incarnation == inc && o.Slot == base.Slot && !o.Seeded {
			f = o
			break
		}
		if o.Incarnation == inc && o.Seeded && o.Slot >= base.Slot {
			f = footing{Incarnation: inc, Slot: base.Slot, Seeded: true}
		}
	}
	if f == (footing{Incarnation: inc, Slot: base.Slot}) && base.Slot > 0 && id.Cut {
		return f, fmt.Errorf("the log begins after slot %d, and %s does not say what this database had committed by then", base.Slot, identityFile)
	}
	if t := base.Judge.Term; !t.IsZero() && base.Judge.Incarnation != inc && f.LastForeign.Less(t) {
		f.LastForeign = t
	}
	return f, nil
}

// span is where a large transaction stands in the log: from its first fragment
// to what ended it, its commit or another's beginning. Between the two the log is
// not cut, and no image is taken.
type span struct {
	first, end paxosgroup.Slot // end 0: it is under way
}

// spans are those of the log, oldest first; one at a time is under way.
type spans []span

func (sp *spans) begin(slot paxosgroup.Slot) {
	sp.finish(slot)
	*sp = append(*sp, span{first: slot})
}

func (sp spans) finish(slot paxosgroup.Slot) {
	if n := len(sp); n > 0 && sp[n-1].end == 0 {
		sp[n-1].end = slot
	}
}

// whole returns the highest slot up to limit that is not within one.
func (sp spans) whole(limit paxosgroup.Slot) paxosgroup.Slot {
	for i := len(sp) - 1; i >= 0; i-- {
		if s := sp[i]; s.first <= limit && (s.end == 0 || limit < s.end) {
			return s.first - 1
		}
	}
	return limit
}

// forget drops those that ended at or below slot.
func (sp *spans) forget(slot paxosgroup.Slot) {
	*sp = slices.DeleteFunc(*sp, func(s span) bool { return s.end != 0 && s.end <= slot })
}

// foreignTerm is an effective opening of another incarnation than this one.
type foreignTerm struct {
	slot paxosgroup.Slot
	term paxosgroup.Ballot
}
