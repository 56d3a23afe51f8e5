package paxosgroup

import (
	"fmt"
	"testing"
	"time"
)

// slowLink is three replicas, of which the third is behind links of a limited
// rate. Chosen entries that are fetched go over links of their own.
type slowLink struct {
	t     *testing.T
	now   Instant
	rs    []*Replica
	links map[linkID]*link
	rate  float64 // bytes per second from and to 3; 0: it takes no time
	delay time.Duration
	dead  bool // 3 takes nothing, and nothing is lost
}

type linkID struct {
	from, to ReplicaID
	bulk     bool
}

type link struct {
	queue []Message
	bytes int
	sent  float64 // of the first in the queue
	due   []flight
}

type slowStore struct{ entries []SlotEntry }

func (s *slowStore) Chosen(from, to Slot, maxBytes int) ([]SlotEntry, error) {
	n := 0
	for i := from - 1; i < to; i++ {
		n += len(s.entries[i].Entry.Payload)
		if n > maxBytes && i >= from {
			to = i
			break
		}
	}
	return s.entries[from-1 : to], nil
}

func newSlowLink(t *testing.T, change func(*Config)) *slowLink {
	w := &slowLink{t: t, links: make(map[linkID]*link), delay: time.Millisecond}
	m := Membership{NextID: 4}
	for id := ReplicaID(1); id <= 3; id++ {
		m.Members = append(m.Members, Member{ID: id, Region: fmt.Sprintf("r%d", id), Kind: Voter})
	}
	for id := ReplicaID(1); id <= 3; id++ {
		cfg := Config{ID: id, Region: fmt.Sprintf("r%d", id), Seed: 1}
		if change != nil {
			change(&cfg)
		}
		r, err := New(cfg, Restored{Base: Base{Membership: m}}, &slowStore{}, w.now)
		if err != nil {
			t.Fatal(err)
		}
		r.SetElectable(id == 1)
		w.rs = append(w.rs, r)
	}
	for w.rs[0].role != Leader {
		w.pass(0, 0)
	}
	return w
}

func bytesOf(m Message) int {
	n := 40 + 8*len(m.Slots)
	for _, e := range m.Entries {
		n += flowEntryBytes + len(e.Entry.Payload)
	}
	return n
}

func (w *slowLink) settle(r *Replica) {
	for {
		rd, ok := r.Ready()
		if !ok {
			return
		}
		for _, d := range rd.Delivered {
			r.store.(*slowStore).entries = append(r.store.(*slowStore).entries, SlotEntry{d.Slot, d.Entry})
		}
		for _, m := range append(rd.Send, rd.AfterSync...) {
			id := linkID{m.From, m.To, m.Kind == MsgLearn}
			if w.links[id] == nil {
				w.links[id] = &link{}
			}
			w.links[id].queue = append(w.links[id].queue, m)
			w.links[id].bytes += bytesOf(m)
		}
		r.Persisted(w.now, rd.Seq)
	}
}

// pass lets a millisecond pass in which count entries of size bytes are
// proposed, as far as there is room for them. It returns how many were.
func (w *slowLink) pass(count, size int) (taken int) {
	w.now = w.now.Add(time.Millisecond)
	for from := ReplicaID(1); from <= 3; from++ {
		for to := ReplicaID(1); to <= 3; to++ {
			for _, bulk := range []bool{false, true} {
				w.carry(w.links[linkID{from, to, bulk}], from == 3 || to == 3)
			}
		}
	}
	for range count {
		if _, _, err := w.rs[0].Propose(w.now, make([]byte, size)); err != nil {
			break
		}
		taken++
	}
	for _, r := range w.rs {
		r.Tick(w.now)
		w.settle(r)
	}
	return taken
}

func (w *slowLink) carry(l *link, slow bool) {
	if l == nil || slow && w.dead {
		return
	}
	room := 1e12
	if slow && w.rate > 0 {
		room = w.rate / 1000
	}
	l.sent += room
	for len(l.queue) > 0 && l.sent >= float64(bytesOf(l.queue[0])) {
		m := l.queue[0]
		l.sent -= float64(bytesOf(m))
		l.bytes -= bytesOf(m)
		l.queue = l.queue[1:]
		l.due = append(l.due, flight{w.now.Add(w.delay), m})
	}
	if len(l.queue) == 0 {
		l.sent = 0
	}
	for len(l.due) > 0 && l.due[0].at <= w.now {
		m := l.due[0].m
		l.due = l.due[1:]
		if err := w.rs[m.To-1].Step(w.now, m); err != nil {
			w.t.Fatal(err)
		}
		w.settle(w.rs[m.To-1])
	}
}

func (w *slowLink) peer() PeerStatus { return w.rs[0].Status().Peers[1] }

