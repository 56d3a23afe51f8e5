package capture

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"quorate/deploy/sandbox/postgres"
	"quorate/replication/entry"
)

// spool is a Handler that reads a transaction in fragments as a follower would,
// and watches memory while it does.
type spool struct {
	t        *testing.T
	reader   *entry.Reader
	totals   entry.Totals
	attempt  uint64
	count    uint32
	sum      uint32
	bytes    uint64
	largest  int
	heapPeak uint64
	last     []byte // a value of the last row
	done     chan entry.Payload
}

func newSpool(t *testing.T) *spool {
	return &spool{t: t, reader: entry.NewReader(entry.NewRelationCache()), done: make(chan entry.Payload, 1)}
}

func (s *spool) Begin(Begin) Disposition { return Propose }

func (s *spool) Entry(_ context.Context, p entry.Payload) error {
	switch p.Type {
	case entry.TypeCommit:
		if p.Attempt != s.attempt || p.Fragment != s.count || p.Header.Checksum != s.sum || p.Header.BodyBytes != s.bytes {
			return fmt.Errorf("commit %+v of attempt %d in %d fragments; received attempt %d, %d fragments, %d bytes, checksum %08x", p.Header, p.Attempt, p.Fragment, s.attempt, s.count, s.bytes, s.sum)
		}
		if err := s.reader.Finish(); err != nil {
			return err
		}
		s.done <- p
		return nil
	case entry.TypeFragment:
	default:
		return fmt.Errorf("payload of type %d", p.Type)
	}
	if s.count == 0 {
		s.attempt = p.Attempt
	}
	s.count++
	if p.Attempt != s.attempt || p.Fragment != s.count {
		return fmt.Errorf("fragment %d of attempt %d, want %d of %d", p.Fragment, p.Attempt, s.count, s.attempt)
	}
	encoded := p.Append(nil)
	p, err := entry.Decode(encoded)
	if err != nil {
		return err
	}
	s.sum = entry.Checksum(s.sum, p.Body)
	s.bytes += uint64(len(p.Body))
	s.largest = max(s.largest, len(p.Body))
	if s.count%16 == 1 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		s.heapPeak = max(s.heapPeak, m.HeapInuse)
	}
	s.totals.Bytes += uint64(len(p.Body))
	s.reader.Feed(p.Body)
	for {
		c, ok, err := s.reader.Next()
		if err != nil || !ok {
			return err
		}
		s.totals.Add(&c)
		s.last = append(s.last[:0], c.New[1].Data...)
	}
}

func (s *spool) Digest(context.Context, entry.Header) error { return nil }
func (s *spool) Position(context.Context, entry.LSN) error  { return nil }

func (s *spool) wait() entry.Payload {
	s.t.Helper()
	select {
	case p := <-s.done:
		return p
	case <-time.After(60 * time.Second):
		s.t.Fatal("the transaction does not end")
		return entry.Payload{}
	}
}

func largeTransaction(t *testing.T, server *postgres.Server) {
	const rows = 1_000_000
	db := newDatabase(t, server, "CREATE TABLE t(id int, v text)")
	s := newSpool(t)
	var before runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	db.capture(s)
	db.exec(fmt.Sprintf("INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, %d) i", rows))
	p := s.wait()
	if p.Header.Changes != rows || s.totals.Rows() != rows || len(s.totals.Tables) != 1 {
		t.Fatalf("%d changes, %+v", p.Header.Changes, s.totals.Tables)
	}
	if s.count < 20 || s.largest > fragmentBytesMaxDefault {
		t.Fatalf("%d fragments of up to %d bytes", s.count, s.largest)
	}
	if string(s.last) != fmt.Sprintf("row %d", rows) {
		t.Fatalf("last row %q", s.last)
	}
	// A fragment, its encoding and a collector's round of garbage of the same.
	const heapMax = 16 << 20
	if grown := int64(s.heapPeak) - int64(before.HeapInuse); grown > heapMax {
		t.Fatalf("heap grew by %d bytes for a transaction of %d", grown, s.bytes)
	}
	t.Logf("%d bytes in %d fragments, heap at most %d above %d", s.bytes, s.count, int64(s.heapPeak)-int64(before.HeapInuse), before.HeapInuse)
}

func largeRow(t *testing.T, server *postgres.Server) {
	const size = 3_000_000
	db := newDatabase(t, server, "CREATE TABLE t(id int, v text)")
	s := newSpool(t)
	db.capture(s, func(c *Config) { c.FragmentBytesMax = 100_000 })
	db.exec(fmt.Sprintf("INSERT INTO t VALUES (1, repeat('y', %d))", size))
	p := s.wait()
	if s.largest != 100_000 || s.count != 31 || p.Header.Changes != 1 || string(s.last) != strings.Repeat("y", size) {
		t.Fatalf("%d fragments of up to %d bytes, %d changes, %d bytes of text", s.count, s.largest, p.Header.Changes, len(s.last))
	}
}
