package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"quorate/deploy/sandbox/relay"
)

const replicas = 5

// cluster is five replicas of one contender.
type cluster struct {
	contender string
	nodes     [replicas]*process
	relays    []*relay.Relay
	leader    *process // as last found by awaitLeader
	stalled   *process // stopped for the time being: nothing is asked of it
	groups    int
}

// process is one replica as it is seen from here.
type process struct {
	id    int
	dir   string
	peers []string
	cmd   *exec.Cmd
	in    *json.Encoder
	pipe  interface{ Close() error }
	out   *json.Decoder
	mu    sync.Mutex // one command at a time
}

// startCluster starts the replicas, with oneWay of delay between any two. Over a
// wire, if one is given, the first and the last reach each other.
func startCluster(dir, contender string, oneWay time.Duration, groups int, over ...*relay.Wire) (c *cluster, err error) {
	c = &cluster{contender: contender, groups: max(groups, 1)}
	defer func() {
		if err != nil {
			c.stop()
		}
	}()
	var listeners [replicas]*os.File
	var addresses [replicas]string
	for i := range replicas {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		addresses[i] = l.Addr().String()
		if listeners[i], err = l.(*net.TCPListener).File(); err != nil {
			return nil, err
		}
		l.Close()
		// Ours is closed once the replica has its own, so that its death closes the port.
		defer listeners[i].Close()
	}
	for i := range replicas {
		cfg := nodeConfig{Contender: contender, ID: i + 1, Dir: filepath.Join(dir, fmt.Sprintf("%s-%d", contender, i+1)), Groups: groups}
		if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
			return nil, err
		}
		for j := range replicas {
			address := addresses[j]
			wire := relay.NewWire(oneWay)
			slowable := len(over) > 0 && i != j && (i+j == replicas-1) && (i == 0 || j == 0)
			if slowable {
				wire = over[0]
			}
			if oneWay > 0 && j != i || slowable {
				r, err := relay.Listen("127.0.0.1:0", address, wire)
				if err != nil {
					return nil, err
				}
				c.relays = append(c.relays, r)
				address = r.Addr()
			}
			cfg.Peers = append(cfg.Peers, address)
		}
		if c.nodes[i], err = startProcess(cfg, listeners[i]); err != nil {
			return nil, err
		}
	}
	return c, c.awaitLeader(30 * time.Second)
}

func startProcess(cfg nodeConfig, listener *os.File) (*process, error) {
	b, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	stderr, err := os.Create(filepath.Join(cfg.Dir, "stderr"))
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), nodeEnv+"="+string(b))
	cmd.Stderr = stderr
	cmd.ExtraFiles = []*os.File{listener} // as listenerFD
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &process{id: cfg.ID, dir: cfg.Dir, peers: cfg.Peers, cmd: cmd, in: json.NewEncoder(in), pipe: in, out: json.NewDecoder(bufio.NewReader(out))}, nil
}

// do has the replica carry out a command.
func (p *process) do(c command) (answer, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var a answer
	if err := p.in.Encode(c); err != nil {
		return a, p.because(err)
	}
	if err := p.out.Decode(&a); err != nil {
		return a, p.because(err)
	}
	if a.Error != "" {
		return a, fmt.Errorf("replica %d: %s: %s", p.id, c.Do, a.Error)
	}
	return a, nil
}

// because adds what the replica has written about itself.
func (p *process) because(err error) error {
	b, _ := os.ReadFile(filepath.Join(p.dir, "stderr"))
	return fmt.Errorf("replica %d in %s: %w\n%s", p.id, p.dir, err, b[max(0, len(b)-2000):])
}

// kill ends the replica at once.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // an error: it has ended
	_ = p.cmd.Wait()
}

// running are the replicas that were not killed and are not stalled.
func (c *cluster) running() []*process {
	var out []*process
	for _, p := range c.nodes {
		if p != nil && p != c.stalled {
			out = append(out, p)
		}
	}
	return out
}

// awaitLeader returns when every group has a leader that can serve.
func (c *cluster) awaitLeader(limit time.Duration) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		leads, most := 0, 0
		for _, p := range c.running() {
			a, err := p.do(command{Do: "status"})
			if err != nil {
				return err
			}
			if leads += a.Leads; a.Leads > most {
				most, c.leader = a.Leads, p
			}
		}
		if leads >= c.groups {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: only %d of %d groups have a leader after %v", c.contender, leads, c.groups, limit)
		}
	}
}

