package runner

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/slotlog"
)

// startDivided starts three replicas with a log in two directories each: groups 1
// and 3 live in the first, 2 in the second.
func startDivided(t *testing.T, groups int) (*cluster, map[paxosgroup.ReplicaID]*faultyFS) {
	c := &cluster{t: t, dir: t.TempDir(), groups: groups}
	disks := map[paxosgroup.ReplicaID]*faultyFS{}
	c.open = func(id paxosgroup.ReplicaID) (diskLog, map[paxosgroup.GroupID]paxosgroup.Restored, error) {
		disks[id] = &faultyFS{}
		s, restored, err := slotlog.OpenSet(slotlog.SetConfig{
			Config: slotlog.Config{SegmentBytes: 1 << 20, FS: disks[id], RetryInterval: 20 * time.Millisecond},
			Dirs:   []string{c.dirOf(id, "a"), c.dirOf(id, "b")},
		})
		if err != nil {
			return nil, nil, err
		}
		return survivor{s}, restored, nil
	}
	c.startAll(3)
	return c, disks
}

func (c *cluster) dirOf(id paxosgroup.ReplicaID, disk string) string {
	return filepath.Join(c.dir, fmt.Sprint(id), disk)
}

// survivor does not tell at Close what stopped a part of it.
type survivor struct{ *slotlog.Set }

func (s survivor) Close() error {
	s.Set.Close()
	return nil
}

// faultyFS is the operating system's, with flushes and allocations that can be
// made to fail in directories of one name.
type faultyFS struct {
	broken, full atomic.Pointer[string]
}

func (*faultyFS) under(name string, dir *atomic.Pointer[string]) bool {
	d := dir.Load()
	return d != nil && strings.Contains(name, "/"+*d+"/")
}

func (f *faultyFS) OpenFile(name string, flag int, perm os.FileMode) (slotlog.File, error) {
	file, err := os.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	return &faultyFile{file, f}, nil
}
func (*faultyFS) Rename(old, new string) error                 { return os.Rename(old, new) }
func (*faultyFS) Remove(name string) error                     { return os.Remove(name) }
func (*faultyFS) MkdirAll(name string, perm os.FileMode) error { return os.MkdirAll(name, perm) }
func (*faultyFS) SyncDir(string) error                         { return nil }
func (*faultyFS) Lock(string) (io.Closer, error)               { return io.NopCloser(nil), nil }

func (*faultyFS) ReadDir(name string) ([]string, error) {
	entries, err := os.ReadDir(name)
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, err
}

type faultyFile struct {
	*os.File
	fs *faultyFS
}

func (f *faultyFile) Sync() error { return f.Datasync() }

func (f *faultyFile) Datasync() error {
	if f.fs.under(f.Name(), &f.fs.broken) {
		return syscall.EIO
	}
	return nil
}

func (f *faultyFile) Allocate(size int64) error {
	if f.fs.under(f.Name(), &f.fs.full) {
		return syscall.ENOSPC
	}
	return f.Truncate(size)
}

