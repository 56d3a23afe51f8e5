package sidecar

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"quorate/paxosgroup"
	"quorate/replication/catalog"
	"quorate/replication/entry"
	"quorate/sidecar/config"
)

// database is how the sidecar reaches its own server: the replicated database,
// and beside it the maintenance database, from which the replicated one is
// closed, replaced and opened.
type database struct {
	dsn  string
	base *pgx.ConnConfig // to the replicated database
	app  string          // application_name of the replication stream
	log  *slog.Logger

	mu    sync.Mutex
	maint *pgx.Conn // to the maintenance database; opened at first use and kept
}

// maintenanceDatabase is connected to for what cannot be done from within the
// replicated database.
const maintenanceDatabase = "postgres"

const databaseNameMax = 63 - len("_quorate_seed")

func newDatabase(cfg *config.Config, log *slog.Logger) (*database, error) {
	base, err := pgx.ParseConfig(cfg.Postgres.DSN)
	if err != nil {
		return nil, fmt.Errorf("postgres.dsn: %w", err)
	}
	// Beside it stand, while a region is seeded, databases whose names are longer,
	// and PostgreSQL cuts names at 63 bytes.
	if len(base.Database) > databaseNameMax {
		return nil, fmt.Errorf("postgres.dsn: the name of database %q has more than %d bytes: rename it", base.Database, databaseNameMax)
	}
	return &database{dsn: cfg.Postgres.DSN, base: base, app: cfg.Postgres.ApplicationName, log: log}, nil
}

func (db *database) name(purpose string) string { return db.app + " " + purpose }

// dsnOf returns the connection string with another database.
func (db *database) dsnOf(name string) string {
	if u, err := url.Parse(db.dsn); err == nil && u.Scheme != "" {
		u.Path = "/" + name
		return u.String()
	}
	return db.dsn + " dbname='" + strings.ReplaceAll(name, "'", `\'`) + "'"
}

func (db *database) connectTo(ctx context.Context, name, purpose string) (*pgx.Conn, error) {
	cfg := db.base.Copy()
	cfg.Database = name
	cfg.ConnectTimeout = 5 * time.Second
	cfg.RuntimeParams["application_name"] = db.name(purpose)
	cfg.RuntimeParams["synchronous_commit"] = "local"
	cfg.RuntimeParams["default_transaction_read_only"] = "off"
	cfg.RuntimeParams["statement_timeout"] = "0"
	cfg.RuntimeParams["idle_in_transaction_session_timeout"] = "0"
	cfg.RuntimeParams["client_encoding"] = "UTF8"
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to PostgreSQL, database %s: %w", name, err)
	}
	return conn, nil
}

// connect opens a connection to the replicated database.
func (db *database) connect(ctx context.Context, purpose string) (*pgx.Conn, error) {
	return db.connectTo(ctx, db.base.Database, purpose)
}

// withMaintenance runs f on the standing connection to the maintenance database.
func (db *database) withMaintenance(ctx context.Context, f func(*pgx.Conn) error) error {
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.maint == nil || db.maint.IsClosed() {
		conn, err := db.connectTo(ctx, maintenanceDatabase, "maintenance")
		if err != nil {
			return err
		}
		db.maint = conn
	}
	return f(db.maint)
}

func (db *database) close() {
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.maint != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		db.maint.Close(ctx)
		db.maint = nil
	}
}

func (db *database) maintenance(ctx context.Context, sql string, args ...any) error {
	return db.withMaintenance(ctx, func(conn *pgx.Conn) error {
		if _, err := conn.Exec(ctx, sql, args...); err != nil {
			return fmt.Errorf("%s: %w", sql, err)
		}
		return nil
	})
}

func quoted(name string) string { return pgx.Identifier{name}.Sanitize() }

// refuseConnections lets nobody new into the replicated database, superusers
// included.
func (db *database) refuseConnections(ctx context.Context) error {
	return db.maintenance(ctx, "ALTER DATABASE "+quoted(db.base.Database)+" ALLOW_CONNECTIONS false")
}

