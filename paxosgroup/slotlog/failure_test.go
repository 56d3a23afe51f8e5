package slotlog

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"quorate/paxosgroup"
)

func TestNothingIsWrittenAfterAFailedWrite(t *testing.T) {
	cfg := Config{Dir: t.TempDir()}
	l, _ := open(t, cfg)
	appendWait(t, l, 1, accept(1, 1, "kept"))
	// The file goes away beneath the log: the next write fails.
	l.segments[0].file.Close()
	results := make(chan error, 3)
	for s := paxosgroup.Slot(2); s <= 4; s++ {
		l.Append(1, []paxosgroup.Record{accept(s, 1, "lost")}, func(err error) { results <- err })
	}
	for range 3 {
		if err := <-results; !errors.Is(err, os.ErrClosed) {
			t.Fatalf("callback got %v", err)
		}
	}
	if err := l.Close(); !errors.Is(err, os.ErrClosed) {
		t.Fatalf("Close returned %v", err)
	}
	if _, restored := open(t, cfg); len(restored[1].Accepted) != 1 {
		t.Fatalf("restored %d slots, want 1", len(restored[1].Accepted))
	}
}

// smallDisk mounts a file system of the given size, or skips the test.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("mounting a small file system takes root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestFullDisk(t *testing.T) {
	cfg := Config{Dir: filepath.Join(smallDisk(t, "1m"), "log"), SegmentBytes: 256 << 10, RetryInterval: 10 * time.Millisecond}
	l, restored, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if len(restored) != 0 {
		t.Fatal("not empty")
	}
	slot, flushed := fill(t, l)
	// What was flushed is there, and what waits too; nothing more is acknowledged.
	if got := payloads(t, l, 1, 1, slot); len(got) != int(slot) {
		t.Fatalf("%d slots readable, want %d", len(got), slot)
	}
	before := flushed.Load()
	time.Sleep(30 * time.Millisecond)
	if got := flushed.Load(); got != before || got >= int64(slot) {
		t.Fatalf("%d appends are acknowledged of %d, %d before", got, slot, before)
	}
	if err := unix.Mount("", filepath.Dir(cfg.Dir), "", unix.MS_REMOUNT, "size=8m"); err != nil {
		t.Fatal(err)
	}
	slot++
	appendWait(t, l, 1, accept(slot, 1, "goes on"))
	if l.Full() || l.Low() || flushed.Load() != int64(slot)-1 {
		t.Fatalf("full %v, %d of %d acknowledged", l.Full(), flushed.Load(), slot)
	}
	l.Close()
	_, restored = open(t, cfg)
	if got := len(restored[1].Accepted); got != int(slot) {
		t.Fatalf("%d slots restored, want %d", got, slot)
	}
}

// fill appends until the log waits for room and returns how many slots were
// handed in, and the count of those flushed.
func fill(t *testing.T, l *Log) (paxosgroup.Slot, *atomic.Int64) {
	t.Helper()
	var flushed atomic.Int64
	told := false
	for slot := paxosgroup.Slot(1); slot < 1000; slot++ {
		done := make(chan struct{})
		l.Append(1, []paxosgroup.Record{accept(slot, 1, strings.Repeat("x", 10_000))}, func(err error) {
			if err != nil {
				t.Error(err)
			}
			flushed.Add(1)
			close(done)
		})
		select {
		case <-done:
			time.Sleep(2 * time.Millisecond) // for the next segment to be prepared
			told = told || l.Full()
		case <-time.After(200 * time.Millisecond):
			if !told {
				t.Error("Full was not told before the log was full")
			}
			return slot, &flushed
		}
	}
	t.Fatal("the disk never filled")
	return 0, nil
}

// fillToReserve appends until Full says to stop, slowly enough for the log to
// find out in time that there is no room for its next segment.
func fillToReserve(l *Log) (slot paxosgroup.Slot) {
	for !l.Full() {
		slot++
		l.Append(1, []paxosgroup.Record{accept(slot, 1, strings.Repeat("x", 10_000))}, func(error) {})
		time.Sleep(2 * time.Millisecond)
	}
	if !l.Low() {
		panic("full, and yet there is room for the next segment")
	}
	return slot
}

