package slotlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"quorate/paxosgroup"
)

// records returns one record of each kind with every field set.
func records() []paxosgroup.Record {
	base := paxosgroup.Base{
		Slot:  3,
		Judge: paxosgroup.Judge{Term: paxosgroup.Ballot{Counter: 7, Replica: 1}, Region: "r1", Incarnation: 3, Next: 50},
		Membership: paxosgroup.Membership{Epoch: 4, Phase1: 2, Phase2: 1, NextID: 9, Members: []paxosgroup.Member{
			{ID: 1, Region: "r1", Kind: paxosgroup.Voter}, {ID: 8, Region: "r2", Kind: paxosgroup.Learner}}},
	}
	return []paxosgroup.Record{
		{Kind: paxosgroup.RecordPromise, Ballot: paxosgroup.Ballot{Counter: 1 << 40, Replica: 9}},
		accept(5, 2, "payload"),
		learn(6, ""),
		chosen(6),
		{Kind: paxosgroup.RecordBase, Base: &base},
	}
}

// encode returns the frame that the log writes for r.
func encode(r paxosgroup.Record, sequence uint64, offset int64) []byte {
	return appendRecord(nil, sequence, offset, recordType(r.Kind), 3, func(dst []byte) []byte { return appendBody(dst, r, r.Ballot) })
}

func TestRecordRoundTrips(t *testing.T) {
	for _, r := range records() {
		b := encode(r, 2, 96)
		got, err := decodeRecord(append(b, "what follows"...), 2, 96)
		if err != nil {
			t.Fatalf("kind %d: %v", r.Kind, err)
		}
		if len(b) > recordHeaderBytes+bodySizeMax(r) {
			t.Errorf("kind %d: %d bytes, reserved for %d", r.Kind, len(b), recordHeaderBytes+bodySizeMax(r))
		}
		want := record{kind: recordType(r.Kind), group: 3, size: len(b), ballot: r.Ballot, slot: r.Slot, entry: r.Entry}
		if r.Base != nil {
			want.base = *r.Base
		}
		if len(want.entry.Payload) == 0 {
			want.entry.Payload = nil
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
		for _, place := range []struct {
			sequence uint64
			offset   int64
		}{{2, 97}, {3, 96}} {
			if _, err := decodeRecord(b, place.sequence, place.offset); err == nil {
				t.Errorf("kind %d passes at another place", r.Kind)
			}
		}
	}
}

// TestEveryFieldIsKept fails when the core's types gain a field that the format
// does not know. (Flush is a wish, not a fact; a base is the core's to encode.)
func TestEveryFieldIsKept(t *testing.T) {
	for _, tc := range []struct {
		value  any
		fields []string
	}{
		{paxosgroup.Record{}, []string{"Kind", "Ballot", "Slot", "Entry", "Base", "Flush"}},
		{paxosgroup.Entry{}, []string{"Kind", "Term", "Number", "Region", "Incarnation", "Session", "Sequence", "Payload"}},
	} {
		typ := reflect.TypeOf(tc.value)
		var got []string
		for i := range typ.NumField() {
			got = append(got, typ.Field(i).Name)
		}
		if !reflect.DeepEqual(got, tc.fields) {
			t.Errorf("%v has fields %v, the format keeps %v", typ, got, tc.fields)
		}
	}
}

func FuzzRecord(f *testing.F) {
	for _, r := range records() {
		f.Add(encode(r, 1, 64)[recordHeaderBytes:], uint8(r.Kind))
	}
	f.Fuzz(func(t *testing.T, body []byte, kind uint8) {
		// With a checksum that fits, so that the body is looked at.
		b := appendRecord(nil, 1, 64, recordType(kind), 7, func(dst []byte) []byte { return append(dst, body...) })
		r, err := decodeRecord(b, 1, 64)
		if err != nil {
			return
		}
		again := appendRecord(nil, 1, 64, r.kind, r.group, func(dst []byte) []byte {
			switch r.kind {
			case typeState:
				return appendState(dst, state{promised: r.ballot, chosen: r.slot, base: r.base})
			case typeSeal:
				return dst
			}
			return appendBody(dst, paxosgroup.Record{
				Kind: paxosgroup.RecordKind(r.kind), Ballot: r.ballot, Slot: r.slot, Entry: r.entry, Base: &r.base,
			}, r.ballot)
		})
		if !bytes.Equal(again, b) {
			t.Fatalf("decoded %x, encoded again as %x", b, again)
		}
	})
}

// FuzzRecovery damages a log of flushed batches: it must come back whole or be
// refused. Only what may be the trace of a torn write, missing sectors at the
// very end, may cost the last batch.
func FuzzRecovery(f *testing.F) {
	image, at := written(f, f.TempDir())
	f.Add(uint32(at[1]+700), uint32(1), uint8(4))
	f.Add(uint32(at[3]), uint32(512), uint8(0))
	f.Add(uint32(at[4]), uint32(20000), uint8(0xff))
	f.Add(uint32(3000), uint32(0), uint8(1))
	f.Fuzz(func(t *testing.T, offset, length uint32, flip uint8) {
		b := bytes.Clone(image)
		offset %= uint32(len(b))
		end := min(uint64(offset)+uint64(length), uint64(len(b)))
		switch {
		case length == 0:
			b = b[:offset]
		case flip == 0:
			clear(b[offset:end])
		default:
			for i := uint64(offset); i < end; i++ {
				b[i] ^= flip
			}
		}
		for int(offset) < len(b) && uint64(offset) < end && b[offset] == image[offset] {
			offset++ // what was zero before has not been damaged
		}
		_, restored, err := reopen(t, b)
		if err != nil {
			return
		}
		got := len(restored[1].Accepted)
		for i, a := range restored[1].Accepted {
			if a.Slot != paxosgroup.Slot(i+1) || string(a.Entry.Payload) != strings.Repeat(string(rune('a'+a.Slot)), 1500) {
				t.Fatalf("slot %d restored with other contents", a.Slot)
			}
		}
		// Zeroed sectors up to the last batch are what a torn write looks like.
		torn := flip == 0 && length > 0 && got < 4 && int64(offset) >= at[got] && int64(end) > at[3]
		if got != 4 && !torn {
			t.Fatalf("%d of 4 slots restored without an error after damage of %d bytes at %d by %#x (batches at %v)", got, length, offset, flip, at)
		}
	})
}

func TestDamageEverywhere(t *testing.T) {
	// A bit in each byte of the flushed batches, one at a time.
	image, at := written(t, t.TempDir())
	dir := t.TempDir()
	path := filepath.Join(dir, segmentName(1))
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	step := int64(7) // a prime: all places within sector and frame come up
	for i := int64(0); i < at[4]; i += step {
		if _, err := file.WriteAt([]byte{image[i] ^ 0x10}, i); err != nil {
			t.Fatal(err)
		}
		if l, restored, err := Open(Config{Dir: dir, SegmentBytes: 64 << 10}); err == nil {
			l.Close()
			t.Fatalf("a flipped bit at %d (batches at %v) went unnoticed: %d slots", i, at, len(restored[1].Accepted))
		}
		if _, err := file.WriteAt(image[i:i+1], i); err != nil {
			t.Fatal(err)
		}
	}
}

// FuzzSet: a set's file is refused or round-trips.
func FuzzSet(f *testing.F) {
	r := setRecord{own: 2, id: 7, generation: 9, next: 4, dirs: []setDir{{1, true, "/a"}, {3, false, "/b/log"}}, groups: map[paxosgroup.GroupID]uint32{1: 1, 5: 3}}
	f.Add(r.encode(), false)
	f.Add(r.encode()[:60], true)
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		if seal {
			b = binary.LittleEndian.AppendUint32(b[:len(b):len(b)], crc32.Checksum(b, castagnoli))
		}
		got, err := decodeSet(b)
		if err == nil && !bytes.Equal(got.encode(), b) {
			t.Fatalf("re-encoded %x, want %x", got.encode(), b)
		}
	})
}

