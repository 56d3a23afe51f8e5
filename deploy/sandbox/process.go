package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// process is one child of the supervisor that is no PostgreSQL server. Its
// owner waits for it by Stop, Kill or done.
type process struct {
	pid  int
	done chan struct{} // closed when it has been reaped
	err  error         // how it ended; read after done
}

// launch starts a command with its output appended to logFile and its identity
// recorded in pidFile.
func launch(s *spawner, cmd *exec.Cmd, logFile, pidFile string) (*process, error) {
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := s.start(cmd, syscall.SIGKILL); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	p := &process{pid: cmd.Process.Pid, done: make(chan struct{})}
	if err := record(pidFile, p.pid); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, err
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// running reports whether the process has not been reaped.
func (p *process) running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// kill ends the process with SIGKILL and returns when it is gone.
func (p *process) kill() {
	if p.running() {
		_ = syscall.Kill(p.pid, syscall.SIGKILL)
		<-p.done
	}
}

// stop asks the process to end, and ends it when ctx does.
func (p *process) stop(ctx context.Context) {
	if !p.running() {
		return
	}
	_ = syscall.Kill(p.pid, syscall.SIGTERM)
	_ = syscall.Kill(p.pid, syscall.SIGCONT) // it may be paused
	select {
	case <-p.done:
	case <-ctx.Done():
		p.kill()
	}
}

// pause returns when the process stands still.
func (p *process) pause(ctx context.Context) error {
	if !p.running() {
		return errors.New("it does not run")
	}
	if err := syscall.Kill(p.pid, syscall.SIGSTOP); err != nil {
		return err
	}
	for !p.paused() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("process %d runs on after SIGSTOP: %w", p.pid, ctx.Err())
		case <-p.done:
			return errors.New("it ended")
		case <-time.After(time.Millisecond):
		}
	}
	return nil
}

func (p *process) resume() error {
	if !p.running() {
		return errors.New("it does not run")
	}
	return syscall.Kill(p.pid, syscall.SIGCONT)
}

// paused reports whether every thread of the process is stopped.
func (p *process) paused() bool {
	if !p.running() {
		return false
	}
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*/stat", p.pid))
	for _, t := range threads {
		// A thread that cannot be read any more is ending, not stopped.
		if fields, err := statFields(t); err != nil || fields[0] != "T" {
			return false
		}
	}
	return len(threads) > 0
}

// identity tells a process from a later one of the same pid.
type identity struct {
	PID   int    `json:"pid"`
	Start string `json:"start"` // clock ticks since boot
	Boot  string `json:"boot"`
}

func identify(pid int) (identity, error) {
	fields, err := statFields(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return identity{}, err
	}
	if len(fields) < 20 {
		return identity{}, fmt.Errorf("/proc/%d/stat is of an unknown form", pid)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return identity{}, err
	}
	return identity{PID: pid, Start: fields[19], Boot: string(bytes.TrimSpace(boot))}, nil
}

// statFields returns the fields of a stat file from the third, the state, on:
// the second, a name, may hold anything.
func statFields(file string) ([]string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	_, rest, ok := bytes.Cut(b[max(0, bytes.LastIndexByte(b, ')')):], []byte(" "))
	if !ok {
		return nil, fmt.Errorf("%s is of an unknown form", file)
	}
	var fields []string
	for _, f := range bytes.Fields(rest) {
		fields = append(fields, string(f))
	}
	return fields, nil
}

func record(file string, pid int) error {
	id, err := identify(pid)
	if err != nil {
		return fmt.Errorf("record process %d: %w", pid, err)
	}
	b, err := json.Marshal(id)
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

// endRecorded ends the process recorded in file if it still is that one, and
// forgets it.
func endRecorded(ctx context.Context, file string) error {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var id identity
	if json.Unmarshal(b, &id) == nil && id.PID > 1 {
		for {
			if now, err := identify(id.PID); err != nil || now != id || zombie(id.PID) {
				break
			}
			if err := syscall.Kill(id.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("end process %s, left by an earlier supervisor: %w", strconv.Itoa(id.PID), err)
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("process %d, left by an earlier supervisor, does not end: %w", id.PID, ctx.Err())
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	return os.Remove(file)
}

func zombie(pid int) bool {
	fields, err := statFields(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && fields[0] == "Z"
}

// logTail returns the last lines of a log, for an error message.
func logTail(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	lines = lines[max(0, len(lines)-15):]
	return file + ":\n  " + string(bytes.Join(lines, []byte("\n  ")))
}
