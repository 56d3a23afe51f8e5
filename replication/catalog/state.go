package catalog

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// State is what the views of one region show about a shard.
type State struct {
	Shard             string        `json:"-"`
	Region            string        `json:"region"` // this one
	Role              string        `json:"role"`
	Leader            string        `json:"leader"` // region; "" if none is known
	Ballot            string        `json:"ballot"`
	LeaseLeftSeconds  float64       `json:"lease_left_seconds"`
	Chosen            uint64        `json:"chosen"`
	Applied           uint64        `json:"applied"` // visible to readers, never ahead of that
	LagSlots          uint64        `json:"lag_slots"`
	LagSeconds        float64       `json:"lag_seconds"`
	Health            string        `json:"health"`
	Synchronous       bool          `json:"synchronous"`
	DurabilityRegions int           `json:"durability_regions"` // whose loss loses nothing
	Phase1Quorum      int           `json:"phase1_quorum"`
	Phase2Quorum      int           `json:"phase2_quorum"`
	Regions           []RegionState `json:"regions"`
}

// RegionState is what a region knows of one region, itself included.
type RegionState struct {
	Region     string     `json:"region"`
	Kind       string     `json:"kind"` // voter, witness, learner
	Role       string     `json:"role"`
	Chosen     uint64     `json:"chosen"`
	Applied    uint64     `json:"applied"`
	LagSlots   uint64     `json:"lag_slots"`
	LagSeconds float64    `json:"lag_seconds"`
	Health     string     `json:"health"`
	LastHeard  *time.Time `json:"last_heard,omitempty"`
}

// Publish shows s in the views, in place of what was shown for its shard.
func Publish(ctx context.Context, conn *pgx.Conn, s State) error {
	if s.Regions == nil {
		s.Regions = []RegionState{}
	}
	packed, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encode the state of shard %s: %w", s.Shard, err)
	}
	err = commitLocally(ctx, conn, `INSERT INTO quorate.published (shard, at, state) VALUES ($1, clock_timestamp(), $2)
		ON CONFLICT (shard) DO UPDATE SET at = excluded.at, state = excluded.state`, s.Shard, string(packed))
	if err != nil {
		return fmt.Errorf("publish the state of shard %s: %w", s.Shard, err)
	}
	return nil
}

// LogRow is one effective entry as quorate.log shows it.
type LogRow struct {
	Slot        uint64    `json:"slot"`
	Transaction uint64    `json:"transaction"` // its xid where it committed
	Time        time.Time `json:"time"`
	Region      string    `json:"region"`
	Tables      []string  `json:"tables"`
	Rows        uint64    `json:"rows"`
	Bytes       uint64    `json:"bytes"`
	Trace       string    `json:"trace,omitempty"`
}

// AppendLog appends entries in slot order as one row. Called about once a
// second; a batch whose first slot is there already is replaced.
func AppendLog(ctx context.Context, conn *pgx.Conn, shard string, rows []LogRow) error {
	if len(rows) == 0 {
		return nil
	}
	packed, err := json.Marshal(rows)
	if err != nil {
		return fmt.Errorf("encode %d log rows: %w", len(rows), err)
	}
	err = commitLocally(ctx, conn, `INSERT INTO quorate.log_batch (shard, first_slot, last_slot, packed) VALUES ($1, $2, $3, $4)
		ON CONFLICT (shard, first_slot) DO UPDATE SET last_slot = excluded.last_slot, written = excluded.written, packed = excluded.packed`,
		shard, int64(rows[0].Slot), int64(rows[len(rows)-1].Slot), string(packed))
	if err != nil {
		return fmt.Errorf("append slots %d to %d to quorate.log: %w", rows[0].Slot, rows[len(rows)-1].Slot, err)
	}
	return nil
}

// PruneLog drops the batches of quorate.log that are older than age, and the
// oldest of what exceeds bytes as stored. It returns how many went.
func PruneLog(ctx context.Context, conn *pgx.Conn, age time.Duration, bytes int64) (int64, error) {
	var gone int64
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SET LOCAL synchronous_commit = local; SET TRANSACTION READ WRITE"); err != nil {
			return err
		}
		return tx.QueryRow(ctx, "SELECT quorate.prune_log($1, $2)", age, bytes).Scan(&gone)
	})
	if err != nil {
		return 0, fmt.Errorf("prune quorate.log: %w", err)
	}
	return gone, nil
}

// commitLocally runs one statement in a transaction that does not wait for
// synchronous replication, in one round trip once its plan is known.
func commitLocally(ctx context.Context, conn *pgx.Conn, sql string, args ...any) error {
	b := &pgx.Batch{}
	b.Queue("BEGIN READ WRITE")
	b.Queue("SET LOCAL synchronous_commit = local")
	b.Queue(sql, args...)
	b.Queue("COMMIT")
	if err := conn.SendBatch(ctx, b).Close(); err != nil {
		if conn.PgConn().TxStatus() != 'I' && !conn.IsClosed() {
			_, _ = conn.Exec(ctx, "ROLLBACK") // the first error is the one to tell
		}
		return err
	}
	return nil
}
