package feed

import (
	"context"
	"encoding/binary"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox/postgres/postgrestest"
	"quorate/replication/entry"
)

// database gives transactions as a real PostgreSQL decodes them.
type database struct{ conn *pgx.Conn }

func openDatabase(t *testing.T) *database {
	t.Helper()
	server := postgrestest.Start(t, map[string]string{"wal_level": "logical", "fsync": "off"})
	d := &database{conn: postgrestest.Connect(t, server, "postgres")}
	postgrestest.Exec(t, d.conn,
		"CREATE PUBLICATION p FOR ALL TABLES",
		"SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
	return d
}

// exec runs each statement, a transaction of its own, and returns what was decoded.
func (d *database) exec(t *testing.T, statements ...string) []entry.Payload {
	t.Helper()
	postgrestest.Exec(t, d.conn, statements...)
	rows, err := d.conn.Query(context.Background(),
		`SELECT data FROM pg_logical_slot_get_binary_changes('s', NULL, NULL,
		 'proto_version', '1', 'publication_names', 'p', 'messages', 'true')`)
	if err != nil {
		t.Fatal(err)
	}
	raws, err := pgx.CollectRows(rows, pgx.RowTo[[]byte])
	if err != nil {
		t.Fatal(err)
	}
	var payloads []entry.Payload
	var xid uint64
	b := entry.NewBuilder()
	for _, raw := range raws {
		switch raw[0] {
		case 'B':
			b.Begin()
			xid = uint64(binary.BigEndian.Uint32(raw[17:]))
		case 'R':
			err = b.Define(raw)
		case 'I', 'U', 'D', 'T', 'M':
			err = b.Add(raw)
		case 'C':
			if b.Bytes() == 0 {
				continue // DDL of the test's own
			}
			payloads = append(payloads, entry.Payload{
				Type: entry.TypeTransaction,
				Header: entry.Header{
					Xid:        xid,
					EndLSN:     entry.LSN(binary.BigEndian.Uint64(raw[10:])),
					CommitTime: time.UnixMicro(int64(binary.BigEndian.Uint64(raw[18:])) + 946684800e6).UTC(),
					Checksum:   b.Checksum(),
					Changes:    b.Changes(),
					BodyBytes:  b.Bytes(),
				},
				Body: slices.Clone(b.Body()),
			})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return payloads
}

// log is a Source held in memory.
type log struct {
	mu      sync.Mutex
	base    uint64
	next    uint64 // slot
	items   []Item
	changed chan struct{}
	max     int           // items a batch; 0: all
	gate    chan struct{} // while set, reads wait for it
}

func newLog() *log { return &log{next: 1, changed: make(chan struct{})} }

func (l *log) change(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
	close(l.changed)
	l.changed = make(chan struct{})
}

// add appends transactions, each in the next slot.
func (l *log) add(payloads ...entry.Payload) {
	l.change(func() {
		for _, p := range payloads {
			l.items = append(l.items, Item{Slot: l.next, Region: "r1", Incarnation: 0xa1, Payload: p})
			l.next++
		}
	})
}

// fragmented appends a transaction cut into pieces of so many bytes.
func (l *log) fragmented(p entry.Payload, size int) {
	pieces := slices.Collect(slices.Chunk(p.Body, size))
	p.Type, p.Body, p.Fragment = entry.TypeCommit, nil, uint32(len(pieces))
	l.void(uint64(len(pieces)))
	l.add(p)
	l.change(func() {
		l.items[len(l.items)-1].Fragments = func(yield func([]byte) error) error {
			for _, piece := range pieces {
				// What a fragment's memory holds is gone after yield.
				room := slices.Clone(piece)
				err := yield(room)
				clear(room)
				if err != nil {
					return err
				}
			}
			return nil
		}
	})
}

// void appends slots that hold nothing for the feed.
func (l *log) void(n uint64) { l.change(func() { l.next += n }) }

func (l *log) cut(base uint64) { l.change(func() { l.base = base }) }

func (l *log) Read(ctx context.Context, from uint64) (Batch, error) {
	for {
		l.mu.Lock()
		changed, gate := l.changed, l.gate
		switch {
		case gate != nil:
		case from <= l.base:
			defer l.mu.Unlock()
			return Batch{}, &CutError{Base: l.base}
		case from < l.next:
			defer l.mu.Unlock()
			b := Batch{Next: l.next}
			for _, item := range l.items {
				if item.Slot < from {
					continue
				}
				if l.max > 0 && len(b.Items) == l.max {
					b.Next = item.Slot
					break
				}
				b.Items = append(b.Items, item)
			}
			return b, nil
		}
		l.mu.Unlock()
		select {
		case <-ctx.Done():
			return Batch{}, ctx.Err()
		case <-changed:
		case <-gate:
		}
	}
}
