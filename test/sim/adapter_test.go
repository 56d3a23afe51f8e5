package sim

import (
	"quorate/paxosgroup"
	"quorate/paxosgroup/runner"
)

const sessions = false // whether what is proposed twice is effective once

func setSession(*runner.Proposal, operationID) {}

// read asks the host for the slot that a linearizable read must have applied.
func (cl *client) read(o *operation, h *host, now paxosgroup.Instant) {
	g := h.group(cl.check.id)
	s := g.Status()
	if s.LeaseUntil <= now || s.Judge.Term != s.Ballot {
		cl.again(o)
		return
	}
	o.how = "lease"
	cl.slot = s.Chosen
	if h.view(cl.check.id).delivered >= cl.slot {
		cl.look()
	}
}
