package replay

import (
	"context"
	"time"
)

const (
	watchAfter = 50 * time.Millisecond // most batches are done by then
	watchEvery = 50 * time.Millisecond
)

// watchBlockers looks, while a batch is applied, for sessions that hold locks it
// waits for, and ends them when they have done so for MaxReaderDelay in all, at
// once while promoting. The returned function stops and waits for it.
func (s *Session) watchBlockers(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		var since time.Time // of the batch's first wait
		for wait := watchAfter; ; wait = watchEvery {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
			blocked, err := s.endBlockers(ctx, !since.IsZero() && time.Since(since) >= s.cfg.MaxReaderDelay || s.promoting.Load())
			if err != nil && ctx.Err() == nil {
				s.cfg.Logger.Warn("look for sessions that block replay", "error", err)
			}
			if blocked && since.IsZero() {
				since = time.Now()
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// endBlockers reports whether replay waits for another session's lock. With end
// it ends those sessions.
func (s *Session) endBlockers(ctx context.Context, end bool) (bool, error) {
	conn, err := s.adminConn(ctx)
	if err != nil {
		return false, err
	}
	// The answer is awaited even if the batch is done meanwhile: an interrupted
	// query would cost the standing connection.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	s.adminMu.Lock()
	defer s.adminMu.Unlock()
	// Pid 0 is a prepared transaction, which cannot be ended.
	rows, err := conn.Query(ctx, `
		SELECT b.pid, coalesce(a.application_name, ''), coalesce(left(a.query, 200), ''), $2::bool AND pg_terminate_backend(b.pid)
		  FROM (SELECT DISTINCT pid FROM unnest(pg_blocking_pids($1::int4)) pid WHERE pid > 0) b LEFT JOIN pg_stat_activity a ON a.pid = b.pid`,
		int32(s.replayPID.Load()), end)
	if err != nil {
		return false, err
	}
	defer rows.Close()
	blocked := false
	for rows.Next() {
		var pid int32
		var application, query string
		var ended bool
		if err := rows.Scan(&pid, &application, &query, &ended); err != nil {
			return blocked, err
		}
		blocked = true
		if ended {
			s.terminated.Add(1)
			s.cfg.Logger.Warn("ended a session that blocked replay", "pid", pid, "application", application, "query", query)
		}
	}
	return blocked, rows.Err()
}
