// Package capture reads the local PostgreSQL server's commits through logical
// decoding and hands each to a Handler as an entry, and is the server's
// synchronous standby: what it confirms releases COMMITs.
//
// Invariants:
//
//   - Order: the Handler hears of commits in the order of their end in the WAL,
//     each once a stream, and of a position only after every commit that ends
//     at or below it.
//   - Nothing is confirmed but what Confirm was given. A confirmation cannot be
//     taken back, so one is never sent ahead, not even as a sign of life: that
//     repeats the last one, and before the first says position zero, which
//     PostgreSQL takes for none.
//   - Write, flush and apply positions are always sent together and equal.
//   - A stream starts where the server's replication slot stands, by asking for
//     0/0. The slot falls back after a crash of the server, so commits that were
//     confirmed before may come again; content, not position, tells which. The
//     same commit gives the same entry (see package entry), whichever stream
//     delivers it; only its fragments' attempt differs.
//   - Never an entry: what came here by replay (its transaction has an origin
//     whose name begins with OriginPrefix), tables of schema quorate, and logical
//     messages whose prefix begins with quorate.local. A transaction with nothing
//     else in it is a mere position.
//   - Memory is bounded by FragmentBytesMax and the largest single row change,
//     whatever the size of a transaction.
//
// Assumed: the publication existed before the replication slot was made, and the
// plugin is pgoutput. It (of PostgreSQL 15) does not notice a renamed schema and
// goes on to describe tables under the old name until something about the table
// or the publication changes: whatever renames a schema must also touch the
// publication in the same transaction. Transactions arrive when they commit (protocol version 1).
// Left out: two-phase commit, whose PREPARE is released by an idle position with
// nothing in the log. The server must have max_prepared_transactions = 0.
package capture
