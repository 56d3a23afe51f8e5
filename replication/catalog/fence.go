package catalog

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// ErrStaleBallot says that the fence was opened or closed by a newer ballot,
// which stands.
var ErrStaleBallot = errors.New("a newer ballot has moved the fence")

// fenceLockTimeout bounds each try at closing: new writers queue behind it.
const fenceLockTimeout = 100 * time.Millisecond

// SQLSTATEs that are acted on.
const (
	codeLockNotAvailable = "55P03"
	codeReadOnly         = "25006"
)

// FenceState is what stands in the database about a shard's fence.
type FenceState struct {
	Counter, Replica int64 // the newest ballot that moved it; 0, 0 if none ever did
	Open             bool  // by that ballot, and the server has not restarted since
}

// ReadFence returns the state of a shard's fence.
func ReadFence(ctx context.Context, conn *pgx.Conn, shard string) (FenceState, error) {
	var s FenceState
	err := conn.QueryRow(ctx, `
		SELECT coalesce(max(b.counter), 0), coalesce(max(b.replica), 0),
		       EXISTS (SELECT FROM quorate.open o WHERE o.shard = $1 AND o.postmaster_start = pg_postmaster_start_time())
		  FROM quorate.fence_ballot b WHERE b.shard = $1`, shard).Scan(&s.Counter, &s.Replica, &s.Open)
	if err != nil {
		return FenceState{}, fmt.Errorf("read the fence of shard %s: %w", shard, err)
	}
	return s, nil
}

// OpenFence lets this server's sessions write to the shard, from their next
// snapshot on. It returns ErrStaleBallot if a newer ballot has moved the fence.
// Opening for the ballot that has it open does nothing.
//
// OpenFence and CloseFence of one ballot must be called one after the other.
// Sessions that keep it from the lock it needs, having read quorate.open in a
// transaction that goes on (a pg_dump of everything, say), are ended: nobody who
// writes can hold it while the fence is closed.
func OpenFence(ctx context.Context, conn *pgx.Conn, shard string, counter, replica int64) error {
	fail := func(err error) error {
		return fmt.Errorf("open the fence of shard %s at ballot %d.%d: %w", shard, counter, replica, err)
	}
	for {
		moved, err := moveFence(ctx, conn, "open_fence", shard, counter, replica, fenceLockTimeout)
		var pg *pgconn.PgError
		switch {
		case err == nil && !moved:
			return fail(ErrStaleBallot)
		case err == nil:
			return nil
		case !errors.As(err, &pg) || pg.Code != codeLockNotAvailable:
			return fail(err)
		}
		if _, err := endSessions(ctx, conn, holdersOfFence); err != nil {
			return fail(err)
		}
	}
}

func moveFence(ctx context.Context, conn *pgx.Conn, function, shard string, counter, replica int64, lockTimeout time.Duration) (moved bool, err error) {
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		settings := fmt.Sprintf("SET LOCAL synchronous_commit = local; SET TRANSACTION READ WRITE; SET LOCAL lock_timeout = '%dms'", max(lockTimeout.Milliseconds(), 1))
		if _, err := tx.Exec(ctx, settings); err != nil {
			return err
		}
		return tx.QueryRow(ctx, "SELECT quorate."+function+"($1, $2, $3)", shard, counter, replica).Scan(&moved)
	})
	return moved, err
}

