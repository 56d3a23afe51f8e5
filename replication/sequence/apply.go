package sequence

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/replication/entry"
)

// A value outside the bounds means that they changed since the sample: the
// nearest there is keeps the promise that nothing beyond it was handed out.
const applyQuery = `SELECT pg_catalog.setval(c.oid::pg_catalog.regclass, least(greatest(m.value, s.seqmin), s.seqmax), true)
FROM unnest($1::text[], $2::text[], $3::int8[]) AS m(schema, name, value)
JOIN pg_catalog.pg_namespace n ON n.nspname = m.schema::name
JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = m.name::name AND c.relkind = 'S'
JOIN pg_catalog.pg_sequence s ON s.seqrelid = c.oid`

// Apply sets the sequences to their marks; the next value of each is the one
// after it. A sequence that does not exist (it was dropped since the sample) is
// passed over. Of several marks of one sequence only the last may be given. It
// may run in a transaction, but a rollback does not take it back.
func Apply(ctx context.Context, conn *pgx.Conn, marks []entry.Mark) error {
	if len(marks) == 0 {
		return nil
	}
	schemas, names, values := make([]string, len(marks)), make([]string, len(marks)), make([]int64, len(marks))
	for i, m := range marks {
		schemas[i], names[i], values[i] = m.Schema, m.Name, m.Value
	}
	if _, err := conn.Exec(ctx, applyQuery, schemas, names, values); err != nil {
		return fmt.Errorf("set %d sequences to their marks: %w", len(marks), err)
	}
	return nil
}

const ownedQuery = `SELECT sn.nspname, sc.relname, tn.nspname, tc.relname, a.attname, s.seqincrement > 0
FROM pg_catalog.pg_depend d
JOIN pg_catalog.pg_sequence s ON s.seqrelid = d.objid
JOIN pg_catalog.pg_class sc ON sc.oid = s.seqrelid
JOIN pg_catalog.pg_namespace sn ON sn.oid = sc.relnamespace
JOIN pg_catalog.pg_class tc ON tc.oid = d.refobjid AND tc.relkind IN ('r', 'p')
JOIN pg_catalog.pg_namespace tn ON tn.oid = tc.relnamespace
JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid AND a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)
WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.deptype IN ('a', 'i')
  AND sc.relpersistence <> 't' AND sn.nspname NOT IN ('pg_catalog', 'information_schema', 'quorate')
ORDER BY 1, 2`

// AdvancePastColumns moves every sequence that an integer column owns past all
// values of that column, never backwards. It is for promotion, before writers
// are let in: a sequence that was created, or restarted, and used in one
// transaction has no mark before the next sample. A column that holds the very
// end of the sequence's range leaves it alone, since the row that holds it is
// one that a user put there, not one the sequence counted up to. Without an index
// on the column its table has to be read whole: a column for which that takes
// longer than columnWithin is left out and returned, since a promotion must not
// hang on it; marks cover its sequence but for that one case.
func AdvancePastColumns(ctx context.Context, conn *pgx.Conn) (leftOut []string, err error) {
	type owned struct {
		sequence, table, column string
		ascending               bool
	}
	rows, err := conn.Query(ctx, ownedQuery)
	if err != nil {
		return nil, fmt.Errorf("list sequences of columns: %w", err)
	}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (owned, error) {
		var ss, sn, ts, tn, column string
		var o owned
		err := row.Scan(&ss, &sn, &ts, &tn, &column, &o.ascending)
		o.sequence = pgx.Identifier{ss, sn}.Sanitize()
		o.table = pgx.Identifier{ts, tn}.Sanitize()
		o.column = pgx.Identifier{column}.Sanitize()
		return o, err
	})
	if err != nil {
		return nil, fmt.Errorf("list sequences of columns: %w", err)
	}
	for _, o := range list {
		aggregate, beyond, within := "max", ">", "x.m >= d.seqmin AND x.m < d.seqmax"
		if !o.ascending {
			aggregate, beyond, within = "min", "<", "x.m > d.seqmin AND x.m <= d.seqmax"
		}
		// The farthest value is m; the sequence has it behind it if it is at m
		// and has handed that out, or beyond.
		query := fmt.Sprintf(`SELECT pg_catalog.setval(d.seqrelid::pg_catalog.regclass, x.m, true)
FROM (SELECT %[1]s(%[2]s)::int8 AS m FROM %[3]s) x, %[4]s s, pg_catalog.pg_sequence d
WHERE d.seqrelid = $1::regclass AND %[6]s
  AND (x.m %[5]s s.last_value OR x.m = s.last_value AND NOT s.is_called)`,
			aggregate, o.column, o.table, o.sequence, beyond, within)
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, fmt.Sprintf("SET LOCAL statement_timeout = %d", columnWithin.Milliseconds())); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, query, pgx.QueryExecModeExec, o.sequence)
			return err
		})
		if pgCode(err) == "57014" && ctx.Err() == nil {
			leftOut = append(leftOut, o.table+"."+o.column)
			continue
		}
		if err != nil {
			return leftOut, fmt.Errorf("move sequence %s past column %s of %s: %w", o.sequence, o.column, o.table, err)
		}
	}
	return leftOut, nil
}

// columnWithin bounds the look for the farthest value of one column.
const columnWithin = 300 * time.Millisecond
