package snapshot

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"quorate/replication/entry"
	"quorate/snapshot/snapshotpb"
)

// Source makes images of the local database. The sidecar implements it.
type Source interface {
	Open(ctx context.Context) (*Exported, error)
}

// Exported is a snapshot of the local database, alive until Release.
type Exported struct {
	ConnString   string // of the local database, as a superuser
	SnapshotName string // as pg_export_snapshot or the creation of a replication slot gave it
	Slot         uint64 // the snapshot holds exactly the slots up to here
	Base         []byte // what the destination's log starts from; only carried
	Incarnation  uint64 // of this database
	BinDir       string // of PostgreSQL's programs, of the server's version; "" means ServerConfig's

	// Verify, if set, is asked when everything was delivered and before the
	// destination may use it: an error voids the image. A leader's image holds
	// transactions that may turn out not to be effective.
	Verify func(ctx context.Context) error
	// Release ends the snapshot. It is called once.
	Release func()
}

// survey reads everything about the image but its contents. The connection has
// adopted the snapshot.
type survey struct {
	conn *pgx.Conn
	m    *snapshotpb.Manifest
	cfg  *ServerConfig
}

// userSchema is true of the schemas whose objects are shipped.
const userSchema = `n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast', '` + entry.LocalSchema + `', '` + entry.FenceSchema + `') AND n.nspname NOT LIKE 'pg\_temp\_%' AND n.nspname NOT LIKE 'pg\_toast\_temp\_%'`

func (s *survey) run(ctx context.Context) ([]partQuery, error) {
	for _, step := range []func(context.Context) error{s.database, s.refusals, s.names, s.sequences, s.excluded} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	return s.tables(ctx)
}

func (s *survey) database(ctx context.Context) error {
	err := s.conn.QueryRow(ctx, `SELECT current_setting('server_version_num')::int, pg_encoding_to_char(encoding), datcollate, datctype
		FROM pg_database WHERE datname = current_database()`).Scan(&s.m.ServerVersionNum, &s.m.Encoding, &s.m.Collate, &s.m.Ctype)
	if err != nil {
		return fmt.Errorf("read the database's properties: %w", err)
	}
	return nil
}

func (s *survey) refusals(ctx context.Context) error {
	var n int64
	if err := s.conn.QueryRow(ctx, `SELECT count(*) FROM pg_largeobject_metadata`).Scan(&n); err != nil {
		return fmt.Errorf("count large objects: %w", err)
	}
	if n > 0 {
		return status.Errorf(codes.FailedPrecondition, "the database has %d large objects, whose changes cannot be replicated: move them into a bytea column and remove them with lo_unlink", n)
	}
	return nil
}

func (s *survey) names(ctx context.Context) error {
	// The bootstrap superuser owns without a record in pg_shdepend.
	rows, err := s.conn.Query(ctx, `SELECT rolname::text FROM pg_roles r WHERE r.oid = 10 OR r.rolname !~ '^pg_' AND r.oid IN
		(SELECT refobjid FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database())) ORDER BY 1`)
	if err == nil {
		s.m.Roles, err = pgx.CollectRows(rows, pgx.RowTo[string])
	}
	if err != nil {
		return fmt.Errorf("list roles: %w", err)
	}
	rows, err = s.conn.Query(ctx, `SELECT extname::text, extversion FROM pg_extension ORDER BY 1`)
	if err == nil {
		s.m.Extensions, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (*snapshotpb.Extension, error) {
			var e snapshotpb.Extension
			return &e, row.Scan(&e.Name, &e.Version)
		})
	}
	if err != nil {
		return fmt.Errorf("list extensions: %w", err)
	}
	// What collations sort by: those that are used by something and have a version.
	rows, err = s.conn.Query(ctx, `SELECT n.nspname::text, c.collname::text, coalesce(pg_collation_actual_version(c.oid), '') FROM pg_collation c JOIN pg_namespace n ON n.oid = c.collnamespace
		WHERE c.collencoding IN (-1, (SELECT encoding FROM pg_database WHERE datname = current_database()))
		  AND (n.nspname <> 'pg_catalog' OR c.oid IN (SELECT attcollation FROM pg_attribute a JOIN pg_class r ON r.oid = a.attrelid WHERE r.oid >= 16384)) ORDER BY 1, 2`)
	if err == nil {
		s.m.Collations, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (*snapshotpb.Collation, error) {
			c := &snapshotpb.Collation{Name: &snapshotpb.Name{}}
			return c, row.Scan(&c.Name.Schema, &c.Name.Name, &c.Version)
		})
	}
	if err != nil {
		return fmt.Errorf("list collations: %w", err)
	}
	rows, err = s.conn.Query(ctx, `SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind = 'm' AND c.relispopulated AND `+userSchema+` ORDER BY c.oid`)
	if err == nil {
		s.m.MaterializedViews, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (*snapshotpb.Name, error) {
			var n snapshotpb.Name
			return &n, row.Scan(&n.Schema, &n.Name)
		})
	}
	if err != nil {
		return fmt.Errorf("list materialized views: %w", err)
	}
	return nil
}

