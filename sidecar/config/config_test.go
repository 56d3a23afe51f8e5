package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

// minimal is the least that a file must say; docs/configuration.md shows it too.
const minimal = `cluster: demo
region: r1
data_dir: /var/lib/quorate
postgres:
  dsn: postgres://postgres@127.0.0.1:5432/app
listen:
  peer: 10.1.0.5:7460
regions:
  - {name: r1, peer: "10.1.0.5:7460"}
  - {name: r2, peer: "10.2.0.5:7460"}
  - {name: r3, peer: "10.3.0.5:7460"}
`

func TestMinimal(t *testing.T) {
	got, err := Parse("region.yaml", []byte(minimal))
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Cluster, want.Region, want.DataDir = "demo", "r1", "/var/lib/quorate"
	want.Postgres.DSN = "postgres://postgres@127.0.0.1:5432/app"
	want.Listen.Peer = "10.1.0.5:7460"
	want.Log.Dir = "/var/lib/quorate/log"
	want.Regions = []Region{
		{Name: "r1", Peer: "10.1.0.5:7460", Kind: KindVoter},
		{Name: "r2", Peer: "10.2.0.5:7460", Kind: KindVoter},
		{Name: "r3", Peer: "10.3.0.5:7460", Kind: KindVoter},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if got.Own() != want.Regions[0] {
		t.Errorf("own region is %+v", got.Own())
	}
	if w := got.Warnings(); len(w) != 0 {
		t.Errorf("warned of %q", w)
	}
}

// TestEverySetting writes every setting to something that is not its default
// and expects to read it back.
func TestEverySetting(t *testing.T) {
	want := Config{
		Cluster: "c", Region: "b", DataDir: "/d",
		Postgres: Postgres{DSN: "host=/run/postgresql dbname=app", BinDir: "/opt/pg/bin", ApplicationName: "quorate_b", DefaultReadOnly: true},
		Listen:   Listen{Peer: "[::1]:1", Admin: ":2", NATS: "127.0.0.1:3", NATSCluster: "127.0.0.1:4"},
		Regions: []Region{
			{Name: "a", Peer: "h1:1", Kind: KindVoter, NATSRoute: "h1:2"},
			{Name: "b", Peer: "h2:1", Kind: KindVoter, NATSRoute: "h2:2"},
			{Name: "c", Peer: "h3:1", Kind: KindWitness, NATSRoute: "h3:2"},
			{Name: "d", Peer: "h4:1", Kind: KindVoter, NATSRoute: "h4:2"},
			{Name: "e", Peer: "h5:1", Kind: KindLearner, NATSRoute: "h5:2"},
		},
		PreferredLeader: "a", LeaderHandBack: true, DurabilityRegions: 1,
		Consensus: Consensus{HeartbeatInterval: 50 * time.Millisecond, ElectionTimeoutMin: 700 * time.Millisecond, LeaseDuration: 900 * time.Millisecond,
			ClockDriftPPMMax: 7, WindowSlotsMax: 99, WindowBytesMax: 5 << 20, Phase1Quorum: 3, Phase2Quorum: 2},
		Log:            Log{Dirs: []string{"/l", "/m/log"}, SegmentBytes: 3 << 20, KeepBytes: 5 << 20, MaxBytes: 99 << 20},
		Capture:        Capture{FragmentBytesMax: 100_000},
		Replay:         Replay{BatchBytesMax: 2 << 20, LockTimeout: 250 * time.Millisecond, MaxReaderDelay: 3 * time.Second},
		Snapshot:       Snapshot{Parallel: 9},
		Tracing:        Tracing{OTLP: "http://127.0.0.1:4317", SampleRatio: 0.25},
		Feed:           Feed{Enabled: true, ExternalURL: "nats://n:4222", MaxAge: time.Hour, MaxBytes: 2 << 30},
		TransactionLog: TransactionLog{MaxAge: time.Hour, MaxBytes: 2 << 20},
		Logging:        Logging{Level: "debug", Format: "text"},
	}
	zeros := 0
	for _, v := range leaves(reflect.ValueOf(want)) {
		if v.IsZero() {
			zeros++
		}
	}
	if zeros != 1 { // of log.dir and log.dirs one is given
		t.Fatalf("%d settings of this test are zero: %+v", zeros, want)
	}
	text, err := yaml.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse("region.yaml", text)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if len(got.Warnings()) != 1 {
		t.Errorf("an even number of regions warns of %q", got.Warnings())
	}
}

func leaves(v reflect.Value) []reflect.Value {
	if v.Kind() != reflect.Struct {
		return []reflect.Value{v}
	}
	var all []reflect.Value
	for i := range v.NumField() {
		all = append(all, leaves(v.Field(i))...)
	}
	return all
}

func TestFaults(t *testing.T) {
	for _, tc := range []struct {
		name string
		text string
		want []string // the error's lines
	}{
		{
			name: "an empty file lacks everything that has no default",
			text: "",
			want: []string{
				`f: cluster: missing; give a name of a-z, 0-9, _ and -`,
				`f: region: missing; give a name of a-z, 0-9, _ and -`,
				`f: data_dir: missing; give an absolute path`,
				`f: postgres.dsn: missing; give a connection string to this region's database, such as postgres://postgres@127.0.0.1:5432/app`,
				`f: regions: missing; list every region with name and peer, this one included`,
			},
		},
		{
			name: "a misspelt key, and one like none",
			text: minimal + "consensus:\n  lease_durations: 2s\n  colour: red\n",
			want: []string{
				`f:13: consensus.lease_durations: unknown setting; did you mean lease_duration?`,
				`f:14: consensus.colour: unknown setting; known here: clock_drift_ppm_max, election_timeout_min, heartbeat_interval, lease_duration, phase1_quorum, phase2_quorum, window_bytes_max, window_slots_max`,
			},
		},
		{
			name: "a key given twice",
			text: minimal + "log: {}\nlog: {}\n",
			want: []string{`f:13: log: given twice; first at line 12`},
		},
		{
			name: "values of the wrong kind, each once",
			text: minimal + "consensus:\n  heartbeat_interval: 5\n  window_slots_max: many\n  window_bytes_max: 64 Megs\nfeed:\n  enabled: yes please\n  max_age: [1]\ntracing:\n  sample_ratio: half\nlog: 7\n",
			want: []string{
				`f:13: consensus.heartbeat_interval: "5" is not a duration: write a number and a unit, such as 100ms, 2s or 24h`,
				`f:14: consensus.window_slots_max: "many" is not a whole number`,
				`f:15: consensus.window_bytes_max: "64 Megs" is not a size: write a whole number and a unit, such as 64MiB`,
				`f:17: feed.enabled: "yes please" is neither true nor false`,
				`f:18: feed.max_age: expected one value`,
				`f:20: tracing.sample_ratio: "half" is not a number`,
				`f:21: log: expected settings, one "key: value" a line`,
			},
		},
		{
			name: "timing that defeats itself",
			text: minimal + "consensus:\n  heartbeat_interval: 1s\n  lease_duration: 1s\n",
			want: []string{
				`f:12: consensus.election_timeout_min: 1s is less than twice the heartbeat_interval of 1s: one lost heartbeat would start an election`,
				`f:14: consensus.lease_duration: 1s is less than three times the heartbeat_interval of 1s: one lost heartbeat would end a lease`,
			},
		},
		{
			name: "regions that contradict each other",
			text: `cluster: Demo
region: r9
data_dir: data
preferred_leader: r8
postgres: {dsn: "host=a,b dbname=app"}
regions:
  - name: r1
    peer: h:1
  - name: r1
    peer: h:1
  - name: r3
    peer: h
  - name: r4
    peer: h:99999
  - peer: :1
`,
			want: []string{
				`f:1: cluster: "Demo" is no name: use a-z, 0-9, _ and -`,
				`f:2: region: "r9" is not listed in regions`,
				`f:3: data_dir: "data" is relative; give an absolute path`,
				`f:4: preferred_leader: "r8" is not listed in regions`,
				`f:5: postgres.dsn: names several servers; a sidecar belongs to one`,
				`f:9: regions[1].name: "r1" is listed twice; first as regions[0]`,
				`f:10: regions[1].peer: "h:1" is also the address of regions[0]; each sidecar has its own`,
				`f:12: regions[2].peer: "h" is not host:port`,
				`f:14: regions[3].peer: "h:99999": the port must be a number from 1 to 65535`,
				`f:15: regions[4].name: missing; give a name of a-z, 0-9, _ and -`,
				`f:15: regions[4].peer: ":1" names no host`,
			},
		},
		{
			name: "two services at one port, and no routes for the embedded feed",
			text: strings.Replace(minimal, "listen:\n", "listen:\n  admin: 10.1.0.5:7460\n", 1) + "feed: {enabled: true}\n",
			want: []string{
				`f:7: listen.admin: "10.1.0.5:7460" is also listen.peer; each needs its own port`,
				`f:10: regions[0].nats_route: missing; the embedded feed needs the route to every region`,
				`f:11: regions[1].nats_route: missing; the embedded feed needs the route to every region`,
				`f:12: regions[2].nats_route: missing; the embedded feed needs the route to every region`,
			},
		},
		{
			name: "an application name that would break synchronous_standby_names, and a DSN without a database's name",
			text: strings.Replace(minimal, "/app\n", "/\n  application_name: quorate, b\n", 1),
			want: []string{
				`f:5: postgres.dsn: names no database; the replicated one must be named`,
				`f:6: postgres.application_name: "quorate, b" cannot be used: it must begin with quorate and consist of at most 63 letters, digits, _ and -`,
			},
		},
		{
			name: "limits and choices",
			text: minimal + `snapshot: {parallel: 0}
log: {segment_bytes: 1B, dir: here, dirs: [/a, b, /a/]}
replay: {lock_timeout: 0s, max_reader_delay: 0s}
consensus: {window_bytes_max: 64MiB, clock_drift_ppm_max: 0}
tracing: {otlp: "collector:4317", sample_ratio: 1.5}
feed: {external_url: "http://n"}
logging: {level: loud, format: xml}
`,
			want: []string{
				`f:12: snapshot.parallel: 0 is not between 1 and 64`,
				`f:13: log.dir: "here" is relative; give an absolute path`,
				`f:13: log.dirs: given beside log.dir; name all directories here and leave log.dir out`,
				`f:13: log.dirs[1]: "b" is relative; give an absolute path`,
				`f:13: log.dirs[2]: "/a/" is listed twice; first as log.dirs[0]`,
				`f:13: log.segment_bytes: 1B is not between 1MiB and 2GiB`,
				`f:14: replay.lock_timeout: 0s is not between 1ms and 1m0s`,
				`f:14: replay.max_reader_delay: 0s is not between 1ms and 24h0m0s`,
				`f:15: consensus.clock_drift_ppm_max: 0 is not between 1 and 100000`,
				`f:15: consensus.window_bytes_max: 64MiB is not between 1MiB and 24MiB`,
				`f:16: tracing.sample_ratio: 1.5 is not above 0 and up to 1`,
				`f:16: tracing.otlp: "collector:4317" is not http://host:port or https://host:port`,
				`f:17: feed.external_url: "http://n" is not nats://host:port or tls://host:port`,
				`f:18: logging.level: "loud" is none of debug, info, warn, error`,
				`f:18: logging.format: "xml" is none of json, text`,
			},
		},
		{
			name: "not YAML",
			text: "cluster: demo\nregion: [r1\n",
			want: []string{`f:1: not YAML: did not find expected ',' or ']'`},
		},
		{
			name: "not settings at all",
			text: "- a\n",
			want: []string{`f:1: expected settings, one "key: value" a line`},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Parse("f", []byte(tc.text))
			if err == nil {
				t.Fatal("no fault found")
			}
			got := strings.Split(err.Error(), "\n")
			if !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
			}
			if fault, ok := errors.AsType[*Fault](err); !ok || fault.File != "f" {
				t.Errorf("no *Fault in %v", err)
			}
		})
	}
}

