package entry

import "fmt"

// Totals says what a transaction did, for the transaction log and for people.
type Totals struct {
	Tables   []TableTotals // in the order of their first change
	DDL      []string      // contents of the DDL messages, in order
	Messages uint64        // other logical messages
	Bytes    uint64        // of all bodies
	Marks    []Mark
}

// TableTotals counts what a transaction did to one table.
type TableTotals struct {
	Schema, Name                         string
	Inserts, Updates, Deletes, Truncates uint64
}

// Rows returns the number of rows inserted, updated and deleted.
func (t *Totals) Rows() uint64 {
	var n uint64
	for i := range t.Tables {
		n += t.Tables[i].Inserts + t.Tables[i].Updates + t.Tables[i].Deletes
	}
	return n
}

// Add counts one change.
func (t *Totals) Add(c *Change) {
	switch c.Op {
	case Insert:
		t.table(c.Relation).Inserts++
	case Update:
		t.table(c.Relation).Updates++
	case Delete:
		t.table(c.Relation).Deletes++
	case Truncate:
		for _, rel := range c.Truncate {
			t.table(rel).Truncates++
		}
	case DDL:
		t.DDL = append(t.DDL, string(c.Content))
	case Message:
		t.Messages++
	}
}

func (t *Totals) table(rel *Relation) *TableTotals {
	// From the end: consecutive changes mostly meet the same table, and a
	// transaction has few.
	for i := len(t.Tables) - 1; i >= 0; i-- {
		if t.Tables[i].Name == rel.Name && t.Tables[i].Schema == rel.Schema {
			return &t.Tables[i]
		}
	}
	t.Tables = append(t.Tables, TableTotals{Schema: rel.Schema, Name: rel.Name})
	return &t.Tables[len(t.Tables)-1]
}

// AddBody counts the next body of the transaction that r is reading; r was
// Reset before the first one.
func (t *Totals) AddBody(r *Reader, body []byte) error {
	t.Bytes += uint64(len(body))
	r.Feed(body)
	for {
		c, ok, err := r.Next()
		if err != nil {
			return err
		}
		if !ok {
			return nil
		}
		t.Add(&c)
	}
}

// Summary counts what a payload does. Of a commit in fragments it knows only the
// size; use Totals.AddBody over its fragments.
func Summary(p Payload) (Totals, error) {
	var t Totals
	switch p.Type {
	case TypeTransaction:
		r := NewReader(NewRelationCache())
		if err := t.AddBody(r, p.Body); err != nil {
			return Totals{}, fmt.Errorf("summarise transaction %d: %w", p.Header.Xid, err)
		}
		if err := r.Finish(); err != nil {
			return Totals{}, fmt.Errorf("summarise transaction %d: %w", p.Header.Xid, err)
		}
	case TypeMarks:
		t.Marks = p.Marks
	case TypeFragment, TypeCommit:
		t.Bytes = p.Header.BodyBytes
	}
	return t, nil
}
