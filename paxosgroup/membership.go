package paxosgroup

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

const (
	membersMax         = 64 // acknowledgements are kept as bits of a word
	regionBytesMax     = 255
	membershipEncoding = 1 // version of the encoding below
)

// ErrMembership is wrapped by what EncodeMembership's counterpart and
// validation refuse.
var ErrMembership = errors.New("bad membership")

// Voters returns how many members vote: voters and witnesses.
func (m Membership) Voters() int {
	n := 0
	for _, x := range m.Members {
		if x.Kind.votes() {
			n++
		}
	}
	return n
}

// Quorums returns the sizes of the phase-1 and phase-2 quorums in force.
func (m Membership) Quorums() (phase1, phase2 int) {
	majority := m.Voters()/2 + 1
	phase1, phase2 = m.Phase1, m.Phase2
	if phase1 == 0 {
		phase1 = majority
	}
	if phase2 == 0 {
		phase2 = majority
	}
	return phase1, phase2
}

// Member returns the member with the given id.
func (m Membership) Member(id ReplicaID) (Member, bool) {
	if i := m.index(id); i >= 0 {
		return m.Members[i], true
	}
	return Member{}, false
}

func (m Membership) index(id ReplicaID) int {
	for i := range m.Members {
		if m.Members[i].ID == id {
			return i
		}
	}
	return -1
}

func (m Membership) votes(id ReplicaID) bool {
	x, ok := m.Member(id)
	return ok && x.Kind.votes()
}

func (m Membership) voterMask() uint64 {
	var mask uint64
	for i := range m.Members {
		if m.Members[i].Kind.votes() {
			mask |= 1 << i
		}
	}
	return mask
}

func (k MemberKind) votes() bool { return k == Voter || k == Witness }

// Validate reports all that is wrong with m on its own.
//
// Quorums are sets that intersect, not majorities (Howard, Malkhi and
// Spiegelman, "Flexible Paxos", 2016): every phase-1 quorum must meet every
// phase-2 quorum, which for sizes means phase1 + phase2 > voters.
func (m Membership) Validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrMembership}, args...)...))
	}
	if len(m.Members) == 0 || len(m.Members) > membersMax {
		bad("members: %d, want 1 to %d", len(m.Members), membersMax)
	}
	var last ReplicaID
	for _, x := range m.Members {
		switch {
		case x.ID <= last:
			bad("members: id %d is zero, repeated or out of order", x.ID)
		case x.ID >= m.NextID:
			bad("next id: %d is not above member %d", m.NextID, x.ID)
		}
		last = max(last, x.ID)
		if x.Kind != Voter && x.Kind != Witness && x.Kind != Learner {
			bad("member %d: unknown kind %d", x.ID, x.Kind)
		}
		if len(x.Region) > regionBytesMax {
			bad("member %d: region of %d bytes, at most %d", x.ID, len(x.Region), regionBytesMax)
		}
	}
	n := m.Voters()
	p1, p2 := m.Quorums()
	switch {
	case n == 0:
		bad("members: nobody votes")
	case p1 < 1 || p1 > n || p2 < 1 || p2 > n:
		bad("quorums: %d and %d are not within 1 to %d voters", p1, p2, n)
	case p1+p2 <= n:
		bad("quorums: %d + %d do not intersect in %d voters", p1, p2, n)
	}
	return errors.Join(errs...)
}

// Next returns the membership after the chosen entry e, and whether e changed
// it. A configuration entry takes only if it was made for the membership it
// meets: one that a dead leader left behind, and that a later leader chose in
// its old slot after all, must not undo what was decided in between.
func (m Membership) Next(e Entry) (Membership, bool) {
	if e.Kind != KindConfig {
		return m, false
	}
	n, err := DecodeMembership(e.Payload)
	if err != nil || n.Epoch != m.Epoch+1 || n.Validate() != nil {
		return m, false
	}
	return n, true
}

// normalized returns a copy with members in order of id.
func (m Membership) normalized() Membership {
	m.Members = slices.Clone(m.Members)
	slices.SortFunc(m.Members, func(a, b Member) int { return cmp.Compare(a.ID, b.ID) })
	return m
}

// EncodeMembership returns the payload of a configuration entry: a version
// byte, then as unsigned varints epoch, next id, quorum sizes and the number of
// members, then for each id, kind, length of region and region.
func EncodeMembership(m Membership) []byte {
	m = m.normalized()
	b := []byte{membershipEncoding}
	b = binary.AppendUvarint(b, m.Epoch)
	b = binary.AppendUvarint(b, uint64(m.NextID))
	b = binary.AppendUvarint(b, uint64(m.Phase1))
	b = binary.AppendUvarint(b, uint64(m.Phase2))
	b = binary.AppendUvarint(b, uint64(len(m.Members)))
	for _, x := range m.Members {
		b = binary.AppendUvarint(b, uint64(x.ID))
		b = append(b, byte(x.Kind))
		b = binary.AppendUvarint(b, uint64(len(x.Region)))
		b = append(b, x.Region...)
	}
	return b
}

// DecodeMembership is the inverse of EncodeMembership. It accepts exactly what
// that returns; whether the membership makes sense is for Validate.
func DecodeMembership(b []byte) (Membership, error) {
	fail := func(what string) (Membership, error) {
		return Membership{}, fmt.Errorf("%w: encoding: %s", ErrMembership, what)
	}
	if len(b) == 0 || b[0] != membershipEncoding {
		return fail("unknown version")
	}
	rest := b[1:]
	ok := true
	number := func(limit uint64) uint64 {
		v, n := binary.Uvarint(rest)
		if n <= 0 || v > limit {
			ok = false
			return 0
		}
		rest = rest[n:]
		return v
	}
	var m Membership
	m.Epoch = number(1<<64 - 1)
	m.NextID = ReplicaID(number(1<<32 - 1))
	m.Phase1 = int(number(membersMax))
	m.Phase2 = int(number(membersMax))
	count := number(membersMax)
	for i := uint64(0); i < count && ok; i++ {
		x := Member{ID: ReplicaID(number(1<<32 - 1))}
		if len(rest) == 0 {
			return fail("short")
		}
		x.Kind, rest = MemberKind(rest[0]), rest[1:]
		n := number(regionBytesMax)
		if uint64(len(rest)) < n {
			return fail("short")
		}
		x.Region, rest = string(rest[:n]), rest[n:]
		m.Members = append(m.Members, x)
	}
	if !ok {
		return fail("bad number")
	}
	// One value, one encoding: refuses trailing bytes, padded numbers and
	// members out of order, which two replicas might otherwise read apart.
	if !bytes.Equal(EncodeMembership(m), b) {
		return fail("not canonical")
	}
	return m, nil
}
