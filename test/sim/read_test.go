package sim

import (
	"time"

	"quorate/paxosgroup"
)

// read has a host find the slot that a linearizable read must have applied: by
// its lease, or by asking a quorum, itself or by way of the leader.
func (cl *client) read(o *operation, h *host, now paxosgroup.Instant) {
	g := h.group(cl.check.id)
	if cl.w.rng.IntN(2) == 0 {
		if slot, ok := g.LeaseRead(now); ok {
			o.how = "lease"
			cl.readAt(o, slot)
			return
		}
	}
	o.how = "index"
	tries := cl.tries
	floor := len(cl.check.log)
	err := g.ReadIndex(now, func(slot paxosgroup.Slot, err error) {
		cl.check.readSlot(h, slot, floor, err)
		switch {
		case cl.now != o || cl.tries != tries:
		case err != nil:
			cl.again(o)
		default:
			cl.readAt(o, slot)
		}
	})
	if err != nil {
		cl.again(o)
	}
}

// readAt reads when the slot is applied. Slot 0 is applied always.
func (cl *client) readAt(o *operation, slot paxosgroup.Slot) {
	cl.slot, cl.hasSlot = slot, true
	if cl.host.view(cl.check.id).delivered >= slot {
		cl.look()
	}
}

const clientPatience = 1500 * time.Millisecond
