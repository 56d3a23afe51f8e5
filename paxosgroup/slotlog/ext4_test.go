package slotlog

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"quorate/paxosgroup"
)

// smallExt4 makes an ext4 file system of the given size in a file, mounts it and
// returns where, or skips the test.
func smallExt4(t *testing.T, size int64) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-m", "0", image).CombinedOutput(); err != nil {
		t.Skipf("mkfs.ext4: %v\n%s", err, out)
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-o", "loop", image, dir).CombinedOutput(); err != nil {
		t.Skipf("mounting a file takes root and a loop device: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestFullExt4 is TestFullDisk on a file system with a journal and extents, where
// allocation, metadata and flushes behave as on a server. What fills the disk here
// is somebody else's file.
func TestFullExt4(t *testing.T) {
	disk := smallExt4(t, 16<<20)
	other := filepath.Join(disk, "other")
	fillWith := func(leave int64) {
		t.Helper()
		var s unix.Statfs_t
		if err := unix.Statfs(disk, &s); err != nil {
			t.Fatal(err)
		}
		err := os.WriteFile(other, make([]byte, int64(s.Bavail)*s.Bsize-leave), 0o600)
		if err != nil && !errors.Is(err, unix.ENOSPC) { // its own metadata takes room, too
			t.Fatal(err)
		}
	}
	fillWith(1 << 20)
	cfg := Config{Dir: filepath.Join(disk, "log"), SegmentBytes: 256 << 10, RetryInterval: 10 * time.Millisecond}
	l, _ := open(t, cfg)
	slot, flushed := fill(t, l)
	if got := payloads(t, l, 1, 1, slot); len(got) != int(slot) {
		t.Fatalf("%d slots readable, want %d", len(got), slot)
	}
	before := flushed.Load()
	time.Sleep(30 * time.Millisecond)
	if got := flushed.Load(); got != before || got >= int64(slot) {
		t.Fatalf("%d appends are acknowledged of %d, %d before", got, slot, before)
	}

	// What was written into files allocated before holds through a restart on the
	// full disk, which may take no more than it has.
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	slot++
	appendWait(t, l, 1, accept(slot, 1, "goes on"))
	if l.Full() || flushed.Load() != int64(slot)-1 {
		t.Fatalf("full %v, %d of %d acknowledged", l.Full(), flushed.Load(), slot)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	fillWith(0)
	l, restored := open(t, cfg)
	if got := len(restored[1].Accepted); got != int(slot) {
		t.Fatalf("%d slots restored on the full disk, want %d", got, slot)
	}
	// Nothing of the log may be damaged by having met the end of the disk.
	for range 20 {
		slot++
		l.Append(1, []paxosgroup.Record{accept(slot, 1, strings.Repeat("x", 10_000))}, func(error) {})
	}
	l.Close()
	report, err := Inspect(cfg.Dir, nil)
	if err != nil || len(report.Damage) > 0 {
		t.Fatalf("%v, %v", report.Damage, err)
	}
}
