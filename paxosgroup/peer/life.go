package peer

import (
	"errors"
	"fmt"
	"time"

	"quorate/paxosgroup"
	"quorate/paxosgroup/paxospb"
)

// Life is one start of a replica: a counter that its disk keeps, and a random
// number. A disk that was put back to an earlier state shows: it counts starts
// again that were counted before, with other numbers.
type Life struct {
	Start  uint64   // 1 is the first; 0: not told
	Nonces []uint64 // of that start and those before it, the newest first; at most NoncesMax
}

// NoncesMax bounds how many starts back a life can be compared with an earlier one.
const NoncesMax = 64

// Follows reports whether l is the life of start and nonce, or a later one of the
// same disk. One that is NoncesMax or more starts later is believed to be.
func (l Life) Follows(start, nonce uint64) bool {
	if l.Start < start {
		return false
	}
	since := l.Start - start
	return since >= uint64(len(l.Nonces)) && since >= NoncesMax || since < uint64(len(l.Nonces)) && l.Nonces[since] == nonce
}

// ErrSuperseded is what Config.Meet returns of a life that is not the newest of
// its replica: the peer is told so, and Config.Superseded is called there.
var ErrSuperseded = errors.New("a later life of this replica is known: its disk was put back to an earlier state")

// hello is what a stream to or from a peer begins with.
func (t *Transport) hello(to paxosgroup.ReplicaID) *paxospb.Hello {
	return &paxospb.Hello{
		ClusterId: t.cfg.ClusterID, Sender: uint32(t.cfg.Self), Receiver: uint32(to), Version: protocolVersion,
		Start: t.cfg.Life.Start, Nonces: t.cfg.Life.Nonces, LeaseDurationNs: int64(t.cfg.LeaseDuration),
	}
}

// meet refuses a peer by what its hello says beside who it is.
func (t *Transport) meet(h *paxospb.Hello) error {
	from := paxosgroup.ReplicaID(h.GetSender())
	if theirs := time.Duration(h.GetLeaseDurationNs()); theirs != 0 && t.cfg.LeaseDuration != 0 && theirs != t.cfg.LeaseDuration {
		return fmt.Errorf("replica %d has a lease duration of %v and this replica %d one of %v: a lease is safe only if all have the same", from, theirs, t.cfg.Self, t.cfg.LeaseDuration)
	}
	if t.cfg.Meet == nil {
		return nil
	}
	nonces := h.GetNonces()
	return t.cfg.Meet(from, Life{Start: h.GetStart(), Nonces: nonces[:min(len(nonces), NoncesMax)]})
}
