package replay

import (
	"context"
	"fmt"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
)

// Progress reads the slot of an origin from any session; 0 if there is no such
// origin or no progress. With flush it first flushes the commit that brought
// it; without, the commit may be neither visible yet nor on disk.
func Progress(ctx context.Context, conn *pgx.Conn, origin string, flush bool) (uint64, error) {
	var lsn *string
	const q = `SELECT CASE WHEN pg_replication_origin_oid($1) IS NOT NULL THEN pg_replication_origin_progress($1, $2)::text END`
	if err := conn.QueryRow(ctx, q, origin, flush).Scan(&lsn); err != nil {
		return 0, fmt.Errorf("progress of replication origin %q: %w", origin, err)
	}
	return parseSlot(lsn)
}

// AdvanceOrigin moves the progress of an origin that no session holds up to
// slot, never back, and returns when that is on disk. It is for a region that
// leads, whose own entries are in the database without any progress to say so;
// conn is any other session, outside a transaction. The origin is made if it is
// missing.
func AdvanceOrigin(ctx context.Context, conn *pgx.Conn, origin string, slot uint64) error {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return fmt.Errorf("advance replication origin %q: %w", origin, err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }() // nothing after Commit
	for _, q := range []string{
		// The commit's own flush is what makes the advance durable:
		// pg_replication_origin_advance only inserts its record, and reading the
		// progress with flush would not notice. It must not wait for a quorum.
		`SET LOCAL synchronous_commit = local`,
		`SELECT pg_catalog.pg_current_xact_id()`,
	} {
		if _, err := tx.Exec(ctx, q); err != nil {
			return fmt.Errorf("advance replication origin %q: %w", origin, err)
		}
	}
	const create = `SELECT pg_catalog.pg_replication_origin_create($1) WHERE pg_catalog.pg_replication_origin_oid($1) IS NULL`
	if _, err := tx.Exec(ctx, create, origin); err != nil {
		return fmt.Errorf("create replication origin %q: %w", origin, err)
	}
	// One statement, since advance itself would also go backward.
	const advance = `SELECT pg_catalog.pg_replication_origin_advance($1, $2::text::pg_catalog.pg_lsn)
		WHERE coalesce(pg_catalog.pg_replication_origin_progress($1, false), '0/0') < $2::text::pg_catalog.pg_lsn`
	if _, err := tx.Exec(ctx, advance, origin, pglogrepl.LSN(slot).String()); err != nil {
		return fmt.Errorf("advance replication origin %q to slot %d: %w", origin, slot, err)
	}
	if err := tx.Commit(ctx); err != nil {
		return fmt.Errorf("advance replication origin %q to slot %d: %w", origin, slot, err)
	}
	return nil
}
