package catalog

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Opening is when a shard's fence last opened after another region's term, or
// for the first time.
type Opening struct {
	Counter, Replica int64  // the ballot of the term; 0, 0 if there was none
	Horizon          uint64 // a transaction id that was new at that moment, with its epoch: what began before has a lower one
}

// WriteOpening records its own transaction id as the horizon of a term and
// returns when that is flushed.
func WriteOpening(ctx context.Context, conn *pgx.Conn, shard string, counter, replica int64) (Opening, error) {
	o := Opening{Counter: counter, Replica: replica}
	var horizon int64
	err := bookkeeping(ctx, conn, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, `INSERT INTO quorate.opening AS o (shard, counter, replica, horizon)
			VALUES ($1, $2, $3, pg_current_xact_id()::text::bigint)
			ON CONFLICT (shard) DO UPDATE SET counter = excluded.counter, replica = excluded.replica, horizon = excluded.horizon
			RETURNING horizon`, shard, counter, replica).Scan(&horizon)
	})
	if err != nil {
		return o, fmt.Errorf("record the opening of term %d.%d: %w", counter, replica, err)
	}
	o.Horizon = uint64(horizon)
	return o, nil
}

// ReadOpening returns the zero Opening if the fence never opened in this database.
func ReadOpening(ctx context.Context, conn *pgx.Conn, shard string) (Opening, error) {
	var o Opening
	var horizon int64
	err := conn.QueryRow(ctx, "SELECT counter, replica, horizon FROM quorate.opening WHERE shard = $1", shard).Scan(&o.Counter, &o.Replica, &horizon)
	if errors.Is(err, pgx.ErrNoRows) {
		return Opening{}, nil
	}
	if err != nil {
		return Opening{}, fmt.Errorf("read the last opening: %w", err)
	}
	o.Horizon = uint64(horizon)
	return o, nil
}