// queued is what waits on the link that a quorum's Accepts would take to 3.
func (w *slowLink) queued() int { return w.links[linkID{1, 3, false}].bytes }

func TestWindowFollowsTheLink(t *testing.T) {
	w := newSlowLink(t, nil)
	load := func(d time.Duration) (taken int) {
		for end := w.now.Add(d); w.now < end; {
			taken += w.pass(20, 500)
		}
		return taken
	}
	before := load(2 * time.Second)
	if p := w.peer(); p.WindowBytes < flowFirstBytes || w.rs[2].chosen+100 < w.rs[0].chosen {
		t.Fatalf("a fast link: %+v, chosen up to %d of %d", p, w.rs[2].chosen, w.rs[0].chosen)
	}
	w.rate = 250_000 // 2 Mbit/s, of 10 MB/s that are proposed
	for k := range 100 {
		taken := load(100 * time.Millisecond)
		if taken < before/20*9/10 {
			t.Fatalf("%d proposals taken in 100 ms, %d before", taken, before/20)
		}
		if p := w.peer(); k > 30 && w.queued() > 2*(flowFloorBytes+acceptBytesMax/16) {
			t.Fatalf("after %d ms: %d bytes queued: %+v", (k+1)*100, w.queued(), p)
		}
	}
	t.Logf("slow: %+v, %d bytes queued, chosen up to %d of %d", w.peer(), w.queued(), w.rs[2].chosen, w.rs[0].chosen)
	w.rate = 0
	healed := w.now
	for w.rs[2].chosen+100 < w.rs[0].chosen || w.peer().Behind {
		if load(10 * time.Millisecond); w.now > healed.Add(5*time.Second) {
			t.Fatalf("not at full rate within 5 s: %+v, chosen up to %d of %d", w.peer(), w.rs[2].chosen, w.rs[0].chosen)
		}
	}
	t.Logf("caught up after %v: %+v", w.now.Sub(healed), w.peer())
}

func TestStalledFollowerIsNotSentMoreThanItsWindow(t *testing.T) {
	w := newSlowLink(t, nil)
	for range 500 {
		w.pass(10, 500)
	}
	w.dead = true
	chosen := w.rs[0].chosen
	for range 100_000 {
		w.pass(1, 500)
	}
	if w.rs[0].chosen < chosen+99_000 {
		t.Errorf("the others chose %d entries of 100000", w.rs[0].chosen-chosen)
	}
	// Heartbeats go on; a transport gives such a link up after 2 s.
	if w.queued() > flowFirstBytes+100_000/100*bytesOf(Message{})*3 {
		t.Errorf("%d bytes queued in %d messages", w.queued(), len(w.links[linkID{1, 3, false}].queue))
	}
	if f := &w.rs[0].peers[1].flow; len(f.flights) > 10_000 || len(f.again) > 0 {
		t.Errorf("%d Accepts remembered, %d to be repeated", len(f.flights), len(f.again))
	}
	w.dead = false
	healed := w.now
	for w.rs[2].chosen+10 < w.rs[0].chosen || w.peer().Behind {
		if w.pass(1, 500); w.now > healed.Add(5*time.Second) {
			t.Fatalf("not caught up within 5 s: %+v, chosen up to %d of %d", w.peer(), w.rs[2].chosen, w.rs[0].chosen)
		}
	}
}

// TestLostAcceptsAreSentAgainOnce: what is lost is sent again when an answer to
// something later proves it lost, and nothing else is.
func TestLostAcceptsAreSentAgainOnce(t *testing.T) {
	w := newSlowLink(t, nil)
	w.pass(1, 10)
	lost := linkID{1, 2, false}
	other := linkID{1, 3, false}
	for range 20 {
		w.pass(0, 0)
	}
	// 3 hears nothing at all, so that nothing is chosen; 2 loses one Accept.
	for range 3 {
		if _, _, err := w.rs[0].Propose(w.now, []byte("x")); err != nil {
			t.Fatal(err)
		}
		w.settle(w.rs[0])
	}
	q := w.links[lost].queue
	if len(q) != 3 {
		t.Fatalf("%d messages to 2", len(q))
	}
	w.links[lost].queue = append(q[:1:1], q[2])
	w.links[other].queue = nil
	sent := 0
	for range 10 {
		w.pass(0, 0)
		w.links[other].queue = nil
		for _, m := range w.links[lost].queue {
			if m.Kind == MsgAccept {
				sent += len(m.Entries)
			}
		}
	}
	if sent != 1 || w.rs[0].chosen != w.rs[0].lead.next-1 {
		t.Fatalf("%d entries sent again, chosen up to %d of %d", sent, w.rs[0].chosen, w.rs[0].lead.next-1)
	}
}
