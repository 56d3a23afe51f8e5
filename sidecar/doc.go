// Package sidecar is one region's life: it reads the configuration, makes or
// joins the cluster, drives the region's database through its roles, and tells
// operators how it is.
//
// What is always true:
//
//   - A commit is confirmed to PostgreSQL only when every transaction of this
//     incarnation at or below its position is effective, and a chosen sequence
//     mark covers a sample of all sequences taken after the position arrived.
//   - The fence opens only when this term's opening entry is chosen and applied,
//     everything below it is judged, no local commit is left that is not
//     effective, and the server has not restarted since it was looked at.
//   - No foreign entry is replayed before the fence is closed, every session
//     that could still commit has ended, and capture has handed over all WAL up
//     to that moment, so that what is divergent is known.
//   - A database that holds a transaction which is not effective while another
//     region has opened a term is not read from, and is replaced by an image of
//     a healthy region under a new incarnation. The old one is kept until the
//     image is complete.
//   - An acceptor never votes with an empty memory: a sidecar without an
//     identity takes part only when every region was seen empty at the
//     cluster's making, and otherwise joins under a new replica id.
//   - The log is cut only where this region's own database has it on disk, own
//     entries included; in a region without one, where so many databases have
//     that the losses which are to be survived leave one. What the learner knew
//     where the log begins is durable before the cut.
//   - A replica that a peer refuses for a later start of it stops, and never
//     answers under its name again.
//
// Assumed: PostgreSQL flushes what it says it flushed; the clock that counts
// boot time drifts less than the configured bound. Safety of writes needs no
// clock.
//
// A sidecar connects to its own PostgreSQL only; whatever crosses regions goes
// through the sidecars' own ports.
package sidecar
