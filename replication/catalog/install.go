package catalog

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"quorate/replication/entry"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Schema holds everything but the trigger functions, which are in FenceSchema.
// Capture leaves both out of entries.
const (
	Schema      = entry.LocalSchema
	FenceSchema = entry.FenceSchema
)

// ApplicationName leads the application_name of every session of a sidecar.
// Sessions that carry it, of the sidecar's own role, are never ended here.
const ApplicationName = "quorate"

// DefaultPublication is the publication unless Options say otherwise.
const DefaultPublication = "quorate"

// DefaultShard is the shard of all tables.
const DefaultShard = "main"

// installLock keeps two installations of one database apart.
const installLock = 0x71756f72617465 // "quorate"

// Options say what is installed.
type Options struct {
	ClusterID   string
	Region      string
	Shard       string // "" means DefaultShard
	Publication string // "" means DefaultPublication
}

// NewerSchemaError says that the database was installed by a newer Quorate.
type NewerSchemaError struct {
	Installed, Known int
}

func (e *NewerSchemaError) Error() string {
	return fmt.Sprintf("schema %s is of version %d, this binary knows up to %d: run a binary at least as new as the one that installed it",
		Schema, e.Installed, e.Known)
}

// ErrOtherCluster says that the database belongs to another cluster or region.
var ErrOtherCluster = errors.New("the database belongs to another cluster or region")

// Install brings the database of conn up to this binary's version and fences
// every table. It is idempotent. It waits for the locks of running writers as
// each table gets its trigger.
func Install(ctx context.Context, conn *pgx.Conn, o Options) error {
	if o.Shard == "" {
		o.Shard = DefaultShard
	}
	if o.Publication == "" {
		o.Publication = DefaultPublication
	}
	if o.ClusterID == "" || o.Region == "" {
		return errors.New("install: cluster id and region must be given")
	}
	steps, err := readMigrations()
	if err != nil {
		return err
	}
	return bookkeeping(ctx, conn, func(tx pgx.Tx) error {
		installed, err := installedVersion(ctx, tx)
		if err != nil {
			return err
		}
		if installed > len(steps) {
			return &NewerSchemaError{Installed: installed, Known: len(steps)}
		}
		for i := installed; i < len(steps); i++ {
			if _, err := tx.Exec(ctx, steps[i]); err != nil {
				return fmt.Errorf("install version %d of schema %s: %w", i+1, Schema, err)
			}
			if _, err := tx.Exec(ctx, "INSERT INTO quorate.version (version) VALUES ($1)", i+1); err != nil {
				return fmt.Errorf("record version %d of schema %s: %w", i+1, Schema, err)
			}
		}
		if err := claimIdentity(ctx, tx, o); err != nil {
			return err
		}
		if err := createPublication(ctx, tx, o.Publication); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "SELECT quorate.make_fence(), quorate.protect_all()"); err != nil {
			return fmt.Errorf("fence the tables: %w", err)
		}
		return nil
	})
}

// bookkeeping runs f in a transaction that is neither captured as DDL nor
// waits for synchronous replication, and alone in this database.
func bookkeeping(ctx context.Context, conn *pgx.Conn, f func(pgx.Tx) error) error {
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		// The messages of IF EXISTS and the like are noise.
		if _, err := tx.Exec(ctx, `SET LOCAL quorate.bookkeeping = on; SET LOCAL synchronous_commit = local;
			SET LOCAL client_min_messages = warning; SET LOCAL search_path = pg_catalog, pg_temp; SET TRANSACTION READ WRITE`); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1)", int64(installLock)); err != nil {
			return err
		}
		return f(tx)
	})
}

func readMigrations() ([]string, error) {
	names, err := fs.Glob(migrations, "migrations/*.sql") // sorted
	if err != nil {
		return nil, err
	}
	var steps []string
	for i, name := range names {
		if want := fmt.Sprintf("migrations/%04d_", i+1); !strings.HasPrefix(name, want) {
			return nil, fmt.Errorf("migration %s stands where %s… must be", name, want)
		}
		b, err := migrations.ReadFile(name)
		if err != nil {
			return nil, err
		}
		steps = append(steps, string(b))
	}
	return steps, nil
}

func installedVersion(ctx context.Context, tx pgx.Tx) (int, error) {
	var exists bool
	if err := tx.QueryRow(ctx, "SELECT to_regclass('quorate.version') IS NOT NULL").Scan(&exists); err != nil {
		return 0, fmt.Errorf("look for schema %s: %w", Schema, err)
	}
	if !exists {
		return 0, nil
	}
	var version int
	if err := tx.QueryRow(ctx, "SELECT coalesce(max(version), 0) FROM quorate.version").Scan(&version); err != nil {
		return 0, fmt.Errorf("read the version of schema %s: %w", Schema, err)
	}
	return version, nil
}

