package slotlog_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path"
	"strings"
	"syscall"
	"testing"

	"quorate/paxosgroup"
	"quorate/paxosgroup/slotlog"
	"quorate/paxosgroup/slotlog/simdisk"
)

// mounts is a file system of several disks, each at a path of one element.
type mounts map[string]*simdisk.Disk

func (m mounts) at(name string) (slotlog.FS, error) {
	top := "/" + strings.SplitN(strings.TrimPrefix(path.Clean(name), "/"), "/", 2)[0]
	if d := m[top]; d != nil {
		return d, nil
	}
	return nil, &os.PathError{Op: "look for", Path: name, Err: syscall.ENOENT}
}

func (m mounts) OpenFile(name string, flag int, perm os.FileMode) (slotlog.File, error) {
	d, err := m.at(name)
	if err != nil {
		return nil, err
	}
	return d.OpenFile(name, flag, perm)
}

func (m mounts) Rename(old, new string) error {
	d, err := m.at(old)
	if err != nil {
		return err
	}
	return d.Rename(old, new)
}

func (m mounts) Remove(name string) error {
	d, err := m.at(name)
	if err != nil {
		return err
	}
	return d.Remove(name)
}

func (m mounts) ReadDir(name string) ([]string, error) {
	d, err := m.at(name)
	if err != nil {
		return nil, err
	}
	return d.ReadDir(name)
}

func (m mounts) MkdirAll(name string, perm os.FileMode) error {
	d, err := m.at(name)
	if err != nil {
		return err
	}
	return d.MkdirAll(name, perm)
}

func (m mounts) SyncDir(name string) error {
	d, err := m.at(name)
	if err != nil {
		return err
	}
	return d.SyncDir(name)
}

func (m mounts) Lock(name string) (io.Closer, error) {
	d, err := m.at(name)
	if err != nil {
		return nil, err
	}
	return d.Lock(name)
}

// disks returns n empty ones, and the directories on them.
func disks(n int, seed uint64) (mounts, []string) {
	m, dirs := mounts{}, []string{}
	for i := range n {
		top := "/" + string(rune('a'+i))
		m[top] = simdisk.New(seed + uint64(i))
		dirs = append(dirs, top+"/log")
	}
	return m, dirs
}

func (m mounts) kill() {
	for _, d := range m {
		d.Kill()
	}
}

func setConfig(m mounts, dirs ...string) slotlog.SetConfig {
	return slotlog.SetConfig{
		Config: slotlog.Config{SegmentBytes: 8 << 10, FS: m, Manual: true},
		Dirs:   dirs, Draw: func() uint64 { return 42 },
	}
}

// openSet opens a set as a new process does.
func openSet(t testing.TB, m mounts, dirs ...string) (*slotlog.Set, map[paxosgroup.GroupID]paxosgroup.Restored) {
	t.Helper()
	m.kill()
	s, restored, err := slotlog.OpenSet(setConfig(m, dirs...))
	if err != nil {
		t.Fatal(err)
	}
	return s, restored
}

func promise(counter uint64) []paxosgroup.Record {
	return []paxosgroup.Record{{Kind: paxosgroup.RecordPromise, Ballot: paxosgroup.Ballot{Counter: counter, Replica: 1}}}
}

// keep appends a promise of each group and flushes.
func keep(t testing.TB, s manual, groups ...paxosgroup.GroupID) {
	t.Helper()
	for _, g := range groups {
		s.Append(g, promise(uint64(g)), func(err error) {
			if err != nil {
				t.Errorf("group %d: %v", g, err)
			}
		})
	}
	s.Flush()
}

// homes returns which groups have their last record in which directory.
func homes(m mounts, dirs []string, groups ...paxosgroup.GroupID) map[paxosgroup.GroupID]string {
	at := map[paxosgroup.GroupID]string{}
	for i, dir := range dirs {
		rest := mounts{}
		for j, other := range dirs {
			if top := "/" + strings.Split(other, "/")[1]; i != j {
				rest[top] = m[top]
			}
		}
		m.kill()
		s, _, err := slotlog.OpenSet(setConfig(rest, dirs...))
		if err != nil {
			panic(err)
		}
		for _, g := range groups {
			if s.Lost(g) != nil {
				at[g] = dir
			}
		}
		s.Close()
	}
	return at
}

