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
//   - A batch is begun only when all before it is flushed, a segment only when its
//     predecessor is sealed and flushed: so only the last batch can be torn.
//   - No write touches a sector that something flushed is in.
//   - A segment begins with the state (promise, chosen slot, base) of every
//     group, so that one with no entry in use can go.
//   - What was read at start is on the disk: the last batch, which may be in
//     memory alone after a flush that failed, is written and flushed again.
//
// Assumed: a sector of 512 bytes is written whole or not at all, and a file that
// was preallocated and flushed keeps its length. Not assumed: that the sectors
// of one write reach the disk in order, or that the disk returns what it was
// given. Out of scope: a disk that acknowledges a flush it did not do.
//
// # What must survive a crash
//
//	promised ballot, accepted     the callback of Append: flushed before any message
//	entry, learned entry, base    that rests on them (Ready.AfterSync) leaves
//	chosen slot                   with the next flush of anything, or an orderly stop: it
//	                              can be learned again, so nothing rests on it
//	state of all groups           with the first batch of each segment, flushed before
//	                              any older segment goes
//	a segment's length and name   before its first batch is written: fsync of the file,
//	                              then of the directory
//	that a segment is gone        fsync of the directory, before the next one goes and
//	                              before its file is written to in another life
//	where a group of a set lives  in every directory of the set, before the group's
//	                              first record is handed to a log
//
// What is not kept: leases (a restarted replica waits them out), what is applied
// (the database keeps it), the index (built at start).
//
// # Torn writes and rot
//
// Files are used again, so behind the end of the log there may be anything an
// earlier segment wrote. Each sector ends in a stamp with the segment's number. A
// batch whose checksum fails was cut short if one of its sectors bears an older
// stamp, or none, and there is no readable batch behind it: in the last segment it
// is cut off. If all its sectors are of this segment they were all written, and
// one has rotted since: the log is refused, as it is for a sector whose stamp
// nobody wrote. A sector that the disk lost whole, of the very last batch, cannot
// be told from one that was never written.
//
// # Space
//
// The next segment is allocated while the last is filled. When there is no room
// for it and little of the last is left, Full says so: what still comes in, such
// as a base that frees segments, has that rest. What then finds no segment waits,
// unacknowledged and readable, and the log looks for room every RetryInterval.
// Any other error, and any error of a flush, stops the log for good.
//
// A segment that nothing is in use in is kept to be used again (two at most) or
// deleted. Overwriting blocks that were written before costs a flush no change of
// the file's metadata; blocks that were only allocated have to be marked as written
// in the file system's journal. Where at least
// four of the oldest segments hold together less in use than a quarter of one,
// because of groups that are idle, those records are written once more at the end.
//
// # Start
//
// A start reads every segment once, judges the chosen entries on the way
// (Restored.Judged) and keeps no payload of them. It took 1.2 s for each GiB from
// the page cache on a loaded machine of two cores: go test -bench Recovery.
//
// # Several directories
//
// A Set is a log in each of several directories, meant for disks of their own;
// nothing of one waits for another. A group lives in one directory for
// good. The file SET, which is replaced whole and flushed, says in each directory
// which there are and which group lives where; all say the same, or one has it
// newer, after a crash, about groups that have no record yet. So:
//
//   - A directory that is empty, not mounted or damaged is recognised, and the
//     groups that lived there are known from any other: they are refused, not begun
//     anew, while the rest go on.
//   - A group is begun only while all directories are there.
//   - A directory that holds groups must stay in the configuration, under whatever
//     path; one without may go, and others may be added while all are there.
//   - Open refuses a directory of a set, of which it would know a part.
//
// # Format, version 2
//
// Numbers are little-endian. A directory holds LOCK, segments named by their
// sequence number (0000000000000001.log, …), segments not used any more
// (….unused) and at most two being prepared (next.tmp, large.tmp), whose contents
// mean nothing.
//
// A segment is a sequence of sectors of 512 bytes: 508 bytes of data and a stamp.
// Offsets in what follows, checksums included, count data only.
//
//	stamp, at byte 508 of each sector; all zero in a sector never written
//	  0  2  check: CRC-32C of 1, the lower 16 bits of the sequence number and the
//	        sector's number, both as 8 bytes; its halves xored, the lowest bit set
//	  2  2  the lower 16 bits of the sequence number
//
//	segment header, 64 bytes, the rest of its sector zero
//	  0  8  magic "QUORLOG\n"
//	  8  4  version, 2
//	 12  4  zero
//	 16  8  sequence number, the same as in the file's name; below 2^32
//	 24  8  length of the file in bytes, a multiple of 512; below 2^32
//	 32 28  zero
//	 60  4  CRC-32C of bytes 0 to 59
//
//	batch header, 24 bytes, at the start of a sector: one flush in one segment.
//	Behind its records the last sector is zero
//	  0  4  magic 0x32724251
//	  4  4  bytes of records that follow
//	  8  8  number of the batch, counting up through all segments
//	 16  4  number of records
//	 20  4  CRC-32C of sequence number, offset, bytes 0 to 19
//
//	record, any offset
//	  0  4  length of the body; at most 1 GiB
//	  4  4  CRC-32C of sequence number, offset, bytes 0 to 3, bytes 8 to the end
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
//	SET, made as SET.new and renamed
//	  0  8  magic "QUORSET\n"
//	  8  4  version, 1
//	 12  4  number of this directory
//	 16  8  the set: a random number
//	 24  8  generation: the highest is the newest
//	 32  4  number that no directory had yet
//	 36  4  how many directories
//	 40  4  how many groups
//	 44     for each directory, as configured: number (4), 1 once it has this file
//	        and groups may live there, else 0 (1), length of path (2), path;
//	        for each group, ascending: group (4), number of its directory (4);
//	        CRC-32C of all before (4)
//
//	ballot      counter (8), replica (4)
//	entry       kind (1), term (ballot), number (8), incarnation (8), session and
//	            sequence (unsigned varints), length of region (2), region, payload (the rest)
//	base        as paxosgroup.EncodeBase; the rest
package slotlog
