package sidecar

import (
	"fmt"
	"testing"
	"time"

	"quorate/paxosgroup"
	"quorate/replication/entry"
)

func header(xid uint64, end entry.LSN) entry.Header {
	return entry.Header{Xid: xid, EndLSN: end, CommitTime: time.UnixMicro(int64(xid)), Checksum: uint32(xid) * 7, Changes: 1, BodyBytes: 10}
}

func TestOwnCommitsRecogniseByContent(t *testing.T) {
	var o ownCommits
	for i := uint64(1); i <= 10; i++ {
		o.add(paxosgroup.Slot(100+i), header(i, entry.LSN(i*10)))
	}
	other := header(5, 50)
	other.Checksum++
	for _, tc := range []struct {
		name string
		h    entry.Header
		want bool
	}{
		{"the same commit", header(5, 50), true},
		{"another content at the same position", other, false},
		{"the same transaction elsewhere", header(5, 51), false},
		{"another transaction at the same position", header(6, 50), false},
		{"behind the last", header(11, 110), false},
		{"before the first, while none was forgotten", header(1, 5), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := o.matches(tc.h); got != tc.want {
				t.Errorf("matches: %v, want %v", got, tc.want)
			}
		})
	}
	for _, tc := range []struct {
		lsn  entry.LSN
		slot paxosgroup.Slot
		ok   bool
	}{{9, 0, false}, {10, 101, true}, {19, 101, true}, {100, 110, true}, {1000, 110, true}} {
		if slot, ok := o.slotAt(tc.lsn); slot != tc.slot || ok != tc.ok {
			t.Errorf("slotAt(%d): %d, %v, want %d, %v", tc.lsn, slot, ok, tc.slot, tc.ok)
		}
	}
}

func TestOwnCommitsForgetTheOldest(t *testing.T) {
	var o ownCommits
	const extra = 5
	for i := uint64(1); i <= ownCommitsMax+extra; i++ {
		o.add(paxosgroup.Slot(i), header(i, entry.LSN(i*10)))
	}
	if len(o.ring) != ownCommitsMax {
		t.Fatalf("%d are kept, want %d", len(o.ring), ownCommitsMax)
	}
	if !o.matches(header(extra+1, (extra+1)*10)) || !o.matches(header(ownCommitsMax+extra, (ownCommitsMax+extra)*10)) {
		t.Error("the oldest or the newest kept is not recognised")
	}
	if o.matches(header(extra+2, (extra+1)*10)) {
		t.Error("a commit of another transaction is taken for the oldest kept")
	}
}

func TestLagIsTheAgeOfWhatWaits(t *testing.T) {
	var times slotTimes
	at := time.Unix(1000, 0)
	for i := range 10 {
		times.add(paxosgroup.Slot(10*(i+1)), at.Add(time.Duration(i)*time.Second))
	}
	now := at.Add(10 * time.Second)
	for _, tc := range []struct {
		applied paxosgroup.Slot
		want    time.Duration
	}{{100, 0}, {95, time.Second}, {10, 9 * time.Second}, {0, 10 * time.Second}} {
		if got := times.lag(tc.applied, 100, now); got != tc.want {
			t.Errorf("applied %d: lag %v, want %v", tc.applied, got, tc.want)
		}
	}
}

// logOf is a log in memory.
type logOf []paxosgroup.Delivered

func (l logOf) Read(from paxosgroup.Slot, maxBytes int) ([]paxosgroup.Delivered, error) {
	if from < 1 || int(from) > len(l) {
		return nil, fmt.Errorf("slot %d is not in the log", from)
	}
	n := 1
	for size := 0; int(from)-1+n < len(l) && size < maxBytes; n++ {
		size += len(l[int(from)-1+n].Entry.Payload)
	}
	return l[from-1 : int(from)-1+n], nil
}

func TestFragmentsAreFoundAmongOtherEntries(t *testing.T) {
	term := paxosgroup.Ballot{Counter: 3, Replica: 1}
	var log logOf
	add := func(v paxosgroup.Verdict, kind paxosgroup.EntryKind, p *entry.Payload) paxosgroup.Delivered {
		d := paxosgroup.Delivered{Slot: paxosgroup.Slot(len(log) + 1), Verdict: v, Entry: paxosgroup.Entry{Kind: kind, Term: term, Incarnation: 9}}
		if p != nil {
			d.Entry.Payload = p.Append(nil)
		}
		log = append(log, d)
		return d
	}
	fragment := func(attempt uint64, n uint32) *entry.Payload {
		b := []byte{byte(n)}
		return &entry.Payload{Type: entry.TypeFragment, Header: entry.Header{Xid: 77}, Attempt: attempt, Fragment: n, Body: b}
	}
	add(paxosgroup.Effective, paxosgroup.KindOpening, nil)
	add(paxosgroup.Void, paxosgroup.KindData, fragment(1, 1)) // of an attempt that came to nothing
	add(paxosgroup.Effective, paxosgroup.KindData, fragment(2, 1))
	add(paxosgroup.Void, paxosgroup.KindNoOp, nil)
	add(paxosgroup.Effective, paxosgroup.KindData, fragment(2, 2))
	add(paxosgroup.Effective, paxosgroup.KindData, &entry.Payload{Type: entry.TypeMarks, Marks: []entry.Mark{{Schema: "s", Name: "q", Value: 1}}})
	add(paxosgroup.Effective, paxosgroup.KindData, fragment(2, 3))
	c := entry.Payload{Type: entry.TypeCommit, Header: entry.Header{Xid: 77, EndLSN: 100}, Attempt: 2, Fragment: 3}
	commit := add(paxosgroup.Effective, paxosgroup.KindData, &c)

	var got []byte
	collect := func(b []byte) error { got = append(got, b...); return nil }
	if err := fragments(log, commit, c, collect); err != nil || string(got) != "\x01\x02\x03" {
		t.Errorf("got %v, %v; want fragments 1, 2, 3", got, err)
	}
	c.Fragment, got = 4, nil
	if err := fragments(log, commit, c, collect); err == nil {
		t.Error("a commit that counts more fragments than the log holds was read")
	}
	c.Fragment, c.Attempt = 3, 5
	if err := fragments(log, commit, c, collect); err == nil {
		t.Error("fragments of another attempt were read")
	}
}

func TestIdentitySurvivesAndDamageIsTold(t *testing.T) {
	dir := t.TempDir()
	if id, err := loadIdentity(dir); id != nil || err != nil {
		t.Fatalf("an empty directory: %v, %v", id, err)
	}
	want := identity{Cluster: "c", ClusterID: 1<<63 + 5, Region: "r1", ReplicaID: 7, Membership: []byte{1, 2}, Founded: true}
	if err := want.save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := loadIdentity(dir)
	if err != nil || fmt.Sprint(*got) != fmt.Sprint(want) {
		t.Errorf("read back %+v, %v; want %+v", got, err, want)
	}
}