func TestSetSpreadsGroups(t *testing.T) {
	m, dirs := disks(3, 1)
	s, _ := openSet(t, m, dirs...)
	all := []paxosgroup.GroupID{1, 2, 3, 4, 5, 6, 7}
	if err := s.Place(all[:4]...); err != nil {
		t.Fatal(err)
	}
	keep(t, s, all...) // those not placed are, as they come
	want := map[paxosgroup.GroupID]string{1: dirs[0], 2: dirs[1], 3: dirs[2], 4: dirs[0], 5: dirs[1], 6: dirs[2], 7: dirs[0]}
	if got := homes(m, dirs, all...); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("groups live in %v, want %v", got, want)
	}
	s, restored := openSet(t, m, dirs...)
	for _, g := range all {
		if got := restored[g].Promised.Counter; got != uint64(g) {
			t.Errorf("group %d: promised %d", g, got)
		}
	}
	// Each has a flush of its own.
	before := map[string]uint64{}
	for top, d := range m {
		before[top] = d.Syncs()
	}
	keep(t, s, 2)
	for top, d := range m {
		if got := d.Syncs() - before[top]; got != map[string]uint64{"/b": 1}[top] {
			t.Errorf("%s was flushed %d times", top, got)
		}
	}
}

func TestSetWithoutOneDirectory(t *testing.T) {
	for _, tc := range []struct {
		name string
		lose func(t *testing.T, m mounts, dir string) (back func())
		says string
	}{
		{"not mounted", func(_ *testing.T, m mounts, _ string) func() {
			d := m["/b"]
			delete(m, "/b")
			return func() { m["/b"] = d }
		}, "empty, or not mounted"},
		{"an empty directory in its place", func(_ *testing.T, m mounts, dir string) func() {
			d := m["/b"]
			m["/b"] = simdisk.New(9)
			m["/b"].MkdirAll(dir, 0o700)
			return func() { m["/b"] = d }
		}, "empty, or not mounted"},
		{"unreadable", func(_ *testing.T, m mounts, _ string) func() {
			m["/b"].SetFault(func(op, _ string) error { return syscall.EIO })
			return func() { m["/b"].SetFault(nil) }
		}, "input/output error"},
		{"its file of the set torn", func(t *testing.T, m mounts, dir string) func() {
			rot(t, m["/b"], dir+"/SET")
			return func() { rot(t, m["/b"], dir+"/SET") }
		}, "checksum"},
		{"its log damaged", func(t *testing.T, m mounts, dir string) func() {
			rot(t, m["/b"], dir+"/0000000000000001.log")
			return func() { rot(t, m["/b"], dir+"/0000000000000001.log") }
		}, "slot log is damaged"},
		{"its log gone", func(t *testing.T, m mounts, dir string) func() {
			m.kill()
			im := m["/b"].Image()
			if err := m["/b"].Remove(dir + "/0000000000000001.log"); err != nil {
				t.Fatal(err)
			}
			return func() { m["/b"].Restore(im) }
		}, "files of the log are gone"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, dirs := disks(2, 1)
			s, _ := openSet(t, m, dirs...)
			keep(t, s, 1, 2, 3) // 2 lives in the second
			back := tc.lose(t, m, dirs[1])
			s, restored := openSet(t, m, dirs...)
			if _, found := restored[2]; found || len(restored) != 2 {
				t.Errorf("restored %v", restored)
			}
			lost, ok := errors.AsType[*slotlog.LostError](s.Lost(2))
			if !ok || lost.Dir != dirs[1] || !strings.Contains(lost.Error(), tc.says) {
				t.Errorf("group 2: %v, want %q", s.Lost(2), tc.says)
			}
			var of map[paxosgroup.GroupID]error = map[paxosgroup.GroupID]error{2: nil, 4: nil}
			for g := range of {
				s.Append(g, promise(9), func(err error) { of[g] = err })
				if _, ok := errors.AsType[*slotlog.LostError](of[g]); !ok {
					t.Errorf("append to group %d: %v", g, of[g])
				}
				if _, ok := errors.AsType[*slotlog.LostError](s.Place(g)); !ok {
					t.Errorf("place group %d: %v", g, s.Place(g))
				}
			}
			if _, err := s.Group(2).Chosen(1, 1, 1); err == nil {
				t.Error("group 2 is read")
			}
			keep(t, s, 1, 3)
			if s.Lost(1) != nil || s.Lost(3) != nil {
				t.Errorf("groups 1 and 3: %v, %v", s.Lost(1), s.Lost(3))
			}
			m.kill()
			back()
			s, restored = openSet(t, m, dirs...)
			if len(restored) != 3 {
				t.Errorf("restored %v when it is back", restored)
			}
			keep(t, s, 1, 2, 3, 4)
		})
	}
}

