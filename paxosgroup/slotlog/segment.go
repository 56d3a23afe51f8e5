package slotlog

import (
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
	segmentHeaderBytes = 64
	segmentMagic       = "QUORLOG\n"
	formatVersion      = 1
	segmentSuffix      = ".log"
	preparedName       = "next.tmp"
	lockName           = "LOCK"
	// sealBytes is kept free at the end of a segment for a batch with its seal.
	sealBytes = batchHeaderBytes + recordHeaderBytes + batchAlign
)

// segment is one file of the log.
type segment struct {
	sequence uint64
	size     int64
	file     File // nil until the writer created it
	entries  int  // index entries that point here
}

func segmentName(sequence uint64) string {
	return fmt.Sprintf("%016x%s", sequence, segmentSuffix)
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
	b := make([]byte, segmentHeaderBytes)
	copy(b, segmentMagic)
	binary.LittleEndian.PutUint32(b[8:], formatVersion)
	binary.LittleEndian.PutUint64(b[16:], sequence)
	binary.LittleEndian.PutUint64(b[24:], uint64(size))
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	return b
}

// checkSegmentHeader says what is wrong with the header of the named file.
func checkSegmentHeader(b []byte, name string, sequence uint64) error {
	damaged := func(what string) error {
		return &CorruptError{File: name, What: what}
	}
	if len(b) < segmentHeaderBytes {
		return damaged(fmt.Sprintf("the file has only %d bytes", len(b)))
	}
	if string(b[:8]) != segmentMagic {
		return damaged("this is no segment of a slot log")
	}
	// The version comes before the checksum: a later format may place it elsewhere.
	if v := binary.LittleEndian.Uint32(b[8:]); v > formatVersion {
		return &VersionError{File: name, Version: v}
	}
	if binary.LittleEndian.Uint32(b[60:]) != crc32.Checksum(b[:60], castagnoli) {
		return damaged("the segment header does not match its checksum")
	}
	if got := binary.LittleEndian.Uint64(b[16:]); got != sequence {
		return damaged(fmt.Sprintf("the file says it is segment %d: it was renamed or copied", got))
	}
	if size := binary.LittleEndian.Uint64(b[24:]); size != uint64(len(b)) {
		return damaged(fmt.Sprintf("the file has %d bytes and was made with %d", len(b), size))
	}
	return nil
}

// prepareSegment makes the next segment's file, without header, under a name
// that recovery ignores.
func prepareSegment(files FS, dir string, size int64) (File, error) {
	path := filepath.Join(dir, preparedName)
	f, err := files.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("prepare segment: %w", full(err))
	}
	if err := f.Allocate(size); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare segment of %d bytes: %w", size, full(err)), f.Close(), files.Remove(path))
	}
	return f, nil
}

// publishSegment writes the header of a prepared file, flushes it and gives it
// its name.
func publishSegment(files FS, dir string, f File, s *segment) error {
	if _, err := f.WriteAt(segmentHeader(s.sequence, s.size), 0); err != nil {
		return fmt.Errorf("write header of segment %d: %w", s.sequence, full(err))
	}
	// A full fsync: the length must not be lost, recovery relies on it.
	if err := f.Sync(); err != nil {
		return fmt.Errorf("flush header of segment %d: %w", s.sequence, full(err))
	}
	path := filepath.Join(dir, segmentName(s.sequence))
	if err := files.Rename(filepath.Join(dir, preparedName), path); err != nil {
		return fmt.Errorf("name segment %d: %w", s.sequence, full(err))
	}
	return files.SyncDir(dir)
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
