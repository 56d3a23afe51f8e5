package slotlog

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"reflect"
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
