// Package simdisk is a disk in memory that fails as real ones do, for tests and
// the simulator: it keeps apart what programs see and what would be there after
// a power failure. With the same seed and the same calls it does the same.
//
// What was written and not flushed may, at a power failure, be lost or kept or
// torn, sector by sector: each sector of 512 bytes holds what was flushed or what
// any later write made of it. Names created, changed or removed since the last
// SyncDir survive as a prefix of what was done in that directory, which is what
// journaling file systems give. A file's length is kept with its contents.
package simdisk

import (
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"sync"
	"syscall"

	"quorate/paxosgroup/slotlog"
)

// SectorBytes is what is written whole or not at all.
const SectorBytes = 512

// versionsMax bounds the versions kept of a sector that is not flushed.
const versionsMax = 4

// The operations that a Fault is asked about.
const (
	OpOpen     = "open"
	OpWrite    = "write"
	OpRead     = "read"
	OpSync     = "sync" // Datasync too
	OpAllocate = "allocate"
	OpRename   = "rename"
	OpRemove   = "remove"
	OpSyncDir  = "syncdir"
)

// Disk is a simulated disk with its file system, a slotlog.FS. Its methods may
// be called from any goroutine.
type Disk struct {
	mu    sync.Mutex
	rng   *rand.Rand
	live  int // counts starts: a handle of an earlier one is dead
	now   map[string]*inode
	disk  map[string]*inode // as of the last SyncDir of each directory
	moved []change          // of names, since
	dirs  map[string]bool
	locks map[string]*lock

	fault func(op, name string) error
	space int64 // bytes that files may hold; 0: no limit

	// Syncs counts flushes of files that succeeded.
	syncs uint64
	bytes uint64
}

// change is one change of a directory: gone is no more, and name is now inode.
type change struct {
	gone  string // "" if nothing goes
	name  string // "" if nothing comes
	inode *inode
}

func (c change) apply(names map[string]*inode) {
	delete(names, c.gone)
	if c.name != "" {
		names[c.name] = c.inode
	}
}

func (c change) dir() string {
	if c.name == "" {
		return path.Dir(c.gone)
	}
	return path.Dir(c.name)
}

type inode struct {
	size      int64
	diskSize  int64
	now, disk map[int64][]byte   // by sector; absent: zeros
	dirty     map[int64][][]byte // versions since the last flush, oldest first
	dirtied   []int64            // keys of dirty, in order of first write
	dropped   bool               // a flush failed: now may hold what neither disk nor dirty do
}

func newInode() *inode {
	return &inode{now: map[int64][]byte{}, disk: map[int64][]byte{}, dirty: map[int64][][]byte{}}
}

type lock struct {
	disk *Disk
	name string
	live int
}

// New returns an empty disk whose choices follow from seed.
func New(seed uint64) *Disk {
	return &Disk{
		rng: rand.New(rand.NewPCG(seed, 0x5eed)),
		now: map[string]*inode{}, disk: map[string]*inode{}, dirs: map[string]bool{}, locks: map[string]*lock{},
	}
}

// SetFault has f asked before every operation: an error it returns is what the
// operation fails with. A write that fails may have been done in part; a flush
// that fails has lost what it was to write, or part of it, and the next flush
// succeeds without it. f is called with the disk locked. nil ends it.
func (d *Disk) SetFault(f func(op, name string) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = f
}

// SetSpace bounds what all files together may hold, in bytes; 0 is no bound.
// Above it, allocating and writing beyond a file's end fail with ENOSPC.
func (d *Disk) SetSpace(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.space = n
}

// Syncs returns how many flushes of files succeeded, and Bytes what they wrote.
func (d *Disk) Syncs() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.syncs
}

// Bytes returns how many bytes flushes wrote to the disk, in whole sectors.
func (d *Disk) Bytes() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.bytes
}

// Kill ends the process that uses the disk: locks go, handles are dead, and what
// was written is there, flushed or not.
func (d *Disk) Kill() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kill()
}

func (d *Disk) kill() {
	d.live++
	clear(d.locks)
}

// Crash is a power failure: Kill, and what was not flushed is lost, kept or torn.
func (d *Disk) Crash() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kill()
	kept := 0
	if n := len(d.moved); n > 0 {
		kept = d.rng.IntN(n + 1)
	}
	d.settleNames(func(i int, _ change) bool { return i < kept })
	d.now = make(map[string]*inode, len(d.disk))
	for _, name := range sortedKeys(d.disk) {
		f := d.disk[name]
		f.tear(d.rng)
		d.now[name] = f
	}
}

