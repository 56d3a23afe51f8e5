package replay

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Exported is a snapshot that other sessions of this server can adopt with SET
// TRANSACTION SNAPSHOT until Release.
type Exported struct {
	Name string
	Slot uint64 // holds exactly the effects of the slots up to here

	conn *pgx.Conn
}

// Export exports a snapshot between two batches: no Apply runs until Export has
// returned, and what the last one committed is visible. The replay session can
// not hold a snapshot and go on, so another connection does. The snapshot equals
// the slot only where nothing but replay writes, that is, while the fence is
// closed. It holds back vacuum until Release.
func (s *Session) Export(ctx context.Context) (*Exported, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		return nil, ErrClosed
	}
	conn, err := s.cfg.open(ctx, " export", map[string]string{
		"idle_in_transaction_session_timeout": "0", "statement_timeout": "0", "search_path": "pg_catalog",
	})
	if err != nil {
		return nil, fmt.Errorf("export a snapshot: connect: %w", err)
	}
	e := &Exported{Slot: s.applied.Load(), conn: conn}
	_, err = conn.Exec(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
	if err == nil {
		err = conn.QueryRow(ctx, "SELECT pg_export_snapshot()").Scan(&e.Name)
	}
	if err != nil {
		e.Release()
		return nil, fmt.Errorf("export a snapshot at slot %d: %w", e.Slot, err)
	}
	return e, nil
}

// Alive reports, by asking the server, whether the snapshot can still be adopted.
// It is not for concurrent use with Release.
func (e *Exported) Alive(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err := e.conn.Exec(ctx, "SELECT 1")
	return err
}

// Release ends the snapshot. It may be called again.
func (e *Exported) Release() { closeConn(e.conn) }
