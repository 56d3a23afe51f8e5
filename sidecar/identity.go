package sidecar

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"quorate/paxosgroup"
	"quorate/sidecar/sidecarpb"
)

// identity is who this sidecar is in its cluster. It is written before the
// sidecar takes part in anything and lies beside the log: whoever loses one
// loses the other, and comes back as somebody new.
type identity struct {
	Cluster    string               `json:"cluster"`
	ClusterID  uint64               `json:"cluster_id"`
	Region     string               `json:"region"`
	ReplicaID  paxosgroup.ReplicaID `json:"replica_id"`
	Life       sidecarpb.Life       `json:"life"`
	Membership []byte               `json:"membership"` // the first one, or that of the entry that added this replica
	Origin     string               `json:"origin"`     // at the cluster's making: whose database the others start from
	// Founded: the region's first database was set up (or was not needed,
	// since it starts from an image).
	Founded bool `json:"founded"`
	// Began: the log beside the identity was begun. One that is missing from then
	// on was lost, and with it what this replica promised.
	Began bool `json:"began"`
	// Replace says why the database must be replaced by an image, and is to be
	// kept shut until it is; empty: it need not.
	Replace string `json:"replace,omitempty"`
	// Start counts the starts of this replica, and Nonces are the present one's and
	// those before it, the newest first: by them others recognise a data_dir that
	// was put back to an earlier state.
	Start  uint64   `json:"start,omitempty"`
	Nonces []uint64 `json:"nonces,omitempty"`
	// Superseded says who knew a later life of this replica. It never votes again:
	// the region joins as a new one.
	Superseded string `json:"superseded,omitempty"`
	// Cut: the log was cut once. From then on one of Footings says what was known
	// where it begins, unless the database came with an image.
	Cut      bool      `json:"cut,omitempty"`
	Footings []footing `json:"footings,omitempty"`
}

const identityFile = "identity.json"

// loadIdentity returns nil, and no error, where none was ever written.
func loadIdentity(dir string) (*identity, error) {
	path := filepath.Join(dir, identityFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read identity: %w", err)
	}
	var id identity
	if err := json.Unmarshal(b, &id); err != nil {
		return nil, fmt.Errorf("identity %s is damaged: %w: if the log beside it is lost too, move data_dir away and start again: the region then joins as a new replica", path, err)
	}
	return &id, nil
}

// save makes the identity durable before it returns.
func (id *identity) save(dir string) error {
	b, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return err
	}
	return writeDurably(filepath.Join(dir, identityFile), append(b, '\n'))
}

// writeDurably puts a file in place of another of that name, on disk before it
// returns.
func writeDurably(path string, b []byte) error {
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = f.Write(b)
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("write %s: %w: data_dir must be writable by this user, and have room", path, err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
