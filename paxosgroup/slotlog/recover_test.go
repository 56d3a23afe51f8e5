package slotlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"quorate/paxosgroup"
)

// written makes a log with a few batches in one segment, each flushed on its
// own, and returns the segment's bytes and where each batch begins; the last
// offset is where the next one would.
func written(t testing.TB, dir string) (image []byte, offsets []int64) {
	t.Helper()
	l, _ := open(t, Config{Dir: dir, SegmentBytes: 64 << 10})
	for s := paxosgroup.Slot(1); s <= 4; s++ {
		offsets = append(offsets, position(l.offset))
		// Larger than a sector, and without a sector of zeros.
		appendWait(t, l, 1, accept(s, 2, strings.Repeat(string(rune('a'+s)), 1500)))
	}
	offsets = append(offsets, position(l.offset))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	image, err := os.ReadFile(filepath.Join(dir, segmentName(1)))
	if err != nil {
		t.Fatal(err)
	}
	return image, offsets
}

// reopen opens a copy of a log whose first segment holds image.
func reopen(t testing.TB, image []byte) (*Log, map[paxosgroup.GroupID]paxosgroup.Restored, error) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, segmentName(1)), image, 0o600); err != nil {
		t.Fatal(err)
	}
	l, restored, err := Open(Config{Dir: dir, SegmentBytes: 64 << 10})
	if err == nil {
		t.Cleanup(func() { l.Close() })
	}
	return l, restored, err
}

func TestTornTailIsCut(t *testing.T) {
	image, at := written(t, t.TempDir())
	begin, end := at[3], at[4]
	for _, tc := range []struct {
		name string
		tear func(b []byte)
	}{
		{"nothing of it", func(b []byte) { clear(b[begin:end]) }},
		{"the first sector only", func(b []byte) { clear(b[begin/512*512+512 : end]) }},
		{"all but the last sector", func(b []byte) { clear(b[end-512 : end]) }},
		{"a sector in the middle is missing", func(b []byte) { clear(b[begin/512*512+1024 : begin/512*512+1536]) }},
		{"all but the first sector", func(b []byte) { clear(b[begin : begin/512*512+512]) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := slices.Clone(image)
			tc.tear(b)
			l, restored, err := reopen(t, b)
			if err != nil {
				t.Fatal(err)
			}
			if got := len(restored[1].Accepted); got != 3 {
				t.Fatalf("%d slots restored, want the 3 flushed before", got)
			}
			// What follows goes where the torn write was, and is found again.
			appendWait(t, l, 1, accept(4, 3, "again"))
			dir := l.cfg.Dir
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			l, restored = open(t, Config{Dir: dir, SegmentBytes: 64 << 10})
			if got := payloads(t, l, 1, 4, 4); len(restored[1].Accepted) != 4 || got[0] != "again" {
				t.Fatalf("restored %d slots, slot 4 is %q", len(restored[1].Accepted), got)
			}
		})
	}
}

