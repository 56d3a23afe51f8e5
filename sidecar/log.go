package sidecar

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"quorate/paxosgroup"
	"quorate/paxosgroup/runner"
	"quorate/paxosgroup/slotlog"
	"quorate/sidecar/config"
)

// durableLog is a *slotlog.Log or, where log.dirs names several directories, a
// *slotlog.Set.
type durableLog interface {
	runner.Log
	Stats() slotlog.Stats
	Close() error
}

// openLog opens the log. A set of which a directory is lost is an error only if
// this sidecar's group lives there.
func openLog(cfg *config.Config, log *slog.Logger) (durableLog, map[paxosgroup.GroupID]paxosgroup.Restored, error) {
	c := slotlog.Config{Dir: cfg.Log.Dir, SegmentBytes: int64(cfg.Log.SegmentBytes), Logger: log}
	if len(cfg.Log.Dirs) == 0 {
		one, restored, err := slotlog.Open(c)
		if err != nil {
			return nil, nil, fmt.Errorf("log: %w", err)
		}
		return one, restored, nil
	}
	set, restored, err := slotlog.OpenSet(slotlog.SetConfig{Config: c, Dirs: cfg.Log.Dirs})
	if err != nil {
		return nil, nil, fmt.Errorf("log: %w", err)
	}
	if err := set.Lost(mainGroup); err != nil {
		set.Close()
		return nil, nil, fmt.Errorf("log: %w", err)
	}
	return set, restored, nil
}

// roomOf tells whether the disk that this sidecar's group lives on is full, and
// whether there is no room on it for the log's next file.
func roomOf(l durableLog) (full, low bool) {
	switch l := l.(type) {
	case *slotlog.Log:
		return l.Full(), l.Low()
	case *slotlog.Set:
		return l.FullFor(mainGroup), l.LowFor(mainGroup)
	}
	return false, false
}

// removeLog removes the files of a log that is closed. Directories that somebody
// listed stay: they may be mount points.
func removeLog(l config.Log) error {
	if len(l.Dirs) == 0 {
		return os.RemoveAll(l.Dir)
	}
	for _, dir := range l.Dirs {
		files, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, f := range files {
			if f.IsDir() {
				continue // lost+found, say
			}
			if err := os.Remove(filepath.Join(dir, f.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
