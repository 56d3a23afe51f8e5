package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"quorate/deploy/sandbox"
	"quorate/deploy/sandbox/postgres"
	"quorate/deploy/sandbox/relay"
)

// serverSettings are those of every server of both contenders. Checkpoints are
// kept out of the turns; everything else is as the sandbox has it.
func serverSettings() map[string]string {
	return map[string]string{
		"unix_socket_directories":         "",
		"max_wal_size":                    "8GB",
		"checkpoint_timeout":              "1h",
		"wal_keep_size":                   "4GB",
		"wal_retrieve_retry_interval":     "100ms",
		"max_worker_processes":            "16",
		"track_commit_timestamp":          "off",
		"synchronous_commit":              "on",
		"hot_standby_feedback":            "off",
		"max_logical_replication_workers": "8",
	}
}

// benchDatabase is written to in the peer's servers.
const benchDatabase = "app"

// quorumCommit is PostgreSQL with four physical standbys, two of which must have
// flushed a commit: with the primary a majority of five.
type quorumCommit struct {
	primary  *postgres.Server
	standbys []*postgres.Server
	relays   []*relay.Relay
	spawn    *children
}

// startQuorumCommit makes and starts the servers, the standbys behind relays
// with the round trips that the sandbox gives from r1.
func startQuorumCommit(ctx context.Context, dir, pgBin, wan string, replicas int) (_ *quorumCommit, err error) {
	q := &quorumCommit{spawn: newChildren()}
	defer func() {
		if err != nil {
			q.stop()
		}
	}()
	if q.primary, err = q.server(dir, "p1", pgBin); err != nil {
		return nil, err
	}
	if err := q.primary.Init(ctx); err != nil {
		return nil, err
	}
	if _, err := q.primary.Start(ctx); err != nil {
		return nil, err
	}
	if err := exec1(ctx, q.primary.DSN("postgres"), "CREATE DATABASE "+benchDatabase); err != nil {
		return nil, err
	}
	var names []string
	for i := 1; i < replicas; i++ {
		name := fmt.Sprintf("p%d", i+1)
		names = append(names, name)
		s, err := q.server(dir, name, pgBin)
		if err != nil {
			return nil, err
		}
		r, err := relay.Listen("127.0.0.1:0", "127.0.0.1:"+strconv.Itoa(q.primary.Port), relay.NewWire(sandbox.RoundTrip(wan, 0, i)/2))
		if err != nil {
			return nil, err
		}
		q.relays = append(q.relays, r)
		if err := baseBackup(ctx, q.primary, s); err != nil {
			return nil, err
		}
		port := r.Addr()[strings.LastIndexByte(r.Addr(), ':')+1:]
		s.Settings["primary_conninfo"] = "host=127.0.0.1 port=" + port + " user=postgres application_name=" + name
		if _, err := s.Start(ctx); err != nil {
			return nil, err
		}
		q.standbys = append(q.standbys, s)
	}
	value := fmt.Sprintf("ANY %d (%s)", replicas/2, strings.Join(names, ", "))
	for _, sql := range []string{"ALTER SYSTEM SET synchronous_standby_names = '" + value + "'", "SELECT pg_reload_conf()"} {
		if err := exec1(ctx, q.primary.DSN("postgres"), sql); err != nil {
			return nil, err
		}
	}
	return q, q.awaitQuorum(ctx, replicas-1)
}

func (q *quorumCommit) server(dir, name, pgBin string) (*postgres.Server, error) {
	port, err := postgres.FreePort()
	if err != nil {
		return nil, err
	}
	return &postgres.Server{BinDir: pgBin, Dir: filepath.Join(dir, name), Port: port, Settings: serverSettings(), Spawn: q.spawn.start}, nil
}

