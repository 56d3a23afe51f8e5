package paxosgroup

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

var rewrite = flag.Bool("rewrite", false, "write what testdata/*.txt expect anew; review each changed line")

// TestConversations runs the stories in testdata/*.txt, one a file, each of which
// tells what replicas say to each other in some situation. A file is a sequence
// of parts:
//
//	# why this story is worth reading
//	a command
//	another
//	----
//	what happens
//
// Replicas talk over links of 5 ms each way, and clocks agree. Heartbeats, their
// answers, and probes of round trips are left out, unless asked for. The commands:
//
//	group members=1,2,3,… [phase1=N phase2=N] [spare=4,5]   spare ones have a log and no past
//	beats                           comes first: processes hold a replica of two groups each, which share
//	                                heartbeats; what is said in the other group is marked
//	other COMMAND                   this one is for the other group
//	electable IDS                   who may campaign from now on; at first nobody
//	pass DURATION                   let time pass
//	propose ID PAYLOAD…             hand in data entries, one a payload
//	change ID members=1,2,4:witness,5:learner [phase1=N phase2=N]
//	transfer ID TO
//	cut IDS | IDS                   links between the two sets are down both ways
//	drop IDS IDS [accept]           links are down one way, for what is sent from now on (for Accepts only)
//	heal                            all links are up
//	slow ID DURATION                what it sends and is sent takes longer
//	window ID N                     slots a leader may send a follower ahead of its answers
//	stop ID / start ID              a crash, and a restart from what was flushed
//	read ID                         what must one have applied to read there, by read index?
//	lease ID                        and by its lease alone?
//	heartbeats told|untold|counted  from now on
//	status IDS                      what they believe
func TestConversations(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(paths) == 0 {
		t.Fatal(paths, err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txt"), func(t *testing.T) {
			in, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			got := newStory(t).tell(string(in))
			switch {
			case got == string(in):
			case *rewrite:
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			default:
				t.Errorf("%s: the conversation is now\n%s", path, got)
			}
		})
	}
}

const linkDelay = 5 * time.Millisecond

// story is a group of replicas, what is on its way between them, and what they
// have said since the last command.
type story struct {
	t       *testing.T
	now     Instant
	first   Membership
	nodes   map[ReplicaID]*teller
	flights []flight
	cut     map[[2]ReplicaID]bool
	drop    map[[2]ReplicaID]string // one kind of messages, or all
	slow    map[ReplicaID]time.Duration
	out     *strings.Builder
	pending *said

	reads      uint64
	heartbeats string // told, counted or neither
	tally      [3]int // beats, their answers, heartbeats and answers of groups

	beats map[ReplicaID]*Beats // nil: not shared
	other *story               // of the other group, in the same processes
	mark  string               // of what is said there
}

// teller is a replica and its disk, flushed at once.
type teller struct {
	r         *Replica
	electable bool
	log       []SlotEntry
	st        Restored
	accepted  map[Slot]AcceptedEntry
}

type flight struct {
	at Instant
	m  Message
}

// said is a line that is not written yet: what is said to several, or happens to
// several at once, is one line.
type said struct {
	at   Instant
	from string // "1 -> ", or empty
	whom []string
	text string
}

func newStory(t *testing.T) *story {
	return &story{t: t, nodes: map[ReplicaID]*teller{}, cut: map[[2]ReplicaID]bool{}, drop: map[[2]ReplicaID]string{}, slow: map[ReplicaID]time.Duration{}, out: &strings.Builder{}, pending: &said{}}
}

func (d *teller) Chosen(from, to Slot, maxBytes int) ([]SlotEntry, error) {
	return d.log[from-1 : to], nil
}

// tell runs the commands of a file and returns the file as it should be.
func (s *story) tell(in string) string {
	var out strings.Builder
	var commands []string
	lines := strings.Split(in, "\n")
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		if line != "----" {
			if line != "" && !strings.HasPrefix(line, "#") {
				commands = append(commands, line)
			}
			if i < len(lines)-1 {
				out.WriteString(line + "\n")
			}
			continue
		}
		for _, c := range commands {
			s.do(c)
		}
		s.flush()
		commands = nil
		out.WriteString("----\n" + s.out.String())
		s.out.Reset()
		for i+1 < len(lines) && lines[i+1] != "" { // what was expected
			i++
		}
	}
	return out.String()
}

