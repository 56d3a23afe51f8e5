package sim

import (
	"errors"
	"math/rand/v2"

	"quorate/paxosgroup"
)

var errCut = errors.New("cut from the log")

// disk is a replica's log: records in order, of which a prefix is flushed.
type disk struct {
	recs    []paxosgroup.Record
	flushed int
	base    paxosgroup.Base // as of recs[0]

	// What the records say, flushed or not.
	now  paxosgroup.Base
	prom paxosgroup.Ballot
	held map[paxosgroup.Slot]paxosgroup.AcceptedEntry // Ballot is zero if learned
	top  paxosgroup.Slot
	cut  paxosgroup.Slot // nothing at or below can be read
}

func newDisk(b paxosgroup.Base) *disk {
	d := &disk{base: b}
	d.rebuild()
	return d
}

func (d *disk) rebuild() {
	d.now, d.prom, d.top = d.base, paxosgroup.Ballot{}, d.base.Slot
	d.held = map[paxosgroup.Slot]paxosgroup.AcceptedEntry{}
	for _, r := range d.recs {
		d.apply(r)
	}
}

func (d *disk) apply(r paxosgroup.Record) {
	switch r.Kind {
	case paxosgroup.RecordPromise:
		d.prom = r.Ballot
	case paxosgroup.RecordAccept:
		d.held[r.Slot] = paxosgroup.AcceptedEntry{Slot: r.Slot, Ballot: r.Ballot, Entry: r.Entry}
	case paxosgroup.RecordLearn:
		// A replica learns in slot order: what is below is chosen as well.
		d.held[r.Slot] = paxosgroup.AcceptedEntry{Slot: r.Slot, Entry: r.Entry}
		d.top = max(d.top, r.Slot)
	case paxosgroup.RecordChosen:
		d.top = max(d.top, r.Slot)
	case paxosgroup.RecordBase:
		d.now, d.top, d.prom = *r.Base, r.Base.Slot, paxosgroup.Ballot{}
		d.held = map[paxosgroup.Slot]paxosgroup.AcceptedEntry{}
	}
}

func (d *disk) append(recs []paxosgroup.Record) {
	for _, r := range recs {
		d.recs = append(d.recs, r)
		d.apply(r)
	}
}

// crash loses what was not flushed, all of it or a tail.
// What reached the disk all the same is returned.
func (d *disk) crash(rng *rand.Rand) (survived []paxosgroup.Record) {
	if n := len(d.recs) - d.flushed; n > 0 {
		d.recs = d.recs[:d.flushed+rng.IntN(n+1)]
		survived = d.recs[d.flushed:]
		d.flushed = len(d.recs)
		d.rebuild()
	}
	return survived
}

func (d *disk) restored() paxosgroup.Restored {
	st := paxosgroup.Restored{Base: d.now, Promised: d.prom, Chosen: d.top}
	for s := d.top + 1; len(st.Accepted) < len(d.held) && s < d.top+5000; s++ {
		if a, ok := d.held[s]; ok {
			st.Accepted = append(st.Accepted, a)
		}
	}
	return st
}

func (d *disk) Chosen(from, to paxosgroup.Slot, maxBytes int) ([]paxosgroup.SlotEntry, error) {
	if from <= d.now.Slot || from <= d.cut {
		return nil, errCut
	}
	if to > d.top {
		return nil, errors.New("read beyond the chosen slot")
	}
	var out []paxosgroup.SlotEntry
	for s, n := from, 0; s <= to; s++ {
		a, ok := d.held[s]
		if !ok {
			return nil, errors.New("a chosen slot is empty")
		}
		if n += len(a.Entry.Payload); len(out) > 0 && n > maxBytes || len(out) >= 50 {
			break
		}
		out = append(out, paxosgroup.SlotEntry{Slot: s, Entry: a.Entry})
	}
	return out, nil
}
