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
	membersMax     = 64 // of both sides together: acknowledgements are kept as bits of a word
	regionBytesMax = 255

	// Versions of the encoding below: one configuration, and a joint one.
	encodingSimple = 1
	encodingJoint  = 2
)

// ErrMembership is wrapped by what EncodeMembership's counterpart and
// validation refuse.
var ErrMembership = errors.New("bad membership")

func (k MemberKind) votes() bool { return k == Voter || k == Witness }

// Voters returns how many members vote: voters and witnesses.
func (c Configuration) Voters() int {
	n := 0
	for _, x := range c.Members {
		if x.Kind.votes() {
			n++
		}
	}
	return n
}

// Quorums returns the sizes of the phase-1 and phase-2 quorums in force.
func (c Configuration) Quorums() (phase1, phase2 int) {
	majority := c.Voters()/2 + 1
	phase1, phase2 = c.Phase1, c.Phase2
	if phase1 == 0 {
		phase1 = majority
	}
	if phase2 == 0 {
		phase2 = majority
	}
	return phase1, phase2
}

// Member returns the member with the given id.
func (c Configuration) Member(id ReplicaID) (Member, bool) {
	for _, x := range c.Members {
		if x.ID == id {
			return x, true
		}
	}
	return Member{}, false
}

func (c Configuration) votes(id ReplicaID) bool {
	x, ok := c.Member(id)
	return ok && x.Kind.votes()
}

func (c Configuration) voting(has func(ReplicaID) bool) int {
	n := 0
	for _, x := range c.Members {
		if x.Kind.votes() && has(x.ID) {
			n++
		}
	}
	return n
}

// same reports whether c and d are one configuration.
func (c Configuration) same(d Configuration) bool {
	return c.Phase1 == d.Phase1 && c.Phase2 == d.Phase2 && slices.Equal(c.Members, d.Members)
}

// sameVotes reports whether c and d have the same quorums: what differs is who
// learns, who of the voters has a database, and regions.
func (c Configuration) sameVotes(d Configuration) bool {
	c1, c2 := c.Quorums()
	d1, d2 := d.Quorums()
	return c1 == d1 && c2 == d2 && c.Voters() == d.Voters() && c.voting(d.votes) == c.Voters()
}

// normalized returns a copy with members in order of id.
func (c Configuration) normalized() Configuration {
	c.Members = slices.Clip(slices.Clone(c.Members))
	slices.SortFunc(c.Members, func(a, b Member) int { return cmp.Compare(a.ID, b.ID) })
	return c
}

// Incoming is the configuration that m is, or becomes when it is no longer
// joint.
func (m Membership) Incoming() Configuration {
	return Configuration{Members: m.Members, Phase1: m.Phase1, Phase2: m.Phase2}
}

// Joint reports whether two configurations must agree.
func (m Membership) Joint() bool { return m.Outgoing != nil }

// sides returns the configurations of m, each of which must agree.
func (m Membership) sides() (sides [2]Configuration, n int) {
	sides[0], n = m.Incoming(), 1
	if m.Outgoing != nil {
		sides[1], n = *m.Outgoing, 2
	}
	return sides, n
}

// Voters returns how many members of the incoming configuration vote.
func (m Membership) Voters() int { return m.Incoming().Voters() }

// Quorums returns the sizes of the incoming configuration's quorums.
func (m Membership) Quorums() (phase1, phase2 int) { return m.Incoming().Quorums() }

// HasPhase1 reports whether the replicas that has is true of are a phase-1
// quorum: while joint, one of each configuration.
func (m Membership) HasPhase1(has func(ReplicaID) bool) bool {
	sides, n := m.sides()
	for _, c := range sides[:n] {
		if p1, _ := c.Quorums(); c.voting(has) < p1 {
			return false
		}
	}
	return true
}

// HasPhase2 is HasPhase1 for phase-2 quorums.
func (m Membership) HasPhase2(has func(ReplicaID) bool) bool {
	sides, n := m.sides()
	for _, c := range sides[:n] {
		if _, p2 := c.Quorums(); c.voting(has) < p2 {
			return false
		}
	}
	return true
}

