package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// nodeEnv holds a nodeConfig in JSON, and makes this process a replica.
const nodeEnv = "CONSENSUS_NODE"

// listenerFD is the file descriptor on which a replica finds its listener.
const listenerFD = 3

// nodeConfig says what a replica is.
type nodeConfig struct {
	Contender string
	ID        int // 1 to len(Peers)
	Dir       string
	Peers     []string // addresses as this replica reaches the others, by ID-1
	Groups    int      // quorate only
	Options   map[string]string
}

// member is a replica of one contender.
type member interface {
	// leads tells of how many groups this replica is the leader, able to serve.
	leads() int
	// propose returns when the payload is chosen and delivered in order. The
	// payload begins with the number of the proposer, four bytes little-endian,
	// and is not changed afterwards.
	propose(ctx context.Context, proposer int, payload []byte) error
	// count fills in what only the contender knows.
	count(*counters)
	close() error
}

// proposersMax bounds the proposers of one load.
const proposersMax = 1 << 13

// counters are of one process since its start.
type counters struct {
	CPU          time.Duration // user and system
	Allocs       uint64        // heap objects
	AllocBytes   uint64
	Flushes      uint64 // as the contender's log counts them
	LogBytes     uint64 // handed to the file system, as the log counts them; 0: it does not
	StorageBytes uint64 // write_bytes of /proc/self/io: pages made dirty
	NetBytes     uint64 // received and answered on connections that others opened
	Messages     uint64 // sent
	Frames       uint64 // in which they were sent
	Applied      uint64 // the last slot or index delivered
	RSSBytes     uint64
	HeapBytes    uint64 // live and not yet swept
}

func (c counters) sub(o counters) counters {
	c.CPU -= o.CPU
	c.Allocs -= o.Allocs
	c.AllocBytes -= o.AllocBytes
	c.Flushes -= o.Flushes
	c.LogBytes -= o.LogBytes
	c.StorageBytes -= o.StorageBytes
	c.NetBytes -= o.NetBytes
	c.Messages -= o.Messages
	c.Frames -= o.Frames
	c.Applied -= o.Applied
	return c
}

// plus adds everything but what is a level, of which it keeps the largest.
func (c counters) plus(o counters) counters {
	c.CPU += o.CPU
	c.Allocs += o.Allocs
	c.AllocBytes += o.AllocBytes
	c.Flushes += o.Flushes
	c.LogBytes += o.LogBytes
	c.StorageBytes += o.StorageBytes
	c.NetBytes += o.NetBytes
	c.Messages += o.Messages
	c.Frames += o.Frames
	c.Applied = max(c.Applied, o.Applied)
	c.RSSBytes = max(c.RSSBytes, o.RSSBytes)
	c.HeapBytes = max(c.HeapBytes, o.HeapBytes)
	return c
}

// command is one line to a replica.
type command struct {
	Do        string // status, counters, load, mark, finish, echo, flush, gather
	Proposers int    `json:",omitempty"`
	Bytes     int    `json:",omitempty"`
	Count     int    `json:",omitempty"`
	Address   string `json:",omitempty"` // echo
	Profile   string `json:",omitempty"` // mark: write a CPU profile there until finish
}

// answer is one line from a replica.
type answer struct {
	Error    string         `json:",omitempty"`
	Leads    int            `json:",omitempty"`
	Counters *counters      `json:",omitempty"`
	Load     *loadResult    `json:",omitempty"`
	Times    map[string]dur `json:",omitempty"` // p50 of what was probed
}

type dur = time.Duration

// node is this process as a replica.
type node struct {
	cfg      nodeConfig
	member   member
	net      netCounter
	load     *load
	profiles []io.Closer
}

// runNode serves until standard input ends.
func runNode(config string) error {
	var n node
	if err := json.Unmarshal([]byte(config), &n.cfg); err != nil {
		return fmt.Errorf("%s: %w", nodeEnv, err)
	}
	listener, err := net.FileListener(os.NewFile(listenerFD, "listener"))
	if err != nil {
		return fmt.Errorf("listener: %w", err)
	}
	listener = &countedListener{Listener: listener, count: &n.net}
	switch n.cfg.Contender {
	case "quorate":
		n.member, err = startQuorate(n.cfg, listener)
	case "etcd":
		n.member, err = startEtcd(n.cfg, listener)
	case "hashicorp":
		n.member, err = startHashicorp(n.cfg, listener)
	default:
		err = fmt.Errorf("no contender %q", n.cfg.Contender)
	}
	if err != nil {
		return err
	}
	in, out := json.NewDecoder(bufio.NewReader(os.Stdin)), json.NewEncoder(os.Stdout)
	for {
		var c command
		if err := in.Decode(&c); errors.Is(err, io.EOF) {
			return n.member.close()
		} else if err != nil {
			return fmt.Errorf("command: %w", err)
		}
		a, err := n.do(c)
		if err != nil {
			a.Error = err.Error()
		}
		if err := out.Encode(a); err != nil {
			return fmt.Errorf("answer: %w", err)
		}
	}
}

