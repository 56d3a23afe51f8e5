package entry

import "encoding/binary"

// The publisher's side of the wire, for tests that need no server.

func wireRelation(id uint32, schema, name string, identity byte, columns ...Column) []byte {
	b := binary.BigEndian.AppendUint32([]byte{'R'}, id)
	b = append(append(b, schema...), 0)
	b = append(append(b, name...), 0)
	b = append(b, identity)
	b = binary.BigEndian.AppendUint16(b, uint16(len(columns)))
	for _, c := range columns {
		flags := byte(0)
		if c.Key {
			flags = 1
		}
		b = append(append(append(b, flags), c.Name...), 0)
		b = binary.BigEndian.AppendUint32(b, c.TypeOID)
		b = binary.BigEndian.AppendUint32(b, uint32(c.TypeMod))
	}
	return b
}

func text(s string) Value { return Value{Kind: Text, Data: []byte(s)} }

func wireTuple(b []byte, kind byte, row ...Value) []byte {
	b = binary.BigEndian.AppendUint16(append(b, kind), uint16(len(row)))
	for _, v := range row {
		b = append(b, byte(v.Kind))
		if v.Kind == Text {
			b = binary.BigEndian.AppendUint32(b, uint32(len(v.Data)))
			b = append(b, v.Data...)
		}
	}
	return b
}

func wireInsert(id uint32, row ...Value) []byte {
	return wireTuple(binary.BigEndian.AppendUint32([]byte{'I'}, id), 'N', row...)
}

func wireUpdate(id uint32, oldKind byte, old, new []Value) []byte {
	b := binary.BigEndian.AppendUint32([]byte{'U'}, id)
	if oldKind != 0 {
		b = wireTuple(b, oldKind, old...)
	}
	return wireTuple(b, 'N', new...)
}

func wireDelete(id uint32, oldKind byte, old ...Value) []byte {
	return wireTuple(binary.BigEndian.AppendUint32([]byte{'D'}, id), oldKind, old...)
}

func wireTruncate(options byte, ids ...uint32) []byte {
	b := binary.BigEndian.AppendUint32([]byte{'T'}, uint32(len(ids)))
	b = append(b, options)
	for _, id := range ids {
		b = binary.BigEndian.AppendUint32(b, id)
	}
	return b
}

func wireMessage(prefix, content string) []byte {
	b := binary.BigEndian.AppendUint64([]byte{'M', 1}, 42)
	b = append(append(b, prefix...), 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(content)))
	return append(b, content...)
}

var (
	relT = wireRelation(7, "public", "t", 'd', Column{Name: "id", TypeOID: 23, TypeMod: -1, Key: true}, Column{Name: "v", TypeOID: 25, TypeMod: -1})
	relU = wireRelation(8, "s", "u", 'f', Column{Name: "a", TypeOID: 23, TypeMod: -1, Key: true})
)

// sampleBody holds one of everything.
func sampleBody() *Builder {
	b := NewBuilder()
	b.Begin()
	for _, m := range [][]byte{relT, relU} {
		must(b.Define(m))
	}
	for _, m := range [][]byte{
		wireInsert(7, text("1"), Value{Kind: Null}),
		wireUpdate(7, 'K', []Value{text("1"), {Kind: Null}}, []Value{text("2"), {Kind: Unchanged}}),
		wireDelete(8, 'O', text("")),
		wireTruncate(3, 7, 8),
		wireMessage(DDLPrefix, `{"x":1}`),
		wireMessage("other", "\xff\n"),
	} {
		must(b.Add(m))
	}
	return b
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