func claimIdentity(ctx context.Context, tx pgx.Tx, o Options) error {
	var have Options
	err := tx.QueryRow(ctx, "SELECT cluster_id, region, shard FROM quorate.identity").Scan(&have.ClusterID, &have.Region, &have.Shard)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		if _, err := tx.Exec(ctx, "INSERT INTO quorate.identity (cluster_id, region, shard) VALUES ($1, $2, $3)",
			o.ClusterID, o.Region, o.Shard); err != nil {
			return fmt.Errorf("write the identity: %w", err)
		}
		return nil
	case err != nil:
		return fmt.Errorf("read the identity: %w", err)
	case have.ClusterID != o.ClusterID || have.Region != o.Region || have.Shard != o.Shard:
		return fmt.Errorf("%w: it is cluster %s, region %s, shard %s; asked for were %s, %s, %s (uninstall first, or correct the configuration)",
			ErrOtherCluster, have.ClusterID, have.Region, have.Shard, o.ClusterID, o.Region, o.Shard)
	}
	return nil
}

func createPublication(ctx context.Context, tx pgx.Tx, name string) error {
	var all, complete bool
	err := tx.QueryRow(ctx, `SELECT puballtables, pubinsert AND pubupdate AND pubdelete AND pubtruncate AND NOT pubviaroot
		FROM pg_publication WHERE pubname = $1`, name).Scan(&all, &complete)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		_, err := tx.Exec(ctx, "CREATE PUBLICATION "+pgx.Identifier{name}.Sanitize()+
			" FOR ALL TABLES WITH (publish = 'insert, update, delete, truncate')")
		if err != nil {
			return fmt.Errorf("create publication %s: %w", name, err)
		}
		return nil
	case err != nil:
		return fmt.Errorf("look for publication %s: %w", name, err)
	case !all || !complete:
		return fmt.Errorf("publication %s exists and is not FOR ALL TABLES with insert, update, delete and truncate: drop it", name)
	}
	return nil
}

// UninstallOptions name what was installed beside the schema.
type UninstallOptions struct {
	Publication string // "" means DefaultPublication
}

// Uninstall removes everything that Quorate made in this database and server:
// triggers, event triggers, schemas, publication, replication slots and origins
// whose names begin with "quorate", settings made by ALTER SYSTEM. The sidecar
// must have stopped; a replication slot in use is an error. It can be repeated.
func Uninstall(ctx context.Context, conn *pgx.Conn, o UninstallOptions) error {
	if o.Publication == "" {
		o.Publication = DefaultPublication
	}
	// First, as a COMMIT that waits for a sidecar would hold up everything else.
	if err := resetSystemSettings(ctx, conn); err != nil {
		return err
	}
	if err := releaseCommits(ctx, conn); err != nil {
		return err
	}
	rows, err := conn.Query(ctx, `SELECT slot_name FROM pg_replication_slots WHERE slot_name LIKE 'quorate%' AND database = current_database()`)
	if err != nil {
		return fmt.Errorf("list replication slots: %w", err)
	}
	slots, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("list replication slots: %w", err)
	}
	for _, slot := range slots {
		if _, err := conn.Exec(ctx, "SELECT pg_drop_replication_slot($1)", slot); err != nil {
			return fmt.Errorf("drop replication slot %s (stop the sidecar first): %w", slot, err)
		}
	}
	return bookkeeping(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `DROP EVENT TRIGGER IF EXISTS quorate_ddl_start, quorate_ddl_drop, quorate_table_rewrite, quorate_ddl_end, quorate_ddl_end_capture`); err != nil {
			return fmt.Errorf("drop the event triggers: %w", err)
		}
		for _, drop := range []string{
			"DROP PUBLICATION IF EXISTS " + pgx.Identifier{o.Publication}.Sanitize(),
			"DROP SCHEMA IF EXISTS quorate_fence CASCADE", // and with it the triggers on user tables
			"DROP SCHEMA IF EXISTS quorate CASCADE",
			"SELECT pg_replication_origin_drop(roname) FROM pg_replication_origin WHERE roname LIKE 'quorate%'",
		} {
			if _, err := tx.Exec(ctx, drop); err != nil {
				return fmt.Errorf("%s: %w", drop, err)
			}
		}
		return nil
	})
}

