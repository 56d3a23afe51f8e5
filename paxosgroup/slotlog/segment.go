package slotlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
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
	file     *os.File // nil until the writer created it
	entries  int      // index entries that point here
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
func prepareSegment(dir string, size int64) (*os.File, error) {
	path := filepath.Join(dir, preparedName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("prepare segment: %w", full(err))
	}
	if err := allocate(f, size); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare segment of %d bytes: %w", size, full(err)), f.Close(), os.Remove(path))
	}
	return f, nil
}

// allocate gives f size bytes of zeros that no later write can fail to find
// room for.
func allocate(f *os.File, size int64) error {
	err := ignoringEINTR(func() error { return unix.Fallocate(int(f.Fd()), 0, 0, size) })
	if errors.Is(err, unix.EOPNOTSUPP) {
		zeros := make([]byte, 1<<20)
		for at := int64(0); at < size; at += int64(len(zeros)) {
			if _, err := f.WriteAt(zeros[:min(int64(len(zeros)), size-at)], at); err != nil {
				return err
			}
		}
		err = nil
	}
	return err
}

// publishSegment writes the header of a prepared file, flushes it and gives it
// its name.
func publishSegment(dir string, f *os.File, s *segment) error {
	if _, err := f.WriteAt(segmentHeader(s.sequence, s.size), 0); err != nil {
		return fmt.Errorf("write header of segment %d: %w", s.sequence, full(err))
	}
	// A full fsync: the length must not be lost, recovery relies on it.
	if err := f.Sync(); err != nil {
		return fmt.Errorf("flush header of segment %d: %w", s.sequence, full(err))
	}
	path := filepath.Join(dir, segmentName(s.sequence))
	if err := os.Rename(filepath.Join(dir, preparedName), path); err != nil {
		return fmt.Errorf("name segment %d: %w", s.sequence, full(err))
	}
	return syncDir(dir)
}

func fdatasync(f *os.File) error {
	return ignoringEINTR(func() error { return unix.Fdatasync(int(f.Fd())) })
}

func ignoringEINTR(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open log directory: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("flush log directory: %w", err)
	}
	return nil
}

// lockDir makes sure that no other process uses the directory. The lock goes
// with the process, however it ends.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		if errors.Is(err, unix.EROFS) || errors.Is(err, os.ErrPermission) {
			return nil, fmt.Errorf("slot log in %s cannot be written (mount it read-write, or give this user the directory): %w", dir, err)
		}
		return nil, fmt.Errorf("slot log in %s: %w", dir, full(err))
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("another process uses it (stop that sidecar, or give this one its own directory): %w", ErrLocked)
		}
		return nil, errors.Join(fmt.Errorf("slot log in %s: %w", dir, err), f.Close())
	}
	return f, nil
}