func (n *node) do(c command) (a answer, err error) {
	switch c.Do {
	case "status":
		a.Leads = n.member.leads()
	case "counters":
		a.Counters, err = n.counters()
	case "load":
		if n.load != nil || c.Proposers < 1 || c.Proposers > proposersMax || c.Bytes < payloadBytesMin {
			return a, fmt.Errorf("load of %d proposers and %d bytes: cannot begin", c.Proposers, c.Bytes)
		}
		n.load = startLoad(n.member, c.Proposers, c.Bytes)
	case "mark":
		if c.Profile != "" {
			if err = n.startProfile(c.Profile); err != nil {
				return a, err
			}
		}
		if n.load != nil {
			n.load.mark()
		}
	case "finish":
		if len(n.profiles) > 0 {
			err = n.stopProfile()
		}
		if n.load != nil {
			a.Load = n.load.finish()
			n.load = nil
		}
	case "echo":
		a.Times, err = probeEcho(c.Address, c.Bytes, c.Count)
	case "gather":
		if q, ok := n.member.(*quorate); ok {
			q.gather()
		}
	case "flush":
		var d dur
		d, err = probeFlush(filepath.Join(n.cfg.Dir, "probe"), c.Bytes, c.Count)
		a.Times = map[string]dur{"flush": d}
	default:
		err = fmt.Errorf("no command %q", c.Do)
	}
	return a, err
}

func (n *node) startProfile(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return errors.Join(err, f.Close())
	}
	n.profiles = append(n.profiles, f)
	runtime.MemProfileRate = 64 << 10
	return nil
}

// stopProfile also writes what was allocated since the start, beside it.
func (n *node) stopProfile() error {
	pprof.StopCPUProfile()
	f := n.profiles[0].(*os.File)
	n.profiles = nil
	heap, err := os.Create(strings.TrimSuffix(f.Name(), ".cpu") + ".allocs")
	if err == nil {
		err = errors.Join(pprof.Lookup("allocs").WriteTo(heap, 0), heap.Close())
	}
	return errors.Join(err, f.Close())
}

func (n *node) counters() (*counters, error) {
	var c counters
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		return nil, fmt.Errorf("getrusage: %w", err)
	}
	c.CPU = time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	samples := []metrics.Sample{{Name: "/gc/heap/allocs:objects"}, {Name: "/gc/heap/allocs:bytes"}, {Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(samples)
	c.Allocs, c.AllocBytes, c.HeapBytes = samples[0].Value.Uint64(), samples[1].Value.Uint64(), samples[2].Value.Uint64()
	var err error
	if c.StorageBytes, err = procField("/proc/self/io", "write_bytes:"); err != nil {
		return nil, err
	}
	kilobytes, err := procField("/proc/self/status", "VmRSS:")
	if err != nil {
		return nil, err
	}
	c.RSSBytes = kilobytes << 10
	c.NetBytes = n.net.bytes.Load()
	n.member.count(&c)
	return &c, nil
}

// procField returns the number behind a name in a file of /proc.
func procField(path, name string) (uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b))
	for i, f := range fields[:len(fields)-1] {
		if f == name {
			return strconv.ParseUint(fields[i+1], 10, 64)
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, name)
}

// netCounter counts what passes on the connections that others open. Since
// every contender sends on connections that the sender opens, the sum over all
// replicas is what was sent, answers of the protocol below included.
type netCounter struct{ bytes atomic.Uint64 }

type countedListener struct {
	net.Listener
	count *netCounter
}

func (l *countedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &countedConn{Conn: c, count: l.count}, nil
}

type countedConn struct {
	net.Conn
	count *netCounter
}

func (c *countedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.count.bytes.Add(uint64(n))
	return n, err
}

func (c *countedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.count.bytes.Add(uint64(n))
	return n, err
}
