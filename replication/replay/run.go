package replay

import (
	"encoding/binary"

	"quorate/replication/entry"
)

// run is a series of changes of one table that one statement can apply:
//
//   - inserts of any kind: however they are ordered, the same rows come out, and
//     a row that may not be there is refused in any order;
//   - updates by key with all columns, on a table whose only uniqueness is that
//     key, none of which changes it: rows with different keys commute. The later
//     one of two with the same key replaces the earlier;
//   - deletes by key.
//
// A change of the table that does not fit sends the run first, so a table's
// statements are in the log's order. Tables do not wait for each other: replay
// checks no foreign keys (the publisher did), and tables whose triggers or rules
// fire in replay take no part in runs; before each of their changes everything
// else is sent.
type run struct {
	op    entry.Op // 0: empty
	plan  *plan
	rows  int
	bytes int
	vals  []entry.Value  // rows of width() values
	index map[string]int // of updates and deletes: key to row
	slot  uint64         // of the first row
}

const (
	runRowsMax  = 8_192
	runBytesMax = 4 << 20
	// copyRowsMin: from here on COPY costs less than INSERT … SELECT FROM unnest.
	copyRowsMin = 2_000
)

func (r *run) full() bool { return r.rows >= runRowsMax || r.bytes >= runBytesMax }

func (r *run) reset() {
	clear(r.vals) // lets go of the bodies
	r.op, r.plan, r.rows, r.bytes, r.vals = 0, nil, 0, 0, r.vals[:0]
	clear(r.index)
}

func (r *run) width() int {
	switch r.op {
	case entry.Insert:
		return len(r.plan.cols)
	case entry.Delete:
		return len(r.plan.key)
	default:
		return len(r.plan.key) + len(r.plan.rest)
	}
}

// appendKey appends an unambiguous form of a row's key.
func appendKey(dst []byte, key []entry.Value) []byte {
	for i := range key {
		dst = append(dst, byte(key[i].Kind))
		dst = binary.AppendUvarint(dst, uint64(len(key[i].Data)))
		dst = append(dst, key[i].Data...)
	}
	return dst
}

// appendArray appends column c of the run as the text form of an array.
func (r *run) appendArray(dst []byte, c int) []byte {
	dst = append(dst, '{')
	width := r.width()
	for i := c; i < len(r.vals); i += width {
		if i != c {
			dst = append(dst, ',')
		}
		v := &r.vals[i]
		if v.Kind == entry.Null {
			dst = append(dst, "NULL"...)
			continue
		}
		if isNumber(v.Data) {
			dst = append(dst, v.Data...)
			continue
		}
		dst = append(dst, '"')
		rest := v.Data
		for n := 0; n < len(rest); n++ {
			if rest[n] == '"' || rest[n] == '\\' {
				dst = append(dst, rest[:n]...)
				dst = append(dst, '\\', rest[n])
				rest, n = rest[n+1:], -1
			}
		}
		dst = append(dst, rest...)
		dst = append(dst, '"')
	}
	return append(dst, '}')
}

// isNumber reports whether v needs no quotes in an array, for the sake of the
// commonest values.
func isNumber(v []byte) bool {
	if len(v) == 0 || len(v) > 20 {
		return false
	}
	for _, b := range v {
		if (b < '0' || b > '9') && b != '-' && b != '.' {
			return false
		}
	}
	return true
}

// appendCopy appends the run's rows in COPY's text format.
func (r *run) appendCopy(dst []byte) []byte {
	width := r.width()
	for i := range r.vals {
		v := &r.vals[i]
		if v.Kind == entry.Null {
			dst = append(dst, '\\', 'N')
		} else {
			dst = appendCopyValue(dst, v.Data)
		}
		if (i+1)%width == 0 {
			dst = append(dst, '\n')
		} else {
			dst = append(dst, '\t')
		}
	}
	return dst
}

func appendCopyValue(dst, v []byte) []byte {
	start := 0
	for i, b := range v {
		var c byte
		switch b {
		case '\\':
			c = '\\'
		case '\n':
			c = 'n'
		case '\r':
			c = 'r'
		case '\t':
			c = 't'
		default:
			continue
		}
		dst = append(dst, v[start:i]...)
		dst = append(dst, '\\', c)
		start = i + 1
	}
	return append(dst, v[start:]...)
}
