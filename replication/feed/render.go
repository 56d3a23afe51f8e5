package feed

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"quorate/replication/entry"
)

// message is one rendered message.
type message struct {
	at          position
	subject     string
	body        []byte
	traceparent string
}

// renderer turns items into messages. It is for one goroutine.
type renderer struct {
	subjects subjects
	bytesMax int // of a message's body
	reader   *entry.Reader

	item    *Item
	head    []byte // transaction and trace, the same in all messages of an item
	trace   string
	emit    func(message) error
	ordinal uint64
	waiting *message // the latest message: whether it is the last is not known yet
}

func newRenderer(s subjects, bytesMax int) *renderer {
	return &renderer{subjects: s, bytesMax: bytesMax, reader: entry.NewReader(entry.NewRelationCache())}
}

// render hands the messages of an item to emit, one by one. The memory of a
// message is the receiver's to keep.
func (r *renderer) render(item *Item, emit func(message) error) error {
	r.item, r.emit, r.ordinal, r.waiting = item, emit, 0, nil
	r.reader.Reset()
	r.begin()
	var err error
	switch item.Payload.Type {
	case entry.TypeTransaction:
		err = r.body(item.Payload.Body)
	case entry.TypeCommit:
		if item.Fragments == nil {
			panic("feed: a transaction in fragments came without them")
		}
		err = item.Fragments(r.body)
	default:
		panic(fmt.Sprintf("feed: slot %d has a payload of type %d", item.Slot, item.Payload.Type))
	}
	if err == nil {
		err = r.reader.Finish()
	}
	if err == nil && r.waiting != nil {
		err = r.release(true)
	}
	if err != nil {
		return fmt.Errorf("slot %d: %w", item.Slot, err)
	}
	return nil
}

// begin renders what all messages of the item share.
func (r *renderer) begin() {
	h := &r.item.Payload.Header
	b := append(r.head[:0], `,"transaction":{"xid":`...)
	b = strconv.AppendUint(b, h.Xid, 10)
	b = append(b, `,"commit_time":"`...)
	b = h.CommitTime.UTC().AppendFormat(b, time.RFC3339Nano)
	b = append(b, `","lsn":"`...)
	b = append(b, h.EndLSN.String()...)
	b = append(b, `","region":`...)
	b = appendJSON(b, r.item.Region)
	b = append(b, `,"incarnation":"`...)
	b = fmt.Appendf(b, "%016x", r.item.Incarnation)
	b = append(b, `"}`...)
	t := r.item.Trace
	if t == (entry.Trace{}) {
		t = h.Trace
	}
	r.trace = ""
	if t != (entry.Trace{}) {
		r.trace = fmt.Sprintf("00-%x-%x-%02x", t.TraceID, t.SpanID, t.Flags)
		b = append(b, `,"trace":"`...)
		b = append(b, r.trace...)
		b = append(b, '"')
	}
	r.head = b
}

func (r *renderer) body(b []byte) error {
	r.reader.Feed(b)
	for {
		c, ok, err := r.reader.Next()
		if err != nil {
			return err
		}
		if !ok {
			return nil
		}
		if err := r.change(&c); err != nil {
			return err
		}
	}
}

func (r *renderer) change(c *entry.Change) error {
	switch c.Op {
	case entry.Insert, entry.Update, entry.Delete:
		return r.row(*c)
	case entry.Truncate:
		for _, rel := range c.Truncate {
			b := append(r.start(), `,"schema":`...)
			b = appendJSON(b, rel.Schema)
			b = append(b, `,"table":`...)
			b = appendJSON(b, rel.Name)
			if err := r.add(r.subjects.table(rel.Schema, rel.Name), appendChange(b, c)); err != nil {
				return err
			}
		}
	case entry.DDL:
		b := appendChange(r.start(), c)
		if len(b) > r.bytesMax {
			b = append(r.start(), `,"op":"ddl","omitted":{"ddl":`...)
			b = strconv.AppendInt(b, int64(len(c.Content)), 10)
			b = append(b, "}}"...)
		}
		return r.add(r.subjects.ddl(), b)
	case entry.Message: // an application's affair
	}
	return nil
}

// row renders a change of a row. c is this function's own copy.
func (r *renderer) row(c entry.Change) error {
	rel := c.Relation
	subject := r.subjects.table(rel.Schema, rel.Name)
	switch {
	case c.OldKind == 'O':
		// The old row of an identity FULL has its large values in full.
		c.New = append([]entry.Value(nil), c.New...)
		for i := range c.New {
			if c.New[i].Kind == entry.Unchanged && i < len(c.Old) {
				c.New[i] = c.Old[i]
			}
		}
	case c.OldKind == 0 && rel.Identity != 'f' && hasKey(rel):
		c.OldKind, c.Old = 'K', c.New
	}
	b := appendChange(r.start(), &c)
	if len(b) > r.bytesMax {
		var err error
		if b, err = r.shortened(&c); err != nil {
			return err
		}
	}
	return r.add(subject, b)
}

