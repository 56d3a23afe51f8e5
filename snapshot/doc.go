// Package snapshot ships a database at one slot from one region's sidecar to
// another's.
//
// Invariants:
//
//   - Exact: everything is read in one exported PostgreSQL snapshot, whose slot
//     the source names. Sequences are the exception, since PostgreSQL keeps no
//     old values of them: theirs are of that moment or later.
//   - Whole: an image is loaded completely and checked, or Load returns an error
//     and the database is worth nothing: the caller drops it and starts over.
//     Each chunk carries its place and a checksum of its content, each part its
//     length and number of rows, which the loading COPY must confirm.
//   - Confirmed: Load returns only after the source has said, with all parts
//     delivered, that the image holds good. See Exported.Verify.
//   - Durable: the sessions that load do not wait for the disk, but Load flushes
//     what they wrote before it returns.
//   - Bounded: chunks are of ChunkBytes, and gRPC's flow control holds the
//     source back. A source serves at most ImagesMax images at a time.
//
// A part is a table, or a range of pages of a large one, in COPY's binary format.
// The schema is pg_dump's custom archive, restored in its sections: first what
// the data needs, then the data, then indexes, constraints and triggers.
//
// What is a region's own is not shipped: the schemas of package catalog, triggers
// and event triggers that call their functions, the publication, subscriptions. The caller
// installs these afterwards. Nor are settings and privileges of the database
// itself, tablespaces, contents of unlogged and foreign tables. Roles that own or
// may use something are made without LOGIN where they are missing, and noted.
// Materialized views are filled by running their queries. A database with large
// objects is refused, because changes of those cannot be replicated.
package snapshot