// Identity is which database this is.
type Identity struct {
	ClusterID   string
	Region      string
	Shard       string
	Incarnation uint64 // 0: none has been written
	Version     int    // of the schema
	DDLKey      []byte // see Authentic
}

// ErrNotInstalled says that the database holds no schema quorate.
var ErrNotInstalled = errors.New("quorate is not installed in this database")

// ReadIdentity returns what Install and WriteIncarnation wrote, or ErrNotInstalled.
func ReadIdentity(ctx context.Context, conn *pgx.Conn) (Identity, error) {
	var id Identity
	var incarnation int64
	err := conn.QueryRow(ctx, `SELECT cluster_id, region, shard, incarnation, ddl_key, (SELECT max(version) FROM quorate.version)
		FROM quorate.identity`).Scan(&id.ClusterID, &id.Region, &id.Shard, &incarnation, &id.DDLKey, &id.Version)
	var pg *pgconn.PgError
	if errors.Is(err, pgx.ErrNoRows) || errors.As(err, &pg) && (pg.Code == "42P01" || pg.Code == "3F000") {
		return Identity{}, ErrNotInstalled
	}
	if err != nil {
		return Identity{}, fmt.Errorf("read the identity: %w", err)
	}
	id.Incarnation = uint64(incarnation)
	return id, nil
}

// WriteIncarnation records the life of this database that begins now.
func WriteIncarnation(ctx context.Context, conn *pgx.Conn, incarnation uint64) error {
	return bookkeeping(ctx, conn, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, "UPDATE quorate.identity SET incarnation = $1", int64(incarnation))
		if err != nil {
			return fmt.Errorf("write incarnation %016x: %w", incarnation, err)
		}
		if tag.RowsAffected() != 1 {
			return fmt.Errorf("write incarnation %016x: %w", incarnation, ErrNotInstalled)
		}
		return nil
	})
}

// Settings that Quorate makes go through ALTER SYSTEM and are remembered.
func alterSystem(ctx context.Context, conn *pgx.Conn, name, value string) error {
	if err := commitLocally(ctx, conn, "INSERT INTO quorate.system_setting VALUES ($1) ON CONFLICT DO NOTHING", name); err != nil {
		return fmt.Errorf("note the setting of %s: %w", name, err)
	}
	if _, err := conn.Exec(ctx, "ALTER SYSTEM SET "+name+" = "+quoteLiteral(value)); err != nil {
		return fmt.Errorf("alter system set %s: %w", name, err)
	}
	return reload(ctx, conn)
}

func resetSystem(ctx context.Context, conn *pgx.Conn, name string) error {
	if _, err := conn.Exec(ctx, "ALTER SYSTEM RESET "+name); err != nil {
		return fmt.Errorf("alter system reset %s: %w", name, err)
	}
	if err := reload(ctx, conn); err != nil {
		return err
	}
	if err := commitLocally(ctx, conn, "DELETE FROM quorate.system_setting WHERE name = $1", name); err != nil {
		return fmt.Errorf("forget the setting of %s: %w", name, err)
	}
	return nil
}

func resetSystemSettings(ctx context.Context, conn *pgx.Conn) error {
	var exists bool
	if err := conn.QueryRow(ctx, "SELECT to_regclass('quorate.system_setting') IS NOT NULL").Scan(&exists); err != nil || !exists {
		return err
	}
	rows, err := conn.Query(ctx, "SELECT name FROM quorate.system_setting")
	if err != nil {
		return fmt.Errorf("list the settings made: %w", err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("list the settings made: %w", err)
	}
	for _, name := range names {
		if err := resetSystem(ctx, conn, name); err != nil {
			return err
		}
	}
	return nil
}

// releaseCommits has commits wait for no sidecar any more, whoever made them do
// so: a database that was seeded in the place of an earlier one found the setting
// made and did not note it.
func releaseCommits(ctx context.Context, conn *pgx.Conn) error {
	var names string
	if err := conn.QueryRow(ctx, "SELECT current_setting('synchronous_standby_names')").Scan(&names); err != nil {
		return fmt.Errorf("read synchronous_standby_names: %w", err)
	}
	if !strings.HasPrefix(strings.Trim(names, `"`), ApplicationName) {
		return nil
	}
	if _, err := conn.Exec(ctx, "ALTER SYSTEM RESET synchronous_standby_names"); err != nil {
		return fmt.Errorf("alter system reset synchronous_standby_names: %w", err)
	}
	return reload(ctx, conn)
}

func quoteLiteral(s string) string {
	if strings.Contains(s, `\`) {
		return "E" + strconv.Quote(s) // not reached by the values set here
	}
	return "'" + strings.ReplaceAll(s, "'", "''") + "'"
}
