package paxosgroup

import (
	"fmt"
	"time"
)

// ReplicaID names one acceptor for ever: a replica that lost its disk comes
// back under a new one. Zero means none.
type ReplicaID uint32

// GroupID names the Multi-Paxos group of one shard.
type GroupID uint32

// Slot is a position in a group's log: 1, 2, 3, …
type Slot uint64

// Incarnation is one life of a region's database, from its seeding to its next.
type Incarnation uint64

func (i Incarnation) String() string { return fmt.Sprintf("%016x", uint64(i)) }

// Instant is a reading of the machine's boot-time clock (CLOCK_BOOTTIME) in
// nanoseconds: it never steps back and goes on while the machine is suspended.
type Instant int64

// Add returns the instant d later.
func (t Instant) Add(d time.Duration) Instant { return t + Instant(d) }

// Sub returns the time from u to t.
func (t Instant) Sub(u Instant) time.Duration { return time.Duration(t - u) }

// Ballot orders leaderships: first by counter, then by replica.
type Ballot struct {
	Counter uint64
	Replica ReplicaID
}

// Less reports whether b is ordered before c.
func (b Ballot) Less(c Ballot) bool {
	return b.Counter < c.Counter || b.Counter == c.Counter && b.Replica < c.Replica
}

// IsZero reports whether b is no ballot at all.
func (b Ballot) IsZero() bool { return b == Ballot{} }

func (b Ballot) String() string { return fmt.Sprintf("%d.%d", b.Counter, b.Replica) }

// EntryKind says what a slot's value is to the core. What a data entry means
// (a transaction, a fragment, a sequence mark) is its proposer's affair.
type EntryKind uint8

// The kinds of entries. Their numbers are on disk and on the wire.
const (
	KindNoOp    EntryKind = 1 // fills a gap
	KindOpening EntryKind = 2 // the first entry of a term
	KindData    EntryKind = 3 // numbered 1, 2, 3, … within its term
	KindConfig  EntryKind = 4 // a membership, payload is its encoding; exempt from terms
)