func (s *survey) sequences(ctx context.Context) error {
	rows, err := s.conn.Query(ctx, `SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind = 'S' AND c.relpersistence = 'p' AND `+userSchema+` ORDER BY c.oid`)
	if err == nil {
		s.m.Sequences, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (*snapshotpb.Sequence, error) {
			q := &snapshotpb.Sequence{Name: &snapshotpb.Name{}}
			return q, row.Scan(&q.Name.Schema, &q.Name.Name)
		})
	}
	if err != nil {
		return fmt.Errorf("list sequences: %w", err)
	}
	for _, q := range s.m.Sequences {
		err := s.conn.QueryRow(ctx, "SELECT last_value, is_called FROM "+quoted(q.Name)).Scan(&q.LastValue, &q.IsCalled)
		if err != nil {
			return fmt.Errorf("read sequence %s: %w", quoted(q.Name), err)
		}
	}
	return nil
}

// excluded finds what belongs to this region only, by its place in the catalogs,
// which is also how the archive's table of contents names it.
func (s *survey) excluded(ctx context.Context) error {
	rows, err := s.conn.Query(ctx, `
		SELECT 'pg_trigger'::regclass::oid, t.oid FROM pg_trigger t JOIN pg_proc f ON f.oid = t.tgfoid JOIN pg_namespace n ON n.oid = f.pronamespace WHERE n.nspname = ANY ($1)
		UNION ALL SELECT 'pg_event_trigger'::regclass, e.oid FROM pg_event_trigger e JOIN pg_proc f ON f.oid = e.evtfoid JOIN pg_namespace n ON n.oid = f.pronamespace WHERE n.nspname = ANY ($1)
		UNION ALL SELECT 'pg_publication'::regclass, oid FROM pg_publication WHERE pubname = $2
		UNION ALL SELECT 'pg_publication_rel'::regclass, r.oid FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE p.pubname = $2
		UNION ALL SELECT 'pg_publication_namespace'::regclass, r.oid FROM pg_publication_namespace r JOIN pg_publication p ON p.oid = r.pnpubid WHERE p.pubname = $2`,
		[]string{entry.LocalSchema, entry.FenceSchema}, s.cfg.Publication)
	if err == nil {
		s.m.Excluded, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (*snapshotpb.CatalogEntry, error) {
			var e snapshotpb.CatalogEntry
			return &e, row.Scan(&e.Catalog, &e.Oid)
		})
	}
	if err != nil {
		return fmt.Errorf("list what is not shipped: %w", err)
	}
	return nil
}

// partQuery is the COPY statement that reads a part.
type partQuery string

func (s *survey) tables(ctx context.Context) ([]partQuery, error) {
	type shape struct {
		table *snapshotpb.Table
		pages int64
	}
	rows, err := s.conn.Query(ctx, `
		SELECT n.nspname::text, c.relname::text, greatest(c.reltuples, 0)::int8, pg_table_size(c.oid), pg_relation_size(c.oid) / current_setting('block_size')::int,
		       EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'),
		       ARRAY (SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum)
		  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		 WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND `+userSchema+` ORDER BY c.oid`)
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	shapes, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (shape, error) {
		sh := shape{table: &snapshotpb.Table{Name: &snapshotpb.Name{}}}
		t := sh.table
		return sh, row.Scan(&t.Name.Schema, &t.Name.Name, &t.RowsEstimate, &t.Bytes, &sh.pages, &t.OfExtension, &t.Columns)
	})
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	var queries []partQuery
	for _, sh := range shapes {
		index := uint32(len(s.m.Tables))
		s.m.Tables = append(s.m.Tables, sh.table)
		if sh.table.Bytes == 0 && sh.pages == 0 {
			continue // no page, no row, in any snapshot
		}
		parts := max(1, (sh.pages+s.cfg.partPages-1)/s.cfg.partPages)
		for n := range parts {
			s.m.Parts = append(s.m.Parts, &snapshotpb.Part{Table: index, BytesEstimate: sh.table.Bytes / uint64(parts)})
			queries = append(queries, copyOut(sh.table, n, parts, s.cfg.partPages))
		}
	}
	return queries, nil
}

// copyOut reads pages [n·pages, (n+1)·pages) of a table. The last part has no
// upper end: the table may have grown since.
func copyOut(t *snapshotpb.Table, n, parts, pages int64) partQuery {
	const into = " TO STDOUT (FORMAT binary)"
	if parts == 1 && len(t.Columns) > 0 {
		return partQuery("COPY " + quoted(t.Name) + " (" + quotedList(t.Columns) + ")" + into)
	}
	where := ""
	if n > 0 {
		where = fmt.Sprintf(" WHERE ctid >= '(%d,0)'", n*pages)
	}
	if n < parts-1 {
		where += fmt.Sprintf("%s ctid < '(%d,0)'", map[bool]string{true: " AND", false: " WHERE"}[n > 0], (n+1)*pages)
	}
	return partQuery("COPY (SELECT " + quotedList(t.Columns) + " FROM ONLY " + quoted(t.Name) + where + ")" + into)
}

func quoted(n *snapshotpb.Name) string { return pgx.Identifier{n.Schema, n.Name}.Sanitize() }

func quotedList(names []string) string {
	out := make([]string, len(names))
	for i, n := range names {
		out[i] = pgx.Identifier{n}.Sanitize()
	}
	return strings.Join(out, ", ")
}