func (s *story) do(command string) {
	words := strings.Fields(command)
	rest := words[1:]
	switch words[0] {
	case "beats":
		s.beats = map[ReplicaID]*Beats{}
		o := newStory(s.t)
		o.cut, o.drop, o.slow, o.out, o.pending, o.beats, o.mark = s.cut, s.drop, s.slow, s.out, s.pending, s.beats, "other: "
		s.other = o
	case "other":
		s.other.do(strings.TrimPrefix(command, "other "))
	case "group":
		if s.other != nil {
			defer s.other.do(command)
		}
		s.first = s.membership(rest)
		for _, m := range s.first.Members {
			s.nodes[m.ID] = &teller{accepted: map[Slot]AcceptedEntry{}, st: Restored{Base: Base{Membership: s.first}}}
		}
		for _, w := range rest {
			if spare, ok := strings.CutPrefix(w, "spare="); ok {
				for _, id := range s.ids(spare) {
					s.nodes[id] = &teller{accepted: map[Slot]AcceptedEntry{}, st: Restored{Base: Base{Membership: s.first}}}
				}
			}
		}
		for _, id := range s.everyone() {
			s.start(id)
		}
	case "electable":
		may := s.ids(rest[0])
		for id, n := range s.nodes {
			n.electable = slices.Contains(may, id)
			if n.r != nil {
				n.r.SetElectable(n.electable)
			}
		}
	case "pass":
		d, err := time.ParseDuration(rest[0])
		s.check(err)
		s.pass(d)
	case "propose":
		r := s.node(rest[0]).r
		for _, payload := range rest[1:] {
			if _, _, err := r.Propose(s.now, []byte(payload)); err != nil {
				s.say("%d refuses %q: %v", r.cfg.ID, payload, err)
			}
		}
		s.settle(r)
	case "change":
		r := s.node(rest[0]).r
		m := s.membership(rest[1:])
		m.NextID = max(m.NextID, r.membership.NextID)
		if err := r.ProposeMembership(s.now, m); err != nil {
			s.say("%d refuses: %v", r.cfg.ID, err)
		}
		s.settle(r)
	case "transfer":
		s.check(s.node(rest[0]).r.Transfer(s.now, s.ids(rest[1])[0]))
	case "cut":
		for _, a := range s.ids(rest[0]) {
			for _, b := range s.ids(rest[2]) {
				s.cut[[2]ReplicaID{a, b}], s.cut[[2]ReplicaID{b, a}] = true, true
			}
		}
	case "drop":
		kind := "all"
		if len(rest) > 2 {
			kind = rest[2]
		}
		for _, a := range s.ids(rest[0]) {
			for _, b := range s.ids(rest[1]) {
				s.drop[[2]ReplicaID{a, b}] = kind
			}
		}
	case "heal":
		clear(s.cut)
		clear(s.drop)
	case "slow":
		d, err := time.ParseDuration(rest[1])
		s.check(err)
		for _, id := range s.ids(rest[0]) {
			s.slow[id] = d
		}
	case "window":
		n, err := strconv.Atoi(rest[1])
		s.check(err)
		s.node(rest[0]).r.cfg.FollowerSlotsMax = n
	case "stop":
		s.node(rest[0]).r = nil
	case "start":
		s.start(s.ids(rest[0])[0])
	case "read":
		r := s.node(rest[0]).r
		s.reads++
		s.say("%d is asked to read (%d)", r.cfg.ID, s.reads)
		r.ReadIndex(s.now, s.reads)
		s.settle(r)
	case "lease":
		r := s.node(rest[0]).r
		if slot, ok := r.LeaseRead(s.now); ok {
			s.say("%d may read what is applied up to slot %d, by its lease", r.cfg.ID, slot)
		} else {
			s.say("%d may not read by a lease", r.cfg.ID)
		}
	case "heartbeats":
		s.heartbeats, s.tally = rest[0], [3]int{}
		if s.other != nil {
			s.other.do(command)
		}
	case "status":
		for _, id := range s.ids(rest[0]) {
			s.status(s.nodes[id].r)
		}
	default:
		s.t.Fatalf("unknown command %q", command)
	}
}

