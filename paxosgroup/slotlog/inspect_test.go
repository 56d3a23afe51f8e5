package slotlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"quorate/paxosgroup"
)

// segmented makes a log of three segments, of which the files were used before,
// with a batch for each slot of two groups, and returns its directory.
func segmented(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	l, _, err := Open(Config{Dir: dir, SegmentBytes: 8 << 10, Manual: true})
	if err != nil {
		t.Fatal(err)
	}
	put := func(g paxosgroup.GroupID, recs ...paxosgroup.Record) {
		l.Append(g, recs, func(err error) {
			if err != nil {
				t.Error(err)
			}
		})
		for l.Flush() {
		}
	}
	slot := paxosgroup.Slot(0)
	for l.Stats().Segments < 3 {
		slot++
		put(1, accept(slot, 7, strings.Repeat("x", 700)), chosen(slot-1))
	}
	put(1, paxosgroup.Record{Kind: paxosgroup.RecordBase, Base: &paxosgroup.Base{Slot: slot}})
	for l.Stats().Segments < 3 {
		slot++
		put(1, accept(slot, 8, strings.Repeat(string(rune('a'+slot%26)), 700)), chosen(slot-1))
		put(2, accept(slot, 9, "other"))
	}
	put(2, learn(1, "late"))
	put(1, accept(slot+1, 8, strings.Repeat("z", 700)))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// contentsOf returns the files of a directory.
func contentsOf(t testing.TB, dir string) map[string]string {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	contents := make(map[string]string)
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		contents[f.Name()] = string(b)
	}
	return contents
}

// describe writes a report as the golden files have it.
func describe(r Report) string {
	var s strings.Builder
	fmt.Fprintf(&s, "%d segments, %d bytes, %d batches, %d records\n", r.Segments, r.Bytes, r.Batches, r.Records)
	for _, g := range r.Groups {
		fmt.Fprintf(&s, "group %d: promised %v, base %d, chosen %d, %d entries up to %d, %d bytes\n", g.Group, g.Promised, g.Base, g.Chosen, g.Entries, g.Last, g.Bytes)
	}
	if r.Torn != nil {
		fmt.Fprintf(&s, "torn: %+v\n", *r.Torn)
	}
	for _, c := range r.Damage {
		fmt.Fprintf(&s, "damage: %s: %s; %v\n", c.Where(), c.What, c.Behind)
	}
	return s.String()
}