func rot(t *testing.T, d *simdisk.Disk, name string) {
	t.Helper()
	if err := d.Rot(name, 24, 3); err != nil {
		t.Fatal(err)
	}
}

func TestSetOfOtherDirectories(t *testing.T) {
	made := func(t *testing.T) (mounts, []string) {
		m, dirs := disks(3, 1)
		s, _ := openSet(t, m, dirs[:2]...)
		keep(t, s, 1, 2)
		m.kill()
		return m, dirs
	}
	refused := func(t *testing.T, m mounts, says string, dirs ...string) {
		t.Helper()
		m.kill()
		if _, _, err := slotlog.OpenSet(setConfig(m, dirs...)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v: %v, want %q", dirs, err, says)
		}
	}
	t.Run("one that holds groups must stay", func(t *testing.T) {
		m, dirs := made(t)
		refused(t, m, "/b/log is not named any more, and groups [2] live there", dirs[0])
		refused(t, m, "/b/log is not named any more", dirs[0], dirs[2])
	})
	t.Run("one is added, and goes while it is empty", func(t *testing.T) {
		m, dirs := made(t)
		openSet(t, m, dirs...)
		s, restored := openSet(t, m, dirs[:2]...)
		if len(restored) != 2 {
			t.Errorf("restored %v", restored)
		}
		keep(t, s, 3) // does not know the third any more
		refused(t, m, "/c/log was taken out of the set", dirs...)
		m["/c"].Lose()
		s, _ = openSet(t, m, dirs[2], dirs[0], dirs[1])
		keep(t, s, 4)
		if got := homes(m, []string{dirs[2], dirs[0], dirs[1]}, 3, 4); got[3] != dirs[0] || got[4] != dirs[2] {
			t.Errorf("groups live in %v", got)
		}
	})
	t.Run("not added while another is lost", func(t *testing.T) {
		m, dirs := made(t)
		d := m["/b"]
		delete(m, "/b")
		refused(t, m, "is new, and another one is lost", dirs...)
		m["/b"] = d
		if _, restored := openSet(t, m, dirs...); len(restored) != 2 {
			t.Errorf("restored %v", restored)
		}
	})
	t.Run("under other paths", func(t *testing.T) {
		m, dirs := made(t)
		m["/a"], m["/b"] = m["/b"], m["/a"]
		moveDir(t, m["/a"], "/b/log", "/a/log")
		moveDir(t, m["/b"], "/a/log", "/b/log")
		if _, restored := openSet(t, m, dirs[:2]...); len(restored) != 2 {
			t.Errorf("restored %v", restored)
		}
	})
	t.Run("a copy", func(t *testing.T) {
		m, dirs := made(t)
		m["/c"].Restore(m["/a"].Image())
		moveDir(t, m["/c"], "/a/log", "/c/log")
		refused(t, m, "one is a copy", dirs...)
	})
	t.Run("a log that was alone", func(t *testing.T) {
		m, dirs := disks(2, 1)
		l, _, err := slotlog.Open(slotlog.Config{Dir: dirs[1], SegmentBytes: 8 << 10, FS: m, Manual: true})
		if err != nil {
			t.Fatal(err)
		}
		keep(t, l, 1, 2)
		s, restored := openSet(t, m, dirs...)
		if len(restored) != 2 {
			t.Errorf("restored %v", restored)
		}
		keep(t, s, 3)
		if got := homes(m, dirs, 1, 2, 3); got[1] != dirs[1] || got[2] != dirs[1] || got[3] != dirs[0] {
			t.Errorf("groups live in %v", got)
		}
		m.kill()
		if _, _, err := slotlog.Open(slotlog.Config{Dir: dirs[1], FS: m, Manual: true}); err == nil || !strings.Contains(err.Error(), "is one of several") {
			t.Errorf("opened alone: %v", err)
		}
	})
	t.Run("what the making left behind, once another took its place", func(t *testing.T) {
		m, dirs := disks(2, 1)
		named := 0
		m["/a"].SetFault(func(op, name string) error {
			if op == simdisk.OpRename && path.Base(name) == "SET" {
				if named++; named == 2 { // both have it, and neither knows of the other
					return syscall.EIO
				}
			}
			return nil
		})
		if _, _, err := slotlog.OpenSet(setConfig(m, dirs...)); err == nil {
			t.Fatal("made in spite of a failure")
		}
		m["/a"].SetFault(nil)
		behind := m["/b"]
		m["/b"] = simdisk.New(9)
		s, _ := openSet(t, m, dirs...)
		keep(t, s, 1, 2)
		m["/b"] = behind
		refused(t, m, "/b/log was taken out of the set", dirs...)
	})
	t.Run("in use", func(t *testing.T) {
		m, dirs := made(t)
		openSet(t, m, dirs[:2]...)
		if _, _, err := slotlog.OpenSet(setConfig(m, dirs[:2]...)); !errors.Is(err, slotlog.ErrLocked) {
			t.Errorf("opened twice: %v", err)
		}
	})
}

