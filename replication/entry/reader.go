package entry

import (
	"encoding/binary"
	"slices"
)

// Reader decodes the bodies of one transaction at a time: Reset, then for each
// body Feed and Next until it says there is no more, then Finish. It copies no
// values and allocates nothing for a row. It is for one goroutine; relations
// may be shared by many readers.
type Reader struct {
	cache     *RelationCache
	relations map[uint32]*Relation // of this transaction
	last      *Relation            // the one used last, nearly always the next one too
	rest      []byte               // of the body being read
	carry     []byte               // a message whose end is in a later body
	old, new  []Value
	truncate  []*Relation
	prefix    string // the last message's, as they repeat
}

// NewReader returns a reader that parses through relations.
func NewReader(relations *RelationCache) *Reader {
	return &Reader{cache: relations, relations: make(map[uint32]*Relation)}
}

// Reset makes the reader ready for the next transaction.
func (r *Reader) Reset() {
	clear(r.relations)
	r.last, r.rest, r.carry = nil, nil, nil
}

// Feed gives the reader the next body of the transaction. The one before must
// have been read to its end. Changes point into body.
func (r *Reader) Feed(body []byte) {
	if len(r.rest) != 0 {
		panic("entry: Feed before the last body was read to its end")
	}
	r.rest = body
}

// Finish reports an error if the transaction ends within a message.
func (r *Reader) Finish() error {
	if len(r.carry) != 0 || len(r.rest) != 0 {
		return corrupt("transaction ends within a message")
	}
	return nil
}

// Next returns the next change of the body, or false at its end. The change's
// slices are valid until the next call, the data of its values as long as the
// body's bytes.
func (r *Reader) Next() (Change, bool, error) {
	for {
		raw, ok, err := r.message()
		if err != nil || !ok {
			return Change{}, false, err
		}
		if len(raw) == 0 {
			return Change{}, false, corrupt("empty message")
		}
		switch raw[0] {
		case 'R':
			rel, err := r.cache.Relation(raw)
			if err != nil {
				return Change{}, false, err
			}
			r.relations[rel.ID] = rel
			r.last = rel
		case 'Y': // names a type; no value needs it
		default:
			c, err := r.change(raw)
			return c, err == nil, err
		}
	}
}

// message cuts the next message off the body. A message that the body does not
// hold whole is kept until the next one.
func (r *Reader) message() ([]byte, bool, error) {
	if len(r.carry) != 0 {
		return r.carried()
	}
	if len(r.rest) == 0 {
		return nil, false, nil
	}
	n, size := binary.Uvarint(r.rest)
	if size < 0 || size > 0 && (n > MessageBytesMax || size != uvarintLen(n)) {
		return nil, false, corrupt("bad message length")
	}
	if size == 0 || n > uint64(len(r.rest)-size) {
		if size == 0 && len(r.rest) >= binary.MaxVarintLen32 {
			return nil, false, corrupt("bad message length")
		}
		r.carry, r.rest = append([]byte(nil), r.rest...), nil
		return nil, false, nil
	}
	raw := r.rest[size : size+int(n) : size+int(n)]
	r.rest = r.rest[size+int(n):]
	return raw, true, nil
}

// carried completes the message that an earlier body began. Its buffer grows
// with what is there, not with what the length promises.
func (r *Reader) carried() ([]byte, bool, error) {
	for {
		n, size := binary.Uvarint(r.carry)
		if size < 0 || size > 0 && (n > MessageBytesMax || size != uvarintLen(n)) || size == 0 && len(r.carry) >= binary.MaxVarintLen32 {
			return nil, false, corrupt("bad message length")
		}
		missing := 1 // a byte of the length
		if size > 0 {
			missing = size + int(n) - len(r.carry)
		}
		if missing == 0 {
			raw := r.carry[size:]
			r.carry = nil // values point into it
			return raw, true, nil
		}
		if len(r.rest) == 0 {
			return nil, false, nil
		}
		take := min(missing, len(r.rest))
		r.carry = append(r.carry, r.rest[:take]...)
		r.rest = r.rest[take:]
	}
}