// settle returns when every running replica has delivered the same.
func (c *cluster) settle(limit time.Duration) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		lowest, highest := ^uint64(0), uint64(0)
		for _, p := range c.running() {
			a, err := p.do(command{Do: "counters"})
			if err != nil {
				return err
			}
			lowest, highest = min(lowest, a.Counters.Applied), max(highest, a.Counters.Applied)
		}
		if lowest == highest {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: replicas are apart after %v: %d and %d", c.contender, limit, lowest, highest)
		}
	}
}

// turn is one load on one cluster.
type turn struct {
	loadResult
	all    counters // of all processes, between mark and finish
	leader counters // of the leader's; levels are at the end
}

// measure has the leader's proposers work and looks at every process before and
// after.
func (c *cluster) measure(ctx context.Context, proposers, size int, warm, length time.Duration, profile string) (turn, error) {
	if err := c.awaitLeader(10 * time.Second); err != nil {
		return turn{}, err
	}
	lead := c.leader
	looked := c.running()
	if _, err := lead.do(command{Do: "load", Proposers: proposers, Bytes: size}); err != nil {
		return turn{}, err
	}
	pause(ctx, warm)
	look := func() (map[*process]counters, error) {
		at := make(map[*process]counters)
		for _, p := range looked {
			a, err := p.do(command{Do: "counters"})
			if err != nil {
				return nil, err
			}
			at[p] = *a.Counters
		}
		return at, nil
	}
	before, err := look()
	if err != nil {
		return turn{}, err
	}
	for _, p := range looked {
		mark := command{Do: "mark"}
		if profile != "" {
			role := fmt.Sprintf("follower%d", p.id)
			if p == lead {
				role = "leader"
			}
			mark.Profile = fmt.Sprintf("%s-%s.cpu", profile, role)
		}
		if p == lead || mark.Profile != "" {
			if _, err := p.do(mark); err != nil {
				return turn{}, err
			}
		}
	}
	pause(ctx, length)
	a, err := lead.do(command{Do: "finish"})
	if err != nil {
		return turn{}, err
	}
	after, err := look()
	if err != nil {
		return turn{}, err
	}
	if profile != "" {
		for _, p := range looked {
			if p != lead {
				if _, err := p.do(command{Do: "finish"}); err != nil {
					return turn{}, err
				}
			}
		}
	}
	t := turn{loadResult: *a.Load}
	for _, p := range looked {
		d := after[p].sub(before[p])
		if p == lead {
			t.leader = d
		}
		t.all = t.all.plus(d)
	}
	if t.Failed > 0 {
		return t, fmt.Errorf("%s with %d proposers: %d operations failed: %s", c.contender, proposers, t.Failed, t.LastError)
	}
	if t.Operations == 0 {
		return t, fmt.Errorf("%s with %d proposers: nothing was done in %v", c.contender, proposers, length)
	}
	return t, ctx.Err()
}

// stall stops a follower, as a machine that hangs does: its connections stay.
func (c *cluster) stall() error {
	if err := c.awaitLeader(10 * time.Second); err != nil {
		return err
	}
	for _, p := range c.nodes {
		if p != nil && p != c.leader {
			c.stalled = p
		}
	}
	return c.stalled.cmd.Process.Signal(syscall.SIGSTOP)
}

func (c *cluster) resume() error {
	p := c.stalled
	c.stalled = nil
	if p == nil {
		return nil
	}
	return p.cmd.Process.Signal(syscall.SIGCONT)
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// stop ends all replicas and relays.
func (c *cluster) stop() error {
	errs := []error{c.resume()}
	for i, p := range c.nodes {
		if p == nil {
			continue
		}
		p.pipe.Close()
		// A replica that does not stop is not waited for.
		timer := time.AfterFunc(5*time.Second, func() { _ = p.cmd.Process.Kill() })
		if err := p.cmd.Wait(); err != nil {
			errs = append(errs, p.because(err))
		}
		timer.Stop()
		c.nodes[i] = nil
	}
	for _, r := range c.relays {
		r.Close()
	}
	c.relays = nil
	return errors.Join(errs...)
}
