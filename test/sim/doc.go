// Package sim runs the consensus core of all five regions in one goroutine,
// under a clock, a network and disks of its own, driven by one seed. The same
// seed makes the same run, message for message.
//
// What is faked is only what the core is handed from outside. Messages are
// lost, repeated, delayed, reordered and cut off in one direction or both;
// replicas crash, losing what was not flushed, are paused, and have clocks that
// run at different rates; leadership is moved, members are replaced, logs are
// cut and replicas seeded from images.
//
// Checked at every step, by code that shares nothing with the core but its
// types:
//
//   - agreement: no two replicas are handed different entries, or verdicts, in
//     one slot, nor any replica a slot out of turn;
//   - durability: an entry is handed out only when a phase-2 quorum of the
//     membership that governs its slot has flushed it at one ballot;
//   - promises: none falls, and none that was sent is forgotten by a crash;
//   - primary order: the effective data entries of a term are a prefix of what
//     its leader offered, and a term ends where the next one opens;
//   - lease: never do two replicas believe that they hold it.
//
// When the faults end there must be progress, and all replicas become equal.
package sim