// Durability is how many voters may be lost with their disks before an entry
// that was chosen under m can be lost.
func (m Membership) Durability() int {
	_, p2 := m.Quorums()
	if m.Outgoing != nil {
		_, o2 := m.Outgoing.Quorums()
		p2 = min(p2, o2)
	}
	return p2 - 1
}

// Member returns the member with the given id: as it will be, or while joint,
// if it is on its way out, as it was.
func (m Membership) Member(id ReplicaID) (Member, bool) {
	x, ok := m.Incoming().Member(id)
	if !ok && m.Outgoing != nil {
		return m.Outgoing.Member(id)
	}
	return x, ok
}

// All returns the members of both configurations, in order of id, each as
// Member returns it.
func (m Membership) All() []Member {
	if m.Outgoing == nil {
		return m.Members
	}
	all := slices.Clone(m.Members)
	for _, x := range m.Outgoing.Members {
		if _, ok := m.Incoming().Member(x.ID); !ok {
			all = append(all, x)
		}
	}
	slices.SortFunc(all, func(a, b Member) int { return cmp.Compare(a.ID, b.ID) })
	return slices.Clip(all)
}

// Votes reports whether id's answers count in any configuration of m.
func (m Membership) Votes(id ReplicaID) bool {
	return m.Incoming().votes(id) || m.Outgoing != nil && m.Outgoing.votes(id)
}

// leads reports whether id may lead under m: it votes and has a database.
func (m Membership) leads(id ReplicaID) bool {
	sides, n := m.sides()
	for _, c := range sides[:n] {
		if x, ok := c.Member(id); ok && x.Kind == Voter {
			return true
		}
	}
	return false
}

// Validate reports all that is wrong with m on its own.
func (m Membership) Validate() error {
	var errs []error
	sides, n := m.sides()
	for i, c := range sides[:n] {
		for _, err := range c.faults(m.NextID) {
			if i == 1 {
				err = fmt.Errorf("outgoing: %w", err)
			}
			errs = append(errs, fmt.Errorf("%w: %w", ErrMembership, err))
		}
	}
	if all := len(m.All()); all > membersMax {
		errs = append(errs, fmt.Errorf("%w: members: %d in both configurations, at most %d", ErrMembership, all, membersMax))
	}
	return errors.Join(errs...)
}

// faults is what is wrong with one configuration.
//
// Quorums are sets that intersect, not majorities (Howard, Malkhi and
// Spiegelman, "Flexible Paxos", 2016): every phase-1 quorum must meet every
// phase-2 quorum, which for sizes means phase1 + phase2 > voters.
func (c Configuration) faults(nextID ReplicaID) (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if len(c.Members) == 0 || len(c.Members) > membersMax {
		bad("members: %d, want 1 to %d", len(c.Members), membersMax)
	}
	var last ReplicaID
	for _, x := range c.Members {
		switch {
		case x.ID <= last:
			bad("members: id %d is zero, repeated or out of order", x.ID)
		case x.ID >= nextID:
			bad("next id: %d is not above member %d", nextID, x.ID)
		}
		last = max(last, x.ID)
		if x.Kind != Voter && x.Kind != Witness && x.Kind != Learner {
			bad("member %d: unknown kind %d", x.ID, x.Kind)
		}
		if len(x.Region) > regionBytesMax {
			bad("member %d: region of %d bytes, at most %d", x.ID, len(x.Region), regionBytesMax)
		}
	}
	n := c.Voters()
	p1, p2 := c.Quorums()
	switch {
	case n == 0:
		bad("members: nobody votes")
	case p1 < 1 || p1 > n || p2 < 1 || p2 > n:
		bad("quorums: %d and %d are not within 1 to %d voters", p1, p2, n)
	case p1+p2 <= n:
		bad("quorums: %d + %d do not intersect in %d voters", p1, p2, n)
	case !slices.ContainsFunc(c.Members, func(x Member) bool { return x.Kind == Voter }):
		bad("members: no voter has a database, so nobody can lead")
	}
	return errs
}