func (f *faultyFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func ptr(s string) *string { return &s }

func TestOneDirectoryFails(t *testing.T) {
	t.Parallel()
	c, disks := startDivided(t, 3)
	for g := paxosgroup.GroupID(1); g <= 3; g++ {
		c.proposeMany(g, 0, 10, 5)
		c.awaitEqual(g, 10)
	}
	leader := c.leader(2)
	hit := leader.Status().ID
	n := c.nodes[hit-1]
	disks[hit].broken.Store(ptr("b"))
	// The proposer hears of it, as one who waits and as one who comes later.
	_, err := leader.ProposeAndWait(t.Context(), []byte("lost"))
	for err == nil {
		_, err = leader.ProposeAndWait(t.Context(), []byte("lost"))
	}
	failed, ok := errors.AsType[*FailedError](err)
	if !ok || failed.Group != 2 || !errors.Is(err, ErrUnknownOutcome) || !errors.Is(err, syscall.EIO) {
		t.Errorf("the one that met it: %v", err)
	}
	_, _, err = leader.Propose(t.Context(), []byte("x"))
	if !errors.Is(err, failed) || !errors.Is(err, paxosgroup.ErrNotLeader) || errors.Is(err, ErrUnknownOutcome) {
		t.Errorf("one after it: %v", err)
	}
	if _, err := leader.ReadIndex(t.Context()); !errors.Is(err, failed) {
		t.Errorf("read index: %v", err)
	}
	if err := leader.Restart(t.Context(), paxosgroup.Base{Slot: 99, Membership: c.membership()}); !errors.Is(err, failed) {
		t.Errorf("restart: %v", err)
	}
	if err := leader.Failed(); err == nil || leader.Status().Role == paxosgroup.Leader {
		t.Errorf("failed: %v, %v", err, leader.Status().Role)
	}
	// Another replica leads the group, and this one goes on with the others.
	eventually(t, "another leads group 2", 20*time.Second, func() bool {
		for _, m := range c.nodes {
			if m.id != hit && m.runner.Group(2).Status().Role == paxosgroup.Leader {
				return true
			}
		}
		return false
	})
	c.proposeMany(2, 10, 10, 5)
	for _, g := range []paxosgroup.GroupID{1, 3} {
		c.proposeMany(g, 10, 10, 5)
		c.awaitEqual(g, 20)
		if err := n.runner.Group(g).Failed(); err != nil {
			t.Errorf("group %d: %v", g, err)
		}
	}
	if got, _ := payloads(t, leader); len(got) < 10 {
		t.Errorf("%d entries can be read of the group that failed", len(got))
	}
	// A restart without that disk: it is not begun anew.
	c.stop(int(hit) - 1)
	if err := os.Rename(c.dirOf(hit, "b"), c.dirOf(hit, "away")); err != nil {
		t.Fatal(err)
	}
	c.start(int(hit) - 1)
	n = c.nodes[hit-1]
	if err, ok := errors.AsType[*slotlog.LostError](n.runner.Group(2).Failed()); !ok || err.Dir != c.dirOf(hit, "b") {
		t.Errorf("restarted without it: %v", n.runner.Group(2).Failed())
	}
	if g, err := n.runner.AddGroup(t.Context(), c.groupConfig(7, hit)); err != nil || g.Failed() == nil {
		t.Errorf("a new group is begun with a directory lost: %v", err)
	}
	c.proposeMany(1, 20, 10, 5)
	c.awaitEqual(1, 30)
	if chosen, _ := n.runner.Group(2).Chosen(); chosen != 0 {
		t.Errorf("group 2 has learned up to slot %d without its log", chosen)
	}
	// And with it.
	c.stop(int(hit) - 1)
	if err := os.Rename(c.dirOf(hit, "away"), c.dirOf(hit, "b")); err != nil {
		t.Fatal(err)
	}
	c.start(int(hit) - 1)
	c.awaitEqual(2, 20)
	// When all have failed, Run ends.
	n = c.nodes[hit-1]
	disks[hit].broken.Store(ptr("b"))
	c.proposeMany(2, 20, 1, 1)
	eventually(t, "group 2 fails", 20*time.Second, func() bool { return n.runner.Group(2).Failed() != nil })
	disks[hit].broken.Store(ptr(fmt.Sprint(hit)))
	c.proposeMany(1, 30, 1, 1)
	eventually(t, "all groups fail", 20*time.Second, func() bool {
		return n.runner.Group(1).Failed() != nil && n.runner.Group(3).Failed() != nil
	})
	eventually(t, "the runner stops", 20*time.Second, func() bool {
		_, _, err := n.runner.Group(1).Propose(t.Context(), nil)
		return errors.Is(err, ErrStopped)
	})
	c.stop(int(hit) - 1)
	if !errors.Is(n.runErr, syscall.EIO) {
		t.Errorf("Run: %v", n.runErr)
	}
}

func TestOneDirectoryIsFull(t *testing.T) {
	t.Parallel()
	c, disks := startDivided(t, 2)
	for g := paxosgroup.GroupID(1); g <= 2; g++ {
		c.proposeMany(g, 0, 10, 5)
		c.awaitEqual(g, 10)
	}
	for _, d := range disks {
		d.full.Store(ptr("b"))
	}
	big := strings.Repeat("x", 64<<10)
	eventually(t, "group 2 has no room", 20*time.Second, func() bool {
		for _, n := range c.nodes {
			if _, _, err := n.runner.Group(2).Propose(t.Context(), []byte(big)); errors.Is(err, ErrFull) {
				return true
			}
		}
		return false
	})
	c.proposeMany(1, 10, 20, 10)
	c.awaitEqual(1, 30)
	for _, n := range c.nodes {
		if err := n.runner.Group(2).Failed(); err != nil {
			t.Errorf("replica %d: %v", n.id, err)
		}
	}
	for _, d := range disks {
		d.full.Store(nil)
	}
	c.proposeMany(2, 10, 10, 5)
	c.awaitEqual(2, 20)
}
