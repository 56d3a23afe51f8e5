package slotlog

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
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
	cfg := Config{Dir: filepath.Join(smallDisk(t, "1m"), "log"), SegmentBytes: 256 << 10}
	l, restored, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if len(restored) != 0 {
		t.Fatal("not empty")
	}
	var failure error
	slot := paxosgroup.Slot(0)
	for failure == nil {
		slot++
		done := make(chan error, 1)
		l.Append(1, []paxosgroup.Record{accept(slot, 1, strings.Repeat("x", 10_000))}, func(err error) { done <- err })
		failure = <-done
		if slot > 1000 {
			t.Fatal("the disk never filled")
		}
	}
	if !errors.Is(failure, ErrFull) || !errors.Is(failure, syscall.ENOSPC) || !strings.Contains(failure.Error(), "free some") {
		t.Fatalf("error %v", failure)
	}
	// What was flushed is there, in memory and after a start with room.
	if got := payloads(t, l, 1, 1, slot-1); len(got) != int(slot-1) {
		t.Fatalf("%d slots readable, want %d", len(got), slot-1)
	}
	l.Close()
	if err := unix.Mount("", filepath.Dir(cfg.Dir), "", unix.MS_REMOUNT, "size=8m"); err != nil {
		t.Fatal(err)
	}
	l, restored, err = Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if got := len(restored[1].Accepted); got != int(slot-1) {
		t.Fatalf("%d slots restored, want %d", got, slot-1)
	}
	appendWait(t, l, 1, accept(slot, 1, "goes on"))
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

func TestAppendBlocksWhileTooMuchWaits(t *testing.T) {
	l, _ := open(t, Config{Dir: t.TempDir(), QueueBytesMax: 100_000})
	// The log's goroutine is held in a callback, so nothing leaves the queue.
	held, release := make(chan struct{}), make(chan struct{})
	l.Append(1, []paxosgroup.Record{accept(1, 1, "x")}, func(error) { close(held); <-release })
	<-held
	l.Append(1, []paxosgroup.Record{accept(2, 1, strings.Repeat("x", 90_000))}, func(error) {})
	passed := make(chan struct{})
	var waiting sync.WaitGroup
	waiting.Go(func() {
		l.Append(1, []paxosgroup.Record{accept(3, 1, strings.Repeat("x", 90_000))}, func(error) {})
		close(passed)
	})
	select {
	case <-passed:
		t.Error("Append went on with the queue full")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	waiting.Wait()
	// What is larger than the queue passes alone.
	appendWait(t, l, 1, accept(4, 1, strings.Repeat("x", 500_000)))
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
