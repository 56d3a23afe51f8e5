package replay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"quorate/replication/entry"
)

// Config configures a Session.
type Config struct {
	ConnString      string        // of the local database, as a superuser
	Origin          string        // name of the replication origin; made if it is missing
	ApplicationName string        // default "quorate replay"; backends of this name are taken to be a former life of ours
	LockTimeout     time.Duration // of one statement, default 1 s: longer and readers pile up behind the waiting change
	MaxReaderDelay  time.Duration // default 30 s: how long others may block a batch before they are ended
	ConnectTimeout  time.Duration // default 20 s: to get hold of the origin

	// DDL applies a schema change at its place in the transaction. It must not
	// commit, and leaves the session's settings to be restored by the caller.
	DDL func(ctx context.Context, conn *pgx.Conn, content []byte) error
	// Marks applies sequence marks, within the batch's transaction, at its end or
	// before the next schema change.
	Marks func(ctx context.Context, conn *pgx.Conn, marks []entry.Mark) error

	Logger *slog.Logger
}

func (c *Config) setDefaults() error {
	var errs []error
	for _, f := range []struct{ name, value string }{{"ConnString", c.ConnString}, {"Origin", c.Origin}} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("%s: missing", f.name))
		}
	}
	if c.ApplicationName == "" {
		c.ApplicationName = "quorate replay"
	}
	if c.LockTimeout == 0 {
		c.LockTimeout = time.Second
	}
	if c.MaxReaderDelay == 0 {
		c.MaxReaderDelay = 30 * time.Second
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 20 * time.Second
	}
	if c.LockTimeout < time.Millisecond {
		errs = append(errs, fmt.Errorf("LockTimeout: %v is less than a millisecond", c.LockTimeout))
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return errors.Join(errs...)
}

// ErrClosed says that the session was closed, by Close or by an earlier error.
var ErrClosed = errors.New("replay session is closed")

// Session applies batches to one database. Apply, Export and Close exclude each
// other; the other methods may be called at any time.
type Session struct {
	cfg        Config
	replayPID  atomic.Uint32
	promoting  atomic.Bool
	applied    atomic.Uint64
	progress   atomic.Uint64
	terminated atomic.Uint64
	retries    atomic.Uint64

	mu     sync.Mutex // held by Apply, Export and Close; taken before adminMu
	conn   *pgx.Conn  // holds the origin; nil once closed
	reader *entry.Reader
	plans  *planCache

	adminMu sync.Mutex
	admin   *pgx.Conn // everything that is not replay
}

// Connect opens the session: two connections, one of which holds the origin. A
// backend of an earlier life of ours that still holds it is ended, and waited
// for, so that no commit of it can follow the reading of progress.
func Connect(ctx context.Context, cfg Config) (*Session, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, fmt.Errorf("replay: %w", err)
	}
	s := &Session{cfg: cfg, reader: entry.NewReader(entry.NewRelationCache())}
	if _, err := s.adminConn(ctx); err != nil {
		return nil, fmt.Errorf("replay: %w", err)
	}
	progress, err := s.connect(ctx)
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("replay: %w", err)
	}
	s.progress.Store(progress)
	s.applied.Store(progress)
	return s, nil
}

// settings are those of the replay session: it must read what the publisher
// wrote, whatever the database's or the role's settings say.
func (c *Config) settings() map[string]string {
	return map[string]string{
		"session_replication_role":       "replica",
		"synchronous_commit":             "off", // the log is the durable copy
		"client_encoding":                "UTF8",
		"DateStyle":                      "ISO, MDY",
		"IntervalStyle":                  "postgres",
		"extra_float_digits":             "3",
		"bytea_output":                   "hex",
		"TimeZone":                       "UTC",
		"xmloption":                      "content",
		"default_transaction_read_only":  "off",
		"default_transaction_isolation":  "read committed",
		"default_transaction_deferrable": "off",
		"lock_timeout":                   strconv.FormatInt(c.LockTimeout.Milliseconds(), 10),
		// Below lock_timeout, or an autovacuum in the way would never be cancelled:
		// that happens when the wait is checked for a deadlock.
		"deadlock_timeout":                    strconv.FormatInt(min(1000, max(1, c.LockTimeout.Milliseconds()/2)), 10),
		"statement_timeout":                   "0",
		"idle_in_transaction_session_timeout": "0",
		"row_security":                        "off",
		"search_path":                         "pg_catalog",
		"check_function_bodies":               "off",
		"quote_all_identifiers":               "off",
		"standard_conforming_strings":         "on",
		"jit":                                 "off",
		"plan_cache_mode":                     "force_generic_plan",
	}
}

