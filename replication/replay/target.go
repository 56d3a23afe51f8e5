package replay

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"quorate/replication/entry"
)

// target is a table of the local database as this transaction sees it.
type target struct {
	name        string // schema.name, quoted
	shown       string // schema.name, for people
	partitioned bool
	columns     []targetColumn
	indexes     []targetIndex
	// rowByRow: row triggers or rules that fire in replay too. They see other
	// rows and tables, so everything before must be there, and nothing after.
	rowByRow bool

	run run // changes of this table that are not sent yet
}

type targetColumn struct {
	name           string
	typ            string // as SQL text without a modifier
	elementOfArray bool   // typ[] exists and its text form is the ordinary one
	exact          bool   // its = tells apart whatever its text form tells apart
	generated      bool
	identityAlways bool
}

// targetIndex is a unique index or an exclusion constraint.
type targetIndex struct {
	primary   bool
	deferred  bool // deferrable: cannot identify rows
	partial   bool // has a predicate or expressions
	exclusion bool
	columns   []string // key columns
	operators []string // equality of each, OPERATOR(schema.=); "" if unknown
}

func (t *target) column(name string) *targetColumn {
	for i := range t.columns {
		if t.columns[i].name == name {
			return &t.columns[i]
		}
	}
	return nil
}

// only is the ONLY of statements by key: children of an inheritance parent are
// published under their own names.
func (t *target) only() string {
	if t.partitioned {
		return ""
	}
	return "ONLY "
}

// loadTarget reads a table's shape from the catalog; nil if there is none.
func loadTarget(ctx context.Context, conn *pgx.Conn, schema, name string) (*target, error) {
	var oid uint32
	t := &target{shown: schema + "." + name, name: pgx.Identifier{schema, name}.Sanitize()}
	err := conn.QueryRow(ctx, `
		SELECT c.oid, c.relkind = 'p',
		       EXISTS (SELECT FROM pg_trigger g JOIN pg_proc f ON f.oid = g.tgfoid
		                WHERE g.tgrelid = ANY (tree.oids) AND NOT g.tgisinternal AND g.tgenabled IN ('A', 'R')
		                  AND f.pronamespace NOT IN (SELECT oid FROM pg_namespace WHERE nspname IN ($3, $4)))
		    OR EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class = c.oid AND r.ev_enabled IN ('A', 'R'))
		  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace,
		       LATERAL (SELECT array_agg(p.oid) || c.oid AS oids FROM (SELECT relid::oid AS oid FROM pg_partition_tree(c.oid)) p) tree
		 WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')`,
		schema, name, entry.LocalSchema, entry.FenceSchema).Scan(&oid, &t.partitioned, &t.rowByRow)
	if err == pgx.ErrNoRows {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the shape of table %s: %w", t.shown, err)
	}
	rows, err := conn.Query(ctx, `
		SELECT a.attname::text, format_type(a.atttypid, -1), y.typtype IN ('b', 'e') AND y.typarray <> 0 AND y.typelem = 0 AND y.typdelim = ',',
		       y.oid IN ('bool'::regtype, 'int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'oid'::regtype, 'date'::regtype,
		                 'timestamp'::regtype, 'timestamptz'::regtype, 'uuid'::regtype, 'bytea'::regtype, '"char"'::regtype),
		       a.attgenerated <> '', a.attidentity = 'a'
		  FROM pg_attribute a JOIN pg_type y ON y.oid = a.atttypid
		 WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum`, oid)
	if err == nil {
		t.columns, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (c targetColumn, err error) {
			err = row.Scan(&c.name, &c.typ, &c.elementOfArray, &c.exact, &c.generated, &c.identityAlways)
			return c, err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("read the columns of table %s: %w", t.shown, err)
	}
	// Unique indexes of partitions too: a row that goes in by the root meets them.
	rows, err = conn.Query(ctx, `
		SELECT i.indisprimary AND i.indrelid = $1, NOT i.indimmediate, i.indpred IS NOT NULL OR i.indexprs IS NOT NULL OR i.indrelid <> $1, i.indisexclusion,
		       ARRAY (SELECT coalesce(a.attname::text, '') FROM generate_series(0, i.indnkeyatts - 1) k
		                LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k] ORDER BY k),
		       ARRAY (SELECT coalesce((SELECT format('OPERATOR(%I.%s)', n.nspname, o.oprname)
		                        FROM pg_opclass c JOIN pg_amop m ON m.amopfamily = c.opcfamily AND m.amoplefttype = c.opcintype AND m.amoprighttype = c.opcintype
		                        JOIN pg_operator o ON o.oid = m.amopopr JOIN pg_namespace n ON n.oid = o.oprnamespace
		                       WHERE c.oid = i.indclass[k] AND c.opcmethod = (SELECT oid FROM pg_am WHERE amname = 'btree') AND m.amopstrategy = 3), '')
		                FROM generate_series(0, i.indnkeyatts - 1) k ORDER BY k)
		  FROM pg_index i
		 WHERE (i.indrelid = $1 OR i.indrelid IN (SELECT relid FROM pg_partition_tree($1)) AND NOT EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = i.indexrelid))
		   AND (i.indisunique OR i.indisexclusion) ORDER BY i.indexrelid`, oid)
	if err == nil {
		t.indexes, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (x targetIndex, err error) {
			err = row.Scan(&x.primary, &x.deferred, &x.partial, &x.exclusion, &x.columns, &x.operators)
			return x, err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("read the unique indexes of table %s: %w", t.shown, err)
	}
	return t, nil
}
