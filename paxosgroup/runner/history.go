package runner

import (
	"slices"
	"sort"

	"quorate/paxosgroup"
)

// history knows the verdict on every slot above the base, and what judge and
// membership were there. It keeps only the slots that are something other than
// an effective data entry: openings, configurations, no-ops and void entries.
type history struct {
	base        paxosgroup.Base
	last        paxosgroup.Slot // judged up to here
	judge       paxosgroup.Judge
	membership  paxosgroup.Membership
	exceptions  []exception
	terms       []term
	memberships []membershipAt
}

type exception struct {
	slot    paxosgroup.Slot
	verdict paxosgroup.Verdict
}

type term struct {
	slot  paxosgroup.Slot // of the effective opening
	judge paxosgroup.Judge
}

type membershipAt struct {
	slot       paxosgroup.Slot
	membership paxosgroup.Membership
}

func newHistory(base paxosgroup.Base) history {
	return history{base: base, last: base.Slot, judge: base.Judge, membership: base.Membership}
}

// add judges the entry of slot last+1 and returns the verdict.
func (h *history) add(e paxosgroup.Entry) paxosgroup.Verdict {
	h.last++
	v := h.judge.Judge(e)
	if e.Kind == paxosgroup.KindData && v == paxosgroup.Effective {
		return v
	}
	h.exceptions = append(h.exceptions, exception{slot: h.last, verdict: v})
	if e.Kind == paxosgroup.KindOpening && v == paxosgroup.Effective {
		h.terms = append(h.terms, term{slot: h.last, judge: h.judge})
	}
	if m, ok := h.membership.Next(e); ok {
		h.membership = m
		h.memberships = append(h.memberships, membershipAt{slot: h.last, membership: m})
	}
	return v
}

// exceptionsThrough returns how many exceptions there are up to s.
func (h *history) exceptionsThrough(s paxosgroup.Slot) int {
	return sort.Search(len(h.exceptions), func(i int) bool { return h.exceptions[i].slot > s })
}

// verdict returns the verdict on a slot above the base and up to last.
func (h *history) verdict(s paxosgroup.Slot) paxosgroup.Verdict {
	i, found := slices.BinarySearchFunc(h.exceptions, s, func(e exception, s paxosgroup.Slot) int {
		switch {
		case e.slot < s:
			return -1
		case e.slot > s:
			return 1
		}
		return 0
	})
	if found {
		return h.exceptions[i].verdict
	}
	return paxosgroup.Effective
}

// at returns the base that a log cut at s would have.
func (h *history) at(s paxosgroup.Slot) paxosgroup.Base {
	b := h.base
	b.Slot = s
	from := h.base.Slot
	if i := sort.Search(len(h.terms), func(i int) bool { return h.terms[i].slot > s }); i > 0 {
		b.Judge, from = h.terms[i-1].judge, h.terms[i-1].slot
	}
	// All slots since but the exceptions were the next numbers.
	b.Judge.Next += uint64(s-from) - uint64(h.exceptionsThrough(s)-h.exceptionsThrough(from))
	if i := sort.Search(len(h.memberships), func(i int) bool { return h.memberships[i].slot > s }); i > 0 {
		b.Membership = h.memberships[i-1].membership
	}
	return b
}
