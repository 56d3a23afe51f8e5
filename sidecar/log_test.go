package sidecar

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"quorate/paxosgroup"
	"quorate/paxosgroup/slotlog"
	"quorate/sidecar/config"
)

// TestLogInSeveralDirectories: a lost directory matters if the group lives there,
// and is never begun anew.
func TestLogInSeveralDirectories(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	cfg := &config.Config{Log: config.Log{Dirs: []string{a, b}, SegmentBytes: 1 << 20}}
	open := func() (durableLog, map[paxosgroup.GroupID]paxosgroup.Restored, error) {
		return openLog(cfg, slog.New(slog.DiscardHandler))
	}
	slots, _, err := open()
	if err != nil {
		t.Fatal(err)
	}
	member := paxosgroup.Member{ID: 1, Region: "r", Kind: paxosgroup.Voter}
	base := paxosgroup.Base{Membership: paxosgroup.Membership{NextID: 2, Members: []paxosgroup.Member{member}}}
	if err := startLog(slots, base); err != nil {
		t.Fatal(err)
	}
	if err := slots.Close(); err != nil {
		t.Fatal(err)
	}
	for _, lost := range []string{a, b} {
		if err := os.Rename(lost, lost+".away"); err != nil {
			t.Fatal(err)
		}
		slots, restored, err := open()
		if err == nil {
			if err := slots.Close(); err != nil {
				t.Error(err)
			}
		}
		_, has := restored[mainGroup]
		if l, ok := errors.AsType[*slotlog.LostError](err); lost == a && (!ok || l.Dir != a || !strings.Contains(err.Error(), "move data_dir and all of log.dirs away")) {
			t.Errorf("without the group's directory: %v", err)
		} else if lost == b && (err != nil || !has) {
			t.Errorf("without the other: %v", err)
		}
		if err := os.Rename(lost+".away", lost); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(a, "lost+found"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := removeLog(cfg.Log); err != nil {
		t.Fatal(err)
	}
	slots, restored, err := open()
	if err != nil || len(restored) != 0 {
		t.Fatalf("after it was removed: %v, %v", restored, err)
	}
	if err := slots.Close(); err != nil {
		t.Error(err)
	}
}
