package paxosgroup

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var rewrite = flag.Bool("rewrite", false, "write testdata/*.txt anew; review each changed line")

// story is three replicas that talk over perfect links of 10 ms each way, and
// what they say, heartbeats and probes of round trips left out.
type story struct {
	t       *testing.T
	now     Instant
	rs      []*Replica
	stored  [][]SlotEntry
	flights []flight
	out     strings.Builder
	down    [4]bool
	slow    [4]time.Duration // on top, each way
}

type flight struct {
	at Instant
	m  Message
}

func (s *story) Chosen(from, to Slot, maxBytes int) ([]SlotEntry, error) {
	return s.stored[0][from-1 : to], nil // all alike, and 1 is never behind
}

func tell(t *testing.T) *story {
	s := &story{t: t, stored: make([][]SlotEntry, 3)}
	m := Membership{NextID: 4}
	for id := ReplicaID(1); id <= 3; id++ {
		m.Members = append(m.Members, Member{ID: id, Region: fmt.Sprintf("r%d", id), Kind: Voter})
	}
	for id := ReplicaID(1); id <= 3; id++ {
		r, err := New(Config{ID: id, Region: fmt.Sprintf("r%d", id), Seed: 1}, Restored{Base: Base{Membership: m}}, s, s.now)
		if err != nil {
			t.Fatal(err)
		}
		r.SetElectable(id == 1)
		s.rs = append(s.rs, r)
	}
	return s
}

func (s *story) say(format string, args ...any) {
	fmt.Fprintf(&s.out, "%5d ms  "+format+"\n", append([]any{int64(s.now) / int64(time.Millisecond)}, args...)...)
}

func (s *story) settle(r *Replica) {
	for {
		rd, ok := r.Ready()
		if !ok {
			return
		}
		for _, m := range slices.Concat(rd.Send, rd.AfterSync) {
			s.flights = append(s.flights, flight{s.now.Add(10*time.Millisecond + s.slow[m.From] + s.slow[m.To]), m})
			if line := describe(m); line != "" {
				s.say("%d -> %d  %s", m.From, m.To, line)
			}
		}
		for _, d := range rd.Delivered {
			i := r.cfg.ID - 1
			s.stored[i] = append(s.stored[i], SlotEntry{Slot: d.Slot, Entry: d.Entry})
			s.say("%d is handed slot %d: %v %v number %d, %s", r.cfg.ID, d.Slot, d.Entry.Kind, d.Entry.Term, d.Entry.Number,
				map[Verdict]string{Void: "void", Effective: "effective"}[d.Verdict])
		}
		r.Persisted(s.now, rd.Seq)
	}
}

func describe(m Message) string {
	switch m.Kind {
	case MsgPreVote:
		if m.Ballot.Counter == 1 && m.Chosen > 0 {
			return "" // a probe
		}
		return fmt.Sprintf("pre-vote %v, chosen %d", m.Ballot, m.Chosen)
	case MsgPreVoteReply:
		if !m.Granted {
			return ""
		}
		return fmt.Sprintf("pre-vote granted for %v", m.Ballot)
	case MsgPrepare:
		if m.Transfer {
			return fmt.Sprintf("prepare %v from slot %d, passing the lease of %v", m.Ballot, m.Slot, m.Released)
		}
		return fmt.Sprintf("prepare %v from slot %d", m.Ballot, m.Slot)
	case MsgPromise:
		return fmt.Sprintf("promise %v, chosen %d, %d accepted", m.Ballot, m.Chosen, len(m.Accepted))
	case MsgAccept:
		if len(m.Entries) == 0 {
			return fmt.Sprintf("accept %v nothing, chosen %d: what of those before?", m.Ballot, m.Chosen)
		}
		return fmt.Sprintf("accept %v slots %d to %d, chosen %d", m.Ballot, m.Entries[0].Slot, m.Entries[len(m.Entries)-1].Slot, m.Chosen)
	case MsgAccepted:
		if !m.Granted {
			return fmt.Sprintf("accepted %v slots %v, refused others, chosen %d", m.Ballot, m.Slots, m.Chosen)
		}
		return fmt.Sprintf("accepted %v slots %v", m.Ballot, m.Slots)
	case MsgReject:
		return fmt.Sprintf("reject, promised %v", m.Ballot)
	case MsgHeartbeat:
		if m.Transfer {
			return fmt.Sprintf("lease of %v released", m.Ballot)
		}
		if m.SentAt == 0 {
			return fmt.Sprintf("chosen %d", m.Chosen)
		}
	case MsgTimeoutNow:
		return fmt.Sprintf("take over from %v, chosen %d", m.Ballot, m.Chosen)
	case MsgFetch:
		return fmt.Sprintf("fetch from slot %d", m.Slot)
	case MsgLearn:
		return fmt.Sprintf("learn slots from %d, %d entries", m.Slot, len(m.Entries))
	}
	return ""
}

func (s *story) pass(d time.Duration) {
	for end := s.now.Add(d); s.now < end; {
		s.now = s.now.Add(10 * time.Millisecond)
		due := slices.Clone(s.flights)
		s.flights = slices.DeleteFunc(s.flights, func(f flight) bool { return f.at <= s.now })
		for _, f := range due {
			if r := s.rs[f.m.To-1]; f.at <= s.now && !s.down[f.m.To] {
				if err := r.Step(s.now, f.m); err != nil {
					s.t.Fatal(err)
				}
				s.settle(r)
			}
		}
		for _, r := range s.rs {
			if !s.down[r.cfg.ID] {
				r.Tick(s.now)
				s.settle(r)
			}
		}
	}
}

func (s *story) propose(r *Replica, payload string) {
	if _, _, err := r.Propose(s.now, []byte(payload)); err != nil {
		s.t.Fatal(err)
	}
	s.settle(r)
}

func TestConversations(t *testing.T) {
	for name, told := range map[string]func(*story){
		"elect_and_commit": func(s *story) {
			s.pass(time.Second)
			s.say("--- 1 proposes twice")
			s.propose(s.rs[0], "a")
			s.propose(s.rs[0], "b")
			s.pass(50 * time.Millisecond)
		},
		"hand_over": func(s *story) {
			s.pass(time.Second)
			s.rs[1].SetElectable(true)
			s.say("--- 1 proposes and hands over to 2")
			s.propose(s.rs[0], "a")
			if err := s.rs[0].Transfer(s.now, 2); err != nil {
				s.t.Fatal(err)
			}
			s.pass(150 * time.Millisecond)
		},
		"slow_follower": func(s *story) {
			s.pass(time.Second)
			s.rs[0].cfg.FollowerSlotsMax, s.slow[3] = 2, 50*time.Millisecond
			s.say("--- 3 takes 50 ms longer, and may be sent two slots ahead; 1 proposes")
			for _, payload := range []string{"a", "b", "c", "d"} {
				s.propose(s.rs[0], payload)
				s.pass(20 * time.Millisecond)
			}
			s.pass(400 * time.Millisecond)
		},
		"leader_lost": func(s *story) {
			s.pass(time.Second)
			s.say("--- 1 proposes and is lost, its last Accepts delivered")
			s.propose(s.rs[0], "a")
			s.down[1] = true
			s.rs[2].SetElectable(true)
			s.pass(3 * time.Second)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := tell(t)
			told(s)
			path := filepath.Join("testdata", name+".txt")
			if *rewrite {
				if err := os.WriteFile(path, []byte(s.out.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got := s.out.String(); got != string(want) {
				t.Errorf("the conversation is now\n%s\nwas\n%s", got, want)
			}
		})
	}
}
