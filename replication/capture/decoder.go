package capture

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"quorate/replication/entry"
)

// postgresEpoch is what the wire's times count microseconds from.
var postgresEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

func wireTime(b []byte) time.Time {
	return postgresEpoch.Add(time.Duration(int64(binary.BigEndian.Uint64(b))) * time.Microsecond)
}

var errShort = errors.New("message cut short")

// decoder follows the messages of one stream and calls the Handler. It looks
// into them only as far as it must; rows stay as they came.
type decoder struct {
	handler          Handler
	fragmentBytesMax int
	xids             xidExtender
	builder          *entry.Builder
	local            map[uint32]bool // relations of the bookkeeping schema
	attempt          uint64          // of the last transaction in fragments
	handed           entry.LSN       // everything up to here was handed over
	authentic        func(content []byte) bool

	tx transaction
}

// transaction is the one being received.
type transaction struct {
	open        bool
	begin       Begin
	replayed    bool
	disposition Disposition // zero until a change is kept
	trace       entry.Trace
	fragments   uint32
}

func newDecoder(h Handler, fragmentBytesMax int, newestXid, attempt uint64) *decoder {
	return &decoder{
		handler: h, fragmentBytesMax: fragmentBytesMax,
		xids: xidExtender{newest: newestXid}, attempt: attempt,
		builder: entry.NewBuilder(), local: make(map[uint32]bool),
	}
}

// message takes one pgoutput message.
func (d *decoder) message(ctx context.Context, m []byte) error {
	if len(m) == 0 {
		return errors.New("empty message")
	}
	var err error
	switch m[0] {
	case 'B':
		err = d.onBegin(m)
	case 'O':
		err = d.onOrigin(m)
	case 'R':
		err = d.onRelation(m)
	case 'I', 'U', 'D', 'T':
		err = d.onChange(ctx, m)
	case 'M':
		err = d.onLogicalMessage(ctx, m)
	case 'C':
		err = d.onCommit(ctx, m)
	case 'Y': // type names stay out of bodies, see package entry
	default:
		return fmt.Errorf("message of type %q is not of protocol version 1", m[0])
	}
	if err != nil {
		return fmt.Errorf("message %q in transaction %d: %w", m[0], d.tx.begin.Xid, err)
	}
	return nil
}

// keepalive takes the server's word that everything up to walEnd was sent.
// Within a transaction that says nothing: its commit may end above.
func (d *decoder) keepalive(ctx context.Context, walEnd entry.LSN) error {
	if d.tx.open || walEnd <= d.handed {
		return nil
	}
	d.handed = walEnd
	return d.handler.Position(ctx, walEnd)
}

func (d *decoder) onBegin(m []byte) error {
	if d.tx.open {
		return errors.New("transaction begins within another")
	}
	if len(m) != 21 {
		return errShort
	}
	d.tx = transaction{open: true, begin: Begin{
		Xid:        d.xids.extend(binary.BigEndian.Uint32(m[17:])),
		CommitLSN:  entry.LSN(binary.BigEndian.Uint64(m[1:])),
		CommitTime: wireTime(m[9:]),
	}}
	d.builder.Begin()
	return nil
}

func (d *decoder) onOrigin(m []byte) error {
	if !d.tx.open || len(m) < 10 {
		return errShort
	}
	d.tx.replayed = bytes.HasPrefix(m[9:], []byte(OriginPrefix))
	if d.tx.replayed && d.tx.disposition != 0 {
		return errors.New("origin after a change was kept")
	}
	return nil
}

func (d *decoder) onRelation(m []byte) error {
	if len(m) < 6 {
		return errShort
	}
	id := binary.BigEndian.Uint32(m[1:])
	schema, _, ok := bytes.Cut(m[5:], []byte{0})
	if !ok {
		return errShort
	}
	if string(schema) == entry.LocalSchema {
		d.local[id] = true
		return nil
	}
	delete(d.local, id)
	return d.builder.Define(m)
}

func (d *decoder) onChange(ctx context.Context, m []byte) error {
	if !d.tx.open || len(m) < 6 {
		return errShort
	}
	if d.tx.replayed {
		return nil
	}
	if m[0] == 'T' {
		if m = d.withoutLocal(m); m == nil {
			return nil
		}
	} else if len(d.local) > 0 && d.local[binary.BigEndian.Uint32(m[1:])] {
		return nil
	}
	return d.keep(ctx, m)
}

