package feed

import "strings"

// appendToken appends a name as one token of a subject, see the package comment.
func appendToken(dst []byte, name, more string) []byte {
	const hex = "0123456789ABCDEF"
	for i := range len(name) {
		c := name[i]
		if c <= ' ' || c == 0x7f || c == '.' || c == '*' || c == '>' || c == '%' || strings.IndexByte(more, c) >= 0 {
			dst = append(dst, '%', hex[c>>4], hex[c&15])
			continue
		}
		dst = append(dst, c)
	}
	return dst
}

// subjects makes the subjects of one shard.
type subjects struct{ prefix string }

func newSubjects(cluster, shard string) subjects {
	b := appendToken([]byte("quorate."), cluster, "")
	b = append(b, '.')
	return subjects{prefix: string(append(appendToken(b, shard, ""), '.'))}
}

func (s subjects) all() string      { return s.prefix + ">" }
func (s subjects) ddl() string      { return s.prefix + "ddl" }
func (s subjects) gap() string      { return s.prefix + "gap" }
func (s subjects) position() string { return s.prefix + "position" }

func (s subjects) table(schema, name string) string {
	b := appendToken([]byte(s.prefix), schema, "")
	b = append(b, '.')
	return string(appendToken(b, name, ""))
}

// StreamName is the name of a shard's stream.
func StreamName(cluster, shard string) string {
	b := appendToken([]byte("quorate_"), cluster, `_/\`)
	b = append(b, '_')
	return string(appendToken(b, shard, `_/\`))
}

// TableSubject is the subject of a table's changes.
func TableSubject(cluster, shard, schema, table string) string {
	return newSubjects(cluster, shard).table(schema, table)
}
