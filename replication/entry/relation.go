package entry

import (
	"bytes"
	"encoding/binary"
	"sync"
)

// relationsMax bounds a RelationCache. One shape of one table is one relation.
const relationsMax = 10_000

// RelationCache holds relations by the bytes that describe them, so that a
// table used by many transactions is parsed once, and stays the same *Relation:
// readers may key plans of their own by that pointer. It is safe for concurrent
// use and bounded; when it is full it starts anew, which costs only parsing.
type RelationCache struct {
	mu    sync.RWMutex
	byRaw map[string]*Relation // guarded by mu
}

// NewRelationCache returns an empty cache.
func NewRelationCache() *RelationCache { return &RelationCache{byRaw: make(map[string]*Relation)} }

// Relation returns the relation that a Relation message (with its leading 'R')
// describes. It is shared: nobody changes it.
func (c *RelationCache) Relation(raw []byte) (*Relation, error) {
	c.mu.RLock()
	rel := c.byRaw[string(raw)]
	c.mu.RUnlock()
	if rel != nil {
		return rel, nil
	}
	rel, err := parseRelation(raw)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if known := c.byRaw[string(raw)]; known != nil {
		return known, nil
	}
	if len(c.byRaw) >= relationsMax {
		clear(c.byRaw)
	}
	c.byRaw[string(raw)] = rel
	return rel, nil
}

func parseRelation(raw []byte) (*Relation, error) {
	d := decoder{b: raw}
	if d.byte() != 'R' {
		return nil, corrupt("not a relation message")
	}
	rel := &Relation{ID: d.uint32(), Schema: d.string(), Name: d.string(), Identity: d.byte()}
	if rel.Schema == "" {
		rel.Schema = "pg_catalog" // the wire's way to say so
	}
	n := int(d.uint16())
	const columnBytesMin = 10
	if d.failed || n > len(d.b)/columnBytesMin {
		return nil, corrupt("relation message cut short")
	}
	rel.Columns = make([]Column, n)
	for i := range rel.Columns {
		rel.Columns[i] = Column{Key: d.byte()&1 != 0, Name: d.string(), TypeOID: d.uint32(), TypeMod: int32(d.uint32())}
	}
	if d.failed || len(d.b) != 0 {
		return nil, corrupt("relation message of %q.%q has a wrong length", rel.Schema, rel.Name)
	}
	return rel, nil
}

// decoder reads the wire's primitives; once the bytes run out it has failed and
// gives zeros.
type decoder struct {
	b      []byte
	failed bool
}

func (d *decoder) take(n int) []byte {
	if n < 0 || n > len(d.b) {
		d.failed, d.b = true, nil
		return nil
	}
	v := d.b[:n:n]
	d.b = d.b[n:]
	return v
}

func (d *decoder) byte() byte {
	if len(d.b) == 0 {
		d.failed = true
		return 0
	}
	v := d.b[0]
	d.b = d.b[1:]
	return v
}

func (d *decoder) uint16() uint16 {
	if v := d.take(2); v != nil {
		return binary.BigEndian.Uint16(v)
	}
	return 0
}

func (d *decoder) uint32() uint32 {
	if v := d.take(4); v != nil {
		return binary.BigEndian.Uint32(v)
	}
	return 0
}

func (d *decoder) uint64() uint64 {
	if v := d.take(8); v != nil {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

// cstring reads up to a zero byte, which it consumes.
func (d *decoder) cstring() []byte {
	i := bytes.IndexByte(d.b, 0)
	if i < 0 {
		d.failed, d.b = true, nil
		return nil
	}
	s := d.b[:i:i]
	d.b = d.b[i+1:]
	return s
}

func (d *decoder) string() string { return string(d.cstring()) }