func hasKey(rel *entry.Relation) bool {
	for i := range rel.Columns {
		if rel.Columns[i].Key {
			return true
		}
	}
	return false
}

// shortened renders a change that is too large for a message without its
// largest values.
func (r *renderer) shortened(c *entry.Change) ([]byte, error) {
	for valueBytesMax := r.bytesMax / 2; valueBytesMax >= 16; valueBytesMax /= 2 {
		rel := *c.Relation
		rel.Columns = nil
		short := *c
		short.Relation, short.Old, short.New = &rel, nil, nil
		omitted := make(map[string]int)
		for i, column := range c.Relation.Columns {
			size := 0
			if i < len(c.Old) {
				size = len(c.Old[i].Data)
			}
			if i < len(c.New) {
				size = max(size, len(c.New[i].Data))
			}
			if size > valueBytesMax {
				omitted[column.Name] = size
				continue
			}
			rel.Columns = append(rel.Columns, column)
			if i < len(c.Old) {
				short.Old = append(short.Old, c.Old[i])
			}
			if i < len(c.New) {
				short.New = append(short.New, c.New[i])
			}
		}
		names, err := json.Marshal(omitted)
		if err != nil {
			return nil, fmt.Errorf("render the names of omitted columns: %w", err)
		}
		b := append(r.start(), `,"omitted":`...)
		b = append(b, names...)
		if b = appendChange(b, &short); len(b) <= r.bytesMax {
			return b, nil
		}
	}
	return nil, fmt.Errorf("a row of %q.%q is too large for a message of %d bytes without any large value",
		c.Relation.Schema, c.Relation.Name, r.bytesMax)
}

// notLast stands where a message says whether it is its transaction's last.
// It is as long as its counterpart, so that it can be overwritten.
const (
	notLast = `"last":false`
	isLast  = `"last":true `
)

// start begins the body of the next message.
func (r *renderer) start() []byte {
	b := make([]byte, 0, 512)
	b = append(b, `{"slot":`...)
	b = strconv.AppendUint(b, r.item.Slot, 10)
	b = append(b, `,"ordinal":`...)
	b = strconv.AppendUint(b, r.ordinal+1, 10)
	b = append(b, ',')
	b = append(b, notLast...)
	return append(b, r.head...)
}

// add takes a finished message and lets the one before go.
func (r *renderer) add(subject string, body []byte) error {
	if len(body) > r.bytesMax {
		return fmt.Errorf("message %d on %s has %d bytes, more than %d", r.ordinal+1, subject, len(body), r.bytesMax)
	}
	if r.waiting != nil {
		if err := r.release(false); err != nil {
			return err
		}
	}
	r.ordinal++
	r.waiting = &message{
		at:          position{Slot: r.item.Slot, Ordinal: r.ordinal},
		subject:     subject,
		body:        body,
		traceparent: r.trace,
	}
	return nil
}

func (r *renderer) release(last bool) error {
	m := *r.waiting
	r.waiting = nil
	if last {
		offset := len(`{"slot":`) + digits(m.at.Slot) + len(`,"ordinal":`) + digits(m.at.Ordinal) + len(`,`)
		if string(m.body[offset:offset+len(notLast)]) != notLast {
			panic(fmt.Sprintf("feed: message %v does not say whether it is the last where it should", m.at))
		}
		copy(m.body[offset:], isLast)
	}
	return r.emit(m)
}

func digits(n uint64) int { return len(strconv.FormatUint(n, 10)) }

// appendChange appends the members of a change's JSON object to b, an object
// not yet closed, and closes it.
func appendChange(b []byte, c *entry.Change) []byte {
	at := len(b)
	b = c.AppendJSON(b)
	b[at] = ','
	return b
}

func appendJSON(b []byte, s string) []byte {
	quoted, err := json.Marshal(s)
	if err != nil {
		panic(errors.Join(errors.New("feed: a string that is no JSON"), err)) // strings always are
	}
	return append(b, quoted...)
}

// gapMessage says that the slots from from to base will not be published.
func gapMessage(s subjects, from, base uint64) message {
	return message{
		at:      position{Slot: base + 1},
		subject: s.gap(),
		body:    fmt.Appendf(nil, `{"slot":%d,"ordinal":0,"op":"gap","from":%d,"to":%d}`, base+1, from, base),
	}
}

// positionMessage says that everything below slot was published.
func positionMessage(s subjects, slot uint64) message {
	return message{
		at:      position{Slot: slot},
		subject: s.position(),
		body:    fmt.Appendf(nil, `{"slot":%d,"ordinal":0,"op":"position"}`, slot),
	}
}
