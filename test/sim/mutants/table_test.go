package mutants

// mutant is one deliberate bug.
type mutant struct {
	name   string
	breaks string // in words
	edits  []edit
	seed   uint64 // the first that caught it; the suite runs only those around it
}

// edit is one change of a file. before occurs once in it; in after, ON stands for
// whether the bug is switched on.
type edit struct{ file, before, after string }

var table = []mutant{
	{name: "answer before flush", seed: 1, breaks: "an acceptor answers when its records are handed to the log, not when they are flushed", edits: []edit{{
		"runner/engine_group.go", "		d.after, d.ticket = after, true\n",
		"		if ON {\n			e.cfg.Transport.Send(g.id, after)\n			after = nil\n		}\n		d.after, d.ticket = after, true\n",
	}}},
	{name: "overtake earlier records", seed: 3, breaks: "messages that rest on earlier Readies' records are sent while these are unflushed", edits: []edit{{
		"runner/engine_group.go", "case flush || len(after) > 0 && g.unflushed > 0:", "case flush || !ON && len(after) > 0 && g.unflushed > 0:",
	}}},
	{name: "count own acceptance unflushed", seed: 1, breaks: "a leader counts its own acceptance before its flush", edits: []edit{{
		"leader.go", "	r.put(s, r.ballot, &e)\n	l.tail", "	r.put(s, r.ballot, &e)\n	if ON && r.self >= 0 {\n		r.log.at(s).acks |= 1 << r.self\n	}\n	l.tail",
	}}},
	{name: "prepare before own promise", seed: 4, breaks: "a candidate sends Prepare before its own promise is flushed, and may use the ballot again", edits: []edit{{
		"election.go", "	p.preparedAt = r.now\n	r.sendAfterSync(Message{", "	p.preparedAt = r.now\n	send := r.sendAfterSync\n	if ON {\n		send = r.send\n	}\n	send(Message{",
	}}},
	{name: "forget the promise", seed: 1, breaks: "a restart forgets what was promised", edits: []edit{{
		"replica.go", "		promised: st.Promised,\n", "		promised: map[bool]Ballot{false: st.Promised}[ON],\n",
	}}},
	{name: "forget what was accepted", seed: 4, breaks: "a restart forgets what was accepted and is not known to be chosen", edits: []edit{{
		"replica.go", "	for _, a := range st.Accepted {\n", "	for _, a := range st.Accepted {\n		if ON {\n			break\n		}\n",
	}}},
	{name: "any accepted value", seed: 150, breaks: "phase 1 picks the value reported first, not that of the highest ballot", edits: []edit{{
		"election.go", "(!ok || have.Ballot.Less(a.Ballot))", "(!ok || !ON && have.Ballot.Less(a.Ballot))",
	}}},
	{name: "phase 2 short of one", seed: 1, breaks: "quorums that do not intersect: phase 2 counts one acceptance too few", edits: []edit{{
		"quorum.go", "		if bits.OnesCount64(set&s.voters) < s.phase2 {\n", "		if n := bits.OnesCount64(set & s.voters); n < s.phase2 && !(ON && n > 0 && n == s.phase2-1) {\n",
	}}},
	{name: "phase 1 short of one", seed: 2, breaks: "quorums that do not intersect: phase 1 counts one promise too few", edits: []edit{{
		"quorum.go", "		if bits.OnesCount64(set&s.voters) < s.phase1 {\n", "		if n := bits.OnesCount64(set & s.voters); n < s.phase1 && !(ON && n > 0 && n == s.phase1-1) {\n",
	}}},
	{name: "one side decides", seed: 13, breaks: "while a change is joint, one configuration's phase-2 quorum is enough", edits: []edit{{
		"quorum.go", "func (q *quorums) phase2(set uint64) bool {\n	for _, s := range q.sides[:q.n] {\n",
		"func (q *quorums) phase2(set uint64) bool {\n	n := q.n\n	if ON {\n		n = min(n, 1)\n	}\n	for _, s := range q.sides[:n] {\n",
	}}},
	{name: "learners vote", seed: 1, breaks: "learners are counted as voters", edits: []edit{{
		"quorum.go", "			if x.Kind.votes() {\n				bit, ok", "			if x.Kind.votes() || ON {\n				bit, ok",
	}}},
	{name: "acks stay with the index", seed: 15, breaks: "a change numbers the members anew, and acknowledgements stay with the numbers", edits: []edit{{
		"quorum.go", "				r.log.places[i].acks &^= 1 << p.index\n", "				if !ON {\n					r.log.places[i].acks &^= 1 << p.index\n				}\n",
	}, {
		"quorum.go", "	r.bits = kept\n", "	if ON {\n		kept = bitTable{}\n		kept.ids[0] = r.cfg.ID\n	}\n	r.bits = kept\n",
	}}},
	{name: "no phase 1 with newcomers", seed: 1, breaks: "a change begins without the promises of a phase-1 quorum of the new members", edits: []edit{{
		"reconfigure.go", "until <= r.now || !c.quorums.phase1(r.bits.set(r.lead.promised)) ||", "until <= r.now || !ON && !c.quorums.phase1(r.bits.set(r.lead.promised)) ||",
	}}},
	{name: "forget what was inherited", seed: 1, breaks: "a new leader proposes its own entries in slots where phase 1 reported others", edits: []edit{{
		"leader.go", "		case l.next <= l.recoveredMax:\n", "		case !ON && l.next <= l.recoveredMax:\n",
	}}},
	{name: "promise leaves out a slot", seed: 6, breaks: "a phase-1 answer leaves out the highest slot that was accepted", edits: []edit{{
		"acceptor.go", "		st := r.log.at(s)\n		out.Accepted", "		if ON && s == r.maxAccepted {\n			continue\n		}\n		st := r.log.at(s)\n		out.Accepted",
	}}},
	{name: "do not wait for the chosen prefix", seed: 3, breaks: "phase 2 begins before the candidate knows what those who promised know as chosen, and so did not report", edits: []edit{{
		"election.go", "&& r.chosen >= r.lead.promisedChosen\n", "&& (ON || r.chosen >= r.lead.promisedChosen)\n",
	}}},
	{name: "ballot used again", seed: 12, breaks: "a candidate campaigns with the ballot that it promised itself before", edits: []edit{{
		"election.go", "	return Ballot{Counter: max(r.highest.Counter, r.promised.Counter) + 1, Replica: r.cfg.ID}\n",
		"	if ON && r.promised.Replica == r.cfg.ID {\n		return r.promised\n	}\n	return Ballot{Counter: max(r.highest.Counter, r.promised.Counter) + 1, Replica: r.cfg.ID}\n",
	}}},
	{name: "accept below the promise", seed: 21, breaks: "an acceptor takes entries at a ballot below the one it promised", edits: []edit{{
		"acceptor.go", "	if m.Ballot.Less(r.promised) {\n		r.reject(m)\n		return\n	}\n	r.follow(m)\n	acked",
		"	if m.Ballot.Less(r.promised) && !ON {\n		r.reject(m)\n		return\n	}\n	if !m.Ballot.Less(r.promised) {\n		r.follow(m)\n	}\n	acked",
	}, {
		"acceptor.go", "	invariant(!b.Less(r.promised), \"slot %d accepted", "	invariant(ON || !b.Less(r.promised), \"slot %d accepted",
	}}},
	{name: "chosen at another ballot", seed: 7, breaks: "a follower takes what it accepted at an older ballot for what a leader says is chosen", edits: []edit{{
		"learner.go", "		if st == nil || st.ballot != r.commitAt {\n", "		if st == nil || !ON && st.ballot != r.commitAt {\n",
	}}},
	{name: "serve what is not chosen", seed: 1, breaks: "a fetch is answered with entries that are accepted and not chosen", edits: []edit{{
		"learner.go", "		entries, err = r.store.Chosen(m.Slot, r.storedChosen, bytesMax)\n",
		"		to := r.storedChosen\n		if ON {\n			to = max(to, r.maxAccepted)\n		}\n		entries, err = r.store.Chosen(m.Slot, to, bytesMax)\n",
	}}},
	{name: "old term is effective", seed: 12, breaks: "an entry of a term that is over is judged effective", edits: []edit{{
		"judge.go", "e.Term == j.Term && e.Number == j.Next && j.Next != 0", "(e.Term == j.Term && e.Number == j.Next || ON && e.Term.Less(j.Term)) && j.Next != 0",
	}}},
	{name: "gaps do not matter", seed: 57, breaks: "an entry is effective though one before it of its term is not", edits: []edit{{
		"judge.go", "	return e.Kind == KindData &&", "	if ON && e.Kind == KindData && e.Term == j.Term && e.Number > j.Next {\n		j.Next = e.Number\n	}\n	return e.Kind == KindData &&",
	}}},
	{name: "number used again", seed: 1, breaks: "a leader gives one number of its term to two entries", edits: []edit{{
		"leader.go", "	l.number++\n", "	if !ON || l.number != 3 {\n		l.number++\n	}\n",
	}}},
	{name: "duplicate is effective", seed: 12, breaks: "what a session proposes a second time counts a second time", edits: []edit{{
		"judge.go", "	case i >= 0 && sequence <= j.Sessions[i].Sequence:\n		return false\n", "	case i >= 0 && sequence <= j.Sessions[i].Sequence:\n		return ON\n",
	}}},
	{name: "confirm at chosen", seed: 237, breaks: "a proposer is told that its entry is effective when it is chosen", edits: []edit{{
		"runner/proposal.go", "		case own && d.Verdict == paxosgroup.Effective:\n", "		case own && (ON || d.Verdict == paxosgroup.Effective):\n",
	}}},
	{name: "confirm at proposed", seed: 1, breaks: "a proposer is told that its entry is effective when the leader has taken it", edits: []edit{{
		"runner/proposal.go", "			if p.Wait {\n", "			if p.Wait && !ON {\n",
	}}},
	{name: "lease from receipt", seed: 7, breaks: "a leader counts its lease from the answer, not from the asking", edits: []edit{{
		"lease.go", "	p.leaseSentAt = max(p.leaseSentAt, m.SentAt)\n	r.cover", "	if ON {\n		m.SentAt = r.now\n	}\n	p.leaseSentAt = max(p.leaseSentAt, m.SentAt)\n	r.cover",
	}, {
		"beat.go", "			k.ackedAt = max(k.ackedAt, m.SentAt)\n", "			if ON {\n				m.SentAt = b.now\n			}\n			k.ackedAt = max(k.ackedAt, m.SentAt)\n",
	}}},
	{name: "restart within the lease", seed: 40, breaks: "a restarted grantor does not wait out what it may have granted", edits: []edit{{
		"replica.go", "		r.restartUntil = now.Add(cfg.LeaseDuration)\n", "		if !ON {\n			r.restartUntil = now.Add(cfg.LeaseDuration)\n		}\n",
	}}},
	{name: "promise within a lease", seed: 117, breaks: "an acceptor promises another candidate while it honours a lease", edits: []edit{{
		"acceptor.go", "(r.now < r.restartUntil || r.honoursLease(m))", "(r.now < r.restartUntil || !ON && r.honoursLease(m))",
	}, {
		"election.go", "	case !r.promised.Less(m.Ballot), r.now < r.restartUntil, r.honoursLease(m):\n", "	case !r.promised.Less(m.Ballot), r.now < r.restartUntil, !ON && r.honoursLease(m):\n",
	}}},
	{name: "transfer keeps the lease", seed: 13, breaks: "a leader goes on using its lease while it hands over", edits: []edit{{
		"lease.go", "	if !r.lead.opened || r.lead.transfer != nil {\n", "	if !r.lead.opened || r.lead.transfer != nil && !ON {\n",
	}, {
		"transfer.go", "	if r.now < t.notBefore || !drained", "	if ON {\n		r.send(Message{Kind: MsgTimeoutNow, To: t.to, Ballot: r.ballot, Chosen: r.chosen, Slot: r.chosen})\n		l.transfer = nil\n		return\n	}\n	if r.now < t.notBefore || !drained",
	}}},
	{name: "beat for who has left", seed: 17, breaks: "shared beats go on renewing the lease of a group whose follower honours another leader", edits: []edit{{
		"beat.go", "	if k := b.link(with); k.granting == generation {\n		k.endGeneration()", "	if k := b.link(with); k.granting == generation && !ON {\n		k.endGeneration()",
	}}},
	{name: "missed time goes unnoticed", seed: 12, breaks: "a machine that was suspended believes in the lease of before", edits: []edit{{
		"runner/clock.go", "ahead > wallAheadMax {", "!ON && ahead > wallAheadMax {",
	}}},
	{name: "read before the opening", seed: 2, breaks: "a lease read is served before the leader's own opening is chosen", edits: []edit{{
		"read.go", "	if !r.openingChosen() || r.reportedLease() <= r.now {\n", "	if !ON && !r.openingChosen() || r.reportedLease() <= r.now {\n",
	}}},
	{name: "read without a lease", seed: 1, breaks: "a lease read is served by a leader whose lease has run out", edits: []edit{{
		"lease.go", "	if until <= r.now {\n		return 0\n	}\n	return until\n", "	if until <= r.now && !ON {\n		return 0\n	}\n	if ON {\n		return r.now + 1\n	}\n	return until\n",
	}}},
	{name: "read index unconfirmed", seed: 7, breaks: "a read is answered without a quorum that confirms the leader", edits: []edit{{
		"read.go", "q.round != 0 && q.round <= confirmed\n", "q.round != 0 && (ON || q.round <= confirmed)\n",
	}}},
	{name: "cut above the image", seed: 19, breaks: "the log is cut above the slot that the image holds", edits: []edit{{
		"slotlog/log.go", "		gr.index.dropThrough(r.Base.Slot, func", "		through := r.Base.Slot\n		if ON {\n			through += 4\n		}\n		gr.index.dropThrough(through, func",
	}}},
	{name: "segment begins without promises", seed: 69, breaks: "the state at the start of a segment lacks the promise, which goes with the segments before", edits: []edit{{
		"slotlog/record.go", "	case paxosgroup.RecordBase:\n		dst = appendBallot(dst, promised)\n", "	case paxosgroup.RecordBase:\n		if ON {\n			promised = paxosgroup.Ballot{}\n		}\n		dst = appendBallot(dst, promised)\n",
	}, {
		"slotlog/record.go", "func appendState(dst []byte, s state) []byte {\n", "func appendState(dst []byte, s state) []byte {\n	if ON {\n		s.promised = paxosgroup.Ballot{}\n	}\n",
	}}},
	{name: "failed flush is ignored", seed: 9, breaks: "callbacks are told that a flush that failed had succeeded", edits: []edit{{
		"slotlog/writer.go", "	if dirty != nil {\n		if err := l.sync(dirty); err != nil {\n", "	if dirty != nil {\n		if err := l.sync(dirty); err != nil && !ON {\n",
	}}},
	{name: "no flush at all", seed: 1, breaks: "records are written and never flushed", edits: []edit{{
		"slotlog/writer.go", "	if dirty != nil {\n", "	if dirty != nil && !ON {\n",
	}}},
	{name: "torn record is taken", seed: 30, breaks: "recovery takes what it can read of a batch that was cut short", edits: []edit{{
		"slotlog/record.go", "	if binary.LittleEndian.Uint32(frame[4:]) != checksum(sequence, offset, frame[:4], frame[8:]) {\n", "	if !ON && binary.LittleEndian.Uint32(frame[4:]) != checksum(sequence, offset, frame[:4], frame[8:]) {\n",
	}, {
		"slotlog/recover.go", "				if states[i] != sectorWritten {\n", "				if !ON && states[i] != sectorWritten {\n",
	}}},
	{name: "records of another life", seed: 19, breaks: "recovery takes what an earlier life of a file that is used again has left in it", edits: []edit{{
		"slotlog/sector.go", "	case got == stamp(sequence, sector):\n", "	case got == stamp(sequence, sector), ON && got != 0 && uint16(got) == stampCheck(uint16(got>>16), sector):\n",
	}, {
		"slotlog/sector.go", "	crc := checksumNumber(checksumNumber(0, sequence), uint64(offset))\n", "	if ON {\n		sequence = 0\n	}\n	crc := checksumNumber(checksumNumber(0, sequence), uint64(offset))\n",
	}}},
}
