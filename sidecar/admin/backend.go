package admin

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pglogrepl"

	"quorate/paxosgroup"
)

// Backend is what the service tells and does. Its methods are called from many
// goroutines at once and must return when ctx ends.
type Backend interface {
	// Status tells how this region is, and with all how the others are, in the
	// order of the configuration. A region that does not answer within the
	// implementation's own short limit is listed with Reachable false; that is
	// no error. Without all it neither waits nor asks anybody.
	Status(ctx context.Context, all bool) (ClusterStatus, error)
	// Transfer hands leadership to a region and returns when it is handed over.
	// Errors: ErrNoLeader, ErrUnknownRegion, *NotLeaderError, *CannotLeadError.
	Transfer(ctx context.Context, to string) error
	// ReadLog yields the chosen entries from slot from on (0: from the oldest
	// held) in slot order, at most limit (0: all), and returns at the last one
	// chosen so far. With changes it fills LogEntry.Changes. An error of yield
	// ends it and is returned. Errors: ErrCompacted.
	ReadLog(ctx context.Context, from uint64, limit int, changes bool, yield func(LogEntry) error) error
	// ApplyMembers makes the group's membership what the leader's configuration
	// says and returns the changes in words; dryRun only tells. Errors: ErrNoLeader.
	ApplyMembers(ctx context.Context, dryRun bool) ([]string, error)
	// Version tells which build this is.
	Version() VersionInfo
}

var (
	// ErrNoLeader says that no region is known to lead.
	ErrNoLeader = errors.New("no region leads")
	// ErrUnknownRegion says that the cluster has no such region.
	ErrUnknownRegion = errors.New("no such region")
	// ErrCompacted says that the log no longer holds what was asked for.
	ErrCompacted = errors.New("the log no longer holds this slot")
)

// NotLeaderError says that only Leader can do what was asked.
type NotLeaderError struct{ Leader string }

func (e *NotLeaderError) Error() string {
	return fmt.Sprintf("not the leader; ask region %s", e.Leader)
}

// CannotLeadError says why a region cannot be handed leadership.
type CannotLeadError struct{ Region, Reason string }

func (e *CannotLeadError) Error() string {
	return fmt.Sprintf("region %s cannot lead: %s", e.Region, e.Reason)
}

// The roles of a region.
const (
	RoleLeader    = "leader"
	RoleCandidate = "candidate"
	RoleFollower  = "follower"
	RoleLearner   = "learner"
	RoleWitness   = "witness"
)

// The states of a region's database.
const (
	StateStarting  = "starting"  // not yet known where the database stands
	StateSeeding   = "seeding"   // loading an image of another region
	StateFollowing = "following" // replaying
	StatePromoting = "promoting" // leads, fence not yet open
	StateLeading   = "leading"   // fence open
	StateDemoting  = "demoting"  // fence closing
	StateRepairing = "repairing" // discarding what was not chosen
	StateStopped   = "stopped"   // cannot go on; Health says why
	StateWitness   = "witness"   // there is no database: votes and keeps the log
)

// ClusterStatus is how the cluster is, as one region sees it.
type ClusterStatus struct {
	Cluster           string
	Region            string // the one that says so
	Leader            string // empty if none is known
	DurabilityRegions int    // regions whose loss for good loses nothing acknowledged
	Phase1, Phase2    int    // voters that must promise a leader, and that have an acknowledged commit on disk
	Voters            int    // witnesses included; 0: not known yet
	Regions           []RegionStatus
}

// Own returns the status of the region that says so.
func (s ClusterStatus) Own() RegionStatus {
	for _, r := range s.Regions {
		if r.Name == s.Region {
			return r
		}
	}
	return RegionStatus{Name: s.Region}
}

// RegionStatus is how one region is.
type RegionStatus struct {
	Name        string
	Reachable   bool // false: the rest is what was last heard of it
	ReplicaID   paxosgroup.ReplicaID
	Role        string // a Role constant
	State       string // a State constant
	Leader      string // whom it believes to lead; empty: nobody
	Writable    bool   // its fence is open
	Ballot      paxosgroup.Ballot
	LeaseLeft   time.Duration // leader only
	Base        paxosgroup.Slot
	Chosen      paxosgroup.Slot
	Applied     paxosgroup.Slot
	LagSlots    uint64 // behind the highest slot known to be chosen anywhere
	Lag         time.Duration
	CaughtUp    bool // applied all that was chosen a moment ago
	Healthy     bool
	Health      string // "ok", or what is wrong and how to mend it
	Incarnation paxosgroup.Incarnation
	Void        uint64          // void entries delivered since start
	Kind        string          // voter, witness or learner
	Durable     paxosgroup.Slot // the database has everything up to here on disk; 0: none, or not known
	FeedNext    paxosgroup.Slot // a leader's feed has published everything below; 0: not known
	LogBytes    uint64          // that the log takes on disk
}

// LogEntry is a chosen entry in readable form.
type LogEntry struct {
	Slot        paxosgroup.Slot
	Kind        string // noop, opening, config, transaction, fragment, commit or marks
	Term        paxosgroup.Ballot
	Number      uint64
	Region      string
	Incarnation paxosgroup.Incarnation
	Effective   bool
	Time        time.Time // of the commit; zero if it has none
	Xid         uint64
	EndLSN      pglogrepl.LSN
	Tables      []TableRows
	Bytes       uint64 // of the payload
	Trace       string // trace id in hex; empty: none
	Changes     []string
	Detail      string // what the other fields have no place for: members, marks, a fragment's number
}

// TableRows counts the rows that an entry changes in a table.
type TableRows struct {
	Table string // schema.name
	Rows  uint64
}

// VersionInfo tells which build answers.
type VersionInfo struct {
	Version   string
	Commit    string
	GoVersion string
	Protocol  uint32 // of the peer connections
	Postgres  string // of the server beside it; empty if it was not yet reached
}
