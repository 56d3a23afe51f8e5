package config

import (
	"path/filepath"
	"strings"
	"time"
)

// Config is the configuration of one region's sidecar. It is a plain value:
// copy it, do not change one that is in use.
type Config struct {
	// Cluster names the cluster. Sidecars refuse to talk to one of another cluster.
	Cluster string `yaml:"cluster"`
	// Region names this region; it must be one of those listed.
	Region string `yaml:"region"`
	// DataDir is the absolute path of the directory the sidecar keeps its state
	// in. It belongs to one sidecar.
	DataDir string `yaml:"data_dir"`
	// Postgres is this region's own server, the only one the sidecar connects to.
	Postgres Postgres `yaml:"postgres"`
	// Listen holds the addresses this sidecar serves.
	Listen Listen `yaml:"listen"`
	// Regions lists the regions of the cluster, this one included, at addresses
	// as seen from here.
	Regions []Region `yaml:"regions"`
	// PreferredLeader names the region that the others let go first at an
	// election; empty prefers none. Leadership that another region has is taken
	// back from it only if leader_hand_back says so.
	PreferredLeader string `yaml:"preferred_leader"`
	// LeaderHandBack has a region that leads in the place of preferred_leader hand
	// leadership back to it, as a planned transfer, once both have been well for
	// four leases; more and more seldom if the preferred region does not keep it.
	// It is to be the same in every region.
	LeaderHandBack bool `yaml:"leader_hand_back"`
	// DurabilityRegions states how many regions may be lost for good without the
	// loss of an acknowledged commit, where kinds and quorums give less than a
	// minority of the voters: without it they are refused. -1: not stated. It must
	// be what the sizes give; it changes nothing by itself.
	DurabilityRegions int `yaml:"durability_regions"`

	Consensus      Consensus      `yaml:"consensus"`
	Log            Log            `yaml:"log"`
	Capture        Capture        `yaml:"capture"`
	Replay         Replay         `yaml:"replay"`
	Snapshot       Snapshot       `yaml:"snapshot"`
	Tracing        Tracing        `yaml:"tracing"`
	Feed           Feed           `yaml:"feed"`
	TransactionLog TransactionLog `yaml:"transaction_log"`
	Logging        Logging        `yaml:"logging"`
}

// Postgres says how to reach this region's server.
type Postgres struct {
	// DSN is a URL or keyword/value connection string to the one replicated
	// database, as a superuser; it names one server.
	DSN string `yaml:"dsn"`
	// BinDir holds the client programs (pg_dump) of the server's major version. Empty:
	// /usr/lib/postgresql/MAJOR/bin where that exists, else PATH.
	BinDir string `yaml:"bin_dir"`
	// ApplicationName is what the sidecar's replication connection is called and
	// what synchronous_standby_names will list. It begins with quorate, by which
	// the sidecar tells its own sessions from clients'.
	ApplicationName string `yaml:"application_name"`
	// DefaultReadOnly has default_transaction_read_only set on the server while
	// this region leads no shard, so that drivers asked for a read-write session
	// pass it by. A write is then refused by PostgreSQL itself, without the hint
	// that names the leader.
	DefaultReadOnly bool `yaml:"default_read_only"`
}

// Listen holds the addresses, as host:port, at which the sidecar serves.
type Listen struct {
	// Peer serves the other regions' sidecars: consensus and seeding.
	Peer string `yaml:"peer"`
	// Admin serves paxosctl, load balancers and Prometheus.
	Admin string `yaml:"admin"`
	// NATS serves clients of the embedded change feed.
	NATS string `yaml:"nats"`
	// NATSCluster serves the other regions' embedded NATS servers.
	NATSCluster string `yaml:"nats_cluster"`
}

// Region is one region of the cluster.
type Region struct {
	// Name is unique in the cluster.
	Name string `yaml:"name"`
	// Kind is voter (the default: log, vote and database), witness (log and vote,
	// no PostgreSQL) or learner (log and database, no vote; it never leads).
	Kind string `yaml:"kind,omitempty"`
	// Peer is the host:port of its sidecar's listen.peer, as reached from here.
	Peer string `yaml:"peer"`
	// NATSRoute is the host:port of its listen.nats_cluster, as reached from
	// here. It is needed only with the embedded feed.
	NATSRoute string `yaml:"nats_route,omitempty"`
}

