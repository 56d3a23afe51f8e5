// Package sim runs the regions of a cluster in one goroutine, under clocks, a
// network and disks of its own, driven by one seed. The same seed makes the same
// run, event for event.
//
// What runs is what is shipped: the consensus core, the engine that drives it,
// client sessions and reads, and the slot log with its recovery. What is faked
// is what these are handed from outside: time, the transport, the file system
// (paxosgroup/slotlog/simdisk) and the database, which is a few registers.
//
// A plan is drawn from the seed before the world begins: members of all kinds,
// quorum sizes, groups, clients, how bad the network is, and a list of faults
// with their times (faultKinds). What fails is run again without this or that,
// until little is left (shrink), which is printed with the seed.
//
// Checked at every step, by code that shares nothing with what it checks but
// types:
//
//   - agreement: no two replicas are handed different entries, or verdicts, in
//     one slot, nor any replica a slot out of turn;
//   - durability: an entry is handed out only when a phase-2 quorum of the
//     membership that governs its slot has flushed it at one ballot, so it can
//     not be lost; no ballot has two values in a slot;
//   - choice: once a phase-2 quorum has flushed an entry at one ballot, nothing
//     else is accepted in its slot at a higher one, even if nobody was told;
//   - reads: a slot that a read is to be served at is at or above all that anybody
//     had been handed when it was asked for;
//   - promises: none falls, and none that was sent is forgotten by a crash, nor is
//     anything else that was flushed;
//   - confirmation: what a proposer was told is effective is effective;
//   - primary order: the effective data entries of a term are a prefix of what
//     its leader offered, a term ends where the next one opens, and no write is
//     effective twice, however often it was proposed;
//   - lease: never do two replicas believe that they hold it;
//   - memory: windows and queues stay within their bounds.
//
// What clients saw of their writes and reads must be linearizable (porcupine).
// When the faults end there must be progress within a bounded time, all replicas
// become equal, and one leader stays.
package sim