// withoutLocal returns a Truncate without the bookkeeping tables, nil if it
// names no other.
func (d *decoder) withoutLocal(m []byte) []byte {
	ids := m[6:]
	if len(d.local) == 0 || len(ids)%4 != 0 {
		return m
	}
	var kept []byte
	for ; len(ids) > 0; ids = ids[4:] {
		if !d.local[binary.BigEndian.Uint32(ids)] {
			kept = append(kept, ids[:4]...)
		}
	}
	switch len(kept) {
	case 0:
		return nil
	case len(m) - 6:
		return m
	}
	out := binary.BigEndian.AppendUint32([]byte{'T'}, uint32(len(kept)/4))
	return append(append(out, m[5]), kept...)
}

func (d *decoder) onLogicalMessage(ctx context.Context, m []byte) error {
	lm, err := entry.ParseMessage(m)
	if err != nil {
		return err
	}
	// A message outside a transaction would be there even if the transaction
	// that sent it had aborted; it is no part of the database's history.
	if !lm.Transactional || d.tx.replayed {
		return nil
	}
	if !d.tx.open {
		return errors.New("transactional message outside a transaction")
	}
	if string(lm.Prefix) == entry.TracePrefix {
		if t, ok := parseTraceparent(lm.Content); ok {
			d.tx.trace = t
		}
		return nil
	}
	if string(lm.Prefix) != entry.DDLPrefix {
		// An application's message, or our own bookkeeping, changes no database.
		// Any session can send one, on a follower too, past every fence.
		return nil
	}
	if d.authentic != nil && !d.authentic(lm.Content) {
		// Any user can send a message. This one was not sent by the event trigger,
		// so nothing happened here that other regions would have to repeat.
		return nil
	}
	return d.keep(ctx, m)
}

// keep adds a message to the body and hands over what exceeds an entry.
func (d *decoder) keep(ctx context.Context, m []byte) error {
	if d.tx.disposition == 0 {
		d.tx.disposition = d.handler.Begin(d.tx.begin)
		if d.tx.disposition != Propose && d.tx.disposition != Digest {
			panic(fmt.Sprintf("capture: disposition %d", d.tx.disposition))
		}
	}
	if err := d.builder.Add(m); err != nil {
		return err
	}
	if len(d.builder.Body()) <= d.fragmentBytesMax {
		return nil
	}
	body, n := d.builder.Body(), 0
	for ; len(body)-n > d.fragmentBytesMax; n += d.fragmentBytesMax {
		if err := d.fragment(ctx, body[n:n+d.fragmentBytesMax]); err != nil {
			return err
		}
	}
	d.builder.Take(n)
	d.builder.Shrink(4 * d.fragmentBytesMax)
	return nil
}

func (d *decoder) fragment(ctx context.Context, body []byte) error {
	if d.tx.disposition == Digest {
		return nil
	}
	if d.tx.fragments == 0 {
		d.attempt++
	}
	d.tx.fragments++
	return d.handler.Entry(ctx, entry.Payload{
		Type:     entry.TypeFragment,
		Header:   entry.Header{Xid: d.tx.begin.Xid, Checksum: entry.Checksum(0, body), BodyBytes: uint64(len(body))},
		Attempt:  d.attempt,
		Fragment: d.tx.fragments,
		Body:     body,
	})
}

func (d *decoder) onCommit(ctx context.Context, m []byte) error {
	if !d.tx.open || len(m) != 26 {
		return errShort
	}
	end := entry.LSN(binary.BigEndian.Uint64(m[10:]))
	if end <= d.handed {
		// Perhaps confirmed already: to go on would be to let it pass unlogged.
		return fmt.Errorf("commit ends at %s, but the server said that everything up to %s was sent", end, d.handed)
	}
	tx := d.tx
	d.tx = transaction{}
	d.handed = end
	if tx.disposition == 0 {
		return d.handler.Position(ctx, end)
	}
	h := entry.Header{
		Xid: tx.begin.Xid, EndLSN: end, CommitTime: tx.begin.CommitTime, Trace: tx.trace,
		Checksum: d.builder.Checksum(), Changes: d.builder.Changes(), BodyBytes: d.builder.Bytes(),
	}
	if tx.disposition == Digest {
		return d.handler.Digest(ctx, h)
	}
	if tx.fragments == 0 {
		return d.handler.Entry(ctx, entry.Payload{Type: entry.TypeTransaction, Header: h, Body: d.builder.Body()})
	}
	d.tx = tx // the last fragment belongs to it
	err := d.fragment(ctx, d.builder.Body())
	count := d.tx.fragments
	d.tx = transaction{}
	if err != nil {
		return err
	}
	return d.handler.Entry(ctx, entry.Payload{Type: entry.TypeCommit, Header: h, Attempt: d.attempt, Fragment: count})
}
