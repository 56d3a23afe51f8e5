package cluster

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"quorate/deploy/sandbox/postgres"
	"quorate/deploy/sandbox/postgres/postgrestest"
)

// site is one region's sidecar, a process of its own with a configuration of
// its own: what the sandbox writes is never wrong.
type site struct {
	t      testing.TB
	name   string
	dir    string
	peer   string
	admin  string
	server *postgres.Server // nil: nobody listens at the DSN
	config map[string]any

	starts int
	cmd    *exec.Cmd
	ended  chan struct{}
}

// newSite makes a site; nothing runs yet. Its cluster is one region until
// together says otherwise.
func newSite(t testing.TB, cluster, name string, server *postgres.Server) *site {
	t.Helper()
	s := &site{t: t, name: name, dir: t.TempDir(), peer: freeAddress(t), admin: freeAddress(t), server: server}
	dsn := "postgres://nobody@" + freeAddress(t) + "/app"
	if server != nil {
		dsn = server.DSN("app")
	}
	s.config = map[string]any{
		"cluster": cluster, "region": name, "data_dir": s.dataDir(),
		"postgres": map[string]any{"dsn": dsn},
		"listen":   map[string]any{"peer": s.peer, "admin": s.admin},
		"log":      map[string]any{"dir": s.logDir(), "segment_bytes": 1 << 20},
	}
	together(s)
	t.Cleanup(func() {
		s.kill()
		if t.Failed() {
			t.Logf("the last start of %s said:\n%s", name, s.said())
		}
	})
	return s
}

// together gives sites the list of regions that they are.
func together(sites ...*site) {
	for _, s := range sites {
		var regions []map[string]string
		for _, other := range sites {
			regions = append(regions, map[string]string{"name": other.name, "peer": other.peer})
		}
		s.config["regions"] = regions
	}
}

// firstLeads has the first site lead when all start at once: the others wait
// longer before they campaign.
func firstLeads(sites ...*site) {
	for _, s := range sites[1:] {
		s.config["consensus"] = map[string]any{"election_timeout_min": "2s"}
	}
}

// leaderOf returns the site that takes writes, once there is one.
func leaderOf(t testing.TB, sites ...*site) (leader *site) {
	t.Helper()
	Eventually(t, time.Minute, "a leader", func(ctx context.Context) error {
		for _, s := range sites {
			if st, err := s.status(ctx); err == nil && st.Writable {
				leader = s
				return nil
			}
		}
		return errors.New("none takes writes")
	})
	return leader
}

// freeAddress returns an address that nobody listens on, below the ports that
// the kernel gives to outgoing connections: some time passes before it is used.
func freeAddress(t testing.TB) string {
	t.Helper()
	for range 100 {
		address := fmt.Sprintf("127.0.0.1:%d", 15000+rand.IntN(15000))
		if l, err := net.Listen("tcp", address); err == nil {
			l.Close()
			return address
		}
	}
	t.Fatal("no free port found")
	return ""
}

func (s *site) dataDir() string { return filepath.Join(s.dir, "data") }
func (s *site) logDir() string  { return filepath.Join(s.dir, "log") }
func (s *site) file() string    { return filepath.Join(s.dir, "region.yaml") }
func (s *site) stderr() string  { return filepath.Join(s.dir, fmt.Sprintf("stderr.%d", s.starts)) }

func (s *site) write() {
	s.t.Helper()
	text, err := yaml.Marshal(s.config)
	if err == nil {
		err = os.WriteFile(s.file(), text, 0o600)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// start runs the sidecar; it says nothing of whether it goes well.
func (s *site) start() {
	s.t.Helper()
	s.write()
	s.starts++
	out, err := os.Create(s.stderr())
	if err != nil {
		s.t.Fatal(err)
	}
	defer out.Close()
	cmd, ended := exec.Command(filepath.Join(Binaries(s.t), "quorate"), "run", "--config", s.file()), make(chan struct{})
	cmd.Stderr = out
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.cmd, s.ended = cmd, ended
	go func() {
		_ = cmd.Wait() // how it ended stands in ProcessState
		close(ended)
	}()
}

// kill ends the sidecar as a crash would.
func (s *site) kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill() // it may have ended by itself
		<-s.ended
	}
}

func (s *site) runs() bool {
	select {
	case <-s.ended:
		return false
	default:
		return true
	}
}

// said returns what the last start wrote to stderr.
func (s *site) said() string {
	text, _ := os.ReadFile(s.stderr())
	return string(text)
}

