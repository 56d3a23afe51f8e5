package catalog

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// ForeignStandbysError says that synchronous_standby_names has a value that is
// not ours, which is never overwritten.
type ForeignStandbysError struct{ Value string }

func (e *ForeignStandbysError) Error() string {
	return fmt.Sprintf("synchronous_standby_names is %q: other synchronous standbys beside Quorate are not supported; "+
		"run ALTER SYSTEM RESET synchronous_standby_names and SELECT pg_reload_conf() (or take it out of postgresql.conf)", e.Value)
}

// EnsureSynchronous makes the session named applicationName the one synchronous
// standby of the server, and returns when this server's sessions see it. That
// commits block must still be proved: see WaitBlocked.
func EnsureSynchronous(ctx context.Context, conn *pgx.Conn, applicationName string) error {
	ok, err := IsSynchronous(ctx, conn, applicationName)
	if err != nil || ok {
		return err
	}
	if err := alterSystem(ctx, conn, "synchronous_standby_names", pgx.Identifier{applicationName}.Sanitize()); err != nil {
		return err
	}
	if ok, err = IsSynchronous(ctx, conn, applicationName); err == nil && !ok {
		err = errors.New("synchronous_standby_names does not follow ALTER SYSTEM: take it off the server's command line")
	}
	return err
}

// IsSynchronous reports whether commits wait for applicationName. Another value
// than none is a ForeignStandbysError.
func IsSynchronous(ctx context.Context, conn *pgx.Conn, applicationName string) (bool, error) {
	var value string
	if err := conn.QueryRow(ctx, "SELECT current_setting('synchronous_standby_names')").Scan(&value); err != nil {
		return false, fmt.Errorf("read synchronous_standby_names: %w", err)
	}
	switch value {
	case pgx.Identifier{applicationName}.Sanitize(), applicationName:
		return true, nil
	case "":
		return false, nil
	}
	return false, &ForeignStandbysError{Value: value}
}

// ClearSynchronous resets synchronous_standby_names. Every commit that waits is
// then released as if it had been confirmed: only where nothing can wait.
func ClearSynchronous(ctx context.Context, conn *pgx.Conn) error {
	return resetSystem(ctx, conn, "synchronous_standby_names")
}

// SetReadOnlyDefault sets default_transaction_read_only for all sessions of the
// server that do not say otherwise, so that drivers which ask for a read-write
// server pass this one by. Sessions of a sidecar set it off for themselves.
func SetReadOnlyDefault(ctx context.Context, conn *pgx.Conn, on bool) error {
	if on {
		return alterSystem(ctx, conn, "default_transaction_read_only", "on")
	}
	return resetSystem(ctx, conn, "default_transaction_read_only")
}

// Blocked reports whether the session pid waits for synchronous replication.
func Blocked(ctx context.Context, conn *pgx.Conn, pid uint32) (bool, error) {
	var blocked bool
	err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'SyncRep')", int64(pid)).Scan(&blocked)
	if err != nil {
		return false, fmt.Errorf("see whether session %d waits for synchronous replication: %w", pid, err)
	}
	return blocked, nil
}

// reload makes the server read its configuration, and returns when this
// session, and so about every other, has read it too.
func reload(ctx context.Context, conn *pgx.Conn) error {
	var before, now time.Time
	if err := conn.QueryRow(ctx, "SELECT pg_conf_load_time() FROM pg_reload_conf()").Scan(&before); err != nil {
		return fmt.Errorf("reload the configuration: %w", err)
	}
	for {
		if err := conn.QueryRow(ctx, "SELECT pg_conf_load_time()").Scan(&now); err != nil {
			return fmt.Errorf("see the configuration reloaded: %w", err)
		}
		if now.After(before) {
			return nil
		}
		if err := sleep(ctx, 2*time.Millisecond); err != nil {
			return fmt.Errorf("see the configuration reloaded: %w", err)
		}
	}
}
