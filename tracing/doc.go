// Package tracing makes one trace of each commit, across all regions, and
// sends its spans away by OTLP.
//
// The spans of a commit:
//
//	(the client's own span, if its transaction carried a traceparent)
//	└─ commit         leader: from capture's receipt of the commit to its release
//	   ├─ capture     leader: decoding and encoding of the transaction
//	   ├─ propose     leader: from the proposal to the accepts' sending
//	   ├─ accept      one in each region: receipt of the accept to its flush's end
//	   │  └─ flush    one in each region: the log's flush alone
//	   ├─ chosen      leader: from the accepts' sending to the quorum's answers
//	   ├─ release     leader: from effective to the confirmation sent to PostgreSQL
//	   └─ apply       one in each follower: replay of the transaction
//
// Nothing travels between regions for this beyond what an entry holds anyway.
// A commit is identified by cluster, incarnation and end LSN; from these each
// region computes the same trace id, the same id of the commit span, and the
// same decision whether the trace is sampled. A client's traceparent, which
// travels in the entry's header, gives the trace id and the decision instead
// and becomes the parent of the commit span. So a region can place its span in
// the tree without having heard from the leader, and also when the commit span
// is only made later, or never, because the leader died: its children then
// name a parent that is missing.
//
// What is always true:
//
//   - The commit path only takes timestamps. Spans are made afterwards from
//     finished intervals, and are dropped, never waited for, when the collector
//     is slow, away, or the queue is full.
//   - A nil *Tracer is tracing switched off: every method is a no-op that
//     allocates nothing. So is a commit that is not sampled.
//   - The ids are a function of cluster, incarnation, end LSN, client context,
//     stage and region: a span made twice, by a replay after a crash, has the
//     same id both times.
//
// Times are each region's wall clock, so spans of two regions are aligned as
// well as their clocks are.
package tracing
