// Package runner drives the groups of a sidecar: it gives each core its clock,
// hands it what peers and callers send, pays what its Ready owes, and offers
// what was chosen for reading.
//
// One goroutine, Run's, steps all cores. Log and transport have their own; what
// they have to tell comes back to the loop through queues. Nothing in the way of
// a proposal waits for a tick: the loop runs when there is something to do, and
// a timer only wakes it for the deadlines that cores name.
//
// Invariants:
//
//   - A core is touched by the loop alone.
//   - Messages of AfterSync leave only after every record of this and all
//     earlier Readies of the group is flushed. If the log fails, none ever
//     leaves and Run ends with the error.
//   - Read is gapless: it returns consecutive slots, each with the verdict that
//     judging the log from its base gives, whether the entry comes from memory or
//     from disk.
//   - Memory is bounded: the inbox drops what exceeds it (peers repeat what
//     matters), proposals wait for room in the window, and chosen entries are
//     kept up to a number of bytes.
//
// Reading does not hold up the loop, nor does it wait for this replica's own
// flush of what was learned: after a crash the log may know less as chosen than
// a reader has seen. It learns the same again from its peers.
//
// # Time
//
// Instants are CLOCK_BOOTTIME, which never steps and counts suspend. A virtual
// machine that was stopped by its host may have missed time even so. Then the
// wall clock, once it is set right, is ahead of it by more than drift can be: a
// leader that sees this resigns, for its lease may have run out unnoticed. An
// administrator who sets the wall clock forward causes the same, which costs an
// election and nothing else. Grants that this replica made last too long after
// such a stop, which is the safe side.
package runner