// TestQuorums holds sizes and kinds to what is promised of them.
func TestQuorums(t *testing.T) {
	regions := func(kinds ...string) string {
		text := "cluster: demo\nregion: r1\ndata_dir: /d\npostgres: {dsn: postgres://127.0.0.1/app}\nregions:\n"
		for i, kind := range kinds {
			text += fmt.Sprintf("  - {name: r%d, peer: \"h%d:1\", kind: %s}\n", i+1, i+1, kind)
		}
		return text
	}
	const v, w, l = KindVoter, KindWitness, KindLearner
	five := regions(v, v, v, v, v)
	for _, tc := range []struct {
		name string
		text string
		want string // of the error; empty: none
	}{
		{"majorities need no word", five, ""},
		{"majorities, their durability stated", five + "durability_regions: 2\n", ""},
		{"a commit at the nearest region survives one loss", five + "consensus: {phase1_quorum: 4, phase2_quorum: 2}\ndurability_regions: 1\n", ""},
		{"and is refused unless that is said", five + "consensus: {phase1_quorum: 4, phase2_quorum: 2}\n",
			"f: durability_regions: missing; phase 1 of 4 and phase 2 of 2 among 5 voters survive the loss of 1 regions, a minority would be 2: set durability_regions: 1 if that is meant"},
		{"a wrong word is corrected", five + "consensus: {phase1_quorum: 4, phase2_quorum: 2}\ndurability_regions: 2\n",
			"f:12: durability_regions: 2 is not what phase 1 of 4 and phase 2 of 2 among 5 voters give, which is 1"},
		{"nobody could find what is on two disks when three must promise of four left", five + "consensus: {phase1_quorum: 4}\n",
			"f: durability_regions: missing; phase 1 of 4 and phase 2 of 3 among 5 voters survive the loss of 1 regions, a minority would be 2: set durability_regions: 1 if that is meant"},
		{"more than was asked for", five + "consensus: {phase1_quorum: 2, phase2_quorum: 4}\n", ""},
		{"sizes that may miss each other", five + "consensus: {phase1_quorum: 3, phase2_quorum: 2}\n",
			"f:11: consensus.phase2_quorum: phase 1 of 3 and phase 2 of 2 do not always have a voter in common, of 5: their sum must be at least 6, or a new leader could miss what was acknowledged"},
		{"sizes that cannot be, both told", five + "consensus:\n  phase1_quorum: 6\n  phase2_quorum: -1\n",
			"f:12: consensus.phase1_quorum: 6 is not between 0 (a majority) and the 5 voters\nf:13: consensus.phase2_quorum: -1 is not between 0 (a majority) and the 5 voters"},
		{"a witness of three leaves two databases", regions(v, v, w), ""},
		{"two witnesses of five leave three", regions(v, v, v, w, w), ""},
		{"three leave two, and with both a cut log is lost", regions(v, v, w, w, w),
			"f: durability_regions: missing; phase 1 of 3 and phase 2 of 3 among 5 voters, 2 of them with a database, survive the loss of 1 regions, a minority would be 2: set durability_regions: 1 if that is meant"},
		{"learners do not count", regions(v, v, v, l, l), ""},
		{"a leader needs a database and a vote", regions(w, l, w), "f:5: regions: none is a voter with a database: nobody could lead"},
		{"no such kind", regions(v, v, "arbiter"), `f:8: regions[2].kind: "arbiter" is none of voter, witness, learner`},
		{"a witness is not preferred as leader", regions(v, v, w) + "preferred_leader: r3\n", `f:9: preferred_leader: "r3" is a witness, which cannot lead`},
		{"a witness has no database", strings.Replace(strings.Replace(regions(v, v, w), "region: r1", "region: r3", 1), "postgres: {dsn: postgres://127.0.0.1/app}\n", "", 1), ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Parse("f", []byte(tc.text))
			if got := fmt.Sprint(err); err == nil && tc.want != "" || err != nil && got != tc.want {
				t.Errorf("got:\n%s\nwant:\n%s", got, tc.want)
			}
		})
	}
}

func TestLoadNamesTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "region.yaml")
	if _, err := Load(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file gave %v", err)
	}
	if err := os.WriteFile(path, []byte("clutser: demo\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Load(path)
	if want := path + ":1: clutser: unknown setting; did you mean cluster?"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestByteSize(t *testing.T) {
	for _, tc := range []struct {
		text string
		want ByteSize
		back string
	}{
		{"0", 0, "0B"}, {"1", 1, "1B"}, {"1B", 1, "1B"}, {"64MiB", 64 << 20, "64MiB"}, {"64 MiB", 64 << 20, "64MiB"},
		{"1kB", 1000, "1000B"}, {"1GB", 1e9, "1000000000B"}, {"1536KiB", 1536 << 10, "1536KiB"}, {"2048GiB", 2 << 40, "2TiB"},
	} {
		got, err := ParseByteSize(tc.text)
		if err != nil || got != tc.want || got.String() != tc.back {
			t.Errorf("%q: got %d (%s), %v; want %d (%s)", tc.text, got, got, err, tc.want, tc.back)
		}
		if again, err := ParseByteSize(got.String()); err != nil || again != got {
			t.Errorf("%q does not read back: %d, %v", got, again, err)
		}
	}
	for _, text := range []string{"", "MiB", "-1", "1.5GiB", "9999999TiB", "1 PiB"} {
		if got, err := ParseByteSize(text); err == nil {
			t.Errorf("%q was taken for %d", text, got)
		}
	}
}

func TestBinary(t *testing.T) {
	if got := (Postgres{BinDir: "/opt/pg/bin"}).Binary("pg_dump", 15); got != "/opt/pg/bin/pg_dump" {
		t.Errorf("with a directory: %s", got)
	}
	if got := (Postgres{}).Binary("pg_dump", 1); got != "pg_dump" {
		t.Errorf("of a version that is not installed: %s", got)
	}
}
