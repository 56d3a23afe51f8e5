// Package entry is the payload of a data slot: one PostgreSQL transaction, a
// fragment of a large one, its end, or a set of sequence marks.
//
// Invariants:
//
//   - Self-contained: whoever has all of a transaction's bodies decodes it
//     without any other transaction. A Relation message stands before the first
//     change of each relation, and again where the relation changed in between.
//   - Deterministic: a transaction that the publisher sends again gives the
//     same body and so the same checksum, whatever it had sent before in that
//     session. Therefore a Relation message is repeated only when its content
//     changed within the transaction, not whenever the publisher repeats it,
//     and Type messages are left out: the publisher does not notice a renamed
//     type, so the name it sends depends on when its session began.
//   - Bounded: nothing is allocated on the word of a header; lengths are checked
//     against the bytes that are there. A message longer than a fragment is cut
//     and runs on in the next fragment, so no payload outgrows a setting.
//   - Encoding and decoding round-trip: what Decode accepts, Append writes again
//     byte for byte.
//
// # Format, version 1
//
// Integers are big-endian. A payload is a header of 88 bytes and a body.
//
//	offset size
//	     0    1  version, 1
//	     1    1  type: 1 transaction, 2 fragment, 3 commit, 4 marks
//	     2    2  zero
//	     4    4  CRC-32C of the header without these four bytes
//	     8    8  xid, extended by epoch
//	    16    8  end LSN of the commit
//	    24    8  commit time, microseconds since 1970-01-01 UTC, signed
//	    32   16  trace id
//	    48    8  span id
//	    56    1  trace flags
//	    57    3  zero
//	    60    4  changes
//	    64    4  CRC-32C: of this payload's body; of a commit: of all the bodies
//	    68    4  fragment: its number from 1; of a commit: their count
//	    72    8  attempt: fragment and commit, else zero
//	    80    8  length: of this payload's body, at most 64 MiB; of a commit: of all the bodies
//	    88       body
//
// The body of a transaction is a sequence of messages, each a length (unsigned
// varint, shortest form, at most 1 GiB + 64 KiB) and then that many bytes as the
// pgoutput plugin of PostgreSQL, protocol version 1, wrote them: Relation,
// Insert, Update, Delete, Truncate and Message, without Begin and Commit. The
// bodies of a transaction's fragments, one after the other, are such a
// sequence. A commit has no body. The body of marks is their count (unsigned
// varint), then for each one schema and name, both a length (unsigned varint,
// at most 255) and bytes, and the value, 8 bytes signed.
package entry
