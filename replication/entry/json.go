package entry

import (
	"encoding/base64"
	"encoding/json"
	"strconv"
	"unicode/utf8"
)

func (o Op) String() string {
	switch o {
	case Insert:
		return "insert"
	case Update:
		return "update"
	case Delete:
		return "delete"
	case Truncate:
		return "truncate"
	case DDL:
		return "ddl"
	case Message:
		return "message"
	}
	return "op(" + strconv.Itoa(int(o)) + ")"
}

// AppendJSON appends the change as a JSON object:
//
//	{"op":"insert","schema":"public","table":"t","new":{"id":"1","v":null}}
//	{"op":"update","schema":"public","table":"t","key":{"id":"1"},"new":{"id":"2"},"unchanged":["v"]}
//	{"op":"delete","schema":"public","table":"t","key":{"id":"1"}}
//	{"op":"truncate","tables":[{"schema":"public","table":"t"}],"cascade":true,"restart_identity":true}
//	{"op":"ddl","ddl":{…}}
//	{"op":"message","prefix":"p","content":"…"}
//
// Every value is PostgreSQL's own text form as a JSON string, or null: a number
// would lose digits in readers that know only doubles. "key" holds the old
// values of the replica identity, "old" (in its place, with identity FULL) those
// of the whole row. "unchanged" names columns whose large values the publisher
// did not send since the update left them alone; they are missing from "new".
// Content that is not UTF-8 is given as "content_base64" instead.
func (c *Change) AppendJSON(dst []byte) []byte {
	dst = append(dst, `{"op":"`...)
	dst = append(dst, c.Op.String()...)
	dst = append(dst, '"')
	switch c.Op {
	case Insert, Update, Delete:
		dst = append(dst, ',')
		dst = appendTable(dst, c.Relation)
		if c.OldKind == 'K' {
			dst = append(dst, `,"key":`...)
			dst = appendRow(dst, c.Relation, c.Old, true)
		} else if c.OldKind == 'O' {
			dst = append(dst, `,"old":`...)
			dst = appendRow(dst, c.Relation, c.Old, false)
		}
		if c.Op != Delete {
			dst = append(dst, `,"new":`...)
			dst = appendRow(dst, c.Relation, c.New, false)
			dst = appendUnchanged(dst, c.Relation, c.New)
		}
	case Truncate:
		dst = append(dst, `,"tables":[`...)
		for i, rel := range c.Truncate {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = append(dst, '{')
			dst = appendTable(dst, rel)
			dst = append(dst, '}')
		}
		dst = append(dst, ']')
		if c.Cascade {
			dst = append(dst, `,"cascade":true`...)
		}
		if c.Restart {
			dst = append(dst, `,"restart_identity":true`...)
		}
	case DDL:
		dst = append(dst, `,"ddl":`...)
		if json.Valid(c.Content) {
			dst = append(dst, c.Content...)
		} else {
			dst = appendString(dst, c.Content)
		}
	case Message:
		dst = append(dst, `,"prefix":`...)
		dst = appendString(dst, []byte(c.Prefix))
		if utf8.Valid(c.Content) {
			dst = append(dst, `,"content":`...)
			dst = appendString(dst, c.Content)
		} else {
			dst = append(dst, `,"content_base64":"`...)
			dst = base64.StdEncoding.AppendEncode(dst, c.Content)
			dst = append(dst, '"')
		}
	}
	return append(dst, '}')
}

// MarshalJSON is AppendJSON.
func (c *Change) MarshalJSON() ([]byte, error) { return c.AppendJSON(nil), nil }

func appendTable(dst []byte, rel *Relation) []byte {
	dst = append(dst, `"schema":`...)
	dst = appendString(dst, []byte(rel.Schema))
	dst = append(dst, `,"table":`...)
	return appendString(dst, []byte(rel.Name))
}

func appendRow(dst []byte, rel *Relation, row []Value, keyOnly bool) []byte {
	dst = append(dst, '{')
	first := true
	for i := range row {
		if row[i].Kind == Unchanged || keyOnly && !rel.Columns[i].Key {
			continue
		}
		if !first {
			dst = append(dst, ',')
		}
		first = false
		dst = appendString(dst, []byte(rel.Columns[i].Name))
		dst = append(dst, ':')
		if row[i].Kind == Null {
			dst = append(dst, "null"...)
		} else {
			dst = appendString(dst, row[i].Data)
		}
	}
	return append(dst, '}')
}

func appendUnchanged(dst []byte, rel *Relation, row []Value) []byte {
	first := true
	for i := range row {
		if row[i].Kind != Unchanged {
			continue
		}
		if first {
			dst = append(dst, `,"unchanged":[`...)
		} else {
			dst = append(dst, ',')
		}
		first = false
		dst = appendString(dst, []byte(rel.Columns[i].Name))
	}
	if !first {
		dst = append(dst, ']')
	}
	return dst
}

const hexDigits = "0123456789abcdef"

// appendString appends s as a JSON string. What is not UTF-8 becomes U+FFFD.
func appendString(dst, s []byte) []byte {
	dst = append(dst, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRune(s[i:])
			if r == utf8.RuneError && size == 1 {
				dst = append(append(dst, s[start:i]...), `\ufffd`...)
				start = i + 1
			}
			i += size
			continue
		}
		if c >= 0x20 && c != '"' && c != '\\' {
			i++
			continue
		}
		dst = append(dst, s[start:i]...)
		switch c {
		case '"', '\\':
			dst = append(dst, '\\', c)
		case '\n':
			dst = append(dst, '\\', 'n')
		case '\t':
			dst = append(dst, '\\', 't')
		case '\r':
			dst = append(dst, '\\', 'r')
		default:
			dst = append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
		i++
		start = i
	}
	return append(append(dst, s[start:]...), '"')
}
