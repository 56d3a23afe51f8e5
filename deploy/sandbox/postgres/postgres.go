// Package postgres runs PostgreSQL servers of a sandbox or a test: real ones,
// each in a directory of its own, on loopback, with fsync on. As root the server
// runs as the operating-system user postgres, since PostgreSQL refuses root.
package postgres

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// BinDir finds the directory that holds initdb and postgres: that of pg_config
// if it has them, else the newest of Debian's.
func BinDir() (string, error) {
	var candidates []string
	if out, err := exec.Command("pg_config", "--bindir").Output(); err == nil {
		candidates = append(candidates, strings.TrimSpace(string(out)))
	}
	debian, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	sort.Slice(debian, func(i, j int) bool { return majorOf(debian[i]) > majorOf(debian[j]) })
	candidates = append(candidates, debian...)
	for _, dir := range candidates {
		if _, err := os.Stat(filepath.Join(dir, "initdb")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("no PostgreSQL server binaries found: install them (Debian, Ubuntu: apt-get install postgresql) or put pg_config on the PATH")
}

func majorOf(bin string) int {
	n, _ := strconv.Atoi(filepath.Base(filepath.Dir(bin)))
	return n
}

// Server is one PostgreSQL server. Its methods are not for concurrent use.
type Server struct {
	BinDir   string
	Dir      string // holds data/, log and the socket
	Port     int    // on 127.0.0.1
	Settings map[string]string
	// Spawn starts the server's process; nil means (*exec.Cmd).Start.
	Spawn func(*exec.Cmd) error
}

// DSN returns a URL of the superuser postgres to database db.
func (s *Server) DSN(db string) string {
	u := url.URL{Scheme: "postgres", User: url.User("postgres"), Host: fmt.Sprintf("127.0.0.1:%d", s.Port), Path: "/" + db}
	return u.String()
}

// DataDir returns the server's data directory.
func (s *Server) DataDir() string { return filepath.Join(s.Dir, "data") }

// LogFile returns where the server logs.
func (s *Server) LogFile() string { return filepath.Join(s.Dir, "postgres.log") }

// Init makes the data directory, once: a second call does nothing. Its
// directory and every one above it must be enterable by user postgres when root
// calls.
func (s *Server) Init(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(s.DataDir(), "PG_VERSION")); err == nil {
		return nil
	}
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return err
	}
	cred, err := credential()
	if err != nil {
		return err
	}
	if cred != nil {
		if err := os.Chown(s.Dir, int(cred.Uid), int(cred.Gid)); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(s.DataDir()); err != nil { // half-made by an initdb that was killed
		return err
	}
	cmd := s.command(ctx, "initdb", "-D", s.DataDir(), "-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-instructions", "-N")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb in %s: %w\n%s", s.DataDir(), err, out)
	}
	return nil
}

