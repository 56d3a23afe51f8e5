package slotlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"quorate/paxosgroup"
)

const (
	setName          = "SET"
	setNewName       = "SET.new"
	setMagic         = "QUORSET\n"
	setVersion       = 1
	setHeaderBytes   = 44
	setBytesMax      = 16 << 20
	setPathBytesMax  = 4096
	setChecksumBytes = 4
)

// setRecord is what a set's file says: the same in all its directories, but for
// own.
type setRecord struct {
	own        uint32 // number of the directory that it lies in
	id         uint64 // of the set
	generation uint64 // the highest is the newest
	next       uint32 // number that no directory ever had
	dirs       []setDir
	groups     map[paxosgroup.GroupID]uint32 // number of the directory that each lives in
}

type setDir struct {
	number uint32
	ready  bool   // it has had this file since before this was written, and groups may live there
	path   string // as configured when this was written
}

func (r *setRecord) clone() *setRecord {
	c := *r
	c.dirs, c.groups = slices.Clone(r.dirs), maps.Clone(r.groups)
	return &c
}

// groupsOf returns the groups that live in a directory, ascending.
func (r *setRecord) groupsOf(number uint32) []paxosgroup.GroupID {
	var in []paxosgroup.GroupID
	for _, g := range slices.Sorted(maps.Keys(r.groups)) {
		if r.groups[g] == number {
			in = append(in, g)
		}
	}
	return in
}

func (r *setRecord) encode() []byte {
	b := make([]byte, setHeaderBytes)
	copy(b, setMagic)
	binary.LittleEndian.PutUint32(b[8:], setVersion)
	binary.LittleEndian.PutUint32(b[12:], r.own)
	binary.LittleEndian.PutUint64(b[16:], r.id)
	binary.LittleEndian.PutUint64(b[24:], r.generation)
	binary.LittleEndian.PutUint32(b[32:], r.next)
	binary.LittleEndian.PutUint32(b[36:], uint32(len(r.dirs)))
	binary.LittleEndian.PutUint32(b[40:], uint32(len(r.groups)))
	for _, d := range r.dirs {
		b = binary.LittleEndian.AppendUint32(b, d.number)
		b = append(b, 0)
		if d.ready {
			b[len(b)-1] = 1
		}
		b = binary.LittleEndian.AppendUint16(b, uint16(len(d.path)))
		b = append(b, d.path...)
	}
	for _, g := range slices.Sorted(maps.Keys(r.groups)) {
		b = binary.LittleEndian.AppendUint32(b, uint32(g))
		b = binary.LittleEndian.AppendUint32(b, r.groups[g])
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// decodeSet is encode's inverse. It refuses what encode does not make.
func decodeSet(b []byte) (*setRecord, error) {
	if len(b) < setHeaderBytes+setChecksumBytes || string(b[:8]) != setMagic {
		return nil, errors.New("it is no such file, or cut short")
	}
	body := b[:len(b)-setChecksumBytes]
	if crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(b[len(body):]) {
		return nil, errors.New("its checksum does not match")
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != setVersion {
		return nil, fmt.Errorf("it has format version %d and this program knows %d (run the version of quorate that wrote it, or a later one)", v, setVersion)
	}
	r := &setRecord{
		own: binary.LittleEndian.Uint32(b[12:]), id: binary.LittleEndian.Uint64(b[16:]), generation: binary.LittleEndian.Uint64(b[24:]),
		next: binary.LittleEndian.Uint32(b[32:]), groups: make(map[paxosgroup.GroupID]uint32),
	}
	dirs, groups := binary.LittleEndian.Uint32(b[36:]), binary.LittleEndian.Uint32(b[40:])
	rest := body[setHeaderBytes:]
	for range dirs {
		if len(rest) < 7 || len(rest)-7 < int(binary.LittleEndian.Uint16(rest[5:])) {
			return nil, errors.New("a directory is cut short")
		}
		end := 7 + int(binary.LittleEndian.Uint16(rest[5:]))
		r.dirs = append(r.dirs, setDir{binary.LittleEndian.Uint32(rest), rest[4] == 1, string(rest[7:end])})
		rest = rest[end:]
	}
	if len(rest) != 8*int(groups) {
		return nil, errors.New("its length is not that of its groups")
	}
	for ; len(rest) > 0; rest = rest[8:] {
		r.groups[paxosgroup.GroupID(binary.LittleEndian.Uint32(rest))] = binary.LittleEndian.Uint32(rest[4:])
	}
	if !bytes.Equal(r.encode(), b) {
		return nil, errors.New("it says the same twice, or out of order")
	}
	return r, nil
}

// readSet returns what the directory's file says; fs.ErrNotExist if there is
// none.
func readSet(files FS, dir string) (*setRecord, error) {
	path := filepath.Join(dir, setName)
	f, err := files.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if size > setBytesMax {
		return nil, &CorruptError{File: path, What: fmt.Sprintf("it has %d bytes", size)}
	}
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	r, err := decodeSet(b)
	if err != nil {
		return nil, &CorruptError{File: path, What: err.Error()}
	}
	return r, nil
}

// writeSet puts r in place of what the directory's file says, on the disk before
// it returns. When it fails, either may be there.
func writeSet(files FS, dir string, r *setRecord, own uint32) error {
	c := *r
	c.own = own
	path := filepath.Join(dir, setName)
	fail := func(err error) error { return fmt.Errorf("write %s: %w", path, full(err)) }
	f, err := files.OpenFile(filepath.Join(dir, setNewName), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fail(err)
	}
	_, err = f.WriteAt(c.encode(), 0)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fail(err)
	}
	if err := files.Rename(filepath.Join(dir, setNewName), path); err != nil {
		return fail(err)
	}
	if err := files.SyncDir(dir); err != nil {
		return fail(err)
	}
	return nil
}

// refuseSet says why a directory of a set must not be opened alone.
func refuseSet(files FS, dir string) error {
	r, err := readSet(files, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("slot log in %s: %w", dir, err)
	}
	paths := make([]string, len(r.dirs))
	for i, d := range r.dirs {
		paths[i] = d.path
	}
	return fmt.Errorf("slot log in %s is one of several, %q: groups live in the others (name them all in log.dirs, instead of log.dir)", dir, paths)
}