// Next returns the membership after the chosen entry e, and whether e changed
// it.
//
// A configuration entry takes only if it was made for the membership it meets:
// one that a dead leader left behind, and that a later leader chose in its old
// slot after all, must not undo what was decided in between. And it takes only
// if it is a step that 0016-joint-consensus.md argues is safe: into a joint
// configuration, out of it to either side, or one that changes no quorum.
func (m Membership) Next(e Entry) (Membership, bool) {
	if e.Kind != KindConfig {
		return m, false
	}
	n, err := DecodeMembership(e.Payload)
	if err != nil || n.Epoch != m.Epoch+1 || n.NextID < m.NextID || !m.leadsTo(n) || n.Validate() != nil {
		return m, false
	}
	return n, true
}

func (m Membership) leadsTo(n Membership) bool {
	switch {
	case len(m.Members) == 0:
		// This replica was started without the first membership, of epoch 0. All that
		// leads to epoch 1 was made for that one, by a leader that had it.
		return m.Epoch == 0
	case m.Joint():
		return !n.Joint() && (n.Incoming().same(m.Incoming()) || n.Incoming().same(*m.Outgoing))
	case n.Joint():
		return n.Outgoing.same(m.Incoming())
	}
	return n.Incoming().sameVotes(m.Incoming())
}

// normalized returns a copy of m that shares nothing with it, with members in
// order of id.
func (m Membership) normalized() Membership {
	m.Members = m.Incoming().normalized().Members
	if m.Outgoing != nil {
		c := m.Outgoing.normalized()
		m.Outgoing = &c
	}
	return m
}

// EncodeMembership returns the payload of a configuration entry: a version
// byte, 2 if the membership is joint, else 1; then as unsigned varints epoch,
// next id and the incoming configuration, and in version 2 the outgoing one.
// A configuration is its quorum sizes and the number of its members, then for
// each id, kind (a byte), length of region and region.
func EncodeMembership(m Membership) []byte {
	m = m.normalized()
	b := []byte{encodingSimple}
	if m.Joint() {
		b[0] = encodingJoint
	}
	b = binary.AppendUvarint(b, m.Epoch)
	b = binary.AppendUvarint(b, uint64(m.NextID))
	sides, n := m.sides()
	for _, c := range sides[:n] {
		b = binary.AppendUvarint(b, uint64(c.Phase1))
		b = binary.AppendUvarint(b, uint64(c.Phase2))
		b = binary.AppendUvarint(b, uint64(len(c.Members)))
		for _, x := range c.Members {
			b = binary.AppendUvarint(b, uint64(x.ID))
			b = append(b, byte(x.Kind))
			b = binary.AppendUvarint(b, uint64(len(x.Region)))
			b = append(b, x.Region...)
		}
	}
	return b
}

// DecodeMembership is the inverse of EncodeMembership. It accepts exactly what
// that returns; whether the membership makes sense is for Validate.
func DecodeMembership(b []byte) (Membership, error) {
	fail := func(what string) (Membership, error) {
		return Membership{}, fmt.Errorf("%w: encoding: %s", ErrMembership, what)
	}
	if len(b) == 0 || b[0] != encodingSimple && b[0] != encodingJoint {
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
	configuration := func() (c Configuration) {
		c.Phase1 = int(number(membersMax))
		c.Phase2 = int(number(membersMax))
		count := number(membersMax)
		for i := uint64(0); i < count && ok; i++ {
			x := Member{ID: ReplicaID(number(1<<32 - 1))}
			if len(rest) == 0 {
				ok = false
				break
			}
			x.Kind, rest = MemberKind(rest[0]), rest[1:]
			n := number(regionBytesMax)
			if uint64(len(rest)) < n {
				ok = false
				break
			}
			x.Region, rest = string(rest[:n]), rest[n:]
			c.Members = append(c.Members, x)
		}
		return c
	}
	var m Membership
	m.Epoch = number(1<<64 - 1)
	m.NextID = ReplicaID(number(1<<32 - 1))
	c := configuration()
	m.Members, m.Phase1, m.Phase2 = c.Members, c.Phase1, c.Phase2
	if b[0] == encodingJoint {
		c := configuration()
		m.Outgoing = &c
	}
	if !ok {
		return fail("short, or a number out of bounds")
	}
	// One value, one encoding: refuses trailing bytes, padded numbers and
	// members out of order, which two replicas might otherwise read apart.
	if !bytes.Equal(EncodeMembership(m), b) {
		return fail("not canonical")
	}
	return m, nil
}