// settleNames makes durable the changes that keep says, and forgets the others.
func (d *Disk) settleNames(keep func(int, change) bool) {
	for i, c := range d.moved {
		if keep(i, c) {
			c.apply(d.disk)
		}
	}
	d.moved = nil
}

// tear settles what of the unflushed sectors reached the disk.
func (f *inode) tear(rng *rand.Rand) {
	if len(f.dirtied) == 0 && f.size == f.diskSize && !f.dropped {
		return
	}
	// Often a disk does all or nothing; in between it is at its nastiest.
	mood := rng.IntN(4)
	cut := 0
	if n := len(f.dirtied); n > 0 {
		cut = rng.IntN(n + 1)
	}
	for i, s := range f.dirtied {
		versions := f.dirty[s]
		keep := 0 // how many of the versions
		switch mood {
		case 0:
		case 1:
			keep = len(versions)
		case 2:
			if i < cut {
				keep = len(versions)
			}
		case 3:
			keep = rng.IntN(len(versions) + 1)
		}
		if keep > 0 {
			f.disk[s] = versions[keep-1]
		}
	}
	if mood == 1 || mood == 3 && rng.IntN(2) == 0 {
		f.diskSize = f.size
	}
	f.reload()
}

// reload makes what programs see what the disk holds.
func (f *inode) reload() {
	f.size = f.diskSize
	f.dropped = false
	f.now = make(map[int64][]byte, len(f.disk))
	for s, b := range f.disk {
		if s*SectorBytes < f.size {
			f.now[s] = b
		} else {
			delete(f.disk, s)
		}
	}
	f.clean()
}

func (f *inode) clean() {
	clear(f.dirty)
	f.dirtied = f.dirtied[:0]
}

// Lose empties the disk, as if it had been replaced.
func (d *Disk) Lose() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kill()
	clear(d.now)
	clear(d.disk)
	clear(d.dirs)
	d.moved = nil
}

// Image is what a disk holds durably at some time.
type Image struct {
	files map[string]*inode
	dirs  map[string]bool
}

// Image returns what a power failure would leave at least.
func (d *Disk) Image() Image {
	d.mu.Lock()
	defer d.mu.Unlock()
	im := Image{files: map[string]*inode{}, dirs: map[string]bool{}}
	for name, f := range d.disk {
		im.files[name] = f.durable()
	}
	for name := range d.dirs {
		im.dirs[name] = true
	}
	return im
}

func (f *inode) durable() *inode {
	c := newInode()
	c.diskSize = f.diskSize
	for s, b := range f.disk {
		c.disk[s] = b
	}
	c.reload()
	return c
}

// Restore puts an earlier image back: the disk was rolled back.
func (d *Disk) Restore(im Image) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kill()
	clear(d.now)
	clear(d.disk)
	clear(d.dirs)
	d.moved = nil
	for name, f := range im.files {
		c := f.durable()
		d.now[name], d.disk[name] = c, c
	}
	for name := range im.dirs {
		d.dirs[name] = true
	}
}

// Rot flips a bit of a file, as seen and on the disk.
func (d *Disk) Rot(name string, offset int64, bit uint) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.now[path.Clean(name)]
	if f == nil || offset < 0 || offset >= f.size {
		return fmt.Errorf("flip a bit at %d of %s: %w", offset, name, fs.ErrNotExist)
	}
	s := offset / SectorBytes
	flip := func(m map[int64][]byte) {
		b := make([]byte, SectorBytes)
		copy(b, m[s])
		b[offset%SectorBytes] ^= 1 << (bit % 8)
		m[s] = b
	}
	flip(f.now)
	flip(f.disk)
	return nil
}

// Files returns the names of all files, sorted.
func (d *Disk) Files() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return sortedKeys(d.now)
}

// ReadFile returns a file's bytes as a program sees them.
func (d *Disk) ReadFile(name string) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.now[path.Clean(name)]
	if f == nil {
		return nil, notExist("read", name)
	}
	b := make([]byte, f.size)
	f.read(b, 0)
	return b, nil
}

