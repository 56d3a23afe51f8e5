package slotlog

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"quorate/paxosgroup"
)

func TestOneFlushServesManyGroups(t *testing.T) {
	l, _ := open(t, Config{Dir: t.TempDir()})
	const groups, each = 50, 40
	before := l.Stats()
	var appending sync.WaitGroup
	for g := paxosgroup.GroupID(1); g <= groups; g++ {
		appending.Go(func() {
			for s := paxosgroup.Slot(1); s <= each; s++ {
				appendWait(t, l, g, accept(s, 1, "payload"))
			}
		})
	}
	appending.Wait()
	s := l.Stats()
	flushes := s.Flushes - before.Flushes
	t.Logf("%d appends in %d flushes", s.Appends-before.Appends, flushes)
	if flushes*4 > groups*each {
		t.Errorf("%d flushes for %d appends", flushes, groups*each)
	}
}

func TestCallbacksRunInOrder(t *testing.T) {
	l, _ := open(t, Config{Dir: t.TempDir(), SegmentBytes: 16 << 10})
	const count = 3000
	var got []int
	done := make(chan struct{})
	for i := range count {
		rec := accept(paxosgroup.Slot(i+1), 1, "payload")
		if i%3 == 0 {
			rec = chosen(paxosgroup.Slot(i)) // causes no flush, keeps its place
		}
		l.Append(1, []paxosgroup.Record{rec}, func(err error) {
			if err != nil {
				t.Error(err)
			}
			got = append(got, i)
			if len(got) == count {
				close(done)
			}
		})
	}
	<-done
	for i, k := range got {
		if i != k {
			t.Fatalf("callback %d ran as number %d", k, i)
		}
	}
}

func TestChosenAloneCausesNoFlush(t *testing.T) {
	cfg := Config{Dir: t.TempDir()}
	l, _ := open(t, cfg)
	appendWait(t, l, 1, accept(1, 1, "x"), accept(2, 1, "y"))
	before := l.Stats().Flushes
	appendWait(t, l, 1, chosen(1))
	appendWait(t, l, 1, chosen(2))
	if got := l.Stats().Flushes; got != before {
		t.Errorf("%d flushes", got-before)
	}
	l.Close()
	if _, restored := open(t, cfg); restored[1].Chosen != 2 {
		t.Errorf("an orderly stop lost the chosen slot: %d", restored[1].Chosen)
	}
}

func TestReadsSeeWhatIsNotFlushed(t *testing.T) {
	l, _ := open(t, Config{Dir: t.TempDir(), SegmentBytes: 32 << 10})
	held, release := make(chan struct{}), make(chan struct{})
	l.Append(1, []paxosgroup.Record{accept(1, 1, "flushed")}, func(error) { close(held); <-release })
	<-held
	const count = 100 // over several segments
	var failed atomic.Bool
	var flushed sync.WaitGroup
	for s := paxosgroup.Slot(2); s <= count; s++ {
		flushed.Add(1)
		l.Append(1, []paxosgroup.Record{accept(s, 1, fmt.Sprintf("%d %01000d", s, s))}, func(err error) {
			if err != nil {
				failed.Store(true)
			}
			flushed.Done()
		})
		if got := payloads(t, l, 1, s, s); len(got) != 1 || got[0] != fmt.Sprintf("%d %01000d", s, s) {
			t.Fatalf("slot %d reads %q", s, got)
		}
	}
	// Written once more, the later record counts.
	l.Append(1, []paxosgroup.Record{accept(2, 2, "anew")}, func(error) {})
	if got := payloads(t, l, 1, 2, 2); got[0] != "anew" {
		t.Fatalf("slot 2 reads %q", got)
	}
	close(release)
	flushed.Wait()
	if got := payloads(t, l, 1, 1, count+1); failed.Load() || len(got) != count || got[1] != "anew" {
		t.Fatalf("%d slots after the flush", len(got))
	}
}

func TestReadBounds(t *testing.T) {
	l, _ := open(t, Config{Dir: t.TempDir()})
	appendWait(t, l, 1, accept(1, 1, "aaaa"), accept(2, 1, "bbbb"), accept(3, 1, "cccc"), accept(5, 1, "eeee"))
	for _, tc := range []struct {
		name           string
		from, to       paxosgroup.Slot
		maxBytes, want int
	}{
		{"all up to the gap", 1, 9, 100, 3},
		{"at least one, however large", 1, 9, 0, 1},
		{"two fit", 1, 9, 9, 2},
		{"no further than asked", 1, 2, 100, 2},
		{"in the gap", 4, 9, 100, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			entries, err := l.Group(1).Chosen(tc.from, tc.to, tc.maxBytes)
			if err != nil || len(entries) != tc.want {
				t.Fatalf("%d entries, error %v", len(entries), err)
			}
		})
	}
	if entries, err := l.Group(7).Chosen(1, 5, 100); err != nil || entries != nil {
		t.Fatalf("unknown group: %v, %v", entries, err)
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{128, 4096} {
		b.Run(fmt.Sprintf("bytes=%d", size), func(b *testing.B) {
			l, _ := open(b, Config{Dir: b.TempDir()})
			payload := string(make([]byte, size))
			slots := make([]atomic.Uint64, 65)
			var next atomic.Uint64
			before := l.Stats()
			b.SetParallelism(32)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				g := paxosgroup.GroupID(next.Add(1))
				done := make(chan error, 1)
				for pb.Next() {
					l.Append(g, []paxosgroup.Record{accept(paxosgroup.Slot(slots[g].Add(1)), 1, payload)}, func(err error) { done <- err })
					if err := <-done; err != nil {
						b.Error(err)
					}
				}
			})
			b.ReportMetric(float64(l.Stats().Flushes-before.Flushes)/float64(b.N), "flushes/op")
		})
	}
	b.Run("alone", func(b *testing.B) {
		l, _ := open(b, Config{Dir: b.TempDir()})
		slot := paxosgroup.Slot(0)
		for b.Loop() {
			slot++
			appendWait(b, l, 1, accept(slot, 1, "payload"))
		}
	})
}
