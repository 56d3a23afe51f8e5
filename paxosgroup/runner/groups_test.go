package runner

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"quorate/paxosgroup"
	"quorate/paxosgroup/peer"
	"quorate/paxosgroup/slotlog"
)

var manyGroups = flag.Int("groups", 0, "groups that TestManyGroups runs on five processes; 0 skips it")

const groupsChild = "QUORATE_TEST_GROUPS_CHILD"

// child is what one of the five processes is told.
type child struct {
	ID        paxosgroup.ReplicaID
	Dir       string
	Groups    int
	Addresses map[paxosgroup.ReplicaID]string
}

// TestMain makes this binary one of the processes of TestManyGroups if told so.
func TestMain(m *testing.M) {
	if told := os.Getenv(groupsChild); told != "" {
		if err := runChild(told); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// runChild answers each line on its standard input with how many groups it
// leads with a lease, its processor time in seconds, its memory in MiB, and of
// that, in bytes, what groups hold. At "gather" it first hands what it leads to
// replica 1, at "collect" it collects garbage. It ends with its input.
func runChild(told string) error {
	var c child
	if err := json.Unmarshal([]byte(told), &c); err != nil {
		return err
	}
	log, restored, err := slotlog.Open(slotlog.Config{Dir: c.Dir, SegmentBytes: 16 << 20})
	if err != nil {
		return err
	}
	var run *Runner
	transport, err := peer.New(peer.Config{ClusterID: "groups", Self: c.ID, Deliver: func(from paxosgroup.ReplicaID, batch []peer.GroupMessage) {
		run.Deliver(from, batch)
	}})
	if err != nil {
		return err
	}
	m := paxosgroup.Membership{NextID: 6}
	for id := paxosgroup.ReplicaID(1); id <= 5; id++ {
		m.Members = append(m.Members, paxosgroup.Member{ID: id, Region: fmt.Sprint("r", id), Kind: paxosgroup.Voter})
	}
	before := heapBytes()
	cfg := Config{Log: log, Restored: restored, Transport: transport}
	for g := range c.Groups {
		cfg.Groups = append(cfg.Groups, GroupConfig{
			Core: paxosgroup.Config{
				Group: paxosgroup.GroupID(g + 1), ID: c.ID, Region: fmt.Sprint("r", c.ID),
				PreferredRegion: "r1", Seed: uint64(time.Now().UnixNano()),
			},
			Bootstrap: m,
		})
	}
	if run, err = New(cfg); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", c.Addresses[c.ID])
	if err != nil {
		return err
	}
	server := grpc.NewServer(peer.ServerOptions()...)
	transport.Register(server)
	transport.SetPeers(c.Addresses)
	go server.Serve(listener)
	go transport.Run(context.Background())
	go run.Run(context.Background())
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		switch in.Text() {
		case "gather":
			gather(run, c)
		case "collect":
			runtime.GC()
		}
		leads := 0
		for g := range c.Groups {
			r := run.Group(paxosgroup.GroupID(g + 1))
			chosen, _ := r.Chosen()
			r.SetApplied(chosen) // a database that is always there
			if s := r.Status(); s.Role == paxosgroup.Leader && s.LeaseUntil > BootTime() {
				leads++
			}
		}
		var use syscall.Rusage
		syscall.Getrusage(syscall.RUSAGE_SELF, &use)
		fmt.Println(leads, float64(use.Utime.Nano()+use.Stime.Nano())/1e9, residentMiB(), heapBytes()-before)
	}
	return nil
}

func gather(run *Runner, c child) {
	var transfers errgroup.Group
	transfers.SetLimit(32)
	for g := range c.Groups {
		r := run.Group(paxosgroup.GroupID(g + 1))
		if r.Status().Role == paxosgroup.Leader && c.ID != 1 {
			transfers.Go(func() error {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				r.Transfer(ctx, 1) // who leads is looked at afterwards
				return nil
			})
		}
	}
	transfers.Wait()
}

func heapBytes() int {
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	return int(mem.HeapAlloc)
}

func residentMiB() int {
	b, _ := os.ReadFile("/proc/self/statm")
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.Atoi(fields[1])
	return pages * os.Getpagesize() >> 20
}

type childProcess struct {
	cmd *exec.Cmd
	in  *os.File
	out *bufio.Scanner
}

func (p *childProcess) ask(t *testing.T, what string) (leads int, cpu float64, resident, heap int) {
	t.Helper()
	fmt.Fprintln(p.in, what)
	if !p.out.Scan() {
		t.Fatal("a process has ended")
	}
	if _, err := fmt.Sscan(p.out.Text(), &leads, &cpu, &resident, &heap); err != nil {
		t.Fatalf("%q: %v", p.out.Text(), err)
	}
	return leads, cpu, resident, heap
}

// TestManyGroups measures what groups at rest cost five processes, and how long
// those that one of them led are without a leader when it is killed:
//
//	go test ./paxosgroup/runner -run TestManyGroups -groups 1000 -v
func TestManyGroups(t *testing.T) {
	if *manyGroups == 0 {
		t.Skip("takes a minute: -groups 1000")
	}
	addresses := map[paxosgroup.ReplicaID]string{}
	for id := paxosgroup.ReplicaID(1); id <= 5; id++ {
		l := listen(t)
		addresses[id] = l.Addr().String()
		l.Close()
	}
	processes := map[paxosgroup.ReplicaID]*childProcess{}
	for id := paxosgroup.ReplicaID(1); id <= 5; id++ {
		told, _ := json.Marshal(child{ID: id, Dir: t.TempDir(), Groups: *manyGroups, Addresses: addresses})
		p := &childProcess{cmd: exec.Command(os.Args[0])}
		p.cmd.Env = append(os.Environ(), groupsChild+"="+string(told), "GOMAXPROCS=2")
		p.cmd.Stderr = os.Stderr
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		p.cmd.Stdin, p.in = r, w
		out, err := p.cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		p.out = bufio.NewScanner(out)
		if err := p.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		r.Close()
		processes[id] = p
		t.Cleanup(func() {
			p.in.Close()
			p.cmd.Process.Kill()
			p.cmd.Wait()
		})
	}
	led := func() (all, first int) {
		for id := paxosgroup.ReplicaID(1); id <= 5; id++ {
			if p := processes[id]; p != nil {
				n, _, _, _ := p.ask(t, "?")
				all += n
				if id == 1 {
					first = n
				}
			}
		}
		return all, first
	}
	begun := time.Now()
	eventually(t, "all groups have a leader", time.Minute, func() bool { n, _ := led(); return n == *manyGroups })
	t.Logf("all led after %v", time.Since(begun).Round(time.Millisecond))
	begun = time.Now()
	eventually(t, "one process leads all groups", time.Minute, func() bool {
		for id := paxosgroup.ReplicaID(2); id <= 5; id++ {
			processes[id].ask(t, "gather")
		}
		_, n := led()
		return n == *manyGroups
	})
	t.Logf("all handed to one process after %v", time.Since(begun).Round(time.Millisecond))
	time.Sleep(3 * time.Second)
	led()
	time.Sleep(12 * time.Second) // until questions about what is applied have come to rest
	cpu := map[paxosgroup.ReplicaID]float64{}
	from := time.Now()
	for id, p := range processes {
		_, cpu[id], _, _ = p.ask(t, "?")
	}
	time.Sleep(10 * time.Second)
	took := time.Since(from).Seconds()
	for id := paxosgroup.ReplicaID(1); id <= 5; id++ {
		n, now, resident, _ := processes[id].ask(t, "?")
		_, _, _, heap := processes[id].ask(t, "collect")
		share := 100 * (now - cpu[id]) / took
		t.Logf("process %d leads %d: %.2f %% of a core at rest, %d MiB resident, %d bytes of live heap a group", id, n, share, resident, heap / *manyGroups)
		if share > 2 || resident > 200 {
			t.Errorf("process %d: more than 2 %% of a core or 200 MiB", id)
		}
	}
	all, lost := led()
	if all != *manyGroups {
		t.Errorf("%d of %d groups are led", all, *manyGroups)
	}
	processes[1].cmd.Process.Kill()
	processes[1] = nil
	killed := time.Now()
	eventually(t, "all groups have a leader again", time.Minute, func() bool { n, _ := led(); return n == *manyGroups })
	t.Logf("%d groups lost their leader and had one with a lease after %v", lost, time.Since(killed).Round(time.Millisecond))
	if took := time.Since(killed); took > 5*time.Second {
		t.Errorf("failover of %d groups took %v, want 5 s", lost, took)
	}
}