// baseBackup fills the directory of a standby.
func baseBackup(ctx context.Context, from, to *postgres.Server) error {
	if err := os.MkdirAll(to.Dir, 0o755); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(from.BinDir, "pg_basebackup"), "-D", to.DataDir(), "-h", "127.0.0.1", "-p", strconv.Itoa(from.Port), "-U", "postgres", "-X", "stream", "-c", "fast")
	cmd.Dir = to.Dir
	if os.Geteuid() == 0 { // the servers run as this user then
		u, err := user.Lookup("postgres")
		if err != nil {
			return err
		}
		uid, err := strconv.Atoi(u.Uid)
		if err != nil {
			return err
		}
		gid, err := strconv.Atoi(u.Gid)
		if err != nil {
			return err
		}
		if err := os.Chown(to.Dir, uid, gid); err != nil {
			return err
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("pg_basebackup: %w\n%s", err, out)
	}
	return os.WriteFile(filepath.Join(to.DataDir(), "standby.signal"), nil, 0o644)
}

// awaitQuorum returns when all standbys count for the quorum and a commit has
// waited for them.
func (q *quorumCommit) awaitQuorum(ctx context.Context, want int) error {
	conn, err := pgx.Connect(ctx, q.primary.DSN("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return eventually(ctx, 30*time.Second, "a quorum of standbys", func() error {
		var n int
		if err := conn.QueryRow(ctx, "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'quorum' AND state = 'streaming'").Scan(&n); err != nil {
			return err
		}
		if n != want {
			return fmt.Errorf("%d of %d", n, want)
		}
		return nil
	})
}

func (q *quorumCommit) name() string { return "PostgreSQL" }
func (q *quorumCommit) dsn() string  { return q.primary.DSN(benchDatabase) }

// settle returns when every standby has replayed all there is.
func (q *quorumCommit) settle(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, q.primary.DSN("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return eventually(ctx, 2*time.Minute, "the standbys to catch up", func() error {
		var behind int
		err := conn.QueryRow(ctx, "WITH at AS MATERIALIZED (SELECT pg_current_wal_lsn() AS lsn) SELECT count(*) FROM pg_stat_replication, at WHERE replay_lsn < at.lsn").Scan(&behind)
		if err == nil && behind > 0 {
			err = fmt.Errorf("%d are behind", behind)
		}
		return err
	})
}

// servers are all of them, the primary first.
func (q *quorumCommit) servers() []*postgres.Server {
	if q.primary == nil {
		return nil
	}
	return append([]*postgres.Server{q.primary}, q.standbys...)
}

// stop ends the servers; it may be called twice. Its bounds are its own.
func (q *quorumCommit) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, s := range q.servers() {
		if err := s.Stop(ctx, syscall.SIGQUIT); err != nil {
			fmt.Fprintln(os.Stderr, "bench: stop postgres:", err)
		}
	}
	for _, r := range q.relays {
		r.Close()
	}
	q.spawn.close()
}

// children are processes that end with this one, even by kill -9. The kernel
// counts the death of the thread that started a process, so one thread starts
// all of them.
type children struct {
	requests chan spawnRequest
	ended    chan struct{}
	once     sync.Once
}

type spawnRequest struct {
	cmd    *exec.Cmd
	result chan error
}

func newChildren() *children {
	c := &children{requests: make(chan spawnRequest), ended: make(chan struct{})}
	go func() {
		defer close(c.ended)
		runtime.LockOSThread() // the thread ends with the goroutine
		for r := range c.requests {
			r.result <- r.cmd.Start()
		}
	}()
	return c
}

func (c *children) start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGQUIT
	r := spawnRequest{cmd, make(chan error, 1)}
	c.requests <- r
	return <-r.result
}

// close ends the thread, and with it what it started and still runs.
func (c *children) close() {
	c.once.Do(func() { close(c.requests) })
	<-c.ended
}

// exec1 runs one statement in a session of its own.
func exec1(ctx context.Context, dsn, sql string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, sql); err != nil {
		return fmt.Errorf("%s: %w", sql, err)
	}
	return nil
}

// eventually returns when f succeeds, or with what kept it from that.
func eventually(ctx context.Context, within time.Duration, what string, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var last error
	for {
		err := f()
		if err == nil {
			return nil
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %v for %s: %w", within, what, errors.Join(last, ctx.Err()))
		case <-time.After(20 * time.Millisecond):
		}
	}
}
