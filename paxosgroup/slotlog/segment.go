package slotlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	segmentHeaderBytes = 64 // in a sector of its own
	segmentMagic       = "QUORLOG\n"
	formatVersion      = 2
	segmentSuffix      = ".log"
	unusedSuffix       = ".unused"
	preparedName       = "next.tmp"
	largeName          = "large.tmp"
	lockName           = "LOCK"
	// sealBytes is kept free at the end of a segment for a batch with its seal.
	sealBytes = batchHeaderBytes + recordHeaderBytes
)

// segment is one file of the log.
type segment struct {
	sequence uint64
	size     int64
	file     File  // nil until the writer created it
	live     int64 // bytes of the records that the index points at
}

func segmentName(sequence uint64) string {
	return fmt.Sprintf("%016x%s", sequence, segmentSuffix)
}

func unusedName(sequence uint64) string {
	return fmt.Sprintf("%016x%s", sequence, unusedSuffix)
}

func parseSegmentName(name string) (uint64, bool) {
	digits, ok := strings.CutSuffix(name, segmentSuffix)
	if !ok || len(digits) != 16 {
		return 0, false
	}
	sequence, err := strconv.ParseUint(digits, 16, 64)
	return sequence, err == nil
}

func segmentHeader(sequence uint64, size int64) []byte {
	b := make([]byte, segmentHeaderBytes, sectorBytes)
	copy(b, segmentMagic)
	binary.LittleEndian.PutUint32(b[8:], formatVersion)
	binary.LittleEndian.PutUint64(b[16:], sequence)
	binary.LittleEndian.PutUint64(b[24:], uint64(size))
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	return appendStamped(nil, b, sequence, 0)
}

// checkSegmentHeader says what is wrong with the header of the named file, which
// has the given size and begins with b.
func checkSegmentHeader(b []byte, size int64, name string, sequence uint64) error {
	damaged := func(what string) error {
		return &CorruptError{File: name, What: what}
	}
	if len(b) < sectorBytes {
		return damaged(fmt.Sprintf("the file has only %d bytes", size))
	}
	if string(b[:8]) != segmentMagic {
		return damaged("this is no segment of a slot log")
	}
	// The version comes before the checksum: a later format may place it elsewhere.
	if v := binary.LittleEndian.Uint32(b[8:]); v != formatVersion {
		ours := bytes.Clone(b[:60])
		binary.LittleEndian.PutUint32(ours[8:], formatVersion)
		if binary.LittleEndian.Uint32(b[60:]) == crc32.Checksum(ours, castagnoli) {
			return damaged(fmt.Sprintf("the format version in the segment header has become %d", v))
		}
		return &VersionError{File: name, Version: v}
	}
	if binary.LittleEndian.Uint32(b[60:]) != crc32.Checksum(b[:60], castagnoli) {
		return damaged("the segment header does not match its checksum")
	}
	if !isZero(b[segmentHeaderBytes:sectorData]) {
		return damaged("the sector of the segment header holds more than that")
	}
	if got := binary.LittleEndian.Uint64(b[16:]); got != sequence {
		return damaged(fmt.Sprintf("the file says it is segment %d: it was renamed or copied", got))
	}
	if made := binary.LittleEndian.Uint64(b[24:]); made != uint64(size) || size%sectorBytes != 0 {
		return damaged(fmt.Sprintf("the file has %d bytes and was made with %d", size, made))
	}
	return nil
}

// preparedFile is a segment's file to be, under a name that recovery ignores.
type preparedFile struct {
	file File // nil if there is none
	name string
}

// makeFile makes a file of the given size, all zeros.
func makeFile(files FS, dir, name string, size int64) (preparedFile, error) {
	path := filepath.Join(dir, name)
	f, err := files.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return preparedFile{}, fmt.Errorf("prepare segment: %w", full(err))
	}
	if err := f.Allocate(size); err != nil {
		return preparedFile{}, errors.Join(fmt.Errorf("prepare segment of %d bytes: %w", size, full(err)), f.Close(), files.Remove(path))
	}
	return preparedFile{f, name}, nil
}

// publish makes a prepared file the segment: it writes the header, flushes it and
// gives the file its name.
func (p preparedFile) publish(files FS, dir string, s *segment) error {
	if _, err := p.file.WriteAt(segmentHeader(s.sequence, s.size), 0); err != nil {
		return fmt.Errorf("write header of segment %d: %w", s.sequence, err)
	}
	// A full fsync: the length must not be lost, recovery relies on it.
	if err := p.file.Sync(); err != nil {
		return fmt.Errorf("flush header of segment %d: %w", s.sequence, err)
	}
	path := filepath.Join(dir, segmentName(s.sequence))
	if err := files.Rename(filepath.Join(dir, p.name), path); err != nil {
		return fmt.Errorf("name segment %d: %w", s.sequence, err)
	}
	s.file = p.file
	return files.SyncDir(dir)
}

// readAt reads size bytes at offset of the segment.
func readAt(f File, offset int64, size int) ([]byte, error) {
	from := position(offset)
	b := make([]byte, position(offset+int64(size))-from)
	if n, err := f.ReadAt(b, from); n < len(b) {
		return nil, err
	}
	return strip(b, from)[:size], nil
}

// lockDir makes sure that no other process uses the directory. The lock goes
// with the process, however it ends.
func lockDir(files FS, dir string) (io.Closer, error) {
	lock, err := files.Lock(dir)
	switch {
	case err == nil:
		return lock, nil
	case errors.Is(err, ErrLocked):
		return nil, fmt.Errorf("slot log in %s: another process uses it (stop that sidecar, or give this one its own directory): %w", dir, err)
	case errors.Is(err, unix.EROFS) || errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("slot log in %s cannot be written (mount it read-write, or give this user the directory): %w", dir, err)
	}
	return nil, fmt.Errorf("slot log in %s: %w", dir, full(err))
}