// awaitEnd fails the test unless the sidecar ends by itself, with exit code 1
// and a last line that holds all of words.
func (s *site) awaitEnd(words ...string) {
	s.t.Helper()
	select {
	case <-s.ended:
	case <-time.After(30 * time.Second):
		s.t.Fatalf("%s does not end; wanted %q", s.name, words)
	}
	lines := strings.Split(strings.TrimSpace(s.said()), "\n")
	last := lines[len(lines)-1]
	if code := s.cmd.ProcessState.ExitCode(); code != 1 {
		s.t.Errorf("%s ended with code %d, want 1", s.name, code)
	}
	mustHold(s.t, "the last word of "+s.name, last, words...)
}

func mustHold(t testing.TB, what, text string, words ...string) {
	t.Helper()
	for _, word := range words {
		if !strings.Contains(text, word) {
			t.Errorf("%s does not say %q:\n%s", what, word, text)
		}
	}
}

// standing is what a test looks at of GET /status.
type standing struct {
	State     string `json:"state"`
	Writable  bool   `json:"writable"`
	Healthy   bool   `json:"healthy"`
	Health    string `json:"health"`
	ReplicaID uint32 `json:"replica_id"`
	Chosen    uint64 `json:"chosen"`
	Applied   uint64 `json:"applied"`
}

func (s *site) status(ctx context.Context) (st standing, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.admin+"/status", nil)
	if err != nil {
		return st, err
	}
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return st, err
	}
	defer res.Body.Close()
	return st, json.NewDecoder(res.Body).Decode(&st)
}

// await waits until the sidecar's status is as wanted; the process must run on.
func (s *site) await(what string, as func(standing) bool) standing {
	s.t.Helper()
	var st standing
	Eventually(s.t, time.Minute, s.name+": "+what, func(ctx context.Context) error {
		if !s.runs() {
			s.t.Fatalf("%s: %s: the sidecar ended", s.name, what)
		}
		var err error
		if st, err = s.status(ctx); err != nil {
			return err
		}
		if !as(st) {
			return fmt.Errorf("it is %+v", st)
		}
		return nil
	})
	return st
}

func (s *site) awaitWritable() {
	s.t.Helper()
	s.await("takes writes", func(st standing) bool { return st.Writable && st.Healthy })
}

// awaitComplaint waits until the status names a fault and its mend, while no
// writes are taken; then both stand in the log too.
func (s *site) awaitComplaint(words ...string) {
	s.t.Helper()
	s.await(fmt.Sprintf("its health says %q", words), func(st standing) bool { return !st.Writable && holds(st.Health, words) })
	s.awaitLogged(words...)
}

func holds(text string, words []string) bool {
	for _, word := range words {
		if !strings.Contains(text, word) {
			return false
		}
	}
	return true
}

// awaitLogged waits until a line of the last start's log holds all of words.
func (s *site) awaitLogged(words ...string) {
	s.t.Helper()
	Eventually(s.t, 10*time.Second, fmt.Sprintf("the log of %s says %q", s.name, words), func(context.Context) error {
		for line := range strings.Lines(s.said()) {
			if holds(line, words) {
				return nil
			}
		}
		return errors.New("no line does")
	})
}

// run runs statements on the site's database, each in its own transaction.
func (s *site) run(statements ...string) {
	s.t.Helper()
	runOn(s.t, s.server.DSN("app"), statements...)
}

