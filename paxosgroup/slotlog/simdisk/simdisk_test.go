package simdisk

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"slices"
	"syscall"
	"testing"

	"quorate/paxosgroup/slotlog"
)

// made returns a disk with a durable file of n sectors, all of byte 'a'.
func made(t *testing.T, seed uint64, n int) (*Disk, slotlog.File) {
	t.Helper()
	d := New(seed)
	if err := d.MkdirAll("dir", 0o700); err != nil {
		t.Fatal(err)
	}
	f := create(t, d, "dir/f")
	write(t, f, sectors('a', n), 0)
	if err := errors.Join(f.Sync(), d.SyncDir("dir")); err != nil {
		t.Fatal(err)
	}
	return d, f
}

func create(t *testing.T, d *Disk, name string) slotlog.File {
	t.Helper()
	f, err := d.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func write(t *testing.T, f slotlog.File, b []byte, at int64) {
	t.Helper()
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

func sectors(c byte, n int) []byte { return bytes.Repeat([]byte{c}, n*SectorBytes) }

// marks returns the byte that each sector of a file is full of: a sector of two
// kinds fails the test.
func marks(t *testing.T, d *Disk, name string) string {
	t.Helper()
	b, err := d.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var s []byte
	for len(b) > 0 {
		if !bytes.Equal(b[:SectorBytes], sectors(b[0], 1)) {
			t.Fatalf("a sector of %s was written in part", name)
		}
		s = append(s, b[0])
		b = b[SectorBytes:]
	}
	return string(s)
}

// TestCrashLosesOnlyWhatWasNotFlushed: whatever the seed, what was flushed is
// there, and each sector written since holds the old or one of the new contents.
// Over many seeds all of these come up, in every combination of two sectors.
func TestCrashLosesOnlyWhatWasNotFlushed(t *testing.T) {
	outcomes := make(map[string]int)
	for seed := range uint64(500) {
		d, f := made(t, seed, 6)
		write(t, f, sectors('b', 2), 0)
		if err := f.Datasync(); err != nil {
			t.Fatal(err)
		}
		write(t, f, sectors('c', 2), 2*SectorBytes)
		write(t, f, sectors('d', 1), 3*SectorBytes)
		d.Crash()
		got := marks(t, d, "dir/f")
		if got[:2] != "bb" || got[4:] != "aa" {
			t.Fatalf("seed %d: %q", seed, got)
		}
		outcomes[got[2:4]]++
	}
	for _, want := range []string{"aa", "ca", "ac", "ad", "cc", "cd"} {
		if outcomes[want] == 0 {
			t.Errorf("%q never came up: %v", want, outcomes)
		}
		delete(outcomes, want)
	}
	if len(outcomes) > 0 {
		t.Errorf("what nobody wrote: %v", outcomes)
	}
}

// TestKillLosesNothing: a process that ends leaves its pages to the kernel.
func TestKillLosesNothing(t *testing.T) {
	d, f := made(t, 1, 2)
	write(t, f, sectors('b', 1), 0)
	d.Kill()
	if got := marks(t, d, "dir/f"); got != "ba" {
		t.Errorf("%q", got)
	}
	if _, err := f.WriteAt(sectors('c', 1), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a dead handle writes: %v", err)
	}
	if err := f.Datasync(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a dead handle flushes: %v", err)
	}
	// But they are not flushed by that: a later power failure may take them.
	lost := false
	for seed := range uint64(50) {
		d, f := made(t, seed, 2)
		write(t, f, sectors('b', 1), 0)
		d.Kill()
		d.Crash()
		lost = lost || marks(t, d, "dir/f") == "aa"
	}
	if !lost {
		t.Error("what was not flushed survives every power failure")
	}
}

// TestFailedFlushDropsPages: the next flush succeeds without what the failed one
// was to write, while programs go on seeing it.
func TestFailedFlushDropsPages(t *testing.T) {
	dropped := false
	for seed := range uint64(50) {
		d, f := made(t, seed, 1)
		d.SetFault(func(op, _ string) error {
			if op == OpSync {
				return syscall.EIO
			}
			return nil
		})
		write(t, f, sectors('b', 1), 0)
		if err := f.Datasync(); !errors.Is(err, syscall.EIO) {
			t.Fatalf("flush: %v", err)
		}
		d.SetFault(nil)
		if err := f.Datasync(); err != nil {
			t.Fatal(err)
		}
		if got := marks(t, d, "dir/f"); got != "b" {
			t.Fatalf("seed %d: seen as %q before the power failure", seed, got)
		}
		d.Crash()
		dropped = dropped || marks(t, d, "dir/f") == "a"
	}
	if !dropped {
		t.Error("a retried flush made everything durable, for every seed")
	}
}

// TestNamesSurviveInOrder: of the changes of a directory since SyncDir a prefix
// survives; those before it all do.
func TestNamesSurviveInOrder(t *testing.T) {
	outcomes := make(map[string]int)
	for seed := range uint64(200) {
		d, _ := made(t, seed, 1)
		create(t, d, "dir/one")
		if err := d.Rename("dir/one", "dir/two"); err != nil {
			t.Fatal(err)
		}
		if err := d.Remove("dir/f"); err != nil {
			t.Fatal(err)
		}
		d.Crash()
		names, err := d.ReadDir("dir")
		if err != nil {
			t.Fatal(err)
		}
		outcomes[string(bytes.Join(toBytes(names), []byte(" ")))]++
	}
	for _, want := range []string{"f", "f one", "f two", "two"} {
		if outcomes[want] == 0 {
			t.Errorf("%q never came up: %v", want, outcomes)
		}
	}
	if len(outcomes) != 4 {
		t.Errorf("no prefix of what was done: %v", outcomes)
	}
}

func toBytes(names []string) (b [][]byte) {
	slices.Sort(names)
	for _, n := range names {
		b = append(b, []byte(n))
	}
	return b
}

func TestSyncDirKeepsNamesOfItsDirectoryAlone(t *testing.T) {
	d, _ := made(t, 3, 1)
	if err := d.MkdirAll("other", 0o700); err != nil {
		t.Fatal(err)
	}
	create(t, d, "other/lost")
	create(t, d, "dir/kept")
	if err := d.SyncDir("dir"); err != nil {
		t.Fatal(err)
	}
	if got := d.Image(); got.files["dir/kept"] == nil || got.files["other/lost"] != nil {
		t.Errorf("durable: %v", sortedKeys(got.files))
	}
}

func TestSpaceAndLocks(t *testing.T) {
	d, f := made(t, 1, 4)
	d.SetSpace(6 * SectorBytes)
	if err := f.Allocate(6 * SectorBytes); err != nil {
		t.Fatal(err)
	}
	if err := f.Allocate(7 * SectorBytes); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("allocate more: %v", err)
	}
	write(t, f, sectors('b', 6), 0) // what was allocated can be written
	if err := create(t, d, "dir/g").Allocate(1); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("another file: %v", err)
	}
	lock, err := d.Lock("dir")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Lock("dir"); !errors.Is(err, slotlog.ErrLocked) {
		t.Errorf("second lock: %v", err)
	}
	d.Kill()
	next, err := d.Lock("dir")
	if err != nil {
		t.Fatalf("after the process: %v", err)
	}
	lock.Close() // of the dead
	if _, err := d.Lock("dir"); !errors.Is(err, slotlog.ErrLocked) {
		t.Errorf("the dead gave back the lock of the living: %v", err)
	}
	next.Close()
}

func TestRotLoseRestore(t *testing.T) {
	d, f := made(t, 1, 1)
	image := d.Image()
	if err := d.Rot("dir/f", 5, 0); err != nil {
		t.Fatal(err)
	}
	d.Crash()
	b, err := d.ReadFile("dir/f")
	if err != nil || b[5] != 'a'^1 || b[4] != 'a' {
		t.Errorf("rot: %q, %v", b[:8], err)
	}
	d.Lose()
	if _, err := d.ReadDir("dir"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a lost disk: %v", err)
	}
	d.Restore(image)
	if got := marks(t, d, "dir/f"); got != "a" {
		t.Errorf("restored %q", got)
	}
	if _, err := f.WriteAt(nil, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a handle of the old disk: %v", err)
	}
}

func TestSameSeedSameCrash(t *testing.T) {
	crash := func() string {
		d, f := made(t, 42, 20)
		write(t, f, sectors('b', 20), 0)
		d.Crash()
		return marks(t, d, "dir/f")
	}
	if a, b := crash(), crash(); a != b {
		t.Errorf("%q and %q", a, b)
	}
}
