package sidecar

import (
	"errors"
	"testing"

	"quorate/paxosgroup/peer"
)

// TestLives: a replica's disk that was put back to an earlier state is
// recognised by whoever has met a later one, also after a restart, and however
// often it is started again.
func TestLives(t *testing.T) {
	dir := t.TempDir()
	var past []uint64
	start := func(past []uint64, nonce uint64) []uint64 { return append([]uint64{nonce}, past...) }
	meet := func(past []uint64) error {
		l, err := loadLives(dir)
		if err != nil {
			t.Fatal(err)
		}
		return l.meet(7, peer.Life{Start: uint64(len(past)), Nonces: past})
	}
	for n := range uint64(5) {
		past = start(past, n+1)
		for range 2 {
			if err := meet(past); err != nil {
				t.Fatalf("start %d: %v", n+1, err)
			}
		}
	}
	copied := past
	past = start(past, 6) // of which this region hears
	if err := meet(past); err != nil {
		t.Fatal(err)
	}
	if err := meet(copied); !errors.Is(err, peer.ErrSuperseded) {
		t.Errorf("the copy as it was: %v", err)
	}
	for n := range uint64(4) { // the copy counts on, to where the original was and beyond
		copied = start(copied, 100+n)
		if err := meet(copied); !errors.Is(err, peer.ErrSuperseded) {
			t.Errorf("the copy at start %d: %v", len(copied), err)
		}
	}
	past = start(start(past, 7), 8) // one start not heard of
	if err := meet(past); err != nil {
		t.Errorf("the original: %v", err)
	}
}