// memFS is a directory of bytes in memory that is only read.
type memFS struct {
	FS
	files map[string][]byte
}

type memFile struct {
	File
	b []byte
}

func (m memFS) ReadDir(string) ([]string, error) { return slices.Collect(maps.Keys(m.files)), nil }

func (m memFS) OpenFile(name string, _ int, _ os.FileMode) (File, error) {
	return memFile{b: m.files[filepath.Base(name)]}, nil
}

func (f memFile) ReadAt(b []byte, offset int64) (int, error) {
	return bytes.NewReader(f.b).ReadAt(b, offset)
}
func (f memFile) Size() (int64, error) { return int64(len(f.b)), nil }
func (f memFile) Close() error         { return nil }

// FuzzSegments damages a log of several segments, in files that were used before,
// in two places. What a start makes of it must be what an inspection says; and
// either it is refused, or everything comes back but what the last batch held.
func FuzzSegments(f *testing.F) {
	sound := contentsOf(f, segmented(f))
	delete(sound, lockName)
	var names []string
	for _, name := range slices.Sorted(maps.Keys(sound)) {
		if _, ok := parseSegmentName(name); ok {
			names = append(names, name)
		}
	}
	type seen struct {
		slot paxosgroup.Slot
		size int
	}
	records := func(t *testing.T, files map[string][]byte) (Report, map[paxosgroup.GroupID][]seen) {
		entries := make(map[paxosgroup.GroupID][]seen)
		report, err := inspect(memFS{files: files}, ".", func(r Inspected) error {
			if !r.Behind && (r.Kind == "accept" || r.Kind == "learn") {
				entries[r.Group] = append(entries[r.Group], seen{r.Slot, len(r.Entry.Payload)})
			}
			return nil
		})
		if _, ok := errors.AsType[*VersionError](err); err != nil && !ok {
			t.Fatalf("inspection: %v", err)
		}
		if err != nil {
			return report, nil
		}
		return report, entries
	}
	f.Add(uint8(0), uint16(1200), uint16(1), uint8(4), uint8(2), uint16(0), uint16(0), uint8(0))
	f.Add(uint8(2), uint16(2560), uint16(512), uint8(0), uint8(1), uint16(0), uint16(0), uint8(0))
	f.Add(uint8(2), uint16(2560), uint16(512), uint8(1), uint8(2), uint16(3072), uint16(40), uint8(7))
	f.Add(uint8(1), uint16(509), uint16(3), uint8(255), uint8(0), uint16(8100), uint16(8100), uint8(0))
	f.Fuzz(func(t *testing.T, file1 uint8, at1, length1 uint16, flip1 uint8, file2 uint8, at2, length2 uint16, flip2 uint8) {
		files := make(map[string][]byte)
		for name, content := range sound {
			files[name] = []byte(content)
		}
		_, whole := records(t, files)
		zeroed := false
		damage := func(file uint8, at, length uint16, flip uint8) {
			name := names[int(file)%len(names)]
			b := files[name]
			from := int(at) % len(b)
			to := min(from+int(length), len(b))
			if flip != 0 {
				for i := from; i < to; i++ {
					b[i] ^= flip
				}
				return
			}
			// Whole sectors that were never written.
			zeroed = true
			clear(b[from/sectorBytes*sectorBytes : min((to+sectorBytes-1)/sectorBytes*sectorBytes, len(b))])
		}
		damage(file1, at1, length1, flip1)
		damage(file2, at2, length2, flip2)
		report, got := records(t, files)

		dir := t.TempDir()
		for name, b := range files {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		l, restored, err := Open(Config{Dir: dir, SegmentBytes: 8 << 10, Manual: true})
		if err == nil {
			defer l.Close()
		}
		if _, ok := errors.AsType[*VersionError](err); ok {
			return
		}
		if c, ok := errors.AsType[*CorruptError](err); ok {
			if len(report.Damage) == 0 || report.Damage[0].Error() != c.Error() {
				t.Fatalf("start says %v, inspection %v", c, report.Damage)
			}
			return
		}
		if err != nil || len(report.Damage) > 0 {
			t.Fatalf("start says %v, inspection %v", err, report.Damage)
		}
		lost := 0
		for g, entries := range whole {
			if n := len(got[g]); n > len(entries) || !slices.Equal(got[g], entries[:n]) {
				t.Fatalf("group %d came back with %v, want %v", g, got[g], entries)
			}
			lost += len(entries) - len(got[g])
		}
		// That all sectors up to the end are lost, as a disk can that lies about flushes,
		// cannot be told.
		if lost > 0 && !zeroed {
			t.Fatalf("%d entries are gone without a word", lost)
		}
		for _, g := range report.Groups {
			if r := restored[g.Group]; r.Promised != g.Promised || r.Chosen != g.Chosen || r.Base.Slot != g.Base {
				t.Fatalf("start restored %+v, inspection says %+v", r, g)
			}
		}
	})
}

// FuzzSegmentImage reads any bytes as a segment: it must end, and never panic.
func FuzzSegmentImage(f *testing.F) {
	for name, content := range contentsOf(f, segmented(f)) {
		if sequence, ok := parseSegmentName(name); ok {
			f.Add([]byte(content), sequence, true)
		}
	}
	f.Fuzz(func(t *testing.T, image []byte, sequence uint64, sealed bool) {
		sequence %= 1 << 32
		// With headers that fit, so that the rest is looked at.
		if len(image) >= 3*sectorBytes && sealed {
			image = image[:len(image)/sectorBytes*sectorBytes]
			b := bytes.Clone(image)
			copy(b, segmentHeader(sequence, int64(len(b))))
			for i := 1; i < len(b)/sectorBytes; i++ {
				if s := b[i*sectorBytes:]; s[0] == 0x51 {
					binary.LittleEndian.PutUint32(s[sectorData:], stamp(sequence, int64(i)))
					if binary.LittleEndian.Uint32(s) == batchMagic {
						binary.LittleEndian.PutUint32(s[20:], checksum(sequence, int64(i)*sectorData, s[:20]))
					}
				}
			}
			image = b
		}
		for _, name := range []string{segmentName(sequence), segmentName(sequence + 1)} {
			files := map[string][]byte{name: image, segmentName(sequence + 2): image}
			if _, err := inspect(memFS{files: files}, ".", nil); err != nil {
				if _, ok := errors.AsType[*VersionError](err); !ok {
					t.Fatal(err)
				}
			}
		}
	})
}

func FuzzBatchHeader(f *testing.F) {
	b := make([]byte, 100)
	batchHeader{length: 76, number: 3, records: 2}.put(b, 1, 508)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, ok := readBatchHeader(b, 1, 508)
		if !ok {
			return
		}
		again := bytes.Clone(b)
		h.put(again, 1, 508)
		if !bytes.Equal(again, b) {
			t.Fatalf("read %x, written again as %x", b, again)
		}
		if _, err := readBatch(b[:batchHeaderBytes+int(h.length)], h, 1, 508); err != nil {
			if _, ok := errors.AsType[*CorruptError](err); !ok {
				t.Fatal(err)
			}
		}
	})
}
