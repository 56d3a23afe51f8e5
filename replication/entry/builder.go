package entry

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// Builder makes bodies out of pgoutput messages in their wire form. It
// remembers the relations that a publisher's session described and puts each
// into a transaction's body before its first use. It is for one goroutine and
// one session of a publisher.
//
//	b.Begin()
//	b.Define(relation); b.Add(insert); …
//	b.Body(); or, to cut: b.Take()
type Builder struct {
	relations map[uint32]*definition
	writes    uint64 // transactions begun: what definitions written are compared with
	body      []byte
	sum       uint32 // of what Take took away
	taken     uint64
	changes   uint32
}

type definition struct {
	raw       []byte
	writtenIn uint64 // the last transaction whose body holds this very definition
}

// NewBuilder returns a builder for a new session of a publisher.
func NewBuilder() *Builder { return &Builder{relations: make(map[uint32]*definition)} }

// Begin starts the body of a new transaction and drops that of the last one.
func (b *Builder) Begin() {
	b.writes++
	b.body, b.sum, b.taken, b.changes = b.body[:0], 0, 0, 0
}

// Define remembers a Relation message. One that the publisher repeats without a
// change leaves no trace in the body.
func (b *Builder) Define(raw []byte) error {
	if len(raw) < 5 || raw[0] != 'R' {
		return corrupt("not a relation message")
	}
	id := binary.BigEndian.Uint32(raw[1:])
	if def := b.relations[id]; def != nil && bytes.Equal(def.raw, raw) {
		return nil
	}
	b.relations[id] = &definition{raw: bytes.Clone(raw)}
	return nil
}

// Add appends an Insert, Update, Delete, Truncate or Message, and before it what
// it refers to.
func (b *Builder) Add(raw []byte) error {
	if len(raw) < 5 {
		return corrupt("message of %d bytes", len(raw))
	}
	switch raw[0] {
	case 'I', 'U', 'D':
		if err := b.use(binary.BigEndian.Uint32(raw[1:])); err != nil {
			return err
		}
		b.changes++
	case 'T':
		n := binary.BigEndian.Uint32(raw[1:])
		if uint64(len(raw)) != 6+4*uint64(n) {
			return corrupt("truncate of %d relations in %d bytes", n, len(raw))
		}
		for ids := raw[6:]; len(ids) > 0; ids = ids[4:] {
			if err := b.use(binary.BigEndian.Uint32(ids)); err != nil {
				return err
			}
		}
		b.changes++
	case 'M':
		m, err := ParseMessage(raw)
		if err != nil {
			return err
		}
		if string(m.Prefix) == DDLPrefix {
			b.changes++
		}
	default:
		return corrupt("message of type %q in a body", raw[0])
	}
	b.append(raw)
	return nil
}

func (b *Builder) use(id uint32) error {
	def := b.relations[id]
	if def == nil {
		return corrupt("change of relation %d, which was not described", id)
	}
	if def.writtenIn != b.writes {
		def.writtenIn = b.writes
		b.append(def.raw)
	}
	return nil
}

func (b *Builder) append(raw []byte) {
	if len(raw) > MessageBytesMax {
		panic(fmt.Sprintf("entry: message of %d bytes", len(raw)))
	}
	b.body = binary.AppendUvarint(b.body, uint64(len(raw)))
	b.body = append(b.body, raw...)
}

// Body returns what was added and not taken. It is valid until the next call of
// a method that changes the builder.
func (b *Builder) Body() []byte { return b.body }

// Take removes the first n bytes of Body, which the caller has used. The
// checksum goes on.
func (b *Builder) Take(n int) {
	b.sum = Checksum(b.sum, b.body[:n])
	b.taken += uint64(n)
	b.body = b.body[:copy(b.body, b.body[n:])]
}

// Checksum returns the CRC-32C of all that was added since Begin.
func (b *Builder) Checksum() uint32 { return Checksum(b.sum, b.body) }

// Bytes returns how much was added since Begin, taken or not.
func (b *Builder) Bytes() uint64 { return b.taken + uint64(len(b.body)) }

// Changes returns how many changes, as Header counts them, were added since Begin.
func (b *Builder) Changes() uint32 { return b.changes }

// Shrink lets go of a buffer that has grown beyond max bytes.
func (b *Builder) Shrink(max int) {
	if cap(b.body) > max {
		b.body = append(make([]byte, 0, len(b.body)), b.body...)
	}
}