// Start runs the server in the background, detached from the caller's session,
// and returns when it answers. It returns the postmaster's pid.
func (s *Server) Start(ctx context.Context) (int, error) {
	if pid, ok := s.Running(); ok {
		return pid, nil
	}
	settings := map[string]string{
		"listen_addresses":          "127.0.0.1",
		"port":                      strconv.Itoa(s.Port),
		"unix_socket_directories":   s.Dir,
		"wal_level":                 "logical",
		"max_wal_senders":           "10",
		"max_replication_slots":     "10",
		"max_connections":           "200",
		"shared_buffers":            "128MB",
		"max_prepared_transactions": "0",
		"log_line_prefix":           "%m [%p] %a ",
		"timezone":                  "UTC",
	}
	for k, v := range s.Settings {
		settings[k] = v
	}
	args := []string{"-D", s.DataDir()}
	keys := make([]string, 0, len(settings))
	for k := range settings {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		args = append(args, "-c", k+"="+settings[k])
	}
	logFile, err := os.OpenFile(s.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	defer logFile.Close()
	cred, err := credential()
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(filepath.Join(s.BinDir, "postgres"), args...)
	cmd.Dir = s.Dir
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred, Setsid: true}
	spawn := (*exec.Cmd).Start
	if s.Spawn != nil {
		spawn = func(cmd *exec.Cmd) error { return s.Spawn(cmd) }
	}
	if err := spawn(cmd); err != nil {
		return 0, fmt.Errorf("start postgres: %w", err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }() // reaps the child whenever it ends, in this process's lifetime
	for {
		if conn, err := pgx.Connect(ctx, s.DSN("postgres")+"?connect_timeout=2"); err == nil {
			conn.Close(ctx)
			return cmd.Process.Pid, nil
		}
		select {
		case err := <-exited:
			return 0, fmt.Errorf("postgres on port %d ended at start: %v\n%s", s.Port, err, tail(s.LogFile()))
		case <-ctx.Done():
			return 0, fmt.Errorf("postgres on port %d does not answer: %w\n%s", s.Port, ctx.Err(), tail(s.LogFile()))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Running returns the postmaster's pid if it runs.
func (s *Server) Running() (int, bool) {
	b, err := os.ReadFile(filepath.Join(s.DataDir(), "postmaster.pid"))
	if err != nil {
		return 0, false
	}
	first, _, _ := bytes.Cut(b, []byte("\n"))
	pid, err := strconv.Atoi(string(first))
	if err != nil || syscall.Kill(pid, 0) != nil {
		return 0, false
	}
	// The pid may have been handed to another process since.
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !bytes.Contains(cmdline, []byte(s.DataDir())) {
		return 0, false
	}
	return pid, true
}

// Stop ends the server by signal (SIGTERM smart, SIGINT fast, SIGQUIT
// immediate) and waits until it is gone.
func (s *Server) Stop(ctx context.Context, sig syscall.Signal) error {
	pid, ok := s.Running()
	if !ok {
		return nil
	}
	if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return waitGone(ctx, []int{pid})
}

// Kill ends the postmaster and every backend with SIGKILL, as a crash of the
// machine would, and waits until all are gone. It also ends backends that
// outlived their postmaster.
func (s *Server) Kill(ctx context.Context) error {
	// Stop the postmaster first so that it cannot start another child.
	if pid, ok := s.Running(); ok {
		_ = syscall.Kill(pid, syscall.SIGSTOP)
	}
	pids := s.processes()
	for _, p := range pids {
		_ = syscall.Kill(p, syscall.SIGKILL)
	}
	return waitGone(ctx, pids)
}

// Pause stops the postmaster and every backend with SIGSTOP and returns when
// all stand still.
func (s *Server) Pause(ctx context.Context) error {
	pid, ok := s.Running()
	if !ok {
		return errors.New("PostgreSQL does not run")
	}
	_ = syscall.Kill(pid, syscall.SIGSTOP) // first, so that no child is added
	if err := waitFor(ctx, []int{pid}, stoppedOrGone, "run on"); err != nil {
		return err
	}
	pids := s.processes()
	for _, p := range pids {
		_ = syscall.Kill(p, syscall.SIGSTOP)
	}
	return waitFor(ctx, pids, stoppedOrGone, "run on")
}

// Resume undoes Pause.
func (s *Server) Resume() error {
	for _, p := range s.processes() {
		if err := syscall.Kill(p, syscall.SIGCONT); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
	}
	return nil
}

// Paused reports whether the postmaster stands still.
func (s *Server) Paused() bool {
	pid, ok := s.Running()
	return ok && state(pid) == 'T'
}

// processes returns every process of the server: those that work in its data
// directory, as the postmaster and all its children do, or still in the one
// they were started in.
func (s *Server) processes() []int {
	dir, err := filepath.EvalSymlinks(s.Dir)
	if err != nil {
		return nil
	}
	data := filepath.Join(dir, filepath.Base(s.DataDir()))
	links, _ := filepath.Glob("/proc/[0-9]*/cwd")
	var pids []int
	for _, link := range links {
		if at, err := os.Readlink(link); err != nil || at != dir && at != data {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link)))
		if err != nil || !isPostgres(pid) {
			continue // a shell that somebody opened there, say
		}
		pids = append(pids, pid)
	}
	return pids
}

// isPostgres tells by the name the kernel has, since a backend rewrites its
// command line.
func isPostgres(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	name := strings.TrimSpace(string(b))
	return err == nil && (name == "postgres" || name == "initdb")
}

// Children returns the pids of the direct children of pid.
func Children(pid int) []int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil
	}
	var pids []int
	for _, f := range strings.Fields(string(b)) {
		if n, err := strconv.Atoi(f); err == nil {
			pids = append(pids, n)
		}
	}
	return pids
}

func waitGone(ctx context.Context, pids []int) error {
	return waitFor(ctx, pids, func(pid int) bool { s := state(pid); return s == 0 || s == 'Z' }, "still run")
}

func stoppedOrGone(pid int) bool {
	s := state(pid)
	return s == 0 || s == 'Z' || s == 'T'
}

// waitFor waits until all of pids are as asked.
func waitFor(ctx context.Context, pids []int, as func(pid int) bool, complaint string) error {
	for {
		left := 0
		for _, p := range pids {
			if !as(p) {
				left++
			}
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d postgres processes %s: %w", left, complaint, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// state returns the kernel's letter for what a process is doing (Z a zombie, T
// stopped), 0 if there is none of that pid.
func state(pid int) byte {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	i := bytes.LastIndexByte(b, ')')
	if i < 0 || i+2 >= len(b) {
		return 0
	}
	return b[i+2]
}

func (s *Server) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(s.BinDir, name), args...)
	cmd.Dir = s.Dir
	return cmd
}

// credential is that of user postgres when the caller is root, else nil.
func credential() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, fmt.Errorf("as root the servers run as user postgres: %w (create it: useradd --system postgres)", err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// FreePort returns a TCP port of 127.0.0.1 that nobody listens on at the moment,
// below those that the kernel gives to outgoing connections, which could take it
// before it is used.
func FreePort() (int, error) {
	for range 100 {
		port := 15000 + rand.IntN(15000)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			return port, l.Close()
		}
	}
	return 0, errors.New("no free port found on 127.0.0.1 between 15000 and 30000")
}

func tail(file string) string {
	b, _ := os.ReadFile(file)
	if len(b) > 2000 {
		b = b[len(b)-2000:]
	}
	return string(b)
}
