package slotlog

import (
	"errors"
	"testing"

	"quorate/paxosgroup"
)

// TestNothingIsReadAfterAFailure: what was handed in since is not there, and an
// older entry of the same slot must not pass for it.
func TestNothingIsReadAfterAFailure(t *testing.T) {
	l, _, err := Open(Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	put := func(c uint64, p string) error {
		done := make(chan error, 1)
		l.Append(1, []paxosgroup.Record{{Kind: paxosgroup.RecordAccept, Slot: 1, Ballot: paxosgroup.Ballot{Counter: c, Replica: 2}, Entry: paxosgroup.Entry{Kind: paxosgroup.KindData, Payload: []byte(p)}}}, func(err error) { done <- err })
		return <-done
	}
	if err := put(5, "X"); err != nil {
		t.Fatal(err)
	}
	l.mu.Lock()
	l.fail(errors.New("EIO"))
	l.mu.Unlock()
	if put(7, "Y") == nil {
		t.Fatal("a failed log took a record")
	}
	e, err := l.Group(1).Chosen(1, 1, 1<<20)
	if err == nil && len(e) == 1 && string(e[0].Entry.Payload) == "X" {
		t.Errorf("slot 1 was handed out to be persisted as Y at ballot 7; Storage reads back X, without an error")
	}
}