func (k EntryKind) String() string {
	switch k {
	case KindNoOp:
		return "noop"
	case KindOpening:
		return "opening"
	case KindData:
		return "data"
	case KindConfig:
		return "config"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Entry is the value of a slot. Term, Number, Region and Incarnation are those
// of the leadership that first proposed it and travel unchanged when a later
// leader proposes it again.
type Entry struct {
	Kind        EntryKind
	Term        Ballot
	Number      uint64 // within Term; 0 for anything but data
	Region      string
	Incarnation Incarnation
	Session     uint64 // of the client that proposed it, with its Sequence; 0 for none
	Sequence    uint64
	Payload     []byte
}

// MemberKind says what a member does.
type MemberKind uint8

// The kinds of members. Their numbers are on disk and on the wire.
const (
	Voter   MemberKind = 1 // log and database
	Witness MemberKind = 2 // votes and keeps log, no database
	Learner MemberKind = 3 // log and database, no vote
)

// Member is one replica of a group.
type Member struct {
	ID     ReplicaID
	Region string
	Kind   MemberKind
}

// Configuration is a set of members with the sizes of its quorums.
type Configuration struct {
	Members []Member
	Phase1  int // voters needed in phase 1; 0 means a majority
	Phase2  int // voters needed in phase 2; 0 means a majority
}

// Membership is what governs a slot: one configuration, or, while a change is
// being made, two that must both agree. It is fixed by the chosen entries below
// the slot: so each slot has exactly one, whoever proposes in it.
//
// Memberships handed out share their slices and are not to be changed in place.
type Membership struct {
	Epoch   uint64 // how many configuration entries led here; set by ProposeMembership
	Members []Member
	Phase1  int       // voters needed in phase 1; 0 means a majority
	Phase2  int       // voters needed in phase 2; 0 means a majority
	NextID  ReplicaID // the smallest id never used

	// Outgoing is what Members, Phase1 and Phase2 are to replace: while it is
	// there, every quorum is one of each. Set by ProposeMembership.
	Outgoing *Configuration
}

// Judge is the state by which learners tell effective entries from void ones,
// in slot order: an opening is effective if its ballot is above Term; a data
// entry only if it is of Term and has number Next, and if its session is in
// Sessions only with a higher sequence number. A copy shares Sessions: one that
// is to judge on its own is made by Clone.
type Judge struct {
	Term        Ballot
	Region      string
	Incarnation Incarnation
	Next        uint64
	Sessions    []Session // least recently effective first, at most SessionsMax
}

// Session is a client as the learners know it: a proposer that numbers what it
// proposes, has one proposal outstanding at a time, and repeats that one, with
// its number, until it knows that it is effective.
type Session struct {
	ID       uint64
	Sequence uint64 // of its last effective entry
}

// SessionsMax bounds how many sessions learners remember. One that has had
// nothing effective for longer than this many others is forgotten, and a late
// repetition of its last entry would count as a new one: a group has no more
// proposers than this that repeat themselves.
const SessionsMax = 64

// Base is where a replica's log starts: everything at or below Slot is held as
// a database image, not as entries. Slot 0 is the empty log.
type Base struct {
	Slot       Slot
	Judge      Judge
	Membership Membership
}

// Verdict is what the learners, all alike, make of a chosen entry.
type Verdict uint8

// The verdicts.
const (
	Void      Verdict = 1 // a no-op in every region
	Effective Verdict = 2
)

// Delivered is a chosen entry with its verdict. Delivery is in slot order and
// without a gap. No-ops are Void; effective configuration entries are Effective.
type Delivered struct {
	Slot    Slot
	Entry   Entry
	Verdict Verdict
}

// RecordKind says what a durable record holds.
type RecordKind uint8

// The kinds of records. Their numbers are on disk.
const (
	RecordPromise RecordKind = 1 // Ballot was promised
	RecordAccept  RecordKind = 2 // Entry was accepted in Slot at Ballot
	RecordLearn   RecordKind = 3 // Entry is chosen in Slot (learned from a peer)
	RecordChosen  RecordKind = 4 // every slot up to Slot is chosen and holds what was last accepted or learned there; needs no flush of its own but for Flush
	RecordBase    RecordKind = 5 // the log starts anew at Base; everything before is dropped
)

// Record is one durable fact of a group.
type Record struct {
	Kind   RecordKind
	Ballot Ballot
	Slot   Slot
	Entry  Entry
	Base   *Base
	Flush  bool // of a RecordChosen: a message rests on it after all. Not stored
}

// NeedsFlush reports whether a message may rest on the record.
func (r Record) NeedsFlush() bool { return r.Kind != RecordChosen || r.Flush }

// Restored is what the durable log gives back at start.
type Restored struct {
	Base     Base
	Promised Ballot
	Chosen   Slot            // highest RecordChosen; may lag behind what was really chosen
	Accepted []AcceptedEntry // slots above Chosen, ascending
	Judged   *Judged         // nil if the log does not know it
}

// Judged is what judging the chosen entries above Restored.Base comes to.
type Judged struct {
	Base            // that a log cut at Restored.Chosen would have
	Configured Slot // of the configuration entry in force; at or below Restored.Base if it is that one's
}

// AcceptedEntry is an entry with the ballot at which it was accepted.
type AcceptedEntry struct {
	Slot   Slot
	Ballot Ballot
	Entry  Entry
}

// SlotEntry is a chosen entry in its slot.
type SlotEntry struct {
	Slot  Slot
	Entry Entry
}

// Storage reads back what the core handed out to be persisted. It is called
// from within Step and Tick, must be deterministic, and sees every record
// handed out, flushed or not.
type Storage interface {
	// Chosen returns consecutive chosen entries from slot from on, at most up
	// to slot to and (beyond the first) maxBytes of payload.
	Chosen(from, to Slot, maxBytes int) ([]SlotEntry, error)
}

// MessageKind says what a message is.
type MessageKind uint8

// The kinds of messages. Their numbers are on the wire.
const (
	MsgPreVote      MessageKind = 1  // would you promise Ballot? carries Chosen and Applied
	MsgPreVoteReply MessageKind = 2  // Granted, or Ballot of what stands in the way
	MsgPrepare      MessageKind = 3  // phase 1a over all slots from Slot on
	MsgPromise      MessageKind = 4  // phase 1b: Accepted above the sender's Chosen, and Chosen
	MsgAccept       MessageKind = 5  // phase 2a: Entries (consecutive or not) at Ballot; SentAt is echoed. None: what became of those before?
	MsgAccepted     MessageKind = 6  // phase 2b: Slots accepted at Ballot. SentAt: of the last Accept this answers. Granted: nothing in it was refused
	MsgReject       MessageKind = 7  // Ballot is promised, or a lease is honoured
	MsgHeartbeat    MessageKind = 8  // lease request, Chosen; SentAt is echoed. SentAt 0: only Chosen, no lease, no ack. Transfer: Ballot's lease is released
	MsgHeartbeatAck MessageKind = 9  // lease grant, the sender's Chosen and Applied
	MsgFetch        MessageKind = 10 // send me chosen entries from Slot on, about BytesMax of them; 0 is as much as one sends
	MsgLearn        MessageKind = 11 // chosen Entries from Slot on; Chosen of the sender
	MsgTimeoutNow   MessageKind = 12 // campaign at once: leadership is handed to you
	MsgNeedSnapshot MessageKind = 13 // what you fetch is below my base

	// Between sidecars, in group 0, for all groups at once (beat.go).
	MsgBeat    MessageKind = 14 // heartbeat of every leadership that its receiver has registered; SentAt is echoed
	MsgBeatAck MessageKind = 15 // lease grant to every leadership registered under Life and Generation

	MsgReadIndex      MessageKind = 16 // up to where must one read, to see all that is acknowledged by now? ID and SentAt are echoed
	MsgReadIndexReply MessageKind = 17 // Granted: up to Slot
)

// Message is what replicas of one group send each other. Which fields are set
// depends on Kind; the core neither keeps nor changes a message it was given,
// and shares payload bytes.
type Message struct {
	Kind     MessageKind
	From, To ReplicaID
	Ballot   Ballot
	Slot     Slot
	Chosen   Slot
	Applied  Slot
	SentAt   Instant // sender's clock, echoed, never compared with another clock
	Granted  bool
	Transfer bool   // Prepare of a handed-over leadership passes the lease of Released
	Released Ballot // Prepare with Transfer: the leadership that has given up its lease
	Slots    []Slot
	Accepted []AcceptedEntry
	Entries  []SlotEntry

	Shared     bool   // heartbeat: beats may stand for it from now on; its ack: they do
	Life       uint64 // with Shared, and of a beat and its ack: which life of the sender's process
	Generation uint64 // with Life: what of that life the beat, or the ack, stands for
	ID         uint64 // of a MsgReadIndex and its reply
	BytesMax   uint64 // of a MsgFetch
}

// Ready is what the caller owes the core, to be paid in field order.
type Ready struct {
	Seq       uint64      // to be handed to Persisted when Persist is flushed
	Send      []Message   // rests on nothing unflushed: send now; any may be lost
	Persist   []Record    // append to the log and flush
	AfterSync []Message   // rests on Persist (and on all earlier Readies'): send when it is durable
	Delivered []Delivered // newly chosen, in slot order
	Reads     []ReadResult
	Snapshot  bool // this replica is behind every peer's base: it needs an image
}

// ReadResult answers a ReadIndex.
type ReadResult struct {
	ID   uint64 // as it was asked with
	Slot Slot   // whoever has applied everything up to here sees all that was acknowledged before it was asked
	OK   bool   // false: no leader could be confirmed in time; Slot is 0
}

// Role is what a replica is at the moment.
type Role uint8

// The roles.
const (
	Follower  Role = 1
	Candidate Role = 2 // pre-vote or phase 1
	Leader    Role = 3 // phase 1 done; opening proposed
)

func (r Role) String() string {
	switch r {
	case Follower:
		return "follower"
	case Candidate:
		return "candidate"
	case Leader:
		return "leader"
	}
	return fmt.Sprintf("role(%d)", uint8(r))
}

// Status is a snapshot of a replica.
type Status struct {
	ID         ReplicaID
	Role       Role
	Leader     ReplicaID // believed; 0 if none is known
	Ballot     Ballot    // leader: its own; else the highest seen
	Promised   Ballot
	LeaseUntil Instant // leader: until when it may rely on its lease; 0 if not held
	Base       Slot
	Chosen     Slot
	LastSlot   Slot // leader: highest slot proposed
	Judge      Judge
	Membership Membership
	Change     Change
	Durability int          // how many voters may be lost, with their disks, before an acknowledged entry is
	Contacts   []Member     // whom to be connected with: members, those just removed, those about to be added
	Peers      []PeerStatus // leader only
	Void       uint64       // void entries delivered since start

	// Of the terms that this replica opened since start: how many, and from the
	// beginning of the candidacy to the opening chosen, of the last and of all.
	Openings     uint64
	OpeningTook  time.Duration
	OpeningTotal time.Duration

	// HandBackDue is the replica of the preferred region, while this one leads
	// and that one is fit to: leadership is to be transferred to it. 0 otherwise.
	HandBackDue ReplicaID
}

// Change is how far a change of membership has come, as its leader sees it.
// Other replicas know only whether the membership is joint.
type Change uint8

// The stages of a change.
const (
	ChangeNone      Change = 0 // every phase-1 quorum will find the membership: whom it left out may go
	ChangeWaiting   Change = 1 // not proposed yet: it waits for the new voters, or is dropped
	ChangeJoint     Change = 2 // the old and the new configuration must both agree
	ChangeSpreading Change = 3 // the new configuration is in force; too few have it as chosen yet
)

func (c Change) String() string {
	switch c {
	case ChangeNone:
		return "none"
	case ChangeWaiting:
		return "waiting"
	case ChangeJoint:
		return "joint"
	case ChangeSpreading:
		return "spreading"
	}
	return fmt.Sprintf("change(%d)", uint8(c))
}

// PeerStatus is what a leader knows of a follower.
type PeerStatus struct {
	ID        ReplicaID
	Chosen    Slot
	Applied   Slot
	LastHeard Instant
	RoundTrip time.Duration // of heartbeats, on average

	// Of Accepts to it. Bytes count payloads and 64 an entry.
	InFlight, InFlightBytes  int   // slots and bytes not answered yet
	WindowSlots, WindowBytes int   // how much may be
	RateSlots, RateBytes     int64 // greatest lately delivered in a second, or what little was asked for
	MinRoundTrip             time.Duration
	Behind                   bool // it catches up first, and is sent none
}
