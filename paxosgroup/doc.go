// Package paxosgroup decides, for one shard, which entry occupies each slot of
// its log. A Replica is proposer, acceptor and learner of one Multi-Paxos group
// in one pure state machine: messages and clock readings go in, a Ready comes
// out, and nothing else moves. Same inputs, same outputs, byte for byte.
//
// # Invariants
//
// Asserted where they could break (invariant.go) and exercised by test/sim:
//
//   - Promise: the promised ballot never falls, and is on disk before any
//     message that rests on it leaves the replica. A candidate sends nothing at
//     a ballot before its own promise of it is on disk, so that no ballot is
//     used by two leaderships.
//   - Accept: nothing is accepted below the promised ballot, and no slot has
//     two values at one ballot. A replica counts its own acceptance only when
//     it is flushed, though it asks the others for theirs at once.
//   - Chosen: once a phase-2 quorum of the membership that governs a slot has
//     accepted an entry there, every later ballot proposes that entry there.
//     Slots are learned in order and without a gap.
//   - Terms: a leadership's first own entry is an opening, its data entries are
//     numbered 1, 2, 3, … An entry that another leader proposes again keeps its
//     term and number. Every learner comes to the same verdicts: what is
//     effective of a term is a prefix of what its leader proposed, and nothing
//     of an older term follows a newer opening.
//   - Membership: the configuration of a slot is fixed by the chosen entries
//     below it. It is one configuration, or two while a change is being made: then
//     every quorum, of either phase, pre-votes or lease, is one of each. Nothing is
//     proposed in a slot without the promises of a phase-1 quorum of what governs
//     it, be the change below it chosen or not; nor above a change that another
//     leader began and that is undecided.
//   - Lease: while clocks drift less than Config.ClockDriftPPMMax, at most one
//     replica believes that it holds the lease. The leader counts from sending,
//     a grantor from receipt; a restarted grantor, having forgotten what it
//     granted, first waits one LeaseDuration. Leases serve reads and calm: no
//     other invariant rests on a clock.
//
// Assumed: crashes, restarts, lost, repeated, delayed and reordered messages;
// a flush that was reported has happened; a replica that lost its disk comes
// back under a new id. Not assumed: synchronised clocks. Out of scope: lying
// members.
//
// # The protocol
//
// A follower that hears no leader, and honours no lease, asks for pre-votes
// (election.go). With a phase-1 quorum of them it promises itself a new ballot
// and sends Prepare for all slots above its chosen prefix. A Promise carries
// what its sender accepted above its own chosen slot, and that slot; the
// candidate fetches what is chosen and it has not (learner.go) before it goes
// on. It then proposes again, slot by slot, the entry of the highest ballot
// reported, no-ops in the gaps, its opening, and from then on what callers hand
// in (leader.go). Phase 1 is not run again in this leadership, but for the
// members that a new configuration adds: those are asked before it is proposed
// (reconfigure.go). What allows it to be skipped is asserted at each Accept
// (Replica.mayPropose).
//
// Phase 2 is pipelined within a window of slots and bytes. Acceptors accept in
// any order; the leader extends the chosen prefix in order, and tells it with
// the next Accept, or soon after if there is none to send. A follower marks as
// chosen what it accepted at that leader's ballot; anything else it fetches,
// from any peer.
//
// Heartbeats renew the lease (lease.go). Those of all groups of two processes
// are one beat at rest, if the caller has them share it (Beats, beat.go). Reads
// take no slot: the lease vouches for the chosen slot of its holder, or a
// quorum that is asked after the read was, at the holder or for whoever asks it
// (read.go). A leader that has had no lease for a LeaseDuration steps down. One
// that hands over (transfer.go) stops, drains, stops using its lease, and only
// then tells its successor, whose Prepare names the leadership whose lease it
// may pass.
//
// # Using it
//
// After every call that is told the time (Step, Tick, Propose, ReadIndex,
// Persisted and so on) Ready is called until it returns false. Several Readies may be
// outstanding; their AfterSync messages are sent, and Persisted is called, in
// order. A message lost costs time only.
//
// # Sources, and their places here
//
//   - Lamport, "Paxos Made Simple" (2001): phase 1 and 2 in acceptor.go and
//     election.go; section 3, one phase 1 for all slots and no-ops in gaps, in
//     Replica.pump; a configuration that is itself in the log, in membership.go.
//   - Ongaro, "Consensus: Bridging Theory and Practice" (2014), section 4.3: joint
//     consensus; for slots that are accepted in any order, with quorums of any
//     sizes, in reconfigure.go and docs/decisions/0016-joint-consensus.md.
//   - Junqueira, Reed and Serafini, "Zab: High-performance broadcast for
//     primary-backup systems" (DSN 2011): why a pipeline over Paxos loses
//     primary order; judge.go restores it.
//   - Howard, Malkhi and Spiegelman, "Flexible Paxos" (2016): only quorums of
//     different phases must meet; Configuration.faults and quorum.go.
//   - Gray and Cheriton, "Leases" (SOSP 1989): lease.go.
package paxosgroup