// planning keeps generic plans of statements by key on the key's index: such a
// plan is made once, perhaps while the table is still small. It is lifted for
// schema changes, which may run queries of their own.
var planning = []string{"enable_seqscan", "enable_hashjoin", "enable_mergejoin", "enable_bitmapscan"}

func planningOff() string {
	var b strings.Builder
	for _, name := range planning {
		fmt.Fprintf(&b, "SET %s = off;", name)
	}
	return b.String()
}

func planningDefault() string {
	var b strings.Builder
	for _, name := range planning {
		fmt.Fprintf(&b, "RESET %s;", name)
	}
	b.WriteString("RESET plan_cache_mode;")
	return b.String()
}

// restoreSettings brings back what a schema change may have set, for the rest of
// the transaction and after it.
func (s *Session) restoreSettings(ctx context.Context) error {
	var b strings.Builder
	b.WriteString("RESET SESSION AUTHORIZATION; RESET ROLE;")
	for name, value := range s.cfg.settings() {
		if strings.HasPrefix(name, "default_transaction_") {
			continue // of the next transaction only, and not to be changed by DDL
		}
		fmt.Fprintf(&b, "SET %s = %s;", name, quoteSetting(name, value))
	}
	b.WriteString(planningOff())
	_, err := s.conn.PgConn().Exec(ctx, b.String()).ReadAll()
	return err
}

func quoteSetting(name, value string) string {
	if name == "DateStyle" {
		return value // a list
	}
	return "'" + value + "'"
}

func (c *Config) open(ctx context.Context, suffix string, settings map[string]string) (*pgx.Conn, error) {
	pc, err := pgx.ParseConfig(c.ConnString)
	if err != nil {
		return nil, fmt.Errorf("connection string: %w", err)
	}
	for k, v := range settings {
		pc.RuntimeParams[k] = v
	}
	pc.RuntimeParams["application_name"] = c.ApplicationName + suffix
	pc.RuntimeParams["lc_messages"] = "C"
	// No statement cache: statements of ours have names, those of others (schema
	// changes) do not repeat.
	pc.DefaultQueryExecMode = pgx.QueryExecModeExec
	pc.StatementCacheCapacity, pc.DescriptionCacheCapacity = 0, 0
	return pgx.ConnectConfig(ctx, pc)
}

var holderPID = regexp.MustCompile(`PID (\d+)`)

// connect opens the connection that holds the origin and reads its progress.
func (s *Session) connect(ctx context.Context) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.ConnectTimeout)
	defer cancel()
	conn, err := s.cfg.open(ctx, "", s.cfg.settings())
	if err != nil {
		return 0, fmt.Errorf("connect to the local database: %w", err)
	}
	progress, err := s.setup(ctx, conn)
	if err != nil {
		closeConn(conn)
		return 0, err
	}
	s.conn = conn
	s.replayPID.Store(conn.PgConn().PID())
	s.plans = newPlanCache()
	return progress, nil
}

