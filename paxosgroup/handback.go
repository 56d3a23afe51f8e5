package paxosgroup

// handBack is what is remembered of leaderships of the preferred region, by all
// replicas alike, so that whoever leads next knows of them.
type handBack struct {
	tenure   Ballot // leadership that is heard of, and
	since    Instant
	failures int     // leaderships of the preferred region that ended early, and attempts that came to nothing
	after    Instant // not before
	fitSince Instant // a leader's: since when the preferred one has been fit
}

const (
	handBackSlotsMax = 64 // undecided or unapplied slots by which a successor may be behind: a drain takes them along
	handBackFor      = 4  // lease durations for which leader and successor must have been well
	handBackTenure   = 40 // lease durations after which a leadership has not ended early
	handBackBackoff  = 16 // lease durations, doubled with each failure, up to
	handBackDoubled  = 6  // times
)

// preferred returns the voter of the preferred region, if that is not this one.
func (r *Replica) preferred() *peer {
	if r.cfg.PreferredRegion == "" || r.cfg.PreferredRegion == r.cfg.Region {
		return nil
	}
	for _, p := range r.peers {
		if m, _ := r.membership.Member(p.id); m.Region == r.cfg.PreferredRegion && r.membership.leads(p.id) {
			return p
		}
	}
	return nil
}

// noteTenure takes note of who leads. A preferred region that does not keep its
// leadership is not offered it again so soon.
func (r *Replica) noteTenure(b Ballot) {
	h := &r.handBack
	if h.tenure == b {
		return
	}
	p := r.preferred()
	if p != nil && h.tenure.Replica == p.id && b.Replica != p.id {
		if r.now.Sub(h.since) < handBackTenure*r.cfg.LeaseDuration {
			r.handBackFailed()
		} else {
			h.failures = 0
		}
	}
	h.tenure, h.since, h.fitSince = b, r.now, 0
}

// handBackFailed puts off the next attempt, longer each time.
func (r *Replica) handBackFailed() {
	h := &r.handBack
	h.after = r.now.Add(handBackBackoff * r.cfg.LeaseDuration << min(h.failures, handBackDoubled))
	h.failures++
}

// fit reports whether p could take over now without anybody waiting for it.
func (r *Replica) fit(p *peer) bool {
	return p.leaseSentAt.Add(r.cfg.LeaseDuration/2) > r.now && p.chosen+handBackSlotsMax >= r.chosen && p.applied+handBackSlotsMax >= r.chosen
}

// tickHandBack keeps since when the preferred replica has been fit.
func (r *Replica) tickHandBack() {
	if !r.cfg.HandBack {
		return
	}
	h := &r.handBack
	switch p := r.preferred(); {
	case p == nil || !r.fit(p):
		h.fitSince = 0
	case h.fitSince == 0:
		h.fitSince = r.now
	}
}

// handBackAt is when leadership is due to the preferred region; 0 if it is not
// fit.
func (r *Replica) handBackAt() Instant {
	h := &r.handBack
	if !r.cfg.HandBack || h.fitSince == 0 || r.role != Leader {
		return 0
	}
	return max(max(h.fitSince, r.lead.since).Add(handBackFor*r.cfg.LeaseDuration), h.after)
}

// handBackDue returns the replica that leadership is due to. The core does not
// hand over by itself, since the database has to be closed first.
func (r *Replica) handBackDue() ReplicaID {
	at := r.handBackAt()
	if p := r.preferred(); at != 0 && at <= r.now && p != nil && r.lead.transfer == nil {
		return p.id
	}
	return 0
}