func runOn(t testing.TB, dsn string, statements ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for _, statement := range statements {
		if _, err := conn.Exec(ctx, statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
}

// rows fails the test unless table t holds exactly these ids.
func (s *site) rows(want ...int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.server.DSN("app"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	rows, err := conn.Query(ctx, "SELECT id FROM t ORDER BY id")
	if err != nil {
		s.t.Fatal(err)
	}
	have, err := pgx.CollectRows(rows, pgx.RowTo[int])
	if err != nil {
		s.t.Fatal(err)
	}
	if fmt.Sprint(have) != fmt.Sprint(want) {
		s.t.Errorf("%s holds the rows %v, want %v", s.name, have, want)
	}
}

// newServer starts a PostgreSQL server with an empty database app.
func newServer(t testing.TB, settings map[string]string) *postgres.Server {
	t.Helper()
	all := map[string]string{"shared_buffers": "16MB"}
	for name, value := range settings {
		all[name] = value
	}
	server := postgrestest.Start(t, all)
	runOn(t, server.DSN("postgres"), "CREATE DATABASE app")
	return server
}

// Faults of the settings end the program before it touches anything, with all
// of them told at once.
func TestBadSettings(t *testing.T) {
	run := func(t *testing.T, file string) (code int, said string) {
		t.Helper()
		var stderr strings.Builder
		cmd := exec.Command(filepath.Join(Binaries(t), "quorate"), "run", "--config", file)
		cmd.Stderr = &stderr
		err := cmd.Run()
		if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
			t.Fatal(err)
		} else if ok {
			return exit.ExitCode(), stderr.String()
		}
		return 0, stderr.String()
	}
	for name, tc := range map[string]struct {
		spoil func(s *site)
		want  []string
	}{
		"missing": {
			func(s *site) { delete(s.config, "cluster"); delete(s.config, "postgres") },
			[]string{"cluster", "postgres.dsn"},
		},
		"misspelt": {
			func(s *site) { s.config["prefered_leader"] = "r1" },
			[]string{"prefered_leader", "did you mean preferred_leader?"},
		},
		"unlisted region": {
			func(s *site) { s.config["region"] = "r9" },
			[]string{"r9", "regions"},
		},
		"lease shorter than its heartbeats": {
			func(s *site) { s.config["consensus"] = map[string]any{"lease_duration": "150ms"} },
			[]string{"consensus.lease_duration"},
		},
		"PostgreSQL's own database": {
			func(s *site) {
				s.config["postgres"] = map[string]any{"dsn": "postgres://postgres@127.0.0.1:5432/postgres"}
			},
			[]string{"postgres.dsn"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, "demo", "r1", nil)
			tc.spoil(s)
			s.write()
			code, said := run(t, s.file())
			if code != 2 {
				t.Errorf("exit code %d, want 2", code)
			}
			mustHold(t, "stderr", said, tc.want...)
			for _, dir := range []string{s.dataDir(), s.logDir()} {
				if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%s was made, though the settings are refused (%v)", dir, err)
				}
			}
		})
	}
	t.Run("no such file", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "region.yaml")
		code, said := run(t, file)
		if code != 2 {
			t.Errorf("exit code %d, want 2", code)
		}
		mustHold(t, "stderr", said, file)
	})
}

// One sidecar meets every kind of server that cannot carry the promises, says
// each time what to mend, and takes part as soon as that is done, with the rows
// that were there before.
func TestBadServer(t *testing.T) {
	t.Parallel() // it mostly waits
	server := newServer(t, map[string]string{"wal_level": "replica"})
	admin, app := server.DSN("postgres"), server.DSN("app")
	runOn(t, app, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1), (2)", "CREATE ROLE sidecar LOGIN REPLICATION",
		// No server of an unsupported version is at hand: this one says it is.
		"CREATE SCHEMA old",
		`CREATE FUNCTION old.current_setting(text) RETURNS text LANGUAGE sql AS
			$$SELECT CASE WHEN $1 = 'server_version_num' THEN '140012' ELSE pg_catalog.current_setting($1) END$$`,
		"GRANT USAGE ON SCHEMA old TO public",
		"ALTER DATABASE app SET search_path = old, pg_catalog, public")
	s := newSite(t, "demo", "r1", server)
	s.config["postgres"] = map[string]any{"dsn": strings.Replace(app, "postgres@", "sidecar@", 1)}
	s.start()
	check := func(words ...string) {
		t.Helper()
		out, err := exec.Command(filepath.Join(Binaries(t), "quorate"), "check", "--config", s.file()).CombinedOutput()
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 3 {
			t.Errorf("check ended with %v, want exit code 3", err)
		}
		mustHold(t, "check", string(out), words...)
	}
	refused := func(words ...string) {
		t.Helper()
		s.awaitComplaint(words...)
		check(words...)
		if strings.Contains(s.said(), "cluster made") {
			t.Fatal("a cluster was made on a server that cannot carry it")
		}
	}

	refused("PostgreSQL 14 is too old", "upgrade to PostgreSQL 15 to 18")
	runOn(t, admin, "ALTER DATABASE app RESET search_path")
	runOn(t, app, "DROP SCHEMA old CASCADE")

	refused("not a superuser", "ALTER ROLE")
	runOn(t, admin, "ALTER ROLE sidecar SUPERUSER", "CREATE DATABASE shop")
	runOn(t, server.DSN("shop"), "CREATE TABLE orders (id int)")

	// All that is wrong is told at once.
	refused("wal_level is replica", "ALTER SYSTEM SET wal_level = logical, then restart the server", "database shop", "move it to another server")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := server.Stop(ctx, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	s.awaitComplaint("connect to PostgreSQL")
	server.Settings["wal_level"] = "logical"
	if _, err := server.Start(ctx); err != nil {
		t.Fatal(err)
	}

	refused("database shop on this server holds tables", "move it to another server")
	runOn(t, admin, "DROP DATABASE shop")

	s.awaitWritable()
	s.run("INSERT INTO t VALUES (3)")
	s.rows(1, 2, 3)

	// A second database comes into use later: its commits would be released
	// without a quorum, so nothing is acknowledged any more until it is gone.
	runOn(t, admin, "CREATE DATABASE shop")
	runOn(t, server.DSN("shop"), "CREATE TABLE orders (id int)")
	s.awaitComplaint("database shop on this server holds tables", "move it to another server")
	conn, err := pgx.Connect(ctx, app)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(ctx, "INSERT INTO t VALUES (99)"); !Refused(err) {
		t.Errorf("a write beside a second database gave %v, want the fence's refusal", err)
	}
	runOn(t, admin, "DROP DATABASE shop")
	s.awaitWritable()
	s.run("INSERT INTO t VALUES (4)")

	// The role loses its privileges: told at the next start at the latest.
	runOn(t, app, "ALTER ROLE sidecar NOSUPERUSER")
	s.kill()
	s.start()
	s.awaitComplaint("not a superuser", "ALTER ROLE")
	runOn(t, admin+"?options=-csynchronous_commit%3Dlocal", "ALTER ROLE sidecar SUPERUSER")
	s.awaitWritable()
	s.run("INSERT INTO t VALUES (5)")
	s.rows(1, 2, 3, 4, 5)
}