// moveDir gives the files of a directory other names.
func moveDir(t *testing.T, d *simdisk.Disk, from, to string) {
	t.Helper()
	d.Kill()
	d.MkdirAll(to, 0o700)
	for _, name := range d.Files() {
		if err := d.Rename(name, to+"/"+path.Base(name)); path.Dir(name) == from && err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(d.SyncDir(from), d.SyncDir(to)); err != nil {
		t.Fatal(err)
	}
}

func TestSetFillsOneDisk(t *testing.T) {
	m, dirs := disks(2, 1)
	s, _ := openSet(t, m, dirs...)
	keep(t, s, 1, 2)
	m["/b"].SetSpace(1)
	for n := uint64(0); !s.Full(); n++ {
		if n == 1000 {
			t.Fatal("never full")
		}
		for _, g := range []paxosgroup.GroupID{1, 2} {
			ballot := paxosgroup.Ballot{Counter: 9, Replica: 1}
			s.Append(g, []paxosgroup.Record{{Kind: paxosgroup.RecordAccept, Slot: paxosgroup.Slot(n + 1), Ballot: ballot,
				Entry: paxosgroup.Entry{Kind: paxosgroup.KindData, Term: ballot, Number: 1, Region: "r"}}}, func(error) {})
		}
		s.Flush()
	}
	if s.FullFor(1) || !s.FullFor(2) || s.Lost(2) != nil {
		t.Errorf("full %v and %v, lost: %v", s.FullFor(1), s.FullFor(2), s.Lost(2))
	}
	m["/b"].SetSpace(0)
	s.Flush()
	if s.Full() || s.FullFor(2) {
		t.Error("full for ever")
	}
}

// TestSetCutShort ends the making of a set, and the beginning of a group in it,
// at every operation, with a failure or by losing power, and then takes either
// disk away: what was acknowledged is there, or known to be lost.
func TestSetCutShort(t *testing.T) {
	for seed := range uint64(8) {
		for at, done := 0, false; !done; at++ {
			m, dirs := disks(2, seed)
			ops := 0
			broken := false
			fault := func(op, _ string) error {
				ops++
				if ops > at && seed%2 == 0 || ops == at+1 {
					broken = true
					return syscall.EIO
				}
				return nil
			}
			for _, d := range m {
				d.SetFault(fault)
			}
			acked := map[paxosgroup.GroupID]bool{}
			if s, _, err := slotlog.OpenSet(setConfig(m, dirs...)); err == nil {
				for _, g := range []paxosgroup.GroupID{1, 2, 3} {
					s.Append(g, promise(uint64(g)), func(err error) { acked[g] = err == nil })
					s.Flush()
				}
			}
			done = !broken
			for _, d := range m {
				d.SetFault(nil)
				d.Crash()
			}
			where := fmt.Sprintf("seed %d, operation %d, acknowledged %v", seed, at, acked)
			_, restored, err := slotlog.OpenSet(setConfig(m, dirs...))
			if err != nil {
				t.Fatalf("%s: %v", where, err)
			}
			for g, ok := range acked {
				if ok && restored[g].Promised.Counter != uint64(g) {
					t.Errorf("%s: group %d restored as %v", where, g, restored[g])
				}
			}
			for _, top := range []string{"/a", "/b"} {
				m.kill()
				s, left, err := slotlog.OpenSet(setConfig(mounts{top: m[top]}, dirs...))
				if err != nil {
					if len(restored) != 0 {
						t.Errorf("%s: with %s alone: %v", where, top, err)
					}
					continue
				}
				for g, ok := range acked {
					if _, here := left[g]; ok && !here && s.Place(g) == nil {
						t.Errorf("%s: with %s alone, group %d is begun anew", where, top, g)
					}
				}
			}
			if t.Failed() {
				return
			}
		}
	}
}

// TestSetUnderFaults is TestNothingAcknowledgedIsLost with a set: disks fail,
// crash and are away for a while, one by one.
func TestSetUnderFaults(t *testing.T) {
	seeds := min(*simSeeds, 40)
	for seed := uint64(1); seed <= seeds; seed++ {
		w := newSetWorld(t, seed)
		w.run()
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

type setWorld struct {
	world
	disks mounts
	dirs  []string
	set   *slotlog.Set
}

func newSetWorld(t *testing.T, seed uint64) *setWorld {
	w := &setWorld{world: world{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 2))}}
	w.disks, w.dirs = disks(3, seed)
	for range 6 {
		w.groups = append(w.groups, &model{slots: map[paxosgroup.Slot]*cell{}, promised: []paxosgroup.Ballot{{}}, base: []paxosgroup.Slot{0}})
	}
	return w
}

func (w *setWorld) run() {
	w.reopen("")
	for range 300 {
		switch n := w.rng.IntN(100); {
		case n < 55:
			w.append()
		case n < 92:
			w.set.Flush()
		case n < 95:
			// One disk fails, and the others do not notice.
			d := w.disks["/"+string(rune('a'+w.rng.IntN(3)))]
			op := []string{simdisk.OpWrite, simdisk.OpSync}[w.rng.IntN(2)]
			d.SetFault(func(o, _ string) error {
				if o == op {
					return syscall.EIO
				}
				return nil
			})
			for range 8 {
				w.append()
				w.set.Flush()
			}
			w.reopen("")
		case n < 98:
			w.reopen("")
		default:
			w.reopen("/" + string(rune('a'+w.rng.IntN(3))))
			w.reopen("")
		}
		if w.t.Failed() {
			return
		}
	}
}

// reopen loses power and opens the set again, with one disk away.
func (w *setWorld) reopen(away string) {
	there := mounts{}
	for _, top := range []string{"/a", "/b", "/c"} {
		d := w.disks[top]
		d.SetFault(nil)
		d.Crash()
		if top != away {
			there[top] = d
		}
	}
	set, restored, err := slotlog.OpenSet(setConfig(there, w.dirs...))
	if err != nil {
		w.t.Fatalf("seed %d: %v", w.seed, err)
	}
	w.set, w.log, w.err = set, set, nil
	for g, m := range w.groups {
		id := paxosgroup.GroupID(g + 1)
		if lost := set.Lost(id); lost == nil {
			m.check(w.t, set, w.seed, g, restored[id])
		} else if _, found := restored[id]; found || away == "" || !strings.HasPrefix(lost.(*slotlog.LostError).Dir, away) {
			w.t.Errorf("seed %d: without %q group %d is lost: %v", w.seed, away, id, lost)
		}
	}
}
