package paxosgroup

import (
	"bytes"
	"fmt"
	"slices"
)

// history is what was ever proposed and handed out in one run, which no replica
// remembers in full. It is shared between models: add to a copy.
type history struct {
	ballots    []balloted  // every value that anybody accepted, by slot and ballot
	handed     []Delivered // handed[s-1] is slot s, as first handed out
	membership Membership  // of the first slot
}

// balloted is a value proposed in a slot at a ballot, and who has flushed it.
type balloted struct {
	slot    Slot
	ballot  Ballot
	entry   Entry
	flushed [replicas]bool
	chosen  bool
}

func identical(a, b Entry) bool { return sameValue(a, b) && bytes.Equal(a.Payload, b.Payload) }

// accepted takes in what replica i accepted: handed to its disk, or flushed.
func (m *model) accepted(i int, records []Record, flushed bool) error {
	for _, r := range records {
		if r.Kind != RecordAccept {
			continue
		}
		at := slices.IndexFunc(m.seen.ballots, func(v balloted) bool { return v.slot == r.Slot && v.ballot == r.Ballot })
		if at >= 0 && m.seen.ballots[at].flushed[i] == flushed && (flushed || identical(m.seen.ballots[at].entry, r.Entry)) {
			continue
		}
		if at >= 0 && !identical(m.seen.ballots[at].entry, r.Entry) {
			return fmt.Errorf("slot %d at ballot %v: replica %d accepts %s, another value than was proposed before", r.Slot, r.Ballot, i+1, showEntry(r.Entry))
		}
		h := *m.seen
		h.ballots = slices.Clone(h.ballots)
		if at < 0 {
			at, _ = slices.BinarySearchFunc(h.ballots, r, func(v balloted, r Record) int {
				if v.slot < r.Slot || v.slot == r.Slot && v.ballot.Less(r.Ballot) {
					return -1
				}
				return 1
			})
			h.ballots = slices.Insert(h.ballots, at, balloted{slot: r.Slot, ballot: r.Ballot, entry: r.Entry})
		}
		v := &h.ballots[at]
		v.flushed[i] = v.flushed[i] || flushed
		m.seen = &h
		v.chosen = v.chosen || m.isChosen(*v)
		if err := h.agree(r.Slot); err != nil {
			return err
		}
	}
	return nil
}

// isChosen counts the flushed acceptances of a value against the quorum of the
// slot. The members are as at the start; a change in these bounds moves only
// quorum sizes and kinds, which are taken from the entries below.
func (m *model) isChosen(v balloted) bool {
	return m.seen.governing(v.slot).HasPhase2(func(id ReplicaID) bool { return int(id) <= len(v.flushed) && v.flushed[id-1] })
}

// governing returns the membership of a slot, as far as what was handed out says.
func (h *history) governing(s Slot) Membership {
	members := h.membership
	for i := 0; i < len(h.handed) && Slot(i+1) < s; i++ {
		if next, ok := members.Next(h.handed[i].Entry); ok {
			members = next
		}
	}
	return members
}

// agree checks that a slot has one chosen value, and that every ballot above the
// one at which it was chosen proposes it: it cannot be lost any more.
func (h *history) agree(s Slot) error {
	for i, v := range h.ballots {
		if v.slot != s || !v.chosen {
			continue
		}
		for _, later := range h.ballots[i+1:] {
			if later.slot == s && !identical(v.entry, later.entry) {
				return fmt.Errorf("slot %d: %s was chosen at ballot %v, but ballot %v proposes %s",
					s, showEntry(v.entry), v.ballot, later.ballot, showEntry(later.entry))
			}
		}
	}
	return nil
}

// delivered takes in what replica i was handed.
func (m *model) delivered(i int, ds []Delivered) error {
	for _, d := range ds {
		at := int(d.Slot) - 1
		if at < len(m.seen.handed) {
			if have := m.seen.handed[at]; !identical(have.Entry, d.Entry) || have.Verdict != d.Verdict {
				return fmt.Errorf("slot %d: replica %d is handed %s (verdict %d), before it was %s (verdict %d)",
					d.Slot, i+1, showEntry(d.Entry), d.Verdict, showEntry(have.Entry), have.Verdict)
			}
			continue
		}
		if at > len(m.seen.handed) {
			return fmt.Errorf("replica %d is handed slot %d, nobody was handed %d", i+1, d.Slot, len(m.seen.handed)+1)
		}
		if !slices.ContainsFunc(m.seen.ballots, func(v balloted) bool {
			return v.slot == d.Slot && identical(v.entry, d.Entry) && m.isChosen(v)
		}) {
			return fmt.Errorf("slot %d: %s is handed to replica %d, but no quorum has flushed it", d.Slot, showEntry(d.Entry), i+1)
		}
		h := *m.seen
		h.handed = append(slices.Clone(h.handed), d)
		m.seen = &h
		if err := h.inOrder(); err != nil {
			return err
		}
	}
	return nil
}

// inOrder checks what a region would make of the log: terms rise, and what is
// effective of one is numbered without a gap behind its opening.
func (h *history) inOrder() error {
	var term Ballot
	var number uint64
	for i, d := range h.handed {
		if d.Verdict != Effective {
			continue
		}
		switch d.Entry.Kind {
		case KindOpening:
			if !term.Less(d.Entry.Term) {
				return fmt.Errorf("slot %d: term %v opens after %v", i+1, d.Entry.Term, term)
			}
			term, number = d.Entry.Term, 0
		case KindData:
			if number++; d.Entry.Term != term || d.Entry.Number != number {
				return fmt.Errorf("slot %d: %s is effective in term %v as number %d", i+1, showEntry(d.Entry), term, number)
			}
		case KindNoOp:
			return fmt.Errorf("slot %d: a no-op is effective", i+1)
		}
	}
	return nil
}

func showEntry(e Entry) string {
	return fmt.Sprintf("%v %v/%d %q", e.Kind, e.Term, e.Number, e.Payload)
}