func (s *story) check(err error) {
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *story) ids(list string) (ids []ReplicaID) {
	for w := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(w)
		s.check(err)
		ids = append(ids, ReplicaID(n))
	}
	return ids
}

func (s *story) node(id string) *teller { return s.nodes[s.ids(id)[0]] }

func (s *story) everyone() []ReplicaID {
	var ids []ReplicaID
	for id := range s.nodes {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func (s *story) membership(words []string) (m Membership) {
	for _, w := range words {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "members":
			for x := range strings.SplitSeq(value, ",") {
				id, kind, _ := strings.Cut(x, ":")
				member := Member{ID: s.ids(id)[0], Region: "r" + id, Kind: Voter}
				switch kind {
				case "witness":
					member.Kind = Witness
				case "learner":
					member.Kind = Learner
				}
				m.Members = append(m.Members, member)
				m.NextID = max(m.NextID, member.ID+1)
			}
		case "phase1":
			m.Phase1, _ = strconv.Atoi(value)
		case "phase2":
			m.Phase2, _ = strconv.Atoi(value)
		}
	}
	return m
}

func (s *story) start(id ReplicaID) {
	n := s.nodes[id]
	n.st.Accepted = nil
	for _, a := range n.accepted {
		if a.Slot > n.st.Chosen {
			n.st.Accepted = append(n.st.Accepted, a)
		}
	}
	slices.SortFunc(n.st.Accepted, func(a, b AcceptedEntry) int { return cmp.Compare(a.Slot, b.Slot) })
	r, err := New(Config{ID: id, Region: fmt.Sprintf("r%d", id), Seed: 1}, n.st, n, s.now)
	s.check(err)
	if s.beats != nil {
		if s.beats[id] == nil {
			s.beats[id] = NewBeats(id, uint64(id), 100*time.Millisecond)
		}
		r.Share(s.beats[id])
	}
	r.SetElectable(n.electable)
	n.r = r
}

// say writes a line.
func (s *story) say(format string, args ...any) {
	s.flush()
	fmt.Fprintf(s.out, "%5d ms  "+s.mark+format+"\n", append([]any{int64(s.now) / int64(time.Millisecond)}, args...)...)
}

// sayOf writes a line about a replica, together with the last one if that says
// the same about another.
func (s *story) sayOf(from string, id ReplicaID, text string) {
	from = s.mark + from
	p := s.pending
	if p.at != s.now || p.from != from || p.text != text {
		s.flush()
		*p = said{at: s.now, from: from, text: text}
	}
	p.whom = append(p.whom, fmt.Sprint(id))
}

func (s *story) flush() {
	if p := *s.pending; p.text != "" {
		*s.pending = said{}
		fmt.Fprintf(s.out, "%5d ms  %s%s%s\n", int64(p.at)/int64(time.Millisecond), p.from, strings.Join(p.whom, ","), p.text)
	}
}

func (s *story) status(r *Replica) {
	x := r.Status()
	line := fmt.Sprintf("%d is %v, chosen %d, %s", x.ID, x.Role, x.Chosen, showMembership(x.Membership))
	if x.Leader != x.ID && x.Leader != 0 {
		line += fmt.Sprintf(", follows %d", x.Leader)
	}
	if x.Role == Leader {
		line += fmt.Sprintf(", change %v", x.Change)
		if x.LeaseUntil > s.now {
			line += fmt.Sprintf(", lease for another %v", x.LeaseUntil.Sub(s.now).Round(time.Millisecond))
		} else {
			line += ", no lease"
		}
	}
	s.say("%s", line)
}

func showMembership(m Membership) string {
	one := func(c Configuration) string {
		ids := ""
		for _, x := range c.Members {
			ids += fmt.Sprintf(" %d%s", x.ID, map[MemberKind]string{Witness: "w", Learner: "l"}[x.Kind])
		}
		p1, p2 := c.Quorums()
		return fmt.Sprintf("[%s: %d/%d]", strings.TrimSpace(ids), p1, p2)
	}
	if m.Joint() {
		return fmt.Sprintf("epoch %d %s and %s", m.Epoch, one(*m.Outgoing), one(m.Incoming()))
	}
	return fmt.Sprintf("epoch %d %s", m.Epoch, one(m.Incoming()))
}

func showEntryOf(e Entry) string {
	switch e.Kind {
	case KindData:
		return fmt.Sprintf("%q (%v number %d)", e.Payload, e.Term, e.Number)
	case KindConfig:
		m, err := DecodeMembership(e.Payload)
		if err != nil {
			return err.Error()
		}
		return "config " + showMembership(m)
	}
	return fmt.Sprintf("%v of %v", e.Kind, e.Term)
}

func (s *story) settle(r *Replica) {
	n := s.nodes[r.cfg.ID]
	for {
		r.SetApplied(Slot(len(n.log)))
		rd, ok := r.Ready()
		if !ok {
			return
		}
		for _, rec := range rd.Persist {
			n.persist(rec)
		}
		for _, m := range slices.Concat(rd.Send, rd.AfterSync) {
			s.put(m)
			if m.Kind == MsgHeartbeat && m.SentAt != 0 || m.Kind == MsgHeartbeatAck {
				s.tally[2]++
			}
			if line := s.describe(r, m); line != "" {
				s.sayOf(fmt.Sprintf("%d -> ", m.From), m.To, "  "+line)
			}
		}
		for _, d := range rd.Delivered {
			n.log = append(n.log, SlotEntry{Slot: d.Slot, Entry: d.Entry})
			s.sayOf("", r.cfg.ID, fmt.Sprintf(": slot %d is chosen: %s%s", d.Slot, showEntryOf(d.Entry), map[Verdict]string{Void: ", void"}[d.Verdict]))
		}
		for _, q := range rd.Reads {
			if q.OK {
				s.say("%d: read (%d) sees what is applied up to slot %d", r.cfg.ID, q.ID, q.Slot)
			} else {
				s.say("%d: read (%d) is refused", r.cfg.ID, q.ID)
			}
		}
		r.Persisted(s.now, rd.Seq)
	}
}

func (n *teller) persist(rec Record) {
	switch rec.Kind {
	case RecordPromise:
		n.st.Promised = rec.Ballot
	case RecordAccept:
		n.accepted[rec.Slot] = AcceptedEntry{Slot: rec.Slot, Ballot: rec.Ballot, Entry: rec.Entry}
	case RecordChosen:
		n.st.Chosen = rec.Slot
	}
}

// describe puts a message into words; none for one that tells no story.
func (s *story) describe(r *Replica, m Message) string {
	switch m.Kind {
	case MsgPreVote:
		if r.stage != asking {
			return "" // a probe
		}
		return fmt.Sprintf("would you promise %v? (chosen %d)", m.Ballot, m.Chosen)
	case MsgPreVoteReply:
		if to := s.nodes[m.To].r; to == nil || to.stage != asking || to.candidacy.startedAt != m.SentAt {
			return ""
		}
		if !m.Granted {
			return fmt.Sprintf("I would not (promised %v, chosen %d)", m.Ballot, m.Chosen)
		}
		return fmt.Sprintf("I would promise %v", m.Ballot)
	case MsgPrepare:
		if m.Transfer {
			return fmt.Sprintf("prepare %v from slot %d on, the lease of %v was handed over", m.Ballot, m.Slot, m.Released)
		}
		return fmt.Sprintf("prepare %v from slot %d on", m.Ballot, m.Slot)
	case MsgPromise:
		line := fmt.Sprintf("promise %v, chosen %d", m.Ballot, m.Chosen)
		for _, a := range m.Accepted {
			line += fmt.Sprintf(", accepted in %d at %v: %s", a.Slot, a.Ballot, showEntryOf(a.Entry))
		}
		return line
	case MsgAccept:
		if len(m.Entries) == 0 {
			return fmt.Sprintf("accept %v: nothing new, but what of those before? (chosen %d)", m.Ballot, m.Chosen)
		}
		line := fmt.Sprintf("accept %v", m.Ballot)
		for i, e := range m.Entries {
			line += fmt.Sprintf("%s in slot %d: %s", map[bool]string{true: ","}[i > 0], e.Slot, showEntryOf(e.Entry))
		}
		return fmt.Sprintf("%s (chosen %d)", line, m.Chosen)
	case MsgAccepted:
		if !m.Granted {
			return fmt.Sprintf("accepted %v in slots %v, others refused (chosen %d)", m.Ballot, m.Slots, m.Chosen)
		}
		return fmt.Sprintf("accepted %v in slots %v", m.Ballot, m.Slots)
	case MsgReject:
		return fmt.Sprintf("no, I promised %v", m.Ballot)
	case MsgHeartbeat:
		if m.Transfer {
			return fmt.Sprintf("the lease of %v is free", m.Ballot)
		}
		if m.SentAt == 0 {
			return fmt.Sprintf("chosen up to %d", m.Chosen)
		}
		if s.heartbeats == "told" {
			return fmt.Sprintf("heartbeat of %v%s", m.Ballot, map[bool]string{true: "; may beats stand for it?"}[m.Shared])
		}
	case MsgHeartbeatAck:
		if s.heartbeats == "told" && m.Shared {
			return fmt.Sprintf("I follow %v, registered under generation %d", m.Ballot, m.Generation)
		}
		if s.heartbeats == "told" {
			return fmt.Sprintf("I follow %v", m.Ballot)
		}
	case MsgReadIndex:
		return "up to where must one have applied, to read now?"
	case MsgReadIndexReply:
		if !m.Granted {
			return "I can not tell"
		}
		return fmt.Sprintf("up to slot %d", m.Slot)
	case MsgTimeoutNow:
		return fmt.Sprintf("take over from %v (chosen %d)", m.Ballot, m.Chosen)
	case MsgFetch:
		return fmt.Sprintf("what is chosen from slot %d on?", m.Slot)
	case MsgLearn:
		return fmt.Sprintf("chosen from slot %d on: %d entries", m.Slot, len(m.Entries))
	}
	return ""
}

// put sends a message on its way.
func (s *story) put(m Message) {
	if !s.lost(m) {
		s.flights = append(s.flights, flight{s.now.Add(linkDelay + s.slow[m.From] + s.slow[m.To]), m})
	}
}

// beat sends beats, or answers of them.
func (s *story) beat(msgs []Message) {
	for _, m := range msgs {
		s.put(m)
		text := "beat"
		s.tally[0]++
		if m.Kind == MsgBeatAck {
			text = fmt.Sprintf("beat heard, for all that is registered under generation %d", m.Generation)
			s.tally[0]--
			s.tally[1]++
		}
		if s.heartbeats == "told" {
			s.sayOf(fmt.Sprintf("%d -> ", m.From), m.To, "  "+text)
		}
	}
}

// lost reports whether a message does not make it onto its link.
func (s *story) lost(m Message) bool {
	link := [2]ReplicaID{m.From, m.To}
	kind := s.drop[link]
	return s.cut[link] || kind == "all" || kind == "accept" && m.Kind == MsgAccept
}

func (s *story) pass(d time.Duration) {
	for end := s.now.Add(d); s.now < end; {
		s.move()
		if s.other != nil {
			s.other.move()
		}
	}
	if s.heartbeats == "counted" {
		t := s.tally
		if s.other != nil {
			t[2] += s.other.tally[2]
		}
		s.say("in this time: %d beats, %d answers, and %d heartbeats and answers of groups", t[0], t[1], t[2])
	}
	s.flush()
}

// move lets linkDelay pass.
func (s *story) move() {
	s.now = s.now.Add(linkDelay)
	due := slices.Clone(s.flights)
	s.flights = slices.DeleteFunc(s.flights, func(f flight) bool { return f.at <= s.now })
	for _, f := range due {
		to := s.nodes[f.m.To]
		switch {
		case f.at > s.now || to == nil || to.r == nil:
		case f.m.Kind == MsgBeat || f.m.Kind == MsgBeatAck:
			s.beat(s.beats[f.m.To].Step(s.now, f.m))
		default:
			s.check(to.r.Step(s.now, f.m))
			s.settle(to.r)
		}
	}
	for _, id := range s.everyone() {
		r := s.nodes[id].r
		if r == nil {
			continue
		}
		if s.other != nil { // the first group's story carries them
			s.beat(s.beats[id].Tick(s.now))
		}
		r.Tick(s.now)
		s.settle(r)
	}
}