func TestDamageIsRefused(t *testing.T) {
	image, at := written(t, t.TempDir())
	for _, tc := range []struct {
		name   string
		damage func(b []byte) []byte
		want   []string
	}{
		{"a bit in a batch with others behind it", func(b []byte) []byte { b[at[1]+700] ^= 4; return b }, []string{segmentName(1), fmt.Sprint(at[1] + batchHeaderBytes)}},
		{"a bit in the last batch", func(b []byte) []byte { b[at[3]+700] ^= 4; return b }, []string{segmentName(1), fmt.Sprint(at[3] + batchHeaderBytes)}},
		{"a bit in a batch header", func(b []byte) []byte { b[at[3]+5] ^= 1; return b }, []string{fmt.Sprint(at[3])}},
		{"a zeroed sector with a batch behind it", func(b []byte) []byte { clear(b[at[1]/512*512+512 : at[1]/512*512+1024]); return b }, []string{"batch"}},
		{"a bit in the unused rest", func(b []byte) []byte { b[len(b)-5] ^= 1; return b }, nil},
		{"a bit in the segment header", func(b []byte) []byte { b[20] ^= 1; return b }, []string{"header"}},
		{"the end of the file is missing", func(b []byte) []byte { return b[:at[2]] }, []string{"made with"}},
		{"an empty file", func(b []byte) []byte { return nil }, []string{"only 0 bytes"}},
		{"another file", func(b []byte) []byte { return bytes.Repeat([]byte("hello"), 1000) }, []string{"no segment"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, restored, err := reopen(t, tc.damage(slices.Clone(image)))
			if tc.want == nil {
				// Behind the last batch there was nothing: a bit there is cut off.
				if err != nil || len(restored[1].Accepted) != 4 {
					t.Fatalf("restored %d slots, error %v", len(restored[1].Accepted), err)
				}
				return
			}
			if _, ok := errors.AsType[*CorruptError](err); !ok {
				t.Fatalf("error %v, want a CorruptError", err)
			}
			for _, want := range append(tc.want, "put the undamaged file back") {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
		})
	}
}

func TestRotBehindZeroPayloadIsRefused(t *testing.T) {
	// A payload with sectors of zeros must not make damage look like a torn write.
	dir := t.TempDir()
	l, _ := open(t, Config{Dir: dir, SegmentBytes: 64 << 10})
	appendWait(t, l, 1, accept(1, 1, strings.Repeat("\x00", 5000)))
	begin := int64(sectorBytes)
	l.Close()
	image, err := os.ReadFile(filepath.Join(dir, segmentName(1)))
	if err != nil {
		t.Fatal(err)
	}
	image[begin+batchHeaderBytes+20] ^= 1
	if _, _, err := reopen(t, image); err == nil {
		t.Fatal("a flipped bit in a flushed batch was taken for a torn write")
	}
}

func TestFilesThatAreMissing(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Dir: dir, SegmentBytes: 8 << 10}
	l, _ := open(t, cfg)
	for s := paxosgroup.Slot(1); s <= 40; s++ {
		appendWait(t, l, 1, accept(s, 1, strings.Repeat("x", 1000)), chosen(s))
	}
	l.Close()
	for _, name := range []string{segmentName(1), segmentName(3)} {
		moved := filepath.Join(t.TempDir(), name)
		if err := os.Rename(filepath.Join(dir, name), moved); err != nil {
			t.Fatal(err)
		}
		if _, _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "missing") {
			t.Errorf("without %s: error %v", name, err)
		}
		if err := os.Rename(moved, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, restored := open(t, cfg); restored[1].Chosen != 40 {
		t.Errorf("with all files: chosen %d", restored[1].Chosen)
	}
}

func TestSealedSegmentThatLostItsEnd(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Dir: dir, SegmentBytes: 8 << 10}
	l, _ := open(t, cfg)
	for s := paxosgroup.Slot(1); s <= 20; s++ {
		appendWait(t, l, 1, accept(s, 1, strings.Repeat("x", 1000)))
	}
	l.Close()
	path := filepath.Join(dir, segmentName(1))
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	clear(b[4096:])
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	var corrupt *CorruptError
	if _, _, err := Open(cfg); !errors.As(err, &corrupt) || corrupt.File != segmentName(1) {
		t.Fatalf("error %v", err)
	}
}

func TestLaterFormatIsRefused(t *testing.T) {
	image, _ := written(t, t.TempDir())
	binary.LittleEndian.PutUint32(image[8:], 3)
	binary.LittleEndian.PutUint32(image[60:], crc32.Checksum(image[:60], castagnoli))
	_, _, err := reopen(t, image)
	if v, ok := errors.AsType[*VersionError](err); !ok || v.Version != 3 || !strings.Contains(err.Error(), "run the version") {
		t.Fatalf("error %v", err)
	}
}

func TestDirectoryInUse(t *testing.T) {
	cfg := Config{Dir: t.TempDir()}
	l, _ := open(t, cfg)
	if _, _, err := Open(cfg); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "stop that sidecar") {
		t.Fatalf("error %v", err)
	}
	l.Close()
	open(t, cfg)
}

func TestLearnedEntriesAreRestoredAsChosen(t *testing.T) {
	cfg := Config{Dir: t.TempDir()}
	l, _ := open(t, cfg)
	appendWait(t, l, 1,
		paxosgroup.Record{Kind: paxosgroup.RecordPromise, Ballot: paxosgroup.Ballot{Counter: 5, Replica: 2}},
		accept(1, 3, "one"), learn(1, "one"), learn(2, "two"), accept(3, 4, "three"), learn(5, "five"))
	l.Close()
	l, restored := open(t, cfg)
	r := restored[1]
	if r.Chosen != 2 || len(r.Accepted) != 2 || r.Accepted[0].Slot != 3 || r.Accepted[0].Ballot.Counter != 4 {
		t.Fatalf("restored %+v", r)
	}
	// Known to be chosen, but behind a gap: reported at the highest ballot promised.
	if a := r.Accepted[1]; a.Slot != 5 || a.Ballot != (paxosgroup.Ballot{Counter: 5, Replica: 2}) || string(a.Entry.Payload) != "five" {
		t.Fatalf("slot 5 restored as %+v", a)
	}
	if got := payloads(t, l, 1, 1, 9); !slices.Equal(got, []string{"one", "two", "three"}) {
		t.Fatalf("read %q", got)
	}
}

