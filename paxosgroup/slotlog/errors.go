package slotlog

import (
	"errors"
	"fmt"
	"syscall"

	"quorate/paxosgroup"
)

var (
	// ErrClosed is what Append's callback gets after Close.
	ErrClosed = errors.New("slot log is closed")
	// ErrFull says that the disk has no room. A log that is open waits for it, see
	// Full; it fails with this only when it was closed meanwhile, or when far more
	// was handed in than it may queue.
	ErrFull = errors.New("no room on the disk of the slot log")
	// ErrLocked says that another process has the directory.
	ErrLocked = errors.New("directory is locked")
	// ErrCompacted says that an entry is at or below the group's base.
	ErrCompacted = errors.New("entry is at or below the base of the log")
)

// full marks an error that says the disk is full as ErrFull.
func full(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w (free some): %w", ErrFull, err)
	}
	return err
}

// CorruptError says that what is on disk is not what was written, and cannot be
// the trace of a write that a crash cut short. The replica must not go on from
// there: it could deny what it promised or accepted.
type CorruptError struct {
	File   string
	Offset int64
	Group  paxosgroup.GroupID // 0 if not known
	Slot   paxosgroup.Slot    // 0 if not known
	What   string
	Behind *Behind // nil if it was not looked for
}

// DamageAdvice says what to do about a damaged log.
const DamageAdvice = "put the undamaged file back; or move data_dir and log.dir away, both, and start again, " +
	"and the region joins as a new replica, seeded from another one; never delete a file of the log alone"

// Where says which place it is.
func (e *CorruptError) Where() string {
	where := fmt.Sprintf("%s at offset %d", e.File, e.Offset)
	if e.Group != 0 {
		where += fmt.Sprintf(", group %d", e.Group)
	}
	if e.Slot != 0 {
		where += fmt.Sprintf(", slot %d", e.Slot)
	}
	return where
}

func (e *CorruptError) Error() string {
	what := e.What
	if e.Behind != nil {
		what += "; " + e.Behind.String()
	}
	return fmt.Sprintf("slot log is damaged: %s: %s (%s)", e.Where(), what, DamageAdvice)
}

// VersionError says that another version of quorate wrote the directory.
type VersionError struct {
	File    string
	Version uint32
}

func (e *VersionError) Error() string {
	hint := "run the version of quorate that wrote it, or a later one"
	if e.Version < formatVersion {
		hint = "run the version of quorate that wrote it, or move data_dir and log.dir away, both: the region then joins as a new replica"
	}
	return fmt.Sprintf("slot log %s has format version %d and this program knows %d (%s)", e.File, e.Version, formatVersion, hint)
}
