// Package feed publishes the effective changes of a shard's log to a stream of
// NATS JetStream, in commit order, each once.
//
// # Subjects
//
//	quorate.<cluster>.<shard>.<schema>.<table>  insert, update, delete, truncate
//	quorate.<cluster>.<shard>.ddl               DDL
//	quorate.<cluster>.<shard>.gap               changes that can no longer be read
//	quorate.<cluster>.<shard>.position          nothing happened for some hundred slots
//
// So quorate.C.S.*.* is all rows, and quorate.C.S.> is everything in order. In
// names, a byte that NATS does not allow in a token, or that would be mistaken
// for a wildcard or for an escape (control characters, space, '.', '*', '>',
// '%', DEL), is written as '%' and two upper-case hex digits: table "a.b" is
// a%2Eb. The stream is named quorate_<cluster>_<shard>, with '_', '/' and '\'
// of the names escaped as well.
//
// # Messages
//
// Each message has the headers Nats-Msg-Id, group/slot/ordinal, and (if its
// transaction is traced) traceparent. The ordinal counts the messages of a slot
// from 1. The body is JSON:
//
//	{"slot":42,"ordinal":2,"last":true,
//	 "transaction":{"xid":917,"commit_time":"2026-11-20T08:00:00.123456Z",
//	                "lsn":"0/1A2B3C8","region":"r1","incarnation":"00000000000000a1"},
//	 "trace":"00-…-…-01",
//	 "op":"update","schema":"public","table":"t",
//	 "key":{"id":"1"},"new":{"id":"1","v":null},"unchanged":["body"]}
//
// The change itself is as entry.Change renders it, values being PostgreSQL's
// text form or null, with these additions. "key" is there in every insert,
// update and delete of a table with a key: the values of the replica identity
// before the change, or for an insert the new ones. A table with replica
// identity FULL has "old", the whole row before, in its place; what an update
// of it left alone is filled in from there. Otherwise a large value that an
// update left alone is named in "unchanged" and missing from "new"; it is never
// given as null. A value too large for one NATS message is left out and named
// in "omitted" with its length in bytes. A TRUNCATE is one message for each
// table, "tables" naming all of them.
//
// The last message of a transaction says "last":true; there is no other marker.
// Logical messages of applications are not published.
//
// {"op":"gap","from":5,"to":90} says that slots 5 to 90 were cut from the log
// before they were published: whoever keeps a copy must load it anew. It comes
// first in a stream that was created when the log did not begin at slot 1.
//
// # Each once, in order
//
//   - The stream itself is the only record of what was published. A publisher
//     reads the stream's last message and goes on behind its id; a slot that
//     was published in part is rendered again and its first messages skipped.
//     So the rendering of a slot into a sequence of ids must not change while
//     streams live.
//   - Each message is published with the sequence it expects before it. Whoever
//     is not up to date is refused, whether deposed, paused or merely late, and
//     starts again from the stream's last message. The duplicate window of
//     JetStream is not relied on.
//   - Messages are published ahead of their acknowledgements, up to a bound.
//     A message that is lost makes all behind it be refused, so order holds.
//     Pipelines of two publishers cannot interleave into a hole, for what
//     follows a given message is the same for both: position messages too
//     depend on slot numbers alone. Only gap messages depend on the publisher,
//     and what could be missed around one is what it reports as missing.
//     (Nats-Expected-Last-Msg-Id would say the same more strongly, but is
//     checked by each replica when it applies a message, from a field that a
//     replica that was caught up does not have: nats-server 2.15.)
//   - The last message is never deleted by age: the stream has no maximal age.
//     The publisher purges what is older, and never the last message, so that
//     the position survives any pause.
//
// The feed reads the log behind everyone else and never delays a commit. How
// far it got is in Status, for whoever cuts the log.
package feed
