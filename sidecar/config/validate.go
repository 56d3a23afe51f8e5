package config

import (
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

const (
	nameLengthMax = 32
	regionsMax    = 9
	logDirsMax    = 64
	// windowBytesLimit keeps a promise, which may carry about twice the window,
	// within what one message between sidecars can hold (64 MiB).
	windowBytesLimit = 24 << 20
)

var (
	namePattern            = regexp.MustCompile(`^[a-z0-9_-]+$`)
	applicationNamePattern = regexp.MustCompile(`^quorate[A-Za-z0-9_-]{0,56}$`)
)

// report notes a fault of key at the line where it stands, or of its section
// where it does not stand at all.
func (d *decoder) report(key, format string, args ...any) {
	if d.refused[key] {
		return // its value was unreadable, and what stands in c is the default
	}
	line := 0
	for at := key; ; {
		if l, ok := d.lines[at]; ok {
			line = l
			break
		}
		cut := strings.LastIndexAny(at, ".[")
		if cut < 0 {
			break
		}
		at = at[:cut]
	}
	d.fault(line, key, format, args...)
}

func (d *decoder) validate(c Config) {
	d.name("cluster", c.Cluster)
	d.name("region", c.Region)
	d.absolute("data_dir", c.DataDir)
	if c.Own().HasDatabase() {
		d.postgres(c.Postgres)
	}
	d.regions(c)
	d.quorums(c)
	d.listen(c)
	d.consensus(c)
	if c.Log.Dir != "" {
		d.absolute("log.dir", c.Log.Dir)
	}
	d.logDirs(c.Log)
	between(d, "log.segment_bytes", c.Log.SegmentBytes, 1<<20, 2<<30)
	between(d, "log.keep_bytes", c.Log.KeepBytes, 1<<20, 1<<50)
	between(d, "log.max_bytes", c.Log.MaxBytes, 1<<20, 1<<50)
	if least := max(c.Log.KeepBytes, 4*c.Log.SegmentBytes); c.Log.MaxBytes < least {
		d.report("log.max_bytes", "%v is less than log.keep_bytes and four of log.segment_bytes, %v", c.Log.MaxBytes, least)
	}
	between(d, "capture.fragment_bytes_max", c.Capture.FragmentBytesMax, 16<<10, 8<<20)
	between(d, "replay.batch_bytes_max", c.Replay.BatchBytesMax, 64<<10, 1<<30)
	between(d, "replay.lock_timeout", c.Replay.LockTimeout, time.Millisecond, time.Minute)
	between(d, "replay.max_reader_delay", c.Replay.MaxReaderDelay, time.Millisecond, 24*time.Hour)
	between(d, "snapshot.parallel", c.Snapshot.Parallel, 1, 64)
	d.tracing(c.Tracing)
	d.feed(c)
	between(d, "transaction_log.max_age", c.TransactionLog.MaxAge, time.Minute, 10*365*24*time.Hour)
	between(d, "transaction_log.max_bytes", c.TransactionLog.MaxBytes, 1<<20, 1<<40)
	d.oneOf("logging.level", c.Logging.Level, "debug", "info", "warn", "error")
	d.oneOf("logging.format", c.Logging.Format, "json", "text")
}

func (d *decoder) name(key, name string) {
	switch {
	case name == "":
		d.report(key, "missing; give a name of a-z, 0-9, _ and -")
	case !namePattern.MatchString(name):
		d.report(key, "%q is no name: use a-z, 0-9, _ and -", name)
	case len(name) > nameLengthMax:
		d.report(key, "%q is longer than %d characters", name, nameLengthMax)
	}
}

func (d *decoder) absolute(key, path string) {
	switch {
	case path == "":
		d.report(key, "missing; give an absolute path")
	case !filepath.IsAbs(path):
		d.report(key, "%q is relative; give an absolute path", path)
	}
}

func (d *decoder) logDirs(l Log) {
	if l.Dir != "" && len(l.Dirs) > 0 {
		d.report("log.dirs", "given beside log.dir; name all directories here and leave log.dir out")
	}
	if len(l.Dirs) > logDirsMax {
		d.report("log.dirs", "%d directories; at most %d are possible", len(l.Dirs), logDirsMax)
	}
	listed := map[string]int{}
	for i, dir := range l.Dirs {
		key := fmt.Sprintf("log.dirs[%d]", i)
		d.absolute(key, dir)
		if first, ok := listed[filepath.Clean(dir)]; ok {
			d.report(key, "%q is listed twice; first as log.dirs[%d]", dir, first)
		} else {
			listed[filepath.Clean(dir)] = i
		}
	}
}

// address checks host:port.
func (d *decoder) address(key, address string) {
	if address == "" {
		d.report(key, "missing; give host:port")
		return
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		d.report(key, "%q is not host:port", address)
		return
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		d.report(key, "%q: the port must be a number from 1 to 65535", address)
	}
	if host == "" && !strings.HasPrefix(key, "listen.") {
		d.report(key, "%q names no host", address)
	}
}

func (d *decoder) postgres(p Postgres) {
	if !applicationNamePattern.MatchString(p.ApplicationName) {
		d.report("postgres.application_name", "%q cannot be used: it must begin with quorate and consist of at most 63 letters, digits, _ and -", p.ApplicationName)
	}
	if p.BinDir != "" {
		d.absolute("postgres.bin_dir", p.BinDir)
	}
	if p.DSN == "" {
		d.report("postgres.dsn", "missing; give a connection string to this region's database, such as postgres://postgres@127.0.0.1:5432/app")
		return
	}
	parsed, err := pgconn.ParseConfig(p.DSN)
	if err != nil {
		d.report("postgres.dsn", "%v", err)
		return
	}
	if parsed.Database == "" {
		d.report("postgres.dsn", "names no database; the replicated one must be named")
	}
	if parsed.Database == "postgres" || strings.HasPrefix(parsed.Database, "template") {
		d.report("postgres.dsn", "database %q is PostgreSQL's own; replicate one of another name", parsed.Database)
	}
	for _, f := range parsed.Fallbacks { // also one a TLS mode, of the same host
		if f.Host != parsed.Host || f.Port != parsed.Port {
			d.report("postgres.dsn", "names several servers; a sidecar belongs to one")
			break
		}
	}
}

func (d *decoder) regions(c Config) {
	if len(c.Regions) == 0 {
		d.report("regions", "missing; list every region with name and peer, this one included")
		return
	}
	if len(c.Regions) > regionsMax {
		d.report("regions", "%d regions; at most %d are possible", len(c.Regions), regionsMax)
	}
	names, peers, routes := map[string]int{}, map[string]int{}, map[string]int{}
	for i, r := range c.Regions {
		key := fmt.Sprintf("regions[%d]", i)
		d.name(key+".name", r.Name)
		d.address(key+".peer", r.Peer)
		if r.Kind != "" {
			d.oneOf(key+".kind", r.Kind, KindVoter, KindWitness, KindLearner)
		}
		if first, ok := names[r.Name]; ok && r.Name != "" {
			d.report(key+".name", "%q is listed twice; first as regions[%d]", r.Name, first)
		} else {
			names[r.Name] = i
		}
		if first, ok := peers[r.Peer]; ok && r.Peer != "" {
			d.report(key+".peer", "%q is also the address of regions[%d]; each sidecar has its own", r.Peer, first)
		} else {
			peers[r.Peer] = i
		}
		if r.NATSRoute == "" {
			continue
		}
		d.address(key+".nats_route", r.NATSRoute)
		if first, ok := routes[r.NATSRoute]; ok {
			d.report(key+".nats_route", "%q is also the route of regions[%d]", r.NATSRoute, first)
		} else {
			routes[r.NATSRoute] = i
		}
	}
	if _, ok := names[c.Region]; !ok && c.Region != "" {
		d.report("region", "%q is not listed in regions", c.Region)
	}
	if i, ok := names[c.PreferredLeader]; c.PreferredLeader == "" {
		if c.LeaderHandBack {
			d.report("leader_hand_back", "names no region by itself: set preferred_leader, or leave it out")
		}
	} else if !ok {
		d.report("preferred_leader", "%q is not listed in regions", c.PreferredLeader)
	} else if kind := c.Regions[i].Kind; kind == KindWitness || kind == KindLearner {
		d.report("preferred_leader", "%q is a %s, which cannot lead", c.PreferredLeader, kind)
	}
}

// quorums checks that the sizes meet, and that whoever gives up the promise of
// surviving any minority says so.
func (d *decoder) quorums(c Config) {
	voters, databases := c.voters()
	if len(c.Regions) == 0 {
		return // reported already
	}
	if databases == 0 {
		d.report("regions", "none is a voter with a database: nobody could lead")
		return
	}
	s := c.Consensus
	sound := true
	for _, q := range []struct {
		key  string
		size int
	}{{"consensus.phase1_quorum", s.Phase1Quorum}, {"consensus.phase2_quorum", s.Phase2Quorum}} {
		if q.size < 0 || q.size > voters {
			d.report(q.key, "%d is not between 0 (a majority) and the %d voters", q.size, voters)
			sound = false
		}
	}
	if !sound {
		return
	}
	phase1, phase2 := c.Quorums()
	if phase1+phase2 <= voters {
		d.report("consensus.phase2_quorum", "phase 1 of %d and phase 2 of %d do not always have a voter in common, of %d: their sum must be at least %d, or a new leader could miss what was acknowledged", phase1, phase2, voters, voters+1)
		return
	}
	promised, k := (voters-1)/2, Durability(voters, databases, phase1, phase2)
	switch {
	case c.DurabilityRegions >= 0 && c.DurabilityRegions != k || c.DurabilityRegions < -1:
		d.report("durability_regions", "%d is not what %s give, which is %d", c.DurabilityRegions, sizes(voters, databases, phase1, phase2), k)
	case c.DurabilityRegions < 0 && k < promised:
		d.report("durability_regions", "missing; %s survive the loss of %d regions, a minority would be %d: set durability_regions: %d if that is meant", sizes(voters, databases, phase1, phase2), k, promised, k)
	}
}

func sizes(voters, databases, phase1, phase2 int) string {
	text := fmt.Sprintf("phase 1 of %d and phase 2 of %d among %d voters", phase1, phase2, voters)
	if databases < voters {
		text += fmt.Sprintf(", %d of them with a database,", databases)
	}
	return text
}

func (d *decoder) listen(c Config) {
	used := map[string]string{}
	check := func(key, address string) {
		d.address(key, address)
		if other, ok := used[address]; ok && address != "" {
			d.report(key, "%q is also %s; each needs its own port", address, other)
		} else {
			used[address] = key
		}
	}
	check("listen.peer", c.Listen.Peer)
	check("listen.admin", c.Listen.Admin)
	if c.embedsFeed() && c.Own().HasDatabase() {
		check("listen.nats", c.Listen.NATS)
		check("listen.nats_cluster", c.Listen.NATSCluster)
	}
}

func (d *decoder) consensus(c Config) {
	s := c.Consensus
	between(d, "consensus.heartbeat_interval", s.HeartbeatInterval, 10*time.Millisecond, 10*time.Second)
	between(d, "consensus.election_timeout_min", s.ElectionTimeoutMin, 50*time.Millisecond, time.Minute)
	between(d, "consensus.lease_duration", s.LeaseDuration, 50*time.Millisecond, time.Minute)
	if s.LeaseDuration < 3*s.HeartbeatInterval {
		d.report("consensus.lease_duration", "%v is less than three times the heartbeat_interval of %v: one lost heartbeat would end a lease", s.LeaseDuration, s.HeartbeatInterval)
	}
	if s.ElectionTimeoutMin < 2*s.HeartbeatInterval {
		d.report("consensus.election_timeout_min", "%v is less than twice the heartbeat_interval of %v: one lost heartbeat would start an election", s.ElectionTimeoutMin, s.HeartbeatInterval)
	}
	between(d, "consensus.clock_drift_ppm_max", s.ClockDriftPPMMax, 1, 100_000)
	between(d, "consensus.window_slots_max", s.WindowSlotsMax, 1, 1<<16)
	between(d, "consensus.window_bytes_max", s.WindowBytesMax, 1<<20, windowBytesLimit)
	if s.WindowBytesMax < 2*c.Capture.FragmentBytesMax {
		d.report("consensus.window_bytes_max", "%v does not hold two entries of capture.fragment_bytes_max, %v", s.WindowBytesMax, c.Capture.FragmentBytesMax)
	}
}

func (d *decoder) tracing(t Tracing) {
	if !(t.SampleRatio > 0 && t.SampleRatio <= 1) { // also NaN
		d.report("tracing.sample_ratio", "%v is not above 0 and up to 1", t.SampleRatio)
	}
	if t.OTLP == "" {
		return
	}
	u, err := url.Parse(t.OTLP)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Port() == "" {
		d.report("tracing.otlp", "%q is not http://host:port or https://host:port", t.OTLP)
	}
}

// embedsFeed reports whether the sidecar runs a NATS server of its own.
func (c Config) embedsFeed() bool { return c.Feed.Enabled && c.Feed.ExternalURL == "" }

func (d *decoder) feed(c Config) {
	between(d, "feed.max_age", c.Feed.MaxAge, time.Minute, 10*365*24*time.Hour)
	between(d, "feed.max_bytes", c.Feed.MaxBytes, 1<<20, 1<<50)
	if c.Feed.ExternalURL != "" {
		u, err := url.Parse(c.Feed.ExternalURL)
		if err != nil || u.Scheme != "nats" && u.Scheme != "tls" || u.Host == "" {
			d.report("feed.external_url", "%q is not nats://host:port or tls://host:port", c.Feed.ExternalURL)
		}
	}
	if !c.embedsFeed() {
		return
	}
	for i, r := range c.Regions {
		if r.NATSRoute == "" && r.HasDatabase() && len(c.Regions) > 1 {
			d.report(fmt.Sprintf("regions[%d].nats_route", i), "missing; the embedded feed needs the route to every region")
		}
	}
}

func (d *decoder) oneOf(key, value string, allowed ...string) {
	for _, a := range allowed {
		if value == a {
			return
		}
	}
	d.report(key, "%q is none of %s", value, strings.Join(allowed, ", "))
}

// between checks that low <= v <= high.
func between[T ~int | ~int64](d *decoder, key string, v, low, high T) {
	if v < low || v > high {
		d.report(key, "%v is not between %v and %v", v, low, high)
	}
}

// Warnings tells what is allowed and yet probably not meant.
func (c Config) Warnings() []string {
	var w []string
	switch n, _ := c.voters(); {
	case n == 1:
		w = append(w, "regions: one voter survives no loss")
	case n%2 == 0:
		w = append(w, fmt.Sprintf("regions: %d voters survive no more losses than %d would; an odd number is advised", n, n-1))
	}
	return w
}