// TestFullDiskEndsByCutting: what is left of the last segment takes the record
// that frees the others.
func TestFullDiskEndsByCutting(t *testing.T) {
	cfg := Config{Dir: filepath.Join(smallDisk(t, "1m"), "log"), SegmentBytes: 256 << 10, RetryInterval: 10 * time.Millisecond}
	l, _ := open(t, cfg)
	slot := fillToReserve(l)
	appendWait(t, l, 1, paxosgroup.Record{Kind: paxosgroup.RecordBase, Base: &paxosgroup.Base{Slot: slot}})
	for range 40 {
		slot++
		appendWait(t, l, 1, accept(slot, 1, strings.Repeat("x", 10_000)))
	}
	if l.Full() {
		t.Fatal("still full")
	}
}

func TestClosedWhileFull(t *testing.T) {
	cfg := Config{Dir: filepath.Join(smallDisk(t, "1m"), "log"), SegmentBytes: 256 << 10, RetryInterval: time.Hour}
	l, _ := open(t, cfg)
	slot := fillToReserve(l)
	results := make(chan error, 100)
	for range cap(results) {
		slot++
		l.Append(1, []paxosgroup.Record{accept(slot, 1, strings.Repeat("x", 10_000))}, func(err error) { results <- err })
	}
	if err := l.Close(); !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), "free some") {
		t.Fatalf("Close returned %v", err)
	}
	acked := 0
	for range cap(results) {
		if err := <-results; err == nil {
			acked++
		} else if !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
	}
	if acked == cap(results) {
		t.Fatal("all were acknowledged")
	}
}

func TestReadOnlyDisk(t *testing.T) {
	disk := smallDisk(t, "1m")
	if err := unix.Mount("", disk, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{disk, filepath.Join(disk, "new")} {
		_, _, err := Open(Config{Dir: dir})
		if !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), dir) {
			t.Errorf("error %v", err)
		}
	}
}

func TestCrowdedWhileTooMuchWaits(t *testing.T) {
	l, _ := open(t, Config{Dir: t.TempDir(), QueueBytesMax: 100_000})
	// The log's goroutine is held in a callback, so nothing leaves the queue.
	held, release := make(chan struct{}), make(chan struct{})
	l.Append(1, []paxosgroup.Record{accept(1, 1, "x")}, func(error) { close(held); <-release })
	<-held
	l.Append(1, []paxosgroup.Record{accept(2, 1, strings.Repeat("x", 90_000))}, func(error) {})
	if l.Crowded(1) {
		t.Error("crowded, with less in the queue than may be")
	}
	// Append waits for nothing all the same.
	l.Append(1, []paxosgroup.Record{accept(3, 1, strings.Repeat("x", 90_000))}, func(error) {})
	l.Append(1, []paxosgroup.Record{accept(4, 1, strings.Repeat("x", 90_000))}, func(error) {})
	if !l.Crowded(1) || l.Full() {
		t.Errorf("crowded %v, full %v", l.Crowded(1), l.Full())
	}
	close(release)
	appendWait(t, l, 1, accept(5, 1, strings.Repeat("x", 500_000)))
	if l.Crowded(1) {
		t.Error("crowded, with an empty queue")
	}
}

func TestEntryLargerThanASegment(t *testing.T) {
	cfg := Config{Dir: t.TempDir(), SegmentBytes: 8 << 10}
	l, _ := open(t, cfg)
	large := strings.Repeat("large ", 10_000)
	appendWait(t, l, 1, accept(1, 1, "before"), accept(2, 1, large), accept(3, 1, "after"))
	l.Close()
	l, restored := open(t, cfg)
	if got := payloads(t, l, 1, 1, 3); len(restored[1].Accepted) != 3 || len(got) != 3 || got[1] != large || got[2] != "after" {
		t.Fatalf("read %d slots", len(got))
	}
}

func TestAppendAfterClose(t *testing.T) {
	l, _ := open(t, Config{Dir: t.TempDir()})
	l.Close()
	done := make(chan error, 1)
	l.Append(1, []paxosgroup.Record{accept(1, 1, "x")}, func(err error) { done <- err })
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Fatalf("callback got %v", err)
	}
}

func TestWildSlotStopsTheLog(t *testing.T) {
	l, _ := open(t, Config{Dir: t.TempDir()})
	done := make(chan error, 1)
	l.Append(1, []paxosgroup.Record{accept(1<<60, 1, "x")}, func(err error) { done <- err })
	if err := <-done; err == nil || !strings.Contains(err.Error(), "too far") {
		t.Fatalf("callback got %v", err)
	}
}