func TestBaseRestartsAGroupAndFreesSegments(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), SegmentBytes: 8 << 10}
	l, _ := open(t, cfg)
	other := accept(1, 1, "other group")
	appendWait(t, l, 2, other)
	for s := paxosgroup.Slot(1); s <= 50; s++ {
		appendWait(t, l, 1, accept(s, 7, strings.Repeat("x", 1000)))
	}
	base := paxosgroup.Base{
		Slot:  60,
		Judge: paxosgroup.Judge{Term: paxosgroup.Ballot{Counter: 7, Replica: 1}, Region: "r1", Incarnation: 3, Next: 50},
		Membership: paxosgroup.Membership{Epoch: 4, Phase1: 2, Phase2: 2, NextID: 9, Members: []paxosgroup.Member{
			{ID: 1, Region: "r1", Kind: paxosgroup.Voter}, {ID: 8, Region: "r2", Kind: paxosgroup.Learner}}},
	}
	appendWait(t, l, 1, paxosgroup.Record{Kind: paxosgroup.RecordBase, Base: &base})
	appendWait(t, l, 1, accept(61, 8, "after"))
	appendWait(t, l, 2, paxosgroup.Record{Kind: paxosgroup.RecordBase, Base: &paxosgroup.Base{Slot: 1}})
	appendWait(t, l, 1, accept(62, 8, "later"))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if got := listed(t, cfg.Dir); len(got) != 1 || got[0] == 1 {
		t.Fatalf("segments %v, want only the last", got)
	}

	l, restored := open(t, cfg)
	r := restored[1]
	if fmt.Sprint(r.Base) != fmt.Sprint(base) || r.Chosen != 60 || r.Promised.Counter != 8 || len(r.Accepted) != 2 {
		t.Fatalf("restored %+v", r)
	}
	if _, err := l.Group(1).Chosen(60, 61, 1); !errors.Is(err, ErrCompacted) {
		t.Fatalf("reading at the base: %v", err)
	}
	if got := payloads(t, l, 1, 61, 62); !slices.Equal(got, []string{"after", "later"}) {
		t.Fatalf("read %q", got)
	}
}

func TestPromiseOutlivesTheSegmentThatHeldIt(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), SegmentBytes: 8 << 10}
	l, _ := open(t, cfg)
	promise := paxosgroup.Ballot{Counter: 99, Replica: 4}
	appendWait(t, l, 1, paxosgroup.Record{Kind: paxosgroup.RecordPromise, Ballot: promise})
	for s := paxosgroup.Slot(1); s <= 30; s++ {
		appendWait(t, l, 1, learn(s, strings.Repeat("x", 1000)))
	}
	appendWait(t, l, 1, paxosgroup.Record{Kind: paxosgroup.RecordBase, Base: &paxosgroup.Base{Slot: 30}})
	l.Close()
	if got := listed(t, cfg.Dir); got[0] == 1 {
		t.Fatalf("segments %v: the first is still there, so this tests nothing", got)
	}
	_, restored := open(t, cfg)
	if restored[1].Promised != promise {
		t.Fatalf("promised %v, want %v", restored[1].Promised, promise)
	}
}

func listed(t testing.TB, dir string) []uint64 {
	t.Helper()
	names, err := osFS{}.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	sequences, err := segmentsOf(names)
	if err != nil {
		t.Fatal(err)
	}
	return sequences
}

