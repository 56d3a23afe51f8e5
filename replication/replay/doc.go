// Package replay applies entries of the log to the local database under a
// replication origin whose progress is the slot.
//
// Invariants:
//
//   - Whole: a batch of slots is one PostgreSQL transaction. Its changes and the
//     progress of the origin (the last slot, written as an LSN) are in one
//     commit record, so a crash leaves both or neither, even with
//     synchronous_commit off.
//   - Once: progress is read only after the origin was set up in the same
//     session, which nobody else can hold at that time; a batch at or below it
//     is refused.
//   - Clean: after any error the connection is closed and never used again. The
//     origin's LSN is a session variable that no rollback clears, so the next
//     write of that session would commit the position of changes that were
//     rolled back. For the same reason nothing but replay runs on it.
//   - In order: what is applied equals the log's order row by row. Statements of
//     many rows are used only where the order among those rows cannot show: see
//     runs in run.go.
//   - Exact: a change that does not meet the one row it names stops replay with
//     a *ConflictError. Nothing is skipped and nothing is overwritten.
//   - Announced late: Applied moves when COMMIT has returned. PostgreSQL moves
//     the progress that other sessions read before the rows become visible, and
//     before they are on disk; only Flushed says what a crash cannot undo.
//
// A slot that writes nothing (a no-op, a void entry, an own one, a fragment)
// leaves progress where it is, since PostgreSQL moves it only in a commit
// record. So a database's position is progress and then every slot after it
// that wrote nothing; whoever starts from Progress walks the log over them. Such
// slots may be handed to Apply as Transactions with a zero Payload, which moves
// Applied, and with the next slot that writes also Progress; ForceProgress moves
// Progress at once, for one commit record.
//
// Left out: deciding what is effective, and what a schema change or a sequence
// mark means. The latter two are functions of Config.
package replay
