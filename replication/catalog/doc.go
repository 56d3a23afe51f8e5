// Package catalog is what Quorate installs in a PostgreSQL database, and the
// only package that knows its names: schema "quorate" with its views, the
// publication, the fence, the capture of DDL.
//
// What always holds:
//
//   - Fence: without a row for the shard in quorate.open, no session but one
//     with a replication origin changes a table, whatever its role or its
//     session_replication_role. A snapshot older than the opening is refused,
//     and one from before a closing is refused after it. After a crash or a
//     restart of the server the fence is closed.
//   - Ballots: an opening or closing never overrides one of a newer ballot.
//   - Closing: when CloseFence has returned, no transaction that passed the
//     fence, or that holds row locks, is running.
//   - DDL: a command either travels in its transaction as a message with
//     entry.DDLPrefix, is about temporary objects, or was refused at the statement.
//   - Nothing here is in an entry: state is in unlogged tables or in schema
//     quorate, which capture leaves out.
//   - Installing is idempotent and its own schema has versions; uninstalling
//     leaves the database as it was.
//
// A dump for a server without Quorate is taken by
//
//	pg_dump -N quorate --no-publications
//
// It holds no fence: those triggers are marked internal, as a foreign key's are.
// It does hold the event triggers, which pg_dump cannot leave out, with schema
// quorate_fence and the functions in it, which do nothing where schema quorate is
// missing; DROP SCHEMA quorate_fence CASCADE removes the lot.
//
// Every statement of this package that commits runs with synchronous_commit =
// local, since it is needed to get synchronous replication going.
package catalog