func (r *Reader) change(raw []byte) (Change, error) {
	d := decoder{b: raw[1:]}
	var c Change
	var err error
	switch raw[0] {
	case 'I':
		c.Op = Insert
		if c.Relation, err = r.relation(d.uint32()); err != nil {
			return Change{}, err
		}
		if d.byte() != 'N' {
			return Change{}, corrupt("insert without a new row")
		}
		r.new = d.tuple(r.new[:0], c.Relation)
		c.New = r.new
	case 'U':
		c.Op = Update
		if c.Relation, err = r.relation(d.uint32()); err != nil {
			return Change{}, err
		}
		kind := d.byte()
		if kind == 'K' || kind == 'O' {
			c.OldKind = kind
			r.old = d.tuple(r.old[:0], c.Relation)
			c.Old = r.old
			kind = d.byte()
		}
		if kind != 'N' {
			return Change{}, corrupt("update without a new row")
		}
		r.new = d.tuple(r.new[:0], c.Relation)
		c.New = r.new
	case 'D':
		c.Op = Delete
		if c.Relation, err = r.relation(d.uint32()); err != nil {
			return Change{}, err
		}
		c.OldKind = d.byte()
		if c.OldKind != 'K' && c.OldKind != 'O' {
			return Change{}, corrupt("delete without an old row")
		}
		r.old = d.tuple(r.old[:0], c.Relation)
		c.Old = r.old
	case 'T':
		c.Op = Truncate
		n := int(d.uint32())
		options := d.byte()
		if n > len(d.b)/4 {
			return Change{}, corrupt("truncate of %d relations in %d bytes", n, len(d.b))
		}
		r.truncate = r.truncate[:0]
		for range n {
			rel, err := r.relation(d.uint32())
			if err != nil {
				return Change{}, err
			}
			r.truncate = append(r.truncate, rel)
		}
		c.Truncate = r.truncate
		c.Cascade, c.Restart = options&1 != 0, options&2 != 0
	case 'M':
		m, err := ParseMessage(raw)
		if err != nil {
			return Change{}, err
		}
		if string(m.Prefix) != r.prefix {
			r.prefix = string(m.Prefix)
		}
		c.Op, c.Prefix, c.Content = Message, r.prefix, m.Content
		if r.prefix == DDLPrefix {
			c.Op = DDL
		}
		return c, nil
	default:
		return Change{}, corrupt("message of type %q", raw[0])
	}
	if d.failed || len(d.b) != 0 {
		return Change{}, corrupt("message of type %q has a wrong length", raw[0])
	}
	return c, nil
}

func (r *Reader) relation(id uint32) (*Relation, error) {
	if r.last != nil && r.last.ID == id {
		return r.last, nil
	}
	rel := r.relations[id]
	if rel == nil {
		return nil, corrupt("change of relation %d, which was not described", id)
	}
	r.last = rel
	return rel, nil
}

// tuple reads a row of rel onto vs.
func (d *decoder) tuple(vs []Value, rel *Relation) []Value {
	if int(d.uint16()) != len(rel.Columns) {
		d.failed = true
		return vs
	}
	vs = slices.Grow(vs, len(rel.Columns))
	b := d.b
	for range rel.Columns {
		if len(b) == 0 {
			d.failed = true
			return vs
		}
		kind := ValueKind(b[0])
		switch kind {
		case Null, Unchanged:
			vs, b = append(vs, Value{Kind: kind}), b[1:]
		case Text:
			if len(b) < 5 {
				d.failed = true
				return vs
			}
			n := int64(binary.BigEndian.Uint32(b[1:]))
			if n > int64(len(b)-5) {
				d.failed = true
				return vs
			}
			end := 5 + int(n)
			vs, b = append(vs, Value{Kind: kind, Data: b[5:end:end]}), b[end:]
		default:
			d.failed = true
			return vs
		}
	}
	d.b = b
	return vs
}

// LogicalMessage is a decoded Message of the wire.
type LogicalMessage struct {
	Transactional bool
	LSN           LSN // the publisher's, of the message itself
	Prefix        []byte
	Content       []byte
}

// ParseMessage decodes a Message (with its leading 'M'); it copies nothing.
func ParseMessage(raw []byte) (LogicalMessage, error) {
	d := decoder{b: raw}
	if d.byte() != 'M' {
		return LogicalMessage{}, corrupt("not a logical message")
	}
	m := LogicalMessage{Transactional: d.byte()&1 != 0, LSN: LSN(d.uint64())}
	m.Prefix = d.cstring()
	n := d.uint32()
	if d.failed || uint64(n) != uint64(len(d.b)) {
		return LogicalMessage{}, corrupt("logical message has a wrong length")
	}
	m.Content = d.b
	return m, nil
}
