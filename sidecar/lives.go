package sidecar

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"quorate/paxosgroup"
	"quorate/paxosgroup/peer"
)

// lives are the newest life known of each other replica. They are on disk before
// the replica is answered, so a data_dir that was put back to before its last
// start is recognised by every region that has heard of that. One that was put
// back to later than that is not: its next start looks like any other.
type lives struct {
	path string

	mu    sync.Mutex
	known map[paxosgroup.ReplicaID]knownLife
}

// knownLife is one start of a replica.
type knownLife struct {
	Start uint64 `json:"start"`
	Nonce uint64 `json:"nonce"`
}

const livesFile = "lives.json"

func loadLives(dir string) (*lives, error) {
	l := &lives{path: filepath.Join(dir, livesFile), known: map[paxosgroup.ReplicaID]knownLife{}}
	b, err := os.ReadFile(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &l.known)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", l.path, err)
	}
	return l, nil
}

// meet takes note of a replica's life, or says why it is not its newest.
func (l *lives) meet(from paxosgroup.ReplicaID, life peer.Life) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	known, met := l.known[from]
	switch {
	case met && !life.Follows(known.Start, known.Nonce):
		return fmt.Errorf("%w (replica %d says this is its start %d, and this region knows a start %d that is not of the same past)", peer.ErrSuperseded, from, life.Start, known.Start)
	case len(life.Nonces) == 0: // does not tell, and never did
		return nil
	case met && life.Start == known.Start:
		return nil
	}
	next := make(map[paxosgroup.ReplicaID]knownLife, len(l.known)+1)
	for id, k := range l.known {
		next[id] = k
	}
	next[from] = knownLife{Start: life.Start, Nonce: life.Nonces[0]}
	b, err := json.MarshalIndent(next, "", "  ")
	if err != nil {
		return err
	}
	if err := writeDurably(l.path, append(b, '\n')); err != nil {
		return err
	}
	l.known = next
	return nil
}
