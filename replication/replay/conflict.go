package replay

import (
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"quorate/replication/entry"
)

// ConflictError says that the database does not hold what the log says it held:
// replay cannot go on, and going on would be wrong. It is found again by every
// retry, until the table is repaired or the database seeded anew.
type ConflictError struct {
	Slot  uint64
	Table string // schema.name, "" where no single table is concerned
	Key   string // the row's identity, "" where the change has none
	Want  string // what was expected
	Err   error  // PostgreSQL's own words, if it refused
}

func (e *ConflictError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "conflict in slot %d", e.Slot)
	if e.Table != "" {
		fmt.Fprintf(&b, ", table %s", e.Table)
	}
	if e.Key != "" {
		fmt.Fprintf(&b, ", row %s", e.Key)
	}
	fmt.Fprintf(&b, ": expected %s", e.Want)
	if e.Err != nil {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	return b.String()
}

func (e *ConflictError) Unwrap() error { return e.Err }

// isConflict reports whether PostgreSQL refused because of the data or the
// schema, so that the same changes will be refused again.
func isConflict(err error) bool {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || len(pg.Code) != 5 {
		return false
	}
	switch pg.Code[:2] {
	case "0A", "21", "22", "23", "2B", "2F", "38", "39", "3D", "3F", "42", "44", "54", "P0":
		return true
	}
	return pg.Code == "55000"
}

// isRefusal reports whether it was PostgreSQL that said so.
func isRefusal(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg)
}

// isLockConflict reports whether another session stood in the way, so that the
// same batch may pass later.
func isLockConflict(err error) bool {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return false
	}
	switch pg.Code {
	case "55P03", "40P01", "40001": // lock_not_available, deadlock_detected, serialization_failure
		return true
	}
	return false
}

// rowKey renders the identity of a row for people.
func rowKey(p *plan, vals []entry.Value) string {
	const valueBytesShown = 200
	var names, values strings.Builder
	for i, k := range p.key {
		if i > 0 {
			names.WriteString(", ")
			values.WriteString(", ")
		}
		names.WriteString(p.rel.Columns[p.cols[k].source].Name)
		switch v := vals[p.cols[k].source]; {
		case v.Kind == entry.Null:
			values.WriteString("null")
		case len(v.Data) > valueBytesShown:
			values.Write(v.Data[:valueBytesShown])
			values.WriteString("…")
		default:
			values.Write(v.Data)
		}
	}
	if names.Len() == 0 {
		return ""
	}
	return "(" + names.String() + ")=(" + values.String() + ")"
}