// TestInspectTellsEachKindOfDamage damages a byte of every kind, one at a time,
// and compares what is told of it. A start must tell the same.
func TestInspectTellsEachKindOfDamage(t *testing.T) {
	dir := segmented(t)
	sound := contentsOf(t, dir)
	sequences := listed(t, dir)
	first, middle, last := segmentName(sequences[0]), segmentName(sequences[1]), segmentName(sequences[2])
	// Where the batches of the middle and of the last segment begin.
	begins := make(map[string][]int64)
	records := make(map[string]int)
	if _, err := Inspect(dir, func(r Inspected) error {
		if r.Kind != "seal" {
			records[r.Kind]++
		}
		if b := begins[r.File]; len(b) == 0 || b[len(b)-1] != r.Offset-batchHeaderBytes && r.Offset%sectorBytes == batchHeaderBytes {
			begins[r.File] = append(b, r.Offset-batchHeaderBytes)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if records["accept"] == 0 || records["learn"] == 0 || records["state"] == 0 || records["chosen"] == 0 {
		t.Fatalf("the log lacks some kinds of record: %v", records)
	}
	at := begins[middle][3] // a batch of one entry and a chosen slot
	if got := sound[middle][at+batchHeaderBytes+8]; recordType(got) != typeAccept {
		t.Fatalf("the fourth batch of %s begins with type %d", middle, got)
	}
	end := begins[last][len(begins[last])-1]
	used := end + position(nextSector(batchHeaderBytes+recordHeaderBytes+800))
	record := at + batchHeaderBytes
	flip := func(file string, offset int64) func(map[string]string) {
		return func(files map[string]string) {
			b := []byte(files[file])
			b[offset] ^= 0x10
			files[file] = string(b)
		}
	}
	zero := func(file string, from, to int64) func(map[string]string) {
		return func(files map[string]string) {
			b := []byte(files[file])
			clear(b[from:to])
			files[file] = string(b)
		}
	}
	got := new(strings.Builder)
	for _, tc := range []struct {
		name   string
		damage func(files map[string]string)
	}{
		{"nothing", func(map[string]string) {}},
		{"segment header: magic", flip(middle, 1)},
		{"segment header: version", flip(middle, 9)},
		{"segment header: sequence number", flip(middle, 17)},
		{"segment header: length", flip(middle, 26)},
		{"segment header: checksum", flip(middle, 61)},
		{"segment header: rest of the sector", flip(middle, 200)},
		{"segment header: stamp", flip(middle, 509)},
		{"batch header: magic", flip(middle, at)},
		{"batch header: length", flip(middle, at+5)},
		{"batch header: number", flip(middle, at+8)},
		{"batch header: number of records", flip(middle, at+16)},
		{"batch header: checksum", flip(middle, at+20)},
		{"record: length", flip(middle, record+1)},
		{"record: checksum", flip(middle, record+4)},
		{"record: type", flip(middle, record+8)},
		{"record: zeros", flip(middle, record+10)},
		{"record: group", flip(middle, record+12)},
		{"record: slot", flip(middle, record+16)},
		{"record: payload", flip(middle, record+300)},
		{"record: length of the second", flip(middle, at+position(batchHeaderBytes+777+1))},
		{"zeros behind the records of a batch", flip(middle, at+1000)},
		{"stamp within a batch", flip(middle, at+509)},
		{"a sector lost within a batch", zero(middle, at+512, at+1024)},
		{"a batch lost", zero(middle, at, at+1024)},
		{"the end of a segment with a successor lost", zero(middle, begins[middle][5], 8<<10)},
		{"zeros behind the seal", flip(first, 8<<10-3)},
		{"last segment: payload with batches behind it", flip(last, begins[last][1]+60)},
		{"last segment: payload of the last batch", flip(last, end+300)},
		{"last segment: header of the last batch", flip(last, end+9)},
		{"last segment: nothing of the last batch", zero(last, end, used)},
		{"last segment: the last batch lacks its end", zero(last, end+512, used)},
		{"last segment: the last batch lacks its beginning", zero(last, end, end+512)},
		{"last segment: old bytes behind the end", flip(last, 8<<10-100)},
		{"last segment: an old stamp behind the end", flip(last, 8<<10-3)},
		{"a file missing", func(files map[string]string) { delete(files, middle) }},
		{"the first file missing", func(files map[string]string) { delete(files, first) }},
		{"a file cut short", func(files map[string]string) { files[middle] = files[middle][:at+700] }},
		{"a file empty", func(files map[string]string) { files[middle] = "" }},
		{"two files swapped", func(files map[string]string) { files[first], files[middle] = files[middle], files[first] }},
		{"two places", func(files map[string]string) { flip(first, 1200)(files); flip(middle, record+300)(files) }},
	} {
		copied := t.TempDir()
		files := make(map[string]string)
		for name, content := range sound {
			files[name] = content
		}
		tc.damage(files)
		for name, content := range files {
			if err := os.WriteFile(filepath.Join(copied, name), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		report, err := Inspect(copied, nil)
		if err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		for name, content := range contentsOf(t, copied) {
			if content != files[name] {
				t.Errorf("%s: looking changed %s", tc.name, name)
			}
		}
		fmt.Fprintf(got, "== %s\n%s", tc.name, describe(report))
		l, _, err := Open(Config{Dir: copied, SegmentBytes: 8 << 10})
		if err == nil {
			l.Close()
		}
		if (err == nil) != (len(report.Damage) == 0) {
			t.Errorf("%s: start says %v, inspection %v", tc.name, err, report.Damage)
		}
		if c, ok := errors.AsType[*CorruptError](err); ok {
			d := report.Damage[0]
			if c.Where() != d.Where() || c.What != d.What || c.Behind == nil || c.Behind.String() != d.Behind.String() {
				t.Errorf("%s: start says\n%v\ninspection\n%v", tc.name, err, d)
			}
			if !strings.Contains(err.Error(), d.Behind.String()) {
				t.Errorf("%s: %q does not tell %q", tc.name, err, d.Behind)
			}
		}
	}
	checkGolden(t, "inspect.txt", got.String())
}

func checkGolden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *rewrite {
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", path, got, want)
	}
}

func TestInspectRefuses(t *testing.T) {
	cfg := Config{Dir: t.TempDir()}
	if _, err := Inspect(cfg.Dir, nil); !errors.Is(err, ErrNoLog) {
		t.Errorf("an empty directory: %v", err)
	}
	if _, err := Inspect(filepath.Join(cfg.Dir, "none"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	l, _ := open(t, cfg)
	if _, err := Inspect(cfg.Dir, nil); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("a log in use: %v", err)
	}
	l.Close()
	if _, err := Inspect(cfg.Dir, nil); err != nil {
		t.Errorf("a closed log: %v", err)
	}
	if err := os.Remove(filepath.Join(cfg.Dir, lockName)); err != nil {
		t.Fatal(err)
	}
	if _, err := Inspect(cfg.Dir, nil); err != nil {
		t.Errorf("a copy without a lock: %v", err)
	}
	if _, err := os.Stat(filepath.Join(cfg.Dir, lockName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("looking made the lock: %v", err)
	}
	stop := errors.New("enough")
	if _, err := Inspect(segmented(t), func(Inspected) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("visit's error: %v", err)
	}
}

// TestSalvageIsBounded: a payload made of what looks like records costs no more
// than a few readings of the batch.
func TestSalvageIsBounded(t *testing.T) {
	b := make([]byte, 4<<20)
	for at := batchHeaderBytes; at+recordHeaderBytes < len(b); at += recordHeaderBytes {
		binary.LittleEndian.PutUint32(b[at:], uint32(len(b)-at-recordHeaderBytes))
		b[at+8] = byte(typeAccept)
	}
	if got := salvage(b, 1, sectorData); len(got) != 0 {
		t.Fatalf("%d records", len(got))
	}
}