// CloseFence makes this server refuse writes to the shard. When it returns nil,
// every transaction that passed the fence or holds row locks has ended: within
// wait by itself, after that because its session was ended. It returns
// ErrStaleBallot, and has done nothing, if a newer ballot has moved the fence.
//
// Sessions of the sidecar (ApplicationName, same role as conn) are not ended,
// walsenders neither. Where a session has to be ended while it waits for
// synchronous replication, its transaction would become visible: then all
// clients are ended, readers first, as by TerminateClients.
func CloseFence(ctx context.Context, conn *pgx.Conn, shard string, counter, replica int64, wait time.Duration) error {
	fail := func(err error) error {
		return fmt.Errorf("close the fence of shard %s at ballot %d.%d: %w", shard, counter, replica, err)
	}
	patience := time.Now().Add(wait)
	for {
		moved, err := moveFence(ctx, conn, "close_fence", shard, counter, replica, fenceLockTimeout)
		if err == nil && !moved {
			return fail(ErrStaleBallot)
		}
		if err == nil {
			break
		}
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || pg.Code != codeLockNotAvailable {
			return fail(err)
		}
		if time.Now().Before(patience) {
			// Those who queued behind this try go first.
			if err := sleep(ctx, fenceLockTimeout/2); err != nil {
				return fail(err)
			}
			continue
		}
		if _, err := endSessions(ctx, conn, holdersOfFence); err != nil {
			return fail(err)
		}
	}
	if _, err := TerminateWriters(ctx, conn); err != nil {
		return fail(err)
	}
	return nil
}

// Which sessions to end. $1 is not needed: each is a condition on a, a row of
// pg_stat_activity in this database that is not the sidecar's.
const (
	holdersOfFence = `EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.granted
		AND l.relation = 'quorate.open'::regclass AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))`
	writers = `(a.backend_xid IS NOT NULL OR EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.granted
		AND l.locktype IN ('relation', 'tuple') AND l.mode NOT IN ('AccessShareLock', 'ShareUpdateExclusiveLock', 'SIReadLock')
		AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())))`
	everyClient = `true`
)

// TerminateWriters ends every session of this database that has a transaction
// id or holds locks of a writer, and returns how many, when they are gone.
func TerminateWriters(ctx context.Context, conn *pgx.Conn) (int, error) {
	n, err := endSessions(ctx, conn, writers)
	if err != nil {
		return n, fmt.Errorf("end the writing sessions: %w", err)
	}
	return n, nil
}

// TerminateClients ends every client session of this database but the
// sidecar's, and returns how many, when they are gone. Sessions that wait for
// synchronous replication go last, so that none of the others sees their rows.
// New sessions are not kept out: the caller sees to that.
func TerminateClients(ctx context.Context, conn *pgx.Conn) (int, error) {
	n, err := endSessions(ctx, conn, everyClient)
	if err != nil {
		return n, fmt.Errorf("end the client sessions: %w", err)
	}
	return n, nil
}

// endSessions ends the sessions that which selects, time and again until none
// is left. If one of them waits for synchronous replication, the others of the
// database go first.
func endSessions(ctx context.Context, conn *pgx.Conn, which string) (int, error) {
	const candidates = `
		SELECT a.pid, a.backend_start, a.wait_event IS NOT DISTINCT FROM 'SyncRep' AS waits
		  FROM pg_stat_activity a
		 WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()
		   AND a.backend_type IN ('client backend', 'background worker', 'logical replication worker', 'logical replication parallel worker')
		   AND NOT (a.application_name LIKE '` + ApplicationName + `%' AND a.usename = session_user) AND `
	ended := map[string]bool{}
	for {
		rows, err := conn.Query(ctx, `WITH chosen AS (`+candidates+which+`),
			everybody AS (`+candidates+`EXISTS (SELECT FROM chosen c WHERE c.waits)),
			to_end AS (SELECT * FROM chosen UNION SELECT * FROM everybody)
			SELECT t.pid || ' ' || t.backend_start, pg_terminate_backend(t.pid)
			  FROM to_end t WHERE NOT t.waits OR NOT EXISTS (SELECT FROM to_end o WHERE NOT o.waits)`)
		if err != nil {
			return len(ended), err
		}
		found := 0
		for rows.Next() {
			var session string
			var signalled bool
			if err := rows.Scan(&session, &signalled); err != nil {
				rows.Close()
				return len(ended), err
			}
			found++
			ended[session] = true
		}
		if err := rows.Err(); err != nil {
			return len(ended), err
		}
		if found == 0 {
			return len(ended), nil
		}
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return len(ended), err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
