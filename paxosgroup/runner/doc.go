// Package runner drives the groups of a sidecar: it gives each core its clock,
// hands it what peers and callers send, pays what its Ready owes, and offers
// what was chosen for reading.
//
// An Engine does all of it and moves nothing by itself: no goroutine, clock or
// lock; time is handed in, log and transport are interfaces. The simulator calls
// it directly. A Runner puts it among goroutines: whoever brings work does it if
// the engine is free, else leaves it to the one who holds it. Nothing in the way
// of a proposal waits for a tick or, when all is at rest, for another goroutine;
// a timer only wakes the runner for the deadlines that cores name.
//
// Invariants:
//
//   - An engine and its cores are touched by one goroutine at a time, and nobody
//     waits while he holds them: neither Append nor Send blocks.
//   - Messages of AfterSync leave only after every record of this and all
//     earlier Readies of the group is flushed. If the log fails, none ever
//     leaves and Run ends with the error; where the log has parts on several
//     disks, the groups on the one that failed are stopped, and Run ends when all
//     are.
//   - Read is gapless: it returns consecutive slots, each with the verdict that
//     judging the log from its base gives, whether the entry comes from memory or
//     from disk.
//   - Memory is bounded: the inbox drops what exceeds it (peers repeat what
//     matters), a bounded number of proposals waits for room in the window, and
//     chosen entries are kept up to a number of bytes.
//
// Reading does not hold up the engine, nor does it wait for this replica's own
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