func (db *database) allowConnections(ctx context.Context) error {
	return db.withMaintenance(ctx, func(conn *pgx.Conn) error {
		var allowed bool
		err := conn.QueryRow(ctx, "SELECT datallowconn FROM pg_database WHERE datname = $1", db.base.Database).Scan(&allowed)
		if err == nil && !allowed {
			_, err = conn.Exec(ctx, "ALTER DATABASE "+quoted(db.base.Database)+" ALLOW_CONNECTIONS true")
		}
		if err != nil {
			return fmt.Errorf("let sessions in again: %w", err)
		}
		return nil
	})
}

// openForSession lets the sidecar's own connections in, and reports whether the
// database was closed.
func (db *database) openForSession(ctx context.Context) (shut bool, err error) {
	err = db.withMaintenance(ctx, func(conn *pgx.Conn) error {
		return conn.QueryRow(ctx, "SELECT NOT datallowconn FROM pg_database WHERE datname = $1", db.base.Database).Scan(&shut)
	})
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return false, fmt.Errorf("%w: database %s does not exist: create it, empty", errBeginAgain, db.base.Database)
	case err != nil || !shut:
		return shut, err
	}
	return shut, db.allowConnections(ctx)
}

// check refuses a server that cannot carry the promises. The replication slot is
// the sidecar's own; warn is told of what is merely to be looked at.
func (db *database) check(ctx context.Context, conn *pgx.Conn, replicationSlot string, warn func(string)) error {
	_, problems, err := catalog.Check(ctx, conn, catalog.CheckOptions{
		ReplicationSlot:  replicationSlot,
		DatabasesAllowed: []string{db.base.Database, db.seedName(), db.oldName()},
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range problems {
		if p.Fatal {
			errs = append(errs, &unfitError{p})
		} else {
			warn(p.String())
		}
	}
	return errors.Join(errs...)
}

// unfitError is a problem of the server that an operator has to mend.
type unfitError struct{ catalog.Problem }

func (e *unfitError) Error() string { return e.String() }

// stand is what the database says of itself.
type stand struct {
	incarnation paxosgroup.Incarnation
	ddlKey      []byte
	opened      opening
}

// instanceName names the replication slot and the origin of an incarnation.
func instanceName(inc paxosgroup.Incarnation) string { return "quorate_" + inc.String() }

func (st stand) origin() string { return instanceName(st.incarnation) }

// readState reads the database's incarnation; it is zero where Quorate is not
// installed, or was not installed to the end.
func (db *database) readState(ctx context.Context, conn *pgx.Conn) (stand, error) {
	id, err := catalog.ReadIdentity(ctx, conn)
	if errors.Is(err, catalog.ErrNotInstalled) {
		return stand{}, nil
	}
	if err != nil {
		return stand{}, err
	}
	st := stand{incarnation: paxosgroup.Incarnation(id.Incarnation), ddlKey: id.DDLKey}
	if st.incarnation == 0 {
		return st, nil
	}
	o, err := catalog.ReadOpening(ctx, conn, mainShard)
	st.opened = opening{
		term:    paxosgroup.Ballot{Counter: uint64(o.Counter), Replica: paxosgroup.ReplicaID(o.Replica)},
		horizon: o.Horizon,
	}
	return st, err
}

// requireSlot returns the position of the incarnation's replication slot, or why
// it is of no use, as an errReplace: what committed without it was never captured.
// A stream of a former life that still holds the slot is ended first, as it could
// move the position.
func (db *database) requireSlot(ctx context.Context, conn *pgx.Conn, st stand) (confirmed entry.LSN, err error) {
	name := instanceName(st.incarnation)
	for {
		var status, position *string
		var pid *int32
		err = conn.QueryRow(ctx, "SELECT wal_status, confirmed_flush_lsn::text, active_pid FROM pg_replication_slots WHERE slot_name = $1 AND database = current_database()", name).Scan(&status, &position, &pid)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return 0, fmt.Errorf("%w: replication slot %s is gone", errReplace, name)
		case err != nil:
			return 0, err
		case status != nil && *status == "lost" || position == nil:
			return 0, fmt.Errorf("%w: replication slot %s was invalidated (max_slot_wal_keep_size)", errReplace, name)
		case pid == nil:
			return pglogrepl.ParseLSN(*position)
		}
		if _, err := conn.Exec(ctx, "SELECT pg_terminate_backend($1)", *pid); err != nil {
			return 0, err
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("replication slot %s is still held by process %d: %w", name, *pid, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (db *database) flushLSN(ctx context.Context, conn *pgx.Conn) (entry.LSN, error) {
	var lsn entry.LSN
	err := conn.QueryRow(ctx, "SELECT pg_current_wal_flush_lsn()::text").Scan(&lsn)
	return lsn, err
}

// empty reports whether the replicated database holds nothing of a user's.
func (db *database) empty(ctx context.Context, conn *pgx.Conn) (bool, error) {
	var n int
	err := conn.QueryRow(ctx, `WITH users AS (SELECT oid, nspname FROM pg_namespace
			WHERE nspname NOT LIKE 'pg\_%' AND nspname NOT IN ('information_schema', 'quorate', 'quorate_fence'))
		SELECT (SELECT count(*) FROM pg_class WHERE relnamespace IN (SELECT oid FROM users))
			+ (SELECT count(*) FROM pg_proc WHERE pronamespace IN (SELECT oid FROM users))
			+ (SELECT count(*) FROM pg_type WHERE typnamespace IN (SELECT oid FROM users))
			+ (SELECT count(*) FROM pg_extension WHERE extname <> 'plpgsql')
			+ (SELECT count(*) FROM users WHERE nspname <> 'public')`).Scan(&n)
	return n == 0, err
}

// found sets a database up as the beginning of an incarnation whose content is
// what it holds now: schema, publication and replication slot, in this order,
// since decoding sees the catalog as it was.
func (db *database) found(ctx context.Context, conn *pgx.Conn, clusterID uint64, region string, inc paxosgroup.Incarnation, at paxosgroup.Slot) error {
	err := catalog.Install(ctx, conn, catalog.Options{ClusterID: fmt.Sprintf("%016x", clusterID), Region: region, Shard: mainShard})
	if err != nil {
		return err
	}
	name := instanceName(inc)
	// A slot or origin of this name is of this very incarnation, half made.
	if _, err := conn.Exec(ctx, `SELECT pg_replication_origin_create($1) WHERE NOT EXISTS (SELECT FROM pg_replication_origin WHERE roname = $1)`, name); err != nil {
		return fmt.Errorf("create replication origin %s: %w", name, err)
	}
	if at > 0 {
		if _, err := conn.Exec(ctx, "SELECT pg_replication_origin_advance($1, $2::pg_lsn)", name, entry.LSN(at).String()); err != nil {
			return fmt.Errorf("set replication origin %s: %w", name, err)
		}
	}
	// Creating a slot waits for every transaction that runs; lock_timeout bounds
	// that wait, statement_timeout does not.
	if _, err := conn.Exec(ctx, "SET lock_timeout = '60s'"); err != nil {
		return err
	}
	if _, err := conn.Exec(ctx, `SELECT pg_create_logical_replication_slot($1, 'pgoutput') WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1)`, name); err != nil {
		return fmt.Errorf("create replication slot %s (it waits for running transactions): %w", name, err)
	}
	if _, err := conn.Exec(ctx, "RESET lock_timeout"); err != nil {
		return err
	}
	return catalog.WriteIncarnation(ctx, conn, uint64(inc))
}

func newIncarnation() paxosgroup.Incarnation {
	for {
		var b [8]byte
		rand.Read(b[:])
		if inc := paxosgroup.Incarnation(binary.LittleEndian.Uint64(b[:])); inc != 0 {
			return inc
		}
	}
}

// isCode reports whether err is PostgreSQL's of that SQLSTATE.
func isCode(err error, code string) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == code
}