func (s *Session) setup(ctx context.Context, conn *pgx.Conn) (uint64, error) {
	const create = `SELECT pg_replication_origin_create($1) WHERE pg_replication_origin_oid($1) IS NULL`
	if _, err := conn.Exec(ctx, create, s.cfg.Origin); err != nil && !isCode(err, "23505") {
		return 0, fmt.Errorf("create replication origin %q: %w", s.cfg.Origin, err)
	}
	var inUse error
	for {
		_, err := conn.Exec(ctx, `SELECT pg_replication_origin_session_setup($1)`, s.cfg.Origin)
		if err == nil {
			break
		}
		if ctx.Err() != nil && inUse != nil {
			return 0, fmt.Errorf("replication origin %q stays held by another session: %w", s.cfg.Origin, inUse)
		}
		if !isCode(err, "55006") { // object_in_use
			return 0, fmt.Errorf("set up replication origin %q: %w", s.cfg.Origin, err)
		}
		inUse = err
		s.endFormerLife(ctx, err)
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
	if _, err := conn.PgConn().Exec(ctx, planningOff()).ReadAll(); err != nil {
		return 0, err
	}
	var lsn *string
	// With true it also flushes that commit, so a session starts from what is durable.
	if err := conn.QueryRow(ctx, `SELECT pg_replication_origin_session_progress(true)::text`).Scan(&lsn); err != nil {
		return 0, fmt.Errorf("read progress of replication origin %q: %w", s.cfg.Origin, err)
	}
	return parseSlot(lsn)
}

// endFormerLife ends the backend that holds the origin if it is one of ours:
// its client is gone, and it may sit in a lock wait for long without noticing.
func (s *Session) endFormerLife(ctx context.Context, inUse error) {
	var pg *pgconn.PgError
	if !errors.As(inUse, &pg) {
		return
	}
	m := holderPID.FindStringSubmatch(pg.Message)
	if m == nil {
		return
	}
	pid, err := strconv.Atoi(m[1])
	if err != nil {
		return
	}
	admin, err := s.adminConn(ctx)
	if err != nil {
		return
	}
	s.adminMu.Lock()
	defer s.adminMu.Unlock()
	_, err = admin.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
		WHERE pid = $1 AND application_name = $2 AND datname = current_database()`, pid, s.cfg.ApplicationName)
	if err != nil {
		s.cfg.Logger.Warn("end the backend that holds the replication origin", "pid", pid, "error", err)
	}
}

// adminConn returns the standing second connection, opened again if it broke.
func (s *Session) adminConn(ctx context.Context) (*pgx.Conn, error) {
	s.adminMu.Lock()
	defer s.adminMu.Unlock()
	if s.admin != nil && !s.admin.IsClosed() {
		return s.admin, nil
	}
	conn, err := s.cfg.open(ctx, " control", map[string]string{
		"synchronous_commit": "off", "search_path": "pg_catalog", "statement_timeout": "0",
		"default_transaction_read_only": "off", "idle_in_transaction_session_timeout": "0",
	})
	if err != nil {
		return nil, fmt.Errorf("connect to the local database: %w", err)
	}
	s.admin = conn
	return conn, nil
}

// Progress returns the slot that the origin's progress names: what this session
// read when it began, moved by each batch that wrote.
func (s *Session) Progress() uint64 { return s.progress.Load() }

// Applied returns the last slot of the last batch that was applied; at the
// start, Progress. Its changes are visible.
func (s *Session) Applied() uint64 { return s.applied.Load() }

// Flushed flushes the last commit of the origin and returns its slot: up to
// there a crash loses nothing. It runs beside Apply.
func (s *Session) Flushed(ctx context.Context) (uint64, error) {
	conn, err := s.adminConn(ctx)
	if err != nil {
		return 0, fmt.Errorf("replay: flushed progress: %w", err)
	}
	s.adminMu.Lock()
	defer s.adminMu.Unlock()
	slot, err := Progress(ctx, conn, s.cfg.Origin, true)
	if err != nil {
		return 0, fmt.Errorf("replay: %w", err)
	}
	return slot, nil
}

// SetPromoting says whether this region is about to lead: blockers of replay are
// then ended at once, and nothing is waited for.
func (s *Session) SetPromoting(v bool) { s.promoting.Store(v) }

// Stats counts what a session met since it began.
type Stats struct {
	Retries    uint64 // batches begun again in a new connection
	Terminated uint64 // sessions ended because they blocked replay
}

// Stats returns the counts.
func (s *Session) Stats() Stats {
	return Stats{Retries: s.retries.Load(), Terminated: s.terminated.Load()}
}

// Close ends the session. It waits for a running Apply, which ends when its
// context does.
func (s *Session) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop()
	s.adminMu.Lock()
	defer s.adminMu.Unlock()
	if s.admin != nil {
		closeConn(s.admin)
		s.admin = nil
	}
}

// drop closes the replay connection.
func (s *Session) drop() {
	if s.conn != nil {
		closeConn(s.conn)
		s.conn = nil
	}
}

func closeConn(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = conn.Close(ctx) // it is given up, whatever the server says to it
}

func isCode(err error, code string) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == code
}

func parseSlot(lsn *string) (uint64, error) {
	if lsn == nil {
		return 0, nil
	}
	v, err := pglogrepl.ParseLSN(*lsn)
	if err != nil {
		return 0, fmt.Errorf("progress %q: %w", *lsn, err)
	}
	return uint64(v), nil
}