// WriteFile makes a durable file of the given bytes.
func (d *Disk) WriteFile(name string, b []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name = path.Clean(name)
	f := newInode()
	f.size = int64(len(b))
	f.write(b, 0)
	f.flush()
	d.now[name], d.disk[name] = f, f
	d.dirs[path.Dir(name)] = true
}

func sortedKeys(m map[string]*inode) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func notExist(op, name string) error {
	return &fs.PathError{Op: op, Path: name, Err: syscall.ENOENT}
}

// ask returns what the operation is to fail with. Called with mu held.
func (d *Disk) ask(op, name string) error {
	if d.fault != nil {
		if err := d.fault(op, name); err != nil {
			return &fs.PathError{Op: op, Path: name, Err: err}
		}
	}
	return nil
}

// room refuses what would make the files larger than the disk by n more bytes.
// Called with mu held.
func (d *Disk) room(op, name string, n int64) error {
	if d.space == 0 || n <= 0 {
		return nil
	}
	used := n
	for _, f := range d.now {
		used += f.size
	}
	if used > d.space {
		return &fs.PathError{Op: op, Path: name, Err: syscall.ENOSPC}
	}
	return nil
}

// OpenFile implements slotlog.FS.
func (d *Disk) OpenFile(name string, flag int, _ os.FileMode) (slotlog.File, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name = path.Clean(name)
	if err := d.ask(OpOpen, name); err != nil {
		return nil, err
	}
	f := d.now[name]
	switch {
	case f == nil && flag&os.O_CREATE == 0, f == nil && !d.dirs[path.Dir(name)]:
		return nil, notExist("open", name)
	case f != nil && flag&os.O_EXCL != 0:
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EEXIST}
	case f == nil:
		f = newInode()
		d.change(change{name: name, inode: f})
	case flag&os.O_TRUNC != 0:
		// Cutting a file off is not the log's way; an own file is near enough.
		f = newInode()
		d.change(change{name: name, inode: f})
	}
	return &file{disk: d, inode: f, name: name, live: d.live}, nil
}

// change changes a directory. Called with mu held.
func (d *Disk) change(c change) {
	c.apply(d.now)
	d.moved = append(d.moved, c)
}

// Rename implements slotlog.FS.
func (d *Disk) Rename(old, new string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	old, new = path.Clean(old), path.Clean(new)
	if err := d.ask(OpRename, new); err != nil {
		return err
	}
	f := d.now[old]
	if f == nil {
		return notExist("rename", old)
	}
	d.change(change{gone: old, name: new, inode: f})
	return nil
}

// Remove implements slotlog.FS.
func (d *Disk) Remove(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	name = path.Clean(name)
	if d.now[name] == nil {
		return notExist("remove", name)
	}
	if err := d.ask(OpRemove, name); err != nil {
		return err
	}
	d.change(change{gone: name})
	return nil
}

// ReadDir implements slotlog.FS.
func (d *Disk) ReadDir(name string) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name = path.Clean(name)
	if !d.dirs[name] {
		return nil, notExist("readdir", name)
	}
	var names []string
	for _, f := range sortedKeys(d.now) {
		if path.Dir(f) == name {
			names = append(names, path.Base(f))
		}
	}
	return names, nil
}

// MkdirAll implements slotlog.FS. Directories are durable at once.
func (d *Disk) MkdirAll(name string, _ os.FileMode) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name = path.Clean(name); name != "." && name != "/"; name = path.Dir(name) {
		d.dirs[name] = true
	}
	return nil
}

// SyncDir implements slotlog.FS.
func (d *Disk) SyncDir(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	name = path.Clean(name)
	if err := d.ask(OpSyncDir, name); err != nil {
		return err
	}
	var others []change
	d.settleNames(func(_ int, c change) bool {
		if c.dir() == name {
			return true
		}
		others = append(others, c)
		return false
	})
	d.moved = others
	return nil
}

// Lock implements slotlog.FS.
func (d *Disk) Lock(name string) (io.Closer, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name = path.Clean(name)
	if d.locks[name] != nil {
		return nil, slotlog.ErrLocked
	}
	l := &lock{disk: d, name: name, live: d.live}
	d.locks[name] = l
	return l, nil
}

func (l *lock) Close() error {
	l.disk.mu.Lock()
	defer l.disk.mu.Unlock()
	if l.disk.locks[l.name] == l {
		delete(l.disk.locks, l.name)
	}
	return nil
}

