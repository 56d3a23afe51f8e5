// Package sequence keeps sequences from handing out a value twice across a
// change of leadership. Logical decoding says nothing of nextval, so the leader
// samples its sequences and puts marks into the log: no value beyond a mark was
// handed out before the next one. Followers set their sequences to each mark at
// its place in the log, and so go on behind every value handed out.
//
// Invariants:
//
//   - A position of the WAL may be confirmed once a sample taken after it was
//     received is Covered: each value that nextval had handed out by then, and
//     each that it hands out without writing WAL (so without any commit that
//     waits), lies at or before a chosen mark.
//   - A sample never waits for a lock: a transaction that holds a sequence may
//     itself be waiting for this sample's confirmation. A sequence that is locked
//     is answered for by a bound far ahead of what was last seen of it.
//
// Limits, which PostgreSQL 15 sets and the margin of the marks makes small:
// nextval writes WAL for 32 values at a time; a session that takes one of them
// after another session's transaction fetched them, but before that one's
// commit was confirmed, does not wait for it. Marks are therefore logged well
// ahead and before they are used up. A sequence that a transaction creates is
// not visible to a sample before its commit is released; AdvancePastColumns
// mends those at promotion, as far as their values were stored.
package sequence