// Consensus holds the timing and the window of the Paxos groups. Give all
// regions the same: the lease is safe only if all agree on it.
type Consensus struct {
	// HeartbeatInterval is how often a leader speaks to its followers.
	HeartbeatInterval time.Duration `yaml:"heartbeat_interval"`
	// ElectionTimeoutMin is the shortest silence after which a follower
	// campaigns; each draws a time between it and twice it.
	ElectionTimeoutMin time.Duration `yaml:"election_timeout_min"`
	// LeaseDuration is for how long acceptors promise not to elect another.
	LeaseDuration time.Duration `yaml:"lease_duration"`
	// ClockDriftPPMMax bounds the difference between the rates of two regions'
	// clocks, in parts per million.
	ClockDriftPPMMax int64 `yaml:"clock_drift_ppm_max"`
	// WindowSlotsMax bounds the slots proposed and not yet chosen.
	WindowSlotsMax int `yaml:"window_slots_max"`
	// WindowBytesMax bounds the payload of these slots.
	WindowBytesMax ByteSize `yaml:"window_bytes_max"`
	// Phase1Quorum is how many voters must promise before one leads; 0: a majority.
	// Together with phase2_quorum it must exceed the number of voters.
	Phase1Quorum int `yaml:"phase1_quorum"`
	// Phase2Quorum is how many voters must have a commit on disk before it is
	// acknowledged; 0: a majority. Fewer are nearer, and fewer may be lost: see
	// durability_regions.
	Phase2Quorum int `yaml:"phase2_quorum"`
}

// Log configures the durable log of the Paxos groups.
type Log struct {
	// Dir is an absolute path; where it is not given, it is the directory log
	// in data_dir. A disk of its own keeps its flushes quick.
	Dir string `yaml:"dir"`
	// Dirs lists absolute paths of directories on different disks, in the place of
	// dir: each has flushes of its own, and the loss of one stops only the groups
	// that live there. New groups go where the fewest are. A directory can be
	// added, and taken out while no group lives there.
	Dirs []string `yaml:"dirs,omitempty"`
	// SegmentBytes is the size at which a new file is begun.
	SegmentBytes ByteSize `yaml:"segment_bytes"`
	// KeepBytes is how much of the log stays although nobody needs it. What is
	// more is cut once every region's database has it on disk.
	KeepBytes ByteSize `yaml:"keep_bytes"`
	// MaxBytes is from when on the log is also cut past regions that are behind or
	// down, which are then seeded anew. It is never cut past what this region's own
	// database has on disk.
	MaxBytes ByteSize `yaml:"max_bytes"`
}

// Where names the directories with their setting.
func (l Log) Where() string {
	if len(l.Dirs) > 0 {
		return "log.dirs " + strings.Join(l.Dirs, ", ")
	}
	return "log.dir " + l.Dir
}

// Capture configures reading the local server's changes.
type Capture struct {
	// FragmentBytesMax is the largest body of one log entry; a larger
	// transaction goes as several.
	FragmentBytesMax ByteSize `yaml:"fragment_bytes_max"`
}

// Replay configures applying other regions' transactions here.
type Replay struct {
	// BatchBytesMax bounds the bodies applied in one PostgreSQL transaction.
	BatchBytesMax ByteSize `yaml:"batch_bytes_max"`
	// LockTimeout is how long replay waits for a lock before it tries again.
	LockTimeout time.Duration `yaml:"lock_timeout"`
	// MaxReaderDelay is for how long local readers may hold up replay before
	// their sessions are ended; while a region is promoted they are ended at once.
	MaxReaderDelay time.Duration `yaml:"max_reader_delay"`
}

// Snapshot configures the seeding of a region.
type Snapshot struct {
	// Parallel is the number of tables copied at once.
	Parallel int `yaml:"parallel"`
}

// Tracing configures the export of spans.
type Tracing struct {
	// OTLP is the OTLP/gRPC endpoint, http://host:port or https://host:port;
	// empty turns tracing off.
	OTLP string `yaml:"otlp"`
	// SampleRatio is the share of transactions without a client's trace that
	// begin one of their own, above 0 and up to 1. Give all regions the same, or
	// traces have holes.
	SampleRatio float64 `yaml:"sample_ratio"`
}

// Feed configures the change feed to NATS JetStream.
type Feed struct {
	// Enabled turns the feed on.
	Enabled bool `yaml:"enabled"`
	// ExternalURL is a NATS server to publish to; empty runs one within the sidecar.
	ExternalURL string `yaml:"external_url"`
	// MaxAge is how long the stream keeps a change.
	MaxAge time.Duration `yaml:"max_age"`
	// MaxBytes bounds the stream.
	MaxBytes ByteSize `yaml:"max_bytes"`
}