// A second database comes into use on the leader's server: the region gives
// leadership to one whose server is fit, and comes back when it is gone.
func TestSecondDatabaseOnTheLeadersServer(t *testing.T) {
	t.Parallel() // it mostly waits
	r1, r2 := newSite(t, "demo", "r1", newServer(t, nil)), newSite(t, "demo", "r2", newServer(t, nil))
	together(r1, r2)
	firstLeads(r1, r2)
	r2.start()
	r1.start()
	lead(t, r1, r1, r2)
	r1.run("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
	runOn(t, r1.server.DSN("postgres"), "CREATE DATABASE shop")
	runOn(t, r1.server.DSN("shop"), "CREATE TABLE orders (id int)")
	r1.awaitComplaint("database shop on this server holds tables", "move it to another server")
	r2.awaitWritable()
	r2.run("INSERT INTO t VALUES (2)")
	runOn(t, r1.server.DSN("postgres"), "DROP DATABASE shop")
	awaitSame(t, r1, r2)
	r1.rows(1, 2)
}

func TestPortInUse(t *testing.T) {
	for _, setting := range []string{"peer", "admin"} {
		t.Run(setting, func(t *testing.T) {
			s := newSite(t, "demo", "r1", nil)
			address := s.config["listen"].(map[string]any)[setting].(string)
			other, err := net.Listen("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			s.start()
			s.awaitEnd("listen."+setting, address, "address already in use", "stop it, or give listen."+setting+" another")
			if err := other.Close(); err != nil {
				t.Fatal(err)
			}
			s.start()
			// It has its ports; the next thing that it lacks is its server.
			s.awaitComplaint("connect to PostgreSQL")
		})
	}
}

// The feed's port is not worth the region: commits go on, and the feed comes
// when its port is free.
func TestFeedPortInUse(t *testing.T) {
	t.Parallel() // it mostly waits
	s := newSite(t, "demo", "r1", newServer(t, nil))
	address := freeAddress(t)
	s.config["listen"].(map[string]any)["nats"] = address
	s.config["feed"] = map[string]any{"enabled": true}
	other, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s.start()
	s.awaitWritable()
	s.awaitLogged("change feed stopped", address, "address already in use", "stop it, or give the server another (listen.nats")
	s.run("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	Eventually(t, time.Minute, "the feed's server", func(context.Context) error {
		conn, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			conn.Close()
		}
		return err
	})
	s.run("INSERT INTO t VALUES (2)")
	s.rows(1, 2)
}

