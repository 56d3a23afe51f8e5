package runner

import (
	"slices"
	"sort"

	"quorate/paxosgroup"
)

// history knows the verdict on every slot above the base, and what judge and
// membership were there. It keeps only the slots that are something other than
// an effective data entry: openings, configurations, no-ops and void entries;
// and of the sessions, which most data entries may change, their state every so
// many slots, from where it is found by reading the log.
type history struct {
	base        paxosgroup.Base
	last        paxosgroup.Slot // judged up to here
	judge       paxosgroup.Judge
	membership  paxosgroup.Membership
	exceptions  []exception
	skippedBase uint64 // of exceptions at or below the base
	terms       []term
	sessions    []sessionsAt // never empty; the first is the base's
	memberships []membershipAt
}

type exception struct {
	slot    paxosgroup.Slot
	verdict paxosgroup.Verdict
	skipped uint64 // exceptions up to this one that took no number of their term
}

type term struct {
	slot  paxosgroup.Slot  // of the effective opening
	judge paxosgroup.Judge // without sessions
}

// sessionsAt is what the sessions were at slot, and up to where entries between
// there and the next may have changed them.
type sessionsAt struct {
	slot, until paxosgroup.Slot
	sessions    []paxosgroup.Session
}

// sessionsEvery is how many slots at most are read to find the sessions at one.
const sessionsEvery = 4096

type membershipAt struct {
	slot       paxosgroup.Slot
	membership paxosgroup.Membership
}

func newHistory(base paxosgroup.Base) history {
	base.Judge = base.Judge.Clone()
	return history{
		base: base, last: base.Slot, judge: base.Judge.Clone(), membership: base.Membership,
		sessions: []sessionsAt{{slot: base.Slot, until: base.Slot, sessions: base.Judge.Sessions}},
	}
}

// add judges the entry of slot last+1 and returns the verdict.
func (h *history) add(e paxosgroup.Entry) paxosgroup.Verdict {
	h.last++
	turn := h.judge.HasTurn(e)
	v := h.judge.Judge(e)
	if turn && v == paxosgroup.Effective {
		if e.Session != 0 {
			h.noteSessions()
		}
		return v
	}
	x := exception{slot: h.last, verdict: v, skipped: h.skippedThrough(h.last)}
	if !turn {
		x.skipped++
	}
	h.exceptions = append(h.exceptions, x)
	if e.Kind == paxosgroup.KindOpening && v == paxosgroup.Effective {
		j := h.judge
		j.Sessions = nil
		h.terms = append(h.terms, term{slot: h.last, judge: j})
	}
	if m, ok := h.membership.Next(e); ok {
		h.membership = m
		h.memberships = append(h.memberships, membershipAt{slot: h.last, membership: m})
	}
	return v
}

// noteSessions takes in that the entry of slot last has changed the sessions.
func (h *history) noteSessions() {
	newest := &h.sessions[len(h.sessions)-1]
	if h.last-newest.slot <= sessionsEvery {
		newest.until = h.last
		return
	}
	h.sessions = append(h.sessions, sessionsAt{slot: h.last, until: h.last, sessions: slices.Clone(h.judge.Sessions)})
}

// skippedThrough returns how many slots up to s took no number of their term.
func (h *history) skippedThrough(s paxosgroup.Slot) uint64 {
	i := sort.Search(len(h.exceptions), func(i int) bool { return h.exceptions[i].slot > s })
	if i == 0 {
		return h.skippedBase
	}
	return h.exceptions[i-1].skipped
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

// at returns the base that a log cut at s would have, but that its sessions are
// those of slot from: the effective entries above it up to slot to are yet to be
// replayed to its judge, by replay. There are none if from is to.
func (h *history) at(s paxosgroup.Slot) (b paxosgroup.Base, from, to paxosgroup.Slot) {
	b = h.base
	b.Slot = s
	first := h.base.Slot
	if i := sort.Search(len(h.terms), func(i int) bool { return h.terms[i].slot > s }); i > 0 {
		b.Judge, first = h.terms[i-1].judge, h.terms[i-1].slot
	}
	// All slots since but those skipped took the next numbers.
	b.Judge.Next += uint64(s-first) - (h.skippedThrough(s) - h.skippedThrough(first))
	if i := sort.Search(len(h.memberships), func(i int) bool { return h.memberships[i].slot > s }); i > 0 {
		b.Membership = h.memberships[i-1].membership
	}
	if s == h.last {
		b.Judge.Sessions = h.judge.Clone().Sessions
		return b, s, s
	}
	known := h.sessions[sort.Search(len(h.sessions), func(i int) bool { return h.sessions[i].slot > s })-1]
	b.Judge.Sessions = known.sessions
	b.Judge = b.Judge.Clone()
	return b, known.slot, min(s, known.until)
}

// cut forgets what lies at or below b.Slot, which is what at says of it.
func (h *history) cut(b paxosgroup.Base) {
	first := sessionsAt{slot: b.Slot, until: b.Slot, sessions: b.Judge.Clone().Sessions}
	for len(h.sessions) > 0 && h.sessions[0].slot <= b.Slot {
		first.until = max(b.Slot, h.sessions[0].until)
		h.sessions = h.sessions[1:]
	}
	h.sessions = append([]sessionsAt{first}, h.sessions...)
	h.skippedBase = h.skippedThrough(b.Slot)
	h.exceptions = slices.Clone(h.exceptions[sort.Search(len(h.exceptions), func(i int) bool { return h.exceptions[i].slot > b.Slot }):])
	h.terms = slices.Clone(h.terms[sort.Search(len(h.terms), func(i int) bool { return h.terms[i].slot > b.Slot }):])
	h.memberships = slices.Clone(h.memberships[sort.Search(len(h.memberships), func(i int) bool { return h.memberships[i].slot > b.Slot }):])
	b.Judge = b.Judge.Clone()
	h.base = b
}