// file is an open file.
type file struct {
	disk   *Disk
	inode  *inode
	name   string
	live   int
	closed bool
}

// begin locks the disk for an operation on the file; a nil error owes an Unlock.
func (f *file) begin(op string) error {
	f.disk.mu.Lock()
	err := f.alive(op)
	if err == nil {
		err = f.disk.ask(op, f.name)
	}
	if err != nil {
		f.disk.mu.Unlock()
	}
	return err
}

func (f *file) alive(op string) error {
	if f.closed || f.live != f.disk.live {
		return &fs.PathError{Op: op, Path: f.name, Err: os.ErrClosed}
	}
	return nil
}

func (f *file) Close() error {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if err := f.alive("close"); err != nil {
		return err
	}
	f.closed = true
	return nil
}

func (f *file) ReadAt(b []byte, offset int64) (int, error) {
	if err := f.begin(OpRead); err != nil {
		return 0, err
	}
	defer f.disk.mu.Unlock()
	n := f.inode.read(b, offset)
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (f *inode) read(b []byte, offset int64) int {
	n := int(max(0, min(int64(len(b)), f.size-offset)))
	for at := 0; at < n; {
		s, from := (offset+int64(at))/SectorBytes, int((offset+int64(at))%SectorBytes)
		size := min(n-at, SectorBytes-from)
		if sector := f.now[s]; sector != nil {
			copy(b[at:at+size], sector[from:])
		} else {
			clear(b[at : at+size])
		}
		at += size
	}
	return n
}

func (f *file) WriteAt(b []byte, offset int64) (int, error) {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if err := f.alive(OpWrite); err != nil {
		return 0, err
	}
	err := f.disk.ask(OpWrite, f.name)
	if err == nil {
		err = f.disk.room(OpWrite, f.name, offset+int64(len(b))-f.inode.size)
	}
	if err != nil {
		// Kernels stop between two pages.
		end := offset + int64(f.disk.rng.IntN(len(b)+1))
		b = b[:max(0, end/SectorBytes*SectorBytes-offset)]
		if offset+int64(len(b)) > f.inode.size {
			return 0, err
		}
	}
	f.inode.size = max(f.inode.size, offset+int64(len(b)))
	f.inode.write(b, offset)
	return len(b), err
}

func (f *inode) write(b []byte, offset int64) {
	for len(b) > 0 {
		s, from := offset/SectorBytes, int(offset%SectorBytes)
		sector := make([]byte, SectorBytes) // never changed once it is made
		copy(sector, f.now[s])
		n := copy(sector[from:], b)
		f.now[s] = sector
		versions := f.dirty[s]
		if len(versions) == 0 {
			f.dirtied = append(f.dirtied, s)
		}
		if len(versions) == versionsMax {
			versions = versions[1:]
		}
		f.dirty[s] = append(versions, sector)
		b = b[n:]
		offset += int64(n)
	}
}

func (f *file) Sync() error { return f.Datasync() }

func (f *file) Datasync() error {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if err := f.alive(OpSync); err != nil {
		return err
	}
	if err := f.disk.ask(OpSync, f.name); err != nil {
		// The pages are clean from now on, whatever became of them.
		for _, s := range f.inode.dirtied {
			if versions := f.inode.dirty[s]; f.disk.rng.IntN(2) == 0 {
				f.inode.disk[s] = versions[f.disk.rng.IntN(len(versions))]
			}
		}
		f.inode.clean()
		f.inode.dropped = true
		return err
	}
	f.disk.syncs++
	f.disk.bytes += uint64(len(f.inode.dirtied)) * SectorBytes
	f.inode.flush()
	return nil
}

func (f *inode) flush() {
	for _, s := range f.dirtied {
		f.disk[s] = f.now[s]
	}
	f.diskSize = f.size
	f.clean()
}

func (f *file) Allocate(size int64) error {
	if err := f.begin(OpAllocate); err != nil {
		return err
	}
	defer f.disk.mu.Unlock()
	if err := f.disk.room(OpAllocate, f.name, size-f.inode.size); err != nil {
		return err
	}
	f.inode.size = max(f.inode.size, size)
	return nil
}

func (f *file) Size() (int64, error) {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if err := f.alive("stat"); err != nil {
		return 0, err
	}
	return f.inode.size, nil
}