// A data_dir that cannot be written: no identity is kept, so no part is taken.
func TestReadOnlyDataDir(t *testing.T) {
	t.Parallel() // it mostly waits
	needMounts(t)
	s := newSite(t, "demo", "r1", newServer(t, nil))
	s.run("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
	if err := os.Mkdir(s.dataDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	mount(t, "tmpfs", s.dataDir(), "tmpfs", unix.MS_RDONLY, "")
	t.Cleanup(func() {
		s.kill()
		unmount(t, s.dataDir())
	})
	s.start()
	s.awaitEnd("identity.json", s.dataDir(), "read-only file system", "data_dir must be writable")
	mount(t, "tmpfs", s.dataDir(), "tmpfs", unix.MS_REMOUNT, "")
	s.start()
	s.awaitWritable()
	s.run("INSERT INTO t VALUES (2)")
	s.rows(1, 2)
}

// A sidecar of another cluster stands where a peer is expected: at the making
// of the cluster, and later.
func TestAnotherClustersSidecarAtAPeersAddress(t *testing.T) {
	t.Parallel() // it mostly waits
	r1, r2 := newSite(t, "demo", "r1", newServer(t, nil)), newSite(t, "demo", "r2", newServer(t, nil))
	together(r1, r2)
	firstLeads(r1, r2)
	stranger := newSite(t, "other", "r2", newServer(t, nil))
	stranger.start()
	stranger.awaitWritable()
	stranger.run("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (77)")

	right := r1.config["regions"]
	r1.config["regions"] = []map[string]string{{"name": "r1", "peer": r1.peer}, {"name": "r2", "peer": stranger.peer}}
	r2.start()
	r1.start()
	r1.awaitEnd("region r2 at "+stranger.peer, `belongs to cluster "other"`, `"demo"`, "correct the addresses")
	if strings.Contains(r1.said()+r2.said(), "cluster made") {
		t.Error("a cluster was made without one of its regions")
	}
	r1.config["regions"] = right
	r1.start()
	lead(t, r1, r1, r2)
	r1.run("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")

	// r2's host is given to the other cluster: its sidecar must not count as r2's.
	r2.kill()
	stranger.kill()
	stranger.config["listen"] = map[string]any{"peer": r2.peer, "admin": stranger.admin}
	stranger.peer = r2.peer
	together(stranger)
	stranger.start()
	stranger.awaitWritable()
	released := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		conn, err := pgx.Connect(ctx, r1.server.DSN("app"))
		if err == nil {
			_, err = conn.Exec(ctx, "INSERT INTO t VALUES (2)")
			conn.Close(ctx)
		}
		released <- err
	}()
	r1.await("no quorum", func(st standing) bool {
		return !st.Writable && !st.Healthy && strings.Contains(st.Health, "no quorum of regions answers")
	})
	observer, err := pgx.Connect(context.Background(), r1.server.DSN("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer observer.Close(context.Background())
	Eventually(t, time.Minute, "the COMMIT waits", func(ctx context.Context) error {
		var waits bool
		err := observer.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE 'INSERT INTO t VALUES (2)%' AND wait_event = 'SyncRep')").Scan(&waits)
		if err == nil && !waits {
			err = errors.New("it does not")
		}
		return err
	})
	// The stranger goes on answering meanwhile, at the address that is r2's.
	r1.awaitLogged("peer is not connected", r2.peer, "called, but this is replica 1 of cluster", "mend the caller's address")
	stranger.awaitLogged("refused a peer")
	stranger.run("INSERT INTO t VALUES (78)")
	stranger.rows(77, 78)
	select {
	case err := <-released:
		t.Errorf("a COMMIT ended, though only another cluster's sidecar was there: %v", err)
		released <- err
	default:
	}
	stranger.kill()
	r2.start()
	if err := <-released; err != nil {
		t.Logf("the COMMIT that waited ended in doubt, as it may if r2 leads now: %v", err)
		leaderOf(t, r1, r2).run("INSERT INTO t VALUES (2) ON CONFLICT DO NOTHING")
	}
	leaderOf(t, r1, r2).run("INSERT INTO t VALUES (3)")
	awaitSame(t, r1, r2)
	r1.rows(1, 2, 3)
}

// awaitSame waits until all sites have applied what is chosen and hold the same.
func awaitSame(t testing.TB, sites ...*site) {
	t.Helper()
	Eventually(t, time.Minute, "equal content", func(ctx context.Context) error {
		var highest uint64
		for range 2 { // the second round sees the highest of all
			for _, s := range sites {
				st, err := s.status(ctx)
				if err != nil {
					return err
				}
				highest = max(highest, st.Chosen)
				if st.Applied < highest || !st.Healthy {
					return fmt.Errorf("%s is %+v; chosen is %d", s.name, st, highest)
				}
			}
		}
		var first map[string]string
		for _, s := range sites {
			conn, err := pgx.Connect(ctx, s.server.DSN("app"))
			if err != nil {
				return err
			}
			content, err := Content(ctx, conn)
			conn.Close(ctx)
			if err != nil {
				return err
			}
			if first == nil {
				first = content
			} else if fmt.Sprint(first) != fmt.Sprint(content) {
				return fmt.Errorf("%s holds %v, %s holds %v", sites[0].name, first, s.name, content)
			}
		}
		return nil
	})
}

// segment returns the newest file of the site's log, what it holds, and where
// its last byte that is not zero stands.
func (s *site) segment() (path string, content []byte, end int) {
	s.t.Helper()
	files, err := filepath.Glob(filepath.Join(s.logDir(), "*.log"))
	if err != nil || len(files) == 0 {
		s.t.Fatalf("log of %s: %v, %v", s.name, files, err)
	}
	path = files[len(files)-1]
	if content, err = os.ReadFile(path); err != nil {
		s.t.Fatal(err)
	}
	for end = len(content); end > 0 && content[end-1] == 0; end-- {
	}
	return path, content, end
}

func writeFile(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestDamagedLog(t *testing.T) {
	t.Parallel() // it mostly waits
	s := newSite(t, "demo", "r1", newServer(t, nil))
	s.start()
	s.awaitWritable()
	s.run("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)", "INSERT INTO t VALUES (2)")

	t.Run("torn tail", func(t *testing.T) {
		s.kill()
		path, content, end := s.segment()
		// A write of several sectors of which only the second reached the disk:
		// nobody was told that it is durable.
		const sector = 512
		at := (end/sector + 2) * sector
		for i := range sector - 4 {
			content[at+i] = byte(i) | 1
		}
		// Its stamp, which says that it was written in this life of the file.
		number := make([]byte, 16)
		binary.LittleEndian.PutUint64(number, 1)
		binary.LittleEndian.PutUint64(number[8:], uint64(at/sector))
		crc := crc32.Update(1, crc32.MakeTable(crc32.Castagnoli), number)
		binary.LittleEndian.PutUint32(content[at+sector-4:], 1<<16|uint32(uint16(crc>>16)^uint16(crc)|1))
		writeFile(t, path, content)
		s.start()
		s.awaitWritable()
		mustHold(t, "the log", s.said(), "cut off a write that did not end before the last stop", path)
		s.run("INSERT INTO t VALUES (3)")
		s.rows(1, 2, 3)
	})
	t.Run("truncated", func(t *testing.T) {
		s.kill()
		path, content, end := s.segment()
		writeFile(t, path, content[:end/2])
		s.start()
		s.awaitEnd("slot log is damaged", filepath.Base(path), s.logDir(), fmt.Sprintf("has %d bytes", end/2), "put the undamaged file back", "move data_dir and log.dir away")
		writeFile(t, path, content)
		s.start()
		s.awaitWritable()
		s.run("INSERT INTO t VALUES (4)")
		s.rows(1, 2, 3, 4)
	})
	t.Run("flipped bit", func(t *testing.T) {
		s.kill()
		path, content, end := s.segment()
		content[end/2] ^= 0x10
		writeFile(t, path, content)
		s.start()
		s.awaitEnd("slot log is damaged", filepath.Base(path)+" at offset", s.logDir(), "put the undamaged file back", "move data_dir and log.dir away")
		_, after, _ := s.segment()
		if string(after) != string(content) {
			t.Error("the damaged file was written to")
		}
		content[end/2] ^= 0x10
		writeFile(t, path, content)
		s.start()
		s.awaitWritable()
		s.run("INSERT INTO t VALUES (5)")
		s.rows(1, 2, 3, 4, 5)
	})
	t.Run("not mounted", func(t *testing.T) {
		s.kill()
		away := s.logDir() + ".away"
		if err := os.Rename(s.logDir(), away); err != nil {
			t.Fatal(err)
		}
		s.start()
		s.awaitEnd("the log in log.dir "+s.logDir()+" is lost", "must not vote again", "Bring the log back, or move data_dir "+s.dataDir()+" away")
		if err := errors.Join(os.RemoveAll(s.logDir()), os.Rename(away, s.logDir())); err != nil {
			t.Fatal(err)
		}
		s.start()
		s.awaitWritable()
		s.run("INSERT INTO t VALUES (6)")
		s.rows(1, 2, 3, 4, 5, 6)
	})
	t.Run("read-only", func(t *testing.T) {
		needMounts(t)
		s.kill()
		mount(t, s.logDir(), s.logDir(), "", unix.MS_BIND, "")
		mounted := true
		t.Cleanup(func() {
			if mounted {
				unmount(t, s.logDir())
			}
		})
		mount(t, s.logDir(), s.logDir(), "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
		s.start()
		s.awaitEnd("slot log in "+s.logDir()+" cannot be written", "mount it read-write", "read-only file system")
		unmount(t, s.logDir())
		mounted = false
		s.start()
		s.awaitWritable()
		s.run("INSERT INTO t VALUES (7)")
		s.rows(1, 2, 3, 4, 5, 6, 7)
	})
}

func needMounts(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a disk that is full or read-only needs root")
	}
}

func unmount(t testing.TB, target string) {
	t.Helper()
	if err := unix.Unmount(target, 0); err != nil {
		t.Errorf("unmount %s: %v", target, err)
	}
}

func mount(t testing.TB, source, target, kind string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		t.Fatalf("mount %s: %v", target, err)
	}
}

// Three regions: the leader's disk is full twice, once in the middle of a large
// transaction, later a follower's log is damaged for good. The others go on, and
// each region comes back, by itself or by the mend it named.
func TestFullDiskAndLostLogOfOneRegion(t *testing.T) {
	needMounts(t)
	t.Parallel() // it mostly waits
	var sites []*site
	for _, name := range []string{"r1", "r2", "r3"} {
		s := newSite(t, "demo", name, newServer(t, nil))
		sites = append(sites, s)
	}
	together(sites...)
	firstLeads(sites...)
	r1, r2, r3 := sites[0], sites[1], sites[2]
	if err := os.Mkdir(r1.logDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	mount(t, "tmpfs", r1.logDir(), "tmpfs", 0, "size=3m")
	t.Cleanup(func() {
		r1.kill()
		unmount(t, r1.logDir())
	})
	for _, s := range sites {
		s.start()
	}
	lead(t, r1, sites...)
	r1.run("CREATE TABLE t (id int PRIMARY KEY, filler text)")

	// Write until r1 takes no more: with room left for what is under way it hands
	// leadership over, and nobody is left waiting.
	acked := fillDisk(t, r1, 1, 1000)
	if acked < 10 {
		t.Errorf("%d rows were acknowledged before the disk was full; that is no test", acked)
	}
	leader := leaderOf(t, r2, r3)
	acked = holdsAll(t, leader, acked)
	if n := acked + 30; fillDisk(t, leader, acked+1, n) != n {
		t.Error("the others do not go on")
	} else {
		acked = n
	}
	r1.awaitFull()
	mount(t, "tmpfs", r1.logDir(), "tmpfs", unix.MS_REMOUNT, "size=10m")
	awaitSame(t, sites...)
	holdsAll(t, r1, acked)

	// A transaction for which the whole disk is too small. It is in doubt while
	// there is no room: nobody else has to wait for that.
	transfer(t, leader, r1)
	doubt := make(chan error, 1)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, r1.server.DSN("app"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	go func() {
		_, err := conn.Exec(ctx, "INSERT INTO t SELECT 2000 + i, (SELECT string_agg(md5(i::text || n), '') FROM generate_series(1, 3000) n) FROM generate_series(1, 200) i")
		doubt <- err
	}()
	r1.awaitFull()
	leader = leaderOf(t, r2, r3)
	leader.run("INSERT INTO t VALUES (1000, 'while the disk of r1 is full')")
	acked = holdsAll(t, leader, acked)

	// Still full at the next start, and that breaks nothing.
	r1.kill()
	r1.start()
	Eventually(t, time.Minute, "r1 tells that its disk is full", func(ctx context.Context) error {
		if !r1.runs() {
			r1.awaitEnd("no room on the disk of the slot log", "free some")
			return nil
		}
		st, err := r1.status(ctx)
		if err == nil && !strings.Contains(st.Health, "is full") {
			err = fmt.Errorf("it is %+v", st)
		}
		return err
	})
	mount(t, "tmpfs", r1.logDir(), "tmpfs", unix.MS_REMOUNT, "size=128m")
	if !r1.runs() {
		r1.start()
	}
	awaitSame(t, sites...)
	holdsAll(t, r1, acked)
	err = <-doubt
	var large int
	reader, cerr := pgx.Connect(ctx, leader.server.DSN("app"))
	if cerr != nil {
		t.Fatal(cerr)
	}
	defer reader.Close(context.WithoutCancel(ctx))
	if err := reader.QueryRow(ctx, "SELECT count(*) FROM t WHERE id > 2000").Scan(&large); err != nil {
		t.Fatal(err)
	}
	if t.Logf("the large transaction: %v; %d of its rows", err, large); large != 0 && large != 200 || err == nil && large == 0 {
		t.Errorf("the large transaction ended with %v and %d rows are there", err, large)
	}

	// r3's log is damaged and nobody has the file any more.
	leader = leaderOf(t, sites...)
	lost := r3
	if leader == r3 {
		lost = r2
	}
	before := lost.await("answers", func(standing) bool { return true })
	lost.kill()
	path, content, end := lost.segment()
	content[end/2] ^= 1
	writeFile(t, path, content)
	lost.start()
	lost.awaitEnd("slot log is damaged", filepath.Base(path), "move data_dir and log.dir away")
	leader.run("INSERT INTO t VALUES (1001, 'while a log is damaged')")
	for _, dir := range []string{lost.dataDir(), lost.logDir()} {
		if err := os.Rename(dir, dir+".damaged"); err != nil {
			t.Fatal(err)
		}
	}
	lost.start()
	lost.awaitEnd("no identity in the running cluster", "drop and create the database")
	runOn(t, lost.server.DSN("postgres")+"?options=-csynchronous_commit%3Dlocal", "DROP DATABASE app", "CREATE DATABASE app")
	lost.start()
	after := lost.await("follows as a new replica", func(st standing) bool { return st.State == "following" && st.Healthy })
	if after.ReplicaID == before.ReplicaID {
		t.Errorf("%s came back as replica %d, whose memory is lost", lost.name, after.ReplicaID)
	}
	leader.run("INSERT INTO t VALUES (1002, 'all again')")
	awaitSame(t, sites...)
	holdsAll(t, lost, acked)
}

// fillDisk inserts rows of 96 KB with the ids from to to, until one is not taken, and
// returns the id of the last that was. Only that the region does not take writes
// is a reason.
func fillDisk(t testing.TB, s *site, from, to int) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.server.DSN("app"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for id := from; id <= to; id++ {
		_, err := conn.Exec(ctx, "INSERT INTO t SELECT $1::int, string_agg(md5($1::int::text || n), '') FROM generate_series(1, 3000) n", id)
		var pg *pgconn.PgError
		switch {
		case Refused(err) || errors.As(err, &pg) && pg.Code == "57P01": // ended by the sidecar
			t.Logf("row %d: %v", id, err)
			return id - 1
		case err != nil:
			t.Fatalf("row %d: %v", id, err)
		}
	}
	return to
}

// lead has one of the sites lead. It mostly does so by itself, see firstLeads;
// where the machine is busy the others' wait may be over before its database is
// ready.
func lead(t testing.TB, to *site, sites ...*site) {
	t.Helper()
	if l := leaderOf(t, sites...); l != to {
		transfer(t, l, to)
	}
	to.awaitWritable()
}

// transfer hands leadership over as an operator does.
func transfer(t testing.TB, from, to *site) {
	t.Helper()
	Eventually(t, 30*time.Second, "hand over to "+to.name, func(ctx context.Context) error {
		out, err := exec.CommandContext(ctx, filepath.Join(Binaries(t), "paxosctl"), "leader", "transfer", "--to", to.name, "--addr", from.admin).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	to.awaitWritable()
}

// awaitFull waits until the site tells that its disk is full, and what to do.
func (s *site) awaitFull() {
	s.t.Helper()
	words := []string{"the disk of log.dir " + s.logDir() + " is full", "free some", "goes on by itself"}
	s.await("its disk is full", func(st standing) bool { return !st.Healthy && !st.Writable && holds(st.Health, words) })
	s.awaitLogged("the disk of the log is full", "free some")
}

// holdsAll fails the test unless ids 1 to n are there, and returns the highest
// below 1000: the write in doubt may be there too.
func holdsAll(t testing.TB, s *site, n int) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.server.DSN("app"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var count, highest int
	if err := conn.QueryRow(ctx, "SELECT count(*), max(id) FROM t WHERE id < 1000").Scan(&count, &highest); err != nil {
		t.Fatal(err)
	}
	if count != highest || count < n || count > n+1 {
		t.Errorf("%s holds %d rows up to id %d; %d were acknowledged", s.name, count, highest, n)
	}
	return count
}