// TransactionLog bounds quorate.log.
type TransactionLog struct {
	// MaxAge is how long a transaction stays readable there.
	MaxAge time.Duration `yaml:"max_age"`
	// MaxBytes bounds its size in the database.
	MaxBytes ByteSize `yaml:"max_bytes"`
}

// Logging configures the sidecar's own log on stderr.
type Logging struct {
	// Level is the least that is logged: debug, info, warn or error.
	Level string `yaml:"level"`
	// Format is how a line is written: json or text.
	Format string `yaml:"format"`
}

// Default returns the configuration with every default and nothing that has none.
// Log.Dir is left empty: it follows DataDir where Log.Dirs is empty.
func Default() Config {
	return Config{
		DurabilityRegions: -1,
		Postgres:          Postgres{ApplicationName: "quorate"},
		Listen: Listen{
			Peer:        "0.0.0.0:7460",
			Admin:       "127.0.0.1:7461",
			NATS:        "127.0.0.1:7462",
			NATSCluster: "0.0.0.0:7463",
		},
		Consensus: Consensus{
			HeartbeatInterval:  100 * time.Millisecond,
			ElectionTimeoutMin: time.Second,
			LeaseDuration:      1500 * time.Millisecond,
			ClockDriftPPMMax:   1000,
			WindowSlotsMax:     8192,
			WindowBytesMax:     16 << 20,
		},
		Log:            Log{SegmentBytes: 64 << 20, KeepBytes: 256 << 20, MaxBytes: 4 << 30},
		Capture:        Capture{FragmentBytesMax: 1 << 20},
		Replay:         Replay{BatchBytesMax: 4 << 20, LockTimeout: time.Second, MaxReaderDelay: 30 * time.Second},
		Snapshot:       Snapshot{Parallel: 4},
		Tracing:        Tracing{SampleRatio: 1},
		Feed:           Feed{MaxAge: 24 * time.Hour, MaxBytes: 1 << 30},
		TransactionLog: TransactionLog{MaxAge: 7 * 24 * time.Hour, MaxBytes: 256 << 20},
		Logging:        Logging{Level: "info", Format: "json"},
	}
}

// fill completes what follows from other settings.
func (c *Config) fill() {
	if len(c.Log.Dirs) == 0 {
		c.Log.Dirs = nil
	}
	if c.Log.Dir == "" && c.Log.Dirs == nil && c.DataDir != "" {
		c.Log.Dir = filepath.Join(c.DataDir, "log")
	}
	for i := range c.Regions {
		if c.Regions[i].Kind == "" {
			c.Regions[i].Kind = KindVoter
		}
	}
}

// The kinds of regions.
const (
	KindVoter   = "voter"
	KindWitness = "witness"
	KindLearner = "learner"
)

// Votes reports whether the region has a vote.
func (r Region) Votes() bool { return r.Kind != KindLearner }

// HasDatabase reports whether a PostgreSQL stands beside the region's sidecar.
func (r Region) HasDatabase() bool { return r.Kind != KindWitness }

// voters counts the regions that vote, and those of them with a database.
func (c Config) voters() (voters, databases int) {
	for _, r := range c.Regions {
		if r.Votes() {
			voters++
			if r.HasDatabase() {
				databases++
			}
		}
	}
	return voters, databases
}

// Quorums returns the sizes that the settings come to.
func (c Config) Quorums() (phase1, phase2 int) {
	voters, _ := c.voters()
	phase1, phase2 = c.Consensus.Phase1Quorum, c.Consensus.Phase2Quorum
	if phase1 == 0 {
		phase1 = voters/2 + 1
	}
	if phase2 == 0 {
		phase2 = voters/2 + 1
	}
	return phase1, phase2
}

// Durability returns how many regions may be lost for good without the loss of
// an acknowledged commit: some holder of it must be left, and enough voters to
// find it. Databases are the voters that have one; below where logs are cut,
// only they hold anything.
func Durability(voters, databases, phase1, phase2 int) int {
	return max(0, min(phase2-1, voters-phase1, databases-1))
}

// Own returns this region's entry of Regions.
func (c Config) Own() Region {
	for _, r := range c.Regions {
		if r.Name == c.Region {
			return r
		}
	}
	return Region{}
}
