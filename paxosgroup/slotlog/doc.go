// Package slotlog is the durable log of a sidecar: one file sequence for the
// records of all its groups, so that one flush serves every group that waits.
//
// Invariants:
//
//   - Durable: a callback is called with nil only after an fdatasync that began
//     after its records were written. Callbacks run in the order of Append.
//   - Fail-stop: after a write or flush that failed, no record is written and
//     every callback gets the error. A failed flush may have dropped the pages
//     it failed on, so a retry could succeed and lie.
//   - Nothing is guessed at start: what can be the trace of a write that was
//     cut short is cut off, anything else that does not check out is refused
//     with the file, the offset and the way out.
//   - A segment is sealed and flushed before its successor exists, so only the
//     last one can hold a torn write.
//   - A segment begins with the state (promise, chosen slot, base) of every
//     group, so that one with no entry in use can be deleted.
//
// Assumed: a sector of 512 bytes is written whole or not at all, and a file that
// was preallocated and flushed keeps its length. Not assumed: that the sectors
// of one write reach the disk in order, or that the disk returns what it was
// given. Out of scope: a disk that acknowledges a flush it did not do.
//
// # Format, version 1
//
// Numbers are little-endian. A directory holds LOCK, segments named by their
// sequence number (0000000000000001.log, …) and at most one prepared segment
// (next.tmp). All that was never written is zero.
//
//	segment header, 64 bytes, at offset 0
//	  0  8  magic "QUORLOG\n"
//	  8  4  version, 1
//	 12  4  zero
//	 16  8  sequence number, the same as in the file's name; below 2^32
//	 24  8  length of the file in bytes; below 2^32
//	 32 28  zero
//	 60  4  CRC-32C of bytes 0 to 59
//
//	batch header, 32 bytes, at a multiple of 32: one flush in one segment
//	  0  4  magic 0x51724231
//	  4  4  bytes that follow, padding to a multiple of 32 included
//	  8  8  number of the batch, counting up through all segments
//	 16  4  number of records
//	 20  4  number of sectors of the batch that hold only zeros
//	 24  4  zero
//	 28  4  CRC-32C of sequence number, offset in the file, bytes 0 to 27
//
//	record, any offset
//	  0  4  length of the body; at most 1 GiB
//	  4  4  CRC-32C of sequence number, offset in the file, bytes 0 to 3, bytes 8 to the end
//	  8  1  type
//	  9  3  zero
//	 12  4  group
//	 16    body
//
//	type  1 promise  ballot
//	      2 accept   slot (8), ballot, entry
//	      3 learn    slot (8), ballot, entry
//	      4 chosen   slot (8)
//	      5 base     promised ballot, base
//	     16 state    promised ballot, chosen slot (8), base; at the start of a segment
//	     17 seal     empty; group 0; the last record of a segment that has a successor
//
//	ballot      counter (8), replica (4)
//	string      length (2), bytes
//	entry       kind (1), term (ballot), number (8), incarnation (8), region (string), payload (the rest)
//	base        as paxosgroup.EncodeBase has it (the rest)
package slotlog