// TestStoppedBetweenTwoSegments takes away what a process that ends while it
// begins a segment has not done yet.
func TestStoppedBetweenTwoSegments(t *testing.T) {
	for _, tc := range []struct {
		name string
		undo func(path string) error
	}{
		{"sealed, with no successor", os.Remove},
		{"the successor is empty", func(path string) error {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			clear(b[sectorBytes:])
			return os.WriteFile(path, b, 0o600)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := Config{Dir: t.TempDir(), SegmentBytes: 8 << 10}
			l, _ := open(t, cfg)
			promise := paxosgroup.Ballot{Counter: 50, Replica: 3}
			appendWait(t, l, 2, paxosgroup.Record{Kind: paxosgroup.RecordPromise, Ballot: promise})
			slot := paxosgroup.Slot(0)
			for l.Stats().Segments < 3 {
				slot++
				appendWait(t, l, 1, accept(slot, 1, strings.Repeat("x", 1000)))
			}
			l.Close()
			if err := tc.undo(filepath.Join(cfg.Dir, segmentName(3))); err != nil {
				t.Fatal(err)
			}
			l, restored := open(t, cfg)
			if got := len(restored[1].Accepted); got != int(slot)-1 {
				t.Fatalf("%d slots restored, want %d", got, slot-1)
			}
			// The first segment goes, which alone held the other group's promise but
			// for the state that the third begins with.
			appendWait(t, l, 1, paxosgroup.Record{Kind: paxosgroup.RecordBase, Base: &paxosgroup.Base{Slot: slot}})
			l.Close()
			if got := listed(t, cfg.Dir); got[0] != 3 {
				t.Fatalf("segments %v", got)
			}
			_, restored = open(t, cfg)
			if restored[2].Promised != promise || restored[1].Chosen != slot {
				t.Fatalf("restored %+v", restored)
			}
		})
	}
}

// TestAnIdleGroupDoesNotKeepTheLog: what alone is in use in old segments is
// written once more, and they go.
func TestAnIdleGroupDoesNotKeepTheLog(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), SegmentBytes: 8 << 10}
	l, _ := open(t, cfg)
	appendWait(t, l, 2, accept(1, 1, "idle one"), learn(2, "idle two"), chosen(1))
	for s := paxosgroup.Slot(1); s <= 300; s++ {
		appendWait(t, l, 1, accept(s, 7, strings.Repeat("x", 1000)), chosen(s))
		if s%20 == 0 {
			appendWait(t, l, 1, paxosgroup.Record{Kind: paxosgroup.RecordBase, Base: &paxosgroup.Base{Slot: s}})
		}
	}
	stats := l.Stats()
	if stats.Segments > 10 || stats.Cleaned == 0 || stats.Cleaned > stats.Bytes/16 {
		t.Errorf("%+v", stats)
	}
	check := func() {
		if got := payloads(t, l, 2, 1, 2); !slices.Equal(got, []string{"idle one", "idle two"}) {
			t.Errorf("read %q", got)
		}
	}
	check()
	l.Close()
	l, restored := open(t, cfg)
	if r := restored[2]; r.Chosen != 2 || r.Judged.Slot != 2 || r.Promised.Counter != 1 {
		t.Errorf("restored %+v", r)
	}
	check()
}

// TestStaleBytesNeverPass: a file that is used again holds whole batches of its
// earlier life, and a crash at any point leaves them behind the end of the log.
func TestStaleBytesNeverPass(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), SegmentBytes: 8 << 10}
	l, _ := open(t, cfg)
	slot := paxosgroup.Slot(0)
	for range 100 {
		slot++
		appendWait(t, l, 1, accept(slot, 7, strings.Repeat("x", 700)), chosen(slot))
		appendWait(t, l, 1, paxosgroup.Record{Kind: paxosgroup.RecordBase, Base: &paxosgroup.Base{Slot: slot - 1}})
	}
	l.Close()
	sequence := listed(t, cfg.Dir)[0]
	image, err := os.ReadFile(filepath.Join(cfg.Dir, segmentName(sequence)))
	if err != nil {
		t.Fatal(err)
	}
	stale := 0
	for at := 0; at < len(image); at += sectorBytes {
		if stateOf(image[at:], sequence, int64(at/sectorBytes)) == sectorOld && !isZero(image[at:at+sectorBytes]) {
			stale++
		}
	}
	if stale == 0 {
		t.Fatal("the segment holds nothing of an earlier life: this tests nothing")
	}
	l, restored := open(t, cfg)
	if r := restored[1]; r.Base.Slot != slot-1 || r.Chosen != slot || len(r.Accepted) != 0 {
		t.Fatalf("restored %+v", r)
	}
	appendWait(t, l, 1, accept(slot+1, 7, "next"))
}

// TestStampsTellRot: no bit of a stamp can change without it showing.
func TestStampsTellRot(t *testing.T) {
	b := make([]byte, sectorBytes)
	for sequence := uint64(1); sequence < 300; sequence++ {
		for _, sector := range []int64{0, 1, 77, 1 << 17} {
			for bit := range 32 {
				binary.LittleEndian.PutUint32(b[sectorData:], stamp(sequence, sector)^1<<bit)
				if got := stateOf(b, sequence, sector); got != sectorRotten {
					t.Fatalf("stamp of sequence %d, sector %d, bit %d flipped: state %d", sequence, sector, bit, got)
				}
			}
		}
	}
}
